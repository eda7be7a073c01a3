"""minimind_npu beside a plain re-statement of MiniMind's training loop: JSON lines, ratios within one run.

    python tests/bench/minimind.py                                    # all stages and the data, 2 rounds
    python tests/bench/minimind.py --only pretrain data --layers 2 --rounds 1 --windows 8     # a quick look
    python tests/bench/minimind.py --only moe --size 64m              # 768 wide, generation 3, with experts
    python tests/bench/minimind.py --profile --only pretrain --sides ours      # torch's profile instead

Sides: `restated` is minimind_restated.py as the original runs on a CPU: rows padded to the length of their stage, all
logits, fp32. `restated_autocast` is the same loop under bf16 autocast, which the original does on accelerators only.
`ours` is train.py: its reader, its packed batches, its step. Both train the same rows from the same weights; rows are
as full as the published ones (pretrain 192 of 340 tokens, SFT 281 of 768, DPO 322 of 1,024 a side), random words of
Chinese characters, from which a tokenizer of 6,400 tokens is trained first.

tokens_per_cpu_s counts tokens that are not padding; ours in DPO includes the pass over the reference, which restated
does in every step. times_restated and memory_of_restated are against fp32 as it ships, times_autocast against bf16
autocast; memory is what a side needs above its loaded weights (gradients and optimizer included). `data` gives rows a
second of each epoch, and of a first epoch, which for ours includes turning all rows into tokens. Losses of the two
sides before their first update, and the numbers of tokens and labels, must agree: exit code 1 where they do not.

Every side runs in a process of its own with one thread; the rounds interleave them, the best round counts. CPU seconds
stay comparable when others use the machine. A round of all stages takes about 15 minutes on a free core.
"""

import argparse
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

from measured import memory_mb

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "minimind_npu"
sys.path[:0] = [
    str(ROOT),
    str(RECIPE),
    str(Path(__file__).parent),
]  # `sft` and `dpo` are the recipe's

STAGES = ("pretrain", "sft", "dpo", "moe")
SIDES = ("restated", "restated_autocast", "ours")
MEANS = {"pretrain": 192, "sft": 281, "dpo": 322}  # tokens of a row (of a side)
WIDTHS = {"pretrain": 340, "sft": 768, "dpo": 1024}  # what the original pads to
SAME = {"float32": 1e-4, "bfloat16": 0.02}  # losses of two sides may be so far apart
DATA_ROWS = {"pretrain": 2000, "sft": 1000, "dpo": 400}
NOISE = 2e-3  # added to the weights that DPO trains, so that they are not those of the reference


def kind_of(stage: str) -> str:
    """The stage whose rows and loss it has."""
    return "pretrain" if stage == "moe" else stage


# ---- rows -----------------------------------------------------------------------------------------------------------


def draw(kind: str, rng: random.Random) -> tuple[int, ...]:
    """Lengths of the texts of a row: (text,), (prompt, answer) or (prompt, chosen, rejected)."""
    log = lambda mean, sigma: rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
    bound = lambda value, most: max(8, min(most, round(value)))
    if kind == "pretrain":
        return (bound(log(196, 0.5), WIDTHS[kind] - 2),)
    if kind == "sft":
        return bound(log(95, 0.8), 250), bound(log(180, 0.8), WIDTHS[kind] - 300)
    prompt, answer = bound(log(120, 0.8), 300), bound(log(196, 0.7), 600)
    return prompt, answer, bound(answer * log(1, 0.4), 600)


def as_row(kind: str, texts: list[str]) -> dict:
    if kind == "pretrain":
        return {"text": texts[0]}
    turns = lambda answer: [
        {"role": "user", "content": texts[0]},
        {"role": "assistant", "content": answer},
    ]
    if kind == "sft":
        return {"conversations": turns(texts[1])}
    return {"chosen": turns(texts[1]), "rejected": turns(texts[2])}


def lexicon(rng: random.Random) -> list[str]:
    """Words of one to three of 2,500 characters, some of which are much more frequent than others."""
    draw = lambda: chr(0x4E00 + int(2500 * rng.random() ** 2))
    return ["".join(draw() for _ in range(rng.choice((1, 1, 2, 2, 2, 3)))) for _ in range(12_000)]


def train_tokenizer(folder: str) -> str:
    """The recipe's tokenizer, from sentences of the lexicon."""
    import train_tokenizer as recipe

    rng = random.Random(0)
    words = lexicon(rng)
    texts = (
        "".join(words[int(len(words) * rng.random() ** 3)] for _ in range(60)) for _ in range(4000)
    )
    recipe.save(recipe.train(texts, 6400), Path(folder))
    return folder


