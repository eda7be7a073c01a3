"""The devices of this machine, asked by another process (a driver may hang), and what is free.

python -m tools.manager.devices        # one line of JSON: those that torch sees
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import psutil

from common.runs import machine
from tools import probe

MIB = 1 << 20
CPU = "cpu"
SECONDS = 180
FRESH = 2.0  # seconds that figures of a driver's tool are shown again
CARDS = ("nvidia[0-9]*", "davinci[0-9]*", "kfd")  # of the drivers, in /dev
SMI = ("nvidia-smi", "--query-gpu=index,memory.used,utilization.gpu")
SMI += ("--format=csv,noheader,nounits",)


class Devices:
    """found: those that are known before anything is asked, for tests."""

    def __init__(self, state: Path, found: list[dict] | None = None):
        self.state = state
        self.found = found or []
        self.problem: str | None = None
        self.asked_at = -FRESH
        self.figures: dict[str, tuple] = {}
        self.lock = threading.Lock()

    def start(self) -> None:
        if not self.found and not may_have_cards():
            self.found = [the_cpu(cpu_name())]
        elif not self.found:
            threading.Thread(target=self.ask, name="devices", daemon=True).start()

    def ask(self) -> None:
        command = [sys.executable, "-m", "tools.manager.devices"]
        code, out, err = probe.ask(command, SECONDS)
        lines = [line for line in out.splitlines() if line.startswith("[")]
        if lines:
            self.found = json.loads(lines[-1])
            return
        why = probe.why_it_ended(code, err)
        self.problem = f"torch does not tell the devices: {why}; jobs run on the CPU"
        self.found = [the_cpu(cpu_name())]

    def names(self) -> list[str]:
        return [one["id"] for one in self.found]

    def public(self, busy: dict[str, str]) -> dict:
        """busy: device -> the job that has it."""
        memory = psutil.virtual_memory()
        devices = []
        for one in self.found:
            used, utilization = self.figures_of(one["id"])
            more = {"memory_used_mb": used, "utilization": utilization, "job": busy.get(one["id"])}
            devices.append(one | more)
        host = {
            "memory_total_mb": memory.total // MIB,
            "memory_used_mb": (memory.total - memory.available) // MIB,
            "disk_free_mb": shutil.disk_usage(self.state).free // MIB,
            "load": list(os.getloadavg()),
        }
        return {"devices": devices, "host": host, "problem": self.problem}

    def figures_of(self, name: str) -> tuple[float | None, float | None]:
        """MiB used and percent busy; None where nothing here tells, as for NPUs."""
        if name == CPU:
            memory = psutil.virtual_memory()
            return (memory.total - memory.available) // MIB, psutil.cpu_percent()
        with self.lock:
            if time.monotonic() - self.asked_at > FRESH:
                self.figures = cards_in_use()
                self.asked_at = time.monotonic()
        return self.figures.get(name, (None, None))


def may_have_cards() -> bool:
    """Whether torch could see more than the CPU; where not, nobody waits for its import."""
    wanted = os.environ.get("DANPU_DEVICE", "")
    files = [file for pattern in CARDS for file in Path("/dev").glob(pattern)]
    return wanted != CPU and bool(wanted or files or machine.is_ascend())


def the_cpu(name: str) -> dict:
    total = psutil.virtual_memory().total // MIB
    return {"id": CPU, "kind": CPU, "name": name, "memory_total_mb": total}


def cpu_name() -> str:
    found = re.search(r"model name\s*: (.+)", machine.read("/proc/cpuinfo"))
    return f"{found[1] if found else 'CPU'} ({len(os.sched_getaffinity(0))} cores)"


def cards_in_use() -> dict[str, tuple]:
    if not shutil.which(SMI[0]):
        return {}
    code, out, _ = probe.ask(SMI, probe.TOOL_SECONDS)
    found = {}
    for line in out.splitlines() if code == 0 else []:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and all(cell.replace(".", "").isdigit() for cell in cells):
            found[cells[0]] = (float(cells[1]), float(cells[2]))
    return found


# ---- the other process ---------------------------------------------------------------------------


def main() -> None:
    from common import device

    import torch

    kind = device.kind()
    if kind == CPU:
        found = [the_cpu(device.name())]
    else:
        found = []
        for i in range(device.device_count()):
            facts = device.module().get_device_properties(torch.device(kind, i))
            total = facts.total_memory // MIB
            name = device.module().get_device_name(i)
            found.append({"id": str(i), "kind": kind, "name": name, "memory_total_mb": total})
    print(f"\n{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
