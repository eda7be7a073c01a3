"""Rotary positions (Su et al. 2021) in float32 on CPUs, in place where that can be.

y = x * cos + rotate_half(x) * sin, for rotate_half(x) = (-second half, first half) of a head. In
plain torch that is five passes over memory forward and ten backward, most of them for the halves
and their gradients; here it is three and three. Accelerators and half precision, where the
products would be rounded in another order, go on with the function of the model.

B rows, H heads, T tokens, d size of a head.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME = "apply_rotary_pos_emb"  # as the modules of transformers call theirs


def use_fast_rotary(model: nn.Module) -> int:
    """Give the modules that a model's classes stand in this function instead of their own; returns
    how many there were. Only where it computes the same of random numbers."""
    owners = {sys.modules[type(module).__module__] for module in model.modules()}
    found = [owner for owner in owners if _is_rotary(getattr(owner, NAME, None))]
    for owner in found:
        setattr(owner, NAME, _in_place_of(getattr(owner, NAME)))
    return len(found)


def _in_place_of(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
        tensors = (q, k, cos, sin)
        plain = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        if not plain or cos.requires_grad or torch.compiler.is_compiling():
            return stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos = cos.unsqueeze(unsqueeze_dim)
        sin = sin.unsqueeze(unsqueeze_dim)
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)

    return apply


class _Rotary(torch.autograd.Function):
    """x [B, H, T, d], cos and sin [B, 1, T, d] or [B, T, 1, d] where heads stand behind tokens."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        d_x = grad * cos
        d_x[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        d_x[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return d_x, None, None


@torch.no_grad()
def _is_rotary(stock: Callable | None) -> bool:
    """Whether a function, not ours yet, does with random numbers what _Rotary does."""
    if stock is None or hasattr(stock, "__wrapped__"):
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    try:
        wanted = stock(q, k, cos, sin, unsqueeze_dim=1)
        found = _in_place_of(stock)(q, k, cos, sin)
        pairs = zip(found, wanted, strict=True)
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    except Exception:  # whatever a function that is something else says to these shapes
        return False
