"""A language model from nothing, stage by stage: pretrain, mid, sft, lora, dpo, distill, reason.
Plain PyTorch.

    bash minimind_npu/run_all.sh                     # all stages on the built-in data, some minutes
    DATA=my.jsonl bash minimind_npu/train_zero2.sh --stage pretrain --size 26m
    DATA=my.jsonl bash minimind_npu/train_ddp.sh --depth 12 --tokenizer output/tokenizer
    NPROC=8 bash minimind_npu/train_npu.sh --stage sft --from_weight pretrain --data_path sft.jsonl

Rows, loss and metrics of a stage: stages/; flags: settings.py; batches, processes, checkpoints and
the lines people see: loop/. Order of the story: data -> objective -> one step -> what the held-out
rows say -> the run. A batch of one process is B windows of T tokens.
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
from common import cli, device  # before torch and transformers
from common.convert import models

import torch
from torch import nn
from transformers import AutoTokenizer

import weights
from loop import optim, parallel, state, tracking
from loop.batches import Loader, Order, Plan, TokenRows
from model import SparseFeedForward
from named import tokenizer_of
from road import dial, mixture
from stages import distill, dpo, lora, mid, pretrain, reason, sft
from settings import DEFINING, Args, parse_args
from common.callbacks import SafeStop
from common.data.labels import encode_prompt, fingerprint, preview
from common.data.load import summary
from common.data.prepare import Prepared, prepare
from common.data.progress import Progress
from common.runs import generate, run_folder

STAGES = {
    "pretrain": pretrain,
    "mid": mid,
    "sft": sft,
    "lora": lora,
    "dpo": dpo,
    "distill": distill,
    "reason": reason,
}


# 1. Data
def load_tokenizer(args: Args, base: str):
    """SystemExit where the model of the folder `base` has no room for all its tokens."""
    tokenizer = models.load(AutoTokenizer, tokenizer_of(args, base), "--tokenizer")
    if Path(base).is_dir():
        models.check_vocabulary(tokenizer, models.model_config(base), base)
    return tokenizer


def open_run(args: Args, training, base: str, tokenizer) -> tuple:
    """-> (rows, their counts, the checkpoint to continue from or None). The process ends here when
    the output folder is another run's, or this run is finished."""
    stage = STAGES[args.stage]
    columns = args.column_map or None
    strict = args.strict_data
    texts = args.stage == "mid"
    rows, stats = mixture.load(args.data_path, stage.KIND, columns, strict, training.seed, texts)
    cli.say(summary(stats))
    dtype = device.train_dtype(training)
    settings = asdict(args) | {"base": base, "data": stats["sha256"], "dtype": str(dtype)}
    settings |= {name: getattr(training, name) for name in DEFINING}
    start = run_folder.open_output(training, settings, args.overwrite_output_dir, True, tokenizer)
    return rows, stats, start


def read(args: Args, training, tokenizer, rows, stats: dict) -> Prepared:
    """Rows -> memory-mapped token rows to train and to evaluate on, and the latter as they were
    read; completes the counts."""
    stage = STAGES[args.stage]
    encode = partial(stage.encode, tokenizer=tokenizer, max_length=args.model_max_length)
    depends_on = [fingerprint(tokenizer)]
    data = prepare(rows, stats, encode, args, stage.KIND, training.seed, depends_on, stage.COLUMNS)
    first = data.train_ids[0]
    ids = first[stage.COLUMNS[0]][:200]
    labels = first[stage.COLUMNS[1]][:200] if len(stage.COLUMNS) > 1 else ids
    cli.say(f"first row: {preview(tokenizer, ids, labels, color=sys.stdout.isatty())}")
    return data


def make_loader(args: Args, training, tokenizer, token_rows) -> Loader | None:
    """The batches of this process; None where there are no rows."""
    if not len(token_rows):
        return None
    rows = TokenRows(token_rows, STAGES[args.stage].COLUMNS)
    return Loader(
        rows,
        Order(rows, args.model_max_length, training.seed),
        windows=training.per_device_train_batch_size,
        max_length=args.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        where=training.device,
        rank=training.process_index,
        world=training.world_size,
        pairs=args.stage == "dpo",
    )


