"""Data sets: the recipes' samples, uploads, and files of the configured folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from common.data.files import suffix_of
from tools.manager.errors import Problem
from tools.manager.files import identify, is_own, label, walk
from tools.manager.recipes import Recipes
from tools.manager.settings import Settings

KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
COUNTED = 64 << 20  # bytes of a file whose rows are counted
DEPTH = 4
NAME = re.compile(r"[\w\u4e00-\u9fff][\w\u4e00-\u9fff .()-]{0,100}")


class Datasets:
    def __init__(self, settings: Settings, recipes: Recipes):
        self.settings = settings
        self.recipes = recipes
        self.counted: dict[tuple, int | None] = {}

    def places(self) -> list[tuple[Path, str, str | None]]:
        """(folder, kind, recipe) of everything that may be listed."""
        found = [(self.settings.uploads, "upload", None)]
        found += [(folder, "folder", None) for folder in self.settings.datasets]
        for recipe in self.recipes.all():
            found.append((recipe.folder / "data", "sample", recipe.name))
        return found

    def paths(self) -> Iterator[tuple[Path, str, str | None]]:
        """A folder of samples or a configured one, then its files."""
        for folder, kind, recipe in self.places():
            if folder.is_symlink() or not folder.is_dir():
                continue
            if kind != "upload":
                yield folder, kind, recipe
            for place, folders, names in walk(folder, DEPTH):
                if kind != "upload":
                    yield from ((place / name, kind, recipe) for name in folders)
                for name in names:
                    if suffix_of(Path(name)) in KINDS:
                        yield place / name, kind, recipe

    def all(self) -> list[dict]:
        found = []
        for path, kind, recipe in self.paths():
            try:
                found.append(self.public(path, kind, recipe))
            except OSError:  # removed meanwhile
                continue
        return found

    def public(self, path: Path, kind: str, recipe: str | None) -> dict:
        facts = path.stat()
        is_file = path.is_file()
        return {
            "id": identify(path),
            "path_label": label(path, self.settings.root) + ("" if is_file else "/"),
            "size_bytes": facts.st_size if is_file else None,
            "modified": facts.st_mtime,
            "rows": self.rows(path) if is_file else None,
            "kind": kind,
            "recipe": recipe,
        }

    def rows(self, path: Path) -> int | None:
        """Of files with a row on each line; None where only reading all of it would tell."""
        facts = path.stat()
        key = (path, facts.st_mtime_ns, facts.st_size)
        if suffix_of(path) != ".jsonl" or path.suffix == ".gz" or facts.st_size > COUNTED:
            return None
        if key not in self.counted:
            with open(path, "rb") as file:
                self.counted[key] = sum(1 for line in file if line.strip())
        return self.counted[key]

    def get(self, name: str | None) -> Path:
        for path, _, _ in self.paths():
            if identify(path) == name:
                return path
        raise Problem(404, "there is no such data set", "dataset")

    # ---- uploads ----
    def new_file(self, name: str) -> Path:
        """Where an upload of this name goes; another name where that is taken. Problem 400 for a
        kind that is not trained from."""
        name = name.replace("\\", "/").rpartition("/")[2].strip()
        if not NAME.fullmatch(name) or not is_own(Path(name)):
            raise Problem(400, "a file name has letters, digits, blanks and . ( ) - _", "name")
        suffix = suffix_of(Path(name))
        if suffix not in KINDS:
            raise Problem(400, f"only {' '.join(KINDS)} and .gz of them are taken", "file")
        ending = name[name.lower().rindex(suffix) :]
        stem = name[: -len(ending)]
        self.settings.uploads.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            shown = name if number == 1 else f"{stem} ({number}){ending}"
            path = self.settings.uploads / shown
            if not path.exists():
                return path
        raise Problem(409, "too many files have this name", "name")

    def keep(self, part: Path, name: str) -> dict:
        """Give an uploaded file its name; nothing is ever replaced."""
        while True:
            path = self.new_file(name)
            try:
                os.link(part, path)  # unlike a rename it fails where another upload was quicker
            except FileExistsError:
                continue
            break
        part.unlink()
        return self.public(path, "upload", None)
