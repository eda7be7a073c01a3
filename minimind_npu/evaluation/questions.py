"""Files of questions -> Choice and Exact, in the layouts of the public tests; what cannot be used
is counted and named.

Choices: csv of C-Eval (id,question,A,B,C,D,answer[,explanation]) and CMMLU
(,Question,A,B,C,D,Answer), lines of ARC ({"question", "choices": {"text", "label"}, "answerKey"})
and MMLU ({"question", "choices": [...], "answer": 2}). Exact answers: GSM8K's lines ({"question",
"answer": "... #### 18"}), or an answer in <answer> tags, or alone. The subject of a question is its
"subject" or "category", else the name of its file without _dev, _val, _test.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from common.data import files
from common.data.shapes import BadRow

LETTERS = "ABCDEFGHIJ"
NUMBER = re.compile(r"(?<![\d.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/[1-9]\d*)?")


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
    for line, record in files.records(file, files.told_encoding(file)):
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


def choice(record: dict, stem: str, source: str) -> Choice:
    """BadRow for a record of none of the layouts. stem: the subject where the record has none."""
    row = lower_names(record)
    question = text(row.get("question"), "no question")
    options, labels, answer = options_of(row)
    options = [text(option, "an empty choice") for option in options]
    if len(options) < 2 or len(labels) != len(options) or len(options) > len(LETTERS):
        raise BadRow("no choices", f"columns: {', '.join(str(name) for name in record)[:80]}")
    return Choice(subject_of(row, stem), source, question, options, place(answer, labels))


def options_of(row: dict) -> tuple[list, list[str], object]:
    """-> (choices, their labels, the answer as it is given)."""
    listed = row.get("choices")
    if isinstance(listed, dict):  # ARC
        labels = [str(label) for label in listed.get("label") or []]
        return listed.get("text") or [], labels, row.get("answerkey", row.get("answer"))
    if isinstance(listed, list):  # MMLU
        labels = list(LETTERS[: len(listed)])
        return listed, labels, row.get("answer", row.get("answerkey"))
    labels = [letter for letter in LETTERS if text(row.get(letter.lower()), None)]
    return [row[letter.lower()] for letter in labels], labels, row.get("answer")


def lower_names(record: dict) -> dict:
    return {str(name).strip().lower(): value for name, value in record.items()}


def subject_of(row: dict, stem: str) -> str:
    return str(row.get("subject") or row.get("category") or stem)


def place(answer, labels: list[str]) -> int:
    """Index of the right choice, from its label or (as a number) its index."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(labels):
        return answer
    word = "" if answer is None else str(answer)
    word = word.strip().strip("().（）").upper()
    if not word:
        raise BadRow("no answer given")
    known = [label.upper() for label in labels]
    if word not in known:
        raise BadRow("the answer is none of the choices", word[:20])
    return known.index(word)


def exact(record: dict, stem: str, source: str) -> Exact:
    """BadRow for a record without question or answer. stem: the subject where it has none."""
    row = lower_names(record)
    question = text(row.get("question"), "no question")
    answer = row.get("answer")
    if isinstance(answer, (int, float)):
        answer = str(answer)
    solution = text(answer, "no answer given")
    return Exact(subject_of(row, stem), source, question, solution, final_answer(solution))


def text(value, reason: str | None) -> str:
    """A stripped text; BadRow(reason) where there is none (with None: "")."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if reason is None:
        return ""
    raise BadRow(reason)


# ---- answers -------------------------------------------------------------------------------------


def final_answer(answer: str) -> str:
    """What counts of an answer: after its last ####, in its last <answer>, or all that follows its
    thought."""
    said = answer.split("</think>")[-1]
    if "<answer>" in said:
        said = said.split("<answer>")[-1].split("</answer>")[0]
    else:
        said = said.split("####")[-1]
    return said.strip()


def numbers(words: str) -> list[Fraction]:
    """The numbers in a text; 1,200 and full-width digits are read, a dot at the end of a sentence
    is none of theirs."""
    found = []
    for number in NUMBER.findall(normalised(words)):
        numerator, _, denominator = number.replace(",", "").partition("/")
        found.append(Fraction(numerator) / Fraction(denominator or 1))
    return found


def same(given: str, wanted: str) -> bool:
    """Whether an answer's final part is the wanted one: numbers by value, its last one counts; else
    word by word."""
    given = final_answer(given)
    target = numbers(wanted)
    if len(target) == 1 and is_number(wanted):
        return numbers(given)[-1:] == target
    return plain(given) == plain(wanted)


def is_number(words: str) -> bool:
    """Whether a text is one number, perhaps with a sign of money, a percent sign or a dot around
    it."""
    return bool(NUMBER.fullmatch(normalised(words).strip(" $¥€%.。\n")))


def normalised(words: str) -> str:
    """Full-width characters as ordinary ones, one kind of minus."""
    return unicodedata.normalize("NFKC", words).replace("−", "-")


def plain(words: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", words).split()).strip(" .。!！").casefold()