class Writer:
    """Texts of a wanted number of tokens."""

    def __init__(self, tokenizer, rng: random.Random):
        self.tokenizer, self.rng, self.words = tokenizer, rng, lexicon(random.Random(0))

    def more(self, count: int) -> list[str]:
        return [self.words[int(len(self.words) * self.rng.random() ** 3)] for _ in range(count)]

    def __call__(self, tokens: int, tries: int = 20) -> str:
        words, text = self.more(tokens), ""
        for _ in range(tries):
            text = "".join(words)
            missing = tokens - len(self.tokenizer(text, add_special_tokens=False).input_ids)
            if not missing:
                break
            words = (
                words[: missing // 2] if missing < 0 else words + self.more(max(1, missing // 2))
            )
        return text


def overhead(kind: str, lengths: tuple, extra: int) -> list[int]:
    """Tokens of each document of a row; extra: what the template adds to one."""
    if kind == "dpo":
        return [lengths[0] + answer + extra for answer in lengths[1:]]
    return [sum(lengths) + (2 if kind == "pretrain" else extra)]


def fitting(
    kind: str, windows: int, width: int, extra: int, full: float, rng: random.Random
) -> list[tuple]:
    """(distance of the mean from the published one, lengths of rows) of draws that need just so many windows."""
    from common import collators

    found = []
    for _ in range(300):
        rows, used = [], 0
        while used < full * windows * width:
            rows.append(draw(kind, rng))
            used += sum(overhead(kind, rows[-1], extra))
        sizes = [overhead(kind, row, extra) for row in rows]
        if len(collators.pack_bins([sum(one) for one in sizes], width)) == windows:
            documents = list(itertools.chain(*sizes))
            found.append((abs(sum(documents) / len(documents) - MEANS[kind]), rows))
    return found


def make_rows(kind: str, windows: int, width: int, tokenizer, seed: int) -> list[dict]:
    """Rows that fill `windows` windows of ours, their mean length that of the published data."""
    from common.data.labels import encode_chat

    rng = random.Random(seed)
    probe = as_row("sft", ["问", "答"])["conversations"]
    extra = len(encode_chat(tokenizer, probe, 99)["input_ids"]) - 2
    found, full = [], 0.985
    while not found:
        found, full = fitting(kind, windows, width, extra, full, rng), full - 0.03
    write = Writer(tokenizer, rng)
    return [
        as_row(kind, [write(length) for length in row])
        for row in min(found, key=lambda one: one[0])[1]
    ]


def write_file(rows: list[dict], folder: str) -> str:
    path = Path(folder, "rows.jsonl")
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


# ---- what both sides begin with -------------------------------------------------------------------------------------


def settings_of(args):
    """train.py's own flags for this stage, as its command line gives them."""
    import defaults
    import settings
    from transformers import TrainingArguments

    from common import cli

    stage = kind_of(args.stage.removeprefix("data_"))
    words = ["--stage", stage, "--size", args.size, "--data_path", "-", "--output_dir", args.output, "--eval_ratio",
             "0", "--report_to", "none", "--bf16", str(args.dtype == "bfloat16").lower()]  # fmt: skip
    words += ["--num_hidden_layers", str(args.layers)] if args.layers else []
    words += ["--use_moe", "true"] if args.stage == "moe" else []
    sys.argv = ["train.py", *words]
    ours, training = cli.parse_args((settings.Args, TrainingArguments), defaults.DEFAULTS, {})
    settings.resolve(ours, training, args.size)
    if args.windows:
        training.gradient_accumulation_steps = max(
            1, args.windows // training.per_device_train_batch_size
        )
    return ours, training


def start_weights(model, moved: bool):
    """Weights that follow from their names, alike on both sides; `moved`: those that DPO goes on with, not its
    reference's."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if p.ndim > 1:
                p.normal_(0, 0.02, generator=generator)
            if p.ndim > 1 and moved:
                p += NOISE * torch.randn(p.shape, generator=generator)
    return model


def matmul_peak(dtype) -> float:
    """FLOP per CPU second of torch.mm here and now."""
    import torch

    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(8):
        start = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def forget_peak() -> float:
    """MiB in use now; the peak is measured from here."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def profiled(step) -> None:
    import torch

    with torch.profiler.profile() as prof:
        step()
    print(
        prof.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50
        )
    )


# ---- ours -----------------------------------------------------------------------------------------------------------


def token_rows(ours, training, tokenizer, rows: list[dict]):
    """The recipe's way from a file to memory-mapped token rows and batches."""
    import train

    from common.data.load import load_rows

    path = write_file(rows, training.output_dir)
    found, stats = load_rows(path, train.STAGES[ours.stage].KIND)
    data = train.read(ours, training, tokenizer, found, stats)
    return train.make_loader(ours, training, tokenizer, data.train_ids)


