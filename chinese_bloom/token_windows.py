"""Documents end to end in windows of one length, for continued pre-training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from common.data.columns import lengths_of


class Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    row: int
    start: int
    stop: int


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
        self.rows = rows
        if hasattr(rows, "with_format"):
            self.rows = rows.with_format("numpy", columns=["input_ids"])
        sizes = lengths_of(rows)
        self.order = np.random.default_rng(seed).permutation(len(sizes))
        self.sizes = sizes[self.order]
        self.ends = self.sizes.cumsum()  # where each document ends, in tokens from the first

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.length) if len(self.ends) else 0

    def most_tokens(self, size: int) -> int:
        """Of a batch of `size` windows."""
        return min(size * self.length, int(self.ends[-1]) if len(self.ends) else 0)

    def __getitem__(self, index: int) -> list[dict]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[list[dict]]:
        """What a DataLoader asks for: all documents of these windows are read at once."""
        windows = [self.pieces(index) for index in indices]
        needed = sorted({piece.row for window in windows for piece in window})
        documents = dict(zip(needed, self.read(needed), strict=True))
        return [[cut(piece, documents[piece.row]) for piece in window] for window in windows]

    def pieces(self, index: int) -> list[Piece]:
        """Which part of which document a window holds."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.length
        end = min(start + self.length, int(self.ends[-1]))
        at = int(np.searchsorted(self.ends, start, side="right"))
        found = []
        while start < end:
            row = int(self.order[at])
            begin = int(self.ends[at]) - int(self.sizes[at])
            stop = min(end, int(self.ends[at]))
            found.append(Piece(row, start - begin, stop - begin))
            start = stop
            at += 1
        return found

    def read(self, rows: list[int]):
        """The tokens of these documents, in one read."""
        if hasattr(self.rows, "with_format"):
            return self.rows[rows]["input_ids"]
        return [self.rows[row]["input_ids"] for row in rows]


def cut(piece: Piece, document) -> dict:
    """A row for the collator: every token is a label."""
    tokens = np.asarray(document, dtype=np.int64)[piece.start : piece.stop]
    return {"row_id": piece.row, "input_ids": tokens, "labels": tokens}
