"""Rows -> batches: packed (documents of one length budget in one row, no padding) and padded.

A row is {"input_ids": [T], "labels": [T]}; other columns are ignored. Labels are not shifted (as
transformers expects).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from common.data.spelling import IGNORE

# what a batch says of itself and no model takes
NOT_FOR_MODELS = ("row_ids", "tokens", "label_tokens", "padding_tokens", "on_host")
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "prefix_lengths")


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
            room = max(max_length, length)
            target = len(bins)
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
        self.rows = as_arrays(rows)
        if lengths is None:
            lengths = lengths_of(rows).tolist()
        self.bins = pack_bins(lengths, max_length, seed)
        self.filled = [sum(lengths[i] for i in one) for one in self.bins]  # tokens

    def __len__(self) -> int:
        return len(self.bins)

    def most_tokens(self, size: int) -> int:
        """Of a batch of `size` bins."""
        return sum(sorted(self.filled)[-size:])

    def __getitem__(self, index: int) -> list[dict]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[list[dict]]:
        """What a DataLoader asks for: all rows of these bins are read at once."""
        bins = [self.bins[index] for index in indices]
        rows = iter(numbered(self.rows, [row for one in bins for row in one]))
        return [list(itertools.islice(rows, len(one))) for one in bins]


class NumberedRows(torch.utils.data.Dataset):
    """The rows themselves, each with its "row_id"; what PackedDataset is for PackedCollator, for
    PaddedCollator."""

    def __init__(self, rows):
        self.rows = as_arrays(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def most_tokens(self, size: int) -> int:
        """Of a batch of `size` rows, padded."""
        return size * int(lengths_of(self.rows).max(initial=0))

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return numbered(self.rows, indices)


def as_arrays(rows):
    """A datasets.Dataset that gives its tokens and labels as arrays, which are read ten times as
    fast as lists; a list of rows as it is."""
    if not hasattr(rows, "with_format"):
        return rows
    return rows.with_format("numpy", columns=["input_ids", "labels"])


def numbered(rows, indices: list[int]) -> list[dict]:
    """These rows in one read, each with its "row_id"."""
    if not hasattr(rows, "with_format"):
        return [{**rows[index], "row_id": index} for index in indices]
    columns = rows[indices]
    return [
        {"row_id": index} | {name: column[i] for name, column in columns.items()}
        for i, index in enumerate(indices)
    ]


def lengths_of(rows, column: str = "input_ids") -> np.ndarray:
    """Tokens of each row, int64 [rows], without reading the tokens of a datasets.Dataset."""
    if not hasattr(rows, "with_format"):
        return np.array([len(row[column]) for row in rows], dtype=np.int64)
    import pyarrow.compute as pc

    # Arrow knows its lists' lengths
    tables = rows.select_columns(column).with_format("arrow").iter(10_000)
    parts = [pc.list_value_length(table[column]).to_numpy() for table in tables]
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
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        starts = cu_seqlens[:-1]
        input_ids = joined([row["input_ids"] for row in rows])
        labels = joined([row["labels"] for row in rows])
        labels[starts] = IGNORE
        positions = torch.arange(len(input_ids)) - torch.repeat_interleave(starts, lengths)
        cu_seqlens = cu_seqlens.to(torch.int32)
        max_seqlen = int(lengths.max())
        return {
            "input_ids": input_ids[None],
            "labels": labels[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen,
            "row_ids": row_ids_of(rows),
        }


class PaddedCollator:
    """Rows -> input_ids, labels, attention_mask [B, T] int64, padded on the right; row_ids as in
    PackedCollator."""

    def __init__(self, pad_token_id: int | None, pad_to_multiple: int = 1):
        self.pad_token_id = pad_token_id or 0  # masked: without a pad token any id will do
        self.multiple = pad_to_multiple

    def __call__(self, rows: list[dict]) -> dict:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORE)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = joined([row["input_ids"]])
            labels[i, :length] = joined([row["labels"]])
            mask[i, :length] = 1
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": mask,
            "row_ids": row_ids_of(rows),
        }


def joined(parts: list) -> torch.Tensor:
    """Lists or arrays of numbers -> one int64 tensor, a copy: arrays of a data set are its file."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def collator(packing: bool, tokenizer) -> PackedCollator | PaddedCollator:
    """For the items of PackedDataset, or else of NumberedRows."""
    return PackedCollator() if packing else PaddedCollator(tokenizer.pad_token_id)


def row_ids_of(rows: list[dict]) -> list[int]:
    return [row["row_id"] for row in rows if "row_id" in row]


# ---- counts ----
class Counted:
    """A collator whose batches bring their counts: asked of a device they would make the host wait
    for all that it computes.

    tokens, label_tokens: ints, without padding
    label_index: int64 [label_tokens], the places in the flattened [B * T] whose next token has a
        label
    on_host: the boundaries of documents as lists, name -> ints (see attention.on_host)
    """

    def __init__(self, collate: Callable[[list], dict]):
        self.collate = collate

    def __call__(self, items: list) -> dict:
        return counted(self.collate(items))


def counted(batch: dict) -> dict:
    """The batch with what Counted adds; of one on a device this waits for it."""
    if "attention_mask" in batch:
        tokens = int(batch["attention_mask"].sum())
    else:
        tokens = batch["input_ids"].numel() - batch.get("padding_tokens", 0)
    index = label_index(batch["labels"])
    on_host = {name: batch[name].tolist() for name in BOUNDARIES if name in batch}
    counts = {"tokens": tokens, "label_tokens": len(index), "label_index": index}
    return batch | counts | {"on_host": on_host}


def label_index(labels: torch.Tensor) -> torch.Tensor:
    """[B, T] -> int64 [N], the places in the flattened labels whose next token has a label."""
    predicted = F.pad(labels[..., 1:], (0, 1), value=IGNORE).flatten()
    return (predicted != IGNORE).nonzero().squeeze(1)


def for_model(batch: dict) -> dict:
    """The batch without what no model takes. The boundaries of one on a device get their values as
    an attribute, for kernels that want them on the host (attention.on_host)."""
    for name, values in batch.get("on_host", {}).items():
        if batch[name].device.type != "cpu":
            batch[name].on_host = torch.tensor(values, dtype=batch[name].dtype)
    return {name: value for name, value in batch.items() if name not in NOT_FOR_MODELS}


def without_labels(batch: dict) -> dict:
    """A counted batch for a rank that has no row left and takes part in a forward."""
    labels = torch.full_like(batch["labels"], IGNORE)
    none = batch["label_index"][:0]
    return batch | {"labels": labels, "label_index": none, "label_tokens": 0}
