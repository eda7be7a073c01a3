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
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from common import cli
from common.data.files import atomic_file


class Output:
    """The answers of a run; `begin` and `finish` are called on the first rank, `write` on all."""

    def __init__(self, path: Path):
        self.path = path
        self.run_file = self._beside(".run.json")
        self.lock_file = self._beside(".lock")
        self.lock = None
        self.part = None

    def _beside(self, end: str) -> Path:
        return self.path.with_name(self.path.name + end)

    def parts(self) -> list[Path]:
        prefix = (
            self.path.name + ".part-"
        )  # the name may hold characters that mean something to glob
        return sorted(p for p in self.path.parent.glob("*.part-*") if p.name.startswith(prefix))

    # ---- the beginning ----

    def begin(self, facts: dict, overwrite: bool) -> set[int]:
        """Start, continue or refuse. -> rows that are answered; SystemExit 0 where all are.

        facts: what decides the answers; a run with others is not continued.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            if overwrite:
                self._remove_all()
            self._refuse_others(facts)
        except SystemExit:
            self.lock_file.unlink()
            raise
        self._note(facts, finished=False)
        for part in self.parts():
            whole = part.read_bytes().rfind(b"\n") + 1
            os.truncate(part, whole)  # what a killed process left of a line
        return {row for row, _, _ in self._lines()}

    def _take_lock(self) -> None:
        self.lock = open(self.lock_file, "w", encoding="utf-8")  # noqa: SIM115  (held until the process ends)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another process is writing {self.path}") from None

    def _remove_all(self) -> None:
        for old in (self.path, self.run_file, *self.parts()):
            old.unlink(missing_ok=True)

    def _refuse_others(self, facts: dict) -> None:
        """SystemExit unless what is there is nothing, or an unfinished run with the same facts."""
        if not self.run_file.is_file():
            if self.path.exists() or self.parts():
                raise cli.usage_error(
                    f"{self.path} is not an output of infer.py; another --output, or --overwrite"
                )
            return
        past = json.loads(self.run_file.read_text(encoding="utf-8"))
        before = past["settings"]
        changed = [name for name in facts if before.get(name) != facts[name]]
        if changed:
            shown = ", ".join(
                f"{name} {_short(before.get(name))} -> {_short(facts[name])}"
                for name in changed[:4]
            )
            raise cli.usage_error(
                f"{self.path} is of another run ({shown}); another --output, or --overwrite"
            )
        if past["finished"] and self.path.is_file():
            for part in self.parts():  # killed after the end
                part.unlink()
            cli.say(f"{self.path} holds this very run, finished; --overwrite to start anew")
            raise SystemExit(0)

    def _note(self, facts: dict, finished: bool) -> None:
        content = {"settings": facts, "finished": finished}
        with atomic_file(self.run_file) as draft:
            draft.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    # ---- while ranks work ----

    def write(self, records: list[dict]) -> None:
        """Append to this rank's part."""
        if self.part is None:
            path = self._beside(f".part-{os.environ.get('RANK', '0')}")
            self.part = open(path, "ab")  # noqa: SIM115  (held until the process ends)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        self.part.write("".join(lines).encode())
        self.part.flush()

    def _lines(self) -> Iterator[tuple[int, Path, int]]:
        """(row, part, where the line begins) of every whole line."""
        for part in self.parts():
            with open(part, "rb") as file:
                start = 0
                for line in file:
                    row = _row_of(line)
                    if row is not None:
                        yield row, part, start
                    start += len(line)

    # ---- the end ----

    def finish(self, facts: dict, count: int) -> list[dict]:
        """All parts in the order of the rows; -> the records, without messages and answers."""
        places = {row: (part, start) for row, part, start in self._lines()}
        absent = [row for row in range(count) if row not in places]
        if absent:
            raise SystemExit(
                f"{len(absent)} rows lack an answer (first: {absent[0]}): no folder shared by "
                "all machines?"
            )
        records = []
        with atomic_file(self.path) as draft, ExitStack() as stack:
            opened = {part: stack.enter_context(open(part, "rb")) for part in self.parts()}
            out = stack.enter_context(open(draft, "wb"))
            for row in range(count):
                part, start = places[row]
                opened[part].seek(start)
                line = opened[part].readline()
                out.write(line)
                records.append(_without_texts(json.loads(line)))
            out.flush()
            os.fsync(out.fileno())
        self._note(facts, finished=True)
        for file in (*self.parts(), self.lock_file):
            file.unlink()
        return records


def _row_of(line: bytes) -> int | None:
    """The row that a line answers; None for blocks that a power cut left empty."""
    try:
        return json.loads(line)["row"]
    except (ValueError, KeyError, TypeError):
        return None


def _without_texts(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in ("messages", "answer")}


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
