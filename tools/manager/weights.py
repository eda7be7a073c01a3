"""Weights below the configured folders: runs, model folders and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tools.manager.errors import Problem
from tools.manager.files import folder_size, identify, label, read_json, walk
from tools.manager.settings import Settings

DEPTH = 5
RUN_FILE = "run.json"  # what common/runs/run_folder.py writes; it needs torch
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
NOT_FOLLOWED = ("checkpoint-", "final", "runs")  # within a run


class Weights:
    def __init__(self, settings: Settings):
        self.settings = settings
        self.sizes: dict[tuple, float] = {}

    def folders(self) -> Iterator[Path]:
        """Runs and model folders; what lies in one is a part of it."""
        seen = set()
        for top in (*self.settings.weights, self.settings.outputs):
            if not top.is_dir():
                continue
            for place, folders, names in walk(top, DEPTH):
                if place in seen:
                    folders.clear()
                    continue
                if RUN_FILE in names or CONFIG in names or ADAPTER in names:
                    seen.add(place)
                    folders[:] = [name for name in folders if not name.startswith(NOT_FOLLOWED)]
                    yield place

    def with_folders(self) -> list[tuple[Path, dict]]:
        """Newest first."""
        found = []
        for folder in self.folders():
            try:
                found.append((folder, self.public(folder)))
            except OSError:  # removed meanwhile
                continue
        return sorted(found, key=lambda one: -one[1]["modified"])

    def all(self) -> list[dict]:
        return [one for _, one in self.with_folders()]

    def public(self, folder: Path) -> dict:
        run = read_json(folder / RUN_FILE)
        report = read_json(folder / "report.json")
        model = model_folder(folder)
        metrics = report.get("metrics")
        after = metrics.get("after") if isinstance(metrics, dict) else None
        recipe = report.get("recipe")
        modified = max(path.stat().st_mtime for path in (folder, model) if path.exists())
        return {
            "id": identify(folder),
            "path_label": label(folder, self.settings.root),
            "recipe": recipe if isinstance(recipe, str) else None,
            "kind": kind_of(folder, model),
            "size_mb": self.size_mb(model, modified),
            "modified": modified,
            "finished": run.get("step") is not None if run else model.exists(),
            "metrics": after if isinstance(after, dict) else None,
            "chat": can_chat(model),
        }

    def size_mb(self, folder: Path, modified: float) -> float:
        key = (folder, modified)
        if key not in self.sizes:
            self.sizes[key] = round(folder_size(folder) / (1 << 20), 1)
        return self.sizes[key]

    def get(self, name: str | None) -> Path:
        """The folder of a run, model or adapter."""
        for folder in self.folders():
            if identify(folder) == name:
                return folder
        raise Problem(404, "there are no such weights", "weights")


def model_folder(folder: Path) -> Path:
    """A run's final/, another folder itself."""
    final = folder / "final"
    return final if final.is_dir() and not final.is_symlink() else folder


def kind_of(folder: Path, model: Path) -> str:
    if (model / ADAPTER).is_file():
        return "adapter"
    return "run" if (folder / RUN_FILE).is_file() else "folder"


def can_chat(model: Path) -> bool:
    """Whether the server of OpenAI's words could open it: a causal language model, or an adapter
    of one."""
    if read_json(model / ADAPTER).get("task_type") == "CAUSAL_LM":
        return True
    names = read_json(model / CONFIG).get("architectures")
    is_causal = isinstance(names, list) and any(str(n).endswith("ForCausalLM") for n in names)
    return is_causal and (model / "tokenizer_config.json").is_file()
