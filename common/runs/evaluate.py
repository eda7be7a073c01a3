"""The held-out rows: every one counted once on every engine, and a curve of them along a run."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback

from common import cli
from common.data.counts import for_model, without_labels
from common.data.progress import Progress

CURVE_POINTS = 10  # measurements along a run ...
CURVE_COST = 0.05  # ... and the share of the training's work that they may take


@torch.no_grad()
def sum_over_rows(trainer, data) -> torch.Tensor:
    """trainer.eval_sums over all rows of `data` and all ranks, fp32 [n]. All ranks call it.

    Every rank makes as many forwards, which ZeRO-3 and DDP need: one that has no row left repeats a
    batch without its labels.
    """
    args = trainer.args
    mine = list(range(args.process_index, len(data), args.world_size))
    rounds = math.ceil(math.ceil(len(data) / args.world_size) / args.per_device_eval_batch_size)
    # a generator of its own: the loader would draw from the global one, and resume would not be
    # exact
    loader = DataLoader(
        Subset(data, mine or [0]),
        args.per_device_eval_batch_size,
        collate_fn=trainer.data_collator,
        generator=torch.Generator(),
    )
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    sums = torch.zeros((), device=args.device)
    batches = iter(loader)
    batch = None
    with Progress("evaluate", total=rounds, unit="batches") as progress:
        for _ in range(rounds):
            following = next(batches, None)
            batch = following or batch
            if following is None or not mine:
                batch = without_labels(batch)
            inputs = for_model(send_to_device(batch, args.device))
            with trainer.compute_loss_context_manager():
                sums = sums + trainer.eval_sums(model, inputs)
            progress.update(1)
    model.train(was_training)
    if args.world_size > 1:
        cli.wait_for_all("it evaluates")
        dist.all_reduce(sums)
    return sums


class HeldOutCurve(TrainerCallback):
    """About ten measurements along the run, on so many held-out rows as cost 5 % of the training (a
    forward is a third of a step); none where --eval_strategy asks for its own."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.rows = None

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
        if strategy != "no" or not trainer.eval_dataset:
            return
        self.every = max(1, round(state.max_steps / CURVE_POINTS))
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        affordable = 3 * CURVE_COST * state.max_steps * per_step / (CURVE_POINTS + 1)
        least = args.per_device_eval_batch_size * args.world_size
        count = min(len(trainer.eval_dataset), max(least, int(affordable)))
        spread = torch.linspace(0, len(trainer.eval_dataset) - 1, count).round().int().tolist()
        self.rows = Subset(trainer.eval_dataset, spread)
        if state.global_step == 0:
            self.measure()

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps
        if self.rows and (state.global_step % self.every == 0 or last):
            asked = control.should_log
            self.measure()
            control.should_log = asked  # transformers clears it with every log

    def measure(self) -> None:
        began = time.time()
        self.trainer.log(self.trainer.evaluate(self.rows, quiet=True))
        self.trainer.started += time.time() - began  # speed is that of the training
