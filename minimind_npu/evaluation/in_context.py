"""Tasks in context: DCLM's bundle, choices of the public sets, and the texts that are compared.

A bundle is a folder with core.yaml (icl_tasks: label, dataset_uri, num_fewshot, icl_task_type,
continuation_delimiter), eval_data/ and eval_meta_data.csv (Eval Task, Random baseline in per cent).
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import yaml
from evaluation import tasks

from common import cli

FIELDS = {  # of a row, by the kind of task
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}
ORDER_SEED = 1337  # of the questions, where not all are asked
EXAMPLES_SEED = 1234  # plus the number of the question
DELIMITER_ZH = "\n答案："


@dataclass(frozen=True)
class InContext:
    """A task: shots examples before each question, baseline: the accuracy of guessing."""

    label: str
    kind: str
    rows: list[dict]
    shots: int
    delimiter: str
    baseline: float


# ---- the bundle ----------------------------------------------------------------------------------


def read_bundle(folder: Path, num_rows: int | None) -> list[InContext]:
    """SystemExit with file and place for what is not as DCLM has it."""
    try:
        listed = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        baselines = read_baselines(folder / "eval_meta_data.csv")
    except OSError as error:
        raise SystemExit(f"--bundle {folder}: {error.filename} is not there") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        words = str(error).replace("\n", " ")
        raise SystemExit(f"--bundle {folder}: core.yaml has no icl_tasks ({words})") from None
    return [read_task(folder, entry, baselines, num_rows) for entry in listed]


def read_baselines(file: Path) -> dict[str, float]:
    """Task -> accuracy of guessing, 0 to 1; the file has per cent."""
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = {}
    for number, row in enumerate(rows, 2):
        try:
            found[row["Eval Task"]] = float(row["Random baseline"]) / 100
        except (KeyError, TypeError, ValueError):
            raise SystemExit(f"{file}:{number}: no Eval Task with a Random baseline") from None
    return found


def read_task(
    folder: Path, entry: dict, baselines: dict[str, float], num_rows: int | None
) -> InContext:
    try:
        label = entry["label"]
        kind = entry["icl_task_type"]
        file = folder / "eval_data" / entry["dataset_uri"]
        shots = entry["num_fewshot"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise SystemExit(f"{folder}/core.yaml: an entry without {error}") from None
    if kind not in FIELDS:
        raise SystemExit(f"{folder}/core.yaml: {label}: {kind}: {', '.join(FIELDS)}")
    if label not in baselines:
        raise SystemExit(f"{folder}/eval_meta_data.csv: no line for {label}")
    rows = read_rows(file, kind)
    random.Random(ORDER_SEED).shuffle(rows)
    rows = rows[:num_rows]
    delimiter = entry.get("continuation_delimiter", " ")
    return InContext(label, kind, rows, enough(label, rows, shots), delimiter, baselines[label])


def read_rows(file: Path, kind: str) -> list[dict]:
    if not file.is_file():
        raise SystemExit(f"{file}: no such file; core.yaml names it")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [name for name in FIELDS[kind] if name not in row]
        except (ValueError, TypeError):
            raise SystemExit(f"{file}:{number}: no JSON object") from None
        if missing:
            raise SystemExit(f"{file}:{number}: a {kind} row without {', '.join(missing)}")
        if kind in OPTIONS and row["gold"] not in range(len(row[OPTIONS[kind]])):
            raise SystemExit(f"{file}:{number}: gold {row['gold']} is none of the options")
        rows.append(row)
    if not rows:
        raise SystemExit(f"{file}: empty")
    return rows


def enough(label: str, rows: list, shots: int) -> int:
    """Examples before a question: as many as asked for, or all other rows."""
    most = len(rows) - 1
    if shots > most:
        cli.say(f"{label}: {most} examples instead of {shots}, it has {len(rows)} rows")
    return min(shots, most)


def read_zh(word: str, num_rows: int | None, shots: int) -> InContext:
    """Choices of tasks.py as a task in context."""
    task = tasks.read(word, num_rows)
    if task.kind != "choice":
        raise SystemExit(f"--zh {word}: tasks with choices only")
    rows = []
    for one in task.questions:
        rows.append({"query": one.question, "choices": one.options, "gold": one.right})
    baseline = sum(1 / len(row["choices"]) for row in rows) / len(rows)
    shots = enough(task.name, rows, shots)
    return InContext(task.name, "multiple_choice", rows, shots, DELIMITER_ZH, baseline)


# ---- prompts -------------------------------------------------------------------------------------


def examples_for(task: InContext, number: int) -> list[dict]:
    others = [i for i in range(len(task.rows)) if i != number]
    drawn = random.Random(EXAMPLES_SEED + number).sample(others, task.shots)
    return [task.rows[i] for i in drawn]


def prompts_of(task: InContext, number: int) -> list[str]:
    """Texts to compare: one for each option; of language_modeling without and with the
    continuation."""
    row = task.rows[number]
    shown = "".join(f"{solved(task, one)}\n\n" for one in examples_for(task, number))
    if task.kind == "multiple_choice":
        return [f"{shown}{row['query']}{task.delimiter}{option}" for option in row["choices"]]
    if task.kind == "schema":
        ending = f"{task.delimiter}{row['continuation']}"
        return [f"{shown}{context}{ending}" for context in row["context_options"]]
    start = f"{shown}{row['context'].strip()}{task.delimiter}"
    return [start.strip(), f"{start}{row['continuation']}"]


def solved(task: InContext, row: dict) -> str:
    """An example with its answer."""
    if task.kind == "multiple_choice":
        return f"{row['query']}{task.delimiter}{row['choices'][row['gold']]}"
    if task.kind == "schema":
        context = row["context_options"][row["gold"]]
        return f"{context}{task.delimiter}{row['continuation']}"
    return f"{row['context'].strip()}{task.delimiter}{row['continuation']}"


def common_start(rows: list[list[int]]) -> int:
    """Tokens that all begin with alike."""
    count = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def rows_to_score(task: InContext, number: int, encode, window: int) -> list[tuple] | None:
    """(token ids, the first that counts) of each text to compare, cut at its beginning to the
    window; None where what counts does not fit."""
    texts = [encode(text) for text in prompts_of(task, number)]
    if task.kind == "language_modeling":
        without, whole = texts
        starts = [min(common_start([without, whole]), len(whole) - 1)]
        texts = [whole]
    elif task.kind == "multiple_choice":
        shortest = min(map(len, texts))
        starts = [min(common_start(texts), shortest - 1)] * len(texts)
    else:
        same_end = common_start([text[::-1] for text in texts])
        starts = [len(text) - same_end for text in texts]
    rows = []
    for text, start in zip(texts, starts, strict=True):
        cut = max(0, len(text) - window)
        if start - cut < 1:
            return None
        rows.append((text[cut:], start - cut))
    return rows
