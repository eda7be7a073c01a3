"""Token rows on disk -> packed batches of one fixed shape, in an order that (seed, epoch, position)
alone decides.

A row is one document (a text, a conversation) or two (the answers of a preference pair). Bins of
rows fill windows of `max_length` tokens; a step takes the next bins of its epoch's permutation,
whoever computes them: another number of processes, or another batch size, goes on at the same row.
Rows stay memory-mapped; only their lengths are in memory.

B windows of T tokens a batch, n documents in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from common.collators import IGNORE, pack_bins

FILLER = 64  # tokens of a document of padding: short, so that attention costs nothing there


class TokenRows:
    """Rows of a tokenised datasets.Dataset as numpy views of its memory-mapped files.

    columns: names of the token lists, ("input_ids",), ("input_ids", "labels") or those of both
        answers of a pair; without labels every token is one.
    lengths, labels: [rows], tokens and label tokens (the first of a document is never predicted)
        per row.
    """

    def __init__(self, dataset, columns: Sequence[str]):
        self.columns = columns
        self.parts = {
            name: [_flat(chunk) for chunk in dataset.data.column(name).chunks] for name in columns
        }
        first = self.parts[columns[0]]
        self.starts = np.cumsum([0] + [len(offsets) - 1 for _, offsets in first])
        self.documents = [name for name in columns if name.endswith("input_ids")]
        self.lengths = sum(self._per_row(name, np.ones_like) for name in self.documents)
        targets = [name for name in columns if name.endswith("labels")] or self.documents
        self.labels = sum(
            self._per_row(name, lambda x: x != IGNORE, skip_first=True) for name in targets
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _per_row(self, name: str, count, skip_first: bool = False) -> np.ndarray:
        found = [np.zeros(0, np.int64)]
        for values, offsets in self.parts[name]:
            marks = count(values).astype(np.int64)
            total = np.concatenate([[0], np.cumsum(marks)])
            found.append(np.diff(total[offsets]))
            if skip_first:
                filled = offsets[1:] > offsets[:-1]
                found[-1][filled] -= marks[offsets[:-1][filled]]
        return np.concatenate(found)

    def row(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The (input_ids, labels) of each document of a row, int32 views."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        place, out = index - int(self.starts[part]), []
        for name in self.columns:
            values, offsets = self.parts[name][part]
            out.append(values[offsets[place] : offsets[place + 1]])
        return list(zip(out[::2], out[1::2], strict=True)) if len(out) > 1 else [(out[0], out[0])]


def _flat(chunk) -> tuple[np.ndarray, np.ndarray]:
    """An Arrow list array -> (values, offsets into them), without a copy."""
    return chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy()


class Order:
    """Bins of rows, and which of them come next.

    bins: rows that share a window of max_length tokens (best fit).
    """

    def __init__(self, rows: TokenRows, max_length: int, seed: int):
        self.bins, self.seed = pack_bins(rows.lengths.tolist(), max_length, seed), seed
        self.known = (None, None)

    def __len__(self) -> int:
        return len(self.bins)

    def take(self, epoch: int, at: int, count: int) -> list[list[int]]:
        """`count` bins from position `at` of an epoch, fewer at its end."""
        if self.known[0] != epoch:
            self.known = (
                epoch,
                np.random.default_rng([self.seed, epoch]).permutation(len(self.bins)),
            )
        return [self.bins[i] for i in self.known[1][at : at + count]]


def collate(
    rows: TokenRows, bins: list[list[int]], windows: int, max_length: int, pad_token_id: int
) -> dict:
    """Bins -> one packed row of windows * max_length tokens, what is missing filled up with short
    padding documents.

    Returns input_ids, labels, position_ids, counted (0 at the filler) [1, B * T] int64,
    cu_seq_lens_q/k [n + 1] int32, max_length_q/k (upper bounds), documents: how many are no filler,
    row_ids. Positions restart at each document; its first label is -100.
    """
    row_ids = [row for one in bins for row in one]
    documents = [document for row in row_ids for document in rows.row(row)]
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    used, size = int(lengths.sum()), max(windows * max_length, int(lengths.sum()))
    starts = [
        np.cumsum([0, *lengths]),
        np.arange(used + FILLER, size, FILLER),
        [size] * (used < size),
    ]
    starts = np.concatenate(starts).astype(np.int64)
    ids, labels = np.full(size, pad_token_id, np.int64), np.full(size, IGNORE, np.int64)
    if documents:
        ids[:used] = np.concatenate([ids for ids, _ in documents])
        labels[:used] = np.concatenate([labels for _, labels in documents])
    labels[starts[:-1]] = IGNORE
    positions = np.arange(size) - np.repeat(starts[:-1], np.diff(starts))
    boundaries = torch.from_numpy(starts.astype(np.int32))
    longest = int(max(max_length, lengths.max(initial=0)))
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "counted": torch.from_numpy((np.arange(size) < used).astype(np.int64))[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
        "documents": len(documents),
        "row_ids": row_ids,
    }


@dataclass
class Loader:
    """Batches of token rows for one process of `world`.

    pairs: a row is a preference pair, and a step is averaged over rows instead of label tokens.
    extra: name -> tensor [rows, ...] whose entries of a batch's rows go into the batch.
    """

    rows: TokenRows
    order: Order
    windows: int
    max_length: int
    pad_token_id: int
    where: torch.device
    rank: int = 0
    world: int = 1
    pairs: bool = False
    extra: dict = field(default_factory=dict)

    def items(self, bins: list[list[int]]) -> float:
        """What a step over these bins is averaged over: label tokens of all ranks, or pairs."""
        chosen = [row for one in bins for row in one]
        return float(len(chosen) if self.pairs else self.rows.labels[chosen].sum())

    def tokens(self, bins: list[list[int]]) -> int:
        return int(self.rows.lengths[[row for one in bins for row in one]].sum())

    def batch(self, bins: list[list[int]], micro: int = 0) -> dict:
        """This rank's batch number `micro` of a step over `bins`; only filler where the last of an
        epoch is short."""
        first = (micro * self.world + self.rank) * self.windows
        mine = bins[first : first + self.windows]
        batch = collate(self.rows, mine, self.windows, self.max_length, self.pad_token_id)
        batch |= {name: values[batch["row_ids"]] for name, values in self.extra.items()}
        return to_device(batch, self.where)

    def all(self) -> Iterator[dict]:
        """All rows once over the ranks, as many batches on each."""
        per_step = self.windows * self.world
        for start in range(0, len(self.order), per_step):
            yield self.batch(self.order.bins[start : start + per_step])


def to_device(batch: dict, where: torch.device) -> dict:
    """The tensors of a batch on the device; from pinned memory, so that the copy does not wait."""
    if where.type == "cpu":
        return batch
    move = lambda x: x.pin_memory().to(where, non_blocking=True) if torch.is_tensor(x) else x  # noqa: E731
    moved = {name: move(value) for name, value in batch.items()}
    return moved | {"cu_seq_lens_k": moved["cu_seq_lens_q"]}