# 2. What the model is trained on
class Objective(nn.Module):
    """The model and its loss as one module: DistributedDataParallel and DeepSpeed see every
    forward.

    settings: what `loss` takes beside model, batch and denominator; a teacher among them is no part
        of this module.
    """

    def __init__(self, model, loss, **settings):
        super().__init__()
        self.model = model
        self.loss = loss
        self.settings = settings

    def forward(self, batch: dict, denominator: float):
        return self.loss(self.model, batch, denominator, **self.settings)


def make_objective(args: Args, training, model, tokenizer) -> Objective:
    settings = {}
    if args.stage == "dpo":
        settings = {"beta": args.beta}
    elif args.stage == "reason":
        tags = torch.tensor(reason.tag_ids(tokenizer))
        settings = {"tags": tags, "think_weight": args.think_weight}
    elif args.stage == "distill":
        teacher = weights.load_teacher(args.teacher, training, tokenizer)
        settings = {"teacher": teacher, "alpha": args.alpha, "temperature": args.temperature}
    return Objective(model, STAGES[args.stage].loss, **settings)


def make_optimizer(args: Args, training, model):
    return optim.make(
        model,
        args.optimizer,
        training.learning_rate,
        training.weight_decay,
        args.muon_lr,
        fused="fused" in training.optim,
        head_lr=args.head_lr,
        decays_tables=not args.depth,
        iteration="polar_express" if args.depth else "newton_schulz",
    )


# 3. One step
def train_step(
    net, engine, loader: Loader, bins: list, optimizer, scaler, training, gradients, step: int
) -> float:
    """One update; returns the loss: a sum over the labels of all ranks and micro-batches / their
    number, so that neither the number of processes nor accumulation changes it.

    net, engine: see parallel.wrap; gradients: parallel.Gradients; bins: of the step and all ranks.
    """
    denominator = loader.loss_denominator(bins)
    steps = training.gradient_accumulation_steps
    # DeepSpeed casts the weights itself
    dtype = torch.float32 if engine else device.train_dtype(training)
    total = 0.0
    # one for all: it keeps the weights it has cast until its end (compiled layers have their own)
    with device.autocast(dtype):
        for micro in range(steps):
            batch = loader.batch(bins, micro)
            with parallel.sync_in_last(net, micro, steps):
                loss, _ = net(batch, denominator)
                total = total + loss.detach().float()
                with device.autocast(torch.float32):  # off
                    # the gradients of the ranks are averaged
                    parallel.backward(engine, scaler, loss * training.world_size, micro, steps)
    total = parallel.summed({"loss": total}, training.device)["loss"]
    parallel.refuse_nan(total, step)
    trained = [p for p in net.parameters() if p.requires_grad]
    refuse = partial(gradients.refuse, step=step)
    parallel.update(engine, optimizer, scaler, trained, training.max_grad_norm, refuse)
    return total


def lr_of(args: Args, training, optimizer, fraction_done: float) -> float:
    """Set the learning rate for this point of the run; returns it."""
    kind = training.lr_scheduler_type
    warmup = training.warmup_steps
    return optim.set_lr(optimizer, optim.lr_scale(fraction_done, kind, warmup, args.min_lr_ratio))


# 4. What the held-out rows say
@torch.no_grad()
def eval_metrics(
    args: Args, objective: Objective, loader: Loader | None, data: Prepared, dtype, bins=None
) -> dict:
    """Loss and the stage's other metrics over the held-out rows. All ranks call it.

    bins: some of loader's; unset all of them, which also gives the bits per byte of texts.
    """
    if loader is None:
        return {}
    batches = math.ceil(len(bins or loader.order) / (loader.windows * loader.world))
    sums: dict = {}
    objective.eval()
    with Progress("evaluate", total=batches, unit="batches") as progress:
        for batch in loader.all(bins):
            with device.autocast(dtype):
                _, more = objective(batch, 1.0)
            sums = {name: sums.get(name, 0) + value for name, value in more.items()}
            progress.update(1)
    objective.train()
    sums = parallel.summed(sums, loader.where)
    metrics = STAGES[args.stage].metrics(sums)
    if args.stage == "pretrain" and bins is None:
        size = pretrain.text_bytes(data.eval_rows, data.eval_ids)
        metrics["bits_per_byte"] = sums["nll"] / math.log(2) / size
    return metrics


