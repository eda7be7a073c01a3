"""Previews of data sets, each computed once by a process of its own (preview_worker.py)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tools.manager import processes
from tools.manager.errors import Problem
from tools.manager.preview_worker import MARK

WORKER = Path(__file__).with_name("preview_worker.py")
SECONDS = 180
AT_ONCE = 2
KEPT = 64
MOST_ROWS = 50


class Preview:
    """One that is computed, or was: `answer` or `problem`."""

    def __init__(self, command: list[str], cwd: Path):
        self.answer: dict | None = None
        self.problem: str | None = None
        self.said = ""
        self.began = time.monotonic()
        self.thread = threading.Thread(target=self.compute, args=(command, cwd), daemon=True)
        self.thread.start()

    @property
    def pending(self) -> bool:
        return self.answer is None and self.problem is None

    def compute(self, command: list[str], cwd: Path) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="danpu-preview-") as folder:
                self.run([*command, f"--output_dir={folder}"], cwd)
        except OSError as error:
            self.problem = f"the preview cannot be made: {error.strerror}"
        if self.pending:
            self.problem = "the preview cannot be made"

    def run(self, command: list[str], cwd: Path) -> None:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=processes.environment(CUDA_VISIBLE_DEVICES="", DANPU_DEVICE="cpu"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        late = threading.Timer(SECONDS, kill, [process])
        late.start()
        error = ""
        answer = None
        try:
            for raw in process.stdout:
                line = raw.decode("utf-8", "replace").strip()
                if line.startswith(MARK):
                    answer = json.loads(line.removeprefix(MARK))
                elif line:
                    self.said = line[:300]
                    error = line[:1000] if line.startswith("error: ") else error
            process.wait()
        finally:
            late.cancel()
            kill(process)
        if answer is not None:
            self.answer = answer
        elif time.monotonic() - self.began >= SECONDS:
            self.problem = f"no preview within {SECONDS} s: take a smaller file"
        elif process.returncode == 0:
            self.problem = "the script ended before it had token rows"
        else:
            self.problem = (error or self.said or "the script ended").removeprefix("error: ")


def makes_token_rows(script: Path) -> bool:
    """Whether a script hands its rows to common/data/prepare.py, where the worker stops it; another
    one would go on and train."""
    text = script.read_text(encoding="utf-8", errors="replace")
    return "common.data.prepare import" in text and "prepare(" in text


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Previews:
    """root: where scripts run."""

    def __init__(self, root: Path):
        self.root = root
        self.found: dict[tuple, Preview] = {}
        self.lock = threading.Lock()

    def get(self, key: tuple, script: Path, flags: list[str], rows: int) -> Preview:
        """The preview of `key`, begun where there is none. Problem 429 while others are made."""
        with self.lock:
            if key in self.found:
                return self.found[key]
            pending = [one for one in self.found.values() if one.pending]
            if len(pending) >= AT_ONCE:
                raise Problem(429, "other previews are being made", retry_after="2")
            for old in list(self.found)[: max(0, len(self.found) - KEPT)]:
                if not self.found[old].pending:
                    del self.found[old]
            command = [sys.executable, str(WORKER), str(rows), str(script), *flags]
            self.found[key] = Preview(command, self.root)
            return self.found[key]

    def forget(self, key: tuple) -> None:
        """One that failed may be asked for again."""
        with self.lock:
            self.found.pop(key, None)