def our_child(args, ours, training, tokenizer, rows) -> dict | None:
    import train
    import weights
    from loop.precision import fast_float32, product_shapes

    from common import device

    loader = token_rows(ours, training, tokenizer, rows)
    model = weights.load_model(args.size, ours, training, tokenizer)
    tokens = training.per_device_train_batch_size * ours.model_max_length
    fast_float32(product_shapes(model, tokens))
    start_weights(model, moved=False)
    start = forget_peak()
    began = time.process_time()
    objective = train.make_objective(ours, training, model, tokenizer)
    train.dpo.add_references(ours, training, model, {"train": loader}, args.size)
    reference = time.process_time() - began if args.stage == "dpo" else 0.0
    if args.stage == "dpo":
        start_weights(model, moved=True)
    optimizer = train.optim.make(
        model, "adamw", training.learning_rate, training.weight_decay, 0.02, True
    )
    seen = []
    objective.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    bins = loader.order.take(0, 0, len(loader.order))
    expected = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert len(bins) == expected, f"{len(bins)} windows instead of {expected}"
    scaler = device.grad_scaler(device.train_dtype(training))
    gradients = train.parallel.Gradients(device.train_dtype(training))

    def step():
        net = objective.train()
        train.train_step(net, None, loader, bins, optimizer, scaler, training, gradients, 1)

    step()
    loss = sum(float(one["nll"]) for one in seen) / sum(float(one["count"]) for one in seen)
    if args.profile:
        return profiled(step)
    cpu, wall = time.process_time(), time.time()
    step()
    cpu, wall = time.process_time() - cpu + reference, time.time() - wall
    labels = int(loader.rows.labels.sum())
    return {"cpu": cpu, "wall": wall, "tokens": loader.tokens(bins), "labels": labels, "loss": loss,
            "columns": len(bins) * loader.max_length, "memory_mb": memory_mb("VmHWM") - start}  # fmt: skip


# ---- restated -------------------------------------------------------------------------------------------------------


def restated_rows(kind: str, tokenizer, rows: list[dict]):
    import minimind_restated as restated

    more = (
        {} if kind == "pretrain" else {"end": "<|im_end|>"}
    )  # our labels end there, the original's at the newline
    return restated.ROWS[kind](rows, tokenizer, WIDTHS[kind], **more)


def restated_child(args, ours, training, tokenizer, rows) -> dict | None:
    import minimind_restated as restated
    import torch
    from model import build

    kind = kind_of(args.stage)
    with torch.device("meta"):
        config = build(args.size, len(tokenizer), **model_changes(args)).config.to_dict()
    new = lambda moved: start_weights(restated.Restated(restated.shape_of(config)), moved)
    model = new(kind == "dpo")
    start = forget_peak()
    reference = new(False).eval() if kind == "dpo" else None
    loop = restated.Loop(
        model, kind, 1, total=100, reference=reference, half=args.side == "restated_autocast"
    )
    items, size = restated_rows(kind, tokenizer, rows), restated.STAGES[kind]["batch"]
    loop.accumulation = math.ceil(len(rows) / size)
    batches = [range(i, min(len(rows), i + size)) for i in range(0, len(rows), size)]
    seen = Seen(kind, tokenizer.pad_token_id)
    with loop.cast:
        warm_up = loop.loss(seen.collate(items, range(2)))
    warm_up.backward()
    loop.optimizer.zero_grad(set_to_none=True)
    model.register_forward_hook(seen.note)
    seen.forget()

    def step():
        for batch in batches:
            loss = loop.step(seen.collate(items, batch))
            seen.nll += loss * len(batch) if kind == "dpo" else 0.0

    if args.profile:
        return profiled(step)
    cpu, wall = time.process_time(), time.time()
    step()
    cpu, wall = time.process_time() - cpu, time.time() - wall
    return {"cpu": cpu, "wall": wall, "tokens": seen.tokens, "labels": seen.labels, "columns": seen.columns,
            "loss": seen.nll / (len(rows) if kind == "dpo" else seen.labels),
            "memory_mb": memory_mb("VmHWM") - start}  # fmt: skip


