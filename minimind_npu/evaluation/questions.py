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
        self.examples.setdefault(reason, f"{source}: {reason}" + (f" ({detail})" if detail else ""))

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
    out, convert = Read(), {Choice: choice, Exact: exact}[kind]
    for path, weight in files.entries(paths):
        if weight is not None:
            raise SystemExit(f"{path}:{weight}: questions have no weights; every one is asked once")
        for file in files.data_files(path)[0]:
            read_file(file, convert, out, limit)
    if not out.questions:
        why = "; ".join(out.examples.values()) or "the files are empty"
        raise SystemExit(
            f"no usable question in {paths if isinstance(paths, str) else ' '.join(map(str, paths))}: {why}"
        )
    return out


def read_file(file: Path, convert: Callable, out: Read, limit: int | None) -> None:
    stem = re.sub(r"_(dev|val|test|train)$", "", file.name.split(".")[0])
    count = 0
    for line, record in files.records(file, files.encoding_of(file)):
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
    """BadRow for a record of none of the layouts."""
    row = {str(name).strip().lower(): value for name, value in record.items()}
    question, listed = text(row.get("question"), "no question"), row.get("choices")
    if isinstance(listed, dict):  # ARC
        options, labels = (
            listed.get("text") or [],
            [str(label) for label in listed.get("label") or []],
        )
        answer = row.get("answerkey", row.get("answer"))
    elif isinstance(listed, list):  # MMLU
        options, labels, answer = (
            listed,
            list(LETTERS[: len(listed)]),
            row.get("answer", row.get("answerkey")),
        )
    else:
        labels = [letter for letter in LETTERS if text(row.get(letter.lower()), None)]
        options, answer = [row[letter.lower()] for letter in labels], row.get("answer")
    options = [text(option, "an empty choice") for option in options]
    if len(options) < 2 or len(labels) != len(options) or len(options) > len(LETTERS):
        raise BadRow("no choices", f"columns: {', '.join(str(name) for name in record)[:80]}")
    subject = str(row.get("subject") or row.get("category") or stem)
    return Choice(subject, source, question, options, place(answer, labels))


def place(answer, labels: list[str]) -> int:
    """Index of the right choice, from its label or (as a number) its index."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(labels):
        return answer
    word = str(answer if answer is not None else "").strip().strip("().（）").upper()
    if not word:
        raise BadRow("no answer given")
    known = [label.upper() for label in labels]
    if word not in known:
        raise BadRow("the answer is none of the choices", word[:20])
    return known.index(word)


def exact(record: dict, stem: str, source: str) -> Exact:
    row = {str(name).strip().lower(): value for name, value in record.items()}
    question, answer = text(row.get("question"), "no question"), row.get("answer")
    solution = text(str(answer) if isinstance(answer, (int, float)) else answer, "no answer given")
    subject = str(row.get("subject") or row.get("category") or stem)
    return Exact(subject, source, question, solution, final_part(solution))


def text(value, reason: str | None) -> str:
    """A stripped text; BadRow(reason) where there is none (with None: "")."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if reason is None:
        return ""
    raise BadRow(reason)


# ---- answers --------------------------------------------------------------------------------------------------------


def final_part(answer: str) -> str:
    """What counts of an answer: after its last ####, in its last <answer>, or all that follows its
    thought."""
    said = answer.split("</think>")[-1]
    if "<answer>" in said:
        return said.split("<answer>")[-1].split("</answer>")[0].strip()
    return (said.split("####")[-1] if "####" in said else said).strip()


def numbers(words: str) -> list[Fraction]:
    """The numbers in a text; 1,200 and full-width digits are read, a dot at the end of a sentence
    is none of theirs."""
    plain = unicodedata.normalize("NFKC", words).replace("−", "-")
    return [
        Fraction(*map(Fraction, found.replace(",", "").split("/")))
        for found in NUMBER.findall(plain)
    ]


def same(given: str, wanted: str) -> bool:
    """Whether an answer's final part is the wanted one: numbers by value, its last one counts; else
    word by word."""
    given = final_part(given)
    target = numbers(wanted)
    if len(target) == 1 and is_number(wanted):
        return numbers(given)[-1:] == target
    return plain(given) == plain(wanted)


def is_number(words: str) -> bool:
    """Whether a text is one number, perhaps with a sign of money, a percent sign or a dot around
    it."""
    bare = unicodedata.normalize("NFKC", words).replace("−", "-").strip(" $¥€%.。\n")
    return bool(NUMBER.fullmatch(bare))


def plain(words: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", words).split()).strip(" .。!！").casefold()
