"""The Python of the recipes' shells: the active one where it has the requirements, else .venv, made
and filled here once. Called by launch.sh with the active Python.

    python common/runs/environment.py WHERE     prints its path; what happens goes to stderr
    python common/runs/environment.py --look    the same, but nothing is made or installed

WHERE: a requirements file, or a folder with the one for this machine. DANPU_NO_VENV=1: never a
.venv. DANPU_VERBOSE=1: pip's own output instead of a line per stage.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.runs import machine

VENV = ROOT / ".venv"
LINE_SECONDS = 30  # between two lines of progress where stderr is no terminal
TAIL = 15  # lines of pip's output that explain a failure


def choose(file: Path) -> Path:
    """A Python that has the requirements of `file`; .venv is made or completed if none has them."""
    lacks = machine.shortfall(file)
    if not lacks:
        return Path(sys.executable)
    if os.environ.get("DANPU_NO_VENV") == "1":
        remedy = f"Run: {sys.executable} -m pip install -r {file}"
        fail(f"DANPU_NO_VENV=1, and {sys.executable} lacks {', '.join(lacks)}. {remedy}")
    python = VENV / "bin/python"
    if not complete(python, file):
        with one_at_a_time():
            make(lacks)
            if not complete(python, file):  # another start may have done it meanwhile
                install(python, file)
    return python


def look(file: Path) -> Path:
    """What `choose` would take, as far as that is here."""
    python = VENV / "bin/python"
    may_use = os.access(python, os.X_OK) and os.environ.get("DANPU_NO_VENV") != "1"
    return python if may_use and machine.shortfall(file) else Path(sys.executable)


def complete(python: Path, file: Path) -> bool:
    """Whether a Python lacks nothing of a requirements file."""
    if not os.access(python, os.X_OK):
        return False
    command = [python, machine.__file__, "missing", file]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    return done.returncode == 0 and not done.stdout.strip()


@contextlib.contextmanager
def one_at_a_time():
    """A second start waits for the first instead of installing into the same folder."""
    with open(ROOT / ".venv.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another start is installing into .venv; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def make(lacks: list[str]) -> None:
    """A virtual environment with pip; one whose making was killed is made again."""
    if os.access(VENV / "bin/python", os.X_OK) and any(VENV.glob("bin/pip*")):
        return
    base = machine.base_python()
    if not base:
        fail(f"needs Python {machine.PYTHONS}; none is on PATH")
    others = f" and {len(lacks) - 1} more" if len(lacks) > 1 else ""
    say(f"{sys.executable} lacks {lacks[0]}{others}; making {VENV} with {base}, once")
    began = time.monotonic()
    if subprocess.run([base, "-m", "venv", VENV], stdout=sys.stderr).returncode:
        fail("python -m venv failed; on Debian/Ubuntu: apt install python3-venv")
    say(f".venv made in {time.monotonic() - began:.0f} s")


def install(python: Path, file: Path) -> None:
    """pip install -r file, with one line of progress; all that pip says under DANPU_VERBOSE=1."""
    say(f"installing {file.name} into .venv; the first time takes some minutes")
    began = time.monotonic()
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-r", file]
    if os.environ.get("DANPU_VERBOSE") == "1":
        code = subprocess.run(command, stdout=sys.stderr).returncode
    else:
        code = quietly([*command, "--progress-bar", "off", "--no-input"])
    if code:
        more = "PIP_INDEX_URL=... takes a mirror, DANPU_VERBOSE=1 shows all that pip says"
        fail(f"pip install failed; the same command again continues. {more}")
    say(f"{file.name} installed in {time.monotonic() - began:.0f} s")


def quietly(command: list) -> int:
    """Run pip and show how far it is: on a terminal in one line that changes, elsewhere now and
    then; the end of its output where it fails. Returns its exit code."""
    terminal = sys.stderr.isatty()
    columns = os.get_terminal_size(sys.stderr.fileno()).columns if terminal else 0
    width = (columns or 100) - 1
    shown = time.monotonic()
    lines = []
    packages = 0
    pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **pipe, encoding="utf-8", errors="replace")
    for line in process.stdout:
        lines.append(line)
        packages += line.startswith(("Collecting ", "Processing "))
        words = f"launch: {packages} packages collected; {line.strip()}"[:width]
        if terminal:
            print(f"\r{words}\033[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - shown >= LINE_SECONDS:
            print(words, file=sys.stderr, flush=True)
            shown = time.monotonic()
    if terminal:
        print("\r\033[K", end="", file=sys.stderr)
    code = process.wait()
    if code:
        sys.stderr.writelines(lines[-TAIL:])
    return code


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> None:
    sys.exit(f"launch: {text}")


def main(where: str) -> int:
    if where == "--look":
        print(look(machine.requirements(ROOT)))
        return 0
    path = Path(where)
    print(choose(machine.requirements(path) if path.is_dir() else path))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
