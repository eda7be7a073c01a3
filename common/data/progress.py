"""Long work shows that it goes on: a bar on a terminal, elsewhere a plain line now and then."""

import os
import sys
import time

FIRST_LINE = 5  # seconds; shorter work says nothing
NEXT_LINE = 20


class Progress:
    """`with Progress("tokenise", total=len(rows)) as progress: ... progress.update(n)`

    total: how much there is, or None where nobody knows; unit: what is counted.
    Only rank 0 shows anything. May be handed to a worker process before the first update.
    """

    def __init__(self, desc: str, total: int | None = None, unit: str = "rows"):
        self.desc = desc
        self.total = total
        self.unit = unit
        self.done = 0
        self.bar = None
        self.shown = os.environ.get("RANK", "0") == "0"
        self.terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.next_line = self.start + FIRST_LINE

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        self.done += n
        if not self.shown:
            return
        if self.terminal:
            if self.bar is None:
                self.bar = self._new_bar()
            self.bar.update(n)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + NEXT_LINE
            print(self._line(), flush=True)

    def _new_bar(self):
        from tqdm import tqdm

        return tqdm(
            desc=self.desc,
            total=self.total,
            unit=f" {self.unit}",
            delay=FIRST_LINE,
            dynamic_ncols=True,
        )

    def _line(self) -> str:
        seconds = time.monotonic() - self.start
        if self.total is None:
            return f"{self.desc}: {self.done:,} {self.unit}, {seconds:.0f} s"
        done = min(self.done, self.total)  # what workers estimate may be a little more
        left = seconds * (self.total - done) / done if done else 0
        return (
            f"{self.desc}: {done:,} of {self.total:,} {self.unit}, "
            f"{seconds:.0f} s, about {left:.0f} s left"
        )
