"""Events of transformers' training loop: what the trainer does at them, the line people see, and a
stop that loses nothing."""

from __future__ import annotations

import os
import signal
import sys
import time

from transformers import TrainerCallback

from common import cli


class TrainerHooks(TrainerCallback):
    """Calls the trainer's own methods at transformers' events."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.before_first_step()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.after_epoch()


class LogWithCheckpoint(TrainerCallback):
    """A checkpoint knows all losses and tokens up to it. Comes after the callbacks that save."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class ProgressLine(TrainerCallback):
    """One line: a bar on a terminal, a plain line per logging step elsewhere."""

    def __init__(self, more: dict[str, str] | None = None):
        """more: logged values to show beside the loss, name -> what to call it."""
        self.bar = None
        self.more = more or {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                unit="step",
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(1)
        # a run shorter than logging_steps has a loss too
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return
        text = self.line(logs)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            return
        share = state.global_step / max(1, state.max_steps)
        at = f"step {state.global_step}/{state.max_steps} {share:4.0%}"
        print(f"{at} | {text} | left {clock(logs['seconds_left'])}", flush=True)

    def line(self, logs: dict) -> str:
        parts = [f"loss {logs['loss']:.4f}"]
        parts += [f"{name} {logs[key]:.3f}" for key, name in self.more.items() if key in logs]
        parts += [
            f"lr {logs['learning_rate']:.1e}",
            f"{logs['label_tokens_per_second']:,.0f} label tok/s",
            f"{logs['tokens_per_second']:,.0f} tok/s",
            f"{logs['samples_per_second']:,.1f} samples/s",
            f"{logs['memory_mb'] / 1024:.1f} GiB",
        ]
        return " | ".join(parts)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    """Seconds as people read them: 45 s, 12 min, 3 h 05 min."""
    minutes = int(seconds // 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


STOPPING = "stopping: this step is finished and saved first"
# a signal that comes within a step is told to the other ranks with the next one
STOPPING_RANKS = "stopping: this step, or the next, is finished and saved first"


class SafeStop(TrainerCallback):
    """SIGTERM / Ctrl-C: finish the step, save, stop; after the last step, finish what is left. A
    second one ends the process at once.

    Several ranks must end at the same step: the trainer tells them with what it sums over ranks
    anyway, and sets `all_stop` on each in the same step.
    """

    def __init__(self):
        self.asked = 0.0  # when, in seconds since 1970
        self.all_stop = False  # a rank was asked before this step began, and all know it
        self.stopped = False
        self.answer = STOPPING
        self.process = os.getpid()

    def listen(self, ranks: int = 1):
        self.answer = STOPPING_RANKS if ranks > 1 else STOPPING
        self.process = os.getpid()
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGINT, self.handle)

    def handle(self, number, frame):
        if os.getpid() != self.process:  # a loader's worker, which ends with its batches
            return
        if not self.asked:
            self.asked = time.time()
            self.say_what_comes()
        elif time.time() - self.asked > 2:  # launcher and terminal may both send the first one
            cli.say_in_handler(f"stopped at once. {cli.how_to_go_on()}")
            os._exit(cli.INTERRUPTED)

    def say_what_comes(self):
        cli.say_in_handler(f"\n{self.answer} (once more: stop at once)")

    def training_is_done(self):
        """No step is left that could be the last: a signal, also one that came in the last step,
        no longer ends the run."""
        if self.answer.startswith("stopping"):
            self.answer = "the training is done: what is left, model and report, is written first"
            if self.asked:
                self.say_what_comes()

    def on_train_end(self, args, state, control, **kwargs):
        if not self.stopped:
            self.training_is_done()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            self.training_is_done()
        stop = self.all_stop if args.world_size > 1 else self.asked
        if stop and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
            # the best model is loaded at the real end only
            args.load_best_model_at_end = False
