"""Optimizers and the learning rate.

AdamW (Loshchilov and Hutter 2019) decays matrices and embeddings, never norms. Muon (Jordan 2024,
torch.optim.Muon) updates the matrices of the blocks by their orthogonalised momentum; embedding,
router and norms stay with AdamW. The momentum is made orthogonal by five steps of a polynomial:
Newton and Schulz's, the same in each step, as in torch.optim.Muon, or Polar Express (Amsel et al.
2025), another one in each step, which comes closer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common import device

SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
BETAS = (0.9, 0.95)
STACKED_NUMBERS = 2**27  # that one product of Muon takes at most, 256 MiB in bfloat16
STABLE = 0.6  # share of warmup_stable_decay after the warm-up in which the rate stays at its peak


@dataclass(frozen=True)
class Iteration:
    """How a matrix is made orthogonal: x <- a x + (b x x^T + c (x x^T)^2) x.

    steps: (a, b, c) of each; margin, least: x begins as the matrix / (its Frobenius norm * margin +
    least), so that no singular value is above what the polynomials are made for.
    """

    steps: tuple[tuple[float, float, float], ...]
    margin: float = 1.0
    least: float = 0.0


ITERATIONS = {
    "newton_schulz": Iteration(((3.4445, -4.775, 2.0315),) * 5),
    "polar_express": Iteration(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        margin=1.02,
        least=1e-6,
    ),
}


class MuonAndAdamW:
    """Muon on `matrices` and AdamW on the rest, behind the interface of one optimizer."""

    def __init__(
        self,
        matrices: list,
        rest: torch.optim.AdamW,
        lr: float,
        weight_decay: float,
        iteration: str = "newton_schulz",
    ):
        how = {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay}
        self.optimizers = (StackedMuon(matrices, iteration=iteration, **how), rest)

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

    iteration: of ITERATIONS; with newton_schulz the steps are torch's. A run that goes on takes its
    own, whatever its checkpoint was made with: the state is the same.
    """

    def __init__(self, matrices: list, iteration: str = "newton_schulz", **how):
        super().__init__(matrices, **how)
        self.iteration = ITERATIONS[iteration]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in shapes.items():
                updates = orthogonal_by_ranks(self.directions(matrices, group), self.iteration)
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


def orthogonal_by_ranks(matrices: list[torch.Tensor], iteration: Iteration) -> list[torch.Tensor]:
    """orthogonal() of each of the matrices, which have one shape; every rank computes a share and
    is given the others'."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    world = dist.get_world_size() if several else 1
    share = math.ceil(len(matrices) / world)
    first = share * dist.get_rank() if several else 0
    last = len(matrices) - 1
    mine = [matrices[min(i, last)] for i in range(first, first + share)]
    done = orthogonal_of_one_shape(mine, iteration)
    if several:
        of_all = [torch.empty_like(done) for _ in range(world)]
        dist.all_gather(of_all, done)
        done = torch.cat(of_all)
    return list(done[: len(matrices)].to(matrices[0].dtype).unbind())


def orthogonal_of_one_shape(matrices: list, iteration: Iteration) -> torch.Tensor:
    """-> [matrices, rows, columns], in the dtype of the products."""
    emulates_bfloat16 = device.kind() == "cpu" and device.half_dtype() is None
    dtype = torch.float32 if emulates_bfloat16 else torch.bfloat16
    if matrices[0].device.type == "cpu":  # one by one its caches hold them
        return torch.stack([orthogonal(x.to(dtype), iteration) for x in matrices])
    at_once = max(1, STACKED_NUMBERS // matrices[0].numel())
    parts = [matrices[i : i + at_once] for i in range(0, len(matrices), at_once)]
    stacks = [torch.stack(part).to(dtype) for part in parts]
    return torch.cat([orthogonal(stack, iteration) for stack in stacks])


def orthogonal(matrix: torch.Tensor, iteration: Iteration) -> torch.Tensor:
    """[..., rows, columns] -> nearly the nearest matrix with singular values of 1. By Newton and
    Schulz they come out between 0.68 and 1.2 where they were 5e-3 of the norm or more, by Polar
    Express between 0.85 and 1.15 where they were 1e-3; smaller ones stay smaller."""
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT.contiguous() if is_tall else matrix
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm * iteration.margin + iteration.least).clamp(min=1e-7)
    added_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in iteration.steps:
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
    iteration: str = "newton_schulz",
):
    """The optimizer of a model's trainable parameters; each group keeps its peak rate as "peak".

    kind: "adamw" or "muon"; fused: 3 times as fast, and unusable with the fp16 scaler of an NPU;
    head_lr: of a head that is no table of tokens too, 0: as the others; decays_tables: whether the
    table of tokens and the head are decayed; iteration: of Muon, one of ITERATIONS.
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
        optimizer = MuonAndAdamW(list(inner.values()), optimizer, muon_lr, weight_decay, iteration)
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
