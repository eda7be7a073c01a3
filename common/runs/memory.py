"""Memory of this process, of the device's allocator or resident on a CPU."""

from __future__ import annotations

import contextlib
import os
import sys

from common import device
from common.runs import machine

_highest = 0.0  # MiB, up to the last reset


def peak_mb() -> float:
    """Peak memory of this process in MiB: of the device's allocator, or resident memory on CPU."""
    return max(_highest, _peak_since_reset())


def next_peak_mb() -> float:
    """The peak since the last call (or the start), in MiB; on a CPU only Linux can tell it from the
    peak so far."""
    global _highest
    peak = _peak_since_reset()
    _highest = max(_highest, peak)
    if device.kind() != "cpu":
        device.module().reset_peak_memory_stats()
    else:
        with (
            contextlib.suppress(OSError),
            open("/proc/self/clear_refs", "w", encoding="utf-8") as file,
        ):
            file.write("5")  # the peak of the resident memory starts again
    return peak


def free_bytes() -> float:
    """What is left of this process's device, with what torch keeps for later; of a CPU:
    host_bytes()."""
    if device.kind() == "cpu":
        return host_bytes()
    device.device()  # makes it the current one
    kept = device.module().memory_reserved() - device.module().memory_allocated()
    return device.module().mem_get_info()[0] + kept


def host_bytes() -> float:
    """What is left of the machine, or its container, for all processes; infinite where the system
    does not tell."""
    host = machine.host_memory()
    return host.free if host else float("inf")


def local_ranks() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _peak_since_reset() -> float:
    if device.kind() != "cpu":
        return device.module().max_memory_allocated() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
