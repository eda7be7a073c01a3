"""ChatGLM: LoRA step beside the upstream way, and batched generation beside one by one: JSON lines, ratios in one run.

    python tests/bench/chatglm.py                                  # all, fp32 and the device's best dtype, 2 rounds
    python tests/bench/chatglm.py --only step --dtypes float32 --rounds 1
    python tests/bench/chatglm.py --hidden 512 --layers 8          # less of it is vocabulary, more of it layers
    python tests/bench/chatglm.py --profile --only step            # torch's profile of each side instead

One random ChatGLM, 130,528 tokens, LoRA on query_key_value, rows as long as Chinese instruction data (see sft.py).
`upstream` is what the published scripts do, written again: rows padded to the longest of their batch, one dense mask
and positions for each row from the collator, scores and masked_fill, fp32 logits of every position, a plain Trainer.
`ours` is train.py's: packed windows, no masks, loss in chunks. The `same` line tells that both compute the same: loss
and gradients of one batch. Every side runs in a process of its own; the best round counts. On a CPU, tokens per CPU
second stay comparable when others use the machine; a round takes 5 minutes on a free core.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

BORN = time.time()
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "chatglm_lora"), str(Path(__file__).parent)]
import sft
from sft import ROWS_PER_BATCH, WINDOW

SIDES = ("upstream", "ours")
PROMPTS = 8  # answered at once, or one after another


def make_rows(count: int, config, seed: int) -> list[dict]:
    """sft.make_rows with [gMASK] <sop> at the end of each prompt and <eop> at the end of each answer."""
    rows = sft.make_rows(count, config.mask_token_id - 100, seed)
    for row in rows:
        start = row["labels"].count(-100)
        row["input_ids"][start - 2 : start] = [config.gmask_token_id, config.bos_token_id]
        row["input_ids"][-1] = row["labels"][-1] = config.eos_token_id
    return rows


def random_model(args, upstream: bool):
    """The recipe's class with random weights; `upstream` computes with the same weights in the upstream way."""
    import torch
    from modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, num_layers=args.layers, inner_hidden_size=4 * args.hidden,
        num_attention_heads=args.hidden // args.head,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).to(
        getattr(torch, args.dtype)
    )  # a frozen base is half, as upstream
    if upstream:
        model.__class__ = upstream_class()
    return model


# ---- the upstream way -----------------------------------------------------------------------------------------------


class UpstreamCollator:
    """Rows -> input_ids, labels [B, T], position_ids [B, 2, T] and a dense mask [B, 1, T, T], True where hidden."""

    def __init__(self, config):
        self.config = config

    def __call__(self, rows: list[dict]) -> dict:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        batch = {name: [] for name in ("input_ids", "labels", "position_ids", "attention_mask")}
        for row in rows:
            ids, missing = row["input_ids"], width - len(row["input_ids"])
            batch["input_ids"].append(torch.tensor(ids + [self.config.pad_token_id] * missing))
            batch["labels"].append(torch.tensor(row["labels"] + [-100] * missing))
            for name, tensor in zip(
                ("attention_mask", "position_ids"), self.layout(ids, width), strict=True
            ):
                batch[name].append(tensor)
        return {name: torch.stack(tensors) for name, tensors in batch.items()}

    def layout(self, ids: list[int], width: int):
        import torch

        start, mask = ids.index(self.config.bos_token_id), ids.index(self.config.gmask_token_id)
        seen = torch.ones(1, width, width).tril_()
        seen[..., :start] = 1
        place = torch.arange(width)
        place[start:] = mask
        block = torch.cat(
            [torch.zeros(start, dtype=torch.long), torch.arange(1, width - start + 1)]
        )
        return (seen < 0.5), torch.stack([place, block])


