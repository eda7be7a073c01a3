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
        dtype = torch.float32 if emulates_bfloat16 else torch.bfloat16
        settings = {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay}
        self.optimizers = (StackedMuon(matrices, dtype, **settings), rest)

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


class StackedMuon(torch.optim.Muon):
    """torch.optim.Muon whose matrices of one shape share their products: twenty small kernels for
    each of them would take longer to start than to run. The state is the same.

    dtype: of the products. float32 on a CPU that only emulates bfloat16, some ten times as fast.
    """

    def __init__(self, matrices: list, dtype: torch.dtype = torch.bfloat16, **settings):
        super().__init__(matrices, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for matrices in by_shape.values():
                self.update(matrices, group)

    def update(self, matrices: list[torch.Tensor], group: dict) -> None:
        """Of one shape."""
        directions = torch.stack([self.direction(p, group) for p in matrices])
        turned = orthogonal(directions.to(self.dtype), group["ns_coefficients"], group["ns_steps"])
        rows, columns = matrices[0].shape
        step = -group["lr"] * math.sqrt(max(1, rows / columns))
        for p, one in zip(matrices, turned, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(one, alpha=step)

    def direction(self, p: torch.Tensor, group: dict) -> torch.Tensor:
        """Nesterov's look ahead along the average of the gradients."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"]
        average.lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(average, group["momentum"])


def orthogonal(matrices: torch.Tensor, coefficients: tuple, steps: int) -> torch.Tensor:
    """[n, rows, columns] -> the nearest matrices with singular values of about 1, by Newton and
    Schulz's iteration."""
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if is_tall else x


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
