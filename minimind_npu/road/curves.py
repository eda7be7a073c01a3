"""Loss and bits per byte of a road against FLOP and against time, as pictures.

Work and seconds are those of the whole stage, taken as even over its steps; stages follow each
other. Held-out rows are measured in loss along a run and in bits per byte at its ends: the bytes of
a token, which do not change, make one of the other.
"""

from __future__ import annotations

from pathlib import Path

from common.data.files import atomic_file

SMOOTHED = 50  # points that a training curve is drawn with, at most
UNITS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
FEWEST = 3  # of a unit, that a road takes


def draw(
    out: Path, stages: dict[str, dict], histories: dict[str, dict], names: tuple[str, str]
) -> list[str]:
    """Write the pictures that there is something for; -> their names.

    stages: the facts of report.json by stage, in their order; histories: trainer_state.json of
    them; names: of the pictures of loss and of bits per byte.
    """
    losses = {}
    for stage, facts in stages.items():
        points = training_points(facts, histories[stage])
        if stage != "rl" and points:  # its loss says nothing of what it learns
            losses[stage] = points
    bits = bits_points(stages, histories)
    drawn = []
    for name, title, lines in (
        (names[0], "training loss", losses),
        (names[1], "held-out bits per byte", bits),
    ):
        if lines:
            picture(out / name, title, placed(lines, stages))
            drawn.append(name)
    return drawn


def training_points(facts: dict, state: dict) -> list[tuple[float, float]]:
    """(share of the stage that is done, mean loss of some steps)."""
    entries = [entry for entry in state.get("log_history", []) if "loss" in entry]
    if not entries or not facts["steps"]:
        return []
    size = max(1, len(entries) // SMOOTHED)
    points = []
    for start in range(0, len(entries), size):
        part = entries[start : start + size]
        mean = sum(entry["loss"] for entry in part) / len(part)
        points.append((part[-1]["step"] / facts["steps"], mean))
    return points


def bits_points(stages: dict[str, dict], histories: dict[str, dict]) -> dict:
    """{"pretrain": (share of the stage, bits per byte)}: only texts have bytes."""
    facts = stages.get("pretrain")
    if not facts:
        return {}
    before = facts["metrics"]["before"]
    after = facts["metrics"]["after"]
    if "bits_per_byte" not in after:
        return {}
    of_loss = after["bits_per_byte"] / after["loss"]
    points = []
    if "bits_per_byte" in before:
        points.append((0.0, before["bits_per_byte"]))
    for entry in histories["pretrain"].get("log_history", []):
        if "eval_loss" in entry and 0 < entry["step"] < facts["steps"]:
            points.append((entry["step"] / facts["steps"], of_loss * entry["eval_loss"]))
    return {"pretrain": [*points, (1.0, after["bits_per_byte"])]}


def placed(lines: dict, stages: dict[str, dict]) -> dict[str, list[tuple]]:
    """Shares of each stage -> (FLOP, seconds, value) from the start of the road."""
    found = {}
    flops = 0.0
    seconds = 0.0
    for stage, facts in stages.items():
        own = facts.get("flops", 0.0)
        points = []
        for share, value in lines.get(stage, []):
            points.append((flops + share * own, seconds + share * facts["seconds"], value))
        if points:
            found[stage] = points
        flops += own
        seconds += facts["seconds"]
    return found


def unit_of(seconds: float) -> str:
    """The largest of which there are some."""
    found = "seconds"
    for name, size in UNITS.items():
        if seconds >= FEWEST * size:
            found = name
    return found


def picture(file: Path, title: str, lines: dict[str, list[tuple]]) -> None:
    """Two panels that share their height: over FLOP, over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), dpi=120, sharey=True)
    unit = unit_of(max(points[-1][1] for points in lines.values()))
    scales = {"FLOP": 1.0, unit: UNITS[unit]}
    for place, (label, scale) in enumerate(scales.items()):
        axes = panels[place]
        for stage, points in lines.items():
            along = [point[place] / scale for point in points]
            values = [point[2] for point in points]
            axes.plot(along, values, marker="o", markersize=2.5, linewidth=1.5, label=stage)
        axes.set(xlabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=title)
    panels[1].legend()
    figure.tight_layout()
    with atomic_file(file) as part:
        figure.savefig(part, format="png")
    plt.close(figure)
