"""Optimizers and the learning rate.

AdamW (Loshchilov and Hutter 2019) decays matrices and embeddings, never norms. Muon (Jordan 2024,
torch.optim.Muon) updates the matrices of the blocks by their orthogonalised momentum; embedding,
router and norms stay with AdamW.
"""

from __future__ import annotations

import math

import torch

SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
BETAS = (0.9, 0.95)


class Muon:
    """torch.optim.Muon on `matrices` and AdamW on the rest, behind the interface of one
    optimizer."""

    def __init__(self, matrices: list, rest: torch.optim.AdamW, lr: float, weight_decay: float):
        muon = torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay)
        self.parts = (muon, rest)

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


def make(model, kind: str, lr: float, weight_decay: float, muon_lr: float, fused: bool):
    """The optimizer of a model's trainable parameters; each group keeps its peak rate as "peak".

    fused: 3 times as fast, and unusable with the fp16 scaler of an NPU.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [
        p
        for name, p in named
        if p.ndim == 2 and ".layers." in name and not name.endswith("mlp.gate.weight")
    ]
    muon = {id(p) for p in inner} if kind == "muon" else set()
    rest = [p for _, p in named if id(p) not in muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=BETAS, fused=fused)
    found = Muon(inner, adam, muon_lr, weight_decay) if kind == "muon" else adam
    for group in found.param_groups:
        group["peak"] = group["lr"]
    return found


def rate(progress: float, kind: str, warmup: float, floor: float) -> float:
    """Part of the peak learning rate after `progress` (0 to 1) of the run.

    warmup: part of the run in which it rises; floor: what it ends at. warmup_stable_decay falls in
        the last 40 %.
    """
    if progress < warmup:
        return progress / warmup
    rest = (progress - warmup) / max(1e-9, 1 - warmup)
    fallen = {
        "cosine": 0.5 - 0.5 * math.cos(math.pi * min(1.0, rest)),
        "linear": min(1.0, rest),
        "constant": 0.0,
        "warmup_stable_decay": max(0.0, (min(1.0, rest) - 0.6) / 0.4),
    }[kind]
    return 1 - (1 - floor) * fallen


def set_rate(optimizer, part: float) -> float:
    """Give every group `part` of its peak; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * part
    return optimizer.param_groups[0]["lr"]
