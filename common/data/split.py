"""Held-out rows that share no prompt with the others, and rows of a test file kept out of
training."""

import json
from collections.abc import Iterable, Iterator

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
    or more. Rows that were set apart already (column held_out) are all that is held out, at most
    max_eval of them; no prompt of theirs stays in train.
    """
    if not 0 <= eval_ratio < 1:
        raise SystemExit(f"eval_ratio {eval_ratio}: must be at least 0 and below 1")
    keys = _column(dataset, "prompt_key")
    apart = _set_apart(dataset)
    if apart.any():
        is_train = ~apart & ~np.isin(keys, keys[apart])
        order = np.argsort(_mixed(keys[apart], seed), kind="stable")
        count = max_eval if eval_ratio else 0
        chosen = np.sort(np.flatnonzero(apart)[order[:count]])
        return dataset.select(np.flatnonzero(is_train)), dataset.select(chosen)

    prompts, prompt_of_row, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    held_out = np.zeros(len(prompts), dtype=bool)
    if eval_ratio and max_eval > 0 and len(prompts) > 1:
        room = min(max_eval, int(len(dataset) * eval_ratio))
        order = np.argsort(_mixed(prompts, seed), kind="stable")
        held_out[_filling(order, sizes, room)] = True
    is_eval = held_out[prompt_of_row]
    train = dataset.select(np.flatnonzero(~is_eval))
    return train, dataset.select(np.flatnonzero(is_eval))


def _set_apart(dataset) -> np.ndarray:
    """Whether the name of its file holds each row out [N]."""
    if "held_out" not in dataset.column_names or not len(dataset):
        return np.zeros(len(dataset), dtype=bool)
    return _column(dataset, "held_out").astype(bool)


def describe_split(dataset, train, held_out, eval_ratio: float, max_eval: int) -> list[str]:
    """What people would not expect of a split, a line each."""
    rows = len(dataset)
    apart = int(_set_apart(dataset).sum())
    if apart:
        lost = rows - apart - len(train)
        more = apart - len(held_out)
        lines = [f"  {lost:,} left out: their prompts stand in the files held out"] if lost else []
        if more:
            lines.append(
                f"  {more:,} of the files held out are not used (--max_eval_samples, --eval_ratio)"
            )
        return lines
    wanted = min(max_eval, int(rows * eval_ratio))
    if not eval_ratio or max_eval <= 0 or wanted / 2 <= len(held_out) <= max(1, 2 * wanted):
        return []
    prompts = len(np.unique(_column(dataset, "prompt_key")))
    return [
        f"  warning: {len(held_out):,} of {rows:,} rows are held out, --eval_ratio {eval_ratio:g} "
        f"asks for {wanted:,}: rows with one prompt stay together, and there are {prompts:,} "
        "different prompts"
    ]


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

    Equal normalised questions, and near ones: 30 % (NEAR) of a question's 13-grams stand in the
    test questions, not counting 13-grams that more than 3 (BOILERPLATE) of these share, which are a
    common instruction. Where both have a system turn (a text to answer from, say), these must be
    equal or near as well.
    """
    test, _ = load_rows(test_path, kind, column_map, cache_dir=cache_dir)
    asked = list(_prompts(test))
    anywhere = _Known(question for _, question in asked)
    alone = _Known(question for system, question in asked if not system)
    pairs = set(asked)
    systems = _Known((system for system, _ in asked), boilerplate=len(asked))
    kept = []
    with Progress("leak check", total=len(train)) as progress:
        for i, (system, question) in enumerate(_prompts(train)):
            progress.update()
            if (system, question) in pairs:
                continue
            if not system and anywhere.has(question):
                continue
            if system and alone.has(question):
                continue
            if system and anywhere.has(question) and systems.has(system):
                continue
            kept.append(i)
    return train.select(kept), len(train) - len(kept)


class _Known:
    """Texts, and whether another is one of them or near one."""

    def __init__(self, texts: Iterable[str], boilerplate: int = BOILERPLATE):
        """boilerplate: 13-grams of more texts than this are common to them and no content."""
        self.texts = set(texts)
        grams = [_grams(text) for text in self.texts]
        joined = np.concatenate([np.zeros(0, np.uint64), *grams])
        self.grams, self.times = np.unique(joined, return_counts=True)
        self.boilerplate = boilerplate

    def has(self, text: str) -> bool:
        return text in self.texts or self.is_near(text)

    def is_near(self, text: str) -> bool:
        grams = _grams(text)
        if not len(self.grams):
            return False
        at = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
        found = self.grams[at] == grams
        common = found & (self.times[at] > self.boilerplate)
        leaked = np.sum(found & ~common)
        own = np.sum(~common)
        return leaked > 0 and leaked >= NEAR * own


def _column(dataset, name: str) -> np.ndarray:
    if not len(dataset):
        return np.zeros(0, np.int64)
    return dataset.select_columns(name).with_format("numpy")[:][name]


def _prompts(dataset) -> Iterator[tuple[str, str]]:
    """(system's turn, question) of each row, normalised."""
    for batch in dataset.select_columns("row").iter(1000):
        for row in batch["row"]:
            yield shapes.system_and_question(json.loads(row))


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
