"""minimind_npu: tokens per CPU second of the batched engine, and of transformers' generate() one prompt at a time.

    OMP_NUM_THREADS=1 python tests/bench/minimind_generation.py                      # 26M, fp32 and the best half dtype
    python tests/bench/minimind_generation.py --size 145m-moe --slots 8 16 --rounds 3
    python tests/bench/minimind_generation.py --sampled                              # temperature, top_k, top_p

Random weights without an end token, so that every side makes as many tokens; the same prompts for all. One JSON line
for each side and, at the end, ratios. Rounds take turns in one process, the best round of a side counts.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "minimind_npu")]
from common import device  # noqa: I001  (device before torch and transformers)

import torch
from engine.generation import Engine
from model import SIZES, build

SAMPLED = {"temperature": 0.85, "top_k": 50, "top_p": 0.85}


def plain(model, prompts: list[list[int]], new: int, sampling: dict) -> None:
    how = {"do_sample": bool(sampling), **(sampling or dict.fromkeys(SAMPLED))}
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0, eos_token_id=None,
            **how,
        )  # fmt: skip


def wait() -> None:
    if device.kind() != "cpu":
        device.module().synchronize()


def timed(action) -> tuple[float, float]:
    """-> (CPU seconds, wall seconds)."""
    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    wait()
    return time.process_time() - cpu, time.perf_counter() - wall


def sides(args, models: dict) -> dict:
    """name -> (function, tokens it makes)."""
    numbers = random.Random(0)
    vocab = next(iter(models.values())).config.vocab_size
    prompts = [
        [
            numbers.randrange(40, vocab)
            for _ in range(numbers.randint(args.prompt // 2, args.prompt))
        ]
        for _ in range(args.prompts)
    ]
    sampling = SAMPLED if args.sampled else {}
    found = {}
    few = prompts[: args.alone]
    for dtype, model in models.items():
        found[f"generate 1 {dtype}"] = (
            lambda m=model: plain(m, few, args.new, sampling),
            len(few) * args.new,
        )
        engines = {slots: Engine(model, slots) for slots in [1, *args.slots]}
        for slots, engine in engines.items():
            asked = few if slots == 1 else prompts
            run = lambda e=engine, p=asked: e.generate(p, args.new, ends=frozenset(), **sampling)
            found[f"engine {slots} {dtype}"] = (run, len(asked) * args.new)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="26m")
    parser.add_argument("--slots", type=int, nargs="+", default=[8])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument(
        "--alone", type=int, default=2, help="prompts of the sides that answer one at a time"
    )
    parser.add_argument("--prompt", type=int, default=64, help="longest prompt, tokens")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sampled", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build(args.size).to(device.device()).eval()
    models, half = {"float32": model}, device.half_dtype()
    if half:
        models[str(half).removeprefix("torch.")] = build(args.size).to(device.device(), half).eval()
    best: dict[str, list[float]] = {}
    todo = sides(args, models)
    for _ in range(args.rounds):
        for name, (action, tokens) in todo.items():
            rates = [tokens / seconds for seconds in timed(action)]
            best[name] = [max(pair) for pair in zip(best.get(name, rates), rates, strict=True)]
    for name, (cpu, wall) in best.items():
        print(
            json.dumps(
                {
                    "side": name,
                    "tokens_per_cpu_second": round(cpu, 1),
                    "tokens_per_second": round(wall, 1),
                }
            )
        )
    ratios(best, args)


def ratios(best: dict, args) -> None:
    which = 0 if device.kind() == "cpu" else 1  # others may use this machine's cores too
    rate = {name: found[which] for name, found in best.items()}
    out = {
        "size": args.size,
        "device": device.name(),
        "threads": torch.get_num_threads(),
        "sampled": args.sampled,
    }
    base = rate["generate 1 float32"]
    for name in rate:
        kind, slots, dtype = name.split()
        if kind == "engine":
            out[f"{name} / generate 1 float32"] = round(rate[name] / base, 2)
            if slots != "1":
                out[f"{name} / engine 1 {dtype}"] = round(rate[name] / rate[f"engine 1 {dtype}"], 2)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
