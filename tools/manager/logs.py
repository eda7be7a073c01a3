"""A job's log as server-sent events: what is there, then what comes, until the job has ended."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import AsyncIterator

from tools.manager.errors import Problem
from tools.manager.job import ACTIVE, Job
from tools.manager.jobs import Jobs

MOST = 64  # streams open at once
PIECE = 1 << 16  # bytes of one event
LOOK_SECONDS = 0.3
QUIET_LOOKS = 50  # then a comment keeps the connection open


class Streams:
    """Counts those that are open; `over` ends them all."""

    def __init__(self, jobs: Jobs):
        self.jobs = jobs
        self.open = 0
        self.over = False

    async def events(self, job: Job, after: int) -> AsyncIterator[str]:
        """after: bytes of the log that the client has. The job may be removed meanwhile."""
        log = self.jobs.log(job)
        place = max(0, after)
        told = None
        quiet = 0
        self.open += 1
        try:
            while not self.over:
                public = self.jobs.public(job)
                is_over = job.state not in ACTIVE
                text, end = await asyncio.to_thread(read, log, place, is_over)
                quiet = 0 if text or public != told else quiet + 1
                if public != told:
                    told = public
                    yield event("state", public)
                if end > place:
                    place = end
                    yield event("log", {"text": text}, place)
                elif is_over or job.id not in self.jobs.jobs:
                    yield event("end", {"state": job.state})
                    return
                elif quiet >= QUIET_LOOKS:
                    quiet = 0
                    yield ": still here\n\n"
                if not text:
                    await asyncio.sleep(LOOK_SECONDS)
        finally:
            self.open -= 1

    def refuse_too_many(self) -> None:
        if self.open >= MOST:
            raise Problem(429, f"{MOST} logs are being read already", retry_after="5")


def read(log, place: int, whole: bool) -> tuple[str, int]:
    """The next piece of a log in whole characters, and where it ends; `whole`: also what is no
    character at its end."""
    try:
        with open(log, "rb") as file:
            file.seek(place)
            data = file.read(PIECE)
    except OSError:
        return "", place
    is_last = whole and len(data) < PIECE
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data, is_last)
    held = len(decoder.getstate()[0])
    return text, place + len(data) - held


def event(kind: str, data: dict, number: int | None = None) -> str:
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n"
