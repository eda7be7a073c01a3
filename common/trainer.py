"""The HF Trainer with what a long run needs: token-weighted evaluation, validated checkpoints, a
stop on NaN, a safe stop on signals, throughput in tokens. The training loop itself stays
transformers'."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from common import cli, device
from common.callbacks import Progress, SafeStop
from common.collators import PackedCollator
from common.fast import attention
from common.runs import checkpoint, report
from common.runs.run_folder import RUN_FILE, engine, write_run_file

IGNORE = -100  # label of a token that is not trained


class RecipeTrainer(Trainer):
    """transformers.Trainer for token models.

    Args (beside Trainer's):
        measure: called on every rank before the first step and again by `measure_all`; returns
            extra metrics (exact match ...) and samples [{"prompt", "reference", "answer"}].
            `self.before` keeps what came before training.
        describe_row: row id -> text, used to name the rows of a batch whose loss is not finite.
    The batch may carry `row_ids` (list of ints); it is taken out before the model sees the batch.
    `filling` (int):
    tokens of a packed row that are none of the data's; whoever calls the model takes it out.
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
        if isinstance(self.data_collator, PackedCollator):
            attention.refuse_unpackable(self.model)
        self.measure, self.describe_row = measure, describe_row
        self.before: dict = {}
        self.args.logging_nan_inf_filter = (
            False  # the stock filter logs a NaN loss as 0 and goes on
        )
        self.args.remove_unused_columns = False
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        self.add_callback(
            Progress({key: name for key, name in self.plots.items() if key != "loss"})
        )
        self.safe_stop = SafeStop()
        self.add_callback(self.safe_stop)
        self._counts = torch.zeros(
            3, dtype=torch.int64
        )  # tokens, label tokens, samples of this rank
        self._skipped_in_a_row = 0
        self._row_ids: list[int] = []

    # ---- before the first step ----
    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self.before_measuring()
        out = Path(self.args.output_dir)
        run = json.loads((out / RUN_FILE).read_text()) if (out / RUN_FILE).is_file() else {}
        if resume_from_checkpoint is not None and run.get("before"):
            self.before = run["before"]
        else:
            self.before = self.measure_all()
            if self.args.should_save:
                write_run_file(out, run | {"before": self.before})
        self.state.compute_steps(
            self.args, max_steps
        )  # a resumed state would keep the old save_steps and logging_steps
        past = next(
            (entry for entry in reversed(self.state.log_history) if "total_tokens" in entry), {}
        )
        self._past = {
            k: past.get(k, 0)
            for k in ("total_tokens", "total_label_tokens", "total_samples", "train_seconds")
        }
        if self.is_deepspeed_enabled and self.args.fp16:
            device.patch_overflow_check(self.deepspeed.optimizer)
        self.check_disk()
        self.say_plan(max_steps)
        self.safe_stop.listen()
        self._started = time.time()
        return prepared

    def before_measuring(self) -> None:
        """For subclasses: the model is wrapped (DDP, DeepSpeed), a checkpoint is loaded, nothing is
        measured yet."""

    def measure_all(self) -> dict:
        """evaluate() and the recipe's own measure: {"metrics": {...}, "samples": [...]}. Call on
        every rank."""
        metrics = {} if not self.eval_dataset else self.evaluate(quiet=True)
        metrics = {k.removeprefix("eval_"): v for k, v in metrics.items()}
        more, samples = self.measure() if self.measure else ({}, [])
        return {"metrics": metrics | more, "samples": samples}

    def say_plan(self, max_steps: int) -> None:
        """What is about to happen, in two lines."""
        total, trained = self._parameters(False), self._parameters(True)
        batch = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        cli.say(
            f"model: {total:,} parameters, {trained:,} trained ({trained / total:.0%}); {engine(self.args)} x "
            f"{self.args.world_size} on {device.name()}, {self.compute_dtype()}\n"
            f"steps: {max_steps:,} of {batch} items ({len(self.train_dataset):,} items an epoch), logged every "
            f"{self.args.logging_steps:g} steps, saved every {self._saves()} to {self.args.output_dir}"
        )

    def _saves(self) -> str:
        strategy = str(getattr(self.args.save_strategy, "value", self.args.save_strategy))
        return f"{self.args.save_steps:g} steps" if strategy == "steps" else strategy

    def check_disk(self) -> None:
        """Warn before step 1 when the checkpoints to come will not fit (weights, fp32 masters, two
        moments)."""
        if not self.is_world_process_zero() or self.args.save_strategy == "no":
            return
        size = lambda p: getattr(p, "ds_numel", p.numel())  # noqa: E731
        trained = sum(size(p) for p in self.model.parameters() if p.requires_grad)
        need = 16 * trained * ((self.args.save_total_limit or 3) + 1) / 2**30
        free = shutil.disk_usage(self.args.output_dir).free / 2**30
        if free < need:
            cli.say(
                f"warning: {free:.1f} GiB free at {self.args.output_dir}, about {need:.1f} GiB needed for checkpoints; "
                "lower --save_total_limit or choose another OUTPUT"
            )

    # ---- one step ----
    def _run_epoch(self, *args, **kwargs):
        if (
            self.state.global_step >= self.state.max_steps
        ):  # resumed from the last step: only final/ was missing
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        self.log({"epoch_peak_memory_mb": round(device.next_peak_memory_mb(), 1)})

    def _finalize_training(self, *args, **kwargs):
        if (
            self.safe_stop.stopped
        ):  # the best model is loaded, and the rest deleted, at the real end only
            self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        return super()._finalize_training(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._row_ids = [i for batch in samples for i in batch.get("row_ids", [])]
        for batch in samples:
            mask = batch.get("attention_mask")
            rows = batch.get("row_ids", [])
            self._counts += torch.tensor(
                [
                    int(
                        mask.sum()
                        if mask is not None
                        else batch["input_ids"].numel() - batch.get("filling", 0)
                    )
                    if "input_ids" in batch
                    else 0,
                    int((batch["labels"] != IGNORE).sum()) if "labels" in batch else 0,
                    len(rows),
                ]
            )
        return samples, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        row_ids = inputs.pop("row_ids", [])
        if num_items_in_batch is not None and int(num_items_in_batch) == 0:
            self.stop_on_rows("has not a single label to train on")
        result = self.loss_of(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if model.training and not torch.isfinite(loss).all():
            self._row_ids = row_ids  # of the whole step until here
            self.stop_on_rows(f"gave a loss of {loss.item()}")
        return result

    def loss_of(self, model, inputs, return_outputs, num_items_in_batch):
        """For subclasses with a loss of their own: the batch without row_ids -> loss, or (loss,
        outputs)."""
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def floating_point_ops(self, inputs):
        return 0  # the stock estimate counts padded tokens; tokens per second are reported instead

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None or math.isfinite(float(norm)):
            self._skipped_in_a_row = 0
            return norm
        self._skipped_in_a_row += 1
        if not self.args.fp16:
            self.stop_on_rows(f"gave a gradient norm of {float(norm)}")
        if (
            self._skipped_in_a_row == 20
        ):  # the fp16 scaler skips a step now and then; not twenty in a row
            self.stop_on_rows(
                "overflowed fp16 for the 20th step in a row (use bf16, or a lower learning rate)"
            )
        return norm

    def stop_on_rows(self, what: str) -> None:
        """End the run before the optimizer step and leave the batch's rows in
        nan_rows_<rank>.json."""
        path = Path(self.args.output_dir) / f"nan_rows_{self.args.process_index}.json"
        rows = [{"row": i, "source": self.describe_row(int(i))} for i in self._row_ids]
        path.write_text(
            json.dumps(
                {"step": self.state.global_step + 1, "problem": what, "rows": rows},
                indent=1,
                ensure_ascii=False,
            )
        )
        shown = ", ".join(r["source"] for r in rows[:3]) or "unknown rows"
        print(
            f"error: step {self.state.global_step + 1}: a batch {what}; stopped before the optimizer step. Its "
            f"{len(rows)} rows ({shown} ...) are in {path}; checkpoints so far are sound",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1)

    # ---- logging ----
    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.control.should_log |= (
            self.control.should_save
        )  # so that a checkpoint knows all losses and tokens up to it
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._totals = self.totals()
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def totals(self) -> dict:
        """Tokens, label tokens, samples of all ranks, and seconds, with the part before a resume.
        All ranks call it."""
        counts = self._counts.to(self.args.device)
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        now = {
            "total_tokens": counts[0].item(),
            "total_label_tokens": counts[1].item(),
            "total_samples": counts[2].item(),
        }
        now["train_seconds"] = time.time() - self._started
        return {k: v + self._past[k] for k, v in now.items()} | {
            "seconds_here": now["train_seconds"]
        }

    def log(self, logs, start_time=None):
        if "loss" in logs:
            t = self._totals
            seconds = max(1e-9, t.pop("seconds_here"))
            steps = self.state.global_step - self._initial_global_step
            rate = {
                k: (t[f"total_{k}"] - self._past[f"total_{k}"]) / seconds
                for k in ("tokens", "label_tokens", "samples")
            }
            logs |= t | {f"{k}_per_second": v for k, v in rate.items()}
            logs |= {
                "memory_mb": device.peak_memory_mb(),
                "seconds_left": seconds
                / max(1, steps)
                * (self.state.max_steps - self.state.global_step),
            }
        super().log(logs, start_time)

    # ---- evaluation ----
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", quiet=False):
        """Token-weighted loss, perplexity and token accuracy over the whole set, each row once. All
        ranks call it.

        Needs a model under `losses.use_chunked_loss`: its `logits` in eval mode start with [loss
        sum, correct, labels].
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if not data:
            raise SystemExit(
                "nothing is held out to evaluate on: raise --eval_ratio, or --eval_strategy no"
            )
        rank, world, size = (
            self.args.process_index,
            self.args.world_size,
            self.args.per_device_eval_batch_size,
        )
        mine = list(range(rank, len(data), world))
        mine += mine[-1:] or [
            0
        ]  # a batch for ranks that have none left; ZeRO-3 needs all of them in each forward
        share = Subset(data, mine[: len(range(rank, len(data), world)) or 1])
        # a generator of its own: the loader would draw from the global one, and resume would not be
        # exact
        loader = DataLoader(share, size, collate_fn=self.data_collator, generator=torch.Generator())
        rounds = math.ceil(math.ceil(len(data) / world) / size)
        model, sums = self.model_wrapped, 0.0
        was_training = model.training
        model.eval()
        batch = None
        with torch.no_grad():
            batches = iter(loader)
            for _ in range(rounds):
                fresh = next(batches, None)
                batch = fresh or batch
                if (fresh is None) or len(range(rank, len(data), world)) == 0:
                    batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
                inputs = self._prepare_inputs({k: v for k, v in batch.items() if k != "row_ids"})
                with self.compute_loss_context_manager():
                    sums = sums + self.eval_sums(model, inputs)
        model.train(was_training)
        if world > 1:
            dist.all_reduce(sums)
        metrics = {
            f"{metric_key_prefix}_{k}": v for k, v in self.eval_metrics(sums.tolist()).items()
        }
        if not quiet:
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            cli.say(
                "  held out: "
                + ", ".join(f"{k.removeprefix('eval_')} {v:.4f}" for k, v in metrics.items())
            )
        return metrics

    def eval_sums(self, model, inputs) -> torch.Tensor:
        """One batch -> what is summed over batches and ranks, fp32 [n]; 0 for a batch without a
        label."""
        return model(**inputs).logits[:3].detach().float()

    def eval_metrics(self, sums: list[float]) -> dict[str, float]:
        """The sums over the held-out set -> metrics."""
        loss, correct, labels = sums
        loss, labels = loss / max(1, labels), max(1, labels)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 50)),
            "token_accuracy": correct / labels,
        }

    # ---- checkpoints ----
    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # torn: a whole one would have been resumed from
        self._barrier()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # writes, but does not delete older ones yet
        finally:
            self.args.save_total_limit = limit
        self._barrier()
        if self.args.should_save:
            facts = {"world_size": self.args.world_size, "engine": engine(self.args)}
            facts["weights_only"] = self.args.save_only_model
            checkpoint.mark_complete(folder, step=self.state.global_step, **facts)
            self._rotate(limit or sys.maxsize)
        self._barrier()

    def _rotate(self, limit: int) -> None:
        """Keep the newest `limit` checkpoints up to this step and the best one; drop torn ones
        beyond this step."""
        best = self.state.best_model_checkpoint
        every = checkpoint.all_checkpoints(self.args.output_dir)
        ahead = [
            p
            for p in every
            if checkpoint.step_of(p) > self.state.global_step and checkpoint.why_incomplete(p)
        ]
        past = [p for p in every if checkpoint.step_of(p) <= self.state.global_step]
        for old in [*ahead, *past[limit:]]:
            if best is None or old.name != Path(best).name:
                shutil.rmtree(old, ignore_errors=True)

    def save_model(self, output_dir=None, _internal_call=False):
        if engine(self.args) in ("zero-0", "zero-1", "zero-2"):
            self._save(
                output_dir
            )  # the weights are whole; the stock way clones them, which unties tied embeddings
        else:
            super().save_model(output_dir, _internal_call)

    def _barrier(self):
        if self.args.world_size > 1:
            dist.barrier()

    def save_final(self, dtype: torch.dtype | None = None) -> Path:
        """Write the model and tokenizer to OUTPUT/final, ready for `from_pretrained`. All ranks
        call it.

        `dtype`: floating-point type of the stored weights, e.g. that of the base model; None keeps
        the trained one.
        """
        final, part = (
            Path(self.args.output_dir) / "final",
            Path(self.args.output_dir) / "final.part",
        )
        if dtype is not None and not self.is_deepspeed_enabled:
            self.model.to(dtype)
        if self.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
        self._barrier()
        self.save_model(str(part))
        self._barrier()
        if self.args.should_save:
            (part / "training_args.bin").unlink(
                missing_ok=True
            )  # a pickle nobody needs; run.json has the settings
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
        self._barrier()
        return final

    def exit_if_stopped(self) -> None:
        """After train(): when a signal ended it early, say how to continue and exit with 75."""
        if self.safe_stop.stopped:
            cli.say(
                f"interrupted at step {self.state.global_step} of {self.state.max_steps}, saved. Continue with:\n"
                f"  {cli.resume_command()}"
            )
            raise SystemExit(cli.INTERRUPTED)

    def report(self, recipe: str, model_name: str, rows: dict, after: dict) -> None:
        """Write loss.png, report.md and report.json (rank 0) and print the before/after table with
        the next commands.

        Args:
            rows: counts of the data: read, used, dropped {reason: n}, ...
            after: what `measure_all` gave after training.
        """
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        last = next(
            (entry for entry in reversed(self.state.log_history) if "total_tokens" in entry), {}
        )
        seconds = last.get("train_seconds", 0.0)
        facts = {
            "recipe": recipe,
            "model": model_name,
            "device": device.name(),
            "dtype": self.compute_dtype(),
            "world_size": self.args.world_size,
            "engine": engine(self.args),
            "rows": rows,
            "parameters": {"total": self._parameters(False), "trained": self._parameters(True)},
            "tokens": {
                "total": int(last.get("total_tokens", 0)),
                "label": int(last.get("total_label_tokens", 0)),
            },
            "seconds": round(seconds, 3),
            "tokens_per_second": round(last.get("total_tokens", 0) / max(seconds, 1e-9), 1),
            "peak_memory_mb": round(device.peak_memory_mb(), 1),
            "steps": self.state.global_step,
            "peak_memory_mb_by_epoch": [
                e["epoch_peak_memory_mb"]
                for e in self.state.log_history
                if "epoch_peak_memory_mb" in e
            ],
            "loss": {
                "first": losses[0] if losses else None,
                "last": losses[-1] if losses else None,
            },
            "metrics": {"before": self.before.get("metrics", {}), "after": after["metrics"]},
            "command": cli.resume_command(),
        }
        if self.is_world_process_zero():
            out = Path(self.args.output_dir)
            same = lambda sample: json.dumps([sample["messages"], sample["tools"]], sort_keys=True)  # noqa: E731
            old = {same(s): s["answer"] for s in self.before.get("samples", [])}
            samples = [
                {**s, "before": old.get(same(s), ""), "after": s["answer"]}
                for s in after["samples"]
            ]
            samples = samples[:: max(1, len(samples) // 12)][:12]
            ends = [(0, facts["metrics"]["before"]), (self.state.global_step, after["metrics"])]
            ends = [
                {"step": step} | {f"eval_{k}": metrics[k] for k in self.plots if k in metrics}
                for step, metrics in ends
            ]
            table = report.write_report(
                out, facts, [*self.state.log_history, *ends], samples, self.plots
            )
            run = json.loads((out / RUN_FILE).read_text())
            write_run_file(out, run | {"step": self.state.global_step})
            self.state.save_to_json(str(out / "trainer_state.json"))
            print(
                f"\n{table}\n\nmodel   {out / 'final'}\nreport  {out / 'report.md'}, {out / 'loss.png'}",
                flush=True,
            )

    def compute_dtype(self) -> str:
        return "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"

    def _parameters(self, trained: bool) -> int:
        return sum(
            getattr(p, "ds_numel", p.numel())
            for p in self.model.parameters()
            if p.requires_grad or not trained
        )
