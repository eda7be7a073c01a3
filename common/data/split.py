"""Held-out rows that share no prompt with the others, and rows of a test file kept out of
training."""

import json
from collections.abc import Iterator

import numpy as np

from common.data import shapes
from common.data.load import load_rows
from common.data.progress import Progress

GRAM = 13  # characters; the window of the near-duplicate check
# a prompt is leaked if this share of its 13-grams stands in the test prompts (one edit costs 13 of
# them)
NEAR = 0.3
# 13-grams in more test prompts than this are an instruction they share, not their content
BOILERPLATE = 3
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)


def split_rows(dataset, eval_ratio: float = 0.05, max_eval: int = 500, seed: int = 0):
    """(train, eval) by the hash of the prompt: equal prompts are always on one side, added rows
    move few others.

    eval has at most min(max_eval, eval_ratio * rows) rows, but one whole prompt where there are two
    or more.
    """
    if not 0 <= eval_ratio < 1:
        raise SystemExit(f"eval_ratio {eval_ratio}: must be at least 0 and below 1")
    keys = _column(dataset, "prompt_key")
    prompts, prompt_of_row, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    held_out = np.zeros(len(prompts), dtype=bool)
    if eval_ratio and max_eval > 0 and len(prompts) > 1:
        room = min(max_eval, int(len(dataset) * eval_ratio))
        order = np.argsort(_mixed(prompts, seed), kind="stable")
        held_out[_filling(order, sizes, room)] = True
    is_eval = held_out[prompt_of_row]
    train = dataset.select(np.flatnonzero(~is_eval))
    return train, dataset.select(np.flatnonzero(is_eval))


def _filling(order: np.ndarray, sizes: np.ndarray, room: int) -> list[int]:
    """The prompts, taken in `order`, whose rows fit into `room`; the smallest where none does."""
    taken = []
    for prompt in order:
        if sizes[prompt] <= room:
            taken.append(prompt)
            room -= sizes[prompt]
        if room <= 0:
            break
    return taken or [order[np.argmin(sizes[order])]]


def leak_check(train, test_path, kind: str = "chat", column_map=None, cache_dir=None):
    """(train without the rows whose prompt stands in the test files, how many went).

    Equal normalised prompts, and near ones: 30 % (NEAR) of a prompt's 13-grams stand in the test
    prompts, not counting 13-grams that more than 3 (BOILERPLATE) test prompts share, which are a
    common instruction.
    """
    test, _ = load_rows(test_path, kind, column_map, cache_dir=cache_dir)
    exact = np.isin(_column(train, "prompt_key"), _column(test, "prompt_key"))
    grams = [_grams(prompt) for prompt in set(_prompts(test))]
    known, times = np.unique(np.concatenate(grams), return_counts=True)
    kept = []
    with Progress("leak check", total=len(train)) as progress:
        for i, prompt in enumerate(_prompts(train)):
            progress.update()
            if not exact[i] and not _is_near(_grams(prompt), known, times):
                kept.append(i)
    return train.select(kept), len(train) - len(kept)


def _is_near(grams: np.ndarray, known: np.ndarray, times: np.ndarray) -> bool:
    """Whether a share NEAR of a prompt's own 13-grams is `known`, each of which stands in `times`
    test prompts."""
    if not len(known):
        return False
    at = np.minimum(np.searchsorted(known, grams), len(known) - 1)
    found = known[at] == grams
    common = found & (times[at] > BOILERPLATE)
    leaked = np.sum(found & ~common)
    own = np.sum(~common)
    return leaked > 0 and leaked >= NEAR * own


def _column(dataset, name: str) -> np.ndarray:
    if not len(dataset):
        return np.zeros(0, np.int64)
    return dataset.select_columns(name).with_format("numpy")[:][name]


def _prompts(dataset) -> Iterator[str]:
    for batch in dataset.select_columns("row").iter(1000):
        for row in batch["row"]:
            yield shapes.prompt_of(json.loads(row))


def _grams(text: str) -> np.ndarray:
    """Distinct hashes of the 13-character windows of a text without its whitespace; none for a
    shorter text."""
    characters = "".join(text.split())
    codes = np.frombuffer(characters.encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < GRAM:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, GRAM)
    powers = HASH_BASE ** np.arange(GRAM, dtype=np.uint64)
    return np.unique(_mixed((windows * powers).sum(1), seed=0))


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64's finaliser: another well-spread order of the keys for each seed."""
    offset = (seed + 1) * int(HASH_BASE) % 2**64
    x = keys.astype(np.uint64) + np.uint64(offset)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
