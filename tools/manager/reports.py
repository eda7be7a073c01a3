"""What runs left for people: report.md, report.json, pictures; and a table over all runs."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlencode

from tools.manager.errors import Problem
from tools.manager.files import read_json, walk
from tools.manager.weights import Weights

LONGEST = 1 << 20  # bytes of report.md
FACTS = ("recipe", "model", "device", "steps", "seconds", "tokens_per_second", "loss", "rows")


def pictures(folder: Path) -> list[str]:
    """Names of the PNG files of a run."""
    if not folder.is_dir():
        return []
    _, _, names = next(iter(walk(folder, 0)), (folder, [], []))
    return [name for name in names if name.lower().endswith(".png")]


def report(folder: Path, **query: str) -> dict:
    """query: what names the run in the addresses of its pictures. Problem 404 where the run has
    left nothing yet."""
    markdown = ""
    file = folder / "report.md"
    if file.is_file() and not file.is_symlink():
        with open(file, "rb") as opened:
            markdown = opened.read(LONGEST).decode("utf-8", "replace")
    found = read_json(folder / "report.json")
    names = pictures(folder)
    if not markdown and not found and not names:
        raise Problem(404, "this run has left no report yet")
    shown = []
    for name in names:
        address = urlencode(query | {"name": name})
        shown.append({"name": name, "url": f"/api/report/picture?{address}"})
    return {"markdown": markdown, "json": found, "pictures": shown}


def picture(folder: Path, name: str) -> Path:
    if name not in pictures(folder):
        raise Problem(404, "there is no such picture", "name")
    return folder / name


def evaluations(weights: Weights) -> dict:
    """The metrics of all runs before and after, a row for each metric."""
    table = []
    runs = []
    for folder, one in weights.with_folders():
        found = read_json(folder / "report.json")
        metrics = found.get("metrics")
        if not isinstance(metrics, dict):
            continue
        place = {"weights": one["id"], "path_label": one["path_label"]}
        runs.append(place | {name: found.get(name) for name in FACTS})
        before = metrics.get("before") if isinstance(metrics.get("before"), dict) else {}
        after = metrics.get("after") if isinstance(metrics.get("after"), dict) else {}
        for name, value in after.items():
            row = {"recipe": one["recipe"], "metric": name}
            table.append(place | row | {"before": before.get(name), "after": value})
    return {"table": table, "runs": runs}
