"""Rows -> batches: packed (documents of one length budget in one row, no padding) and padded.

A row is {"input_ids": [T], "labels": [T]}; other columns are ignored. Labels are not shifted (as
transformers expects).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import torch

from common import device
from common.data.columns import as_arrays, lengths_of, numbered
from common.data.spelling import IGNORE


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


class PackedCollator:
    """Bins (lists of rows) -> one row in which positions restart at every document.

    Returns input_ids, labels, position_ids [1, T] int64, cu_seq_lens_q/k [documents + 1] int32,
    max_length_q/k int, row_ids (the rows' "row_id", to be taken out before the model) and,
    where a last document without labels rounds the row up to `multiple`, its padding_tokens. The
    first label of each document is -100: nothing before it predicts it. There is no attention
    mask; the boundaries are what keeps documents apart.
    """

    def __init__(self, multiple: int = 1, beginning: Sequence[int] = ()):
        """beginning: tokens that a document of the model at hand begins with, padding too."""
        self.multiple = multiple
        self.beginning = list(beginning)

    def __call__(self, bins: list[list[dict]]) -> dict:
        rows = [row for one in bins for row in one]
        padding = -sum(len(row["input_ids"]) for row in rows) % self.multiple
        while 0 < padding < len(self.beginning):
            padding += self.multiple
        if padding:
            rows.append(pad_document(padding, self.beginning))
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        starts = cu_seqlens[:-1]
        input_ids = joined([row["input_ids"] for row in rows])
        labels = joined([row["labels"] for row in rows])
        labels[starts] = IGNORE
        positions = torch.arange(len(input_ids)) - torch.repeat_interleave(starts, lengths)
        cu_seqlens = cu_seqlens.to(torch.int32)
        max_seqlen = int(lengths.max())
        batch = {
            "input_ids": input_ids[None],
            "labels": labels[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen,
            "row_ids": row_ids_of(rows),
        }
        return batch | {"padding_tokens": padding} if padding else batch


def pad_document(length: int, beginning: Sequence[int] = ()) -> dict:
    """A row without labels, of at least as many tokens as `beginning`."""
    input_ids = np.zeros(length, np.int64)
    input_ids[: len(beginning)] = beginning
    return {"input_ids": input_ids, "labels": np.full(length, IGNORE)}


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


def collator(
    packing: bool, tokenizer, training, beginning: Sequence[int] = ()
) -> PackedCollator | PaddedCollator:
    """For the items of PackedDataset, or else of NumberedRows. training: TrainingArguments;
    beginning: as PackedCollator takes it."""
    if packing:
        return PackedCollator(device.length_multiple(device.train_dtype(training)), beginning)
    return PaddedCollator(tokenizer.pad_token_id)


def row_ids_of(rows: list[dict]) -> list[int]:
    return [row["row_id"] for row in rows if "row_id" in row]
