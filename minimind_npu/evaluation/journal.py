"""Answers on disk as they come, so that an evaluation that was ended goes on where it stood; and
what they came to."""

from __future__ import annotations

import json
from pathlib import Path

from common import cli
from common.data.files import atomic_file


class Journal:
    """A file of JSON lines: first what was measured and how, then a record for each answer.

    Where the file begins with other settings it is begun anew, and a line that a kill has torn is
    dropped. A record has "task", "question" (its number) and "sample", which name it; it counts
    once.
    """

    def __init__(self, file: Path, settings: dict):
        self.file = file
        self.records: dict[tuple, dict] = {}
        head, records = kept(file)
        if head == {"settings": settings}:
            for record in records:
                self.records[key_of(record)] = record
            cli.say(f"{len(self.records):,} answers are there already: {file}")
        elif head is not None:
            cli.say(f"{file} is of another model or other questions; begun anew")
        with atomic_file(file) as part:
            lines = [{"settings": settings}, *self.records.values()]
            part.write_text("".join(map(line_of, lines)), encoding="utf-8")
        self.lines = open(file, "a", encoding="utf-8")  # noqa: SIM115  (open as long as this)

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
        self.lines.close()


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
