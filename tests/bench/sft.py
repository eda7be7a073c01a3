"""SFT throughput and memory of this project beside the plain recipe style and TRL: JSON lines, ratios within one run.

    python tests/bench/sft.py                        # all variants, full and LoRA, fp32 and the device's best dtype
    python tests/bench/sft.py --trl FOLDER           # with TRL from `pip install --no-deps --target FOLDER trl==1.16.0`
    python tests/bench/sft.py --only ours plain --modes full --dtypes float32 --rounds 1
    python tests/bench/sft.py --arch bloom --only plain ours       # Bloom: 250,880 tokens, ALiBi
    python tests/bench/sft.py --arch smollm2 --only plain ours trl_packing --modes lora --rounds 1
                                                     # the real SmolLM2-135M-Instruct, 30 steps of real rows

One random model of Qwen2's (or Bloom's) architecture, rows as long as Chinese instruction data (long tail to 1,024
tokens), the same rows for all. Every variant runs in a process of its own, the rounds interleave them, the best round
counts. TRL keeps packed rows apart in all its settings (transformers derives a block mask from their positions). On a
CPU, tokens per CPU second stay comparable when others use the machine; a round takes 15 minutes on two free cores.

The real model trains on sums in words, up to 256 tokens a row; its `held_out` is the loss of 16 other rows after the
last step, row by row and the same for all variants, `held_out_before` that of the model as it was.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measured import forget_peak, memory_mb

BORN = time.time()
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
VARIANTS = ("plain", "ours", "trl", "trl_packing", "trl_padding_free")
WINDOW = 1024
REAL_WINDOW = 256
HELD_OUT = 16  # rows
ROWS_PER_BATCH = 4  # of the padded variants; their mean length makes it about one window


def lengths_like_chinese_data(count: int, rng: random.Random) -> list[tuple[int, int]]:
    """(prompt, answer) tokens per row: log-normal with a long tail, together at most WINDOW."""
    prompts = [min(WINDOW // 2, max(12, round(rng.lognormvariate(3.9, 0.6)))) for _ in range(count)]
    return [(p, min(WINDOW - p, max(8, round(rng.lognormvariate(4.8, 1.0))))) for p in prompts]


def fill(lengths: list[tuple[int, int]]) -> float:
    """Share of real tokens when batches of ROWS_PER_BATCH are padded to their longest row."""
    totals = [sum(pair) for pair in lengths]
    batches = [totals[i : i + ROWS_PER_BATCH] for i in range(0, len(totals), ROWS_PER_BATCH)]
    return sum(totals) / sum(max(batch) * len(batch) for batch in batches)


def make_rows(count: int, vocab: int, seed: int) -> list[dict]:
    """Rows of token ids whose padding is that of a long run; the first one fills the window, as some row soon does."""
    rng = random.Random(seed)
    usual = fill(lengths_like_chinese_data(20_000, rng))
    draws = [[(40, WINDOW - 40), *lengths_like_chinese_data(count - 1, rng)] for _ in range(200)]
    lengths = min(
        draws, key=lambda draw: abs(fill(draw[2 * ROWS_PER_BATCH :]) - usual)
    )  # after the warm-up step
    rows = []
    for prompt, answer in lengths:
        ids = [rng.randrange(10, vocab) for _ in range(prompt + answer)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def sums(rng: random.Random, count: int) -> dict:
    """A chat row of `count` sums in words, answered in figures."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(count)]
    asked = ", ".join(f"{names[a]} plus {names[b]}" for a, b in pairs)
    answer = ", ".join(f"{a} + {b} = {a + b}" for a, b in pairs)
    return {"messages": [
        {"role": "system", "content": "Sums."}, {"role": "user", "content": f"Add {asked}."},
        {"role": "assistant", "content": answer},
    ]}  # fmt: skip


def real_rows(count: int, seed: int) -> list[dict]:
    """Token rows of the real model, 30 to 256 tokens with a long tail."""
    from transformers import AutoTokenizer

    from common.data.labels import encode_chat

    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(real_folder())
    sizes = [min(16, max(1, round(rng.lognormvariate(0.8, 0.8)))) for _ in range(count)]
    rows = [encode_chat(tokenizer, sums(rng, k)["messages"], REAL_WINDOW) for k in sizes]
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]


