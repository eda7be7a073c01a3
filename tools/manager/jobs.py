"""Trainings as jobs: a queue per device, states on disk, adoption after a restart of the manager.

A job is a folder of STATE/jobs: job.json (what it is), command.json (what is run), log.txt, pid and
exit.json (of its runner). Times are for people; nothing is decided by the clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from tools.manager import processes
from tools.manager.errors import Problem
from tools.manager.files import identify, read_json, write_json
from tools.manager.job import ACTIVE, FIELDS, USAGE, Job, device_variables, is_runner, state_of
from tools.manager.progress import Progress, series_of_run

RUNNER = Path(__file__).with_name("runner.py")
TICK = 0.2  # seconds between two looks at the jobs
MOST_QUEUED = 100
GRACE = 50  # looks that a runner has to say its number
FOLDER = re.compile(r"\d{4,9}")


class Jobs:
    """All jobs of one state folder, which has one manager at a time.

    devices(): names of those that there are; [] while they are not known, nothing starts then.
    """

    def __init__(self, state: Path, root: Path, devices):
        self.folder = state / "jobs"
        self.root = root
        self.devices = devices
        self.lock = threading.RLock()
        self.jobs: dict[str, Job] = {}
        self.progress: dict[str, Progress] = {}
        self.children: dict[str, subprocess.Popen] = {}
        self.waited: dict[str, int] = {}  # looks without a runner's number
        self.unsaved: set[str] = set()
        self.unreadable: list[str] = []
        self.over = threading.Event()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.counter = state / "manager.json"
        facts = read_json(self.counter)
        self.number = facts.get("number", 0)
        self.restarts = facts.get("starts", 0)
        self.load()
        self.keep_counter(self.restarts + 1)
        self.thread = threading.Thread(target=self.watch, name="jobs", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Jobs go on; this manager no longer looks at them."""
        self.over.set()
        if self.thread.is_alive():
            self.thread.join(10)

    # ---- the disk ----
    def load(self) -> None:
        for folder in sorted(self.folder.iterdir()):
            if not FOLDER.fullmatch(folder.name):
                continue
            self.number = max(self.number, int(folder.name))
            said = read_json(folder / "job.json")
            try:
                job = Job(**{name: said[name] for name in FIELDS if name in said})
            except TypeError:  # damaged by hand, or of a much older version
                self.unreadable.append(folder.name)
                continue
            self.jobs[job.id] = job
            self.progress[job.id] = Progress()

    def keep_counter(self, starts: int) -> None:
        with contextlib.suppress(OSError):
            write_json(self.counter, {"number": self.number, "starts": starts})

    def save(self, job: Job) -> None:
        """Later, where the disk is full now."""
        try:
            write_json(self.folder / job.id / "job.json", asdict(job))
            self.unsaved.discard(job.id)
        except OSError:
            self.unsaved.add(job.id)

    # ---- requests ----
    def add(self, **what) -> Job:
        """A job at the end of the queue. Problem 429 when that is full, 409 for a full disk."""
        with self.lock:
            queued = [job for job in self.jobs.values() if job.state == "queued"]
            if len(queued) >= MOST_QUEUED:
                raise Problem(429, f"{MOST_QUEUED} jobs wait already", retry_after="60")
            number = self.number + 1
            job = Job(id=f"{number:04d}", created=time.time(), **what)
            folder = self.folder / job.id
            try:
                folder.mkdir()
                write_json(folder / "command.json", {"argv": job.argv, "cwd": str(self.root)})
                write_json(folder / "job.json", asdict(job))
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise Problem(409, f"the job cannot be written: {error.strerror}") from None
            self.number = number
            self.jobs[job.id] = job
            self.progress[job.id] = Progress()
            self.keep_counter(self.restarts + 1)
            self.start_queued()
            return job

    def next_number(self) -> int:
        """Of the next job; no number comes twice, also not after a restart."""
        with self.lock:
            return self.number + 1

    def get(self, name: str | None) -> Job:
        with self.lock:
            if name not in self.jobs:
                raise Problem(404, "there is no such job", "job")
            return self.jobs[name]

    def stop(self, name: str, force: bool) -> Job:
        """SIGTERM, which lets a training save; force: SIGKILL to all of it, at every look until
        nothing is left."""
        with self.lock:
            job = self.get(name)
            if job.state == "queued":
                self.finish(job, "stopped")
            elif job.state in ("running", "stopping"):
                job.stop_asked = True
                job.force = job.force or force
                job.state = "stopping"
                self.save(job)
                if processes.lives(job.pid, job.known) and not force:
                    processes.ask_to_stop(job.pid)
            return job

    def remove(self, name: str) -> Job:
        """Forget a job and its log; what the run wrote stays."""
        with self.lock:
            job = self.get(name)
            if job.state in ("running", "stopping"):
                raise Problem(409, f"job {job.id} is {job.state}; stop it first", "job")
            if job.state == "queued":
                self.finish(job, "stopped")
            shutil.rmtree(self.folder / job.id, ignore_errors=True)
            self.unsaved.discard(job.id)
            del self.jobs[job.id]
            del self.progress[job.id]
            return job

    def resumable(self, job: Job) -> bool:
        """Whether the same command would go on from what the run saved, or begin again."""
        others = [other for other in self.jobs.values() if other.output == job.output]
        is_free = all(other.state not in ACTIVE for other in others)
        newest = max((other.id for other in others), default=job.id)
        ended = job.state in ("stopped", "failed", "lost") and job.started is not None
        return ended and is_free and newest == job.id and job.exit_code != USAGE

    def public(self, job: Job) -> dict:
        """A job as the page knows it."""
        with self.lock:
            progress = self.progress.get(job.id, Progress())
            keys = ("id", "name", "recipe", "script", "args", "dataset", "model", "state")
            found = {key: getattr(job, key) for key in keys}
            found |= {
                "exit_code": job.exit_code,
                "error": job.error,
                "devices": job.held or job.devices,
                "created": job.created,
                "started": job.started,
                "ended": job.ended,
                "continues": job.continues,
                "progress": self.stage(job, progress),
                "output_id": identify(Path(job.output)),
                "resumable": self.resumable(job),
            }
            return found

    def stage(self, job: Job, progress: Progress) -> dict | None:
        now = progress.now or job.last
        if now:
            return dict(now)
        if job.state in ("running", "stopping"):
            empty = dict.fromkeys(("step", "steps", "epoch", "eta_seconds"))
            return empty | {"stage": "prepare"}
        return None

    def all(self) -> list[Job]:
        """Newest first."""
        with self.lock:
            return [self.jobs[name] for name in sorted(self.jobs, key=int, reverse=True)]

    def queue(self) -> list[Job]:
        return [job for job in reversed(self.all()) if job.state == "queued"]

    def log(self, job: Job) -> Path:
        return self.folder / job.id / "log.txt"

    def series(self, job: Job) -> dict:
        """Curves: what the log has said, and what the finished run has left instead. Logs of jobs
        that ended before this manager began are read when they are asked for."""
        with self.lock:
            progress = self.progress.get(job.id, Progress())
            found = {name: list(points) for name, points in progress.series.items()}
        if job.state not in ACTIVE and not progress.end:
            progress = Progress()
            while progress.read(self.log(job)):
                pass
            found = progress.series
            with self.lock:
                if job.id in self.jobs:
                    self.progress[job.id] = progress
        if job.state == "done":
            found = found | series_of_run(Path(job.output))
        return found

    def problem(self) -> str | None:
        """What the page warns of."""
        if self.unsaved:
            return "the disk is full: the states of jobs are written when there is room"
        if self.unreadable:
            return f"{self.folder}: {', '.join(self.unreadable)} cannot be read and are left out"
        return None

    def busy(self) -> dict[str, str]:
        """device -> the job that has it."""
        running = [job for job in self.all() if job.state in ("running", "stopping")]
        return {device: job.id for job in running for device in job.held}

    # ---- the watch ----
    def watch(self) -> None:
        while not self.over.wait(TICK):
            self.look()

    def look(self) -> None:
        """Once at every job; nothing that happens to one of them ends the watch."""
        with self.lock:
            for job in list(self.jobs.values()):
                if job.state in ("running", "stopping"):
                    self.look_at(job)
            for name in list(self.unsaved):
                self.save(self.jobs[name])
            self.start_queued()

    def look_at(self, job: Job) -> None:
        folder = self.folder / job.id
        child = self.children.get(job.id)
        if child:
            child.poll()  # else it stays a zombie
        if job.pid is None:
            self.find_runner(job, folder)
        is_over = not processes.lives(job.pid, job.known)
        if job.force and not is_over:
            processes.kill_below(job.pid)
        self.progress[job.id].read(self.log(job))
        if not is_over or (job.pid is None and self.waited.get(job.id, 0) < GRACE):
            return
        while self.progress[job.id].read(self.log(job)):
            pass
        self.progress[job.id].finish()
        self.children.pop(job.id, None)
        self.waited.pop(job.id, None)
        said = read_json(folder / "exit.json")
        job.exit_code = said.get("code")
        self.finish(job, state_of(job), said.get("ended"))

    def find_runner(self, job: Job, folder: Path) -> None:
        """A manager that was killed between a start and the note of it."""
        self.waited[job.id] = self.waited.get(job.id, 0) + 1
        with contextlib.suppress(OSError, ValueError):
            job.pid = int((folder / "pid").read_text(encoding="ascii"))
            job.known = processes.identity(job.pid)
            if not is_runner(job.pid, folder):  # another one has its number by now
                job.known = None
            self.save(job)

    def finish(self, job: Job, state: str, ended: float | None = None) -> None:
        job.state = state
        job.ended = ended or time.time()
        job.last = self.progress[job.id].now
        self.note_error(job)
        self.save(job)

    def note_error(self, job: Job) -> None:
        progress = self.progress[job.id]
        if job.state == "failed":
            killed = f"killed by signal {-job.exit_code}" if (job.exit_code or 0) < 0 else None
            job.error = progress.error or killed or progress.last_line or None
        elif job.state == "lost":
            job.error = "it ended without an exit code: killed, or the machine was restarted"

    def start_queued(self) -> None:
        """In the order of the queue; a job is not overtaken by one that wants its devices."""
        there = self.devices()
        taken = set(self.busy())
        for job in self.queue():
            wanted = there if job.devices is None else job.devices
            if there and not taken & set(wanted):
                self.begin(job, wanted)
            taken |= set(wanted)

    def begin(self, job: Job, held: list[str]) -> None:
        """The state is on disk before there is a process: a manager that is killed here finds
        either no process or the number that the runner wrote."""
        folder = self.folder / job.id
        job.held = list(held)
        job.state = "running"
        job.started = time.time()
        self.save(job)
        try:
            child = subprocess.Popen(
                [sys.executable, str(RUNNER), str(folder)],
                cwd=self.root,
                env=processes.environment(**job.env, **device_variables(job)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            job.exit_code = 127
            self.finish(job, "failed")
            job.error = f"cannot start: {error}"
            self.save(job)
            return
        self.children[job.id] = child
        job.pid = child.pid
        job.known = processes.identity(child.pid)
        self.save(job)


def lock(state: Path):
    """The one manager of a state folder; the file is to be kept open. SystemExit for a second."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        file = open(state / "lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise SystemExit(f"error: --state {state} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        told = file.read().strip() or "another process"
        raise SystemExit(
            f"error: {state} has a manager already ({told}); open its page, or choose another "
            "--state"
        ) from None
    with contextlib.suppress(OSError):  # a full disk: the second one is not told the number
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()}".encode())
    return file