def upstream_class():
    import torch
    from modeling_chatglm import ChatGLMForConditionalGeneration, inverse_frequencies
    from torch.nn import functional as F

    def rotate(x, cos, sin, places):
        """x [T, B, H, d / 2], tables [longest, d / 2], places [T, B]."""
        cos, sin = (F.embedding(places, table).unsqueeze(2) for table in (cos, sin))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def tables(longest, size, like):
        angle = torch.arange(longest, device=like.device)[:, None] * inverse_frequencies(
            size, like.device
        )
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)

    def attend(layer, hidden, mask, places, table):
        """hidden [T, B, D], time first."""
        fused = layer.query_key_value(hidden)
        query, key, value = fused.unflatten(-1, (-1, 3 * layer.head_dim)).chunk(3, -1)
        rows = [place.transpose(0, 1) for place in places.unbind(1)]
        query, key = (
            torch.cat(
                [rotate(half, *table, row) for half, row in zip(x.chunk(2, -1), rows, strict=True)],
                -1,
            )
            for x in (query, key)
        )
        time, batch, heads, size = query.shape
        scale = float(layer.layer_idx + 1)
        query, key, value = (
            (x.reshape(time, batch * heads, size)).transpose(0, 1) for x in (query, key, value)
        )
        empty = torch.empty(batch * heads, time, time, dtype=query.dtype, device=query.device)
        scores = torch.baddbmm(
            empty, query / (math.sqrt(size) * scale), key.transpose(1, 2), beta=0.0
        )
        scores = scores.view(batch, heads, time, time).masked_fill_(mask, -10000.0).float() * scale
        weights = torch.softmax(scores, -1).to(value.dtype).view(batch * heads, time, time)
        out = torch.bmm(weights, value).view(batch, heads, time, size).permute(2, 0, 1, 3)
        return layer.dense(out.reshape(time, batch, heads * size))

    class Upstream(ChatGLMForConditionalGeneration):
        def forward(
            self, input_ids, attention_mask, position_ids, labels, num_items_in_batch=None, **kwargs
        ):
            body = self.transformer
            hidden = body.word_embeddings(input_ids).transpose(0, 1)
            size = body.layers[0].attention.head_dim // 2
            table = tables(int(position_ids.max()) + 1, size, hidden)
            for layer in body.layers:
                normed = layer.input_layernorm(hidden)
                inner = attend(layer.attention, normed, attention_mask, position_ids, table)
                hidden = normed * layer.alpha + inner
                normed = layer.post_attention_layernorm(hidden)
                hidden = normed * layer.alpha + layer.mlp(normed)
            logits = (
                self.lm_head(body.final_layernorm(hidden)).permute(1, 0, 2).contiguous().float()
            )
            shifted, targets = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
            loss = F.cross_entropy(
                shifted.view(-1, shifted.shape[-1]), targets.view(-1),
                reduction="mean" if num_items_in_batch is None else "sum",
            )  # fmt: skip
            return {
                "loss": loss if num_items_in_batch is None else loss / num_items_in_batch,
                "logits": logits,
            }

    return Upstream


# ---- the LoRA step --------------------------------------------------------------------------------------------------


def prepared(args, side: str):
    """Model with its adapter, collator: of the recipe, or of the upstream way."""
    import torch
    import train
    from transformers import TrainingArguments

    from common import collators, device
    from common.fast import losses

    model = random_model(args, side == "upstream")
    config = model.config
    config.use_cache = False
    if side == "ours":
        losses.use_chunked_loss(model)
        multiple = device.length_multiple(getattr(torch, args.dtype))
        beginning = [config.gmask_token_id, config.bos_token_id]
        packed = collators.PackedCollator(multiple, beginning)
        collate = partial(train.with_layout, collate=packed, config=config)
    else:
        collate = UpstreamCollator(config)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(output_dir=folder)
    model = train.add_lora(
        model, train.Args(lora_dropout=args.dropout), training
    )  # the recipe's r, alpha and targets
    return model, collate


def step_child(args) -> dict | None:
    """Some optimizer steps of one side; the first is warm-up."""
    import torch
    from transformers import Trainer, TrainingArguments

    from common import collators, device
    from common.trainer import RecipeTrainer

    ours = args.side == "ours"
    model, collate = prepared(args, args.side)
    rows = make_rows(ROWS_PER_BATCH * 2 * args.steps, model.config, seed=args.round)
    meter = make_meter(collate)
    half = {"bf16": args.dtype == "bfloat16", "fp16": args.dtype == "float16"}
    own = device.training_defaults(set(half)) if ours else {"use_cpu": device.kind() == "cpu"}
    training = TrainingArguments(**own | half | {
        "output_dir": args.output, "max_steps": args.steps, "gradient_accumulation_steps": 2, "learning_rate": 1e-4,
        "per_device_train_batch_size": 1 if ours else ROWS_PER_BATCH, "seed": 0, "save_strategy": "no",
        "report_to": [], "logging_steps": 1, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    })  # fmt: skip
    data = collators.PackedDataset(rows, WINDOW, seed=0) if ours else rows
    kind = RecipeTrainer if ours else Trainer
    trainer = kind(model, training, meter.collate, data, callbacks=[meter])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    loaded = sft.memory_mb("VmRSS")
    if args.profile:
        return sft.profile(trainer)
    trainer.train()
    (cpu0, wall0, *c0), (cpu1, wall1, *c1) = meter.marks[0], meter.marks[-1]
    tokens, labels, columns = (b - a for a, b in zip(c0, c1, strict=True))
    return {
        "tokens_per_cpu_s": tokens / (cpu1 - cpu0), "tokens_per_s": tokens / (wall1 - wall0), "tokens": tokens,
        "labels": labels, "fill": tokens / columns, "memory_mb": sft.memory_mb("VmHWM") - loaded,
        "first_step_s": wall0 - BORN, "loss": trainer.state.log_history[0]["loss"],
        "matmul_gflops": sft.matmul_peak(getattr(torch, args.dtype)) / 1e9,
    }  # fmt: skip


