"""Crash-safe checkpoints by validation on read.

After every rank has written its part and looked at it, rank 0 writes `complete.json` last, with the
size and sha256 of each file, signed by this user (trust.py). A folder without it, or whose files
differ from it, is incomplete: resume names it and takes the newest complete one. A folder whose
weights are not finite never gets it.

DANPU_CHECKSUM=size leaves the sha256 out, and with it the signature: damage that keeps a file's
size is not seen, and nobody can tell who wrote the files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from common.data.files import atomic_file
from common.runs import digests, trust

MARKER = "complete.json"
FORMAT = 2  # of the marker: large files have the sha256 of their ranges' sha256
# of DeepSpeed, transformers, FSDP and the plain loop: the rank that wrote a file
WRITER = re.compile(r"(?:pp_rank|rng_state|random)_(\d+)|__(\d+)_\d+\.distcp$")


def _files(folder: Path) -> list[Path]:
    own = (MARKER, MARKER + ".part")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in own)


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))


def written_by(name: str) -> int:
    """The rank that wrote a file: it has it in memory, and its machine must bring it to disk."""
    found = WRITER.search(name)
    return int(found[1] or found[2]) if found else 0


def refuse_not_finite(folder: str | Path) -> None:
    """SystemExit where a weight in the *.safetensors of `folder` is NaN or infinite, naming the
    first such tensor. Call on one process before the folder counts as a model.

    Models and adapters are in such files; so are the weights of ZeRO-3, which the shipped settings
    gather into one copy for each checkpoint (stage3_gather_16bit_weights_on_model_save). What is
    in pickles is not looked at: optimizer states, and ZeRO-3's shards where a user has switched
    that copy off; then final/ is the first place where its weights are seen.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    _refuse(paths, digests.digest(paths, sha256=False, weights=True))


def _refuse(paths: list[Path], found: list[digests.Digest]) -> None:
    for path, one in zip(paths, found, strict=True):
        if one.problem:
            raise SystemExit(
                f"{path}: {one.problem}; the folder counts neither as a checkpoint nor as a model. "
                "Earlier checkpoints are sound"
            )


def look_at(folder: str | Path, rank: int | None = None) -> dict[str, dict]:
    """Name -> size and sha256 of the files that `rank` wrote (None: of all), which are on the disk
    then. Call after all have written.

    SystemExit where a weight among them is not finite, as in refuse_not_finite.
    """
    folder = Path(folder)
    paths = _files(folder)
    if rank is not None:
        paths = [path for path in paths if written_by(_name(path, folder)) == rank]
    return _look_at(paths, folder)


def _look_at(paths: list[Path], folder: Path) -> dict[str, dict]:
    with_sha256 = digests.method() == "sha256"
    found = digests.digest(paths, with_sha256, weights=True, sync=True)
    _refuse(paths, found)
    return {_name(path, folder): one.facts() for path, one in zip(paths, found, strict=True)}


def mark_complete(folder: str | Path, known: dict[str, dict] | None = None, **facts) -> None:
    """Declare `folder` complete. Call on one process after all have written.

    known: what ranks have found of their files (look_at); the others are looked at here.
    facts: step, world_size ..., stored beside the list of files.
    SystemExit where its weights are not finite.
    """
    folder = Path(folder)
    files = dict(known or {})
    files |= _look_at([path for path in _files(folder) if _name(path, folder) not in files], folder)
    content = {**facts, "format": FORMAT, "files": dict(sorted(files.items()))}
    if has_checksums(content):
        content[trust.SIGNATURE] = trust.sign(content)
    with atomic_file(folder / MARKER) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def has_checksums(content: dict) -> bool:
    """Whether a marker tells of the content of all files, not only of their sizes."""
    return all("sha256" in file for file in content["files"].values())


def _marker(folder: Path) -> dict:
    """What complete.json says. ValueError for a file of another kind."""
    content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    is_list_of_files = isinstance(files, dict) and all(
        isinstance(one, dict) and "size" in one for one in files.values()
    )
    if not is_list_of_files:
        raise ValueError("it lists no files with their sizes")
    return content


def why_incomplete(folder: str | Path, sizes_only: bool = False) -> str | None:
    """None if the checkpoint is complete, else the reason in a few words.

    sizes_only: do not read the files, which takes minutes where they are large.
    """
    folder = Path(folder)
    try:
        content = _marker(folder)
    except FileNotFoundError:
        return "it was never completed (killed while saving)"
    except (ValueError, OSError) as error:
        return f"{MARKER} cannot be read ({error})"
    wanted = content["files"]
    if content.get("format", 1) > FORMAT:
        return f"{MARKER} was written by a newer version"

    for name, facts in wanted.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != facts["size"]:
            return f"{name} has {size:,} bytes instead of {facts['size']:,}"

    if sizes_only:
        return None
    names = [name for name, facts in wanted.items() if "sha256" in facts]
    ranged = content.get("format", 1) >= 2
    found = digests.digest([folder / name for name in names], ranged=ranged)
    for name, one in zip(names, found, strict=True):
        if one.sha256 != wanted[name]["sha256"]:
            return f"{name} is damaged (sha256 differs)"
    return None


def why_foreign(folder: str | Path) -> str | None:
    """None if a run of this user wrote all files of a complete checkpoint, else the reason in a few
    words."""
    folder = Path(folder)
    content = _marker(folder)
    # a link to a folder hides what is in it
    hidden = [path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()]
    found = [*_files(folder), *hidden]
    added = [path.name for path in found if _name(path, folder) not in content["files"]]
    if added:
        return f"{added[0]} was added to it"
    if not has_checksums(content):
        return "it was saved without checksums (DANPU_CHECKSUM=size)"
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
        elif why_incomplete(folder, sizes_only=True):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in past[limit:]:
        if best is None or folder.name != Path(best).name:
            shutil.rmtree(folder, ignore_errors=True)


def facts(folder: str | Path) -> dict:
    """What `mark_complete` stored beside the file list."""
    content = _marker(Path(folder))
    own = ("files", "format", trust.SIGNATURE)
    return {name: content[name] for name in content if name not in own}
