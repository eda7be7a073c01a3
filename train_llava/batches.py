"""From token rows to batches: windows of rows that share their pictures, padded rows, and the
pictures that belong to them.

A picture with several questions stands in a window once:

    <picture> | question answer | question answer | ...

every question with its answer seeing the picture and itself only, through
common/fast/shared_start.py. T tokens, P pictures of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from common.collators import PackedCollator, PaddedCollator, pack_bins, pad_document
from common.data.columns import lengths_of, numbered
from common.data.progress import Progress
from common.data.spelling import IGNORE
from common.fast import shared_start

COLUMNS = ("input_ids", "labels", "pictures")


def as_arrays(rows):
    """A datasets.Dataset that gives its columns as arrays; a list of rows as it is."""
    if not hasattr(rows, "with_format"):
        return rows
    return rows.with_format("numpy", columns=list(COLUMNS))


# ---- rows that share their beginning -------------------------------------------------------------


class Unit(NamedTuple):
    """Rows that stand side by side in a window.

    rows: their numbers. shared: how many tokens all of them begin with, which stand there once.
    tokens, pictures: of the whole.
    """

    rows: list[int]
    shared: int
    tokens: int
    pictures: int


class Beginning(NamedTuple):
    """Of a row: its tokens, where they predict the first label, the numbers of its pictures, the
    columns at which these begin, and how many tokens each takes."""

    ids: np.ndarray
    free: int
    pictures: list[int]
    starts: list[int]
    image_tokens: int


def beginning_of(row: dict, image_token_id: int, image_tokens: int) -> Beginning:
    ids = np.asarray(row["input_ids"])
    predicts = np.flatnonzero(np.asarray(row["labels"])[1:] != IGNORE)
    free = int(predicts[0]) if len(predicts) else 0
    starts = np.flatnonzero(ids == image_token_id)[::image_tokens].tolist()
    return Beginning(ids, free, [int(n) for n in row["pictures"]], starts, image_tokens)


def common_start(a: Beginning, b: Beginning) -> int:
    """Tokens that two rows begin with, whole pictures only, short of the one that predicts a first
    label: it stays beside what it predicts. Equal blocks of different pictures are not equal."""
    most = min(a.free, b.free)
    different = np.flatnonzero(a.ids[:most] != b.ids[:most])
    shared = int(different[0]) if len(different) else most
    for mine, theirs, start in zip(a.pictures, b.pictures, a.starts, strict=False):
        if mine != theirs or start < shared < start + a.image_tokens:
            return min(shared, start)
    return shared


def share_pictures(
    rows,
    candidates: Sequence[int],
    image_token_id: int,
    image_tokens: int,
    max_length: int,
    max_pictures: int,
) -> list[Unit]:
    """Rows that all begin with the same words and the same picture -> units that fit a window."""
    units: list[Unit] = []
    first: Beginning | None = None
    unit = Unit([], 0, 0, 0)
    for number in candidates:
        row = beginning_of(rows[int(number)], image_token_id, image_tokens)
        alone = Unit([int(number)], 0, len(row.ids), len(row.pictures))
        if first is None:
            unit, first = alone, row
            continue
        shared = common_start(first, row)
        if unit.shared:
            shared = min(shared, unit.shared)
        # what was shared before, and is not any more, stands in every row
        repeated = (len(unit.rows) - 1) * (unit.shared - shared)
        tokens = unit.tokens + repeated + len(row.ids) - shared
        known = sum(start < shared for start in row.starts)
        again = sum(shared <= start < unit.shared for start in first.starts)
        pictures = unit.pictures + (len(unit.rows) - 1) * again + len(row.pictures) - known
        if known and tokens <= max_length and pictures <= max_pictures:
            unit = Unit([*unit.rows, int(number)], shared, tokens, pictures)
        else:
            units.append(unit)
            unit, first = alone, row
    return [*units, unit] if unit.rows else units


def rows_by_beginning(rows, image_token_id: int, image_tokens: int) -> list[list[int]]:
    """Numbers of the rows, those together that have the same tokens up to the end of their first
    picture, and the same picture there, before any label."""
    groups: dict[bytes | int, list[int]] = {}
    with Progress("find pictures that rows share", total=len(rows)) as progress:
        for number in range(len(rows)):
            row = beginning_of(rows[number], image_token_id, image_tokens)
            key: bytes | int = number
            if row.starts and row.starts[0] + image_tokens <= row.free:
                start = row.ids[: row.starts[0]]
                key = b"%d:" % row.pictures[0] + np.ascontiguousarray(start, np.int32).tobytes()
            groups.setdefault(key, []).append(number)
            progress.update(1)
    return list(groups.values())


def why_not_shared(text_config, max_length: int) -> str:
    """What of a language model's attention does not let rows share a beginning; "" where they can.

    Its packed rows then go through transformers' own attention, which has one mask for all.
    """
    dropout = getattr(text_config, "attention_dropout", None) or 0
    if dropout:
        return f"its attention drops out {dropout:g} while it trains"
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"]
    window = getattr(text_config, "sliding_window", None)
    if window and window < max_length and "sliding_attention" in kinds:
        return f"its attention slides over {window:,} tokens"
    return ""


# ---- windows -------------------------------------------------------------------------------------


class PictureWindows(Dataset):
    """Map-style dataset of windows: item i is the list of rows of window i, each with its "row_id"
    and "shared", how many of its tokens stand in the row before it already (or in the one before
    that, ...; 0 where a unit begins)."""

    def __init__(
        self,
        rows,
        max_length: int,
        max_pictures: int,
        seed: int = 0,
        image_token_id: int | None = None,
        image_tokens: int = 1,
    ):
        """rows: datasets.Dataset or list of {"input_ids", "labels", "pictures"}.

        image_token_id: given, rows share their pictures; None: each has its own.
        """
        self.rows = as_arrays(rows)
        self.max_pictures = max_pictures
        lengths = lengths_of(rows).tolist()
        pictures = lengths_of(rows, "pictures").tolist()
        self.all_tokens = sum(lengths)
        self.units = [
            Unit([i], 0, tokens, shown)
            for i, (tokens, shown) in enumerate(zip(lengths, pictures, strict=True))
        ]
        if image_token_id is not None:
            self.units = []
            for group in rows_by_beginning(self.rows, image_token_id, image_tokens):
                self.units += share_pictures(
                    self.rows, group, image_token_id, image_tokens, max_length, max_pictures
                )
        # a picture counts as so many tokens that no window can have more than max_pictures
        price = max_length / max_pictures
        sizes = [max(u.tokens, int(np.ceil(u.pictures * price))) for u in self.units]
        self.bins = pack_bins(sizes, max_length, seed)
        self.filled = [sum(self.units[u].tokens for u in one) for one in self.bins]

    def __len__(self) -> int:
        return len(self.bins)

    def most_tokens(self, size: int) -> int:
        """Of a batch of `size` windows."""
        return sum(sorted(self.filled)[-size:])

    def most_pictures(self, size: int) -> int:
        """The same in pictures."""
        pictures = [sum(self.units[u].pictures for u in one) for one in self.bins]
        return sum(sorted(pictures)[-size:])

    def describe(self) -> str:
        """In one line what sharing saves."""
        together = [unit for unit in self.units if len(unit.rows) > 1]
        rows = sum(len(unit.rows) for unit in together)
        saved = self.all_tokens - sum(self.filled)
        told = (
            f"windows: {len(self.bins):,}; {rows:,} of {len(self.rows):,} rows share a picture, "
            f"{saved:,} of {self.all_tokens:,} tokens need not be computed"
        )
        full = sum(unit.pictures > self.max_pictures for unit in self.units)
        if full:
            told += f"; {full:,} rows have more than --max_images_per_bin {self.max_pictures}"
        return told

    def __getitem__(self, index: int) -> list[dict]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[list[dict]]:
        units = [[self.units[u] for u in self.bins[index]] for index in indices]
        wanted = [row for one in units for unit in one for row in unit.rows]
        found = iter(numbered(self.rows, wanted))
        return [[row for unit in one for row in _of_unit(unit, found)] for one in units]


def _of_unit(unit: Unit, found) -> list[dict]:
    return [
        next(found) | {"shared": unit.shared if place else 0} for place in range(len(unit.rows))
    ]


class PictureRows(Dataset):
    """The rows themselves, each with its "row_id", for padded batches."""

    def __init__(self, rows):
        self.rows = as_arrays(rows)
        self.lengths = lengths_of(rows)
        self.pictures = lengths_of(rows, "pictures")

    def __len__(self) -> int:
        return len(self.rows)

    def most_tokens(self, size: int) -> int:
        """Of a batch of `size` rows, padded."""
        return size * int(self.lengths.max(initial=0))

    def most_pictures(self, size: int) -> int:
        """Of such a batch."""
        return int(np.sort(self.pictures)[-size:].sum())

    def describe(self) -> str:
        return f"rows: {len(self.rows):,}, of up to {self.most_tokens(1):,} tokens, padded"

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return numbered(self.rows, indices)


# ---- batches -------------------------------------------------------------------------------------


class LlavaCollator(PackedCollator):
    """Windows -> one row, like PackedCollator, in which a beginning that rows share stands once.

    Beside what PackedCollator gives: kv_index (shared_start.py) where rows share one; pictures,
    uint8 [P, 3, height, width] or features [P, N, H], in the order of their tokens; faults,
    (reason, "where: what") of pictures that cannot be used. Rows that show one of those have no
    label left.
    """

    def __init__(self, pictures, image_token_id: int, image_tokens: int, multiple: int = 1):
        """pictures: features.PictureSource."""
        super().__init__(multiple)
        self.pictures = pictures
        self.image_token_id = image_token_id
        self.image_tokens = image_tokens

    def __call__(self, windows: list[list[dict]]) -> dict:
        rows = [row for one in windows for row in one]
        if not any("pictures" in row for row in rows):
            return super().__call__(windows)
        rows, shown, faults = with_pictures(rows, self.pictures, self.own_pictures)
        if any(row["shared"] for row in rows):
            batch = self.pack_shared(rows)
        else:
            batch = super().__call__([rows])
        return batch | {"pictures": shown, "faults": faults}

    def pack_shared(self, rows: list[dict]) -> dict:
        padding = -sum(len(row["input_ids"]) - row["shared"] for row in rows) % self.multiple
        if not padding:
            return shared_start.pack(rows)
        padded = [*rows, pad_document(padding) | {"shared": 0}]
        return shared_start.pack(padded) | {"padding_tokens": padding}

    def own_pictures(self, row: dict) -> list[int]:
        """Numbers of the pictures that stand in the row's own columns."""
        shared = np.asarray(row["input_ids"][: row["shared"]])
        known = int((shared == self.image_token_id).sum()) // self.image_tokens
        return [int(number) for number in row["pictures"][known:]]


class PaddedLlavaCollator(PaddedCollator):
    """Rows -> padded batches with their pictures and faults, as LlavaCollator gives them."""

    def __init__(self, pictures, pad_token_id: int | None):
        super().__init__(pad_token_id)
        self.pictures = pictures

    def __call__(self, rows: list[dict]) -> dict:
        rows, shown, faults = with_pictures(rows, self.pictures, lambda row: row["pictures"])
        return super().__call__(rows) | {"pictures": shown, "faults": faults}


def with_pictures(rows: list[dict], pictures, own) -> tuple[list[dict], torch.Tensor, list]:
    """(rows, their own pictures, faults); rows that show one that cannot be used without labels."""
    numbers = [int(number) for row in rows for number in own(row)]
    shown, faults = pictures(numbers)
    broken = {numbers[place] for place in faults}
    usable = [_unlearned(row) if _shows(row, broken) else row for row in rows]
    return usable, shown, list(faults.values())


def _shows(row: dict, numbers: set[int]) -> bool:
    return any(int(number) in numbers for number in row["pictures"])


def _unlearned(row: dict) -> dict:
    return row | {"labels": np.full(len(row["labels"]), IGNORE)}
