"""Crash-safe checkpoints by validation on read.

After every rank has written its part, rank 0 writes `complete.json` last, with the size and sha256
of each file. A folder without it, or whose files differ from it, is torn: resume names it and takes
the newest whole one. DeepSpeed's optimizer files are pickles: resume only from folders you wrote
yourself.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MARKER = "complete.json"


def _digest(path: Path, sync: bool = False) -> dict:
    """Size in bytes and sha256 of a file; `sync` first forces it to disk, so that a power cut
    cannot tear it later."""
    with open(path, "rb+" if sync else "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"size": os.path.getsize(path), "sha256": _sha256(file)}


def _sha256(file) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.rglob("*") if p.is_file() and p.name not in (MARKER, MARKER + ".part")
    )


def mark_complete(folder: str | Path, **facts) -> None:
    """Declare `folder` whole. Call on one process after all have written. `facts` (step, world_size
    ...) are stored."""
    folder = Path(folder)
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(lambda p: _digest(p, sync=True), _files(folder)))
    files = {str(p.relative_to(folder)): d for p, d in zip(_files(folder), digests, strict=True)}
    part = folder / (MARKER + ".part")
    with open(part, "w") as file:
        json.dump({**facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / MARKER)


def why_incomplete(folder: str | Path) -> str | None:
    """None if the checkpoint is whole, else the reason in a few words."""
    folder = Path(folder)
    try:
        wanted = json.loads((folder / MARKER).read_text())["files"]
    except FileNotFoundError:
        return "it was never completed (killed while saving)"
    except (ValueError, KeyError, OSError) as error:
        return f"{MARKER} cannot be read ({error})"
    for name, digest in wanted.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != digest["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {digest['size']:,}"
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda name: _digest(folder / name), wanted)
        damaged = [
            name
            for name, d in zip(wanted, digests, strict=True)
            if d["sha256"] != wanted[name]["sha256"]
        ]
    return f"{damaged[0]} is damaged (sha256 differs)" if damaged else None


def step_of(folder: str | Path) -> int:
    """checkpoint-120 -> 120."""
    return int(Path(folder).name.rsplit("-", 1)[1])


def all_checkpoints(output_dir: str | Path) -> list[Path]:
    """checkpoint-N folders, newest (highest step) first."""
    found = (
        p
        for p in Path(output_dir).glob("checkpoint-*")
        if p.is_dir() and p.name.rsplit("-", 1)[1].isdigit()
    )
    return sorted(found, key=step_of, reverse=True)


def last_complete(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Newest whole checkpoint (or None), and one sentence per folder that was skipped."""
    skipped = []
    for folder in all_checkpoints(output_dir):
        reason = why_incomplete(folder)
        if reason is None:
            return folder, skipped
        skipped.append(f"skipped {folder}: {reason}")
    return None, skipped


def facts(folder: str | Path) -> dict:
    """What `mark_complete` stored beside the file list."""
    return {
        k: v for k, v in json.loads((Path(folder) / MARKER).read_text()).items() if k != "files"
    }
