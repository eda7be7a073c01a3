"""Optimizers and the learning rate.

AdamW (Loshchilov and Hutter 2019) decays matrices and embeddings, never norms. Muon (Jordan 2024,
torch.optim.Muon) updates the matrices of the blocks by their orthogonalised momentum; embedding,
router and norms stay with AdamW.
"""

from __future__ import annotations

import math

import torch

from common import device

SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
BETAS = (0.9, 0.95)
STABLE = 0.6  # share of warmup_stable_decay after the warm-up in which the rate stays at its peak


class Muon:
    """torch.optim.Muon on `matrices` and AdamW on the rest, behind the interface of one
    optimizer."""

    def __init__(self, matrices: list, rest: torch.optim.AdamW, lr: float, weight_decay: float):
        emulates_bfloat16 = device.kind() == "cpu" and device.half_dtype() is None
        kind = Float32Muon if emulates_bfloat16 else torch.optim.Muon
        muon = kind(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay)
        self.optimizers = (muon, rest)

    @property
    def param_groups(self) -> list[dict]:
        return [group for one in self.optimizers for group in one.param_groups]

    def step(self) -> None:
        for one in self.optimizers:
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.optimizers:
            one.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        return {str(i): one.state_dict() for i, one in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        for i, one in enumerate(self.optimizers):
            one.load_state_dict(state[str(i)])


class Float32Muon(torch.optim.Muon):
    """torch.optim.Muon with its products in float32: on a CPU that only emulates bfloat16 some ten
    times as fast. The state is the same."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p: torch.Tensor, group: dict) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"]
        average.lerp_(p.grad, 1 - group["momentum"])
        nesterov = p.grad.lerp(average, group["momentum"])
        rows, columns = p.shape
        p.mul_(1 - group["lr"] * group["weight_decay"])
        step = -group["lr"] * math.sqrt(max(1, rows / columns))
        p.add_(orthogonal(nesterov, group["ns_coefficients"], group["ns_steps"]), alpha=step)


def orthogonal(matrix: torch.Tensor, coefficients: tuple, steps: int) -> torch.Tensor:
    """The nearest matrix with singular values of about 1, by Newton and Schulz's iteration."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def make(model, kind: str, lr: float, weight_decay: float, muon_lr: float, fused: bool):
    """The optimizer of a model's trainable parameters; each group keeps its peak rate as "peak".

    kind: "adamw" or "muon"; fused: 3 times as fast, and unusable with the fp16 scaler of an NPU.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = {}
    if kind == "muon":
        inner = {name: p for name, p in trained.items() if is_inner_matrix(name, p)}
    rest = [p for name, p in trained.items() if name not in inner]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=fused)
    if kind == "muon":
        optimizer = Muon(list(inner.values()), optimizer, muon_lr, weight_decay)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def is_inner_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether it is a matrix of a block, and not its router."""
    return p.ndim == 2 and ".layers." in name and not name.endswith("mlp.gate.weight")


def lr_scale(fraction_done: float, kind: str, warmup: float, floor: float) -> float:
    """Share of the peak learning rate after `fraction_done` (0 to 1) of the run.

    kind: one of SCHEDULES; warmup: fraction of the run in which the rate rises; floor: share of the
        peak that it ends at.
    """
    if fraction_done < warmup:
        return fraction_done / warmup
    after_warmup = min(1.0, (fraction_done - warmup) / max(1e-9, 1 - warmup))
    fallen = {  # from 0, the peak, to 1, the floor
        "cosine": 0.5 - 0.5 * math.cos(math.pi * after_warmup),
        "linear": after_warmup,
        "constant": 0.0,
        "warmup_stable_decay": max(0.0, (after_warmup - STABLE) / (1 - STABLE)),
    }
    return 1 - (1 - floor) * fallen[kind]


def set_lr(optimizer, scale: float) -> float:
    """Give every group `scale` of its peak rate; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    return optimizer.param_groups[0]["lr"]
