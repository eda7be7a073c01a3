"""A language model from nothing, stage by stage: pretrain, sft, lora, dpo, distill, reason. Plain
PyTorch.

    bash minimind_npu/run_all.sh                                     # all stages on the built-in data, some minutes
    DATA=my.jsonl bash minimind_npu/train_zero2.sh --stage pretrain --size 26m
    NPROC=8 bash minimind_npu/train_npu.sh --stage sft --from_weight pretrain --data_path sft.jsonl

Rows, loss and metrics of a stage: the file of its name; flags: settings.py. Order of the story:
data -> model and objective -> one step -> what the held-out rows say -> the run. A batch of one
process is B windows of T tokens.
"""

import json
import math
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this one
from common import cli  # before torch and transformers: it brings the device

import torch
from torch import nn
from transformers import AutoTokenizer, TrainingArguments

import model as models
from loop import optim, parallel, state, tracking
from loop.batches import Loader, Order, TokenRows
from common import device
from common.convert import adapter
from common.fast import attention, losses
from common.runs import generate, run_folder
from common.data.labels import encode_prompt, fingerprint, preview
from common.data.load import load_rows, summary
from common.data.tokens import tokenise_split
from common.data.split import split_rows
from common.callbacks import SafeStop
from stages import distill, dpo, lora, pretrain, reason, sft
from settings import DEFAULTS, DEFINING, OUTPUT, Args, own_model, settle, start_from, tokenizer_of

STAGES = {
    "pretrain": pretrain,
    "sft": sft,
    "lora": lora,
    "dpo": dpo,
    "distill": distill,
    "reason": reason,
}


# 1. Data
def read(args: Args, training, tokenizer, rows, stats: dict):
    """Rows -> memory-mapped token rows to train on and held out, the held-out rows as read;
    completes the counts."""
    stage = STAGES[args.stage]
    train, held_out = split_rows(rows, args.eval_ratio, args.max_eval_samples, seed=training.seed)
    code = "".join(
        (HERE / "stages" / f"{name}.py").read_text(encoding="utf-8") for name in (args.stage, "sft")
    )
    key = json.dumps(
        [code, fingerprint(tokenizer), args.model_max_length]
    )  # an edited `encode` makes new rows
    encode = partial(stage.encode, tokenizer=tokenizer, max_length=args.model_max_length)
    train_ids, eval_ids, counts = tokenise_split(
        train, held_out, encode, key, columns=stage.COLUMNS
    )
    stats["dropped"] |= counts["dropped"]
    for why, n in counts["dropped"].items():
        cli.say(f"  {n:,} dropped: {counts['examples'].get(why, why)}")
    stats |= {
        "used": len(train_ids),
        "held_out": len(eval_ids),
        "truncated": counts["truncated"],
    }
    cli.say(
        "split: {used:,} rows to train on, {held_out:,} held out, {truncated:,} shortened".format(
            **stats
        )
    )
    shown = [
        train_ids[0][name][:200]
        for name in (stage.COLUMNS[0], stage.COLUMNS[min(1, len(stage.COLUMNS) - 1)])
    ]
    cli.say(f"first row: {preview(tokenizer, *shown, color=sys.stdout.isatty())}")
    return train_ids, eval_ids, held_out


def loaders(args: Args, training, tokenizer, *token_rows) -> list[Loader]:
    """The batches of this process, of the rows to train on and of those held out (None where there
    are none)."""
    made = []
    for ids in token_rows:
        rows = TokenRows(ids, STAGES[args.stage].COLUMNS) if len(ids) else None
        made.append(
            rows
            and Loader(
                rows,
                Order(rows, args.model_max_length, training.seed),
                training.per_device_train_batch_size,
                args.model_max_length,
                tokenizer.pad_token_id,
                training.device,
                training.process_index,
                training.world_size,
                pairs=args.stage == "dpo",
            )
        )
    return made


# 2. Model and objective
def load_model(name: str, args: Args, training, tokenizer, dtype) -> models.MiniMindForCausalLM:
    """Random weights of a size or those of a folder: float32; a base under an adapter in the dtype
    it runs in."""
    settings = {
        "attn_implementation": attention.register(),
        "dtype": dtype if args.use_lora else torch.float32,
    }
    if name in models.SIZES:
        own = {
            "hidden_size": args.hidden_size,
            "num_hidden_layers": args.num_hidden_layers,
            "use_moe": args.use_moe,
        }
        with parallel.whole_weights():
            model = models.build(name, len(tokenizer), **{k: v for k, v in own.items() if v})
        model.config._attn_implementation = settings["attn_implementation"]
    else:
        with parallel.whole_weights():
            model = cli.load(models.MiniMindForCausalLM, name, **settings)
    losses.use_chunked_loss(model).config.use_cache = False
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    for layer in model.model.layers if training.torch_compile else ():
        layer.compile()
    return model


