"""One rank of the proofs in test_clip_losses.py: python contrastive_ranks.py RECIPE RANK WORLD STORE OUT

It computes every case and leaves {name: (loss averaged over ranks, gradients)} in OUT.RANK.
"""

import math
import sys
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

PAIRS = 16
DTYPES = (torch.float32, torch.float64)
contrastive = None  # the recipe's module, set by whoever imports this file


# ---- a small model, a batch, and the loss as a person would write it ---------------------------------------------


class Model(nn.Module):
    """Two towers with a projection each, a scale and a bias."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(dropout))
        self.text = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Dropout(dropout))
        self.image_projection, self.text_projection = nn.Linear(12, 8), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, images, texts):
        found = self.image_projection(self.image(images)), self.text_projection(self.text(texts))
        normalised = [F.normalize(x, dim=-1) for x in found]
        return contrastive.Embeddings(*normalised, self.scale.exp(), self.bias + 0)


def build(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    return Model(dropout).to(dtype)


def batch(dtype=torch.float64):
    """images, texts, ids: pairs 0, 1, 2 have one caption, pairs 2k and 2k + 1 one picture."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, 6, generator=generator).to(dtype)
    texts = torch.randn(PAIRS, 5, generator=generator).to(dtype)
    return images, texts, torch.tensor([[i // 3, i // 2] for i in range(PAIRS)])


def by_hand(found, ids, kind):
    z = found.scale * found.images @ found.texts.T
    others = torch.zeros_like(z, dtype=torch.bool)
    if ids is not None:
        for i in range(len(z)):
            for j in range(len(z)):
                others[i, j] = i != j and bool((ids[i] == ids[j]).any())
    own = torch.arange(len(z))
    if kind == "softmax":
        z = z.masked_fill(others, -math.inf)
        return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2
    signs = 2 * torch.eye(len(z), dtype=z.dtype) - 1
    return -F.logsigmoid(signs * (z + found.bias))[~others].sum() / len(z)


def gradients(model) -> dict:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


# ---- what one rank does ------------------------------------------------------------------------------------------


def cases() -> list[tuple]:
    """(kind, mode, masked)"""
    found = [("softmax", mode, masked) for mode in contrastive.MODES for masked in (False, True)]
    return [*found, ("sigmoid", "exact", False), ("sigmoid", "exact", True)]


def wrapped(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def own_part(rank, world, dtype=torch.float64):
    size = PAIRS // world
    return [x[rank * size : (rank + 1) * size] for x in batch(dtype)]


def every_mode(rank, world) -> dict:
    found = {}
    for dtype in DTYPES:
        for kind, mode, masked in cases():
            model = build(dtype=dtype)
            images, texts, ids = own_part(rank, world, dtype)
            ddp = wrapped(model)
            embeddings = ddp(images, texts)
            ids = ids if masked else None
            loss = contrastive.contrastive_loss(embeddings, ids, kind, mode)
            loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            found[kind, mode, masked, str(dtype)] = mean.item() / world, gradients(model)
    return found


def forward_of(model):
    return lambda chunk: model(**chunk)


def chunks_of(images, texts, size):
    return contrastive.split_batch({"images": images, "texts": texts}, size)


def big_graph(model, chunks, loss_of):
    """The same chunks, with the same random numbers, all with a graph."""
    parts = [model(**chunk) for chunk in chunks]
    images, texts = (torch.cat([part[i] for part in parts]) for i in range(2))
    loss = loss_of(contrastive.Embeddings(images, texts, *parts[0][2:]))
    loss.backward()
    return loss


def cached_and_whole(rank, world, size, kind) -> list:
    """GradCache, then one big graph, with dropout: (loss, gradients, the next random number)."""
    images, texts, ids = own_part(rank, world)
    loss_of = partial(contrastive.contrastive_loss, ids=ids, kind=kind)
    found = []
    for cached in (True, False):
        model = build(dropout=0.3)
        ddp = wrapped(model) if world > 1 else model
        chunks = chunks_of(images, texts, size)
        torch.manual_seed(7 + rank)
        if cached:
            hold = ddp.no_sync if world > 1 else nullcontext
            loss = contrastive.grad_cache(
                forward_of(ddp), chunks, loss_of, torch.Tensor.backward, hold
            )
            loss.backward()
        else:  # DDP takes one forward a step: its gradients are averaged by hand
            loss = big_graph(model, chunks, loss_of)
            for parameter in model.parameters():
                if world > 1 and parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world
        found.append((loss.item(), gradients(model), torch.rand(1).item()))
    return found


def teacher_of(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    both = [torch.randn(PAIRS, 7, generator=generator) for _ in range(2)]
    both = [F.normalize(x, dim=-1).to(dtype) for x in both]
    return contrastive.Teacher(*both, scale=9.0, weight=0.7)


def with_teacher(rank, world, kind) -> dict:
    model = build()
    images, texts, ids = own_part(rank, world)
    size = PAIRS // world
    part = slice(rank * size, (rank + 1) * size)
    teacher = teacher_of()
    teacher = teacher._replace(images=teacher.images[part], texts=teacher.texts[part])
    ddp = wrapped(model) if world > 1 else model
    contrastive.contrastive_loss(ddp(images, texts), ids, kind, teacher=teacher).backward()
    return gradients(model)


def facts(rank, world) -> torch.Tensor:
    size = PAIRS // world
    captions = torch.arange(PAIRS) // 3
    found = contrastive.batch_facts(captions[rank * size : (rank + 1) * size])
    dist.all_reduce(found)
    return found


def all_of(rank, world) -> dict:
    kinds = contrastive.KINDS
    return {
        "modes": every_mode(rank, world),
        "grad_cache": {kind: cached_and_whole(rank, world, 3, kind) for kind in kinds},
        "teacher": {kind: with_teacher(rank, world, kind) for kind in kinds},
        "facts": facts(rank, world),
    }


if __name__ == "__main__":
    recipe, rank, world, store, out = sys.argv[1:]
    sys.path[:0] = [recipe, f"{recipe}/.."]
    import contrastive

    torch.set_num_threads(1)
    rank, world = int(rank), int(world)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(all_of(rank, world), f"{out}.{rank}")
    dist.destroy_process_group()
