"""Files of questions -> Choice and Exact, in the layouts of the public tests; what cannot be used
is counted and named.

Choices: csv of C-Eval (id,question,A,B,C,D,answer[,explanation]), CMMLU (,Question,A,B,C,D,Answer)
and MMLU (the same columns without a header), lines of ARC ({"question", "choices": {"text",
"label"}, "answerKey"}) and MMLU ({"question", "choices" or "options": [...], "answer": 2}). The
answer is a label (C, Ｃ, (C), "C: 7"), the text of a choice, or its index from 0; where it may be
two of these and they differ it is refused. Exact answers: GSM8K's lines ({"question", "answer":
"... #### 18"}), or an answer in <answer> tags, or alone. The subject of a question is its "subject"
or "category", else the name of its file without _dev, _val, _test.
"""

from __future__ import annotations

import csv
import gzip
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from evaluation.answers import final_answer, numbers, same  # noqa: F401  (for those who ask)

from common.data import files
from common.data.shapes import BadRow

LETTERS = "ABCDEFGHIJ"
LABELLED = re.compile(r"[(\[【（]?\s*(\w{1,2})\s*[)\]】）.．:：、,，]\s*(.+)", re.DOTALL)


@dataclass
class Choice:
    """right: index of the right one of options; source: file:line."""

    subject: str
    source: str
    question: str
    options: list[str]
    right: int


@dataclass
class Exact:
    """solution: the whole answer of the file (shown in examples), of which `final` counts."""

    subject: str
    source: str
    question: str
    solution: str
    final: str


@dataclass
class Read:
    """Questions in order, and what was left out: reason -> count, reason -> the first such line."""

    questions: list = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, source: str, reason: str, detail: str = "") -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        more = f" ({detail})" if detail else ""
        self.examples.setdefault(reason, f"{source}: {reason}{more}")

    @property
    def subjects(self) -> dict[str, list]:
        found: dict[str, list] = {}
        for question in self.questions:
            found.setdefault(question.subject, []).append(question)
        return found


def read(paths, kind: type, limit: int | None = None) -> Read:
    """All questions of files and folders (common/data/files.py has the kinds and encodings), at
    most `limit` of a file.

    kind: Choice or Exact. SystemExit when there is none at all.
    """
    out = Read()
    convert = {Choice: choice, Exact: exact}[kind]
    for path, weight in files.entries(paths):
        if weight is not None:
            raise SystemExit(f"{path}:{weight}: questions have no weights; every one is asked once")
        for file in files.data_files(path)[0]:
            read_file(file, convert, out, limit)
    if not out.questions:
        where = paths if isinstance(paths, str) else " ".join(map(str, paths))
        why = "; ".join(out.examples.values()) or "the files are empty"
        raise SystemExit(f"no usable question in {where}: {why}")
    return out


def read_file(file: Path, convert: Callable, out: Read, limit: int | None) -> None:
    stem = re.sub(r"_(dev|val|test|train)$", "", file.name.split(".")[0])
    count = 0
    for line, record in records(file, convert is choice):
        if count == limit:
            return
        source = f"{file}:{line}"
        try:
            if isinstance(record, BadRow):
                raise record
            if not isinstance(record, dict):
                raise BadRow("not an object", type(record).__name__)
            out.questions.append(convert(record, stem, source))
            count += 1
        except BadRow as bad:
            out.drop(source, bad.reason, bad.detail)


def records(file: Path, of_choices: bool) -> Iterator:
    """(line, record or BadRow) of a file; tables of choices may come without a header, as MMLU's
    do."""
    encoding = files.told_encoding(file)
    if of_choices and files.suffix_of(file) in files.TABLES:
        first, rows = table(file, encoding)
        if is_question(first):
            return headless(rows)
    return files.records(file, encoding)


def table(file: Path, encoding: str) -> tuple[list[str], Iterator]:
    """The first row with something in it, and (line, cells) of all such rows."""

    def rows() -> Iterator:
        opened = gzip.open if file.name.endswith(".gz") else open
        with opened(file, "rt", encoding=encoding, errors="surrogateescape", newline="") as lines:
            lines = (line.replace("\0", "") for line in lines)
            start = next(lines, "")
            csv.field_size_limit(1 << 30)
            reader = csv.reader(chain([start], lines), delimiter=max(",\t;", key=start.count))
            number = 1
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield number, cells
                number = reader.line_num + 1

    _, first = next(rows(), (0, []))
    return first, rows()


def is_question(cells: list[str]) -> bool:
    """Whether a row is a question with its choices and, last, the letter of one of them."""
    words = [ordinary(cell) for cell in cells]
    if len(words) < 4 or "QUESTION" in words or "ANSWER" in words:
        return False
    return words[-1] in tuple(LETTERS[: len(words) - 2])


def headless(rows: Iterator) -> Iterator:
    width = 0
    for line, cells in rows:
        width = width or len(cells)
        if len(cells) != width:
            yield line, BadRow("wrong number of cells", f"{len(cells)}, the first row has {width}")
            continue
        has_number = len(cells) > 6 and cells[0].strip().isdecimal()  # C-Eval's id
        question, *options, answer = cells[1:] if has_number else cells
        named = dict(zip(LETTERS, options, strict=False))
        yield line, {"question": question, **named, "answer": answer}


