"""What a run leaves for people: loss.png, report.md, report.json (same keys in every recipe), and a
printed table."""

from __future__ import annotations

import json
from pathlib import Path

from common import cli, device
from common.data.files import atomic_file
from common.runs import memory
from common.runs.engine import engine
from common.runs.machine import versions
from common.runs.run_folder import read_run_file, write_run_file

KEYS = (
    "recipe",
    "model",
    "device",
    "dtype",
    "world_size",
    "rows",
    "tokens",
    "seconds",
    "tokens_per_second",
    "peak_memory_mb",
    "loss",
    "metrics",
    "versions",
    "command",
)
PLOTS = {"loss": "loss per label token"}
LOG_RANGE = 20  # largest / smallest value of a curve from which its axis is logarithmic
SHOWN = 12  # samples in report.md


# ---- facts ---------------------------------------------------------------------------------------


def parameters(model) -> dict[str, int]:
    """{"total", "trained"}: numbers of parameters, also where ZeRO-3 has spread them."""
    total = 0
    trained = 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        if parameter.requires_grad:
            trained += size
    return {"total": total, "trained": trained}


def facts(
    recipe: str,
    model_name: str,
    model,
    training,
    rows: dict,
    steps: int,
    tokens: int,
    label_tokens: int,
    seconds: float,
    losses: list[float],
    before: dict,
    after: dict,
    peaks: list[float] = (),
) -> dict:
    """What report.json says, with the same keys in every recipe.

    Args:
        training: TrainingArguments.
        rows: counts of the data: read, used, dropped {reason: n}, ...
        losses: training losses in the order of the steps; before, after: {"metrics", ...}.
        peaks: peak memory of each epoch in MiB, where it is known.
    """
    found = {
        "recipe": recipe,
        "model": model_name,
        "device": device.name(),
        "dtype": str(device.train_dtype(training)).removeprefix("torch."),
        "world_size": training.world_size,
        "engine": engine(training),
        "rows": rows,
        "parameters": parameters(model),
        "tokens": {"total": tokens, "label": label_tokens},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "peak_memory_mb": round(memory.peak_mb(), 1),
        "steps": steps,
        "loss": {"first": losses[0] if losses else None, "last": losses[-1] if losses else None},
        "metrics": {"before": before.get("metrics", {}), "after": after["metrics"]},
        "command": cli.resume_command(),
    }
    if peaks:
        found["epoch_peak_memory_mb"] = {
            "first": peaks[0],
            "last": peaks[-1],
            "highest": max(peaks),
        }
    return found


def before_and_after(before: list[dict], after: list[dict]) -> list[dict]:
    """Samples of two measurements -> at most SHOWN of the second, evenly spread, each with the
    answer of the first to the same messages."""

    def question(sample: dict) -> str:
        asked = [sample.get("messages", sample["prompt"]), sample.get("tools")]
        return json.dumps(asked, sort_keys=True)

    answers = {question(sample): sample["answer"] for sample in before}
    every = max(1, len(after) // SHOWN)
    shown = after[::every][:SHOWN]
    return [
        {**sample, "before": answers.get(question(sample), ""), "after": sample["answer"]}
        for sample in shown
    ]


# ---- of a trainer --------------------------------------------------------------------------------


def write_training_report(trainer, recipe: str, model_name: str, rows: dict, after: dict) -> None:
    """Everything that a training leaves for people, and the table on the terminal; rank 0 does it.

    Args:
        trainer: a RecipeTrainer that has trained.
        rows: counts of the data: read, used, dropped {reason: n}, ...
        after: what `measure_all` gave after training.
    """
    if not trainer.is_world_process_zero():
        return
    history = trainer.state.log_history
    last = next((entry for entry in reversed(history) if "total_tokens" in entry), {})
    found = facts(
        recipe=recipe,
        model_name=model_name,
        model=trainer.model,
        training=trainer.args,
        rows=rows,
        steps=trainer.state.global_step,
        tokens=int(last.get("total_tokens", 0)),
        label_tokens=int(last.get("total_label_tokens", 0)),
        seconds=last.get("train_seconds", 0.0),
        losses=[entry["loss"] for entry in history if "loss" in entry],
        before=trainer.before,
        after=after,
        peaks=[e["epoch_peak_memory_mb"] for e in history if "epoch_peak_memory_mb" in e],
    )
    out = Path(trainer.args.output_dir)
    samples = before_and_after(trainer.before.get("samples", []), after["samples"])
    table = write_report(out, found, history, samples, trainer.plots)
    trainer.state.save_to_json(str(out / "trainer_state.json"))
    # last, since it says that nothing is missing
    write_run_file(out, read_run_file(out) | {"step": trainer.state.global_step})
    print(
        f"\n{table}\n\nmodel   {out / 'final'}\nreport  {out / 'report.md'}, {out / 'loss.png'}",
        flush=True,
    )


# ---- pictures ------------------------------------------------------------------------------------


def plot_curve(history: list[dict], key: str, path: Path, title: str, ylabel: str) -> None:
    """`key` in training (raw and smoothed) and held out (eval_<key>) over steps, and the learning
    rate in a thin panel below, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = _points(history, key)
    held_out = _points(history, f"eval_{key}")
    rates = _points(history, "learning_rate")
    figure, (axes, below) = plt.subplots(
        2, figsize=(8, 5), dpi=120, sharex=True, height_ratios=(5, 1)
    )
    if train:
        _draw_training(axes, train)
    if held_out:
        steps, values = zip(*held_out, strict=True)
        axes.plot(steps, values, color="tab:orange", marker="o", markersize=4, label="held out")
    axes.set(ylabel=ylabel, title=title)
    _choose_scale(axes, [value for _, value in [*train, *held_out]])
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    if rates:
        steps, values = zip(*rates, strict=True)
        below.plot(steps, values, color="tab:gray", linewidth=1)
    below.set(xlabel="step", ylabel="lr")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.grid(alpha=0.3)
    figure.subplots_adjust(left=0.1, right=0.98, top=0.93, bottom=0.1, hspace=0.18)
    with atomic_file(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)


def _points(history: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) in the order of the steps, the last one where a step has several."""
    return sorted({entry["step"]: entry[key] for entry in history if key in entry}.items())


def _draw_training(axes, points: list[tuple[int, float]]) -> None:
    steps, values = zip(*points, strict=True)
    window = len(values) // 50  # on each side; a short history is shown as it is
    if not window:
        axes.plot(steps, values, color="tab:blue", linewidth=2, label="train")
        return
    smooth = []
    for i in range(len(values)):
        near = values[max(0, i - window) : i + window + 1]
        smooth.append(sum(near) / len(near))
    axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1, label="train")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="train, smoothed")


