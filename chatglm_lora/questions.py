"""Questions in any shape of the training data, with or without their answers, and their batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from common.data import files, shapes
from common.data.load import as_json, column_renames, renamed
from common.data.records import DIALOGUES, LABELS, as_record, tidy, without_switches
from common.data.turns import ROLES, SWITCHES, BadRow

ANSWERS = ("output", "answer", "summary", "target", "response", "completion", "output_zh")
STAND_IN = "?"  # where an answer is missing: the shapes of common/data/shapes.py have one
WINDOW = 32  # batches that are sorted by length together


@dataclass
class Question:
    """Either messages, or an error that says why there are none.

    row: its number, from 0; source: file:line; reference: the answer that the row came with.
    """

    row: int
    source: str
    messages: list[dict] = field(default_factory=list)
    tools: list | None = None
    reference: str | None = None
    error: str | None = None

    @property
    def length(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


# ---- files -> questions --------------------------------------------------------------------------


def read(paths, column_map: str = "", limit: int | None = None) -> Iterator[Question]:
    """Questions of files and folders (see common/data/files.py for kinds and encodings), bad rows
    among them."""
    renames = column_renames(column_map)
    number = 0
    for file in _files(paths):
        encoding = files.told_encoding(file)
        for line, record in files.records(file, encoding):
            if number == limit:
                return
            yield question(record, number, f"{file}:{line}", renames, encoding)
            number += 1


def _files(paths) -> Iterator:
    for path, weight in files.entries(paths):
        if weight is not None:
            raise SystemExit(
                f"{path}:{weight}: questions have no weights; every one is answered once"
            )
        yield from files.data_files(path)[0]


def question(
    record, row: int, source: str, renames: dict | None = None, encoding: str = "utf-8"
) -> Question:
    """One record, text or list of messages -> Question."""
    try:
        asked, reference = _asked(_as_record(record, renames or {}))
        as_json(asked, encoding)
    except BadRow as bad:
        detail = f" ({bad.detail})" if bad.detail else ""
        return Question(row, source, error=bad.reason + detail)
    return Question(row, source, asked["messages"], asked.get("tools"), reference)


def _as_record(record, renames: dict[str, str]) -> dict:
    if isinstance(record, str):
        return {"prompt": record}
    record = {"messages": record} if isinstance(record, list) else as_record(record)
    if renames.keys().isdisjoint(record):  # of several files only some may need it
        return record
    return renamed(record, renames)


# ---- the question of a record --------------------------------------------------------------------


def _asked(record: dict) -> tuple[dict, str | None]:
    """A record -> (canonical chat row without its last answer, that answer or None)."""
    tidied, _ = tidy(record)
    given = {
        name: without_switches(value)
        for name, value in tidied.items()
        if name not in (*SWITCHES, *LABELS) and not (name in ANSWERS and _is_blank(value))
    }
    if set(given) == {"text"}:
        given = {"prompt": given["text"]}
    is_dialogue = any(isinstance(given.get(name), list) for name in DIALOGUES)
    shape = shapes.detect("chat", [given])
    if shape and not is_dialogue:
        row = shape.convert(given)
        return _without_answer(row), row["messages"][-1]["content"]
    given, reference = _answered(given)
    shape = shapes.detect("chat", [given])
    if shape is None:
        seen = ", ".join(str(name)[:40] for name in list(record)[:8])
        raise BadRow(
            "no question found", f"columns: {seen}; name yours with --column_map instruction=YOURS"
        )
    return _without_answer(shape.convert(given)), reference


def _without_answer(row: dict) -> dict:
    return row | {"messages": row["messages"][:-1]}


def _answered(given: dict) -> tuple[dict, str | None]:
    """A record -> (the record with an answer at its end, the answer that stood there or None)."""
    for name in DIALOGUES:
        turns = given.get(name)
        if isinstance(turns, list) and turns:
            turns, reference = _answered_turns(turns)
            return given | {name: turns}, reference
    missing = {name: STAND_IN for name in ANSWERS if name not in given}
    return given | missing, None


def _answered_turns(turns: list) -> tuple[list, str | None]:
    """Turns of a dialogue -> (turns with an answer at the end, the answer that stood there or
    None)."""
    *before, last = turns
    if not isinstance(last, dict):
        raise BadRow("a turn is not an object", type(last).__name__)
    if "human" in last:
        answer = last.get("assistant")
        if _is_blank(answer):
            return [*before, last | {"assistant": STAND_IN}], None
        return turns, answer
    stand_in = {"role": "assistant", "content": STAND_IN}
    who = str(last.get("role") or last.get("from")).lower()
    if ROLES.get(who) != "assistant":
        return [*turns, stand_in], None
    answer = next((last[name] for name in ("content", "value", "text") if name in last), None)
    if _is_blank(answer):
        return [*before, stand_in], None
    return turns, answer


def _is_blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


# ---- questions -> batches ------------------------------------------------------------------------


def batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Fixed batches of `size` good questions of like length, longest first within windows of 32
    batches."""
    good = [q for q in questions if q.error is None]
    step = WINDOW * size
    for start in range(0, len(good), step):
        window = sorted(good[start : start + step], key=lambda q: (-q.length, q.row))
        for i in range(0, len(window), size):
            yield window[i : i + size]
