"""The kernels of the accelerator paths against plain torch in float32: one JSON line a check.

    python tests/gpu/kernels.py [--dry-run]      # on a CPU the dry run takes the CPU's own kernels

A figure is the largest relative error (norm of the difference / norm) of the outputs and gradients of bfloat16.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "minimind_npu")]
from common import device  # before torch

# isort: split
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.fast import alibi, attention, losses, softmax

LIMIT = 2e-2  # three significant digits of bfloat16, a few products deep
HEADS = (  # query heads, key/value heads, size of a head
    (16, 16, 64),
    (14, 2, 64),
    (32, 8, 128),
    (8, 4, 96),
    (4, 2, 40),
    (4, 1, 256),
)
LENGTHS = (700, 1, 33, 256, 90, 500, 2, 130)  # tokens of the documents in a packed row
SHORT = (20, 1, 9)


def say(check: str, figure: str, target: str, ok: bool | None) -> None:
    print(json.dumps({"check": check, "figure": figure, "target": target, "ok": ok}), flush=True)


def compare(check: str, found: list[Tensor], wanted: list[Tensor]) -> None:
    errors = [
        ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9)).item()
        for a, b in zip(found, wanted, strict=True)
    ]
    say(check, f"{max(errors):.1e}", f"< {LIMIT:.0e}", max(errors) < LIMIT)


def each(checks: list, *args) -> None:
    """Call all; one that fails is a line of its own."""
    for check in checks:
        try:
            check(*args)
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            say(getattr(check, "__name__", "kernels").replace("_", " "), words, "runs", False)


def boundaries(lengths: tuple, where) -> Tensor:
    return torch.tensor([0, *lengths], device=where).cumsum(0).to(torch.int32)


def random(where, *shape) -> Tensor:
    return torch.randn(*shape, device=where, dtype=torch.bfloat16).requires_grad_()


def document_by_document(query, key, value, lengths: tuple, scale: float) -> Tensor:
    """[H, T, d] and [K, T, d] -> [T, H, d] by torch's plain attention."""
    parts = [
        F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
        )
        for q, k, v in zip(*(x.split(lengths, 1) for x in (query, key, value)), strict=True)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def packed_attention(where, lengths: tuple) -> None:
    """Forward, backward and recomputation at six shapes of heads."""
    starts = boundaries(lengths, where)
    for heads, shared, size in HEADS:
        name = f"packed attention {heads}/{shared} heads of {size}"
        query, key, value = (random(where, n, sum(lengths), size) for n in (heads, shared, shared))
        kernel = attention.varlen_kernel(query)
        if kernel is None:
            say(name, "no kernel: a block mask", f"< {LIMIT:.0e}", False)
            continue
        gradient = torch.randn(sum(lengths), heads, size, device=where)
        rest = (starts, max(lengths), size**-0.5)
        out = checkpoint(kernel, query, key, value, *rest, use_reentrant=False)
        found = torch.autograd.grad(out, (query, key, value), gradient.to(out.dtype))
        plain = [x.detach().float().requires_grad_() for x in (query, key, value)]
        wanted = document_by_document(*plain, lengths, size**-0.5)
        compare(name, [out, *found], [wanted, *torch.autograd.grad(wanted, plain, gradient)])


def packed_alibi(where, lengths: tuple) -> None:
    heads, size = 8, 64
    starts = boundaries(lengths, where)
    slopes = alibi.alibi_slopes(heads).to(where)
    query, key, value = (random(where, heads, sum(lengths), size) for _ in range(3))
    out = alibi.alibi_attention(query, key, value, starts, max(lengths), size**-0.5, slopes)
    gradient = torch.randn(out.shape, device=where)
    found = torch.autograd.grad(out, (query, key, value), gradient.to(out.dtype))
    plain = [x.detach().float().requires_grad_() for x in (query, key, value)]
    wanted = alibi.document_by_document(*plain, starts, size**-0.5, slopes)
    wanted_gradients = torch.autograd.grad(wanted, plain, gradient)
    compare("packed ALiBi, 8 heads of 64", [out, *found], [wanted, *wanted_gradients])


