"""Chips without bfloat16 that saturate: Ascend910A, and "Ascend910B" without a digit."""

import os

import torch
import torch_npu
from support import ones, refused

MOST = 65504.0  # of float16


def overflowed():
    return bool(torch.npu.utils.get_npu_overflow_flag())


def clear():
    torch.npu.utils.clear_npu_overflow_flag()


def check_name_and_memory():
    assert torch.npu.get_device_name(0) == os.environ["NPU_SIM_SOC"]
    assert torch.npu.get_device_properties(0).total_memory == 32 * 2**30


def check_bfloat16_is_refused_everywhere():
    assert not torch.npu.is_bf16_supported()
    words = "EZ1001.*DT_BFLOAT16.*dtype support list"
    bf16 = torch.ones(2, 2, dtype=torch.bfloat16).npu()  # moving bytes is no operation
    calls = (
        lambda: ones(2).bfloat16(),
        lambda: torch.ones(2).to("npu", torch.bfloat16) + 0,
        lambda: ones(2, dtype=torch.bfloat16),
        lambda: torch.zeros(2, dtype=torch.bfloat16, device="npu"),
        lambda: bf16 + bf16,
        lambda: bf16 @ bf16,
        lambda: bf16.float(),
        lambda: ones(2).sum(dtype=torch.bfloat16),
        lambda: torch.nn.Linear(2, 2).to("npu", torch.bfloat16)(bf16),
    )
    for call in calls:
        refused(words, call)
    assert torch.equal(bf16.cpu(), torch.ones(2, 2, dtype=torch.bfloat16))


def check_autocast_to_bfloat16_only_warns():
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert (ones(2, 2) @ ones(2, 2)).dtype is torch.float32


def in_place(x):
    torch._foreach_mul_([x], 2.0)
    return x


def check_an_overflow_gives_the_largest_number_and_the_flag():
    big = ones(2, 2, dtype=torch.float16) * 60000
    results = {
        "multiply": lambda: big * 2,
        "in place": lambda: big.clone().mul_(-2).neg(),
        "add": lambda: big + big,
        "matmul": lambda: big @ big,
        "sum": lambda: big.sum(0),
        "exp": lambda: (big / 1000).exp(),
        "square": lambda: big.square(),
        "foreach": lambda: torch._foreach_mul([big, big], 2.0)[1],
        "foreach in place": lambda: in_place(big.clone()),
        "cast": lambda: (ones(2, 2) * 1e6).half(),
        "out=": lambda: torch.mul(big, 2, out=torch.empty_like(big)),
    }
    for name, call in results.items():
        clear()
        assert not overflowed(), name
        out = call()
        assert (out == MOST).all(), (name, out)
        assert overflowed(), name
    clear()
    small = (-big * 2).min().item()
    assert small == -MOST
    clear()
    wide = ones(2) * 3e38 * 10
    assert wide.isfinite().all() and overflowed(), "float32 too"


def check_infinities_that_come_in_are_no_overflow():
    clear()
    x = ones(2, 2, dtype=torch.float16)
    masked = x.masked_fill(torch.tensor([[True, False]] * 2).npu(), float("-inf"))
    masked.softmax(-1)
    torch.full((2,), float("inf"), device="npu", dtype=torch.float16) * 2
    torch.tensor([float("inf")]).half().npu() + 1
    assert torch.isinf(masked).any() and not overflowed()


def steps(scaler, huge):
    """Two steps, the first with a gradient that overflows if `huge`: (weight after each, scale after each)."""
    weight = torch.nn.Parameter(ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weights, scales = [], []
    for factor in (1e6 if huge else 1.0, 1.0):
        with torch.autocast("npu", dtype=torch.float16):
            loss = (weight.half() * factor).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        weights.append(weight.detach().tolist())
        scales.append(scaler.get_scale())
    return weights, scales


def check_the_grad_scaler_sees_an_overflow():
    for make in (torch.npu.amp.GradScaler, lambda **k: torch.amp.GradScaler("npu", **k)):
        clear()
        weights, scales = steps(make(init_scale=1024.0), huge=True)
        assert weights == [[1, 1], [0.5, 0.5]] and scales == [512, 512], (make, weights, scales)
        weights, scales = steps(make(init_scale=1024.0), huge=False)
        assert weights == [[0.5, 0.5], [0, 0]] and scales == [1024, 1024], (make, weights, scales)


def check_kernels_that_this_chip_does_not_have():
    q = ones(1, 1, 4, 8, dtype=torch.float16)
    refused(
        "not supported on Ascend910", lambda: torch_npu.npu_fusion_attention(q, q, q, 1, "BNSD")
    )
    refused("not supported on Ascend910", lambda: torch_npu.npu_swiglu(q))
    refused("not supported on Ascend910", lambda: torch_npu.npu_rotary_mul(q, q, q, "interleave"))
    assert (
        torch_npu.npu_rotary_mul(q, q, q).shape == q.shape
        and torch_npu.npu_rms_norm(q, ones(8).half())[0].shape
    )
