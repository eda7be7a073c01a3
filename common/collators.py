"""Rows -> batches: packed (documents of one length budget in one row, no padding) and padded.

A row is {"input_ids": [T], "labels": [T]}; other columns are ignored. Labels are not shifted (as
transformers expects).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

IGNORE = -100


def pack_bins(lengths: Sequence[int], max_length: int, seed: int = 0) -> list[list[int]]:
    """Best-fit decreasing: put each row, longest first, into the fullest bin that still has room
    for it.

    Args:
        lengths: tokens per row; a row longer than max_length gets a bin of its own.
        seed: order among rows of equal length, and of the bins; the same arguments give the same
            bins on every machine.
    Returns:
        lists of indices into `lengths`, each index once. O(n log n): a million rows take seconds.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lengths.__getitem__, reverse=True)
    by_room: list[list[int]] = [
        [] for _ in range(max_length + 1)
    ]  # bins by the tokens that still fit
    # bit r is set where by_room[r] is not empty: the smallest room that fits is the lowest bit from
    # there
    rooms = 0
    bins: list[list[int]] = []
    for row in order:
        length = lengths[row]
        fits = rooms >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            target = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, target = max(max_length, length), len(bins)
            bins.append([])
        bins[target].append(row)
        by_room[room - length].append(target)
        rooms |= 1 << (room - length)
    rng.shuffle(bins)
    return bins


class PackedDataset(torch.utils.data.Dataset):
    """Map-style dataset of bins: item i is the list of rows of bin i, each with its "row_id" (index
    into `rows`).

    The sampler of the Trainer then shuffles bins anew in every epoch.
    """

    def __init__(self, rows, max_length: int, seed: int = 0, lengths: Sequence[int] | None = None):
        """rows: datasets.Dataset or list of {"input_ids", "labels"}; lengths: tokens per row, if
        already known."""
        self.rows = rows
        self.bins = pack_bins(
            _lengths(rows).tolist() if lengths is None else lengths, max_length, seed
        )

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[dict]:
        return [_numbered(self.rows, i) for i in self.bins[index]]


class TokenWindows(torch.utils.data.Dataset):
    """Documents end to end, cut into windows of exactly `length` tokens (the last one may be
    shorter).

    Item i is the list of the pieces of documents in window i, for PackedCollator: {"row_id",
    "input_ids", "labels"}, every token a label; a document that a cut parts goes on in the next
    window without its past. Only the number of tokens per document is held in memory. Documents
    come in an order drawn by `seed`, windows in the sampler's.
    """

    def __init__(self, rows, length: int, seed: int = 0):
        """rows: datasets.Dataset or list of {"input_ids"}, each with its end-of-text token."""
        self.length = length
        self.rows = (
            rows.with_format("numpy", columns=["input_ids"])
            if hasattr(rows, "with_format")
            else rows
        )
        sizes = _lengths(rows)
        self.order = np.random.default_rng(seed).permutation(len(sizes))
        self.ends = sizes[self.order].cumsum()

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.length) if len(self.ends) else 0

    def __getitem__(self, index: int) -> list[dict]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start, end = index * self.length, min((index + 1) * self.length, int(self.ends[-1]))
        pieces, at = [], int(np.searchsorted(self.ends, start, side="right"))
        while start < end:
            row, stop = int(self.order[at]), min(end, int(self.ends[at]))
            ids = np.asarray(self.rows[row]["input_ids"], dtype=np.int64)
            begin = len(ids) - int(self.ends[at]) + start
            ids = ids[begin : begin + stop - start]
            pieces.append({"row_id": row, "input_ids": ids, "labels": ids})
            start, at = stop, at + 1
        return pieces


class NumberedRows(torch.utils.data.Dataset):
    """The rows themselves, each with its "row_id"; what PackedDataset is for PackedCollator, for
    PaddedCollator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return _numbered(self.rows, index)


def _numbered(rows, index: int) -> dict:
    return {**rows[index], "row_id": index}


def _lengths(rows) -> np.ndarray:
    if not hasattr(rows, "with_format"):
        return np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
    import pyarrow.compute as pc

    tables = (
        rows.select_columns("input_ids").with_format("arrow").iter(10_000)
    )  # Arrow knows its lists' lengths
    parts = [pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]
    return np.concatenate(parts or [np.zeros(0)]).astype(np.int64)


class PackedCollator:
    """Bins (lists of rows) -> one row in which positions restart at every document.

    Returns input_ids, labels, position_ids [1, T] int64, cu_seq_lens_q/k [documents + 1] int32,
    max_length_q/k int and row_ids (the rows' "row_id", to be taken out before the model). The first
    label of each document is -100: nothing before it predicts it. There is no attention mask; the
    boundaries are what keeps documents apart.
    """

    def __call__(self, bins: list[list[dict]]) -> dict:
        rows = [row for one in bins for row in one]
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        ids = torch.cat([torch.as_tensor(row["input_ids"]) for row in rows])
        labels = torch.cat([torch.as_tensor(row["labels"]) for row in rows])
        labels[starts[:-1]] = IGNORE
        positions = torch.arange(len(ids)) - torch.repeat_interleave(starts[:-1], lengths)
        boundaries, longest = starts.to(torch.int32), int(lengths.max())
        return {
            "input_ids": ids[None],
            "labels": labels[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
            "row_ids": [row["row_id"] for row in rows if "row_id" in row],
        }


class PaddedCollator:
    """Rows -> input_ids, labels, attention_mask [B, T] int64, padded on the right; row_ids as in
    PackedCollator."""

    def __init__(self, pad_token_id: int | None, pad_to_multiple: int = 1):
        self.pad, self.multiple = (
            pad_token_id or 0,
            pad_to_multiple,
        )  # masked: without a pad token any id will do

    def __call__(self, rows: list[dict]) -> dict:
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), -(-longest // self.multiple) * self.multiple)
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORE)
        mask = torch.zeros(shape, dtype=torch.int64)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[i, :length] = torch.as_tensor(row["input_ids"])
            labels[i, :length] = torch.as_tensor(row["labels"])
            mask[i, :length] = 1
        row_ids = [row["row_id"] for row in rows if "row_id" in row]
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "row_ids": row_ids}
