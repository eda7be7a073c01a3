"""Prepared data on disk: Arrow files under a key, built once while other processes wait."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.data import files
from common.data.files import atomic_file, atomic_folder

BATCH_ROWS = 1000
BATCH_CHARACTERS = 1 << 24  # a bound of its own: one row may be megabytes long
SILENT_WAIT = 5  # seconds for a lock before it is mentioned
REMEMBERED_FROM = 1 << 22  # bytes; smaller files are read again in no time
SETTLED = 2  # seconds since the last change: clocks of file systems are coarse


def write_rows(rows: Iterator[dict], path: Path) -> None:
    """{"row", "prompt_key", "source", "held_out"} one by one -> an Arrow stream file.

    At most BATCH_ROWS rows are in memory at a time.
    """
    import pyarrow as pa

    schema = pa.schema(
        [
            ("row", pa.string()),
            ("prompt_key", pa.int64()),
            ("source", pa.string()),
            ("held_out", pa.bool_()),
        ]
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _batches(rows: Iterator[dict]) -> Iterator[list[dict]]:
    batch = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row["row"])
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def cache_root(cache_dir=None) -> Path:
    """Where prepared things are kept: the argument, $DANPU_CACHE or ~/.cache/danpu."""
    return Path(cache_dir or os.environ.get("DANPU_CACHE") or "~/.cache/danpu").expanduser()


def cached(key: str, build: Callable[[Path], dict], cache_dir=None):
    """(Dataset, stats) of `key`: from the cache, or built once while other processes wait.

    build(folder) writes Arrow stream files (*.arrow, read in the order of their names) into an
    empty folder and returns stats that JSON can hold. The folder gets its name only when complete;
    it is rebuilt if its files changed. SystemExit where the cache cannot be written.
    """
    root = cache_root(cache_dir)
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            found = _complete(folder)
            if found is None:
                _build(folder, build)
                found = _complete(folder)
            return found
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "check that folder"
        raise SystemExit(
            f"{root}: cannot keep prepared data: {error}; {remedy} or set DANPU_CACHE"
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder`; whoever waits longer than SILENT_WAIT says so."""
    from filelock import FileLock, Timeout

    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main and not folder.exists():
        time.sleep(0.2)  # rank 0 builds: it alone shows how far it is
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=SILENT_WAIT)
    except Timeout:
        if is_main:
            print(f"waiting for another process that prepares {folder}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sha256(path: Path, cache_dir=None) -> str:
    """Of a file. That of a large one is remembered as long as nobody has written to it (its place,
    size and times, of which no program sets the last), so that a corpus is not read again by every
    rank at every start."""
    try:
        stat = path.stat()
        if stat.st_size < REMEMBERED_FROM:
            return files.sha256(path)
        facts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        told = json.dumps([str(path.resolve()), *facts])
        note = cache_root(cache_dir) / f"sha256-{hashlib.sha256(told.encode()).hexdigest()[:32]}"
        if note.is_file():
            return note.read_text(encoding="ascii")
        note.parent.mkdir(parents=True, exist_ok=True)
        with _locked(note):
            if note.is_file():  # another rank has read it
                return note.read_text(encoding="ascii")
            digest = files.sha256(path)
            if time.time() - stat.st_ctime > SETTLED:
                with atomic_file(note) as part:
                    part.write_text(digest, encoding="ascii")
            return digest
    except OSError:  # a cache that cannot be written, which `cached` tells
        return files.sha256(path)


def _build(folder: Path, build: Callable[[Path], dict]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what is incomplete only takes room
    with atomic_folder(folder) as part:
        stats = build(part)
        sizes = {file.name: file.stat().st_size for file in sorted(part.glob("*.arrow"))}
        content = json.dumps({"files": sizes, "stats": stats})
        (part / "meta.json").write_text(content, encoding="utf-8")


def _complete(folder: Path):
    """(Dataset, stats) of a cache folder, or None where a file is missing or of another size."""
    from datasets import Dataset, concatenate_datasets

    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for name, size in meta["files"].items():
            if (folder / name).stat().st_size != size:
                return None
        parts = [Dataset.from_file(str(folder / name)) for name in meta["files"]]
        dataset = concatenate_datasets(parts)
    except (OSError, ValueError, KeyError):
        return None
    # datasets would hash the times of files; equal contents must give equal later keys
    dataset._fingerprint = folder.name
    return dataset, meta["stats"]