class Objective(nn.Module):
    """The model and what it is trained on as one module: DistributedDataParallel and DeepSpeed see
    every forward."""

    def __init__(self, model, loss, **settings):
        super().__init__()
        self.model, self.loss, self.settings = (
            model,
            loss,
            settings,
        )  # a teacher stands in a dict: no part of this

    def forward(self, batch: dict, items: float):
        return self.loss(self.model, batch, items, **self.settings)


def make_objective(args: Args, training, model, tokenizer, parts: list, dtype, *about) -> Objective:
    """The stage's loss with all it needs beside model and batch: a reference, a teacher, the ids of
    the tags."""
    more = {}
    if args.stage == "reason":
        more = {"tags": torch.tensor(reason.tag_ids(tokenizer)), "think_weight": args.think_weight}
    if args.stage == "dpo":
        more = {"beta": args.beta}
        for name, loader in zip(("train", "held_out"), parts, strict=True):
            if loader and args.reference == "cached":
                file = Path(training.output_dir, f"reference_{name}.safetensors")
                loader.extra["reference"] = dpo.reference(model, loader, dtype, file, *about)
    if args.stage == "distill":
        with parallel.whole_weights():
            teacher = cli.load(
                models.MiniMindForCausalLM,
                args.teacher,
                "--teacher",
                dtype=dtype,
                use_cache=False,
                attn_implementation=attention.register(),
            )
        if cli.load(AutoTokenizer, args.teacher, "--teacher").get_vocab() != tokenizer.get_vocab():
            raise SystemExit(f"--teacher {args.teacher} has another tokenizer than the student")
        teacher.to(training.device).requires_grad_(False).eval()
        more = {"teacher": teacher, "alpha": args.alpha, "temperature": args.temperature}
    return Objective(model, STAGES[args.stage].loss, **more)


# 3. One step
def train_step(
    net, engine, loader: Loader, bins: list, optimizer, scaler, training, dtype, step: int
) -> float:
    """One update; returns the loss: a sum over the labels of all ranks and micro-batches / their
    number, so that neither the number of processes nor accumulation changes it."""
    items, steps, total = loader.items(bins), training.gradient_accumulation_steps, 0.0
    for micro in range(steps):
        batch = loader.batch(bins, micro)
        with parallel.last_of(micro, steps, net):
            with device.autocast(
                torch.float32 if engine else dtype
            ):  # DeepSpeed casts the weights itself
                loss, _ = net(batch, items)
            total = total + loss.detach().float()
            parallel.backward(
                engine, scaler, loss * training.world_size, micro, steps
            )  # the ranks are averaged
    total = parallel.summed({"loss": total}, training.device)["loss"]
    parallel.refuse_nan(total, step)
    trained = [p for p in net.parameters() if p.requires_grad]
    parallel.update(engine, optimizer, scaler, trained, training.max_grad_norm)
    return total


# 4. What the held-out rows say
@torch.no_grad()
def eval_metrics_of(
    stage: str, objective: Objective, loader: Loader | None, dtype, text_bytes: int
) -> dict:
    """Loss and the stage's other metrics over the held-out rows. All ranks call it."""
    if loader is None:
        return {}
    sums: dict = {}
    objective.eval()
    for batch in loader.all():
        with device.autocast(dtype):
            _, more = objective(batch, 1.0)
        sums = {name: sums.get(name, 0) + value for name, value in more.items()}
    objective.train()
    sums = parallel.summed(sums, loader.where)
    found = STAGES[stage].metrics(sums)
    bits = {"bits_per_byte": sums["nll"] / math.log(2) / text_bytes} if text_bytes else {}
    return {name: value for name, value in (found | bits).items() if value == value}


