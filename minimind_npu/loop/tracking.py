"""Where a run stands and what it shows: the line per step, speed and MFU, the trackers, the report
at its end."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from loop import parallel
from torch import nn
from tqdm.auto import tqdm

from common import cli, device
from common.callbacks import clock
from common.runs import report, run_folder


class Run:
    """Where the run stands, and what it shows: a bar on a terminal, a plain line per logging step
    elsewhere.

    The position is an epoch and the bins taken of it by all processes together; `progress` is what
    a checkpoint keeps.
    """

    def __init__(self, args, training, progress: dict, model, loader, dtype):
        self.args, self.training, self.progress, self.model, self.loader = (
            args,
            training,
            progress,
            model,
            loader,
        )
        self.dtype, self.out, self.stopped = (
            str(dtype).removeprefix("torch."),
            Path(training.output_dir),
            False,
        )
        self.world = training.world_size
        self.per_step = (
            training.per_device_train_batch_size * training.gradient_accumulation_steps * self.world
        )
        self.recent, self.shown = (
            [],
            (progress["tokens"], progress["seconds"], progress["label_tokens"]),
        )
        self.begun, self.start_seconds = self.part(), progress["seconds"]
        self.flops = flops_per_token(model)
        self.peak = self.world * peak_flops(dtype, training.device)
        total = sum(p.numel() for p in model.parameters())
        every = f", {self.steps():,} steps" if self.steps() else ""
        cli.say(
            f"model: {args.stage}, {total:,} parameters; {self.world} x {device.name()}, {self.dtype}\n"
            f"{len(loader.order):,} windows of {loader.max_length} tokens, {self.per_step} a step{every}; peak "
            f"{self.peak / 1e12:.2f} TFLOP/s measured"
        )
        quiet = None if cli.is_main() else True
        self.bar = tqdm(
            total=self.steps(),
            initial=progress["step"],
            unit="step",
            dynamic_ncols=True,
            disable=quiet,
        )
        names = [] if training.report_to == ["none"] else list(training.report_to)
        self.trackers = Trackers(
            names, self.out, vars(args), progress["trackers"], progress["step"]
        )

    def steps(self) -> int | None:
        """All steps of the run; None where the clock ends it."""
        if self.training.max_steps > 0:
            return self.training.max_steps
        if self.args.max_minutes:
            return None
        size, epochs = len(self.loader.order), self.training.num_train_epochs
        whole = int(epochs)
        return whole * -(-size // self.per_step) + math.ceil(
            (epochs - whole) * size / self.per_step
        )

    def part(self) -> float:
        """How much of the run is done, 0 to 1."""
        now, size = self.progress, len(self.loader.order)
        if self.training.max_steps > 0:
            done = now["step"] / self.training.max_steps
        else:
            done = (now["epoch"] * size + now["at"]) / (size * self.training.num_train_epochs)
        minutes = self.args.max_minutes
        return max(done, now["seconds"] / 60 / minutes) if minutes else done

    def next_bins(self) -> list[list[int]]:
        """The bins of the next step, of all processes; fewer at the end of an epoch, so that none
        comes twice."""
        now = self.progress
        bins = self.loader.order.take(now["epoch"], now["at"], self.per_step)
        now["step"], now["at"] = now["step"] + 1, now["at"] + len(bins)
        now["tokens"] += self.loader.tokens(bins)
        now["label_tokens"] += int(
            self.loader.rows.labels[[row for one in bins for row in one]].sum()
        )
        if now["at"] >= len(self.loader.order):
            now["epoch"], now["at"] = now["epoch"] + 1, 0
        return bins

    def count(self, loss: float, lr: float, seconds: float, asked: float) -> None:
        """Book a finished step; `asked`: whether somebody wants the run to stop."""
        now, where = self.progress, self.training.device
        now["seconds"] += seconds
        if self.args.max_minutes:
            now["seconds"] = parallel.largest(now["seconds"], where)
        self.stopped = parallel.largest(float(bool(asked)), where) > 0 and self.part() < 1
        now["history"].append({"step": now["step"], "loss": loss, "learning_rate": lr})
        self.recent.append(loss)
        if now["step"] == 1 or self.due(self.training.logging_steps) or self.part() >= 1:
            self.show(lr)

    def show(self, lr: float) -> None:
        now, (tokens, seconds, labels) = self.progress, self.shown
        loss, spent = sum(self.recent) / len(self.recent), max(1e-9, now["seconds"] - seconds)
        speed = (now["tokens"] - tokens) / spent
        values = {
            "loss": loss,
            "learning_rate": lr,
            "tokens_per_second": speed,
            "mfu": speed * self.flops / self.peak,
        }
        text = (
            f"loss {loss:.4f} | lr {lr:.1e} | {(now['label_tokens'] - labels) / spent:,.0f} label tok/s | "
            f"{speed:,.0f} tok/s | MFU {values['mfu']:.0%} | {device.peak_memory_mb() / 1024:.1f} GiB"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(now["step"] - self.bar.n)
        if self.bar.disable:
            done = max(1e-9, self.part() - self.begun)
            left = (now["seconds"] - self.start_seconds) * max(0.0, 1 - self.part()) / done
            of = f"/{self.steps()}" if self.steps() else ""
            cli.say(
                f"step {now['step']}{of} {min(1.0, self.part()):4.0%} | {text} | left {clock(left)}"
            )
        self.trackers.log(now["step"], values)
        self.recent, self.shown = [], (now["tokens"], now["seconds"], now["label_tokens"])

    def due(self, every: float) -> bool:
        return every >= 1 and self.progress["step"] % int(every) == 0

    def note(self, metrics: dict) -> None:
        """Held-out metrics in the middle of the run."""
        now, found = self.progress, {f"eval_{name}": value for name, value in metrics.items()}
        now["history"].append({"step": now["step"], "seconds": now["seconds"]} | found)
        self.trackers.log(now["step"], found)
        if cli.is_main() and metrics:
            text = ", ".join(
                f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items()
            )
            tqdm.write(f"held out at step {now['step']}: {text}")

    def facts(self) -> dict:
        """What the marker of a checkpoint says."""
        return {
            "step": self.progress["step"],
            "world_size": self.world,
            "engine": run_folder.engine(self.training),
        }

    def exit_if_stopped(self) -> None:
        self.bar.close()
        if self.stopped:
            self.trackers.close()
            cli.say(
                f"interrupted at step {self.progress['step']}, saved. Continue with:\n  {cli.resume_command()}"
            )
            raise SystemExit(cli.INTERRUPTED)

    def weight_name(self) -> str:
        config = self.model.config
        return f"{self.args.stage}_{config.hidden_size}{'_moe' if config.use_moe else ''}"

    def report(self, recipe: str, base: str, rows: dict, after: dict) -> None:
        """loss.png, report.md, report.json, trainer_state.json and the printed table; the run
        counts as finished."""
        self.trackers.close()
        if not cli.is_main():
            return
        now, before = self.progress, self.progress["before"]
        steps = [entry for entry in now["history"] if "loss" in entry]
        counts = {"total": now["tokens"], "label": now["label_tokens"]}
        weights = [
            (p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in self.model.parameters()
        ]
        facts = {
            "recipe": recipe,
            "stage": self.args.stage,
            "model": base,
            "device": device.name(),
            "dtype": self.dtype,
            "world_size": self.world,
            "engine": run_folder.engine(self.training),
            "rows": rows,
            "tokens": counts,
            "parameters": {
                "total": sum(n for _, n in weights),
                "trained": sum(n for trained, n in weights if trained),
            },
            "seconds": round(now["seconds"], 3),
            "steps": now["step"],
            "tokens_per_second": round(now["tokens"] / max(now["seconds"], 1e-9), 1),
            "mfu": round(now["tokens"] / max(now["seconds"], 1e-9) * self.flops / self.peak, 4),
            "peak_memory_mb": round(device.peak_memory_mb(), 1),
            "loss": {"first": steps[0]["loss"], "last": steps[-1]["loss"]},
            "metrics": {"before": before["metrics"], "after": after["metrics"]},
            "command": cli.resume_command(),
        }
        ends = [(0, before["metrics"]), (now["step"], after["metrics"])]
        ends = [
            {"step": step} | {f"eval_{k}": found[k] for k in report.PLOTS if k in found}
            for step, found in ends
        ]
        old = {sample["prompt"]: sample["answer"] for sample in before["samples"]}
        samples = [
            {**s, "before": old.get(s["prompt"], ""), "after": s["answer"]}
            for s in after["samples"]
        ]
        samples = samples[:: max(1, len(samples) // 12)][:12]
        table = report.write_report(self.out, facts, [*now["history"], *ends], samples)
        (self.out / "trainer_state.json").write_text(
            json.dumps({"log_history": now["history"]}, indent=1)
        )
        run = json.loads((self.out / run_folder.RUN_FILE).read_text())
        run_folder.write_run_file(self.out, run | {"step": now["step"]})
        print(
            f"\n{table}\n\nmodel   {self.out / 'final'}\nreport  {self.out / 'report.md'}",
            flush=True,
        )


class Trackers:
    """tensorboard, wandb and swanlab, on rank 0; `ids` are the runs, so that a resumed one goes on
    in its curve."""

    def __init__(self, names: list[str], out: Path, settings: dict, ids: dict, step: int):
        self.ids, self.log_to = ids, []
        for name in names if cli.is_main() else []:
            getattr(self, f"_{name}", lambda *_, name=name: self._unknown(name))(
                out, settings, step
            )

    def _unknown(self, name: str) -> None:
        raise SystemExit(f"--report_to {name}: tensorboard, wandb, swanlab or none")

    def _tensorboard(self, out: Path, settings: dict, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.ids.setdefault("tensorboard", str(out / "runs"))
        writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
        self.log_to.append(
            lambda at, values: [writer.add_scalar(k, v, at) for k, v in values.items()]
        )
        self.close = writer.close

    def _wandb(self, out: Path, settings: dict, step: int) -> None:
        import wandb

        run = wandb.init(
            project=out.parent.name,
            name=out.name,
            dir=out,
            config=settings,
            id=self.ids.get("wandb"),
            resume="allow",
        )
        self.ids["wandb"] = run.id
        self.log_to.append(lambda at, values: run.log(values, step=at))

    def _swanlab(self, out: Path, settings: dict, step: int) -> None:
        import swanlab

        run = swanlab.init(
            project=out.parent.name,
            experiment_name=out.name,
            config=settings,
            id=self.ids.get("swanlab"),
            resume="allow",
        )
        self.ids["swanlab"] = run.public.run_id
        self.log_to.append(lambda at, values: swanlab.log(values, step=at))

    def close(self) -> None:
        pass

    def log(self, step: int, values: dict) -> None:
        for send in self.log_to:
            send(step, values)


def peak_flops(dtype: torch.dtype, where: torch.device) -> float:
    """Floating-point operations per second of a large product here, measured: what MFU is a part
    of.

    The product grows until it takes 5 ms, which on an accelerator is 4096 to 16384 wide.
    """
    wait = (lambda: None) if where.type == "cpu" else device.module().synchronize
    best, size, spent = 0.0, 512, 0.0
    while spent < 5e-3 and size < 16384:
        size *= 2
        a = torch.full((size, size), 1 / size, device=where).to(
            dtype
        )  # no random numbers: a resumed run has its own
        for _ in range(2):
            wait()
            began = time.perf_counter()
            a @ a
            wait()
            spent = time.perf_counter() - began
            best = max(best, 2 * size**3 / spent)
    return best


def flops_per_token(model: nn.Module) -> float:
    """Forward and backward of one token: 2 N forward, 2 N for the inputs' gradients, 2 per trained
    weight (Kaplan et al. 2020); of the experts only those that a token goes through. Attention is
    left out."""
    config, total = model.config, 0.0
    for name, p in model.named_parameters():
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1.0
        total += share * getattr(p, "ds_numel", p.numel()) * (6 if p.requires_grad else 4)
    return total
