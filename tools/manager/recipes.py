"""The recipes beside the manager, copied ones too, and the flags of their scripts."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from tools.manager import processes
from tools.manager.describe import MARK
from tools.manager.errors import Problem
from tools.manager.files import is_own, write_json

DESCRIBE = Path(__file__).with_name("describe.py")
SECONDS = 180  # for the flags of a script: it imports all that it trains with
LAUNCHED = re.compile(r'"\$here/(train\w*\.py)"')  # in a shell that calls launch
LONGEST_TITLE = 200  # characters
NOT_RECIPES = ("tests", "tools", "common", "output")
COMMON = (  # flags that a form shows first
    "stage",
    "algorithm",
    "size",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "model_max_length",
    "use_lora",
    "lora_r",
    "lora_alpha",
    "packing",
    "eval_ratio",
    "logging_steps",
    "save_steps",
    "bf16",
    "gradient_checkpointing",
    "seed",
)
MANAGED = {  # flags that the manager gives itself -> what to use instead
    "output_dir": "every job has a folder of its own",
    "data_path": "choose them as `dataset`",
    "model_name_or_path": "choose it as `model`",
    "resume_from_checkpoint": "use `resume`",
    "overwrite_output_dir": "every job has a folder of its own",
    "deepspeed": "choose a launcher: train_zero2.sh, train_zero3.sh",
    "local_rank": "the launcher gives it",
}
UPLOADS = ("push_to_hub", "hub_", "trackio_")  # beginnings of flags


@dataclass(frozen=True)
class Recipe:
    """launchers: name of a shell -> the script that it starts."""

    name: str
    folder: Path
    title_zh: str
    title_en: str
    scripts: tuple[str, ...]
    launchers: dict[str, str]

    def public(self) -> dict:
        return {
            "name": self.name,
            "folder": self.name,
            "title_zh": self.title_zh,
            "title_en": self.title_en,
            "scripts": list(self.scripts),
            "launchers": list(self.launchers),
        }


class Recipes:
    """root: the folder whose folders they are; cache: for the flags of their scripts."""

    def __init__(self, root: Path, cache: Path):
        self.root = root
        self.cache = cache
        self.locks: dict[tuple[str, str], threading.Lock] = {}
        self.described: dict[str, list] = {}

    def all(self) -> list[Recipe]:
        folders = [file.parent for file in sorted(self.root.glob("*/train.py"))]
        known = [one for one in folders if is_own(one) and one.name not in NOT_RECIPES]
        return [recipe_in(folder) for folder in known]

    def get(self, name: str | None) -> Recipe:
        found = [one for one in self.all() if one.name == name]
        if not found:
            raise Problem(404, "there is no such recipe", "recipe")
        return found[0]

    def script(self, recipe: Recipe, name: str | None) -> str:
        """The Python file of a script or launcher."""
        name = name or "train.py"
        if name in recipe.launchers:
            return recipe.launchers[name]
        if name not in recipe.scripts:
            raise Problem(404, f"{recipe.name} has no such script", "script")
        return name

    def flags(self, recipe: Recipe, script: str) -> list[dict]:
        """Groups of flags as the script's own parser has them; kept until a file changes.

        Problem 409 where the script does not come so far.
        """
        lock = self.locks.setdefault((recipe.name, script), threading.Lock())
        with lock:
            key = stamp(self.root, recipe, script)
            if key not in self.described:
                self.described[key] = self.read_cache(key) or self.ask(recipe, script, key)
            return self.described[key]

    def read_cache(self, key: str) -> list | None:
        try:
            return json.loads((self.cache / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def ask(self, recipe: Recipe, script: str, key: str) -> list[dict]:
        command = [sys.executable, str(DESCRIBE), str(recipe.folder / script)]
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=processes.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise Problem(409, f"{script} says nothing of its flags in {SECONDS} s") from None
        said = done.stdout.decode("utf-8", "replace").splitlines()
        told = [line for line in said if line.startswith(MARK)]
        if not told:
            words = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no word"]
            raise Problem(409, f"{recipe.name}/{script} does not start: {words[-1][:300]}")
        groups = json.loads(told[-1].removeprefix(MARK))
        for group in groups:
            for flag in group["flags"]:
                name = flag["name"].removeprefix("--")
                flag["managed"] = why_managed(name, *flag["aliases"]) is not None
                flag["common"] = name in COMMON and not flag["managed"]
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            write_json(self.cache / f"{key}.json", groups)
        except OSError:  # a full disk: asked again after the next start
            pass
        return groups


def why_managed(*names: str) -> str | None:
    """What to use instead of a flag, by its names, that jobs do not take; None for all others."""
    for name in names:
        bare = name.removeprefix("--")
        if bare.startswith(UPLOADS):
            return "nothing leaves this machine"
        if bare in MANAGED:
            return MANAGED[bare]
    return None


def recipe_in(folder: Path) -> Recipe:
    scripts = ["train.py", *sorted(file.name for file in folder.glob("train_*.py"))]
    launchers = {}
    for file in sorted([*folder.glob("train*.sh"), *folder.glob("pretrain.sh")]):
        text = file.read_text(encoding="utf-8", errors="replace")
        launched = LAUNCHED.search(text) if "launch.sh" in text else None
        if launched and launched[1] in scripts:
            launchers[file.name] = launched[1]
    return Recipe(
        folder.name,
        folder,
        title_of(folder / "README_zh.md"),
        title_of(folder / "README.md"),
        tuple(scripts),
        launchers,
    )


def title_of(readme: Path) -> str:
    """The first sentence of a README, under its name and the link to the other language."""
    try:
        lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    texts = [line for line in lines if line and not line.startswith(("#", "["))]
    texts = [line for line in texts if not re.match(r"(English|中文|\[).{0,3}\|", line)]
    first = re.split(r"(?<=。)|(?<=\.) ", texts[0])[0] if texts else ""
    plain = re.sub(r"[*`]|\[([^]]*)\]\([^)]*\)", r"\1", first)
    return plain if len(plain) <= LONGEST_TITLE else plain[:LONGEST_TITLE] + " …"


def stamp(root: Path, recipe: Recipe, script: str) -> str:
    """Changes with every file that could change the flags."""
    digest = hashlib.sha256(f"{recipe.folder} {script} {sys.version}".encode())
    files = [*sorted(recipe.folder.rglob("*.py")), *sorted((root / "common").rglob("*.py"))]
    for file in [*files, DESCRIBE, Path(__file__)]:
        try:
            facts = file.stat()
        except OSError:
            continue
        digest.update(f"{file} {facts.st_mtime_ns} {facts.st_size}\n".encode())
    return digest.hexdigest()[:24]