def _choose_scale(axes, values: list[float]) -> None:
    """Logarithmic where the values span more than a linear axis can show, else from zero."""
    if not values or min(values) < 0:
        return
    if min(values) > 0 and max(values) >= LOG_RANGE * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


# ---- texts ---------------------------------------------------------------------------------------


def write_report(
    out: Path, facts: dict, history: list[dict], samples: list[dict], plots: dict = PLOTS
) -> str:
    """Write report.json, report.md and a picture of each curve (loss.png, ...) into `out`; returns
    the table to print.

    Args:
        facts: a value for each of KEYS but "versions"; more keys are welcome.
        history: the Trainer's log_history.
        samples: [{"prompt", "reference", "before", "after", ...}], shown in report.md, whole in
            report.json.
        plots: key in the history -> label of its axis; the picture is called after what follows the
            key's last "/".
    """
    facts = {**facts, "versions": versions(), "samples": samples}
    missing = [key for key in KEYS if key not in facts]
    if missing:
        raise ValueError(f"report lacks {missing}")
    pictures = {key: f"{key.split('/')[-1]}.png" for key in plots}
    for key, name in pictures.items():
        plot_curve(history, key, out / name, f"{facts['recipe']}: {facts['model']}", plots[key])
    text = _markdown(facts, pictures, samples)
    contents = {
        "report.md": text,
        "report.json": json.dumps(facts, indent=1, ensure_ascii=False),
    }
    for name, content in contents.items():
        with atomic_file(out / name) as part:
            part.write_text(content, encoding="utf-8", errors="backslashreplace")
    return metrics_table(facts["metrics"])


def metrics_table(metrics: dict) -> str:
    """{"before": {...}, "after": {...}} -> a Markdown table, one metric a line."""
    if not metrics["after"]:
        return "nothing was held out: no metrics"
    lines = ["| held out | before | after |", "|---|---:|---:|"]
    for name, after in metrics["after"].items():
        before = metrics["before"].get(name)
        lines.append(f"| {name.replace('_', ' ')} | {_number(before)} | {_number(after)} |")
    return "\n".join(lines)


def _number(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}"


def _markdown(facts: dict, pictures: dict[str, str], samples: list[dict]) -> str:
    rows = facts["rows"]
    tokens = facts["tokens"]
    loss = facts["loss"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in rows["dropped"].items())
    known = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"# {facts['recipe']}: {facts['model']}", "", metrics_table(facts["metrics"]), ""]
    lines += [f"![{key}]({name})" for key, name in pictures.items()]
    lines += [
        "",
        f"- {facts['device']}, {facts['world_size']} process(es), {facts['dtype']}",
        f"- rows: {rows['read']:,} read, {rows['used']:,} used for training, "
        f"{rows.get('held_out', 0):,} held out; dropped: {dropped or 'none'}",
        f"- tokens: {tokens['total']:,}, of which {tokens['label']:,} trained on",
        f"- {facts['seconds']:,.0f} s, {facts['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {_memory(facts)}",
        f"- training loss: {_number(loss['first'])} -> {_number(loss['last'])}",
        f"- {known}",
        "",
        "```bash",
        facts["command"],
        "```",
        "",
    ]
    if samples:
        lines += ["| prompt | reference | before | after |", "|---|---|---|---|"]
    for sample in samples:
        cells = [_cell(sample[key]) for key in ("prompt", "reference", "before", "after")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _memory(facts: dict) -> str:
    peak = f"{facts['peak_memory_mb']:,.0f} MiB"
    epochs = facts.get("epoch_peak_memory_mb")
    if not epochs:
        return peak
    return f"{peak} (first epoch {epochs['first']:,.0f}, last {epochs['last']:,.0f})"


def _cell(text: str, width: int = 80) -> str:
    text = " ".join(str(text).split()).replace("|", "\\|")
    return text if len(text) <= width else text[:width] + " ..."