def make_meter(collate):
    """Callback around a collator: (real tokens, labels, columns) of the batches, and the time, after each step."""
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        def __init__(self):
            self.counts, self.marks = [0, 0, 0], []

        def collate(self, rows):
            batch = collate(rows)
            flat = [row for one in rows for row in (one if isinstance(one, list) else [one])]
            now = (sum(len(row["input_ids"]) for row in flat), int((batch["labels"][:, 1:] != -100).sum()),
                   batch["input_ids"].numel())  # fmt: skip
            self.counts = [a + b for a, b in zip(self.counts, now, strict=True)]
            return batch

        def on_step_end(self, training, state, control, **kwargs):
            self.marks.append((time.process_time(), time.time(), *self.counts))

    return Meter()


def same_child(args) -> dict:
    """Loss and adapter gradients of one batch, without dropout: how far the two sides are apart."""
    import torch

    args.dropout, found = 0.0, {}
    for side in SIDES:
        model, collate = prepared(args, side)
        for name, weight in model.named_parameters():  # B starts at 0: A would have no gradient
            if "lora_B" in name:
                torch.nn.init.normal_(
                    weight, std=0.02, generator=torch.Generator().manual_seed(len(name))
                )
        rows = make_rows(3 * ROWS_PER_BATCH, model.config, seed=args.round)[
            ROWS_PER_BATCH : 2 * ROWS_PER_BATCH
        ]
        rows = [row | {"row_id": i} for i, row in enumerate(rows)]
        batch = collate([rows] if side == "ours" else rows)
        batch.pop("row_ids", None)
        kind = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16")
        with kind:
            loss = model.train()(**batch)["loss"]
        loss.backward()
        found[side] = (
            loss.item(),
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        )
    (loss, grad), (other, others) = found["upstream"], found["ours"]
    return {"loss_upstream": loss, "loss_ours": other,
            "gradient_apart": ((grad - others).norm() / grad.norm()).item()}  # fmt: skip


# ---- generation -----------------------------------------------------------------------------------------------------


def generate_child(args) -> dict | None:
    """Greedy answers of --new tokens: PROMPTS at once (padded on the left), one by one, one by one without a cache."""
    import torch

    from common import device

    model = random_model(args, upstream=False).eval().to(device.device())
    config, rng = model.config, random.Random(args.round)
    prompts = []
    for length, _ in sft.lengths_like_chinese_data(PROMPTS, rng):
        ids = [rng.randrange(10, config.mask_token_id - 100) for _ in range(length - 2)]
        prompts.append([*ids, config.gmask_token_id, config.bos_token_id])

    def run(chosen: list, cache: bool = True) -> tuple[list, float, float]:
        """-> answers, new tokens per CPU second and per second."""
        width = max(map(len, chosen))
        ids = torch.tensor([[config.pad_token_id] * (width - len(p)) + p for p in chosen])
        kept = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chosen])
        ids, kept = ids.to(model.device), kept.to(model.device)
        cpu, wall = time.process_time(), time.time()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=kept, max_new_tokens=args.new, do_sample=False, use_cache=cache,
                eos_token_id=None, pad_token_id=config.pad_token_id,
            )[:, width:].tolist()  # fmt: skip
        return out, time.process_time() - cpu, time.time() - wall

    def one_by_one(cache: bool = True, count: int = PROMPTS) -> tuple[list, float, float]:
        outs, cpus, walls = zip(*(run([p], cache) for p in prompts[:count]), strict=True)
        return [out[0] for out in outs], sum(cpus), sum(walls)

    run(prompts[:2])  # warm-up
    if args.profile:
        with torch.profiler.profile() as prof:
            run(prompts)
        return print(prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=35))
    found = {"batch": [], "single": []}
    for _ in range(2):
        found["batch"].append(run(prompts))
        found["single"].append(one_by_one())
    found["no_cache"] = [one_by_one(False, 1)]
    best = {name: min(runs, key=lambda one: one[1]) for name, runs in found.items()}
    agree = [a == b for a, b in zip(found["batch"][0][0], found["single"][0][0], strict=True)]
    rates = {f"{name}_per_cpu_s": len(out) * args.new / cpu for name, (out, cpu, _) in best.items()}
    walls = {f"{name}_per_s": len(out) * args.new / wall for name, (out, _, wall) in best.items()}
    return rates | walls | {"same_answers": sum(agree) / len(agree), "new_tokens": args.new,
                            "prompt_tokens": sum(map(len, prompts))}  # fmt: skip


