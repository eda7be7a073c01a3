"""Rotary positions in place against transformers' own function; which functions are taken for them."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers.models.qwen3 import modeling_qwen3

from common.fast import rotary

STOCK = getattr(
    modeling_qwen3.apply_rotary_pos_emb, "__wrapped__", modeling_qwen3.apply_rotary_pos_emb
)


def angles(tokens: int, size: int, dtype) -> list[torch.Tensor]:
    """cos and sin whose halves differ, which no model has."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, tokens, size, generator=generator).to(dtype) for _ in range(2)]


def turned(apply, dtype, axis: int) -> list[torch.Tensor]:
    """Outputs and gradients of queries and keys, as views of what a projection gives."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 7, heads, 8) for heads in (4, 2)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    inputs = [x.requires_grad_() for x in inputs]
    views = [x.transpose(1, 2) if axis == 1 else x for x in inputs]
    outputs = apply(*views, *angles(7, 8, dtype), unsqueeze_dim=axis)
    sum(out.sin().sum() for out in outputs).backward()
    return [*(out.detach() for out in outputs), *(x.grad for x in inputs)]


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_stock_function(dtype, axis):
    wanted = turned(STOCK, dtype, axis)
    found = turned(rotary._in_place_of(STOCK), dtype, axis)
    for expected, one in zip(wanted, found, strict=True):
        if dtype == torch.bfloat16:  # the model's own
            assert torch.equal(one, expected)
        else:
            assert (one - expected).abs().max() < 1e-6


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    """As GPT-J turns: neighbours instead of halves."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple(
        x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin for x in (q, k)
    )


@pytest.mark.parametrize("function, taken", [(STOCK, 1), (interleaved, 0), (print, 0)])
def test_only_what_computes_the_same_is_taken(monkeypatch, function, taken):
    owner = ModuleType("a_model_of_somebody")
    monkeypatch.setitem(sys.modules, owner.__name__, owner)
    owner.apply_rotary_pos_emb = function
    kind = type("Layer", (nn.Module,), {"__module__": owner.__name__})
    assert rotary.use_fast_rotary(kind()) == taken
    assert (owner.apply_rotary_pos_emb is function) == (not taken)
    assert rotary.use_fast_rotary(kind()) == 0  # once
