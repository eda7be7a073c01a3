"""What a run leaves for people: loss.png, report.md, report.json (same keys in every recipe), a
printed table."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

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
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "torch-npu")


def versions() -> dict[str, str]:
    """Versions of python, of the libraries that matter and, in a git checkout, of the recipe."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(
            git, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    return found


def plot_curve(history: list[dict], key: str, path: Path, title: str, ylabel: str) -> None:
    """`key` in training (raw and smoothed) and held out (eval_<key>) over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [(e["step"], e[key]) for e in history if key in e]
    held_out = sorted({(e["step"], e[f"eval_{key}"]) for e in history if f"eval_{key}" in e})
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    if train:
        steps, values = zip(*train, strict=True)
        window = len(values) // 50  # on each side; a short history is shown as it is
        parts = (values[max(0, i - window) : i + window + 1] for i in range(len(values)))
        smooth = [sum(part) / len(part) for part in parts]
        axes.plot(
            steps,
            values,
            color="tab:blue",
            alpha=0.3 if window else 1,
            linewidth=1 if window else 2,
            label="train",
        )
        if window:
            axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="train, smoothed")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color="tab:orange",
            marker="o",
            markersize=4,
            label="held out",
        )
    axes.set(xlabel="step", ylabel=ylabel, title=title)
    if min([value for _, value in [*train, *held_out]], default=0) >= 0:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.tight_layout()
    part = path.with_suffix(".part.png")
    figure.savefig(part)
    os.replace(part, path)
    plt.close(figure)


def before_after(metrics: dict) -> str:
    """{"before": {...}, "after": {...}} -> a Markdown table, one metric a line."""
    lines = ["| held out | before | after |", "|---|---:|---:|"]
    for name, after in metrics["after"].items():
        before = metrics["before"].get(name)
        lines.append(f"| {name.replace('_', ' ')} | {_number(before)} | {_number(after)} |")
    return "\n".join(lines)


def _number(value) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.1f}"
        if abs(value) >= 100
        else f"{value:.4f}"
    )


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
    table = before_after(facts["metrics"])
    rows, dropped = (
        facts["rows"],
        ", ".join(f"{n} {why}" for why, n in facts["rows"]["dropped"].items()),
    )
    shown = [f"![{key}]({name})" for key, name in pictures.items()]
    by_epoch = ", ".join(f"{peak:,.0f}" for peak in facts.get("peak_memory_mb_by_epoch", ()))
    text = [
        f"# {facts['recipe']}: {facts['model']}",
        "",
        table,
        "",
        *shown,
        "",
        f"- {facts['device']}, {facts['world_size']} process(es), {facts['dtype']}",
        f"- rows: {rows['read']:,} read, {rows['used']:,} used for training, {rows.get('held_out', 0):,} held out; "
        f"dropped: {dropped or 'none'}",
        f"- tokens: {facts['tokens']['total']:,}, of which {facts['tokens']['label']:,} trained on",
        f"- {facts['seconds']:,.0f} s, {facts['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {facts['peak_memory_mb']:,.0f} MiB{by_epoch and ' (by epoch: ' + by_epoch + ')'}",
        f"- training loss: {_number(facts['loss']['first'])} -> {_number(facts['loss']['last'])}",
        f"- {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}",
        "",
        "```bash",
        facts["command"],
        "```",
        "",
    ]
    if samples:
        text += ["| prompt | reference | before | after |", "|---|---|---|---|"]
        text += [
            "| "
            + " | ".join(_cell(s[k]) for k in ("prompt", "reference", "before", "after"))
            + " |"
            for s in samples
        ]
    for name, content in {
        "report.md": "\n".join(text) + "\n",
        "report.json": json.dumps(facts, indent=1, ensure_ascii=False),
    }.items():
        part = out / (name + ".part")
        part.write_text(content, encoding="utf-8")
        os.replace(part, out / name)
    return table


def _cell(text: str, width: int = 80) -> str:
    text = " ".join(str(text).split()).replace("|", "\\|")
    return text if len(text) <= width else text[:width] + " ..."