# ---- running all of it ----------------------------------------------------------------------------------------------


def child(args) -> None:
    import torch

    import common.device
    from common import cli

    cli.say = lambda text: None
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    what = {"step": step_child, "same": same_child, "generate": generate_child}[args.what]
    found = what(args)
    if found:
        print(json.dumps({"bench": args.what, "side": args.side, "dtype": args.dtype,
                          "device": common.device.kind()} | found))  # fmt: skip


SIZES = {"vocab": 130528, "hidden": 256, "layers": 12, "head": 64, "steps": 5, "new": 96}
GENERATE = {"hidden": 1024, "head": 128}  # wider: or nearly all of a step is the vocabulary


def run_child(args, what: str, side: str, dtype: str, number: int) -> dict | None:
    env = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"} | os.environ
    with tempfile.TemporaryDirectory() as output:
        sizes = SIZES | (GENERATE if what == "generate" else {})
        sizes |= {name: value for name in SIZES if (value := getattr(args, name)) is not None}
        flags = [f"--{name}={value}" for name, value in sizes.items()] + [
            f"--dropout={args.dropout}"
        ]
        flags += [
            "--what",
            what,
            "--side",
            side,
            "--dtype",
            dtype,
            "--output",
            output,
            f"--round={number}",
        ]
        flags += ["--profile"] if args.profile else []
        run = subprocess.run(
            [sys.executable, __file__, *flags], env=env, text=True, capture_output=True
        )
    if run.returncode:
        print(
            json.dumps(
                {"bench": what, "side": side, "dtype": dtype, "failed": run.stderr.strip()[-600:]}
            )
        )
    elif args.profile:
        print(what, side, dtype, run.stdout, sep="\n")
    return (
        None if run.returncode or args.profile else json.loads(run.stdout.strip().splitlines()[-1])
    )


def report(results: dict) -> None:
    """One line per side and dtype, best round; ours with its ratio to upstream of the same dtype."""
    done = {key: sft.best_of(found) for key, found in results.items() if found and key[0] == "step"}
    for (what, side, dtype), line in done.items():
        rival = done.get((what, "upstream", dtype))
        if rival and side == "ours":
            line["times_upstream"] = line["tokens_per_cpu_s"] / rival["tokens_per_cpu_s"]
            line["memory_of_upstream"] = line["memory_mb"] / rival["memory_mb"]
        say(line)
    for (what, *_), found in results.items():
        if what == "same" and found:
            say(found[0])
        if what == "generate" and found:
            line = max(found, key=lambda one: one["batch_per_cpu_s"] / one["single_per_cpu_s"])
            for name in ("single", "no_cache"):
                line[f"times_{name}"] = line["batch_per_cpu_s"] / line[f"{name}_per_cpu_s"]
            say(line)


def say(line: dict) -> None:
    print(
        json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}),
        flush=True,
    )


def main():
    from common import device

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=("same", "step", "generate"), help="same, step, generate"
    )
    parser.add_argument(
        "--dtypes", nargs="*", default=None, help="default: float32 and the device's best"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--profile", action="store_true", help="print torch's profile of each child instead"
    )
    parser.add_argument("--dropout", type=float, default=0.1, help="of the adapter")
    for name, value in SIZES.items():
        parser.add_argument(
            f"--{name}", type=int, help=f"default: {value}, to generate {GENERATE.get(name, value)}"
        )
    for name in ("what", "side", "dtype", "output"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what:
        return child(args)
    best = str(device.half_dtype() or "torch.float32").removeprefix("torch.")
    dtypes = args.dtypes or list(dict.fromkeys(["float32", best]))
    cases = [
        (what, side, d)
        for what in args.only
        for d in dtypes
        for side in (SIDES if what == "step" else ("ours",))
    ]
    results: dict = {case: [] for case in cases}
    for number in range(args.rounds):
        for case, lines in results.items():
            if case[0] == "same" and number:
                continue
            line = run_child(args, *case, number)
            lines += [line] if line else []
            print(json.dumps({"round": number} | (line or {})), file=sys.stderr, flush=True)
    report(results)


if __name__ == "__main__":
    main()
