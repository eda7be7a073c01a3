"""Distillation (Hinton et al. 2015): a student learns from a teacher's distributions as well as
from the labels.

Loss per label token: alpha * cross entropy + (1 - alpha) * T^2 * KL(teacher at temperature T ||
student at T), summed over label tokens / the label tokens of the step. Logits of both exist for
some hundred positions at a time.
Rows: those of sft.py. The teacher may be dense or sparse, and of another width; its vocabulary is
the student's.
"""

from __future__ import annotations

import torch
from stages.pretrain import INPUTS, balance, metrics  # noqa: F401
from stages.sft import COLUMNS, KIND, encode  # noqa: F401
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.collators import IGNORE

CHUNK = 512  # positions whose logits exist at once


def loss(model, batch: dict, items: float, teacher, alpha: float, temperature: float):
    """-> (loss of the batch as its part of a step with `items` label tokens, sums over this
    batch)."""
    inputs = {name: batch[name] for name in INPUTS}
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
    where = (labels != IGNORE).nonzero()[:, 0]
    out = model.model(**inputs)
    with torch.no_grad():
        taught = teacher.model(**inputs).last_hidden_state.flatten(0, 1)[where]
    student, total, nll, correct = out.last_hidden_state.flatten(0, 1)[where], 0.0, 0.0, 0.0

    def part(student, taught, targets):
        logits, soft = model.lm_head(student).float(), teacher.lm_head(taught).float() / temperature
        ce = F.cross_entropy(logits, targets, reduction="sum")
        kl = F.kl_div(
            F.log_softmax(logits / temperature, -1),
            soft.log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        return (
            alpha * ce + (1 - alpha) * temperature**2 * kl,
            ce.detach(),
            (logits.argmax(-1) == targets).sum(),
        )

    for rows, hints, targets in zip(
        *(x.split(CHUNK) for x in (student, taught, labels[where])), strict=True
    ):
        more, ce, hits = checkpoint(part, rows, hints, targets, use_reentrant=False)
        total, nll, correct = total + more, nll + ce, correct + hits
    count = student.new_tensor(float(len(where)), dtype=torch.float32)
    sums = {"nll": nll + 0 * count, "correct": correct + 0 * count, "count": count}
    if not len(where):  # a filler batch at an epoch's end: a loss of nothing, with a graph
        total = student.sum()
    return total / items + balance(out.aux_loss, count, items), sums
