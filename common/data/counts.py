"""What a batch says of itself, so that nobody has to ask a device: its tokens, its labels and where
its documents begin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from common.data.spelling import IGNORE

# what no model takes
NOT_FOR_MODELS = ("row_ids", "tokens", "label_tokens", "padding_tokens", "on_host")
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "prefix_lengths")


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
    """The batch with what Counted adds; of one on a device this waits for it. A batch that brings
    its own counts stays as it is."""
    if "label_tokens" in batch:
        return batch
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
    if "labels" not in batch:
        return batch | {"label_tokens": 0}
    labels = torch.full_like(batch["labels"], IGNORE)
    none = batch["label_index"][:0]
    return batch | {"labels": labels, "label_index": none, "label_tokens": 0}
