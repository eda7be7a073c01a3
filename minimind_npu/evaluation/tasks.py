"""The tasks of chat_eval.py: their questions from the layouts of the public sets.

    choice   a letter is chosen; ARC, MMLU, C-Eval, CMMLU (questions.py), C3
    exact    an answer with a final number or word; GSM8K, spelling
    code     a function that passes the tests of its row; HumanEval
    words    an answer that has the words of its row; a name (samples/make_identity.py)

C3: [[sentences], [{"question", "choice", "answer"}], id] of the original files, or lines
{"context", "question", "choice", "answer"}. HumanEval: lines {"task_id", "prompt", "test",
"entry_point"}. Spelling has no file: samples/road_rows.py makes its questions. Identity: lines
{"question", "contains": [words]}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evaluation import questions
from evaluation.questions import Choice, Exact, Read
from samples import road_rows

from common.data import files
from common.data.shapes import BadRow

KINDS = {
    "arc_easy": "choice",
    "arc_challenge": "choice",
    "mmlu": "choice",
    "ceval": "choice",
    "cmmlu": "choice",
    "c3": "choice",
    "gsm8k": "exact",
    "spelling": "exact",
    "humaneval": "code",
    "identity": "words",
    # files of one's own, in these layouts
    "choice": "choice",
    "exact": "exact",
    "code": "code",
    "words": "words",
}


@dataclass(frozen=True)
class Code:
    """prompt: a function without its body; test: defines check(function)."""

    source: str
    prompt: str
    test: str
    entry_point: str

    def program(self, answer: str) -> str:
        """What is run: the body that was written, in its function, and the tests."""
        written = in_block(answer)
        whole = written if f"def {self.entry_point}" in written else self.prompt + written
        return f"{whole}\n\n{self.test}\n\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Words:
    """contains: what a right answer has, all of it, in small or capital letters."""

    source: str
    question: str
    contains: tuple[str, ...]

    def stand_in(self, answer: str) -> bool:
        said = answer.split("</think>")[-1].casefold()
        return all(word.casefold() in said for word in self.contains)


@dataclass(frozen=True)
class Task:
    name: str
    kind: str
    questions: list
    dropped: dict[str, int]


def read(word: str, num_rows: int | None) -> Task:
    """ "mmlu=FILE", or "spelling", of whose questions there is no file; at most num_rows of each
    file. SystemExit with one line where there are none."""
    name, _, path = word.partition("=")
    if name not in KINDS:
        raise SystemExit(f"--tasks {word}: {', '.join(KINDS)}, each as NAME=FILE")
    if name == "spelling":
        if path:
            raise SystemExit(f"--tasks {word}: its questions are made here; --tasks spelling")
        return Task(name, "exact", spelling()[:num_rows], {})
    if not path:
        raise SystemExit(f"--tasks {name}: where its questions are: {name}=FILE")
    kind = KINDS[name]
    if name == "c3":
        found = passages(path, num_rows)
    elif kind == "code":
        found = one_a_row(path, num_rows, function)
    elif kind == "words":
        found = one_a_row(path, num_rows, asked_for_words)
    else:
        found = questions.read([path], {"choice": Choice, "exact": Exact}[kind], num_rows)
    return Task(name, kind, found.questions, found.dropped)


def spelling() -> list[Exact]:
    made = []
    for i, row in enumerate(road_rows.spelling_questions()):
        final = questions.final_answer(row["answer"])
        made.append(Exact("spelling", f"spelling:{i}", row["question"], row["answer"], final))
    return made


# ---- passages ------------------------------------------------------------------------------------


def passages(path: str, num_rows: int | None) -> Read:
    found = Read()
    for file in data_files(path):
        asked = passages_of(file, found)
        found.questions += asked[:num_rows]
    return refuse_empty(found, path)


def passages_of(file: Path, found: Read) -> list[Choice]:
    made = []
    for number, (context, row) in enumerate(rows_of_passages(file), 1):
        source = f"{file}:{number}"
        try:
            made.append(passage(context, row, source))
        except BadRow as bad:
            found.drop(source, bad.reason, bad.detail)
    return made


def rows_of_passages(file: Path) -> list[tuple]:
    """(sentences, {"question", "choice", "answer"}) of both layouts."""
    text = file.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("[["):
            listed = json.loads(text)
            return [(entry[0], row) for entry in listed for row in entry[1]]
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [(row.get("context"), row) for row in rows]
    except (ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise SystemExit(f"{file}: neither of C3's layouts: {error}") from None


def passage(context, row, source: str) -> Choice:
    if not isinstance(row, dict):
        raise BadRow("not an object", type(row).__name__)
    sentences = [context] if isinstance(context, str) else context
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise BadRow("no context")
    options = row.get("choice", row.get("choices"))
    if not isinstance(options, list) or len(options) < 2:
        raise BadRow("no choices")
    options = [questions.text(option, "an empty choice") for option in options]
    answer = questions.text(row.get("answer"), "no answer given")
    if options.count(answer) != 1:
        raise BadRow("the answer is none of the choices", answer[:20])
    asked = questions.text(row.get("question"), "no question")
    text = "\n".join([*sentences, asked])
    return Choice("c3", source, text, options, options.index(answer))


# ---- functions, words ----------------------------------------------------------------------------


def one_a_row(path: str, num_rows: int | None, convert: Callable) -> Read:
    """convert: a record and its place -> a question; BadRow where it is none."""
    found = Read()
    for file in data_files(path):
        read_before = len(found.questions)
        for line, record in files.records(file, files.told_encoding(file)):
            if num_rows is not None and len(found.questions) - read_before >= num_rows:
                break
            source = f"{file}:{line}"
            try:
                found.questions.append(convert(record, source))
            except BadRow as bad:
                found.drop(source, bad.reason, bad.detail)
    return refuse_empty(found, path)


def function(record, source: str) -> Code:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow("not an object", type(record).__name__)
    parts = []
    for name in ("prompt", "test", "entry_point"):
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise BadRow(f"no {name}")
        parts.append(value)
    if not parts[2].isidentifier():
        raise BadRow("entry_point is no name", parts[2][:20])
    return Code(source, *parts)


def asked_for_words(record, source: str) -> Words:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow("not an object", type(record).__name__)
    question = questions.text(record.get("question"), "no question")
    words = record.get("contains")
    if not isinstance(words, list) or not words:
        raise BadRow("no list contains")
    words = tuple(questions.text(word, "an empty word") for word in words)
    return Words(source, question, words)


def in_block(answer: str) -> str:
    """The code of an answer: its last block between ``` marks, or all of it."""
    blocks = answer.split("```")
    if len(blocks) < 2:
        return answer
    last = blocks[-2] if len(blocks) % 2 else blocks[-1]
    first_line, _, rest = last.partition("\n")
    return rest if first_line.strip().lower() in ("", "python", "py", "python3") else last


# ---- both ----------------------------------------------------------------------------------------


def data_files(path: str) -> list[Path]:
    if not Path(path).exists():
        raise SystemExit(f"{path}: no such file or folder")
    return files.data_files(Path(path))[0]


def refuse_empty(found: Read, path: str) -> Read:
    if not found.questions:
        why = "; ".join(found.examples.values()) or "the files are empty"
        raise SystemExit(f"no usable question in {path}: {why}")
    return found
