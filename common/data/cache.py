"""Prepared data on disk: Arrow files by a key, built once while other processes wait."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def write_rows(rows: Iterator[dict], path: Path) -> None:
    """{"row", "prompt_key", "source"} one by one -> an Arrow stream file; some thousand rows are
    alive at a time."""
    import pyarrow as pa

    schema = pa.schema([("row", pa.string()), ("prompt_key", pa.int64()), ("source", pa.string())])
    batch, size = [], 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for row in rows:
            batch.append(row)
            size += len(row["row"])
            if len(batch) == 1000 or size > 1 << 24:  # the size too: one row may be megabytes long
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch, size = [], 0
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _whole(folder: Path):
    """(Dataset, stats) of a cache folder, or None where it is absent or torn (a file missing or of
    another size)."""
    from datasets import Dataset, concatenate_datasets

    try:
        meta = json.loads((folder / "meta.json").read_text())
        if any((folder / name).stat().st_size != size for name, size in meta["files"].items()):
            return None
        dataset = concatenate_datasets(
            [Dataset.from_file(str(folder / name)) for name in meta["files"]]
        )
    except (OSError, ValueError, KeyError):
        return None
    dataset._fingerprint = (
        folder.name
    )  # datasets would hash file times; equal contents must give equal later keys
    return dataset, meta["stats"]


def cache_root(cache_dir=None) -> Path:
    """Where prepared things are kept: the argument, $DANPU_CACHE or ~/.cache/danpu."""
    return Path(cache_dir or os.environ.get("DANPU_CACHE") or "~/.cache/danpu").expanduser()


def cached(key: str, build: Callable[[Path], dict], cache_dir=None):
    """(Dataset, stats) of `key`: from the cache, or built once while other processes wait.

    build(folder) writes Arrow stream files (*.arrow, read in the order of their names) into an
    empty folder and returns stats that JSON can hold. The folder gets its name only when whole; it
    is rebuilt if its files changed."""
    from filelock import FileLock

    root = cache_root(cache_dir)
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]
    work = folder.with_suffix(".tmp")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if found := _whole(folder):
                return found
            for leftover in (folder, work):
                shutil.rmtree(leftover, ignore_errors=True)
            work.mkdir()
            try:
                stats = build(work)
                sizes = {file.name: file.stat().st_size for file in sorted(work.glob("*.arrow"))}
                (work / "meta.json").write_text(json.dumps({"files": sizes, "stats": stats}))
                os.replace(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            return _whole(folder)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "check that folder"
        raise SystemExit(
            f"{root}: cannot keep prepared data: {error}; {remedy} or set DANPU_CACHE"
        ) from None
