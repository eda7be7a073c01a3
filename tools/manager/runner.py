"""Between the manager and a job: keeps the job's output and exit code while no manager runs.

    python tools/manager/runner.py FOLDER       # FOLDER/command.json: {"argv": [...], "cwd": ...}

It is a process group of its own, and what the job leaves behind is ended with it. SIGTERM comes to
the whole group, so the job has it too; this process stays until the job has ended. On a full disk
output is lost and counted; the place of the exit code is taken before.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST_LOG = 64 << 20  # bytes
RESERVED = 200  # bytes of the exit code's file
LEFT_BEHIND = 10  # seconds that what a job leaves behind has to end
LAST_WORDS = 5  # seconds to read what is still in the pipe
PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
CHILD_SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER


class Log:
    """A file that takes what there is room for."""

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.size = os.fstat(self.file).st_size
        self.lost = 0
        self.full = False

    def write(self, data: bytes) -> None:
        if self.size + len(data) > LONGEST_LOG:
            if not self.full:
                self.full = True
                self.append(b"\n[this log is full; what comes after it is left out]\n")
            return
        if self.lost:
            note = f"\n[the disk was full: {self.lost} bytes of this log are lost]\n".encode()
            if not self.append(note):
                self.lost += len(data)
                return
            self.lost = 0
        self.append(data)

    def append(self, data: bytes) -> bool:
        while data:
            try:
                written = os.write(self.file, data)
            except OSError:
                self.lost += len(data)
                return False
            self.size += written
            data = data[written:]
        return True


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_with_runner() -> None:
    """In the job, before it begins: it saves and ends where this process is killed."""
    prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def copy(pipe, log: Log) -> None:
    while data := os.read(pipe.fileno(), 1 << 16):
        log.write(data)


def end_what_is_left() -> None:
    """Ranks and workers that have lost their launcher."""
    sys.path.insert(0, str(ROOT))
    import psutil

    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(left, LEFT_BEHIND)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def write_exit(file: int, code: int) -> None:
    """Over the blanks that were there: this needs no room."""
    said = json.dumps({"code": code, "ended": time.time()}).encode()
    os.pwrite(file, said.ljust(RESERVED), 0)


def main() -> None:
    folder = Path(sys.argv[1])
    order = json.loads((folder / "command.json").read_text(encoding="utf-8"))
    asked = []
    child = None

    def stop(number, frame):
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    prctl(CHILD_SUBREAPER, 1)
    exit_file = os.open(folder / "exit.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(exit_file, b" " * RESERVED)
    (folder / "pid").write_text(str(os.getpid()), encoding="ascii")
    log = Log(folder / "log.txt")
    try:
        child = subprocess.Popen(
            order["argv"],
            cwd=order["cwd"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_runner,
        )
    except OSError as error:
        log.write(f"error: cannot start: {error}\n".encode())
        write_exit(exit_file, 127)
        return
    if asked:  # before there was a job to have it
        child.terminate()
    copying = threading.Thread(target=copy, args=(child.stdout, log), daemon=True)
    copying.start()
    code = child.wait()
    end_what_is_left()
    copying.join(LAST_WORDS)
    write_exit(exit_file, code)


if __name__ == "__main__":
    main()