def head_loss(where, lengths: tuple) -> None:
    """The loss without logits of a large vocabulary, half of the positions with a label."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    vocabulary = 151_936 if len(lengths) > len(SHORT) else 500
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).to(where)
    weight = model.lm_head.weight
    ids = torch.randint(vocabulary, (1, sum(lengths)), device=where)
    labels = ids.clone()
    labels[:, ::2] = -100
    hidden = model.model(ids).last_hidden_state
    wanted = F.cross_entropy((hidden @ weight.t())[0, :-1], labels[0, 1:])
    wanted_gradient = torch.autograd.grad(wanted, weight)
    losses.use_chunked_loss(model)
    with device.autocast(torch.bfloat16):
        found = model(ids, labels=labels).loss
    found_gradient = torch.autograd.grad(found, weight)
    compare(
        f"loss of a head of {vocabulary:,}", [found, *found_gradient], [wanted, *wanted_gradient]
    )


def head_speed(where, lengths: tuple) -> None:
    """The softmax of the head, compiled, against plain torch, in a chunk of a large vocabulary."""
    name = "softmax of a head of 151,936, compiled"
    if not softmax.is_compiled(where.type, 151_936):
        say(name, "not compiled here", "-", None)
        return
    rows = losses._chunk_rows(where, 151_936)
    buffer = random(where, rows, 151_936).detach()
    targets = torch.randint(151_936, (rows,), device=where)
    log_probs = torch.empty(rows, device=where)
    seconds = {}
    for way in (softmax.loss_of_chunk_, softmax._eager):
        rest = (buffer, targets, log_probs, None, True)
        way(*rest)
        seconds[way] = best_seconds(lambda way=way, rest=rest: way(*rest))
    if softmax._failed:
        say(name, softmax._failed[0][:160], "compiles", False)
        return
    times = seconds[softmax._eager] / seconds[softmax.loss_of_chunk_]
    say(name, f"{times:.1f} x the speed of plain torch", "> 1.5 x", times > 1.5)


def grouped_experts(where, lengths: tuple) -> None:
    """Experts as grouped products; one of them gets no token."""
    import model as minimind

    experts = minimind.build("tiny-moe", 100).to(where).model.layers[0].mlp.experts
    width = experts[0].gate_proj.weight.shape[1]
    sizes = [40, 0, 300, 172][: len(experts)]
    rows = torch.randn(sum(sizes), width, device=where, dtype=torch.bfloat16)
    weights = [expert.down_proj.weight for expert in experts if sizes[list(experts).index(expert)]]
    with device.autocast(torch.bfloat16):
        found = minimind.grouped(experts, rows, torch.tensor(sizes, device=where))
    found_gradients = torch.autograd.grad(found.float().sum(), weights)
    parts = zip(experts, rows.float().split(sizes), strict=True)
    wanted = torch.cat([expert(part) for expert, part in parts])
    wanted_gradients = torch.autograd.grad(wanted.sum(), weights)
    compare("grouped experts, one empty", [found, *found_gradients], [wanted, *wanted_gradients])


def best_seconds(work) -> float:
    """Of one call, in the best of five rounds of ten."""
    wait = device.module().synchronize
    best = float("inf")
    for _ in range(5):
        wait()
        began = time.perf_counter()
        for _ in range(10):
            work()
        wait()
        best = min(best, (time.perf_counter() - began) / 10)
    return best


def product_speed(where, lengths: tuple) -> None:
    """What the speeds of training are compared with; random numbers draw the power of real ones."""
    size = 8192 if where.type != "cpu" else 256
    a = random(where, size, size).detach()
    best = best_seconds(lambda: a @ a)
    print(json.dumps({"product_flops": 2 * size**3 / best}), flush=True)
    say(f"bf16 product of {size}", f"{2 * size**3 / best / 1e12:.3g} TFLOP/s", "-", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="documents of a few tokens")
    args = parser.parse_args()
    torch.manual_seed(0)
    where = device.device(0)
    lengths = SHORT if args.dry_run else LENGTHS
    checks = [packed_attention, packed_alibi, head_loss, head_speed, grouped_experts]
    checks.append(product_speed)
    each(checks, where, lengths)


if __name__ == "__main__":
    main()
