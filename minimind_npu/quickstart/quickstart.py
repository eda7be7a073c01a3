"""GPT-2 from scratch in plain PyTorch on whichever device is there: the first thing to run on a new
machine.

    bash minimind_npu/quickstart.sh                        # 124M on an accelerator, a tiny one on CPU; no network
    DEVICES=0,1 bash minimind_npu/quickstart.sh --epochs 5
    the same command again                                 # continues after a crash with the last whole epoch

Data: synthetic Chinese sentences, or DATA=file.txt with a document per line. B windows a batch, T
tokens a window. Order of the story: arguments -> model -> one step -> measure -> the run. Text and
files: the two modules beside it.
"""

import difflib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this one
from common import cli, device  # device before torch and transformers

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
)

from common import tiny
from common.runs import run_folder
from quickstart.files import display, finish, note, restore, save
from quickstart.text import endings, questions, read_text, windows

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOG_STEPS = 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = "gpt2: 124M, random weights; tiny: a toy; a folder or hub id: go on from it; auto: gpt2, on CPU tiny"


# 1. Arguments
@dataclass
class Args:
    model_name: str = field(
        default="auto", metadata={"aliases": ["--model_name_or_path"], "help": NAMES}
    )
    data_path: str = field(
        default="", metadata={"help": "text files, a document per line; unset: synthetic text"}
    )
    output_dir: str = field(
        default=str(HERE.parent / "output/quickstart"), metadata={"help": "where all of it goes"}
    )
    batch_size: int = field(default=8, metadata={"help": "windows per device and step"})
    max_length: int = field(default=256, metadata={"help": "tokens per window; tiny: 128"})
    epochs: int = field(default=3, metadata={"help": "times through the text; tiny: 5"})
    learning_rate: float = field(
        default=5e-5, metadata={"help": "peak of AdamW's rate; tiny: 6e-3"}
    )
    warmup_steps: int = field(
        default=100, metadata={"help": "linear up to the peak, then down to 0; tiny: 20"}
    )
    num_samples: int = field(default=20000, metadata={"help": "synthetic documents; tiny: 2000"})
    dtype: str = field(
        default="auto", metadata={"help": "bf16, fp16, fp32; auto: the device's half precision"}
    )
    seed: int = field(default=42, metadata={"help": "of the weights, the text and its order"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace what an earlier run left"}
    )
    resume_from_checkpoint: str = field(
        default="false", metadata={"help": "true, or the folder of a checkpoint"}
    )


TINY = dict(max_length=128, epochs=5, learning_rate=6e-3, warmup_steps=20, num_samples=2000)


def parse() -> Args:
    """The command line; a mistake is one line and exit code 2."""
    parser = HfArgumentParser(Args, allow_abbrev=False)
    parser.error = lambda message: sys.exit(cli.usage_error(message).code)
    first, unknown = parser.parse_known_args()
    if unknown:
        near = difflib.get_close_matches(
            unknown[0], [o for a in parser._actions for o in a.option_strings], 1, 0.5
        )
        raise cli.usage_error(
            f"unknown flag {unknown[0]}"
            + (f"; did you mean {near[0]}?" if near else "; see --help")
        )
    name = {"auto": "tiny" if device.kind() == "cpu" else "gpt2"}.get(
        first.model_name, first.model_name
    )
    parser.set_defaults(**(TINY if name == "tiny" else {}))
    args = parser.parse_args_into_dataclasses()[0]
    args.model_name = name
    for flag in ("batch_size", "max_length", "epochs", "learning_rate", "num_samples"):
        if getattr(args, flag) <= 0:
            raise cli.usage_error(f"--{flag} {getattr(args, flag)}: must be above 0")
    if args.dtype not in ("auto", *DTYPES):
        raise cli.usage_error(f"--dtype {args.dtype}: one of auto, {', '.join(DTYPES)}")
    if args.dtype == "fp16" and device.kind() == "cpu":
        raise cli.usage_error("--dtype fp16 needs an accelerator: on CPU use bf16 or fp32")
    return args


# 2. Model and optimizer
def load(args: Args, texts: list[str], start: Path | None):
    """(model with float32 weights, tokenizer); `start` is the checkpoint that this run continues
    from."""
    if start or args.model_name not in ("tiny", "gpt2"):
        name = str(start or args.model_name)
        model = cli.load(AutoModelForCausalLM, name, dtype=torch.float32)
        limit = getattr(model.config, "max_position_embeddings", args.max_length)
        if args.max_length > limit:
            raise SystemExit(
                f"--max_length {args.max_length}: {name} has positions for {limit} tokens"
            )
        return model, cli.load(AutoTokenizer, name)
    mark = "<|endoftext|>"
    tokenizer = tiny.make_tokenizer(texts[:50000], 8000, [mark], eos_token=mark, bos_token=mark)
    toy = {
        "n_embd": 96,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.05,
    }
    config = GPT2Config(  # no dropout, so that 1 and N processes give the same numbers
        **(toy if args.model_name == "tiny" else {}),
        n_positions=max(1024, args.max_length),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config), tokenizer


def make_optimizer(model, peak: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only. Never `fused=True`: on an NPU it crashes with the
    fp16 scaler."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear up to `peak` over `warmup` steps, linear down to 0 after `total`; `step` counts from
    1."""
    return peak * min(step / max(1, warmup), (total - step + 1) / (total - warmup + 1))


# 3. One step, and the training loss over all ranks
def train_step(net, ids: torch.Tensor, optimizer, scaler, dtype: torch.dtype) -> torch.Tensor:
    """Windows [B, T] -> this rank's loss, still on the device. DDP averages the gradients inside
    backward()."""
    with device.autocast(dtype):
        loss = net(input_ids=ids, labels=ids).loss  # the model shifts the labels by one
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # the norm to clip is that of the true gradients
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    scaler.step(optimizer)  # leaves the step out where fp16 overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach().float()


def mean_losses(recent: list[torch.Tensor], last_step: int) -> list[dict]:
    """[{"step", "loss"}] of the last steps, averaged over the ranks in float32 (HCCL has no
    float64)."""
    losses = torch.stack(recent)
    if WORLD > 1:
        dist.all_reduce(losses)
    values = (losses / WORLD).tolist()
    return [
        {"step": step, "loss": finite(x, step)}
        for step, x in enumerate(values, last_step - len(values) + 1)
    ]


def finite(loss: float, step: int) -> float:
    """The same loss; a NaN or infinite one ends the run."""
    if not math.isfinite(loss):
        raise SystemExit(
            f"step {step}: the loss is {loss}; stopped, and nothing of this epoch is saved. "
            "Try a lower --learning_rate or --dtype fp32 in a new folder"
        )
    return loss


# 4. What the model can do with text that it was not trained on
@torch.no_grad()
def held_out_loss(model, held_out: torch.Tensor, batch_size: int, dtype: torch.dtype) -> float:
    """Mean loss per token over windows [N, T], each of them on one rank."""
    sums = torch.zeros(2, dtype=torch.float32, device=model.device)
    model.eval()
    for ids in held_out[RANK::WORLD].to(model.device).split(batch_size):
        with device.autocast(dtype):
            loss = model(input_ids=ids, labels=ids).loss.float()
        sums += torch.stack([loss * len(ids), torch.full_like(loss, len(ids))])
    model.train()
    if WORLD > 1:
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def measure(
    model, tokenizer, held_out: torch.Tensor, asked: list[tuple[str, str]], batch_size: int, dtype
) -> dict:
    """{"metrics", "answers": how the model ends the sentences of `asked`}. All ranks call it."""
    loss = held_out_loss(model, held_out, batch_size, dtype)
    answers, right = endings(model, tokenizer, asked)
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 50)), "sentences_ended_right": right}
    return {"metrics": metrics, "answers": answers}


# 5. The run
def plan(train_set: torch.Tensor, args: Args) -> tuple[DataLoader, int, Callable[[int], float]]:
    """(loader of this rank's batches, steps in all, step -> learning rate)."""
    sampler = DistributedSampler(train_set, WORLD, RANK, seed=args.seed, drop_last=True)
    # a generator of its own: the loader would draw from the global one, and resume would not be
    # exact
    loader = DataLoader(
        train_set, args.batch_size, sampler=sampler, drop_last=True, generator=torch.Generator()
    )
    total, warmup = len(loader) * args.epochs, args.warmup_steps
    if not total:
        need = f"--batch_size {args.batch_size} on {WORLD} device(s)"
        raise SystemExit(
            f"{len(train_set)} windows are not one step of {need}: give more text or a smaller one"
        )
    if warmup >= total:
        warmup = max(1, total // 10)
        cli.say(
            f"warm-up shortened from {args.warmup_steps} to {warmup} steps: the run has {total}"
        )
    return loader, total, lambda step: learning_rate(step, total, warmup, args.learning_rate)


def run_epoch(
    net, loader, optimizer, scaler, dtype, rate: Callable, show: Callable, progress: dict
) -> None:
    """One time through the text; counts steps, losses and seconds in `progress`."""
    began, recent, where = time.time(), [], next(net.parameters()).device
    loader.sampler.set_epoch(progress["epoch"])
    for number, ids in enumerate(loader, 1):
        progress["step"] += 1
        for group in optimizer.param_groups:
            group["lr"] = rate(progress["step"])
        recent.append(train_step(net, ids.to(where), optimizer, scaler, dtype))
        if number % LOG_STEPS == 0 or number == len(
            loader
        ):  # reading a loss waits for the device, so not each step
            new = mean_losses(recent, progress["step"])
            show(progress["step"], sum(entry["loss"] for entry in new) / len(new))
            progress["history"] += new
            recent = []
    progress["epoch"] += 1
    progress["seconds"] += time.time() - began


def run(args: Args) -> None:
    where = device.device()
    if WORLD > 1:
        dist.init_process_group(device.dist_backend())
    device.seed_all(args.seed)
    dtype = DTYPES.get(args.dtype) or device.half_dtype() or torch.float32
    train_texts, held_texts, rows = read_text(args)
    settings = asdict(args) | {"dtype": str(dtype), "data": rows["sha256"], "processes": WORLD}
    folder = SimpleNamespace(**asdict(args), world_size=WORLD, max_steps=-1)
    start = run_folder.open_output(folder, settings, args.overwrite_output_dir)

    model, tokenizer = load(args, train_texts, start)
    model.to(where).config.use_cache = False
    train_set, held_out = (
        windows(tokenizer, texts, args.max_length) for texts in (train_texts, held_texts)
    )
    asked = questions(held_texts, 32)
    loader, total, rate = plan(train_set, args)
    facts = {"dtype": str(dtype).removeprefix("torch."), "world_size": WORLD, "rows": rows}
    facts |= {
        "parameters": model.num_parameters(),
        "tokens_a_step": args.batch_size * args.max_length * WORLD,
    }
    cli.say(
        f"model: {args.model_name}, {facts['parameters']:,} parameters; {WORLD} x {device.name()}, {facts['dtype']}\n"
        f"steps: {total:,} of {facts['tokens_a_step']:,} tokens; a checkpoint after each of {args.epochs} epochs"
    )
    parts = {
        "optimizer": make_optimizer(model, args.learning_rate),
        "scaler": device.grad_scaler(dtype),
    }
    test = partial(measure, model, tokenizer, held_out, asked, args.batch_size, dtype)
    torch.manual_seed(args.seed + RANK)  # dropout, where a model has it, differs between the ranks
    if start:
        progress = restore(start, parts, where)
    else:
        progress = {"step": 0, "epoch": 0, "seconds": 0.0, "history": [], "before": test()}

    net = DistributedDataParallel(model) if WORLD > 1 else model
    show = display(total, progress["step"], facts["tokens_a_step"])
    while progress["epoch"] < args.epochs:
        run_epoch(net, loader, **parts, dtype=dtype, rate=rate, show=show, progress=progress)
        loss = finite(held_out_loss(model, held_out, args.batch_size, dtype), progress["step"])
        progress["history"].append({"step": progress["step"], "eval_loss": loss})
        note(f"epoch {progress['epoch']}/{args.epochs}, held out: loss {loss:.4f}")
        save(Path(args.output_dir), model, tokenizer, parts, progress, RANK, WORLD)
    after = test()
    if cli.is_main():
        finish(args, model, tokenizer, facts, progress, after, asked)


def main() -> None:
    args = parse()
    try:
        run(args)
    except torch.OutOfMemoryError:
        raise SystemExit(
            "out of memory: lower --batch_size or --max_length, or take --model_name tiny"
        ) from None
    except SystemExit as error:
        if error.code == cli.INTERRUPTED:
            cli.say(
                f"interrupted. This goes on with the last whole epoch:\n  {cli.resume_command()}"
            )
        raise


if __name__ == "__main__":
    cli.run(main)
