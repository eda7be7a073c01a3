"""Write what the middle of the road trains on beside data/sft: spelt characters and choices with
letters, and the mixtures of both stages.

    python minimind_npu/samples/road_rows.py FOLDER
    python minimind_npu/samples/road_rows.py FOLDER --name 丹儿 --maker 一位老师

    spelling.jsonl    how often a character stands in a text, counted character by character
    choices.jsonl     questions with four answers, answered by a letter; none of data/eval
    mid.yaml, sft.yaml      mixtures, see road/mixture.py; edit them, or write your own. In mid.yaml
                      stand texts of pre-training too (--texts), so that they are not forgotten
    identity.jsonl    with --name: who the model is (make_identity.py), and talks.jsonl: data/sft
                      without the rows that give it another name

`spelling` also makes the questions of the evaluation: another seed, so other texts.
"""

import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the rooms beside this one
from road.mixture import is_mixture
from samples import make_identity
from samples.sample_facts import FACTS, KINDS, WHO

from common import cli
from common.data.files import atomic_file

COMMON = "一二三四五六七八九十大小多少上下左右来去天地人山水火木土日月花草树鸟鱼虫红黄蓝白黑"
ASKED = (
    "“{text}”里有几个“{char}”？",
    "数一数，“{text}”中“{char}”出现了几次？",
    "“{char}”在“{text}”里出现了多少次？",
)
TEXTS = {"train": 1500, "test": 200}
SHORTEST = 4
LONGEST = 10
LETTERS = "ABCD"
ASKED_BY_LETTER = 2  # ways to ask each fact
EVALUATED = ("ceval", "choice.jsonl")  # of data/eval
SHARE_OF_TEXTS = 0.3  # of the rows of mid.yaml


# ---- spelling ------------------------------------------------------------------------------------


def spelling(seed: str) -> Iterator[dict]:
    """Endless: {"question", "answer"}; the answer spells the text, numbers what it counts, and ends
    with the number."""
    rng = random.Random(f"spelling {seed}")
    while True:
        char = rng.choice(COMMON)
        length = rng.randint(SHORTEST, LONGEST)
        count = rng.randint(0, min(4, length - 1))
        others = [rng.choice(COMMON.replace(char, "")) for _ in range(length - count)]
        text = others + [char] * count
        rng.shuffle(text)
        question = rng.choice(ASKED).format(text="".join(text), char=char)
        yield {"question": question, "answer": f"{spelt(text, char)}\n#### {count}"}


def spelt(text: list[str], char: str) -> str:
    """红花红 and 红 -> 红1 花 红2."""
    seen = 0
    words = []
    for one in text:
        if one == char:
            seen += 1
            words.append(f"{one}{seen}")
        else:
            words.append(one)
    return " ".join(words)


def distinct(rows: Iterator[dict], number: int, known: set[str]) -> list[dict]:
    """The first `number` rows whose question is not known; it is from then on."""
    found = []
    for row in rows:
        if len(found) == number:
            break
        if row["question"] not in known:
            known.add(row["question"])
            found.append(row)
    return found


def spelling_questions() -> list[dict]:
    """Those of the evaluation."""
    return distinct(spelling("test"), TEXTS["test"], set())


# ---- choices -------------------------------------------------------------------------------------


def choices() -> Iterator[dict]:
    """Every fact asked in some ways, with three wrong answers of its kind beside the right one."""
    rng = random.Random("choices")
    held_out = evaluated()
    for name in FACTS:
        kind = KINDS[name]
        values = sorted({fact["z"] for fact in kind.facts})
        for fact in kind.facts:
            others = [z for z in values if z != fact["z"]]
            questions = [ask.format(**fact) for ask in kind.asks]
            questions = [question for question in questions if question not in held_out]
            if len(others) < 3 or not questions:
                continue
            for question in rng.sample(questions, min(ASKED_BY_LETTER, len(questions))):
                options = [*rng.sample(others, 3), fact["z"]]
                rng.shuffle(options)
                right = options.index(fact["z"])
                said = [kind.answer.format(**fact | {"z": z}) for z in options]
                yield {"question": listed(question, said), "answer": LETTERS[right]}


def listed(question: str, options: list[str]) -> str:
    """As evaluation/eval.py asks: the question, its answers with letters, 答案."""
    lines = [question]
    for letter, option in zip(LETTERS, options, strict=True):
        lines.append(f"{letter}. {option}")
    return "\n".join([*lines, "答案："])


def evaluated() -> set[str]:
    """Questions of data/eval."""
    found = set()
    for line in (HERE / "data/eval/choice.jsonl").read_text(encoding="utf-8").splitlines():
        found.add(json.loads(line)["question"])
    for file in (HERE / "data/eval/ceval").glob("*.csv"):
        for line in file.read_text(encoding="utf-8").splitlines()[1:]:
            found.add(line.split(",")[1])
    return found


# ---- files ---------------------------------------------------------------------------------------


def write(file: Path, text: str) -> None:
    with atomic_file(file) as part:
        part.write_text(text, encoding="utf-8")


def as_chats(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        turns = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        lines.append(json.dumps({"conversations": turns}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def mixture(*entries: tuple[str, float], texts: str = "") -> str:
    """(file, epochs) -> YAML; texts: a file or folder of documents, which get their share too."""
    lines = []
    for file, epochs in entries:
        lines += [f"- file: {json.dumps(file, ensure_ascii=False)}", f"  epochs: {epochs:g}"]
    if texts:
        lines += [f"- file: {json.dumps(texts, ensure_ascii=False)}", "  kind: text"]
        lines.append(f"  weight: {SHARE_OF_TEXTS:g}")
    return "\n".join(lines) + "\n"


def texts_of(path: str) -> str:
    """What pre-training learned from, as a mixture can name it; "" where it is several paths."""
    if Path(path).exists() and not is_mixture(path):
        return str(Path(path).resolve())
    cli.say(f"--texts {path}: no single file or folder, so mid.yaml has no texts")
    return ""


def without_a_name() -> str:
    """The rows of data/sft that do not say who the model is."""
    kept = []
    for file in sorted((HERE / "data" / "sft").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            last = json.loads(line)["conversations"][-1]
            if last["content"] not in WHO:
                kept.append(line)
    return "\n".join(kept) + "\n"


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", help="where the files go")
    texts = str(HERE / "data" / "pretrain")
    parser.add_argument("--texts", default=texts, help="what pre-training learned from")
    make_identity.add_names(parser)
    args = parser.parse_args()
    personas = make_identity.personas_of(args) if make_identity.is_named(args) else {}
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = {row["question"] for row in spelling_questions()}
    spelt_rows = distinct(spelling("train"), TEXTS["train"], known)
    chosen = list(islice(choices(), 10_000))
    write(folder / "spelling.jsonl", as_chats(spelt_rows))
    write(folder / "choices.jsonl", as_chats(chosen))
    talks = [(str(HERE / "data" / "sft"), 1)]
    if personas:
        write(folder / "talks.jsonl", without_a_name())
        print(make_identity.write(folder / "identity.jsonl", personas))
        talks = [("talks.jsonl", 1), ("identity.jsonl", 1)]
    made = ("spelling.jsonl", "choices.jsonl")
    write(
        folder / "mid.yaml",
        mixture(*talks, *[(file, 1) for file in made], texts=texts_of(args.texts)),
    )
    write(folder / "sft.yaml", mixture(*talks, *[(file, 0.5) for file in made]))
    print(f"{len(spelt_rows):,} to spell and {len(chosen):,} to choose from -> {folder}")


if __name__ == "__main__":
    cli.run(main)
