"""Held-out rows that share no prompt with the others, and rows of a test file kept out of
training."""

import json
from collections.abc import Iterator

import numpy as np

from common.data import shapes
from common.data.load import load_rows

GRAM = 13  # characters; the window of the near-duplicate check
# a prompt is leaked if this share of its 13-grams stands in the test prompts (one edit costs 13 of
# them)
NEAR = 0.3
BOILERPLATE = (
    3  # 13-grams in more test prompts than this are an instruction they share, not their content
)


def _column(dataset, name: str) -> np.ndarray:
    return (
        dataset.select_columns(name).with_format("numpy")[:][name]
        if len(dataset)
        else np.zeros(0, np.int64)
    )


def split_rows(dataset, eval_ratio: float = 0.05, max_eval: int = 500, seed: int = 0):
    """(train, eval) by the hash of the prompt: equal prompts are always on one side, added rows
    move few others.

    eval has at most min(max_eval, eval_ratio * rows) rows, but one whole prompt where there are two
    or more."""
    if not 0 <= eval_ratio < 1:
        raise SystemExit(f"eval_ratio {eval_ratio}: must be at least 0 and below 1")
    prompts, member, sizes = np.unique(
        _column(dataset, "prompt_key"), return_inverse=True, return_counts=True
    )
    held = np.zeros(len(prompts), dtype=bool)
    if eval_ratio and max_eval > 0 and len(prompts) > 1:
        room = min(max_eval, int(len(dataset) * eval_ratio))
        order = np.argsort(_mixed(prompts, seed), kind="stable")
        for prompt in order:
            if sizes[prompt] <= room:
                held[prompt] = True
                room -= sizes[prompt]
            if room <= 0:
                break
        if not held.any():
            held[order[np.argmin(sizes[order])]] = True
    return dataset.select(np.flatnonzero(~held[member])), dataset.select(
        np.flatnonzero(held[member])
    )


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64's finaliser: another well-spread order of the keys for each seed."""
    x = keys.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _grams(text: str) -> np.ndarray:
    """Distinct hashes of the 13-character windows of a text without its whitespace; none for a
    shorter text."""
    codes = np.frombuffer("".join(text.split()).encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < GRAM:
        return np.zeros(0, np.uint64)
    powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(GRAM, dtype=np.uint64)
    return np.unique(
        _mixed((np.lib.stride_tricks.sliding_window_view(codes, GRAM) * powers).sum(1), 0)
    )


def _prompts(dataset) -> Iterator[str]:
    for batch in dataset.select_columns("row").iter(1000):
        yield from (shapes.prompt_of(json.loads(row)) for row in batch["row"])


def leak_check(train, test_path, kind: str = "chat", column_map=None, cache_dir=None):
    """(train without the rows whose prompt stands in the test files, how many went).

    Equal normalised prompts, and near ones: 30 % (NEAR) of a prompt's 13-grams stand in the test
    prompts, not counting 13-grams that more than 3 (BOILERPLATE) test prompts share, which are a
    common instruction."""
    test, _ = load_rows(test_path, kind, column_map, cache_dir=cache_dir)
    exact = np.isin(_column(train, "prompt_key"), _column(test, "prompt_key"))
    seen, times = np.unique(
        np.concatenate([_grams(p) for p in set(_prompts(test))]), return_counts=True
    )
    kept = []
    for i, prompt in enumerate(_prompts(train)):
        if exact[i]:
            continue
        grams = _grams(prompt)
        at = np.minimum(np.searchsorted(seen, grams), max(len(seen) - 1, 0))
        found = seen[at] == grams if len(seen) else np.zeros(len(grams), bool)
        common = found & (times[at] > BOILERPLATE) if len(seen) else found
        leaked, own = np.sum(found & ~common), np.sum(~common)
        if not (leaked and leaked >= NEAR * own):
            kept.append(i)
    return train.select(kept), len(train) - len(kept)
