"""GPT-2 from scratch in plain PyTorch on whichever device is there: the first thing to run on a new
machine.

    bash minimind_npu/quickstart.sh        # 124M on an accelerator, a tiny one on a CPU; no network
    DEVICES=0,1 bash minimind_npu/quickstart.sh --epochs 5
    the same command again                 # continues after a crash with the last complete epoch

Data: synthetic Chinese sentences, or DATA=file.txt with a document per line. B windows a batch, T
tokens a window. Order of the story: arguments -> model -> one step -> measure -> the run. The text:
text.py; checkpoints, the lines people see and the report: ../loop, as for train.py.
"""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the rooms of this recipe
from common import cli, device  # before torch and transformers
from common.convert import models

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
)

from common import tiny
from common.convert.older_readers import save_tokenizer
from common.runs import flags, heartbeat, run_folder
from loop import parallel, state, tracking
from quickstart.text import endings, questions, read_text, windows

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOG_STEPS = 20
RANGES = {"warmup_steps": flags.FROM_0, "seed": (0, 2**32), "learning_rate": flags.ABOVE_0}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# 1. Arguments
@dataclass
class Args:
    model_name: str = field(
        default="auto",
        metadata={
            "aliases": ["--model_name_or_path"],
            "help": "gpt2: 124M, random weights; tiny: a toy; a folder or hub id: go on from it; "
            "auto: gpt2, on CPU tiny",
        },
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
    parser.error = partial(cli.Parser.error, parser)
    name = parser.parse_args().model_name
    if name == "auto":
        name = "tiny" if device.kind() == "cpu" else "gpt2"
    if name == "tiny":
        parser.set_defaults(**TINY)
    args = Args(**vars(parser.parse_args()))
    args.model_name = name

    for flag in ("batch_size", "max_length", "epochs", "learning_rate", "num_samples"):
        value = getattr(args, flag)
        if value <= 0:
            raise cli.usage_error(f"--{flag} {value}: must be above 0")
    flags.refuse_values(vars(args), RANGES)
    if args.data_path and any(word.startswith("--num_samples") for word in sys.argv):
        cli.say("warning: --num_samples: no effect; it is for synthetic text, not --data_path")
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
        model = models.load(AutoModelForCausalLM, name, "--model_name", dtype=torch.float32)
        limit = getattr(model.config, "max_position_embeddings", args.max_length)
        if args.max_length > limit:
            raise SystemExit(
                f"--max_length {args.max_length}: {name} has positions for {limit} tokens"
            )
        tokenizer = models.load(AutoTokenizer, name, "--model_name")
        models.check_vocabulary(tokenizer, model.config, name)
        return model, tokenizer

    mark = "<|endoftext|>"
    tokenizer = tiny.make_tokenizer(texts[:50000], 8000, [mark], eos_token=mark, bos_token=mark)
    size = {}
    if args.model_name == "tiny":
        size = dict(
            n_embd=96, n_layer=2, n_head=4, vocab_size=len(tokenizer), initializer_range=0.05
        )
    config = GPT2Config(  # no dropout, so that 1 and N processes give the same numbers
        **size,
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


def write_model(model, tokenizer, folder: Path) -> None:
    """What state.py calls on all ranks: a folder for from_pretrained."""
    if cli.is_main():
        model.config.use_cache = True
        model.save_pretrained(folder)
        model.config.use_cache = False
        save_tokenizer(tokenizer, folder)


# 3. One step, and the training loss over all ranks
def train_step(net, ids: torch.Tensor, optimizer, scaler, dtype: torch.dtype) -> tuple:
    """Windows [B, T] -> (this rank's loss, the norm of the gradients), still on the device. DDP
    averages the gradients inside backward()."""
    with device.autocast(dtype):
        loss = net(input_ids=ids, labels=ids).loss  # the model shifts the labels by one
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # the norm to clip is that of the true gradients
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    if not parallel.scaled_step(optimizer, scaler):
        norm = torch.full_like(norm, math.inf)
    optimizer.zero_grad(set_to_none=True)
    return loss.detach().float(), norm.float()


def mean_losses(losses: list[torch.Tensor]) -> list[float]:
    """Of some steps, averaged over the ranks in float32 (HCCL has no float64)."""
    values = torch.stack(losses)
    if WORLD > 1:
        dist.all_reduce(values)
    return (values / WORLD).tolist()


def refuse_bad_steps(losses: list[float], norms: list[float], gradients, run) -> None:
    """End the run at the first of the steps since the last reading that gave no numbers."""
    first = run.progress["step"] + 1
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), first):
        refuse_nan(loss, step)
        gradients.refuse(norm, step)


