"""transformers' Trainer with what a long run needs: exact evaluation, checkpoints that are proven
complete, a stop on NaN and on signals, throughput in tokens.

The loop itself is transformers'. Everything here hangs on its public hooks: methods that it
documents for subclasses (compute_loss, evaluate, log, get_batch_samples, save_model) and the events
of its callbacks (callbacks.py). No method whose name begins with an underscore is overridden.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from common import callbacks, cli, collators, device
from common.convert.older_readers import for_older_readers
from common.data.files import atomic_folder
from common.fast import attention, losses, packing_check
from common.runs import checkpoint, evaluate, generate, memory, plan, report
from common.runs.engine import engine, patch_overflow_check
from common.runs.run_folder import read_run_file, write_run_file

TOTALS = ("total_tokens", "total_label_tokens", "total_samples")
BINS_LOOKED_AT = 8
BEFORE_THE_STEP = "before the optimizer step"
BEFORE_SAVING = "before anything was saved"
SECONDS_FOR_OTHERS = 3  # that a rank leaves to the one whose fault it is to speak first
MOST_SKIPPED = 20  # steps in a row that fp16's scaler may skip


class RecipeTrainer(Trainer):
    """transformers.Trainer for token models.

    Args (beside Trainer's):
        measure: called on every rank before the first step and again by `measure_all`; returns
            extra metrics (exact match ...) and samples [{"prompt", "reference", "answer"}].
        describe_row: row id -> text, used to name the rows of a batch whose loss is not finite.
    The batch may carry `row_ids` (list of ints) and `padding_tokens` (int), tokens of a packed row
    that are none of the data's. Both, and what collators.Counted adds, are taken out before the
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
        self.data_collator = collators.Counted(self.data_collator)
        self.measure = measure
        self.describe_row = describe_row
        self.before: dict = {}  # what measure_all gave before the first step
        self.asks: bool | None = None  # under ZeRO-3: whether there is room to generate

        # the stock filter logs a NaN loss as 0 and goes on
        self.args.logging_nan_inf_filter = False
        self.args.remove_unused_columns = False
        # the stock Trainer deletes older checkpoints before a new one is proven complete
        self.checkpoint_limit = self.args.save_total_limit or sys.maxsize
        self.args.save_total_limit = None

        self.safe_stop = callbacks.SafeStop()
        more = {key: name for key, name in self.plots.items() if key != "loss"}
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        for callback in (
            callbacks.TrainerHooks(self),
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
        self.skipped_in_a_row = 0
        self.saving_since = 0.0  # of the last checkpoint, seconds since 1970
        # of the step that is being computed
        self.norm = 0.0
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
        plan.check_disk(self.model, self.args, self.checkpoint_limit)
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
            more, samples = self.ask()
            metrics |= more
        return {"metrics": metrics, "samples": samples}

    def ask(self) -> tuple[dict, list]:
        """The recipe's own measure, which generates. Under ZeRO-3 each new token gathers all
        weights; here they are gathered once, or, where they do not fit, nothing is asked."""
        if engine(self.args) != "zero-3":
            return self.measure()
        fit = generate.weights_fit(self.model)
        if self.asks is None:
            self.asks = fit or cli.given_by_user("eval_generate")
            if not self.asks:
                need = generate.weight_bytes(self.model) / 2**30
                cli.say(
                    f"no question is asked before and after: all weights ({need:.1f} GiB) do not "
                    "fit the free memory of one device, and would be gathered for each new token. "
                    "--eval_generate 8 asks all the same"
                )
        if not self.asks:
            return {}, []
        with generate.with_whole_weights(self.deepspeed) if fit else nullcontext():
            return self.measure()

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
        inputs = collators.for_model(inputs)
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

    def check_gradients(self) -> None:
        """Stop on a loss or a gradient that is not finite, before the optimizer uses it; in fp16
        the scaler decides about gradients first (check_step).

        DeepSpeed has stepped already when this event comes, so that the weights of this process are
        lost there; nothing of them is saved.
        """
        values = [loss for loss, _ in self.micro_batches]
        norm, items, asked, *found = self.read(self.gradient_norm(), *self.shared, *values)
        self.norm = norm
        self.safe_stop.all_stop = asked > 0
        where = BEFORE_SAVING if self.is_deepspeed_enabled else BEFORE_THE_STEP
        if items == 0:
            self.stop_on_rows("has not a single label to train on", where)
        for loss, (_, row_ids) in zip(found, self.micro_batches, strict=True):
            if not math.isfinite(loss):
                self.row_ids = row_ids
                self.stop_on_rows(f"gave a loss of {loss}", where)
        if not self.args.fp16 and not math.isfinite(norm):
            if self.args.world_size > 1:
                time.sleep(SECONDS_FOR_OTHERS)  # a rank whose loss it comes from ends the run first
            self.stop_on_rows(f"gave a gradient norm of {norm}", where)

    def read(self, *values: torch.Tensor | float) -> list[float]:
        """Numbers that may be on the device, all in one copy."""
        there = [value for value in values if torch.is_tensor(value)]
        numbers = [value.to(self.args.device, torch.float32) for value in there]
        found = iter(torch.stack(numbers).tolist())
        return [next(found) if torch.is_tensor(value) else value for value in values]

    def check_step(self) -> None:
        """fp16: the scaler may skip a step now and then. It tells what a norm does not: a chip that
        saturates overflows to finite numbers."""
        if not self.args.fp16:
            return
        if not self.accelerator.optimizer_step_was_skipped:
            self.skipped_in_a_row = 0
            if not math.isfinite(self.norm):
                self.stop_on_rows(f"gave a gradient norm of {self.norm}", BEFORE_SAVING)
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            self.stop_on_rows(
                f"overflowed fp16 for the {MOST_SKIPPED}th step in a row, so that nothing is "
                "learned any more (use bf16, or a lower learning rate)",
                BEFORE_SAVING,
            )

    def gradient_norm(self) -> torch.Tensor | float:
        """Of the gradients as they are now, clipped: one that is not finite stays so."""
        if self.is_deepspeed_enabled:
            norm = self.deepspeed.get_global_grad_norm()
            return 0.0 if norm is None else norm
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def stop_on_rows(self, what: str, where: str = BEFORE_THE_STEP) -> None:
        """End the run and leave the batch's rows in nan_rows_<rank>.json.

        where: how far the step had come, for people.
        """
        step = self.state.global_step + 1
        path = Path(self.args.output_dir) / f"nan_rows_{self.args.process_index}.json"
        rows = [{"row": i, "source": self.describe_row(int(i))} for i in self.row_ids]
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
            self.saving_since = time.time()
            if self.args.should_save and Path(output_dir).exists():
                # incomplete: a complete one would have been resumed from
                shutil.rmtree(output_dir)
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

    def complete_checkpoint(self) -> None:
        """All ranks have written: each looks at its files, rank 0 marks the checkpoint as complete
        and deletes older ones."""
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        cli.wait_for_all("it writes a checkpoint")
        written = time.time()
        known = self.look_at(folder)
        if self.args.should_save:
            checkpoint.mark_complete(
                folder,
                known,
                step=step,
                world_size=self.args.world_size,
                engine=engine(self.args),
                weights_only=self.args.save_only_model,
            )
            checkpoint.rotate(
                self.args.output_dir,
                self.checkpoint_limit,
                step,
                best=self.state.best_model_checkpoint,
            )
        cli.wait_for_all("it checks a checkpoint")
        now = time.time()
        took = callbacks.clock(now - self.saving_since)
        checking = callbacks.clock(now - written)
        cli.say(f"saved {folder.name} in {took}, of which {checking} to check it")

    def look_at(self, folder: Path) -> dict[str, dict]:
        """Sizes and checksums of a checkpoint's files, each found by the rank that wrote it."""
        if self.args.world_size == 1:
            return checkpoint.look_at(folder)
        own = checkpoint.look_at(folder, self.args.process_index)
        cli.wait_for_all("it checks a checkpoint")
        shares: list = [None] * self.args.world_size
        dist.all_gather_object(shares, own)
        return {name: facts for share in shares for name, facts in share.items()}

    def save_final(self, dtype: torch.dtype | None = None) -> Path:
        """Write the model and tokenizer to OUTPUT/final, ready for `from_pretrained`. All ranks
        call it.

        `dtype`: floating-point type of the stored weights, e.g. that of the base model; None keeps
        the trained one.
        """
        final = Path(self.args.output_dir) / "final"
        if dtype is not None and not self.is_deepspeed_enabled:
            self.model.to(dtype)
        writes = self.args.should_save
        with atomic_folder(final) if writes else nullcontext(f"{final}.part") as part:
            cli.wait_for_all("it makes room for the model")
            self.save_model(str(part))
            if writes:
                # a pickle nobody needs; run.json has the settings
                (part / "training_args.bin").unlink(missing_ok=True)
                checkpoint.refuse_not_finite(part)
        cli.wait_for_all("it writes the model")
        return final

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
        history = self.state.log_history
        last = next((entry for entry in reversed(history) if "total_tokens" in entry), {})
        facts = report.facts(
            recipe=recipe,
            model_name=model_name,
            model=self.model,
            training=self.args,
            rows=rows,
            steps=self.state.global_step,
            tokens=int(last.get("total_tokens", 0)),
            label_tokens=int(last.get("total_label_tokens", 0)),
            seconds=last.get("train_seconds", 0.0),
            losses=[entry["loss"] for entry in history if "loss" in entry],
            before=self.before,
            after=after,
            peaks=[e["epoch_peak_memory_mb"] for e in history if "epoch_peak_memory_mb" in e],
        )
        if not self.is_world_process_zero():
            return
        out = Path(self.args.output_dir)
        samples = report.before_and_after(self.before.get("samples", []), after["samples"])
        table = report.write_report(out, facts, history, samples, self.plots)
        self.state.save_to_json(str(out / "trainer_state.json"))
        # last, since it says that nothing is missing
        write_run_file(out, read_run_file(out) | {"step": self.state.global_step})
        print(
            f"\n{table}\n\nmodel   {out / 'final'}\n"
            f"report  {out / 'report.md'}, {out / 'loss.png'}",
            flush=True,
        )

    def compute_dtype(self) -> str:
        return str(device.train_dtype(self.args)).removeprefix("torch.")
