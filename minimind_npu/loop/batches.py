"""Token rows on disk -> packed batches of one fixed shape, in an order that (seed, epoch, position)
alone decides.

A row is one document (a text, a conversation) or two (the answers of a preference pair). Bins of
rows fill windows of `max_length` tokens; a step takes the next bins of its epoch's permutation,
whoever computes them: another number of processes, or another batch size, goes on at the same row.
Rows stay memory-mapped; only their lengths are in memory.

B windows of T tokens a batch, n documents in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from loop import parallel

from common.collators import pack_bins
from common.data.spelling import IGNORE

PAD_DOCUMENT = 64  # tokens of a document of padding: short, so that attention costs nothing there


# ---- rows ----------------------------------------------------------------------------------------


class TokenRows:
    """Rows of a tokenised datasets.Dataset as numpy views of its memory-mapped files.

    columns: names of the token lists, ("input_ids",), ("input_ids", "labels") or those of both
        answers of a pair; without labels every token is one.
    lengths, labels: [rows], tokens and label tokens (the first of a document is never predicted)
        per row.
    """

    def __init__(self, dataset, columns: Sequence[str]):
        self.columns = columns
        self.chunks = {}  # column -> [(values, offsets)], the n-th of each column has the same rows
        for name in columns:
            self.chunks[name] = [_flat(chunk) for chunk in dataset.data.column(name).chunks]
        sizes = [len(offsets) - 1 for _, offsets in self.chunks[columns[0]]]
        self.starts = np.cumsum([0, *sizes])  # number of the first row of each chunk

        documents = [name for name in columns if name.endswith("input_ids")]
        targets = [name for name in columns if name.endswith("labels")] or documents
        self.lengths = sum(self._tokens(name) for name in documents)
        self.labels = sum(self._label_tokens(name) for name in targets)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _tokens(self, name: str) -> np.ndarray:
        sizes = [np.diff(offsets).astype(np.int64) for _, offsets in self.chunks[name]]
        return np.concatenate([np.zeros(0, np.int64), *sizes])

    def _label_tokens(self, name: str) -> np.ndarray:
        """Labels of each row but the one on its first token."""
        counts = [np.zeros(0, np.int64)]
        for values, offsets in self.chunks[name]:
            is_label = (values != IGNORE).astype(np.int64)
            before = np.concatenate([[0], np.cumsum(is_label)])
            count = np.diff(before[offsets])
            filled = offsets[1:] > offsets[:-1]
            count[filled] -= is_label[offsets[:-1][filled]]
            counts.append(count)
        return np.concatenate(counts)

    def row(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The (input_ids, labels) of each document of a row, int32 views."""
        chunk = int(np.searchsorted(self.starts, index, side="right")) - 1
        place = index - int(self.starts[chunk])
        views = []
        for name in self.columns:
            values, offsets = self.chunks[name][chunk]
            views.append(values[offsets[place] : offsets[place + 1]])
        if len(views) == 1:
            return [(views[0], views[0])]
        return list(zip(views[::2], views[1::2], strict=True))


def _flat(chunk) -> tuple[np.ndarray, np.ndarray]:
    """An Arrow list array -> (values, offsets into them), without a copy."""
    return chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy()


def rows_of(bins: list[list[int]]) -> list[int]:
    return [row for one in bins for row in one]


class Order:
    """Bins of rows, and which of them come next.

    bins: numbers of rows that share a window of max_length tokens (best fit).
    """

    def __init__(self, rows: TokenRows, max_length: int, seed: int):
        self.seed = seed
        self.bins = pack_bins(rows.lengths.tolist(), max_length, seed)
        self.epoch = None  # the one whose permutation is known
        self.permutation = None

    def __len__(self) -> int:
        return len(self.bins)

    def take(self, epoch: int, at: int, count: int) -> list[list[int]]:
        """`count` bins from position `at` of an epoch, fewer at its end."""
        if self.epoch != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self.permutation = generator.permutation(len(self.bins))
            self.epoch = epoch
        return [self.bins[i] for i in self.permutation[at : at + count]]


# ---- batches -------------------------------------------------------------------------------------


def collate(
    rows: TokenRows, bins: list[list[int]], windows: int, max_length: int, pad_token_id: int
) -> dict:
    """Bins -> one packed row of windows * max_length tokens; what is missing is filled up with
    short documents of padding.

    Returns input_ids, labels, position_ids, token_mask (0 at padding) [1, B * T] int64,
    cu_seq_lens_q/k [n + 1] int32, max_length_q/k (upper bounds), documents: how many are no
    padding, row_ids. Positions restart at each document; its first label is IGNORE.
    """
    row_ids = rows_of(bins)
    documents = [document for row in row_ids for document in rows.row(row)]
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    used = int(lengths.sum())
    size = max(windows * max_length, used)

    ids = np.full(size, pad_token_id, np.int64)
    labels = np.full(size, IGNORE, np.int64)
    if documents:
        ids[:used] = np.concatenate([ids for ids, _ in documents])
        labels[:used] = np.concatenate([labels for _, labels in documents])

    cu_seqlens = boundaries(lengths, size)
    firsts = cu_seqlens[:-1]
    labels[firsts] = IGNORE
    positions = np.arange(size) - np.repeat(firsts, np.diff(cu_seqlens))
    token_mask = (np.arange(size) < used).astype(np.int64)
    cu_seqlens = torch.from_numpy(cu_seqlens.astype(np.int32))
    max_seqlen = int(max(max_length, lengths.max(initial=0)))
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "token_mask": torch.from_numpy(token_mask)[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
        "documents": len(documents),
        "row_ids": row_ids,
    }


