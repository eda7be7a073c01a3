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
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.data.spelling import IGNORE

CHUNK = 512  # positions whose logits exist at once


def loss(model, batch: dict, denominator: float, teacher, alpha: float, temperature: float):
    """-> (this batch's share of the loss of a step with `denominator` label tokens, sums over this
    batch)."""
    inputs = {name: batch[name] for name in INPUTS}
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
    places = (targets != IGNORE).nonzero()[:, 0]
    out = model.model(**inputs)
    hidden = out.last_hidden_state.flatten(0, 1)[places]
    with torch.no_grad():
        teacher_hidden = teacher.model(**inputs).last_hidden_state.flatten(0, 1)[places]

    def of_chunk(hidden: Tensor, teacher_hidden: Tensor, targets: Tensor):
        """-> (loss, cross entropy, right tokens), summed over the chunk."""
        logits = model.lm_head(hidden).float()
        soft = F.log_softmax(logits / temperature, -1)
        teacher_soft = (teacher.lm_head(teacher_hidden).float() / temperature).log_softmax(-1)
        ce = F.cross_entropy(logits, targets, reduction="sum")
        kl = F.kl_div(soft, teacher_soft, reduction="sum", log_target=True)
        mixed = alpha * ce + (1 - alpha) * temperature**2 * kl
        return mixed, ce.detach(), (logits.argmax(-1) == targets).sum()

    total = nll = correct = 0.0
    chunks = (x.split(CHUNK) for x in (hidden, teacher_hidden, targets[places]))
    for chunk in zip(*chunks, strict=True):
        mixed, ce, right = checkpoint(of_chunk, *chunk, use_reentrant=False)
        total = total + mixed
        nll = nll + ce
        correct = correct + right
    count = hidden.new_tensor(float(len(places)), dtype=torch.float32)
    if not len(places):  # a batch of padding at an epoch's end: a loss of nothing, with a graph
        total = hidden.sum()
    sums = {"nll": nll + 0 * count, "correct": correct + 0 * count, "count": count}
    return total / denominator + balance(out.aux_loss, count, denominator), sums
