"""A run ends on a loss or a gradient that is not finite, and on a step without a label, before it
has spoilt anything; the rows of the batch are named."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

BEFORE_THE_STEP = "before the optimizer step"
BEFORE_SAVING = "before anything was saved"
SECONDS_FOR_OTHERS = 3  # that a rank leaves to the one whose fault it is to speak first
MOST_SKIPPED = 20  # steps in a row that fp16's scaler may skip


class FiniteSteps(TrainerCallback):
    """Reads the trainer's losses of a step, the norm of its gradients and what it shares with other
    ranks, in the one copy from the device that a step has.

    In fp16 the scaler decides about gradients: it may skip a step now and then.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.norm = 0.0  # of the gradients, before they are clipped
        self.skipped_in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """DeepSpeed has stepped already when this event comes, so that the weights of this process
        are lost there; nothing of them is saved."""
        trainer = self.trainer
        values = [loss for loss, _ in trainer.micro_batches]
        norm, items, asked, *found = self.read(self.gradient_norm(), *trainer.shared, *values)
        self.norm = norm
        trainer.safe_stop.all_stop = asked > 0
        where = BEFORE_SAVING if trainer.is_deepspeed_enabled else BEFORE_THE_STEP
        if items == 0:
            self.stop("has not a single label to train on", where)
        for loss, (_, row_ids) in zip(found, trainer.micro_batches, strict=True):
            if not math.isfinite(loss):
                self.stop(f"gave a loss of {loss}", where, row_ids)
        if not args.fp16 and not math.isfinite(norm):
            if args.world_size > 1:
                time.sleep(SECONDS_FOR_OTHERS)  # a rank whose loss it comes from ends the run first
            self.stop(f"gave a gradient norm of {norm}", where)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """The scaler tells what a norm does not: a chip that saturates overflows to finite
        numbers."""
        if not args.fp16:
            return
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.skipped_in_a_row = 0
            if not math.isfinite(self.norm):
                self.stop(f"gave a gradient norm of {self.norm}", BEFORE_SAVING)
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            self.stop(
                f"overflowed fp16 for the {MOST_SKIPPED}th step in a row, so that nothing is "
                "learned any more (use bf16, or a lower learning rate)",
                BEFORE_SAVING,
            )

    def read(self, *values: torch.Tensor | float) -> list[float]:
        """Numbers that may be on the device, all in one copy."""
        there = [value for value in values if torch.is_tensor(value)]
        numbers = [value.to(self.trainer.args.device, torch.float32) for value in there]
        found = iter(torch.stack(numbers).tolist())
        return [next(found) if torch.is_tensor(value) else value for value in values]

    def gradient_norm(self) -> torch.Tensor | float:
        """Of the gradients as they are now, clipped: one that is not finite stays so."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            norm = trainer.deepspeed.get_global_grad_norm()
            return 0.0 if norm is None else norm
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def stop(self, what: str, where: str, row_ids: list[int] | None = None) -> None:
        """End the run and leave the rows in nan_rows_<rank>.json.

        where: how far the step had come, for people.
        row_ids: of one micro-batch; None: those of the whole step.
        """
        trainer = self.trainer
        row_ids = trainer.row_ids if row_ids is None else row_ids
        step = trainer.state.global_step + 1
        path = Path(trainer.args.output_dir) / f"nan_rows_{trainer.args.process_index}.json"
        rows = [{"row": i, "source": trainer.describe_row(int(i))} for i in row_ids]
        found = {"step": step, "problem": what, "rows": rows}
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        shown = ", ".join(row["source"] for row in rows[:3]) or "unknown rows"
        print(
            f"error: step {step}: a batch {what}; stopped {where}. "
            f"Its {len(rows)} rows ({shown} ...) are in {path}; checkpoints so far are sound",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1)
