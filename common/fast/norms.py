"""RMSNorm (Zhang and Sennrich 2019) on CPUs, a few rows at a time.

In plain torch it is six passes over memory forward and a dozen backward. Here each piece of the
rows stays in the core's cache until it is done: a third to a half of the time, and only the input
is kept for the backward. Accelerators go on with the module's own forward.

N tokens, D width of the norm.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from common.fast.softmax import pieces

CACHE_ELEMENTS = 2**17  # fp32 elements of a piece: a few of them stay in a CPU core's L2 cache
EPSILONS = ("variance_epsilon", "eps")  # what the modules of models call theirs


def use_fast_norms(model: nn.Module) -> int:
    """Give the RMSNorms of a model the forward of this module on CPUs; returns how many there were.

    They are known by what they compute of random numbers, rounding in half precision included:
    others (with a mean, with 1 + weight) stay as they are. Weights may train or not.
    """
    found = [module for module in model.modules() if _is_rms_norm(module)]
    for module in found:
        # a bound method, so that copy.deepcopy(model) gives a copy that stands alone
        module.forward = MethodType(_forward, module)
    return len(found)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (hidden / root mean square over the last axis): hidden [..., D], weight [D]. fp32
    inside; what is multiplied by the weight has the dtype of `hidden`."""
    return _RMSNorm.apply(hidden, weight, epsilon)


def _forward(self, hidden_states: Tensor) -> Tensor:
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, _epsilon(self))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, epsilon):
        rows = _by_token(hidden)
        width = rows.shape[-1]
        out = torch.empty(rows.shape, dtype=torch.promote_types(hidden.dtype, weight.dtype))
        inverse = torch.empty(*rows.shape[:-1], 1)  # 1 / root mean square
        for part in _pieces(rows):
            x = rows[part].float()
            scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=inverse[part])
            scale.square_().div_(width).add_(epsilon).rsqrt_()
            torch.mul((x * scale).to(hidden.dtype), weight, out=out[part])
        ctx.save_for_backward(hidden, weight, inverse)
        return out.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, inverse = ctx.saved_tensors
        rows = _by_token(hidden)
        grad = _by_token(grad)
        width = rows.shape[-1]
        d_rows = torch.empty(rows.shape, dtype=hidden.dtype)
        d_weight = torch.zeros(width) if ctx.needs_input_grad[1] else None
        for part in _pieces(rows):
            scale = inverse[part]
            normed = rows[part] * scale
            if d_weight is not None:
                product = grad[part] * normed.to(hidden.dtype)
                d_weight += product.flatten(0, -2).sum(0, dtype=torch.float32)
            g = (grad[part] * weight).to(hidden.dtype).float()
            share = (g * normed).sum(-1, keepdim=True).div_(-width)
            torch.mul(torch.addcmul(g, normed, share), scale, out=d_rows[part])
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_rows.view(hidden.shape), d_weight, None


def _by_token(x: Tensor) -> Tensor:
    """[B, T, ...] -> [N, ...], without a copy where heads stand before tokens in memory."""
    return x.flatten(0, 1) if x.dim() > 2 else x.view(-1, x.shape[-1])


def _pieces(rows: Tensor) -> list[slice]:
    of_one = rows.shape[1:].numel()
    return pieces(len(rows), max(1, CACHE_ELEMENTS // of_one))


# ---- which modules are meant ----
def _epsilon(module: nn.Module) -> float | None:
    found = [getattr(module, name) for name in EPSILONS if hasattr(module, name)]
    return found[0] if found else None


def _is_rms_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or not isinstance(_epsilon(module), float):
        return False
    return all(_is_equal(module, dtype) for dtype in (torch.float32, torch.bfloat16))


@torch.no_grad()
def _is_equal(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the module does with random numbers what `rms_norm` does. With a weight of its own:
    the module's may be all ones, or spread over ranks."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 64, generator=generator).to(dtype)
    weight = torch.randn(64, generator=generator).to(dtype)
    try:
        wanted = functional_call(module, {"weight": weight}, (hidden,))
    except Exception:  # whatever a module that is something else says to a [64] weight
        return False
    found = rms_norm(hidden, weight, _epsilon(module))
    if not isinstance(wanted, Tensor) or wanted.dtype != found.dtype:
        return False
    if dtype == torch.float32:
        return torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    # rounded in another order, a third of the numbers would differ
    return bool((found == wanted).float().mean() > 0.98)