def refuse_nan(loss: float, step: int) -> None:
    """End the run at a loss that is not finite; every rank has the same."""
    if not math.isfinite(loss):
        raise SystemExit(
            f"step {step}: the loss is {loss}; stopped, and nothing of this epoch is saved. "
            "Try a lower --learning_rate or --dtype fp32 in a new folder"
        )


# 4. What the model can do with text that it was not trained on
@torch.no_grad()
def eval_loss(model, eval_set: torch.Tensor, batch_size: int, dtype: torch.dtype) -> float:
    """Mean loss per token over windows [N, T], each of them on one rank."""
    total = torch.zeros((), device=model.device)
    count = 0
    model.eval()
    for ids in eval_set[RANK::WORLD].to(model.device).split(batch_size):
        with device.autocast(dtype):
            loss = model(input_ids=ids, labels=ids).loss
        total += loss.float() * len(ids)
        count += len(ids)
    model.train()
    sums = parallel.summed({"loss": total, "windows": count}, model.device)
    return sums["loss"] / sums["windows"]


def measure(model, tokenizer, asked: list[tuple[str, str]], evaluate) -> dict:
    """{"metrics", "samples": how the model ends the sentences of `asked`}. All ranks call it."""
    loss = evaluate()
    answers, right = endings(model, tokenizer, asked)
    samples = []
    for (beginning, ending), answer in zip(asked, answers, strict=True):
        samples.append({"prompt": beginning, "reference": ending, "answer": answer})
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 50)), "sentences_ended_right": right}
    return {"metrics": metrics, "samples": samples}


