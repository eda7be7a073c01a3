"""The file of answers: parts that only grow while ranks work, then one file in the order of the
questions.

OUTPUT.part-RANK holds whole lines (the end of a killed process's last one is cut off),
OUTPUT.run.json what the run is and whether it is finished, OUTPUT.lock keeps a second process out.
Which rank answered a row is of no importance.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from common import cli


class Output:
    """The answers of a run: parts that only grow, one for each rank, then one file in the order of
    the input."""

    def __init__(self, path: Path):
        self.path = path
        self.run_file, self.lock_file = (
            path.with_name(path.name + end) for end in (".run.json", ".lock")
        )
        self.lock = self.part = None

    def parts(self) -> list[Path]:
        return sorted(
            p
            for p in self.path.parent.glob("*.part-*")
            if p.name.startswith(self.path.name + ".part-")
        )

    def begin(self, facts: dict, overwrite: bool) -> set[int]:
        """On the first rank: start, continue or refuse. -> rows that are answered; SystemExit 0
        where all are."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.lock_file, "w")  # noqa: SIM115  (held until the process ends)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another process is writing {self.path}") from None
        try:
            self._decide(facts, overwrite)
        except SystemExit:
            self.lock_file.unlink()
            raise
        for part in self.parts():
            os.truncate(
                part, part.read_bytes().rfind(b"\n") + 1
            )  # what a killed process left of a line
        return {row for row, _, _ in self.lines()}

    def _decide(self, facts: dict, overwrite: bool) -> None:
        if overwrite:
            for old in (self.path, self.run_file, *self.parts()):
                old.unlink(missing_ok=True)
        past = (
            json.loads(self.run_file.read_text(encoding="utf-8"))
            if self.run_file.is_file()
            else None
        )
        if past is None and (self.path.exists() or self.parts()):
            raise cli.usage_error(
                f"{self.path} is not an output of infer.py; another --output, or --overwrite"
            )
        changed = [name for name in facts if past and past["settings"].get(name) != facts[name]]
        if changed:
            told = ", ".join(
                f"{n} {_short(past['settings'].get(n))} -> {_short(facts[n])}" for n in changed[:4]
            )
            raise cli.usage_error(
                f"{self.path} is of another run ({told}); another --output, or --overwrite"
            )
        if past and past["finished"] and self.path.is_file():
            for part in self.parts():  # killed after the end
                part.unlink()
            cli.say(f"{self.path} holds this very run, finished; --overwrite to start anew")
            raise SystemExit(0)
        self.note(facts, finished=False)

    def note(self, facts: dict, finished: bool) -> None:
        draft = self.run_file.with_name(self.run_file.name + ".new")
        draft.write_text(
            json.dumps({"settings": facts, "finished": finished}, ensure_ascii=False, indent=1),
            "utf-8",
        )
        os.replace(draft, self.run_file)

    def write(self, records: list[dict]) -> None:
        """Append to this rank's part."""
        if self.part is None:
            rank = os.environ.get("RANK", "0")
            self.part = open(self.path.with_name(f"{self.path.name}.part-{rank}"), "ab")  # noqa: SIM115
        self.part.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
        self.part.flush()

    def lines(self):
        """(row, part, where the line begins) of every whole line."""
        for part in self.parts():
            with open(part, "rb") as file:
                at = 0
                for line in file:
                    with suppress(
                        ValueError, KeyError, TypeError
                    ):  # blocks that a power cut left empty
                        yield json.loads(line)["row"], part, at
                    at += len(line)

    def finish(self, facts: dict, count: int) -> list[dict]:
        """On the first rank: all parts in the order of the rows; -> the records, without messages
        and answers."""
        places, records, draft = {}, [], self.path.with_name(self.path.name + ".new")
        for row, part, at in self.lines():
            places[row] = part, at
        if absent := [row for row in range(count) if row not in places]:
            raise SystemExit(
                f"{len(absent)} rows lack an answer (first: {absent[0]}): no folder shared by all machines?"
            )
        opened = {part: open(part, "rb") for part in self.parts()}  # noqa: SIM115
        with open(draft, "wb") as out:
            for row in range(count):
                part, at = places[row]
                opened[part].seek(at)
                line = opened[part].readline()
                out.write(line)
                records.append(
                    {k: v for k, v in json.loads(line).items() if k not in ("messages", "answer")}
                )
            out.flush()
            os.fsync(out.fileno())
        os.replace(draft, self.path)
        self.note(facts, finished=True)
        for part in (*self.parts(), self.lock_file):
            part.unlink()
        return records


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