def answers(args: Args, model, tokenizer, asked: list[str]) -> tuple[dict, list]:
    """Greedy continuations of held-out texts, or answers to held-out questions: (metrics, samples
    to look at)."""
    if not asked or args.stage == "dpo":
        return {}, []
    if args.stage == "pretrain":
        return generate.continue_eval_rows(
            model, tokenizer, asked[:12], min(48, args.max_new_tokens)
        )
    if args.stage == "reason":
        return reason.measure(
            model, tokenizer, [json.loads(row) for row in asked], args.max_new_tokens
        )
    encode = partial(encode_prompt, tokenizer)
    return generate.answer_eval_rows(model, tokenizer, asked, encode, args.max_new_tokens)


# 5. The run
def main() -> None:
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, {})
    base = start_from(args)
    args.teacher = own_model(args.teacher, "--teacher") if args.teacher else ""
    config = None if base in models.SIZES else cli.model_config(base)
    settle(
        args,
        training,
        config.hidden_size if config else args.hidden_size or models.SIZES[base]["hidden_size"],
    )
    device.seed_all(training.seed)
    device.fast_float32()
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    rows, stats = load_rows(
        args.data_path,
        STAGES[args.stage].KIND,
        args.column_map or None,
        args.strict_data,
        seed=training.seed,
    )
    cli.say(summary(stats))
    training.output_dir = training.output_dir or str(OUTPUT / args.stage)
    training.keeps_order = True  # another number of processes goes on at the same row
    settings = asdict(args) | {"base": base, "data": stats["sha256"], "dtype": str(dtype)}
    settings |= {name: getattr(training, name) for name in DEFINING}
    start = run_folder.open_output(training, settings, args.overwrite_output_dir)

    tokenizer = cli.load(AutoTokenizer, tokenizer_of(args, base), "--tokenizer")
    train_ids, eval_ids, held_out = read(args, training, tokenizer, rows, stats)
    parts = loader, held_loader = loaders(args, training, tokenizer, train_ids, eval_ids)
    model = load_model(base, args, training, tokenizer, dtype).to(training.device)
    about = [
        "random" if base in models.SIZES else adapter.base_fingerprint(base),
        stats["sha256"],
        args.eval_ratio,
    ]
    if args.use_lora:
        base = state.keep_base(base, model, tokenizer, training)
        lora.add(model, args.lora_r, args.lora_alpha, args.lora_dropout)
    objective = make_objective(args, training, model, tokenizer, parts, dtype, *about)
    optimizer = optim.make(
        model,
        args.optimizer,
        training.learning_rate,
        training.weight_decay,
        args.muon_lr,
        "fused" in training.optim,
    )
    net, engine = parallel.wrap(objective, optimizer, training, dtype)
    kept = {"optimizer": optimizer, "scaler": device.grad_scaler(dtype)}
    size = (
        pretrain.text_bytes(held_out, eval_ids) if args.stage == "pretrain" and held_loader else 0
    )
    test = partial(eval_metrics_of, args.stage, objective, held_loader, dtype, size)
    asked = generate.pick_eval_rows(held_out, eval_ids, args.eval_generate) if held_loader else []

    def measure() -> dict:
        metrics, samples = answers(args, model, tokenizer, asked)
        return {"metrics": test() | metrics, "samples": samples}

    if start:
        progress = state.read_progress(start)
        state.restore(start, model, kept, engine, training.seed)
    else:
        progress = state.new_progress(measure())
    run, stop = tracking.Run(args, training, progress, model, loader, dtype), SafeStop()
    save = partial(
        state.save, Path(training.output_dir), model, tokenizer, base, kept, progress, engine
    )
    stop.listen()
    objective.train()
    while run.part() < 1 and not run.stopped:
        began, bins = time.time(), run.next_bins()
        part = optim.rate(
            run.part(), training.lr_scheduler_type, training.warmup_steps, args.min_lr_ratio
        )
        lr = optim.set_rate(optimizer, part)
        loss = train_step(
            net, engine, loader, bins, **kept, training=training, dtype=dtype, step=progress["step"]
        )
        run.count(loss, lr, time.time() - began, stop.asked)
        if run.due(training.eval_steps):
            run.note(test())
        if run.stopped or (training.save_strategy != "no" and run.due(training.save_steps)):
            save(run.facts(), training.save_total_limit)
    run.exit_if_stopped()
    final = state.save_final(
        Path(training.output_dir), model, tokenizer, base, run.weight_name(), engine
    )
    if args.use_lora and cli.is_main():
        adapter.remember_base(final, base)
    run.report(HERE.name, base, stats, measure())


if __name__ == "__main__":
    cli.run(main)
