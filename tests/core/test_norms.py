"""RMSNorm piece by piece against transformers' own module; which modules are taken for one."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from common.fast import norms

WIDTH = 48


def make(dtype=torch.float32, weight_dtype=None) -> Qwen3RMSNorm:
    module = Qwen3RMSNorm(WIDTH)
    nn.init.normal_(module.weight)
    return module.to(weight_dtype or dtype)


def passed(module, hidden, grad) -> dict:
    """Output and gradients; the norm of heads stands before their transposition."""
    module.weight.grad = None
    hidden = hidden.detach().requires_grad_()
    said = module(hidden)
    said = said.transpose(1, 2) if hidden.dim() == 4 else said
    said.backward(grad.to(said.dtype).reshape(said.shape))
    return {"output": said.detach(), "input": hidden.grad, "weight": module.weight.grad}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "dtype, weight_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("shape", [(2, 9, WIDTH), (1, 9, 3, WIDTH), (5, WIDTH)])
def test_equals_the_stock_module(shape, dtype, weight_dtype, trained, monkeypatch):
    monkeypatch.setattr(norms, "CACHE_ELEMENTS", 4 * WIDTH)  # several pieces
    torch.manual_seed(0)
    stock = make(dtype, weight_dtype).requires_grad_(trained)
    fast = copy.deepcopy(stock)
    assert norms.use_fast_norms(fast) == 1
    hidden = (3 * torch.randn(shape)).to(dtype)
    grad = torch.randn(shape)
    wanted = passed(stock, hidden, grad)
    found = passed(fast, hidden, grad)
    assert (found["weight"] is not None) == trained
    for name, expected in wanted.items():
        if expected is None:
            continue
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        within = 1e-6 if dtype == torch.float32 else 2**-6
        scale = expected.float().abs().max()
        assert (found[name].float() - expected.float()).abs().max() <= within * scale, name
    if dtype == torch.bfloat16:  # rounded in the module's order
        for name in ("output", "input"):
            assert (found[name] == wanted[name]).float().mean() > 0.98, name


class RoundsLast(Qwen3RMSNorm):
    """The weight in float32, as some models have it."""

    def forward(self, hidden):
        x = hidden.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * x).to(hidden.dtype)


def test_only_what_computes_the_same_is_taken():
    same = make()
    others = [
        GemmaRMSNorm(WIDTH),
        RoundsLast(WIDTH),
        nn.LayerNorm(WIDTH, bias=False),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 1, bias=False),
    ]
    model = nn.ModuleList([same, *others])
    assert norms.use_fast_norms(model) == 1
    assert "forward" in same.__dict__
    assert not any("forward" in one.__dict__ for one in others)
    # a copy has the forward of its own weights
    twin = copy.deepcopy(same)
    nn.init.zeros_(twin.weight)
    hidden = torch.ones(2, WIDTH)
    assert not twin(hidden).any() and same(hidden).any()
