"""What the lines of a run's log say: how far it is, its losses, its error."""

from __future__ import annotations

import re
from pathlib import Path

from tools.manager.files import read_json

# the lines of common/callbacks.py and of the loops with their own
STEP = re.compile(r"step (\d+)(?:/(\d+))? +(\d+)% \| (.+)")
HELD_OUT = re.compile(r"held out at step (\d+): (.+)")
FIGURE = re.compile(r"([a-z][\w /.-]*?) (-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)%?", re.I)
AMOUNT = re.compile(r"(-?\d[\d,]*(?:\.\d+)?) ([a-z][\w /]*)", re.I)
CLOCK = re.compile(r"left (?:(\d+) h )?(?:(\d+) min)?(?:(\d+) s)?")
NAMES = {
    "lr": "learning_rate",
    "tok/s": "tokens_per_second",
    "label tok/s": "label_tokens_per_second",
    "samples/s": "samples_per_second",
    "GiB": "memory_gib",
    "MFU": "mfu",
}
ERRORS = ("error: ", "launch: ")
MOST_POINTS = 5000  # of one curve; then every second one is left out
LONGEST_LINE = 1 << 16


class Progress:
    """Grows with the log; `end` is how far that was read, in bytes."""

    def __init__(self):
        self.end = 0
        self.rest = b""
        self.series: dict[str, list[tuple[int, float]]] = {}
        self.now: dict | None = None
        self.error: str | None = None
        self.last_line = ""

    def read(self, log: Path, most: int = 1 << 20) -> bool:
        """The next bytes of a log; whether there were any."""
        try:
            with open(log, "rb") as file:
                file.seek(self.end)
                data = file.read(most)
        except OSError:
            return False
        self.end += len(data)
        lines = (self.rest + data).replace(b"\r", b"\n").split(b"\n")
        self.rest = lines.pop()[-LONGEST_LINE:]
        for line in lines:
            self.line(line[:LONGEST_LINE].decode("utf-8", "replace"))
        return bool(data)

    def finish(self) -> None:
        """The last line may have no end."""
        if self.rest:
            self.line(self.rest.decode("utf-8", "replace"))
            self.rest = b""

    def line(self, text: str) -> None:
        text = text.strip()
        if not text:
            return
        self.last_line = text[:500]
        if text.startswith(ERRORS):
            self.error = text[:1000]
        step = STEP.match(text)
        held_out = HELD_OUT.match(text)
        if step:
            self.step(step)
        elif held_out:
            for part in held_out[2].split(", "):
                self.figure(int(held_out[1]), part, "eval_")

    def step(self, found: re.Match) -> None:
        number = int(found[1])
        total = int(found[2]) if found[2] else None
        for part in found[4].split(" | "):
            self.figure(number, part)
        self.now = {
            "step": number,
            "steps": total,
            "epoch": None,
            "eta_seconds": seconds_left(found[4]),
            "stage": "finish" if int(found[3]) >= 100 else "train",
        }

    def figure(self, step: int, part: str, prefix: str = "") -> None:
        named = FIGURE.fullmatch(part)
        amount = AMOUNT.fullmatch(part)
        if named:
            self.point(step, prefix + named[1], named[2])
        elif amount:
            self.point(step, prefix + amount[2], amount[1])

    def point(self, step: int, name: str, value: str) -> None:
        name = NAMES.get(name, name.replace(" ", "_"))
        if name == "left" or len(self.series) > 60:
            return
        points = self.series.setdefault(name, [])
        points.append((step, float(value.replace(",", ""))))
        if len(points) > MOST_POINTS:
            del points[1::2]


def seconds_left(text: str) -> int | None:
    found = CLOCK.search(text)
    if not found or not any(found.groups()):
        return None
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def series_of_run(output: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that a finished run left in trainer_state.json."""
    found: dict[str, list[tuple[int, float]]] = {}
    history = read_json(output / "trainer_state.json").get("log_history")
    for entry in history if isinstance(history, list) else []:
        step = entry.get("step") if isinstance(entry, dict) else None
        if not isinstance(step, int):
            continue
        for name, value in entry.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and name not in ("step", "seconds", "epoch"):
                found.setdefault(name, []).append((step, value))
    for name, points in found.items():
        every = 1 + len(points) // MOST_POINTS
        found[name] = points[::every]
    return found
