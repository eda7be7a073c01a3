"""Identity fine-tuning beside the old way of doing it: JSON lines, the last one the ratios of one run.

    python tests/bench/internlm.py                   # both ways, best of two rounds
    python tests/bench/internlm.py --rounds 1 --dtype float32

A random Llama of 30 million parameters with InternLM2's vocabulary of 92,544, rows as short as questions about a model
and answers to general instructions (long tail to 512 tokens), LoRA, the same rows for both.

old: an English alpaca preamble around every row, rows padded to the longest of three, logits of all positions, peft's
    default adapter (rank 8 on q_proj and v_proj), the base in float32 under autocast.
ours: packed windows, the head at label positions only, rank 16 on all linear layers, the frozen base in the half dtype.

tokens_per_cpu_second counts tokens of the rows themselves, neither padding nor preamble; memory is the peak above the
loaded model. Every way runs in a process of its own.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from measured import forget_peak, memory_mb, say

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
WAYS = ("old", "ours")
VOCABULARY = 92_544
LONGEST = 512
PREAMBLE = 34  # tokens of "Below is an instruction ..." and its headings
ROWS_PER_BATCH = 3
WARM_UP = 2  # steps that are not counted


def make_rows(count: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        prompt = min(LONGEST // 2, max(6, round(rng.lognormvariate(3.2, 0.7))))
        answer = min(LONGEST - prompt, max(8, round(rng.lognormvariate(4.0, 1.0))))
        rows.append(
            tuple([rng.randrange(10, VOCABULARY) for _ in range(n)] for n in (prompt, answer))
        )
    return rows


def fresh_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 144, "intermediate_size": 432, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))


def old_way(args, rows):
    """-> (model, batches, context of a step)."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(fresh_model(), LoraConfig(task_type="CAUSAL_LM"))
    batches = []
    for start in range(0, len(rows) - ROWS_PER_BATCH + 1, ROWS_PER_BATCH):
        part = [
            ([7] * PREAMBLE + prompt, answer)
            for prompt, answer in rows[start : start + ROWS_PER_BATCH]
        ]
        width = max(len(prompt) + len(answer) for prompt, answer in part)
        ids = torch.zeros(len(part), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, (prompt, answer) in enumerate(part):
            size = len(prompt) + len(answer)
            ids[i, :size] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : size] = ids[i, len(prompt) : size]
            mask[i, :size] = 1
        real = sum(len(prompt) - PREAMBLE + len(answer) for prompt, answer in part)
        batches.append((real, {"input_ids": ids, "labels": labels, "attention_mask": mask}))
    half = args.dtype != "float32"
    return (
        model,
        batches,
        lambda: torch.autocast("cpu", getattr(torch, args.dtype)) if half else nullcontext(),
    )


def our_way(args, rows):
    import torch
    from peft import LoraConfig, get_peft_model

    from common import collators, device
    from common.data.counts import Counted, for_model
    from common.fast import attention, losses

    model = fresh_model().to(getattr(torch, args.dtype))
    model.set_attn_implementation(attention.register())
    losses.use_chunked_loss(model)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter)
    token_rows = [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, answer in rows
    ]
    windows = collators.PackedDataset(token_rows, LONGEST)
    multiple = device.length_multiple(getattr(torch, args.dtype))
    collate = Counted(collators.PackedCollator(multiple))
    batches = []
    for i in range(len(windows)):
        batch = collate([windows[i]])
        batches.append((batch["tokens"], for_model(batch)))
    half = args.dtype != "float32"
    return (
        model,
        batches,
        lambda: torch.autocast("cpu", getattr(torch, args.dtype)) if half else nullcontext(),
    )


def measure(args) -> None:
    import torch

    torch.set_num_threads(1)
    from common import device  # noqa: F401  (before transformers)

    make = our_way if args.way == "ours" else old_way
    model, batches, context = make(args, make_rows(args.rows))
    model.train()
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    before = forget_peak()
    tokens = 0
    began = time.process_time()
    for step, (real, batch) in enumerate(batches):
        if step == WARM_UP:
            began, tokens = time.process_time(), 0
        with context():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += real
    seconds = time.process_time() - began
    say(
        way=args.way,
        dtype=args.dtype,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=len(batches),
        tokens_per_cpu_second=tokens / seconds,
        peak_above_model_mb=memory_mb("VmHWM") - before,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--way", choices=WAYS, help="of the child process")
    parser.add_argument("--rows", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    if args.way:
        measure(args)
        return
    best = {}
    for _ in range(args.rounds):
        for way in WAYS:
            command = [
                sys.executable,
                __file__,
                "--way",
                way,
                "--rows",
                str(args.rows),
                "--dtype",
                args.dtype,
            ]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            facts = json.loads(done.stdout.splitlines()[-1])
            say(**facts)
            if (
                way not in best
                or facts["tokens_per_cpu_second"] > best[way]["tokens_per_cpu_second"]
            ):
                best[way] = facts
    ours, old = best["ours"], best["old"]
    say(
        speed=ours["tokens_per_cpu_second"] / old["tokens_per_cpu_second"],
        memory=ours["peak_above_model_mb"] / old["peak_above_model_mb"],
    )


if __name__ == "__main__":
    main()
