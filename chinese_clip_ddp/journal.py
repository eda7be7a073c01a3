"""Work that waits for others (servers) and may be killed: some of it at a time, each result a line
of a file as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from os import SEEK_END
from pathlib import Path


def in_threads(work: Callable, items: Iterable, workers: int) -> Iterator:
    """work(item) of all items, in the order in which they are done; at most four times `workers`
    are under way."""
    pool = ThreadPoolExecutor(workers)
    waiting: set[Future] = set()
    try:
        for item in items:
            waiting.add(pool.submit(work, item))
            if len(waiting) >= 4 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (one.result() for one in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (one.result() for one in done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def end_line(journal: Path) -> None:
    """A kill may have left half a line: what is appended must not join it."""
    if journal.is_file() and journal.stat().st_size:
        with open(journal, "rb+") as file:
            file.seek(-1, SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
