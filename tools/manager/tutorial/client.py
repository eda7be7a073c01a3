"""The process that computes figures, as the manager sees it: one question at a time, a limit of
time for each, started when it is needed and ended when nobody has asked for a while."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from tools.manager import processes
from tools.manager.errors import Problem

SCRIPT = Path(__file__).with_name("worker.py")
FIGURE_SECONDS = 20.0
LOAD_SECONDS = 180.0  # libraries and weights, the first time
IDLE_SECONDS = 600.0  # until its memory is given back
MOST_WAITING = 8
BUSY = "the figures of the tutorial are busy; try again in some seconds"


class Worker:
    """worker.py in a process of its own. Any thread may ask."""

    def __init__(
        self,
        script: Path = SCRIPT,
        figure_seconds: float = FIGURE_SECONDS,
        load_seconds: float = LOAD_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
    ):
        self.script = script
        self.figure_seconds = figure_seconds
        self.load_seconds = load_seconds
        self.idle_seconds = idle_seconds
        self.places = threading.BoundedSemaphore(MOST_WAITING)
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.idle: threading.Timer | None = None

    def ask(self, figure: str, fields: dict) -> dict:
        """What the worker computes; Problem for what it refuses, 429 for one question too many,
        503 where it takes too long or dies."""
        with self._place(), self.lock:
            self._rest(False)
            try:
                answer = self._answer(figure, fields)
            finally:
                self._rest(True)
        if "problem" in answer:
            raise Problem(answer["status"], answer["problem"], answer["param"])
        return answer["figure"]

    def close(self) -> None:
        """End the process; the next question starts another one."""
        with self.lock:
            self._rest(False)
            self._end()

    @contextmanager
    def _place(self):
        if not self.places.acquire(blocking=False):
            raise Problem(429, BUSY, retry_after="5")
        try:
            yield
        finally:
            self.places.release()

    def _rest(self, begins: bool) -> None:
        """While nobody asks a timer runs that gives the memory back."""
        if self.idle:
            self.idle.cancel()
            self.idle = None
        if begins and self.process:
            self.idle = threading.Timer(self.idle_seconds, self.close)
            self.idle.daemon = True
            self.idle.start()

    def _answer(self, figure: str, fields: dict) -> dict:
        limit = self.figure_seconds
        if self.process is None or self.process.poll() is not None:
            self._start()
            limit = self.load_seconds
        try:
            self.process.stdin.write(json.dumps({"name": figure, "fields": fields}) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=limit)
            while line and "loading" in (told := json.loads(line)):
                line = self.lines.get(timeout=self.load_seconds)
            if line:
                return told
        except queue.Empty:
            self._end()
            raise Problem(503, "the figure took too long; try a shorter text") from None
        except OSError:  # a closed pipe
            pass
        self._end()
        raise Problem(503, "the process that computes figures ended; its words are in the terminal")

    def _start(self) -> None:
        self._end()
        self.lines = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, str(self.script)],
            env=processes.environment(DANPU_DEVICE="cpu"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        reading = (self.process.stdout, self.lines)
        threading.Thread(target=read_lines, args=reading, daemon=True).start()

    def _end(self) -> None:
        process = self.process
        self.process = None
        if process:
            process.kill()
            process.wait()
            process.stdin.close()


def read_lines(stream, lines: queue.SimpleQueue) -> None:
    """Lines as they come; None at their end."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
