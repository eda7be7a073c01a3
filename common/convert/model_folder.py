"""What a model folder lacks, told in one line before anything of it is opened, and what loaders say
of one that they refuse."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from common.runs.trust import holds_code

POINTER = b"version https://git-lfs"
LAYOUTS = (  # (weights in one file, the index of several)
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def check(folder: str | Path, weights: bool = True) -> None:
    """SystemExit for a folder with Git LFS pointers in place of files, or (weights) without files
    that its index names. A hub id, and what is no folder, passes."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        return
    found = pointers(folder)
    if found:
        raise SystemExit(
            f"{folder} cannot be read: Git LFS pointers without contents ({listed(found)}); git "
            "lfs pull in that folder, or fetch the model again"
        )
    missing = missing_shards(folder) if weights else []
    if missing:
        raise SystemExit(
            f"{folder}: its index names files that are not there ({listed(missing)}); fetch the "
            "model again"
        )


def listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def is_pointer(path: Path) -> bool:
    """Whether a file, of whatever kind, is only the note that stands for it in Git."""
    if not path.is_file() or path.stat().st_size > 1024:
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def pointers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if is_pointer(path))


def missing_shards(folder: Path, to_come: Collection[str] = ()) -> list[str]:
    """Names in the index that a loader of this folder follows, of files that are not there.

    to_come: names of files that count as there.
    """

    def is_there(name: str) -> bool:
        return name in to_come or (folder / name).is_file()

    for whole, index in LAYOUTS:
        if is_there(whole):
            return []
        if is_there(index):
            return [name for name in shards(folder / index) if not is_there(name)]
    return []


def shards(index: Path) -> list[str]:
    """The files that an index names; none where it is no index."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []


def unused_class(folder: str | Path) -> str | None:
    """The tokenizer class of a folder's own Python code, in whose place transformers reads
    tokenizer.json where it knows the kind of model; None where the class is one of its own."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
    from transformers.utils import cached_file

    try:  # of a hub id: it has just been loaded
        file = cached_file(
            os.path.expanduser(folder), "tokenizer_config.json", local_files_only=True
        )
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None
    name = settings.get("tokenizer_class")
    if not name or "AutoTokenizer" not in settings.get("auto_map", {}):
        return None
    known = tokenizer_class_from_name(name) or tokenizer_class_from_name(f"{name}Fast")
    return None if known else name


def reason(error: Exception) -> str:
    """In one line why a loader took no model, adapter or tokenizer. Libraries advise to run what it
    brings; this does not."""
    words = " ".join(str(error).split())
    if holds_code(error):
        return "a pickle in it holds code, not only tensors; nothing of it was run"
    if "trust_remote_code" in words:
        return "it needs Python code of its own (auto_map), and nothing of that is run here"
    return words[:300]