class Seen:
    """Counts what goes through a re-stated loop; the cross entropy without the balance of experts."""

    def __init__(self, kind: str, pad: int):
        self.kind, self.pad = kind, pad
        self.forget()

    def forget(self) -> None:
        self.tokens = self.labels = self.columns = 0
        self.nll = 0.0

    def collate(self, items, numbers) -> tuple:
        import torch

        batch = torch.utils.data.default_collate([items[i] for i in numbers])
        if self.kind == "dpo":  # ids of a side without its last token, targets one place on, counts
            for ids, targets, counts in (batch[:3], batch[3:]):
                self.tokens += int((ids[:, 0] != self.pad).sum() + (targets != self.pad).sum())
                self.labels, self.columns = (
                    self.labels + int(counts.sum()),
                    self.columns + ids.numel(),
                )
        else:
            self.tokens += int((batch[0] != self.pad).sum())
            self.labels, self.columns = (
                self.labels + int((batch[1][:, 1:] >= 0).sum()),
                self.columns + batch[0].numel(),
            )
        return batch

    def note(self, module, inputs, output) -> None:
        if output[1] is not None:
            self.nll += output[1].item() * int((inputs[1][:, 1:] >= 0).sum())


# ---- the data -------------------------------------------------------------------------------------------------------


def data_child(args, ours, training, tokenizer) -> dict:
    """Rows per CPU second of both sides: an epoch of batches, and a first epoch with all that comes before it."""
    kind, rng = args.stage.removeprefix("data_"), random.Random(args.round)
    write, count = Writer(tokenizer, rng), DATA_ROWS[kind.removeprefix("data_")]
    rows = [
        as_row(kind, [write(length, tries=1) for length in draw(kind, rng)]) for _ in range(count)
    ]
    items, batch = restated_rows(kind, tokenizer, rows), 16
    seen = Seen(kind, tokenizer.pad_token_id)
    for place in range(2):  # the first call of a tokenizer's template takes long
        began = time.process_time()
        for start in range(0, count if place else batch, batch):
            seen.collate(items, range(start, min(count, start + batch)))
    theirs = time.process_time() - began
    began = cpu_of_all()
    loader = token_rows(ours, training, tokenizer, rows)
    built = cpu_of_all() - began
    began, per_step = time.process_time(), loader.windows
    for at in range(0, len(loader.order), per_step):
        loader.batch(loader.order.take(0, at, per_step))
    epoch = time.process_time() - began
    return {"rows": count, "restated_rows_per_cpu_s": count / theirs, "ours_rows_per_cpu_s": count / epoch,
            "ours_first_epoch_rows_per_cpu_s": count / (built + epoch), "times_restated": theirs / epoch,
            "times_first_epoch": theirs / (built + epoch)}  # fmt: skip


def cpu_of_all() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# ---- one side in a process ------------------------------------------------------------------------------------------


def model_changes(args) -> dict:
    changes = {"num_hidden_layers": args.layers} if args.layers else {}
    return changes | ({"use_moe": True} if args.stage == "moe" else {})


def child(args) -> None:
    import contextlib

    import torch
    from transformers import AutoTokenizer

    from common import cli, device

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cli.say = lambda text: None
    ours, training = settings_of(args)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with contextlib.redirect_stdout(sys.stderr if not args.profile else sys.stdout):
        found = one_side(args, ours, training, tokenizer)
    if found:
        print(json.dumps({"bench": args.stage, "side": args.side, "dtype": args.dtype,
                          "device": device.name()} | found))  # fmt: skip


def one_side(args, ours, training, tokenizer) -> dict | None:
    import torch

    if args.stage.startswith("data_"):
        return data_child(args, ours, training, tokenizer)
    windows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    rows = make_rows(kind_of(args.stage), windows, ours.model_max_length, tokenizer, args.round)
    run = our_child if args.side == "ours" else restated_child
    found = run(args, ours, training, tokenizer, rows)
    if found:
        half = args.side != "restated" and args.dtype == "bfloat16"
        found |= {"tokens_per_cpu_s": found["tokens"] / found.pop("cpu"),
                  "tokens_per_s": found["tokens"] / found.pop("wall"), "rows": len(rows),
                  "fill": found["tokens"] / found.pop("columns"),
                  "matmul_gflops": matmul_peak(torch.bfloat16 if half else torch.float32) / 1e9}  # fmt: skip
    return found


# ---- running all of it ----------------------------------------------------------------------------------------------

QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
PASSED = ("size", "layers", "windows", "tokenizer")


