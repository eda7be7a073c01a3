"""transformers' Trainer with what a long run needs: exact evaluation, checkpoints that are proven
complete, a stop on NaN and on signals, throughput in tokens.

The loop itself is transformers'. Everything here hangs on its public hooks: methods that it
documents for subclasses (compute_loss, evaluate, log, get_batch_samples, save_model) and the events
of its callbacks (callbacks.py; runs/finite.py stops on losses that are not finite, runs/saving.py
completes checkpoints). No method whose name begins with an underscore is overridden.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from common import callbacks, cli, collators, device
from common.convert.older_readers import for_older_readers
from common.data import counts
from common.fast import attention, losses, packing_check
from common.runs import evaluate, finite, generate, memory, plan, report, saving
from common.runs.engine import engine, patch_overflow_check
from common.runs.run_folder import read_run_file, write_run_file

TOTALS = ("total_tokens", "total_label_tokens", "total_samples")
BINS_LOOKED_AT = 8


class RecipeTrainer(Trainer):
    """transformers.Trainer for token models.

    Args (beside Trainer's):
        measure: called on every rank before the first step and again by `measure_all`; returns
            extra metrics (exact match ...) and samples [{"prompt", "reference", "answer"}].
        describe_row: row id -> text, used to name the rows of a batch whose loss is not finite.
    The batch may carry `row_ids` (list of ints) and `padding_tokens` (int), tokens of a packed row
    that are none of the data's. Both, and what counts.Counted adds, are taken out before the
    model sees the batch.

    Nothing is read from the device in a micro-batch, and once in an optimizer step: the norm of the
    gradients, the losses and whether a rank was asked to stop, together.
    """

    plots = report.PLOTS  # what the report draws: name of the logged value -> what its axis says

    def __init__(
        self,
        *args,
        measure: Callable[[], tuple[dict, list]] | None = None,
        describe_row: Callable[[int], str] = str,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        plan.refuse_no_steps(self.args, len(self.train_dataset))
        self.is_packed = isinstance(self.data_collator, collators.PackedCollator)
        if self.is_packed:
            attention.refuse_unpackable(self.model)
        self.data_collator = counts.Counted(self.data_collator)
        self.measure = measure
        self.describe_row = describe_row
        self.asking = generate.Asking(self)
        self.before: dict = {}  # what measure_all gave before the first step

        # the stock filter logs a NaN loss as 0 and goes on
        self.args.logging_nan_inf_filter = False
        self.args.remove_unused_columns = False

        self.safe_stop = callbacks.SafeStop()
        self.checkpoints = saving.CompleteCheckpoints(self)
        more = {key: name for key, name in self.plots.items() if key != "loss"}
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        for callback in (
            callbacks.TrainerHooks(self),
            finite.FiniteSteps(self),
            self.checkpoints,
            callbacks.ProgressLine(more),
            evaluate.HeldOutCurve(self),
            self.safe_stop,
            callbacks.LogWithCheckpoint(),  # after all that may ask for a checkpoint
        ):
            self.add_callback(callback)

        # batches come from pinned memory, so that their copies need not wait for the device
        self.accelerator.dataloader_config.non_blocking = self.args.dataloader_pin_memory
        self.takes_label_index = losses.is_chunked(self.model)

        self.counts = [0, 0, 0]  # of this rank, in the order of TOTALS
        # of the step that is being computed
        self.row_ids: list[int] = []
        self.micro_batches: list[tuple[torch.Tensor, list[int]]] = []  # loss and row ids of each
        self.shared = torch.tensor([1, 0])  # sums over ranks: items, how many were asked to stop

    # ---- before the first step ----
    def before_first_step(self) -> None:
        """The model is wrapped and a checkpoint loaded: measure, check the disk, say the plan."""
        self.first_step = self.state.global_step
        resumed = self.first_step > 0
        self.before_measuring()
        if self.is_packed:
            packing_check.refuse_leaks(self, self.some_rows())

        run = read_run_file(self.args.output_dir)
        if resumed and run.get("before"):
            self.before = run["before"]
        else:
            self.before = self.measure_all()
            if self.args.should_save:
                write_run_file(self.args.output_dir, run | {"before": self.before})

        # a resumed state would keep the old save_steps and logging_steps
        self.state.compute_steps(self.args, self.state.max_steps)
        self.past = dict.fromkeys((*TOTALS, "train_seconds"), 0)
        for entry in self.state.log_history:
            if "total_tokens" in entry:
                self.past = {name: entry[name] for name in self.past}

        if self.is_deepspeed_enabled and self.args.fp16:
            patch_overflow_check(self.deepspeed.optimizer)
        plan.check_disk(self.model, self.args, self.checkpoints.limit)
        plan.say(self)
        self.started = time.time()
        self.safe_stop.listen(self.args.world_size)

    def before_measuring(self) -> None:
        """For subclasses: the model is wrapped (DDP, DeepSpeed), a checkpoint is loaded, nothing is
        measured yet."""

    def some_rows(self) -> list[dict]:
        """Rows of the first bins, for the check of packing."""
        bins = [self.train_dataset[i] for i in range(min(BINS_LOOKED_AT, len(self.train_dataset)))]
        return [row for one in bins for row in one]

    def measure_all(self) -> dict:
        """evaluate() and the recipe's own measure: {"metrics": {...}, "samples": [...]}. Call on
        every rank."""
        metrics = self.evaluate(quiet=True) if self.eval_dataset else {}
        metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        samples = []
        if self.measure:
            more, samples = self.asking.ask(self.measure)
            metrics |= more
        return {"metrics": metrics, "samples": samples}

    # ---- one step ----
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:
            # resumed from the last step: only final/ was missing
            self.control.should_training_stop = True
            return [], None
        samples = list(itertools.islice(epoch_iterator, num_batches))
        for batch in samples:
            found = (batch["tokens"], batch["label_tokens"], len(batch.get("row_ids", [])))
            self.counts = [a + b for a, b in zip(self.counts, found, strict=True)]
        self.row_ids = [i for batch in samples for i in batch.get("row_ids", [])]
        self.micro_batches = []
        return samples, self.share_items(self.count_items(samples), device)

    def count_items(self, samples: list[dict]) -> int:
        """What the loss of a step is divided by, in this rank's micro-batches: label tokens."""
        return sum(batch["label_tokens"] for batch in samples)

    def share_items(self, own: int, device: torch.device) -> torch.Tensor | None:
        """The items of a step, of all ranks, on the device; None for a model that does not divide
        by them. The same all-reduce tells whether a rank was asked to stop."""
        self.shared = torch.full((2,), own, device=device)
        self.shared[1] = int(self.safe_stop.asked > 0)
        if self.args.world_size > 1:
            dist.all_reduce(self.shared)
        if not (self.model_accepts_loss_kwargs or self.loss_is_scaled_for_ga):
            return None
        if self.args.average_tokens_across_devices or self.loss_is_scaled_for_ga:
            return self.shared[0]
        return torch.full((), own, device=device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        row_ids = inputs.get("row_ids", [])
        inputs = counts.for_model(inputs)
        if not self.takes_label_index:
            inputs.pop("label_index", None)
        result = self.loss_of(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            loss = result[0] if return_outputs else result
            self.micro_batches.append((loss.detach().mean(), row_ids))
        return result

    def loss_of(self, model, inputs, return_outputs, num_items_in_batch):
        """For subclasses with a loss of their own: what the model takes -> loss, or (loss,
        outputs)."""
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def floating_point_ops(self, inputs):
        # the stock estimate counts padded tokens; tokens per second are reported instead
        return 0

    def after_epoch(self) -> None:
        if self.state.global_step > self.first_step:
            self.log({"epoch_peak_memory_mb": round(memory.next_peak_mb(), 1)})

    # ---- logging ----
    def totals(self) -> dict:
        """Tokens, label tokens and samples of all ranks, and seconds; without the part before a
        resume. All ranks call it."""
        counts = torch.tensor(self.counts, device=self.args.device)
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        return dict(zip(TOTALS, counts.tolist(), strict=True)) | {
            "train_seconds": time.time() - self.started
        }

    def log(self, logs, start_time=None):
        if "loss" in logs:
            now = self.totals()
            seconds = max(1e-9, now["train_seconds"])
            steps = max(1, self.state.global_step - self.first_step)
            left = self.state.max_steps - self.state.global_step
            for name in TOTALS:
                logs[f"{name.removeprefix('total_')}_per_second"] = now[name] / seconds
            for name, before in self.past.items():
                logs[name] = before + now[name]
            logs["memory_mb"] = memory.peak_mb()
            logs["seconds_left"] = seconds / steps * left
            self.add_to_log(logs)
        super().log(logs, start_time)

    def add_to_log(self, logs: dict) -> None:
        """For subclasses: more values beside the training loss. All ranks call it."""

    # ---- evaluation ----
    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", quiet=False
    ) -> dict[str, float]:
        """Token-weighted loss, perplexity and token accuracy, each row counted once whatever the
        number of ranks (the stock evaluation repeats rows of uneven ranks). All ranks call it."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if not data:
            raise SystemExit(
                "nothing is held out to evaluate on: raise --eval_ratio, or --eval_strategy no"
            )
        found = self.eval_metrics(evaluate.sum_over_rows(self, data).tolist())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        if not quiet:
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            said = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            cli.say(f"  held out: {said}")
        return metrics

    def eval_sums(self, model, inputs) -> torch.Tensor:
        """One batch -> what is summed over batches and ranks, fp32 [n]; 0 for a batch without a
        label. The model is one under losses.use_chunked_loss."""
        return losses.loss_counts(model(**inputs))

    def eval_metrics(self, sums: list[float]) -> dict[str, float]:
        """The sums over the held-out set -> metrics."""
        loss_sum, correct, labels = sums
        labels = max(1, labels)
        loss = loss_sum / labels
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 50)),
            "token_accuracy": correct / labels,
        }

    # ---- checkpoints ----
    def save_model(self, output_dir=None, _internal_call=False):
        if _internal_call:  # a checkpoint begins
            self.checkpoints.begin(output_dir)
        if self.processing_class is not None and hasattr(self.model, "generation_config"):
            generate.remember_ends(self.model, self.processing_class)
        cli.wait_for_all("it writes the model")
        if engine(self.args) not in ("zero-0", "zero-1", "zero-2"):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            # the weights are whole on each rank; the stock way clones them, which unties tied
            # embeddings
            self.model.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)
        if self.args.should_save:
            for_older_readers(output_dir)
        # what comes next may be a collective, DeepSpeed's own part of a checkpoint
        cli.wait_for_all("it writes the model")

    def save_final(self, dtype: torch.dtype | None = None) -> Path:
        """Write the model and tokenizer to OUTPUT/final (saving.save_final). All ranks call it."""
        return saving.save_final(self, dtype)

    # ---- the end ----
    def exit_if_stopped(self) -> None:
        """After train(): when a signal ended it early, say how to continue and exit with 75; when
        it ended before its last step by itself, that is an error."""
        if self.safe_stop.stopped:
            cli.say(
                f"interrupted at step {self.state.global_step} of {self.state.max_steps}, saved. "
                f"Continue with:\n  {cli.resume_command()}"
            )
            raise SystemExit(cli.INTERRUPTED)
        step = self.state.global_step
        asked = self.control.should_training_stop and step > self.first_step  # by a callback
        if step < self.state.max_steps and not asked:
            raise SystemExit(
                f"the run ended at step {step} of the {self.state.max_steps} it announced: the "
                "data gave fewer batches. Checkpoints so far are sound; nothing else was saved"
            )

    def report(self, recipe: str, model_name: str, rows: dict, after: dict) -> None:
        """Write loss.png, report.md and report.json (rank 0) and print the before/after table with
        the next commands.

        Args:
            rows: counts of the data: read, used, dropped {reason: n}, ...
            after: what `measure_all` gave after training.
        """
        report.write_training_report(
            self, recipe=recipe, model_name=model_name, rows=rows, after=after
        )

    def compute_dtype(self) -> str:
        return str(device.train_dtype(self.args)).removeprefix("torch.")