# 5. The run
def make_loader(train_set: torch.Tensor, args: Args) -> DataLoader:
    """This rank's batches of windows [N, T]."""
    sampler = DistributedSampler(train_set, WORLD, RANK, seed=args.seed, drop_last=True)
    loader = DataLoader(
        train_set,
        args.batch_size,
        sampler=sampler,
        drop_last=True,
        # of its own: the loader would draw from the global one, and resume would not be exact
        generator=torch.Generator(),
    )
    if not len(loader):
        raise SystemExit(
            f"{len(train_set)} windows are not one step of --batch_size {args.batch_size} on "
            f"{WORLD} device(s): give more text or a smaller one"
        )
    return loader


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear up to `peak` over `warmup` steps, linear down to 0 after `total`; `step` counts from
    1."""
    return peak * min(step / max(1, warmup), (total - step + 1) / (total - warmup + 1))


class Plan:
    """How long the run is, and its learning rate."""

    def __init__(self, args: Args, steps_of_epoch: int, progress: dict):
        self.args = args
        self.progress = progress
        self.total = steps_of_epoch * args.epochs
        self.warmup = args.warmup_steps
        self.windows = args.batch_size * WORLD  # of a step
        if self.warmup >= self.total:
            self.warmup = max(1, self.total // 10)
            cli.say(
                f"warm-up shortened from {args.warmup_steps} to {self.warmup} steps: the run has "
                f"{self.total}"
            )

    def describe(self) -> str:
        return (
            f"steps: {self.total:,} of {self.windows * self.args.max_length:,} tokens; a "
            f"checkpoint after each of {self.args.epochs} epochs"
        )

    def total_steps(self) -> int:
        return self.total

    def fraction_done(self) -> float:
        return self.progress["step"] / self.total

    def set_lr(self, optimizer, step: int) -> float:
        lr = learning_rate(step, self.total, self.warmup, self.args.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr


def run_epoch(
    net, loader: DataLoader, optimizer, scaler, dtype, gradients, plan: Plan, run
) -> None:
    """One time through the text. Reading a loss waits for the device, so not after each step."""
    where = next(net.parameters()).device
    loader.sampler.set_epoch(run.progress["epoch"])
    losses = []
    norms = []
    rates = []
    began = time.time()
    for number, ids in enumerate(loader, 1):
        step = run.progress["step"] + len(losses) + 1
        rates.append(plan.set_lr(optimizer, step))
        loss, norm = train_step(net, ids.to(where), optimizer, scaler, dtype)
        losses.append(loss)
        norms.append(norm)
        if number % LOG_STEPS == 0 or number == len(loader):
            refuse_bad_steps(mean_losses(losses), torch.stack(norms).tolist(), gradients, run)
            book(run, plan, mean_losses(losses), rates, time.time() - began)
            losses = []
            norms = []
            rates = []
            began = time.time()
    run.progress["epoch"] += 1


def book(run, plan: Plan, losses: list[float], rates: list[float], seconds: float) -> None:
    """Count the steps since the last reading."""
    length = plan.args.max_length
    for loss, lr in zip(losses, rates, strict=True):
        run.progress["step"] += 1
        tokens = plan.windows * length
        label_tokens = plan.windows * (length - 1)
        run.count(loss, lr, seconds / len(losses), tokens, label_tokens)


def settings_for_loop(args: Args, dtype: torch.dtype) -> SimpleNamespace:
    """What ../loop and common/runs read from TrainingArguments."""
    return SimpleNamespace(
        output_dir=args.output_dir,
        resume_from_checkpoint=args.resume_from_checkpoint,
        device=device.device(),
        world_size=WORLD,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        deepspeed=None,
        max_steps=-1,
        logging_steps=LOG_STEPS,
        save_total_limit=1,
        save_strategy="epoch",
        report_to=[],
    )


def run(args: Args) -> None:
    dtype = DTYPES.get(args.dtype) or device.half_dtype() or torch.float32
    training = settings_for_loop(args, dtype)
    if WORLD > 1:
        patience = timedelta(seconds=device.DDP_TIMEOUT)
        device.limit_collectives(device.DDP_TIMEOUT)
        dist.init_process_group(device.dist_backend(), timeout=patience)
        heartbeat.start(device.DDP_TIMEOUT)
    device.seed_all(args.seed)
    train_texts, eval_texts, rows = read_text(args)
    settings = asdict(args) | {"dtype": str(dtype), "data": rows["sha256"], "processes": WORLD}
    start = run_folder.open_output(training, settings, args.overwrite_output_dir)

    model, tokenizer = load(args, train_texts, start)
    model.to(training.device).config.use_cache = False
    loader = make_loader(windows(tokenizer, train_texts, args.max_length), args)
    eval_set = windows(tokenizer, eval_texts, args.max_length)
    optimizer = make_optimizer(model, args.learning_rate)
    stateful = {"optimizer": optimizer, "scaler": device.grad_scaler(dtype)}
    write = partial(write_model, model, tokenizer)
    evaluate = partial(eval_loss, model, eval_set, args.batch_size, dtype)
    measured = partial(measure, model, tokenizer, questions(eval_texts, 32), evaluate)

    torch.manual_seed(args.seed + RANK)  # dropout, where a model has it, differs between the ranks
    if start:
        progress = state.read_progress(start)
        state.restore(start, model, stateful, None, args.seed)
    else:
        progress = state.new_progress(measured())
    net, _ = parallel.wrap(model, optimizer, training, dtype)
    plan = Plan(args, len(loader), progress)
    tracked = tracking.Run(training, progress, model, dtype, plan, asdict(args))
    counted = {"gradients": parallel.Gradients(dtype), "plan": plan, "run": tracked}
    while progress["epoch"] < args.epochs:
        run_epoch(net, loader, **stateful, dtype=dtype, **counted)
        loss = evaluate()
        refuse_nan(loss, progress["step"])
        tracked.note({"loss": loss})
        state.save(training, write, stateful, None, progress)
    state.save_final(args.output_dir, write)
    after = measured()
    tokens_a_step = plan.windows * args.max_length
    tracked.report("quickstart", args.model_name, rows, after, tokens_a_step=tokens_a_step)
    cli.say("\nthe model goes on after the bar:")
    for sample in after["samples"][:3]:
        cli.say(f"  {sample['prompt']}|{sample['answer']}")


def main() -> None:
    args = parse()
    try:
        run(args)
    except torch.OutOfMemoryError:
        raise SystemExit(
            "out of memory: lower --batch_size or --max_length, or take --model_name tiny"
        ) from None


if __name__ == "__main__":
    cli.run(main)
