"""Ascend910B2 with three cards of which two are visible: names, dtypes, refusals, random numbers, fused operators."""

import threading

import torch
import torch_npu
from support import ones, refused, same, values

# ---- devices


def check_names_and_counts():
    assert (
        torch.npu.is_available() and torch.npu.device_count() == 2
    )  # ASCEND_RT_VISIBLE_DEVICES=0,2 of three
    assert torch.npu.get_device_name(0) == "Ascend910B2"
    assert torch.accelerator.current_accelerator().type == "npu"
    assert torch.npu.get_device_properties(0).total_memory == 64 * 2**30
    assert str(ones(1, device="npu:1").device) == "npu:1" and ones(1).npu().device.index == 0


def check_a_device_that_is_not_there():
    refused("107001", lambda: torch.npu.set_device(2))


def check_tensors_of_two_devices():
    refused("at least two devices, npu:0 and cpu", lambda: ones(2) + ones(2, device="cpu"))
    refused("at least two devices, npu:0 and npu:1", lambda: ones(2) @ ones(2, device="npu:1"))
    assert (ones(2) * torch.tensor(3.0)).tolist() == [3, 3], "a CPU scalar may take part"
    assert ones(2).to("npu:1").device.index == 1


# ---- dtypes


def check_bfloat16_works():
    assert torch.npu.is_bf16_supported()
    x = ones(2, 2, dtype=torch.bfloat16)
    assert (x @ x).dtype is torch.bfloat16 and (x @ x).tolist() == [[2, 2], [2, 2]]


def check_matmul_takes_no_float64_and_no_integers():
    for dtype, name in (
        (torch.float64, "DT_DOUBLE"),
        (torch.int32, "DT_INT32"),
        (torch.int64, "DT_INT64"),
    ):
        x = ones(2, 2, dtype=dtype)
        refused(f"EZ1001.*{name}.*dtype support list", lambda x=x: x @ x)
    refused("aclnnBmm.*DT_DOUBLE", lambda: torch.bmm(*[ones(1, 2, 2, dtype=torch.float64)] * 2))


def check_layers_take_no_float64():
    x = ones(2, 4, dtype=torch.float64)
    for layer in (
        torch.nn.functional.gelu,
        torch.nn.functional.silu,
        lambda x: torch.layer_norm(x, (4,)),
    ):
        refused("EZ1001.*DT_DOUBLE", lambda layer=layer: layer(x))
    refused("DT_DOUBLE", lambda: torch.nn.functional.nll_loss(x, ones(2, dtype=torch.int64)))
    assert (x + x).sum().item() == 16, "float64 is kept and added"
    assert ones(2).double().dtype is torch.float32, "torch_npu itself makes float32 of it"


def check_float8_is_refused():
    refused("DT_FLOAT8_E4M3FN", lambda: ones(2).to(torch.float8_e4m3fn))


def check_overflow_is_infinity():
    x = ones(2, dtype=torch.float16) * 60000
    assert torch.isinf(x * 2).all() and torch.npu.utils.is_support_inf_nan()


# ---- what has no kernel


def check_operators_without_a_kernel_are_errors():
    refused("aten::linalg_eig.*fallback is disabled", lambda: torch.linalg.eig(ones(2, 2)))


def check_operators_that_are_not_simulated_say_their_name():
    pairs = {
        "npu_confusion_transpose": lambda x: torch_npu.npu_confusion_transpose(
            x, (1, 0), (4, 2), True
        ),
        "npu_grouped_matmul": lambda x: torch_npu.npu_grouped_matmul([x], [x.t()], group_type=-1),
        "npu_cross_entropy_loss": lambda x: torch_npu.npu_cross_entropy_loss(
            x, ones(2, dtype=torch.int64)
        ),
    }
    for name, call in pairs.items():
        for grad in (False, True):
            text = refused(
                name, lambda c=call, g=grad: c(ones(2, 4).requires_grad_(g)), NotImplementedError
            )
            assert "[npu-sim]" in text and "not simulated" in text


def check_torch_compile_is_refused():
    refused("npu|Device", lambda: torch.compile(lambda x: x + 1)(ones(2)), Exception)


# ---- random numbers


def check_a_cpu_generator_is_refused():
    refused(
        "Expected a 'npu' device type",
        lambda: torch.rand(2, device="npu", generator=torch.Generator()),
    )
    refused("Expected a 'npu' device type", lambda: ones(2).normal_(generator=torch.Generator()))


def check_random_state_is_saved_and_restored():
    draws = (
        lambda: torch.rand(5, device="npu"),
        lambda: ones(5).normal_(),
        lambda: torch.randint(100, (5,), device="npu"),
        lambda: torch.nn.functional.dropout(ones(50), 0.5),
        lambda: torch.randperm(20, device="npu"),
        lambda: torch.multinomial(ones(9), 5, replacement=True),
        lambda: torch.bernoulli(ones(50) / 2),
        lambda: torch.randn_like(ones(5)),
    )
    state = torch.npu.get_rng_state()
    first = [draw().tolist() for draw in draws]
    after = [draw().tolist() for draw in draws]
    torch.npu.set_rng_state(state)
    assert [draw().tolist() for draw in draws] == first and first != after
    torch.npu.manual_seed(7)
    seven = torch.rand(3, device="npu").tolist()
    own = torch.Generator("npu").manual_seed(7)
    assert torch.rand(3, device="npu", generator=own).tolist() == seven
    assert torch.rand(3, device="npu", generator=own).tolist() != seven


