"""A folder that holds a fetched model: the record of what is whole in it, and reading all of it
again."""

from __future__ import annotations

import glob
import json
import shlex
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.hub import fetch, weights
from tools.hub.fetch import Entry, size_text
from tools.hub.link import Fatal

RECORD, LOCK = ".danpu.json", ".danpu.lock"
MANIFEST = "danpu-manifest"  # key that shows that a manifest.json is ours


def say(text: str) -> None:
    print(text, flush=True)


# ---- the record ---------------------------------------------------------------------------------------------


def load_record(folder: Path) -> dict:
    """source, place, repo, revision, commit, wanted [paths], files {path: size, sha256, git,
    mtime_ns}; {} if none.

    A file stands in `files` from the moment on when it is whole.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
        for path in [*record["files"], *record["wanted"]]:
            fetch.safe_target(folder, path)
        return record
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, Fatal):
        raise SystemExit(
            f"{folder / RECORD} cannot be read; delete it, then fetch with --repair true"
        ) from None


def save_record(folder: Path, record: dict) -> None:
    draft = folder / f"{RECORD}.new"
    draft.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    fetch.settle(draft, folder / RECORD)


def note_whole(folder: Path, record: dict, entry: Entry, sha256: str) -> None:
    stat = (folder / entry.path).stat()
    known = {"size": stat.st_size, "sha256": sha256, "git": entry.git, "mtime_ns": stat.st_mtime_ns}
    record["files"][entry.path] = known
    save_record(folder, record)


def untouched(folder: Path, record: dict, path: str) -> dict | None:
    """What is recorded of a file, if the one on the disk has still that size and date; else
    None."""
    known, target = record.get("files", {}).get(path), folder / path
    if known is None or not target.is_file():
        return None
    stat = target.stat()
    return known if (stat.st_size, stat.st_mtime_ns) == (known["size"], known["mtime_ns"]) else None


def is_whole(folder: Path, record: dict, entry: Entry) -> bool:
    """Whether the record says so, without reading the file."""
    known = untouched(folder, record, entry.path)
    if known is None or entry.size not in (None, known["size"]):
        return False
    return entry.sha256 in (None, known["sha256"]) and entry.git in (None, known["git"])


def outdated(record: dict, entry: Entry) -> bool:
    """Whether a file was fetched in another version than the source has now."""
    known = record.get("files", {}).get(entry.path)
    if known is None:
        return False
    return (
        entry.sha256 not in (None, known["sha256"])
        or bool(known["git"])
        and entry.git not in (None, known["git"])
    )


# ---- the folder ---------------------------------------------------------------------------------------------


def only_one(folder: Path):
    """The folder's lock, held, for `with`; a second download waits for the first and then finds its
    files."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"another download into {folder} is running; waiting for it")
        return lock.acquire()


def free_space(folder: Path) -> int:
    """Bytes free where `folder` is or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def retire(folder: Path, record: dict, wanted: list[Entry], offered: set[str]) -> None:
    """Before an update: remove what is there in another version, so that no loader finds a mixture;
    save the record.

    Weights that the repository has no more go too, if it has others. What someone changed is left
    for `settle`.
    """
    entries = {e.path: e for e in wanted}
    gone = {path for path in record["files"] if path in entries and outdated(record, entries[path])}
    if any(path.endswith(".safetensors") for path in entries):
        kinds = (".safetensors", ".safetensors.index.json")
        gone |= {path for path in record["files"] if path not in offered and path.endswith(kinds)}
    for path in sorted(gone):
        if untouched(folder, record, path):
            (folder / path).unlink()
            now = "another version" if path in entries else "no such file any more"
            say(f"  removed {folder / path}: the repository has {now}")
        del record["files"][path]
    save_record(folder, record)


def drop_parts(folder: Path, record: dict) -> None:
    """Remove what is left of other versions."""
    for path in record["wanted"]:
        for stale in (folder / path).parent.glob(
            f"{glob.escape(Path(path).name)}.????????????.part*"
        ):
            fetch.discard(stale)


def manifest_record(folder: Path) -> dict:
    """The files of a manifest.json that --manifest wrote, in the form of a record: for folders that
    were copied."""
    try:
        found = json.loads((folder / "manifest.json").read_bytes())
        files = {
            f["path"]: {"size": f["size"], "sha256": f["sha256"]}
            for f in found["files"]
            if MANIFEST in found
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"wanted": sorted(files), "files": files} if files else {}


def verify(folder: Path, record: dict, workers: int) -> None:
    """Read every file again; SystemExit when something is broken. Without any hashes only the
    structure is checked."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder; nothing was fetched there")
    known = record or manifest_record(folder)
    names = known.get("wanted") or [
        p.relative_to(folder).as_posix()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".json", ".safetensors")
    ]
    if not names:
        raise SystemExit(f"{folder}: no model files in this folder")
    if not known:
        say(
            f"{folder} has neither a record nor a manifest.json of ours: only the structure is checked, not the bytes"
        )
    problems = _broken(folder, known, names, workers)
    for line in problems:
        say(f"  {line}")
    if problems:
        command = f"python -m tools.download {shlex.quote(str(folder))} --repair"
        remedy = (
            f"fetch them again: {command}" if record else "fetch it with ORG/NAME --repair true"
        )
        raise SystemExit(
            f"{folder}: {len(problems)} of {len(names)} files broken or missing (named above); {remedy}"
        )
    size = size_text(sum((folder / n).stat().st_size for n in names))
    say(
        f"{folder}: {len(names)} files, {size}, all whole ({'sha256' if known else 'structure only'})"
    )


def _broken(folder: Path, record: dict, names: list[str], workers: int) -> list[str]:
    """ "path: what is wrong" for each file that is."""
    stop = threading.Event()

    def look(path: str) -> str | None:
        known = record.get("files", {}).get(path, {})
        if record and not known:
            return "never arrived whole"
        try:
            entry = Entry(path, "", known.get("size"), known.get("sha256"))
            return fetch.examine(fetch.safe_target(folder, path), entry, stop)[1]
        except FileNotFoundError:
            return "missing"
        except (OSError, Fatal) as error:
            return str(error)

    pool = ThreadPoolExecutor(workers)
    try:
        wrong = {path: why for path, why in zip(names, pool.map(look, names), strict=True) if why}
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    index = weights.index_problems(folder, set(names) if record else None)
    return [f"{path}: {why}" for path, why in wrong.items()] + [
        p for p in index if p.split(":")[0] not in wrong
    ]
