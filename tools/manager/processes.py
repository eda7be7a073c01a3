"""Processes that outlive this one: which one a number means, and how all of a job is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import psutil

BOOT = Path("/proc/sys/kernel/random/boot_id")
OURS = (  # variables that say something about the manager's own start, not about a job's
    "MODEL",
    "DATA",
    "OUTPUT",
    "NPROC",
    "DEVICES",
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "HOSTFILE",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "DANPU_RERUN",
    "DANPU_API_KEY",
    "DANPU_MANAGER_TOKEN",
)
QUIET = {  # as common/launch.sh has them
    "PYTHONUTF8": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def identity(pid: int) -> str | None:
    """The boot and the tick of this boot in which a process began: with the number it names one
    process for ever, whatever the clock does. None where none lives (one that only waits to be
    counted does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return f"{boot}:{fields[19]}"


def lives(pid: int | None, known: str | None) -> bool:
    """Whether the process of this number is still the one that was known by it."""
    return bool(pid and known) and identity(pid) == known


def ask_to_stop(pid: int) -> None:
    """SIGTERM to the group of a job, as Ctrl-C on a terminal: a training saves and ends."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:  # never the group of the manager
            os.killpg(pid, signal.SIGTERM)


def kill_below(pid: int) -> None:
    """SIGKILL to all that a process has started, in whatever session; it stays and counts."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def environment(**more: str) -> dict[str, str]:
    """Of a process of ours: the manager's own without what is about its start alone; shells find
    this Python first."""
    found = {name: value for name, value in os.environ.items() if name not in OURS}
    found["PATH"] = f"{Path(sys.executable).parent}:{found.get('PATH', os.defpath)}"
    return QUIET | found | more