def real_folder() -> Path:
    sys.path.insert(0, str(ROOT / "tests/support"))
    import smollm2

    return smollm2.folder()


def held_out_loss(model, rows: list[dict]) -> float:
    """Per label token, one row at a time."""
    import torch

    was_training = model.training
    model.eval()
    total = labels = 0
    with torch.no_grad():
        for row in rows:
            batch = {name: torch.tensor([values]) for name, values in row.items()}
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += model(**batch).loss.item() * count
            labels += count
    model.train(was_training)
    return total / labels


SIZES = {
    "smollm2": {"vocab": 49152, "hidden": 576, "intermediate": 1536, "layers": 30},
    "qwen": {"vocab": 151936, "hidden": 512, "intermediate": 1408, "layers": 8},
    "bloom": {"vocab": 250880, "hidden": 192, "intermediate": 768, "layers": 4},
}


def fresh_model(args):
    """Random weights in fp32, or the real ones."""
    from transformers import (
        AutoModelForCausalLM,
        BloomConfig,
        BloomForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    if args.arch == "smollm2":
        return AutoModelForCausalLM.from_pretrained(real_folder(), dtype="float32")
    if args.arch == "bloom":
        return BloomForCausalLM(BloomConfig(
            vocab_size=args.vocab, hidden_size=args.hidden, n_layer=args.layers, n_head=args.hidden // 64
        ))  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, num_key_value_heads=2,
        tie_word_embeddings=True, max_position_embeddings=4096,
    ))  # fmt: skip


def build_model(args):
    """The model; under LoRA `ours` keeps the frozen base in the half dtype, as the recipes do."""
    import torch

    torch.manual_seed(0)
    model = fresh_model(args)
    if args.variant == "ours":
        from common.fast import attention, losses

        if args.arch == "bloom":
            sys.path.insert(0, str(ROOT / "chinese_bloom"))
            import bloom_attention

            bloom_attention.use(model)
        else:
            model.set_attn_implementation(attention.register())
        model.config.use_cache = False
        losses.use_chunked_loss(model)
        if args.mode == "lora" and args.dtype != "float32":
            model.to(getattr(torch, args.dtype))
    return model


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def build_trainer(args, model, rows, meter):
    """The variant's trainer; all share batch tokens, optimizer, learning rate and accumulation."""
    from transformers import Trainer, TrainingArguments

    from common import collators, device
    from common.trainer import RecipeTrainer

    own = {} if args.variant == "ours" else {"use_cpu": device.kind() == "cpu"}
    half = {"bf16": args.dtype == "bfloat16", "fp16": args.dtype == "float16"}
    shared = own | half | {
        "output_dir": args.output, "max_steps": args.steps, "gradient_accumulation_steps": args.accumulation, "learning_rate": 1e-4,
        "per_device_train_batch_size": 1 if args.variant in ("ours", "trl_packing") else ROWS_PER_BATCH, "seed": 0,
        "save_strategy": "no", "report_to": [], "logging_steps": 1, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    if args.variant.startswith("trl"):
        return trl_trainer(args, model, rows, meter, shared)
    if args.mode == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config())
    if args.variant == "plain":
        training = TrainingArguments(**shared)
        return Trainer(model, training, collators.PaddedCollator(0), rows, callbacks=[meter])
    training = TrainingArguments(**device.training_defaults(set(half)) | shared)
    data = collators.PackedDataset(rows, args.window, seed=0)
    collate = collators.collator(True, None, training)
    return RecipeTrainer(model, training, collate, data, callbacks=[meter])


def trl_trainer(args, model, rows, meter, shared):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    training = SFTConfig(
        **shared | {"gradient_checkpointing": False}, packing=args.variant == "trl_packing",
        max_length=None if args.variant == "trl_padding_free" else args.window,  # the rows fit it already
        padding_free=args.variant != "trl",
    )  # fmt: skip
    return SFTTrainer(
        model, training, train_dataset=Dataset.from_list(rows), processing_class=toy_tokenizer(), callbacks=[meter],
        peft_config=lora_config() if args.mode == "lora" else None,
    )  # fmt: skip