def check_the_cpu_generator_stays_where_it_is():
    state = torch.get_rng_state()
    for _ in range(3):
        (
            torch.rand(5, device="npu"),
            torch.nn.functional.dropout(ones(50), 0.3),
            ones(3).exponential_(),
        )
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(1)  # leaves half a pair of normal numbers behind
    state = torch.get_rng_state()
    torch.nn.functional.dropout(ones(5), 0.3)
    assert torch.equal(torch.get_rng_state(), state)


def check_random_numbers_are_random():
    x = torch.rand(10000, device="npu")
    assert abs(x.mean().item() - 0.5) < 0.02 and x.min().item() >= 0 and x.max().item() < 1
    y = torch.randn(10000, device="npu")
    assert abs(y.mean().item()) < 0.05 and abs(y.std().item() - 1) < 0.05
    kept = (torch.nn.functional.dropout(ones(10000), 0.25) > 0).float().mean().item()
    assert abs(kept - 0.75) < 0.03


# ---- fused operators: the formula on the CPU, forward and backward


def on_npu(formula, fused):
    return lambda *x: (fused if x[0].device.type == "npu" else formula)(*x)


def check_rms_norm():
    def formula(x, gamma):
        rstd = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * rstd * gamma, rstd

    both = on_npu(formula, lambda x, gamma: torch_npu.npu_rms_norm(x, gamma, epsilon=1e-5))
    same("rms_norm", both, values(2, 3, 8), values(8, seed=1))
    both = on_npu(
        lambda a, b, gamma: (*formula(a + b, gamma), a + b),
        lambda a, b, gamma: torch_npu.npu_add_rms_norm(a, b, gamma, 1e-5),
    )
    same("add_rms_norm", both, values(2, 3, 8), values(2, 3, 8, seed=2), values(8, seed=1))
    refused("DT_DOUBLE|Double", lambda: torch_npu.npu_rms_norm(*[ones(4, dtype=torch.float64)] * 2))


def check_swiglu():
    def formula(x):
        a, b = x.chunk(2, -1)
        return a * a.sigmoid() * b

    same("swiglu", on_npu(formula, lambda x: torch_npu.npu_swiglu(x, dim=-1)), values(3, 8))
    refused("must be even", lambda: torch_npu.npu_swiglu(ones(3, 5)))


