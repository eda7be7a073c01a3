"""Ids instead of paths: a request names what a listing of the configured folders has, and no path
is ever made from its words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.data.files import atomic_file

SKIPPED = ("__pycache__", "node_modules")
LARGEST_JSON = 32 << 20  # bytes of a file that a run wrote, e.g. report.json


def identify(path: Path) -> str:
    """The id of a file or folder: nothing of its name is in it."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def label(path: Path, root: Path) -> str:
    """A path for people: from the project's folder where it lies below it."""
    shown = path.relative_to(root) if path.is_relative_to(root) else path
    return os.fsencode(shown).decode("utf-8", "replace")


def is_below(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a path, its links followed, lies in one of the folders."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, a byte that no name has
        return False
    return any(real.is_relative_to(folder.resolve()) for folder in folders)


def walk(folder: Path, depth: int) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, names of folders, names of files) below `folder`, at most `depth` levels down;
    links, hidden names and caches are left out. Names of folders may be removed to not go there."""
    for here, folders, files in os.walk(folder):
        place = Path(here)
        level = len(place.relative_to(folder).parts)
        kept = [name for name in sorted(folders) if is_own(place / name)]
        folders[:] = kept if level < depth else []
        yield place, folders, [name for name in sorted(files) if is_own(place / name)]


def is_own(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name in SKIPPED
    return not hidden and not path.is_symlink()


def read_json(file: Path) -> dict:
    """A JSON object that a run wrote; {} where it is absent, damaged or no file of a run."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            return {}
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(file: Path, content: dict) -> None:
    """Replaced at once; OSError on a full disk, what was there stays."""
    with atomic_file(file) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for place, _, names in walk(folder, 8):
        for name in names:
            try:
                total += (place / name).stat().st_size
            except OSError:  # removed meanwhile
                continue
    return total
