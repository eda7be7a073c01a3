"""One training as a job: what is kept of it on disk, how its end is read, what it sees of the
devices."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

INTERRUPTED = 75
USAGE = 2
ACTIVE = ("queued", "running", "stopping")


@dataclass
class Job:
    """devices: those it asked for, None for all; held: those it was given. output: folder of the
    run. last: how far it was when it ended. pid, known: of its runner, see processes.identity."""

    id: str
    name: str
    recipe: str
    script: str
    args: dict
    dataset: list
    model: str | None
    argv: list[str]
    env: dict[str, str]
    output: str
    devices: list[str] | None = None
    held: list[str] = field(default_factory=list)
    state: str = "queued"
    exit_code: int | None = None
    error: str | None = None
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    stop_asked: bool = False
    force: bool = False
    continues: str | None = None
    last: dict | None = None
    pid: int | None = None
    known: str | None = None


FIELDS = [one.name for one in fields(Job)]


def state_of(job: Job) -> str:
    """Of a job that has ended."""
    if job.exit_code is None:
        return "stopped" if job.stop_asked else "lost"
    if job.exit_code == 0:
        return "done"
    if job.exit_code == INTERRUPTED or job.stop_asked:
        return "stopped"
    return "failed"


def is_runner(pid: int, folder: Path) -> bool:
    """Whether a process is the runner of this job, by its command line."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return os.fsencode(folder) in words
    return False


def device_variables(job: Job) -> dict[str, str]:
    """What makes only the job's devices visible. A manager that sees some devices only numbers
    those."""
    if job.held == ["cpu"]:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    numbers = seen.split(",") if seen else None
    chosen = [numbers[int(name)] if numbers else name for name in job.held]
    if numbers is None and job.argv[0] == "bash":
        return {"DEVICES": ",".join(chosen), "NPROC": str(len(chosen))}
    visible = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"))
    return dict.fromkeys(visible, ",".join(chosen)) | {"NPROC": str(len(chosen))}
