"""Progress of several files that are fetched at once."""

from __future__ import annotations

import io
import sys
import threading
import time

from tqdm import tqdm

from tools.hub.fetch import Entry

SPEAK_EVERY = 30  # seconds between two lines where there is no terminal
LARGE = 8 << 20  # bytes from which a file has a bar of its own


class Meter:
    """One bar over all bytes and one for each large file; a line now and then where there is no
    terminal.

    Called from the workers' threads.
    """

    def __init__(self, entries: list[Entry], have: dict[str, int]):
        """have: path -> bytes that stand on the disk already; they count as progress, not as
        speed."""
        self.terminal = sys.stderr.isatty()
        self.sizes, self.have, self.bars = {e.path: e.size or 0 for e in entries}, dict(have), {}
        self.done, self.spoken, self.lock = 0, time.monotonic(), threading.Lock()
        self.total = self._bar("all", sum(self.sizes.values()), sum(have.values()))
        self._count()

    def _bar(self, name: str, total: int, initial: int) -> tqdm:
        return tqdm(
            total=total,
            initial=initial,
            desc=name[-32:],
            unit="iB",
            unit_scale=True,
            unit_divisor=1024,
            leave=name == "all",
            file=sys.stderr if self.terminal else io.StringIO(),
            dynamic_ncols=self.terminal,
        )

    def _count(self) -> None:
        self.total.set_postfix_str(f"{self.done}/{len(self.sizes)} files")

    def show(self, path: str, have: int) -> None:
        """So many bytes of a file are on the disk; fewer than before when it starts anew."""
        with self.lock:
            step, self.have[path] = have - self.have.get(path, 0), have
            self.total.update(step)
            if self.terminal and self.sizes[path] > LARGE:
                if path not in self.bars:
                    self.bars[path] = self._bar(path, self.sizes[path], have - step)
                self.bars[path].update(step)

    def finish(self, path: str) -> None:
        """A file is whole; what of it was not shown stood there already."""
        with self.lock:
            self.done += 1
            rest = self.sizes[path] - self.have.get(path, 0)
            self.total.initial += rest
            self.total.n += rest
            if path in self.bars:
                self.bars.pop(path).close()
            self._count()

    def note(self, text: str) -> None:
        """A line above the bars."""
        with self.lock:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def tick(self) -> None:
        if not self.terminal and time.monotonic() - self.spoken > SPEAK_EVERY:
            self.spoken = time.monotonic()
            self.note(str(self.total))

    def close(self) -> None:
        with self.lock:
            for bar in [*self.bars.values(), self.total]:
                bar.close()