def boundaries(lengths: np.ndarray, size: int) -> np.ndarray:
    """Where each document starts, those of padding up to `size` too, and `size` itself."""
    starts = np.cumsum([0, *lengths])
    used = starts[-1]
    if used == size:
        return starts.astype(np.int64)
    padding = np.arange(used + PAD_DOCUMENT, size, PAD_DOCUMENT)
    return np.concatenate([starts, padding, [size]]).astype(np.int64)


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

    def loss_denominator(self, bins: list[list[int]]) -> float:
        """What a step over these bins is averaged over: label tokens of all ranks, or pairs."""
        return float(len(rows_of(bins)) if self.pairs else self.label_tokens(bins))

    def tokens(self, bins: list[list[int]]) -> int:
        return int(self.rows.lengths[rows_of(bins)].sum())

    def label_tokens(self, bins: list[list[int]]) -> int:
        return int(self.rows.labels[rows_of(bins)].sum())

    def batch(self, bins: list[list[int]], micro: int = 0) -> dict:
        """This rank's batch number `micro` of a step over `bins`; padding alone where the last step
        of an epoch is short."""
        first = (micro * self.world + self.rank) * self.windows
        mine = bins[first : first + self.windows]
        batch = collate(self.rows, mine, self.windows, self.max_length, self.pad_token_id)
        for name, values in self.extra.items():
            batch[name] = values[batch["row_ids"]]
        return to_device(batch, self.where)

    def some(self, count: int) -> list[list[int]]:
        """At most `count` of the bins, evenly spread."""
        every = math.ceil(len(self.order) / max(1, count))
        return self.order.bins[::every]

    def all(self, bins: list[list[int]] | None = None) -> Iterator[dict]:
        """`bins`, unset all of them, once over the ranks; as many batches on each rank."""
        bins = self.order.bins if bins is None else bins
        per_step = self.windows * self.world
        for start in range(0, len(bins), per_step):
            yield self.batch(bins[start : start + per_step])


def to_device(batch: dict, where: torch.device) -> dict:
    """The tensors of a batch on the device; from pinned memory, so that the copy does not wait."""
    if where.type == "cpu":
        return batch
    moved = dict(batch)
    for name, value in batch.items():
        if torch.is_tensor(value):
            moved[name] = value.pin_memory().to(where, non_blocking=True)
    moved["cu_seq_lens_k"] = moved["cu_seq_lens_q"]  # one tensor, as on the host
    return moved


# ---- the run through them ------------------------------------------------------------------------


class Plan:
    """Which bins the next step takes, and how much of the run is done.

    progress: {"step", "seconds", "epoch", "at": bins taken of this epoch by all processes}, which
        a checkpoint keeps.
    max_minutes: the run ends after so long, 0: by steps or epochs.
    """

    def __init__(self, loader: Loader, training, progress: dict, max_minutes: float = 0.0):
        self.loader = loader
        self.order = loader.order
        self.progress = progress
        self.max_steps = training.max_steps
        self.epochs = training.num_train_epochs
        self.max_minutes = max_minutes
        self.micro_batches = training.gradient_accumulation_steps
        self.batch = training.per_device_train_batch_size
        self.per_step = self.batch * self.micro_batches * training.world_size

    def describe(self) -> str:
        total = self.total_steps()
        steps = f", {total:,} steps" if total else ""
        world = self.per_step // (self.batch * self.micro_batches)
        ranks = f" on each of {world}" if world > 1 else ""
        return (
            f"{len(self.order):,} windows of {self.loader.max_length} tokens, {self.per_step} a "
            f"step ({self.micro_batches} x {self.batch}{ranks}){steps}"
        )

    def total_steps(self) -> int | None:
        """All steps of the run; None where the clock ends it."""
        if self.max_steps > 0:
            return self.max_steps
        if self.max_minutes:
            return None
        size = len(self.order)
        whole_epochs = int(self.epochs)
        last_windows = (self.epochs - whole_epochs) * size
        steps_of_epoch = math.ceil(size / self.per_step)
        return whole_epochs * steps_of_epoch + math.ceil(last_windows / self.per_step)

    def windows(self) -> int:
        """Windows that the run computes; where the clock ends it, at most."""
        if self.max_steps > 0:
            return self.max_steps * self.per_step
        return math.ceil(self.epochs * len(self.order))

    def fraction_done(self) -> float:
        """How much of the run is done, 0 to 1; the learning rate follows it."""
        now = self.progress
        if self.max_steps > 0:
            done = now["step"] / self.max_steps
        else:
            size = len(self.order)
            done = (now["epoch"] * size + now["at"]) / (size * self.epochs)
        if self.max_minutes:
            return max(done, now["seconds"] / 60 / self.max_minutes)
        return done

    def next_bins(self) -> list[list[int]]:
        """Begin the next step: its bins, of all processes; fewer at the end of an epoch, so that
        none comes twice."""
        now = self.progress
        bins = self.order.take(now["epoch"], now["at"], self.per_step)
        now["step"] += 1
        now["at"] += len(bins)
        if now["at"] >= len(self.order):
            now["epoch"] += 1
            now["at"] = 0
        return bins

    def agreed(self, seconds: float) -> float:
        """Seconds of a step, the same on all ranks where the clock ends the run."""
        if not self.max_minutes:
            return seconds
        return parallel.largest(seconds, self.loader.where)
