"""Run a recipe's train.py with a fault injected from outside (never by code in the recipe).

    python common/launch.py 2 tests/support/faults/faulty.py train_qwen/train.py FAULT [flags]

FAULT: name@N, at the N-th step or save:
    kill-in-step@N          SIGKILL of this rank before optimizer step N
    kill-in-model@N         during the N-th save, with half of the weights file written
    kill-in-optimizer@N     ... with half of the optimizer state
    kill-in-rng@N           ... after the optimizer, before the rng state
    kill-before-marker@N    ... everything written but the completion marker
    kill-in-marker@N        ... half of the marker
    nan-loss@N              the loss of step N is NaN
    nan-grad@N              a gradient of step N is NaN, the loss is sound
    nan-weights@N           step N leaves a weight that is NaN; loss and gradients were sound
    inf-grads@N             gradients overflow in every step from N on, the losses are sound
    overflow-on-rank-0@N    the fp16 gradients of rank 0 overflow in step N; says whether DeepSpeed noticed
    raise-on-rank-1@N       rank 1 raises in step N
    die-on-rank-1@N         rank 1 is killed in step N
    stop-on-rank-1@N        rank 1 is stopped (SIGSTOP) in step N; every marker before took SLOW_MARKER seconds
    count-gathers@0         say how often weights are gathered while answers are generated under ZeRO-3
    log-rows@N              write what every step consumes to consumed_<rank>.jsonl; kill-in-step@N (never with 0)
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

script, fault = sys.argv[1:3]
sys.argv = [script, *sys.argv[3:]]
sys.path[:0] = [str(Path(script).resolve().parents[1]), str(Path(script).resolve().parent)]

from common import device  # noqa: F401
from common.runs import checkpoint
from common.trainer import RecipeTrainer

kind, at = fault.split("@")
at, rank = int(at), int(os.environ.get("RANK", 0))
saves, steps = [], []


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def halve(folder, pattern):
    """What a kill in the middle of a write leaves."""
    for path in Path(folder).rglob(pattern):
        os.truncate(path, path.stat().st_size // 2)


def after(method, action):
    """Replace RecipeTrainer.method by itself followed by action(trainer, *args) during the at-th
    save."""
    stock = getattr(RecipeTrainer, method)

    def patched(self, *args, **kwargs):
        result = stock(self, *args, **kwargs)
        if len(saves) == at:
            action(self, *args)
        return result

    setattr(RecipeTrainer, method, patched)


stock_save, stock_step, stock_mark = (
    RecipeTrainer._save_checkpoint,
    RecipeTrainer.compute_loss,
    checkpoint.mark_complete,
)


def counted_save(self, *args, **kwargs):
    saves.append(1)
    return stock_save(self, *args, **kwargs)


def step_fault(self, model, inputs, **kwargs):
    loss = stock_step(self, model, inputs, **kwargs)
    if model.training and self.state.global_step + 1 == at:
        if kind in ("kill-in-step", "log-rows") or (kind == "die-on-rank-1" and rank == 1):
            die()
        if kind == "stop-on-rank-1" and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "raise-on-rank-1" and rank == 1:
            raise RuntimeError("rank one broke on purpose")
    return loss


def log_rows(self, *args, **kwargs):
    """One line per step and rank: its micro-batches as [row ids, starts, token ids], and
    DeepSpeed's batch size."""
    samples, count = stock_samples(self, *args, **kwargs)
    batches = [
        [b["row_ids"], b["cu_seq_lens_q"].tolist(), b["input_ids"][0].tolist()] for b in samples
    ]
    engine = self.deepspeed.train_batch_size() if self.is_deepspeed_enabled else None
    with open(Path(self.args.output_dir) / f"consumed_{rank}.jsonl", "a") as file:
        file.write(
            json.dumps(
                {"step": self.state.global_step + 1, "batches": batches, "engine_batch": engine}
            )
            + "\n"
        )
    return samples, count


def bad_loss(self, model, inputs, **kwargs):
    now = model.training and self.state.global_step + 1 == at
    factor = (
        {"nan-loss": float("nan"), "overflow-on-rank-0": 1.0 if rank else 1e6}[kind] if now else 1.0
    )
    from transformers import Trainer

    stock = Trainer.compute_loss
    Trainer.compute_loss = lambda *a, **k: stock(*a, **k) * factor
    try:
        return stock_step(self, model, inputs, **kwargs)
    finally:
        Trainer.compute_loss = stock


def bad_marker(folder, *known, **facts):
    if len(saves) == at and kind == "kill-before-marker":
        die()
    time.sleep(float(os.environ.get("SLOW_MARKER", 0)))
    stock_mark(folder, *known, **facts)
    if len(saves) == at and kind == "kill-in-marker":
        halve(folder, checkpoint.MARKER)
        die()


def torn(pattern):
    return lambda trainer, folder: (halve(folder, pattern), die())


RecipeTrainer._save_checkpoint = counted_save
checkpoint.mark_complete = bad_marker
if kind == "kill-in-model":
    after(
        "save_model",
        lambda trainer, folder: torn("*.safetensors")(trainer, folder) if rank == 0 else None,
    )
elif kind == "kill-in-optimizer":
    after(
        "_save_optimizer_and_scheduler", lambda trainer, folder: torn("*optim*.pt")(trainer, folder)
    )
elif kind == "kill-in-rng":
    after("_save_optimizer_and_scheduler", lambda trainer, folder: die())
elif kind == "nan-loss":
    RecipeTrainer.compute_loss = bad_loss
elif kind == "overflow-on-rank-0":
    RecipeTrainer.compute_loss, stock_training_step = bad_loss, RecipeTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        loss = stock_training_step(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 == at and rank == 0:
            print("overflow noticed:", self.deepspeed.optimizer.overflow)
        return loss

    RecipeTrainer.training_step = watched
elif kind == "count-gathers":
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    from common.runs import generate

    stock_fetch = coordinator.PartitionedParameterCoordinator.fetch_sub_module
    stock_answers = generate.generate_answers
    fetched = []

    def fetch(self, *args, **kwargs):
        fetched.append(1)
        return stock_fetch(self, *args, **kwargs)

    def answers(*args):
        fetched.clear()
        found = stock_answers(*args)
        print("gathered in generation:", len(fetched), flush=True)
        return found

    coordinator.PartitionedParameterCoordinator.fetch_sub_module = fetch
    generate.generate_answers = answers
elif kind in ("nan-grad", "inf-grads"):
    stock_start = RecipeTrainer.before_measuring

    def poisoned(self):
        """A hook sees a gradient on its way to whoever collects it: DDP, ZeRO-2, ZeRO-3."""

        def poison(gradient):
            step = self.state.global_step + 1
            if kind == "nan-grad" and step == at:
                return gradient * float("nan")
            return gradient * float("inf") if kind == "inf-grads" and step >= at else gradient

        next(p for p in self.model.parameters() if p.requires_grad).register_hook(poison)
        stock_start(self)

    RecipeTrainer.before_measuring = poisoned
elif kind == "nan-weights":
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == at:
                next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = float(
                    "nan"
                )

    stock_start = RecipeTrainer.before_measuring

    def spoiled(self):
        self.add_callback(Spoil)
        stock_start(self)

    RecipeTrainer.before_measuring = spoiled
else:
    RecipeTrainer.compute_loss = step_fault
    if kind == "log-rows":
        stock_samples, RecipeTrainer.get_batch_samples = RecipeTrainer.get_batch_samples, log_rows

runpy.run_path(script, run_name="__main__")
