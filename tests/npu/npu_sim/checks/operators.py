"""Operators give on the NPU what they give on the CPU, gradients included."""

import torch
import torch.nn.functional as F
from support import same, values

A, B = values(4, 6), values(4, 6, seed=1)
POSITIVE = values(4, 6, seed=2, low=0.5, high=2.0)
M, BATCH = values(6, 5, seed=3), values(2, 4, 6, seed=4)
IMAGE, INDEX = values(2, 3, 8, 8, seed=5), torch.tensor([[0, 3, 1], [2, 0, 5]])
LABELS, TOKENS = torch.tensor([1, 0, -100, 5]), torch.tensor([[1, 4, 9], [0, 9, 2]])
VECTOR, HEADS = values(6, seed=6), values(2, 4, 5, 8, seed=7)
MASK = torch.tensor([[True, False, True, False, True, False]] * 4)

CASES = {
    "add": (lambda a, b: a + 2 * b, A, B),
    "subtract": (lambda a, b: a - b, A, B),
    "multiply": (lambda a, b: a * b, A, B),
    "divide": (lambda a, b: a / b, A, POSITIVE),
    "power": (lambda a: a**3 + a**0.5, POSITIVE),
    "exp, log": (lambda a: a.exp() + a.log(), POSITIVE),
    "sqrt, rsqrt": (lambda a: a.sqrt() + a.rsqrt(), POSITIVE),
    "sin, cos, tanh": (lambda a: a.sin() + a.cos() * a.tanh(), A),
    "sigmoid": (torch.sigmoid, A),
    "relu": (F.relu, A),
    "gelu": (F.gelu, A),
    "gelu, tanh": (lambda a: F.gelu(a, approximate="tanh"), A),
    "silu": (F.silu, A),
    "abs, neg, sign": (lambda a: a.abs() - (-a) + a.sign(), A),
    "clamp": (lambda a: a.clamp(-0.5, 0.5), A),
    "maximum": (torch.maximum, A, B),
    "where": (lambda a, b: torch.where(a > 0, a, b), A, B),
    "masked_fill": (lambda a, m: a.masked_fill(m, -1e4).softmax(-1), A, MASK),
    "sum, mean": (lambda a: (a.sum(0), a.mean(-1, keepdim=True)), A),
    "amax, argmax": (lambda a: (a.amax(1), a.argmax(1)), A),
    "var, std": (lambda a: (a.var(1), a.std(0)), A),
    "norm": (lambda a: (a.norm(), torch.linalg.vector_norm(a, 2, dim=1)), A),
    "cumsum": (lambda a: a.cumsum(1), A),
    "topk, sort": (lambda a: (*a.topk(3), *a.sort(1, descending=True)), A),
    "mm": (lambda a, m: a @ m, A, M),
    "bmm": (lambda a, b: a @ b.transpose(1, 2), BATCH, BATCH),
    "addmm": (lambda v, a, m: torch.addmm(v[:5], a, m), VECTOR, A, M),
    "linear": (lambda a, b, v: F.linear(a, b, v[:4]), A, B, VECTOR),
    "einsum": (lambda a, m: torch.einsum("bij,jk->bik", a, m), BATCH, M),
    "softmax": (lambda a: a.softmax(-1), A),
    "log_softmax": (lambda a: a.log_softmax(-1), A),
    "cross_entropy": (lambda a, y: F.cross_entropy(a, y), A, LABELS),
    "mse_loss": (F.mse_loss, A, B),
    "bce with logits": (lambda a, m: F.binary_cross_entropy_with_logits(a, m.float()), A, MASK),
    "embedding": (lambda ids, w: F.embedding(ids, w), TOKENS, values(10, 6)),
    "layer_norm": (lambda a, v: F.layer_norm(a, (6,), v, v), A, VECTOR),
    "rms_norm": (lambda a, v: F.rms_norm(a, (6,), v), A, VECTOR),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), IMAGE),
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), IMAGE, values(4, 3, 3, 3)),
    "conv1d": (lambda a, w: F.conv1d(a, w), BATCH, values(3, 4, 2)),
    "pooling": (
        lambda x: (F.max_pool2d(x, 2), F.avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 1)),
        IMAGE,
    ),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), HEADS),
    "attention, mask": (
        lambda a, m: F.scaled_dot_product_attention(a, a, a, attn_mask=m[:, :4]),
        BATCH,
        MASK,
    ),
    "cat, stack": (lambda a, b: (torch.cat([a, b]), torch.stack([a, b], 1)), A, B),
    "split, chunk": (lambda a: (*a.split(2, 1), *a.chunk(2, 0)), A),
    "view, transpose": (lambda a: a.t().reshape(3, 8).unsqueeze(1).expand(3, 2, 8).contiguous(), A),
    "slices": (lambda a: (a[1:, ::2], a[..., -1], a[None, 2]), A),
    "gather, scatter_add": (
        lambda a, i: (a.gather(1, i), torch.zeros_like(a).scatter_add(1, i, a[:2, :3])),
        A,
        INDEX,
    ),
    "index, index_select": (lambda a, i: (a[i[0]], a.index_select(1, i[1])), A, INDEX),
    "masked_select": (lambda a, m: a[m], A, MASK),
    "tril, triu": (lambda a: (a.tril(), a.triu(1)), A),
    "repeat, flip, roll": (lambda a: (a.repeat(2, 1), a.flip(0), a.roll(1, 1)), A),
    "pad": (lambda a: F.pad(a, (1, 2, 0, 1), value=3.0), A),
    "casts": (lambda a: (a.half().float(), a.to(torch.bfloat16).float(), a.int(), a > 0), A),
    "integers": (lambda i: (i // 2, i % 3, i << 1, i == 3, i.sum()), INDEX),
    "one_hot, unique": (lambda i: (F.one_hot(i, 6), *i.unique(return_counts=True)), INDEX),
    "checkpoint": (
        lambda a: torch.utils.checkpoint.checkpoint(lambda x: x.sin() * x, a, use_reentrant=False),
        A,
    ),
}


def check_operators_equal_the_cpu():
    wrong = []
    for name, (function, *inputs) in CASES.items():
        try:
            same(name, function, *inputs)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    assert len(CASES) > 50


def check_a_training_step_equals_the_cpu():
    def after_steps(device, optimizer, **settings):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 6)
        ).to(device)
        optimizer = optimizer(model.parameters(), lr=0.01, **settings)
        for _ in range(3):
            F.cross_entropy(model(A.to(device)), LABELS.to(device)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])

    for kind in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        here, there = (after_steps(device, torch.optim.AdamW, **kind) for device in ("cpu", "npu"))
        torch.testing.assert_close(
            there, here, rtol=1e-5, atol=1e-6, msg=lambda text, kind=kind: f"{kind}: {text}"
        )
    here, there = (after_steps(device, torch.optim.SGD, momentum=0.9) for device in ("cpu", "npu"))
    torch.testing.assert_close(there, here)


def check_results_land_where_they_are_asked_for():
    out = torch.empty(0, device="npu")
    torch.add(A.npu(), B.npu(), out=out)
    assert torch.equal(out.cpu(), A + B), "out= of another size is resized"
    x = A.npu()
    view = x[1]
    view.mul_(2)
    assert torch.equal(x[1].cpu(), A[1] * 2), "writing to a view writes to its base"
    assert (
        x.t().data_ptr() == x.data_ptr() and torch.zeros_like(x, device="cpu").device.type == "cpu"
    )


def check_autocast_lists():
    x, w = A.npu(), M.npu()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("npu", dtype=dtype):
            assert (x @ w).dtype is dtype and x.softmax(-1).dtype is torch.float32
    assert (x @ w).dtype is torch.float32


def check_save_and_load():
    import io

    buffer = io.BytesIO()
    torch.save({"x": A.npu()}, buffer)
    for device in ("cpu", "npu:1"):
        buffer.seek(0)
        x = torch.load(buffer, map_location=device, weights_only=True)["x"]
        assert str(x.device) == device and torch.equal(x.cpu(), A)
