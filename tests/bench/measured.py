"""What the benches print, and the memory of a process."""

import json
from pathlib import Path


def say(**facts) -> None:
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in facts.items()}
    print(json.dumps(rounded, ensure_ascii=False), flush=True)


def memory_mb(name: str) -> float:
    """VmHWM or VmRSS of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def forget_peak() -> float:
    """-> MiB in use now, from which VmHWM grows anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")
