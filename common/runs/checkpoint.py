"""Crash-safe checkpoints by validation on read.

After every rank has written its part, rank 0 writes `complete.json` last, with the size and sha256
of each file, signed by this user (trust.py). A folder without it, or whose files differ from it, is
incomplete: resume names it and takes the newest complete one. A folder whose weights are not finite
never gets it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common.data.files import atomic_file
from common.runs import trust

MARKER = "complete.json"
THREADS = 8  # that read files at once


def _digest(path: Path, sync: bool = False) -> dict:
    """Size in bytes and sha256 of a file; `sync` first forces it to disk, so that a power cut
    cannot damage it later."""
    with open(path, "rb+" if sync else "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"size": os.path.getsize(path), "sha256": _sha256(file)}


def _synced_digest(path: Path) -> dict:
    return _digest(path, sync=True)


def _sha256(file) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    own = (MARKER, MARKER + ".part")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in own)


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))


def refuse_not_finite(folder: str | Path) -> None:
    """SystemExit where a weight in the *.safetensors of `folder` is NaN or infinite, naming the
    first such tensor. Call on one process before the folder counts as a checkpoint or a model.

    Models and adapters are in such files; so are the weights of ZeRO-3, which the shipped settings
    gather into one copy for each checkpoint (stage3_gather_16bit_weights_on_model_save). What is
    in pickles is not read: optimizer states, and ZeRO-3's shards where a user has switched that
    copy off; then final/ is the first place where its weights are seen.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(_wrong_weights, paths))
    for path, problem in zip(paths, found, strict=True):
        if problem:
            raise SystemExit(
                f"{path}: {problem}; the folder counts neither as a checkpoint nor as a model. "
                "Earlier checkpoints are sound"
            )


def _wrong_weights(path: Path) -> str | None:
    """What is wrong with the weights of a file, in a few words; one tensor is in memory at a
    time."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
                    return f"{name} holds NaN or infinite numbers"
    except SafetensorError as error:
        return f"it cannot be read again ({error})"
    return None


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.element_size() == 1:  # float8 has no kernels
        tensor = tensor.float()
    # ten times as fast as isfinite(tensor).all(), without a mask of its size; NaN goes through
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def mark_complete(folder: str | Path, **facts) -> None:
    """Declare `folder` complete. Call on one process after all have written.

    facts: step, world_size ..., stored beside the list of files.
    SystemExit where its weights are not finite (refuse_not_finite).
    """
    folder = Path(folder)
    refuse_not_finite(folder)
    paths = _files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_synced_digest, paths))
    names = [_name(path, folder) for path in paths]
    files = dict(zip(names, digests, strict=True))
    content = {**facts, "files": files}
    content[trust.SIGNATURE] = trust.sign(content)
    with atomic_file(folder / MARKER) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def why_incomplete(folder: str | Path) -> str | None:
    """None if the checkpoint is complete, else the reason in a few words."""
    folder = Path(folder)
    try:
        wanted = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "it was never completed (killed while saving)"
    except (ValueError, KeyError, OSError) as error:
        return f"{MARKER} cannot be read ({error})"

    for name, digest in wanted.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != digest["size"]:
            return f"{name} has {size:,} bytes instead of {digest['size']:,}"

    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_digest, [folder / name for name in wanted]))
    for name, digest in zip(wanted, digests, strict=True):
        if digest["sha256"] != wanted[name]["sha256"]:
            return f"{name} is damaged (sha256 differs)"
    return None


def why_foreign(folder: str | Path) -> str | None:
    """None if a run of this user wrote all files of a complete checkpoint, else the reason in a few
    words."""
    folder = Path(folder)
    content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    # a link to a folder hides what is in it
    hidden = [path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()]
    found = [*_files(folder), *hidden]
    added = [path.name for path in found if _name(path, folder) not in content["files"]]
    if added:
        return f"{added[0]} was added to it"
    return trust.why_foreign(content)


def step_of(folder: str | Path) -> int:
    """checkpoint-120 -> 120."""
    return int(Path(folder).name.rsplit("-", 1)[1])


def all_checkpoints(output_dir: str | Path) -> list[Path]:
    """checkpoint-N folders, newest (highest step) first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        if path.is_dir() and path.name.rsplit("-", 1)[1].isdigit():
            found.append(path)
    return sorted(found, key=step_of, reverse=True)


def last_complete(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Newest complete checkpoint (or None), and one sentence per folder that was skipped."""
    skipped = []
    for folder in all_checkpoints(output_dir):
        reason = why_incomplete(folder)
        if reason is None:
            return folder, skipped
        skipped.append(f"skipped {folder}: {reason}")
    return None, skipped


def rotate(output_dir: str | Path, limit: int, step: int, best: str | None = None) -> None:
    """Keep the newest `limit` checkpoints up to `step` and the `best` one; delete incomplete ones
    beyond `step`, which an earlier start left."""
    past = []
    for folder in all_checkpoints(output_dir):
        if step_of(folder) <= step:
            past.append(folder)
        elif why_incomplete(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in past[limit:]:
        if best is None or folder.name != Path(best).name:
            shutil.rmtree(folder, ignore_errors=True)


def facts(folder: str | Path) -> dict:
    """What `mark_complete` stored beside the file list."""
    content = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))
    return {name: content[name] for name in content if name not in ("files", trust.SIGNATURE)}
