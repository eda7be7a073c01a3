"""Where a run stands and what it shows: the line per step, speed and MFU, the held-out curve, the
trackers, the report at its end."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import torch
from loop import parallel
from torch import nn
from tqdm.auto import tqdm

from common import cli, device
from common.callbacks import clock
from common.runs import memory, report, run_folder
from common.runs.plan import check_disk

CURVE_POINTS = 10  # measurements of held-out rows along a run ...
CURVE_COST = 0.05  # ... and the share of the training's work that they may take


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """Counts steps, losses, tokens and seconds, and shows them: a bar on a terminal, a plain line
    per logging step elsewhere.

    training: TrainingArguments, or what has their output_dir, world_size, device, logging_steps and
        report_to.
    progress: see state.new_progress; what a checkpoint keeps.
    plan: has describe(), total_steps() (None where the clock ends the run) and fraction_done().
    settings: for the trackers.
    plots: of the report, see report.write_report; those of which nothing was told are left out.
    """

    def __init__(
        self,
        training,
        progress: dict,
        model: nn.Module,
        dtype,
        plan,
        settings: dict,
        plots: dict = report.PLOTS,
    ):
        self.training = training
        self.progress = progress
        self.model = model
        self.plan = plan
        self.plots = plots
        self.out = Path(training.output_dir)
        self.stopped = False

        self.recent: list[float] = []  # losses since the last line
        self.at_last_line = dict(progress)
        self.at_start = {"fraction": plan.fraction_done(), "seconds": progress["seconds"]}
        self.flops = flops_per_token(model)
        self.peak = training.world_size * peak_flops(dtype, training.device)
        total = report.parameters(model)["total"]
        cli.say(
            f"model: {total:,} parameters; {training.world_size} x {device.name()}, "
            f"{str(dtype).removeprefix('torch.')}; peak {self.peak / 1e12:.2f} TFLOP/s measured\n"
            f"{plan.describe()}"
        )
        check_disk(model, training, max(1, training.save_total_limit or 1))
        self.bar = tqdm(
            total=plan.total_steps(),
            initial=progress["step"],
            unit="step",
            dynamic_ncols=True,
            disable=None if cli.is_main() else True,
        )
        names = [] if training.report_to == ["none"] else list(training.report_to)
        self.trackers = Trackers(names, self.out, settings, progress["trackers"], progress["step"])

    def count(
        self, loss: float, lr: float, seconds: float, tokens: int, label_tokens: int, **more: float
    ) -> None:
        """Book the step that progress["step"] names; `more` goes into the history and to the
        trackers."""
        now = self.progress
        now["tokens"] += tokens
        now["label_tokens"] += label_tokens
        now["seconds"] += seconds
        entry = {"step": now["step"], "loss": loss, "learning_rate": lr}
        now["history"].append(entry | more)
        self.recent.append(loss)
        last = self.plan.fraction_done() >= 1
        if now["step"] == 1 or last or self.is_due(self.training.logging_steps):
            self.show(lr, more)

    def show(self, lr: float, more: dict) -> None:
        now = self.progress
        before = self.at_last_line
        seconds = max(1e-9, now["seconds"] - before["seconds"])
        speed = (now["tokens"] - before["tokens"]) / seconds
        label_speed = (now["label_tokens"] - before["label_tokens"]) / seconds
        values = {
            "loss": sum(self.recent) / len(self.recent),
            "learning_rate": lr,
            "tokens_per_second": speed,
            "mfu": speed * self.flops / self.peak,
        }
        text = (
            f"loss {values['loss']:.4f} | lr {lr:.1e} | {label_speed:,.0f} label tok/s | "
            f"{speed:,.0f} tok/s | MFU {values['mfu']:.0%} | "
            f"{memory.peak_mb() / 1024:.1f} GiB"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(now["step"] - self.bar.n)
        if self.bar.disable:
            fraction = self.plan.fraction_done()
            total = self.plan.total_steps()
            step = f"{now['step']}/{total}" if total else f"{now['step']}"
            told = "".join(f"{name.replace('_', ' ')} {more[name]:.3g} | " for name in more)
            done = f"step {step} {min(1.0, fraction):4.0%}"
            cli.say(f"{done} | {told}{text} | left {self.time_left()}")
        self.trackers.log(now["step"], values | more)
        self.recent = []
        self.at_last_line = dict(now)

    def time_left(self) -> str:
        fraction = self.plan.fraction_done()
        done = max(1e-9, fraction - self.at_start["fraction"])
        seconds = self.progress["seconds"] - self.at_start["seconds"]
        return clock(seconds * max(0.0, 1 - fraction) / done)

    def is_due(self, every: float | None) -> bool:
        """Whether something that happens every so many steps happens now; 0: it never does."""
        return bool(every) and every >= 1 and self.progress["step"] % int(every) == 0

    def save_is_due(self) -> bool:
        """Whether this step ends with a checkpoint; the last one does, so that what comes after it
        can be made again."""
        if self.stopped:
            return True
        last = self.plan.fraction_done() >= 1
        due = last or self.is_due(self.training.save_steps)
        return self.training.save_strategy != "no" and due

    def note(self, metrics: dict) -> None:
        """Held-out metrics in the middle of the run."""
        now = self.progress
        values = {f"eval_{name}": value for name, value in metrics.items()}
        now["history"].append({"step": now["step"], "seconds": now["seconds"]} | values)
        self.trackers.log(now["step"], values)
        if cli.is_main() and metrics:
            words = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items()]
            tqdm.write(f"held out at step {now['step']}: {', '.join(words)}")

    def stop_if(self, asked: float) -> None:
        """`asked`: whether somebody wants this process to stop; then all of them do, together."""
        anybody = parallel.largest(float(bool(asked)), self.training.device) > 0
        self.stopped = anybody and self.plan.fraction_done() < 1

    def exit_if_stopped(self) -> None:
        self.bar.close()
        if self.stopped:
            self.trackers.close()
            cli.say(
                f"interrupted at step {self.progress['step']}, saved. Continue with:\n"
                f"  {cli.resume_command()}"
            )
            raise SystemExit(cli.INTERRUPTED)

    def report(self, recipe: str, model_name: str, rows: dict, after: dict, **more) -> None:
        """loss.png, report.md, report.json (`more` too), trainer_state.json and the printed table;
        the run counts as finished."""
        self.bar.close()
        self.trackers.close()
        if not cli.is_main():
            return
        now = self.progress
        facts = report.facts(
            recipe,
            model_name,
            self.model,
            self.training,
            rows,
            steps=now["step"],
            tokens=now["tokens"],
            label_tokens=now["label_tokens"],
            seconds=now["seconds"],
            losses=[entry["loss"] for entry in now["history"] if "loss" in entry],
            before=now["before"],
            after=after,
        )
        speed = now["tokens"] / max(now["seconds"], 1e-9)
        facts["mfu"] = round(speed * self.flops / self.peak, 4)
        facts["flops"] = now["tokens"] * self.flops
        samples = report.before_and_after(now["before"]["samples"], after["samples"])
        history = self.curve(after)
        told = set().union(*history)
        plots = {
            name: label
            for name, label in self.plots.items()
            if not told.isdisjoint((name, f"eval_{name}"))
        }
        table = report.write_report(self.out, facts | more, history, samples, plots)

        state = json.dumps({"log_history": now["history"]}, indent=1)
        (self.out / "trainer_state.json").write_text(state, encoding="utf-8")
        run = run_folder.read_run_file(self.out)
        run_folder.write_run_file(self.out, run | {"step": now["step"]})
        print(f"\n{table}\n\nmodel   {self.out / 'final'}\nreport  {self.out / 'report.md'}")

    def curve(self, after: dict) -> list[dict]:
        """The history behind the first and the last measurement, which count where it has none."""
        now = self.progress
        ends = []
        for step, metrics in ((0, now["before"]["metrics"]), (now["step"], after["metrics"])):
            values = {f"eval_{name}": metrics[name] for name in self.plots if name in metrics}
            ends.append({"step": step} | values)
        return [*ends, *now["history"]]


class Curve:
    """The held-out rows measured along a run, for loss.png.

    every: steps between two measurements of all rows, 0: none. None: CURVE_POINTS times or fewer,
        on as many windows as cost CURVE_COST of the training (a forward is a third of a step).
    loader: of the held-out rows, None where there are none; measure(bins of it, None: all) ->
        metrics.
    """

    def __init__(self, every: float | None, run: Run, loader, windows_to_come: int, measure):
        self.every = every
        self.run = run
        self.measure = measure
        self.bins = None
        self.points = 0
        if loader is None:
            self.every = 0
        elif every is None:
            budget = int(3 * CURVE_COST * windows_to_come)
            self.points = min(CURVE_POINTS, budget // (loader.windows * loader.world))
        if self.points:
            self.bins = loader.some(budget // self.points)
        self.passed = self.points_passed()
        if self.points and run.progress["step"] == 0:
            run.note(measure(self.bins))

    def points_passed(self) -> int:
        return math.floor(self.points * min(1.0, self.run.plan.fraction_done()))

    def step(self) -> None:
        """Measure where it is time; after each step, on all ranks."""
        before = self.passed
        self.passed = self.points_passed()
        if self.passed > before or self.run.is_due(self.every):
            self.run.note(self.measure(self.bins))


# ---- trackers ------------------------------------------------------------------------------------


class Tracker:
    """One of --report_to: Tracker(out, settings, ids, step), log(step, values)."""

    def close(self) -> None:
        """Some end with the process."""


class TensorBoard(Tracker):
    def __init__(self, out: Path, settings: dict, ids: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = ids.setdefault("tensorboard", str(out / "runs"))
        self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def log(self, step: int, values: dict) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    def __init__(self, out: Path, settings: dict, ids: dict, step: int):
        import wandb

        road = os.environ.get("WANDB_RUN")  # several stages of one road
        self.run = wandb.init(
            project=out.parent.name,
            name=f"{road}-{out.name}" if road else out.name,
            dir=out,
            config=settings,
            id=ids.get("wandb"),
            resume="allow",
        )
        ids["wandb"] = self.run.id

    def log(self, step: int, values: dict) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class SwanLab(Tracker):
    def __init__(self, out: Path, settings: dict, ids: dict, step: int):
        import swanlab

        run = swanlab.init(
            project=out.parent.name,
            experiment_name=out.name,
            config=settings,
            id=ids.get("swanlab"),
            resume="allow",
        )
        ids["swanlab"] = run.public.run_id
        self.send = swanlab.log

    def log(self, step: int, values: dict) -> None:
        self.send(values, step=step)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "swanlab": SwanLab}


class Trackers:
    """Those of --report_to, on rank 0.

    ids: name -> the tracker's own id of the run, kept in checkpoints so that a resumed one goes on
        in its curve.
    """

    def __init__(self, names: list[str], out: Path, settings: dict, ids: dict, step: int):
        self.open = []
        for name in names if cli.is_main() else []:
            if name not in TRACKERS:
                raise SystemExit(f"--report_to {name}: {', '.join(TRACKERS)} or none")
            try:
                self.open.append(TRACKERS[name](out, settings, ids, step))
            except ModuleNotFoundError as error:
                raise SystemExit(f"--report_to {name}: pip install {error.name}") from None

    def log(self, step: int, values: dict) -> None:
        for tracker in self.open:
            tracker.log(step, values)

    def close(self) -> None:
        for tracker in self.open:
            tracker.close()


# ---- speed ---------------------------------------------------------------------------------------


def peak_flops(dtype: torch.dtype, where: torch.device) -> float:
    """Floating-point operations per second of a large product here, measured: what MFU is a part
    of.

    The product grows until it takes 5 ms: 256 wide where a CPU emulates the dtype, 4096 to 16384 on
    an accelerator.
    """

    def wait() -> None:
        if where.type != "cpu":
            device.module().synchronize()

    # a generator of its own, since a resumed run has its random numbers; constants would draw less
    # power, and so be faster than anything that is trained
    generator = torch.Generator(where).manual_seed(0)
    best = 0.0
    size = 128
    seconds = 0.0
    while seconds < 5e-3 and size < 16384:
        size *= 2
        a = torch.randn(size, size, generator=generator, device=where).to(dtype)
        seconds = math.inf  # the quicker of two: the first may wait for libraries to start
        for _ in range(2):
            wait()
            began = time.perf_counter()
            a @ a
            wait()
            seconds = min(seconds, time.perf_counter() - began)
        best = max(best, 2 * size**3 / seconds)
    return best


def flops_per_token(model: nn.Module) -> float:
    """Forward and backward of one token: 2 N forward, 2 N for the inputs' gradients, 2 per trained
    weight (Kaplan et al. 2020); of experts only those that a token goes through. Attention is left
    out, and a table of tokens that is no head too: a row of it is looked up."""
    config = model.config
    total = 0.0
    looked_up = None
    if not config.tie_word_embeddings:
        looked_up = model.get_input_embeddings().weight
    for name, p in model.named_parameters():
        if p is looked_up:
            continue
        used = 1.0
        if ".experts." in name:
            used = config.num_experts_per_tok / config.num_experts
        per_weight = 6 if p.requires_grad else 4
        total += used * per_weight * getattr(p, "ds_numel", p.numel())
    return total
