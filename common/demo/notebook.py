"""What the infer notebooks share: a finished run to look at, or a quick one made for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def find_or_train(given: str, recipe: Path, steps: int, suffix: str = "", **flags) -> str | Path:
    """A run, model or adapter to load: `given`, else the recipe's run, else a quick one.

    Args:
        given: what the reader wrote into the notebook's parameters.
        recipe: folder of train.py; its run is looked for in output/RECIPE + suffix beside it.
        steps: of the quick run, which goes to another folder, RECIPE + suffix + "-quick".
        flags: of train.py, for the quick run; eval_generate=None for one that knows no such flag.
    """
    if given:
        return given
    finished = recipe.parent / "output" / f"{recipe.name}{suffix}"
    if (finished / "final").is_dir():
        return finished
    told = " ".join(f"--{name} {value}" for name, value in flags.items() if value is not None)
    print(f"{finished} 里还没有模型；现在先训练一个很小的" + (f"（{told}）" if told else ""))
    quick = finished.with_name(f"{finished.name}-quick")
    if not (quick / "final").is_dir():
        flags = {"eval_generate": 0, "max_steps": steps, "overwrite_output_dir": True} | flags
        train(recipe, quick, **{name: value for name, value in flags.items() if value is not None})
    return quick


def train(recipe: Path, output: Path, **flags) -> None:
    """Run train.py and print what it says, without its progress; RuntimeError when it fails."""
    command = [sys.executable, str(recipe / "train.py"), "--output_dir", str(output)]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("step ")]
    print("\n".join(lines))
    if done.returncode:
        raise RuntimeError(f"train.py failed:\n{done.stderr[-2000:]}")
