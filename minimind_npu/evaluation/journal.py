"""Answers on disk as they come, so that an evaluation that was ended goes on where it stood; and
what they came to.

Several processes of one launch (common/launch.py, torchrun) share the questions by their numbers:
each writes a file of its own beside the journal, and rank 0 puts them into it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from common import cli, device
from common.data.files import atomic_file
from common.runs import heartbeat

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def join_others() -> None:
    """Before the first journal: the processes of this launch can wait for one another from here
    on."""
    heartbeat.start(device.DDP_TIMEOUT)
    if WORLD > 1 and heartbeat.seconds() is None:
        raise SystemExit("several processes are started with common/launch.py or torchrun")


class Journal:
    """A file of JSON lines: first what was measured and how, then a record for each answer.

    Where the file begins with other settings it is begun anew, and a line that a kill has torn is
    dropped. A record has "task", "question" (its number) and "sample", which name it; it counts
    once. All ranks make, and close, one of a file.
    """

    def __init__(self, file: Path, settings: dict):
        self.file = file
        self.head = {"settings": settings}
        if RANK == 0:
            self.tell()
            self.put_together()
        cli.wait_for_all("it reads the answers that are there")
        self.records = self.found_in(file)
        own = file
        if RANK:
            own = self.of_rank(f"{RANK}")
            own.write_text(line_of(self.head), encoding="utf-8")
        self.lines = open(own, "a", encoding="utf-8")  # noqa: SIM115  (open as long as this)

    def tell(self) -> None:
        head, _ = kept(self.file)
        if head == self.head:
            cli.say(f"{len(self.found()):,} answers are there already: {self.file}")
        elif head is not None:
            cli.say(f"{self.file} is of another model or other questions; begun anew")

    def of_rank(self, rank: str) -> Path:
        return self.file.with_name(f"{self.file.stem}.{rank}{self.file.suffix}")

    def others(self) -> list[Path]:
        """What other ranks have left, of this launch or of one that was ended."""
        return sorted(self.file.parent.glob(self.of_rank("[0-9]*").name))

    def found_in(self, file: Path) -> dict[tuple, dict]:
        head, records = kept(file)
        if head != self.head:
            return {}
        return {key_of(record): record for record in records}

    def found(self) -> dict[tuple, dict]:
        """In all files."""
        records: dict[tuple, dict] = {}
        for file in (self.file, *self.others()):
            records |= self.found_in(file)
        return records

    def put_together(self) -> None:
        """All answers into the one file. Rank 0, while nobody writes."""
        lines = [self.head, *self.found().values()]
        with atomic_file(self.file) as part:
            part.write_text("".join(map(line_of, lines)), encoding="utf-8")
        for file in self.others():
            file.unlink()

    def is_mine(self, question: int) -> bool:
        """Whether this process asks it."""
        return question % WORLD == RANK

    def has(self, task: str, question: int, sample: int = 0) -> bool:
        return (task, question, sample) in self.records

    def add(self, record: dict) -> None:
        self.records[key_of(record)] = record
        self.lines.write(line_of(record))
        self.lines.flush()

    def of(self, task: str) -> list[dict]:
        """Records of a task, in the order of questions and samples."""
        return [self.records[key] for key in sorted(self.records) if key[0] == task]

    def close(self) -> None:
        """Rank 0 has the records of all from here on."""
        self.lines.close()
        cli.wait_for_all("it puts the answers together")
        if RANK == 0 and WORLD > 1:
            self.put_together()
            self.records = self.found_in(self.file)


def key_of(record: dict) -> tuple:
    return record["task"], record["question"], record["sample"]


def line_of(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def kept(file: Path) -> tuple[dict | None, list[dict]]:
    """-> (first line, or None where there is none, the whole lines after it)."""
    if not file.is_file():
        return None, []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # torn
            break
    return (found[0], found[1:]) if found else ({}, [])


def keep_results(out: Path, name: str, results: dict, text: str) -> None:
    """out/NAME.json, and the table for people as out/NAME.md."""
    contents = {
        f"{name}.json": json.dumps(results, indent=1, ensure_ascii=False),
        f"{name}.md": text + "\n",
    }
    for file, content in contents.items():
        with atomic_file(out / file) as part:
            part.write_text(content, encoding="utf-8")
