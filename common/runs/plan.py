"""What a run says before its first step."""

from __future__ import annotations

import shutil
import sys

from common import cli, device
from common.runs import report
from common.runs.engine import engine


def say(trainer) -> None:
    """What is about to happen, in two lines."""
    args = trainer.args
    counted = report.parameters(trainer.model)
    share = counted["trained"] / counted["total"]
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    saved = f"{args.save_steps:g} steps" if strategy == "steps" else strategy
    cli.say(
        f"model: {counted['total']:,} parameters, {counted['trained']:,} trained ({share:.0%}); "
        f"{engine(args)} x {args.world_size} on {device.name()}, {trainer.compute_dtype()}\n"
        f"steps: {trainer.state.max_steps:,} of {batch} items ({len(trainer.train_dataset):,} "
        f"items an epoch), logged every {args.logging_steps:g} steps, saved every {saved} "
        f"to {args.output_dir}"
    )


def check_disk(model, args, limit: int) -> None:
    """Warn when `limit` checkpoints and one more will not fit (weights, fp32 masters, two moments:
    16 bytes per trained parameter)."""
    if args.process_index or args.save_strategy == "no":
        return
    kept = 3 if limit == sys.maxsize else limit
    need = 16 * report.parameters(model)["trained"] * (kept + 1) / 2**30
    free = shutil.disk_usage(args.output_dir).free / 2**30
    if free < need:
        cli.say(
            f"warning: {free:.1f} GiB free at {args.output_dir}, about {need:.1f} GiB needed for "
            "checkpoints; lower --save_total_limit or choose another OUTPUT"
        )