def toy_tokenizer():
    """TRL wants a tokenizer, but the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def make_meter():
    """Callback that counts the tokens of the batches and times the steps after the first."""
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        def __init__(self):
            self.counts, self.marks = [0, 0, 0], []

        def watch(self, collator):
            def counting(rows):
                batch = collator(rows)
                mask = batch.get("attention_mask")
                starts = batch.get("cu_seq_lens_q")
                lengths = mask.sum(1) if mask is not None else starts.diff()
                self.counts[0] += int(lengths.sum())
                self.counts[1] += int((batch["labels"][..., 1:] != -100).sum())
                self.counts[2] += int(lengths.square().sum())
                return batch

            return counting

        def on_step_end(self, training, state, control, **kwargs):
            self.marks.append((time.process_time(), time.time(), *self.counts))

    return Meter()


def needed_flops(model, args, tokens, labels, squares):
    """Floating-point operations that the real tokens need: layers, causal attention, head at label positions."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = inner.get_decoder().h if args.arch == "bloom" else inner.model.layers
    weights = sum(
        p.numel() for n, p in layers.named_parameters() if p.dim() == 2 and "lora_" not in n
    )
    adapters = sum(p.numel() for n, p in layers.named_parameters() if "lora_" in n)
    times = 4 if args.mode == "lora" else 6  # forward and input gradient; with the weight gradient
    attention = (
        6 * args.layers * args.hidden * squares
    )  # 2 products forward, 4 backward, half of each
    return (
        (times * weights + 6 * adapters) * tokens
        + attention
        + times * args.vocab * args.hidden * labels
    )


def matmul_peak(dtype) -> float:
    """FLOP per CPU second of torch.mm here and now."""
    import torch

    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        start = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - start)
    return 2 * 2048**3 / best


def child(args):
    """Run one variant in this process and print its figures."""
    import torch

    import common.device
    from common import cli

    cli.say = lambda text: None
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    count = ROWS_PER_BATCH * args.accumulation * args.steps
    is_real = args.arch == "smollm2"
    # some more: packing fills windows better than the mean says
    rows = real_rows(2 * count, args.round) if is_real else make_rows(count, args.vocab, args.round)
    model = build_model(args)
    held_out = real_rows(HELD_OUT, seed=-1) if is_real else []
    more = {"held_out_before": held_out_loss(model, held_out)} if is_real else {}
    meter = make_meter()
    trainer = build_trainer(args, model, rows, meter)
    trainer.data_collator = meter.watch(trainer.data_collator)
    forget_peak()  # forget the peak of loading
    loaded = memory_mb("VmRSS")
    peak_before = matmul_peak(getattr(torch, args.dtype))
    if args.profile:
        return profile(trainer)
    trainer.train()
    (cpu0, wall0, *c0), (cpu1, wall1, *c1) = meter.marks[0], meter.marks[-1]
    tokens, labels, squares = (b - a for a, b in zip(c0, c1, strict=True))
    cpu = cpu1 - cpu0
    peak = max(peak_before, matmul_peak(getattr(torch, args.dtype)))
    flops = needed_flops(model, args, tokens, labels, squares)
    if is_real:
        more["held_out"] = held_out_loss(trainer.model, held_out)
    print(json.dumps({
        "variant": args.variant, "mode": args.mode, "dtype": args.dtype, "device": common.device.kind(),
        "tokens_per_cpu_s": tokens / cpu, "labels_per_cpu_s": labels / cpu, "tokens_per_s": tokens / (wall1 - wall0),
        "labels_per_s": labels / (wall1 - wall0), "memory_mb": memory_mb("VmHWM") - loaded,
        "first_step_s": wall0 - BORN, "matmul_share": flops / cpu / peak, "matmul_gflops": peak / 1e9,
        "loss": trainer.state.log_history[0]["loss"], "tokens": tokens, **more,
    }))  # fmt: skip


def profile(trainer):
    import torch

    trainer.args.max_steps = 1
    trainer.train()
    trainer.args.max_steps = 2
    with torch.profiler.profile() as prof:
        trainer.train()
    print(
        prof.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=35, max_name_column_width=50
        )
    )


