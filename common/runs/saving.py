"""How the trainer's model and checkpoints come to disk: whole, proven, the older ones deleted last.

All ranks call everything here.
"""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from common import callbacks, cli
from common.data.files import atomic_folder
from common.runs import checkpoint
from common.runs.engine import engine


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete once all ranks have written it, then deletes older ones.

    The stock Trainer deletes those before a new one is proven.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.limit = trainer.args.save_total_limit or sys.maxsize
        trainer.args.save_total_limit = None
        self.since = 0.0  # when the last checkpoint began, in seconds since 1970

    def begin(self, folder: str) -> None:
        self.since = time.time()
        if self.trainer.args.should_save and Path(folder).exists():
            # incomplete: a complete one would have been resumed from
            shutil.rmtree(folder)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        cli.wait_for_all("it writes a checkpoint")
        written = time.time()
        known = files_of_all_ranks(folder, args)
        if args.should_save:
            checkpoint.mark_complete(
                folder,
                known,
                step=state.global_step,
                world_size=args.world_size,
                engine=engine(args),
                weights_only=args.save_only_model,
            )
            best = state.best_model_checkpoint
            checkpoint.rotate(args.output_dir, self.limit, state.global_step, best)
        cli.wait_for_all("it checks a checkpoint")
        now = time.time()
        took = callbacks.clock(now - self.since)
        checking = callbacks.clock(now - written)
        cli.say(f"saved {folder.name} in {took}, of which {checking} to check it")


def files_of_all_ranks(folder: Path, args) -> dict[str, dict]:
    """Sizes and checksums of a checkpoint's files, each found by the rank that wrote it."""
    if args.world_size == 1:
        return checkpoint.look_at(folder)
    own = checkpoint.look_at(folder, args.process_index)
    cli.wait_for_all("it checks a checkpoint")
    shares: list = [None] * args.world_size
    dist.all_gather_object(shares, own)
    return {name: facts for share in shares for name, facts in share.items()}


def save_final(trainer, dtype: torch.dtype | None = None) -> Path:
    """Write the model and tokenizer to OUTPUT/final, ready for `from_pretrained`.

    dtype: floating-point type of the stored weights, e.g. that of the base model; None keeps the
    trained one.
    """
    final = Path(trainer.args.output_dir) / "final"
    if dtype is not None and not trainer.is_deepspeed_enabled:
        trainer.model.to(dtype)
    writes = trainer.args.should_save
    with atomic_folder(final) if writes else nullcontext(f"{final}.part") as part:
        cli.wait_for_all("it makes room for the model")
        trainer.save_model(str(part))
        if writes:
            # a pickle nobody needs; run.json has the settings
            (part / "training_args.bin").unlink(missing_ok=True)
            checkpoint.refuse_not_finite(part)
    cli.wait_for_all("it writes the model")
    return final
