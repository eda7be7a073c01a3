"""Documents end to end in windows of one length, for continued pre-training."""

import numpy as np
import torch

from common.collators import lengths_of


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
        self.ends = sizes[self.order].cumsum()  # where each document ends, in tokens from the first

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.length) if len(self.ends) else 0

    def most_tokens(self, size: int) -> int:
        """Of a batch of `size` windows."""
        return min(size * self.length, int(self.ends[-1]) if len(self.ends) else 0)

    def __getitem__(self, index: int) -> list[dict]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.length
        end = min(start + self.length, int(self.ends[-1]))
        at = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        while start < end:
            row = int(self.order[at])
            stop = min(end, int(self.ends[at]))
            document = np.asarray(self.rows[row]["input_ids"], dtype=np.int64)
            skipped = len(document) - int(self.ends[at]) + start
            piece = document[skipped : skipped + stop - start]
            pieces.append({"row_id": row, "input_ids": piece, "labels": piece})
            start = stop
            at += 1
        return pieces