def choice(record: dict, stem: str, source: str) -> Choice:
    """BadRow for a record of none of the layouts. stem: the subject where the record has none."""
    row = lower_names(record)
    question = row.get("question")
    if isinstance(question, dict):  # ARC's own files
        row |= lower_names(question)
        question = row.get("stem")
    question = text(question, "no question")
    options, labels = options_of(row)
    options = [text(option, "an empty choice") for option in options]
    options = without_labels(options, labels)
    if len(options) < 2 or len(labels) != len(options) or len(options) > len(LETTERS):
        raise BadRow("no choices", f"columns: {', '.join(str(name) for name in record)[:80]}")
    return Choice(subject_of(row, stem), source, question, options, right_one(row, options, labels))


def options_of(row: dict) -> tuple[list, list[str]]:
    """-> (choices, their labels)."""
    given = row.get("choices", row.get("options"))
    if isinstance(given, list) and any(isinstance(option, dict) for option in given):
        given = {
            "text": [option.get("text") for option in given if isinstance(option, dict)],
            "label": [option.get("label") for option in given if isinstance(option, dict)],
        }
    if isinstance(given, dict) and "text" in given:  # ARC
        texts = list(given["text"] or [])
        labels = given.get("label") or LETTERS[: len(texts)]
        return texts, [ordinary(label) for label in labels]
    if isinstance(given, dict):  # MedQA; parquet fills absent letters with null
        given = {label: option for label, option in given.items() if option is not None}
        return list(given.values()), [ordinary(label) for label in given]
    if isinstance(given, list):  # MMLU
        return given, list(LETTERS[: len(given)])
    labels = [letter for letter in LETTERS if text(row.get(letter.lower()), None)]
    return [row[letter.lower()] for letter in labels], labels


def without_labels(options: list[str], labels: list[str]) -> list[str]:
    """["A. 3", "B. 4"] -> ["3", "4"]."""
    matches = [LABELLED.match(option) for option in options]
    if all(matches) and [ordinary(match[1]) for match in matches] == labels:
        return [match[2] for match in matches]
    return options


def lower_names(record: dict) -> dict:
    return {ordinary(name).lower(): value for name, value in record.items()}


def ordinary(word) -> str:
    """Ｃ -> C, 1 -> "1"."""
    return unicodedata.normalize("NFKC", str(word)).strip().upper()


def subject_of(row: dict, stem: str) -> str:
    return str(row.get("subject") or row.get("category") or stem)


ANSWERS = ("answerkey", "answer", "answer_key", "answer_idx", "answer_index")


def right_one(row: dict, options: list[str], labels: list[str]) -> int:
    """Index of the right choice; BadRow where the row's answers are missing or differ."""
    given = [row[name] for name in ANSWERS if row.get(name) not in (None, "")]
    if not given:
        raise BadRow("no answer given")
    places = set()
    problems = []
    for answer in given:
        try:
            places.add(place(answer, options, labels))
        except BadRow as bad:  # perhaps an explanation beside the label
            problems.append(bad)
    if not places:
        raise problems[0]
    if len(places) > 1:
        raise BadRow("its answers differ", ", ".join(map(str, given))[:40])
    return places.pop()


def place(answer, options: list[str], labels: list[str]) -> int:
    """Index of the right choice, from its label, its text or (as a number) its index from 0."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    word = ordinary(answer)
    bare = word.strip("().,:;、。[]【】 ")
    if not bare:
        raise BadRow("no answer given")
    if bare in labels:
        return labels.index(bare)
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    texts = [i for i, option in enumerate(options) if ordinary(option) == word]
    index = [int(bare)] if bare.isdecimal() and len(bare) < 3 and int(bare) < len(options) else []
    if is_number and index:
        return index[0]
    letters = re.sub("[,、/ ]", "", bare)
    if not texts and not index and len(letters) > 1 and set(letters) <= set(labels):
        raise BadRow("several answers", word[:20])
    found = set(texts + index + labelled(word, options, labels))
    if len(found) == 1:
        return found.pop()
    if found:
        raise BadRow("the answer may be several of the choices; give its letter", word[:20])
    raise BadRow("the answer is none of the choices", word[:20])


def labelled(word: str, options: list[str], labels: list[str]) -> list[int]:
    """ "C: 7" or "(C) 7" -> the index of C, and of 7 where that is another choice."""
    match = LABELLED.match(word)
    if not match or match[1] not in labels:
        return []
    texts = [i for i, option in enumerate(options) if ordinary(option) == match[2]]
    return [labels.index(match[1]), *texts]


def exact(record: dict, stem: str, source: str) -> Exact:
    """BadRow for a record without question or answer. stem: the subject where it has none."""
    row = lower_names(record)
    question = text(row.get("question"), "no question")
    solution = text(row.get("answer"), "no answer given")
    return Exact(subject_of(row, stem), source, question, solution, final_answer(solution))


def text(value, reason: str | None) -> str:
    """A stripped text, also of a number or true and false; BadRow(reason) where there is none (with
    None: "")."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)) and value == value:
        return str(value)
    if isinstance(value, str) and value.strip():
        if re.search("[\ud800-\udfff]", value):
            raise BadRow("broken characters", ascii(value)[:40])
        return value.strip()
    if reason is None:
        return ""
    raise BadRow(reason)
