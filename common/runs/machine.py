"""What this machine is: packages, memory, Ascend cards, order of device ids, locks of killed
builds.

    python common/runs/machine.py missing FILE     what this Python lacks of a requirements file
    python common/runs/machine.py ascend           exit code 0 on an Ascend machine, else 1
    python common/runs/machine.py ascending 3,0    prints 0,3

Asked by launch.sh, the training core and tools/check_env. Needs no package, and Python from 3.8.
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "datasets",
    "torch-npu",
)
PYTHONS = "3.10, 3.11 or 3.12"  # what the requirements are pinned for
NAMES = ("python3.11", "python3.12", "python3.10")
CARDS = "/dev/davinci[0-9]*"
WITHOUT_NPU = ("cpu", "cuda")  # DANPU_DEVICE where torch_npu is left alone
CGROUP = Path("/sys/fs/cgroup")


# ---- Python and packages -------------------------------------------------------------------------


def tolerate_terminals() -> None:
    """What a terminal cannot show (an emoji in GBK) becomes `?`: words never end a run."""
    for stream in (sys.stdout, sys.stderr):
        # notebooks have other streams; one that was a file and became a pipe cannot be changed
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="replace")


def supported() -> bool:
    """Whether the requirements are pinned for this Python."""
    return (3, 10) <= sys.version_info[:2] <= (3, 12)


def base_python() -> str | None:
    """A Python to make a virtual environment with: the first on PATH that starts, else this one."""
    for name in NAMES:
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
            return name
    return sys.executable if supported() else None


def requirements(root: Path) -> Path:
    """The requirements file for this machine, of those in `root`."""
    npu = root / "requirements-npu.txt"
    return npu if is_ascend() and npu.exists() else root / "requirements.txt"


def pins(file: Path) -> dict[str, str]:
    """{package: version} of a requirements file and of those that it names by -r."""
    found = {}
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found.update(pins(Path(file).parent / line[3:].strip()))
        spec, _, marker = line.partition(";")
        pin = re.match(r"([\w.-]+)==(\S+)", spec)
        if pin and _for_this_python(marker):
            found[pin[1]] = pin[2]
    return found


def _for_this_python(marker: str) -> bool:
    """Whether a marker such as `python_version < "3.11"` holds here; the files know no other."""
    bound = re.search(r'python_version *(>=|<) *"(\d+)\.(\d+)"', marker)
    if not bound:
        return True
    older = sys.version_info[:2] < (int(bound[2]), int(bound[3]))
    return older == (bound[1] == "<")


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except Exception:  # PackageNotFoundError, or a folder whose METADATA is gone
        return None


def missing(file: Path) -> dict[str, str | None]:
    """{package: its version here, or None} of what is not as pinned in a requirements file."""
    found = {}
    for package, pinned in pins(file).items():
        have = installed(package)
        if have is None or have.split("+")[0] != pinned:
            found[package] = have
    return found


def shortfall(file: Path) -> list[str]:
    """What this Python lacks of a requirements file, for people; nothing where the file is absent,
    as beside a copied recipe."""
    if not Path(file).exists():
        return []
    if not supported():
        return [f"Python {PYTHONS} (this is {platform.python_version()})"]
    pinned = pins(file)
    lacks = missing(file).items()
    return [f"{name}=={pinned[name]} ({have or 'not installed'})" for name, have in lacks]


def versions() -> dict[str, str]:
    """Versions of python, of the libraries that matter and, in a git checkout, of the recipe."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        version = installed(name)
        if version:
            found[name] = version
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(git, capture_output=True, encoding="utf-8", timeout=5, check=True)
        found["commit"] = done.stdout.strip()
    return found


# ---- memory --------------------------------------------------------------------------------------


class HostMemory(NamedTuple):
    """Bytes; limited: by a container, not by what the machine has."""

    free: int
    total: int
    limited: bool


def read(path) -> str:
    """The text of a file of the system, "" where it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def host_memory() -> HostMemory | None:
    """What programs can still take and what there is; None where the system does not tell
    (macOS)."""
    info = dict(re.findall(r"(?m)^(\w+):\s+(\d+) kB", read("/proc/meminfo")))
    if "MemAvailable" not in info:
        return None
    total = int(info["MemTotal"]) << 10
    free = int(info["MemAvailable"]) << 10
    limited = False
    for limit, used in container_memory():
        if limit < total:
            total = limit
            free = min(free, limit - used)
            limited = True
    return HostMemory(free, total, limited)


def container_memory():
    """(limit, used) in bytes of each cgroup with a limit; cached files count as free."""
    for name, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for file in cgroup("memory", name):
            if read(file).isdigit():
                stat = read(file.with_name("memory.stat"))
                cached = re.findall(r"(?m)^(?:total_)?inactive_file (\d+)", stat)
                taken = int(read(file.with_name(used)) or 0)
                yield int(read(file)), taken - max(map(int, cached), default=0)


def cgroup(controller: str, name: str):
    """Control files of this process's cgroup and of those above it (v2 and v1)."""
    for line in read("/proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if not names or controller in names.split(","):
            folder = (CGROUP / controller if names else CGROUP) / path.lstrip("/")
            for place in [folder, *folder.parents]:
                if (place / name).is_file():
                    yield place / name


def resident(pid: int) -> int:
    """Bytes that a process holds in memory, 0 where the system does not tell."""
    pages = re.match(r"\d+ (\d+)", read(f"/proc/{pid}/statm"))
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


# ---- Ascend --------------------------------------------------------------------------------------


def ascend_cards() -> list[str]:
    """The cards that the Ascend driver shows to this machine (or container)."""
    return glob.glob(CARDS)


def is_ascend() -> bool:
    """Whether training belongs on Ascend: its cards are here, or its driver's tool where the cards
    were not passed into the container, and DANPU_DEVICE names no other device."""
    wanted = os.environ.get("DANPU_DEVICE") or "npu"
    return wanted == "npu" and bool(ascend_cards() or shutil.which("npu-smi"))


def ascending(ids: str) -> str:
    """ "3,0" -> "0,3": Ascend's driver stops reading at the first id that does not ascend."""
    return ",".join(sorted(set(ids.split(",")), key=lambda one: (len(one), one)))


# ---- builds --------------------------------------------------------------------------------------


def stale_build_locks() -> list[str]:
    """Locks older than a minute of builds of DeepSpeed's operators that no process works at: a
    killed build leaves one, and the next would wait for it for ever."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    old = [lock for lock in Path(folder).expanduser().rglob("lock") if _is_old(lock)]
    return [str(lock) for lock in old if not _is_worked_in(lock.parent)]


def _is_worked_in(folder: Path) -> bool:
    """Whether a process, ninja or a compiler, has this folder as its own."""
    for own in glob.iglob("/proc/[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.path.samefile(own, folder):
                return True
    return False


def _is_old(file: Path) -> bool:
    with contextlib.suppress(OSError):  # a build that has just ended took it away
        return time.time() - file.stat().st_mtime > 60
    return False


def main(question: str, *words: str) -> int:
    if question == "ascend":
        return 0 if is_ascend() else 1
    if question == "ascending":
        print(ascending(*words))
    if question == "missing":
        print("\n".join(shortfall(Path(*words))))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