def run_child(args, stage: str, side: str, dtype: str, number: int) -> dict | None:
    with tempfile.TemporaryDirectory() as output:
        env = {"OMP_NUM_THREADS": "1"} | os.environ | QUIET | {"DANPU_CACHE": f"{output}/cache"}
        flags = [f"--{name}={getattr(args, name)}" for name in PASSED] + [f"--round={number}"]
        flags += ["--stage", stage, "--side", side, "--dtype", dtype, "--output", output]
        flags += ["--profile"] if args.profile else []
        run = subprocess.run(
            [sys.executable, __file__, *flags], env=env, text=True, capture_output=True
        )
    if run.returncode:
        print(
            json.dumps(
                {"bench": stage, "side": side, "dtype": dtype, "failed": run.stderr.strip()[-600:]}
            )
        )
    elif args.profile:
        print(stage, side, dtype, run.stdout, sep="\n")
    return (
        None if run.returncode or args.profile else json.loads(run.stdout.strip().splitlines()[-1])
    )


def best_of(lines: list[dict]) -> dict:
    """The fastest round; memory is the least seen."""
    best = dict(
        max(lines, key=lambda line: line.get("tokens_per_cpu_s", line.get("times_restated", 0)))
    )
    return best | {
        name: min(line[name] for line in lines) for name in ("memory_mb",) if name in best
    }


def report(results: dict) -> list[str]:
    """Prints a line per stage, side and dtype, ours with its ratios; returns what the two sides do not agree on."""
    wrong = []
    done = {key: best_of(lines) for key, lines in results.items() if lines}
    for (stage, side, dtype), line in done.items():
        rival, cast = (
            done.get((stage, "restated", "float32")),
            done.get((stage, "restated_autocast", "bfloat16")),
        )
        if side == "ours" and rival:
            line["times_restated"] = line["tokens_per_cpu_s"] / rival["tokens_per_cpu_s"]
            line["memory_of_restated"] = line["memory_mb"] / rival["memory_mb"]
            wrong += disagreements(
                stage, dtype, results[stage, side, dtype], results[stage, "restated", "float32"]
            )
        if side == "ours" and cast and dtype == "bfloat16":
            line["times_autocast"] = line["tokens_per_cpu_s"] / cast["tokens_per_cpu_s"]
        print(
            json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}),
            flush=True,
        )
    return wrong


def disagreements(stage: str, dtype: str, ours: list[dict], theirs: list[dict]) -> list[str]:
    found = []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        about = f"{stage} {dtype} round {number}"
        found += [
            f"{about}: {name} {a[name]} and {b[name]}"
            for name in ("tokens", "labels")
            if a[name] != b[name]
        ]
        if not abs(a["loss"] - b["loss"]) <= SAME[dtype]:
            found.append(f"{about}: losses {a['loss']:.6f} and {b['loss']:.6f}")
    return found


def cases(args, dtypes: list[str]) -> list[tuple[str, str, str]]:
    """(stage, side, dtype) of every process of a round."""
    found = []
    for what in args.only:
        if what == "data":
            found += [(f"data_{kind}", "both", "float32") for kind in DATA_ROWS]
            continue
        found += [(what, "restated", "float32")] if "restated" in args.sides else []
        found += (
            [(what, "restated_autocast", "bfloat16")] if "restated_autocast" in args.sides else []
        )
        found += [(what, "ours", dtype) for dtype in dtypes if "ours" in args.sides]
    return [case for case in found if case[2] in dtypes or case[1] in ("restated", "both")]


def main() -> int:
    from common import device

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=(*STAGES, "data"), choices=(*STAGES, "data"))
    parser.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES)
    parser.add_argument(
        "--dtypes", nargs="*", default=None, help="default: float32 and the device's best"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", default="26m", help="of model.py's SIZES; moe gives it experts")
    parser.add_argument("--layers", type=int, default=0, help="another number of layers")
    parser.add_argument(
        "--windows", type=int, default=0, help="windows of a step; 0: as train.py has it"
    )
    parser.add_argument("--tokenizer", help="folder; unset: one of 6,400 tokens is trained")
    parser.add_argument(
        "--profile", action="store_true", help="print torch's profile of each side instead"
    )
    for name in ("stage", "side", "dtype", "output"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        child(args)
        return 0
    best = str(device.half_dtype() or "torch.float32").removeprefix("torch.")
    dtypes = args.dtypes or list(dict.fromkeys(["float32", best]))
    results: dict = {case: [] for case in cases(args, dtypes)}
    with tempfile.TemporaryDirectory() as folder:
        args.tokenizer = args.tokenizer or train_tokenizer(folder)
        interleaved(args, results)
    wrong = report(results)
    for words in wrong:
        print(json.dumps({"differs": words}), flush=True)
    return 1 if wrong else 0


def interleaved(args, results: dict) -> None:
    """Fills {(stage, side, dtype): lines}, all of them in each round."""
    for number in range(args.rounds):
        for case, lines in results.items():
            line = run_child(args, *case, number)
            lines += [line] if line else []
            print(json.dumps({"round": number} | (line or {})), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