def run_child(args, variant, mode, dtype, number, extra=()) -> dict | None:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [args.trl, os.environ.get("PYTHONPATH")]))
    }
    env |= {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    with tempfile.TemporaryDirectory() as output:
        sizes = [f"--{k}={getattr(args, k)}" for k in ("arch", *SIZES["qwen"], "steps")]
        what = [
            "--variant",
            variant,
            "--mode",
            mode,
            "--dtype",
            dtype,
            "--output",
            output,
            f"--round={number}",
        ]
        run = subprocess.run(
            [sys.executable, __file__, *what, *sizes, *extra],
            env=env,
            text=True,
            capture_output=True,
        )
    if extra:
        print(run.stdout)
    if run.returncode:
        print(
            json.dumps(
                {
                    "variant": variant,
                    "mode": mode,
                    "dtype": dtype,
                    "failed": run.stderr.strip()[-400:],
                }
            )
        )
        return None
    return None if extra else json.loads(run.stdout.strip().splitlines()[-1])


def best_of(results: list[dict]) -> dict:
    """The round with the most tokens per CPU second; memory and first step are the smallest seen."""
    best = dict(max(results, key=lambda r: r["tokens_per_cpu_s"]))
    return best | {k: min(r[k] for r in results) for k in ("memory_mb", "first_step_s")}


def report(results: dict) -> None:
    """One line per variant with ratios: to `plain` of the same dtype, to `plain` in fp32, to the best of TRL."""
    done = {key: best_of(found) for key, found in results.items() if found}
    for (_, mode, dtype), line in done.items():
        names = {
            "plain": ["plain"],
            "plain_float32": ["plain"],
            "trl": [v for v in VARIANTS if v.startswith("trl")],
        }
        for name, rivals in names.items():
            against = "float32" if name == "plain_float32" else dtype
            found = [done[v, mode, against] for v in rivals if (v, mode, against) in done]
            if found:
                line[f"times_{name}"] = line["tokens_per_cpu_s"] / max(
                    r["tokens_per_cpu_s"] for r in found
                )
                line[f"memory_of_{name}"] = line["memory_mb"] / min(r["memory_mb"] for r in found)
        print(
            json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}),
            flush=True,
        )


def main():
    from common import device

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--modes", nargs="*", default=("full", "lora"))
    parser.add_argument(
        "--dtypes", nargs="*", default=None, help="default: float32 and the device's best"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, help="default: 4, 30 of the real model; the first one is warm-up"
    )
    parser.add_argument(
        "--trl", default="", help="folder that holds the trl package, if it is not installed"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print torch's profile of each variant instead"
    )
    parser.add_argument("--arch", default="qwen", choices=SIZES)
    for name, value in SIZES["qwen"].items():
        parser.add_argument(
            f"--{name}", type=int, help=f"default: {value}, {SIZES['bloom'][name]} for Bloom"
        )
    for name in ("variant", "mode", "dtype", "output"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    vars(args).update(
        {name: value for name, value in SIZES[args.arch].items() if getattr(args, name) is None}
    )
    is_real = args.arch == "smollm2"
    args.window = REAL_WINDOW if is_real else WINDOW
    args.accumulation = 1 if is_real else 2
    args.steps = args.steps or (30 if is_real else 4)
    if args.variant:
        return child(args)
    best = str(device.half_dtype() or "torch.float32").removeprefix("torch.")
    dtypes = args.dtypes or list(dict.fromkeys(["float32", best]))
    variants = list(args.only)
    sys.path += [args.trl] if args.trl else []
    if importlib.util.find_spec("trl") is None and any(v.startswith("trl") for v in variants):
        how = "pip install --no-deps --target FOLDER trl==1.16.0, then --trl FOLDER"
        print(json.dumps({"skipped": "trl", "reason": f"not installed: {how}"}))
        variants = [v for v in variants if not v.startswith("trl")]
    results: dict = {(v, m, d): [] for m in args.modes for d in dtypes for v in variants}
    for number in range(args.rounds):
        for key, lines in results.items():
            line = run_child(args, *key, number, ["--profile"] if args.profile else [])
            lines += [line] if line else []
            print(json.dumps({"round": number} | (line or {})), file=sys.stderr, flush=True)
    report(results)


if __name__ == "__main__":
    main()