def check_rotary():
    def half(x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def pairs(x, cos, sin):
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + turned * sin

    inputs = values(2, 4, 5, 8), values(1, 1, 5, 8, seed=1), values(1, 1, 5, 8, seed=2)
    same("rotary half", on_npu(half, torch_npu.npu_rotary_mul), *inputs)
    same(
        "rotary interleave",
        on_npu(pairs, lambda *x: torch_npu.npu_rotary_mul(*x, "interleave")),
        *inputs,
    )
    refused("4 dimensions", lambda: torch_npu.npu_rotary_mul(*[ones(5, 8)] * 3))


def attention(query, key, value, scale, hidden=None):
    """[B, N, S, D]; `hidden` is true where a key is not seen."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden.to(scores.device), float("-inf"))
    return scores.softmax(-1) @ value


def check_fused_attention_layouts():
    query, key, value = values(2, 4, 6, 8), values(2, 2, 6, 8, seed=1), values(2, 2, 6, 8, seed=2)
    views = {  # layout: from and to [B, N, S, D]
        "BNSD": (lambda x: x, lambda x, n: x),
        "BSND": (lambda x: x.transpose(1, 2), lambda x, n: x.transpose(1, 2)),
        "BSH": (
            lambda x: x.transpose(1, 2).flatten(2),
            lambda x, n: x.unflatten(-1, (n, -1)).transpose(1, 2),
        ),
        "SBH": (
            lambda x: x.permute(2, 0, 1, 3).flatten(2),
            lambda x, n: x.unflatten(-1, (n, -1)).permute(1, 2, 0, 3),
        ),
    }
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[0, ..., 4:] = True
    for layout, (there, back) in views.items():

        def fused(q, k, v, layout=layout, there=there, back=back):
            out = torch_npu.npu_fusion_attention(
                there(q), there(k), there(v), 4, layout, scale=0.3, atten_mask=mask.npu()
            )
            return back(out[0], 4)

        same(layout, on_npu(lambda *x: attention(*x, 0.3, mask), fused), query, key, value)


def check_fused_attention_masks():
    query, key, value = values(2, 4, 5, 8), values(2, 4, 7, 8, seed=1), values(2, 4, 7, 8, seed=2)
    compressed = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()
    for mode, offset in ((2, 0), (3, 2)):  # left-up and right-down causal
        hidden = torch.ones(5, 7, dtype=torch.bool).triu(1 + offset)

        def fused(*x, mode=mode):
            return torch_npu.npu_fusion_attention(
                *x, 4, "BNSD", scale=0.3, atten_mask=compressed, sparse_mode=mode
            )[0]

        same(
            f"mode {mode}",
            on_npu(lambda *x, h=hidden: attention(*x, 0.3, h), fused),
            query,
            key,
            value,
        )
    forgotten = on_npu(
        lambda *x: attention(*x, 0.3),
        lambda *x: torch_npu.npu_fusion_attention(*x, 4, "BNSD", scale=0.3, sparse_mode=3)[0],
    )
    same("no mask: full attention, as Huawei's manual says", forgotten, query, key, value)


def check_fused_attention_of_packed_sequences():
    ends = [3, 3, 8, 10]
    query, key, value = values(10, 4, 8), values(10, 2, 8, seed=1), values(10, 2, 8, seed=2)
    compressed = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()

    def formula(q, k, v):
        parts = []
        for begin, end in zip([0, *ends], ends, strict=False):
            hidden = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            cut = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
            parts.append(attention(*cut, 0.3, hidden)[0].transpose(0, 1))
        return torch.cat(parts)

    def fused(*x):
        return torch_npu.npu_fusion_attention(
            *x,
            4,
            "TND",
            scale=0.3,
            atten_mask=compressed,
            sparse_mode=3,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
        )[0]

    same("TND", on_npu(formula, fused), query, key, value)


def check_fused_operators_are_one_operator_to_autocast():
    query = values(1, 2, 5, 8).npu()
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()
    for dtype in (torch.float16, torch.bfloat16):
        x = query.to(dtype)
        calls = (
            lambda x=x: torch_npu.npu_fusion_attention(
                x, x, x, 2, "BNSD", atten_mask=mask, sparse_mode=2
            )[0],
            lambda x=x: torch_npu.npu_rms_norm(x, x[0, 0, 0])[0],
        )
        for call in calls:
            expected = call()
            with torch.autocast("npu", dtype=dtype):
                assert torch.equal(call(), expected)


def check_fused_attention_refuses():
    q = ones(1, 4, 5, 8)
    call = torch_npu.npu_fusion_attention
    refused(
        "2048",
        lambda: call(q, q, q, 4, "BNSD", atten_mask=ones(5, 5, dtype=torch.bool), sparse_mode=2),
    )
    refused("bool or uint8", lambda: call(q, q, q, 4, "BNSD", atten_mask=ones(5, 5)))
    refused("head_num", lambda: call(q, q, q, 3, "BNSD"))
    refused("same dtype", lambda: call(q, q.half(), q.half(), 4, "BNSD"))
    refused("TND needs", lambda: call(q[0], q[0], q[0], 5, "TND"))
    refused("input_layout", lambda: call(q, q, q, 4, "NBSD"))
    refused("sparse_mode 4", lambda: call(q, q, q, 4, "BNSD", sparse_mode=4), NotImplementedError)
    refused("pse", lambda: call(q, q, q, 4, "BNSD", pse=ones(1, 4, 5, 5)), NotImplementedError)


def check_fused_attention_drops_out():
    q = ones(1, 1, 64, 64)
    out = torch_npu.npu_fusion_attention(q, q, q, 1, "BNSD", keep_prob=0.5)[0]
    assert out.unique().numel() > 8 and abs(out.mean().item() - 1) < 0.2


def check_npu_fused_adamw_equals_adamw():
    def after(optimizer):
        weight = torch.nn.Parameter(values(4, 6).npu())
        optimizer = optimizer([weight], lr=0.01, weight_decay=0.1)
        for step in range(3):
            optimizer.zero_grad()
            (weight * values(4, 6, seed=step).npu()).square().sum().backward()
            optimizer.step()
        return weight.detach().cpu()

    torch.testing.assert_close(after(torch_npu.optim.NpuFusedAdamW), after(torch.optim.AdamW))


# ---- threads, streams and events


def check_other_threads():
    results = []

    def work(device):
        x = torch.nn.Parameter(ones(3, device=device))
        (x * 2).sum().backward()
        results.append((str(x.grad.device), x.grad.tolist()))

    for device in ("npu:0", "npu:1", "npu"):
        thread = threading.Thread(target=work, args=[device])
        thread.start()
        thread.join()
    assert results == [("npu:0", [2, 2, 2]), ("npu:1", [2, 2, 2]), ("npu:0", [2, 2, 2])]


def check_streams_and_events():
    begin, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    begin.record()
    with torch.npu.stream(torch.npu.Stream()):
        x = ones(4) * 2
    torch.npu.current_stream().synchronize()
    end.record()
    torch.npu.synchronize()
    assert begin.elapsed_time(end) >= 0 and x.sum().item() == 8
    assert torch.ones(3).pin_memory().npu(non_blocking=True).sum().item() == 3
