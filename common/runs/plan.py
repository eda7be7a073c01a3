"""What a run says before its first step."""

from __future__ import annotations

import shutil
import sys

from common import cli, device
from common.runs import report
from common.runs.engine import engine


def refuse_no_steps(args, items: int) -> None:
    """An error for a run whose epochs have not one step: fewer items (rows or packed windows) than
    a batch, where incomplete batches are dropped."""
    size = args.train_batch_size * args.world_size
    if items < size and (args.dataloader_drop_last or not items):
        raise SystemExit(
            f"not one step can be taken: {items} items (rows, or windows of packed rows) are fewer "
            f"than the {size} of a step's first batch, and --dataloader_drop_last leaves "
            "incomplete ones out. Leave it away, or lower --per_device_train_batch_size"
        )


def say(trainer) -> None:
    """What is about to happen, in two lines."""
    args = trainer.args
    counted = report.parameters(trainer.model)
    share = counted["trained"] / counted["total"]
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    every = f"{args.save_steps:g} steps" if strategy == "steps" else strategy
    saved = "no checkpoints, the end" if strategy == "no" else f"saved every {every}"
    cli.say(
        f"model: {counted['total']:,} parameters, {counted['trained']:,} trained ({share:.0%}); "
        f"{engine(args)} x {args.world_size} on {device.name()}, {trainer.compute_dtype()}\n"
        f"steps: {trainer.state.max_steps:,} of {batch} items ({len(trainer.train_dataset):,} "
        f"items an epoch), logged every {args.logging_steps:g} steps, {saved} "
        f"to {args.output_dir}"
    )
    warmup = args.get_warmup_steps(trainer.state.max_steps)
    if warmup >= trainer.state.max_steps:
        cli.say(
            f"warning: the warm-up takes {warmup} steps and the run {trainer.state.max_steps}: the "
            "learning rate never reaches its peak"
        )
    if trainer.state.global_step > trainer.state.max_steps:
        cli.say(
            f"warning: the checkpoint's step {trainer.state.global_step} is beyond the end of "
            "this run: nothing is trained"
        )


def check_disk(model, args, limit: int) -> None:
    """Warn when `limit` checkpoints and one more will not fit (weights, fp32 masters, two moments:
    16 bytes per trained parameter)."""
    if not cli.is_main() or args.save_strategy == "no":
        return
    kept = 3 if limit == sys.maxsize else limit
    remedy = "lower --save_total_limit or " if kept > 1 else ""
    need = 16 * report.parameters(model)["trained"] * (kept + 1) / 2**30
    free = shutil.disk_usage(args.output_dir).free / 2**30
    if free < need:
        cli.say(
            f"warning: {free:.1f} GiB free at {args.output_dir}, about {need:.1f} GiB needed for "
            f"checkpoints; {remedy}choose another OUTPUT"
        )
