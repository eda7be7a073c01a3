"""Optimizers and the learning rate.

AdamW (Loshchilov and Hutter 2019) decays matrices and embeddings, never norms. Muon (Jordan 2024,
torch.optim.Muon) updates the matrices of the blocks by their orthogonalised momentum; embedding,
router and norms stay with AdamW.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from common import device

SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
BETAS = (0.9, 0.95)
STACKED_NUMBERS = 2**27  # that one product of Muon takes at most, 256 MiB in bfloat16
STABLE = 0.6  # share of warmup_stable_decay after the warm-up in which the rate stays at its peak


class MuonAndAdamW:
    """Muon on `matrices` and AdamW on the rest, behind the interface of one optimizer."""

    def __init__(self, matrices: list, rest: torch.optim.AdamW, lr: float, weight_decay: float):
        muon = StackedMuon(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay)
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


class StackedMuon(torch.optim.Muon):
    """torch.optim.Muon, whose state it has, with the work shared: matrices of one shape are one
    product on an accelerator, and every rank orthogonalises its share of them.

    The ranks must hold the same gradients. A CPU that only emulates bfloat16 computes in float32,
    which is some ten times as fast there.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in shapes.items():
                updates = orthogonal_by_ranks(self.directions(matrices, group), group)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                step = -group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(matrices, updates, alpha=step)

    def directions(self, matrices: list[torch.Tensor], group: dict) -> list[torch.Tensor]:
        """The gradients with Nesterov's momentum; the averages go on."""
        gradients = [p.grad for p in matrices]
        averages = []
        for p in matrices:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            averages.append(state["momentum_buffer"])
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        return list(torch._foreach_lerp(gradients, averages, group["momentum"]))


def orthogonal_by_ranks(matrices: list[torch.Tensor], group: dict) -> list[torch.Tensor]:
    """orthogonal() of each of the matrices, which have one shape; every rank computes a share and
    is given the others'."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    world = dist.get_world_size() if several else 1
    share = math.ceil(len(matrices) / world)
    first = share * dist.get_rank() if several else 0
    last = len(matrices) - 1
    mine = [matrices[min(i, last)] for i in range(first, first + share)]
    done = orthogonal_of_one_shape(mine, group["ns_coefficients"], group["ns_steps"])
    if several:
        of_all = [torch.empty_like(done) for _ in range(world)]
        dist.all_gather(of_all, done)
        done = torch.cat(of_all)
    return list(done[: len(matrices)].to(matrices[0].dtype).unbind())


def orthogonal_of_one_shape(matrices: list, coefficients: tuple, steps: int) -> torch.Tensor:
    """-> [matrices, rows, columns], in the dtype of the products."""
    emulates_bfloat16 = device.kind() == "cpu" and device.half_dtype() is None
    dtype = torch.float32 if emulates_bfloat16 else torch.bfloat16
    if matrices[0].device.type == "cpu":  # one by one its caches hold them
        return torch.stack([orthogonal(x.to(dtype), coefficients, steps) for x in matrices])
    at_once = max(1, STACKED_NUMBERS // matrices[0].numel())
    parts = [matrices[i : i + at_once] for i in range(0, len(matrices), at_once)]
    stacks = [torch.stack(part).to(dtype) for part in parts]
    return torch.cat([orthogonal(stack, coefficients, steps) for stack in stacks])


def orthogonal(matrix: torch.Tensor, coefficients: tuple, steps: int) -> torch.Tensor:
    """[..., rows, columns] -> the nearest matrix with singular values of about 1, by Newton and
    Schulz's iteration."""
    a, b, c = coefficients
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    added_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        factor = added_product(gram, gram, gram, beta=b, alpha=c)
        x = added_product(x, factor, x, beta=a)
    return x.mT if is_tall else x


def make(
    model,
    kind: str,
    lr: float,
    weight_decay: float,
    muon_lr: float,
    fused: bool,
    head_lr: float = 0.0,
    decays_tables: bool = True,
):
    """The optimizer of a model's trainable parameters; each group keeps its peak rate as "peak".

    kind: "adamw" or "muon"; fused: 3 times as fast, and unusable with the fp16 scaler of an NPU;
    head_lr: of a head that is no table of tokens too, 0: as the others; decays_tables: whether the
    table of tokens and the head are decayed.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = {}
    if kind == "muon":
        inner = {name: p for name, p in trained.items() if is_inner_matrix(name, p)}
    rest = {name: p for name, p in trained.items() if name not in inner}
    matrices = {name: p for name, p in rest.items() if p.ndim >= 2}
    heads = {}
    tables = {}
    if head_lr:
        heads = {name: p for name, p in matrices.items() if name.endswith("lm_head.weight")}
    if not decays_tables:
        ends = ("embed_tokens.weight", "lm_head.weight")
        tables = {name: p for name, p in matrices.items() if name.endswith(ends)}
    others = [p for name, p in matrices.items() if name not in heads | tables]
    beside = [p for name, p in tables.items() if name not in heads]
    head_decay = weight_decay if decays_tables else 0.0
    groups = [
        {"params": others, "weight_decay": weight_decay},
        {"params": beside, "weight_decay": 0.0},
        {"params": list(heads.values()), "weight_decay": head_decay, "lr": head_lr or lr},
        {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=fused)
    if kind == "muon":
        optimizer = MuonAndAdamW(list(inner.values()), optimizer, muon_lr, weight_decay)
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