def answers(args: Args, model, tokenizer, rows: list[str]) -> tuple[dict, list]:
    """Greedy continuations of held-out texts, or answers to held-out questions: (metrics, samples
    to look at)."""
    if not rows or args.stage == "dpo":
        return {}, []
    if args.stage == "pretrain":
        longest = min(48, args.max_new_tokens)
        texts = [pretrain.first_document(row) for row in rows[:12]]
        start = [tokenizer.bos_token_id]
        return generate.continue_eval_rows(model, tokenizer, texts, longest, start=start)
    if args.stage == "reason":
        loaded = [json.loads(row) for row in rows]
        return reason.measure(model, tokenizer, loaded, args.max_new_tokens)
    encode = partial(encode_prompt, tokenizer)
    return generate.answer_eval_rows(model, tokenizer, rows, encode, args.max_new_tokens)


def measure(args: Args, model, tokenizer, data: Prepared, evaluate) -> dict:
    """Before the first step and after the last: {"metrics", "samples"}. All ranks call it."""
    asked = mid.conversations(data.eval_rows) if args.stage == "mid" else data.eval_rows
    rows = generate.pick_eval_rows(asked, data.eval_ids, args.eval_generate)
    metrics, samples = answers(args, model, tokenizer, rows)
    return {"metrics": evaluate() | metrics, "samples": samples}


# 5. The run
def main() -> None:
    args, training, base = parse_args()
    device.seed_all(training.seed)
    dtype = device.train_dtype(training)
    tokenizer = load_tokenizer(args, base)
    dial.turn(args, training, len(tokenizer))
    weights.fit_batch(base, args, training, tokenizer)
    rows, stats, start = open_run(args, training, base, tokenizer)

    data = read(args, training, tokenizer, rows, stats)
    loader = make_loader(args, training, tokenizer, data.train_ids)
    eval_loader = make_loader(args, training, tokenizer, data.eval_ids)

    model = weights.load_model(base, args, training, tokenizer)
    adapter_of = ""
    if args.use_lora:
        adapter_of = weights.add_adapter(model, base, args, training, tokenizer)
    objective = make_objective(args, training, model, tokenizer)
    loaders = {"train": loader, "eval": eval_loader}
    computed_from = f"{weights.fingerprint(base)} {stats['sha256']}"
    dpo.add_references(args, training, model, loaders, computed_from)

    optimizer = make_optimizer(args, training, model)
    net, engine = parallel.wrap(objective, optimizer, training, dtype, [SparseFeedForward])
    stateful = {"optimizer": optimizer, "scaler": device.grad_scaler(dtype)}
    write_model = partial(weights.write_model, model, tokenizer, engine, adapter_of)

    evaluate = partial(eval_metrics, args, objective, eval_loader, data, dtype)
    measured = partial(measure, args, model, tokenizer, data, evaluate)
    if start:
        progress = state.read_progress(start)
        state.restore(start, model, stateful, engine, training.seed, lora.PREFIX)
    else:
        progress = state.new_progress(measured())

    plan = Plan(loader, training, progress, args.max_minutes)
    run = tracking.Run(training, progress, model, dtype, plan, vars(args))
    curve = tracking.Curve(training.eval_steps, run, eval_loader, plan.windows(), evaluate)
    how = {"training": training, "gradients": parallel.Gradients(dtype), **stateful}
    stop = SafeStop()
    stop.listen()
    objective.train()
    while plan.fraction_done() < 1 and not run.stopped:
        began = time.time()
        bins = plan.next_bins()
        lr = lr_of(args, training, optimizer, plan.fraction_done())
        loss = train_step(net, engine, loader, bins, **how, step=progress["step"])
        seconds = plan.agreed(time.time() - began)
        run.count(loss, lr, seconds, loader.tokens(bins), loader.label_tokens(bins))
        run.stop_if(stop.asked)
        curve.step()
        if run.save_is_due():
            state.save(training, write_model, stateful, engine, progress)
    run.exit_if_stopped()
    stop.training_is_done()
    final = state.save_final(training.output_dir, write_model)
    weights.complete_final(final, args.stage, model.config, adapter_of)
    run.report(HERE.name, adapter_of or base, stats, measured(), stage=args.stage)


if __name__ == "__main__":
    cli.run(main)
