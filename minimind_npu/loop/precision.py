"""float32 on a CPU, as fast as it goes without rounding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from common import device

CHECKED_ROWS = 32  # of a product, against float64
LOSS_ROWS = 512  # positions whose logits are computed at once (common/fast/losses.py)


def fast_float32(shapes: Iterable[tuple[int, int, int]] = ((256, 256, 256),)) -> bool:
    """On a CPU, let oneDNN compute float32 products where it is exact; returns whether it does.

    On some of AMD's CPUs MKL leaves AVX-512 unused and oneDNN is up to twice as fast, but torch
    wants permission to round to bf16 before it hands products over. That permission is kept only
    where no product of these shapes, those of the model, is rounded: oneDNN chooses a kernel for
    each.

    shapes: (rows, inner, columns) of [rows, inner] @ [inner, columns].
    """
    if device.kind() != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    if any(rounds(*shape) for shape in sorted(set(shapes))):
        settings.fp32_precision = before
    return settings.fp32_precision == "bf16"


def rounds(rows: int, inner: int, columns: int) -> bool:
    """Whether a product of this shape loses digits."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator)
    b = torch.randn(inner, columns, generator=generator)
    some = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).long()
    exact = a[some].double() @ b.double()
    error = ((a @ b)[some].double() - exact).abs().max()
    return bool(error > 1e-5 * exact.abs().max())


def product_shapes(model: nn.Module, tokens: int) -> set[tuple[int, int, int]]:
    """What a step over `tokens` tokens multiplies in the linear layers of a model: forward, both
    products of backward, and Muon's. The head sees some hundred rows at a time."""
    head = model.get_output_embeddings()
    found = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            rows = min(tokens, LOSS_ROWS) if layer is head else tokens
            outer, inner = layer.weight.shape
            found |= {(rows, inner, outer), (rows, outer, inner), (outer, rows, inner)}
            if layer is not head:
                less, more = sorted((inner, outer))
                found |= {(less, more, less), (less, less, less), (less, less, more)}
    return found
