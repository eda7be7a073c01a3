"""Sizes and checksums of the files of a checkpoint, and whether its weights are finite: one pass
over each file, large ones in ranges, several at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

THREADS = 8  # that read at once
RANGE = 1 << 30  # bytes of a file that one thread reads
BLOCK = 1 << 22  # bytes read at a time: they stay in a core's cache, and no number is parted
KINDS = {  # of safetensors, those that can hold NaN
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def method() -> str:
    """DANPU_CHECKSUM: sha256, or size, which is all that is then known of a file. SystemExit for
    another word."""
    chosen = os.environ.get("DANPU_CHECKSUM") or "sha256"
    if chosen not in ("sha256", "size"):
        raise SystemExit(f"DANPU_CHECKSUM={chosen!r} is neither sha256 nor size")
    return chosen


@dataclass
class Digest:
    """size: bytes. sha256: of the file, or of its ranges' digests one after the other where it has
    several; None where nobody asked. problem: what is wrong with its weights, in a few words."""

    size: int
    sha256: str | None = None
    problem: str | None = None

    def facts(self) -> dict:
        known = {"size": self.size, "sha256": self.sha256}
        return {name: value for name, value in known.items() if value is not None}


@dataclass
class Part:
    """Bytes [start, stop) of a file."""

    path: Path
    start: int
    stop: int


@dataclass
class Weight:
    """A tensor of a file: its bytes [start, stop)."""

    name: str
    kind: torch.dtype
    start: int
    stop: int


def digest(
    paths: Sequence[Path],
    sha256: bool = True,
    weights: bool = False,
    sync: bool = False,
    ranged: bool = True,
) -> list[Digest]:
    """What is to be known of each file.

    Args:
        weights: look whether the tensors of *.safetensors are finite.
        sync: force the files to disk first, so that a power cut cannot damage them later.
        ranged: False gives the plain sha256 of large files too, as older checkpoints hold it.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        if sync:
            list(pool.map(_sync, paths))
        jobs = [_begin(pool, path, sha256, weights, ranged) for path in paths]
        return [_joined(path, job) for path, job in zip(paths, jobs, strict=True)]


def _begin(pool, path: Path, sha256: bool, weights: bool, ranged: bool) -> list:
    """What will give (digest, problem) of each range."""
    looked_at = []
    if weights and path.suffix == ".safetensors":
        try:
            looked_at = weights_in(path)
        except SafetensorError as error:
            problem = f"it cannot be read again ({error})"
            return [pool.submit(lambda: (None, problem))]
    size = path.stat().st_size
    step = RANGE if ranged else max(1, size)
    starts = range(0, max(1, size), step)
    parts = [Part(path, start, min(start + step, size)) for start in starts]
    return [pool.submit(_read, part, sha256, looked_at) for part in parts]


def _joined(path: Path, job: list) -> Digest:
    found = [future.result() for future in job]
    problems = [problem for _, problem in found if problem]
    sums = [one for one, _ in found if one is not None]
    sha256 = None
    if len(sums) == 1:
        sha256 = sums[0].hex()
    elif sums:
        sha256 = hashlib.sha256(b"".join(sums)).hexdigest()
    return Digest(path.stat().st_size, sha256, problems[0] if problems else None)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _read(part: Part, sha256: bool, weights: list[Weight]) -> tuple[bytes | None, str | None]:
    """-> sha256 of the part, if asked, and what is wrong with a number in it."""
    weights = [one for one in weights if one.start < part.stop and one.stop > part.start]
    if not sha256 and not weights:
        return None, None
    sums = hashlib.sha256()
    problem = None
    buffer = memoryview(bytearray(min(BLOCK, part.stop - part.start)))
    with open(part.path, "rb") as file:
        file.seek(part.start)
        for at in range(part.start, part.stop, BLOCK):
            block = buffer[: file.readinto(buffer[: part.stop - at])]
            if sha256:
                sums.update(block)
            problem = problem or _wrong_number(block, at, weights)
    return sums.digest() if sha256 else None, problem


# ---- weights -------------------------------------------------------------------------------------


def weights_in(path: Path) -> list[Weight]:
    """The tensors of a *.safetensors that can hold NaN. SafetensorError for a file that is not
    whole."""
    with safe_open(path, "pt"):
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    first = 8 + length  # a multiple of 8, as tensors begin at multiples of their numbers' size
    found = []
    for name, facts in header.items():
        kind = KINDS.get(facts["dtype"])
        start, stop = facts["data_offsets"]
        if kind is not None:
            found.append(Weight(name, kind, first + start, first + stop))
    return found


def _wrong_number(block: memoryview, at: int, weights: list[Weight]) -> str | None:
    """What is wrong in a block whose first byte is number `at` of its file."""
    for one in weights:
        start = max(one.start, at)
        stop = min(one.stop, at + len(block))
        count = (stop - start) // one.kind.itemsize
        if count <= 0:
            continue
        numbers = torch.frombuffer(block, dtype=one.kind, count=count, offset=start - at)
        if not _is_finite(numbers):
            return f"{one.name} holds NaN or infinite numbers"
    return None


def _is_finite(numbers: torch.Tensor) -> bool:
    if numbers.element_size() == 1:  # float8 has no kernels
        numbers = numbers.float()
    # ten times as fast as isfinite(numbers).all(), without a mask of its size; NaN goes through
    return bool(torch.isfinite(torch.stack(torch.aminmax(numbers))).all())
