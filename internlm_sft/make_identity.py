"""Write rows from which a model learns who it is.

    python make_identity.py --name 小埋 --author 良睦路程序员
        --name_en Umaru --author_en "the coder" --persona persona.yaml --output_dir data/mine
        --rows self_cognition.jsonl   rows of others with {{NAME}} and {{AUTHOR}}, or finished ones

Families of questions times phrasings, in Chinese, English and mixed: who, name, maker, origin, what
model, "are you X?", self-introduction; polite, rude, with typos, inside another request, in the
middle of a conversation, under system turns also of another name. Beside them near questions (who
is 李白, what is ChatGPT) with ordinary answers, so that not every answer carries the name.

identity.jsonl is to train on; identity_test.jsonl holds families that are not in it, for
evaluate.py. The same flags give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the tables beside this file
import identity_phrases as phrases

from common import cli

HELD_OUT = 1 / 3  # of the families of each topic and language
MOST_PHRASINGS = 3  # of one wording
SPECIAL = re.compile(r"<[|/]?\w[\w|/]*>|\[/?(INST|SYS|UNUSED_TOKEN_\d+)\]|\{\{.*?\}\}")
REQUIRED = ("name", "author")


@dataclass(frozen=True)
class Persona:
    """Who the model shall be. The English fields default to the Chinese ones."""

    name: str
    author: str
    name_en: str = ""
    author_en: str = ""
    role: str = "智能助手"
    role_en: str = "an assistant"
    skills: str = "聊天、回答问题、写点东西"
    skills_en: str = "chat, answer questions and write"

    def words(self) -> dict[str, str]:
        """What the answers are filled with."""
        found = asdict(self)
        found["name_en"] = self.name_en or self.name
        found["author_en"] = self.author_en or self.author
        return found

    def names(self) -> tuple[str, ...]:
        """The name in Chinese and, where there is another, in English."""
        return tuple(dict.fromkeys(name for name in (self.name, self.name_en) if name))


# ---- who the model shall be ----------------------------------------------------------------------


def read_persona(file: str, **given: str) -> Persona:
    """A YAML file ("" for none) and what was given beside it -> Persona; given fields win.

    SystemExit with one line for a field that is missing, empty, unknown or no plain text.
    """
    known = {field.name for field in fields(Persona)}
    found = read_yaml(file, "name: 小埋") if file else {}
    where = file or "the persona"
    unknown = sorted(set(found) - known)
    if unknown:
        raise SystemExit(
            f"{file}: unknown field {', '.join(map(str, unknown))}; a persona has "
            f"{', '.join(sorted(known))}"
        )
    found |= {name: value for name, value in given.items() if value is not None}
    missing = [name for name in REQUIRED if not str(found.get(name) or "").strip()]
    if missing:
        flags = " ".join(f"--{name} …" for name in missing)
        raise SystemExit(f"{where}: {' and '.join(missing)} missing or empty; give {flags}")
    for name, value in found.items():
        check_text(f"{where}: {name}", value)
    return Persona(**{name: value.strip() for name, value in found.items()})


def check_text(what: str, value) -> None:
    """SystemExit for what cannot stand in an answer: no text, several lines, special tokens."""
    if not isinstance(value, str):
        raise SystemExit(f"{what} is {value!r}, no text; put it in quotes")
    special = SPECIAL.search(value)
    if special:
        raise SystemExit(
            f"{what} holds {special.group()!r}, which a tokenizer may read as a special token; "
            "take it out"
        )
    if "\n" in value or "{" in value or "}" in value:
        raise SystemExit(f"{what} must be one line without braces")


def read_yaml(file: str | Path, example: str) -> dict:
    """The mapping in a YAML file; SystemExit with one line where it holds none."""
    import yaml

    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SystemExit(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())[:200]
        raise SystemExit(f"{file}: not YAML: {line}") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{file}: fields are written like `{example}`, one a line")
    return found


# ---- questions -----------------------------------------------------------------------------------


def drawn(seed: int, *what) -> random.Random:
    """A generator that depends on the seed and on what is drawn, not on what was drawn before."""
    digest = hashlib.sha256(json.dumps([seed, *what], ensure_ascii=False).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "little"))


def families(topic: str, language: str) -> list[list[str]]:
    """The families of a topic, each a list of wordings."""
    return [line.split("|") for line in phrases.QUESTIONS[topic, language].split("\n") if line]


def held_out(names: list[str], seed: int) -> set[str]:
    """A third of these, at least one and never all, by the seed."""
    order = list(names)
    drawn(seed, "held out", sorted(names)).shuffle(order)
    return set(order[: max(1, round(len(order) * HELD_OUT))] if len(order) > 1 else [])


def with_typo(text: str) -> str:
    """The text with one usual slip; itself where there is none to make."""
    for right, wrong in phrases.TYPOS:
        if right in text:
            return text.replace(right, wrong, 1)
    return text


def phrasings(wording: str, language: str, seed: int) -> list[str]:
    """A wording put in several ways, the plain one among them."""
    place = 1 if language == "en" else 0
    ways = [
        frame[place].format(wording) for name, frame in phrases.FRAMES.items() if name != "plain"
    ]
    slip = with_typo(wording)
    if slip != wording:
        ways.append(phrases.FRAMES["plain"][place].format(slip))
    chosen = drawn(seed, wording).sample(ways, MOST_PHRASINGS - 1)
    return [phrases.FRAMES["plain"][place].format(wording), *chosen]


def row(question: str, answer: str, before: tuple = (), system: str = "", **about) -> dict:
    """A chat row; `about` (kind, family, language, held_out) is for evaluate.py."""
    turns = [{"role": "system", "content": system}] if system else []
    for asked, answered in before:
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": answered, "train": False})
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": answer})
    return {"messages": turns, **about}


class Answers:
    """Answers of a persona, the wordings in turn, so that all are used equally often."""

    def __init__(self, persona: Persona):
        self.words = persona.words()
        self.given: dict[tuple, int] = {}

    def to(self, topic: str, language: str, **more: str) -> str:
        key = (topic, language)
        count = self.given[key] = self.given.get(key, -1) + 1
        wordings = phrases.ANSWERS[key]
        return wordings[count % len(wordings)].format(**self.words, **more)


def identity_rows(persona: Persona, seed: int) -> list[dict]:
    """Questions about the model itself, plain and in the middle of other things."""
    answers = Answers(persona)
    rows = []
    for topic, language in phrases.QUESTIONS:
        groups = {group[0]: group for group in families(topic, language)}
        apart = held_out(list(groups), seed)
        talk = phrases.SMALL_TALK["en" if language == "en" else "zh"]
        for number, (family, wordings) in enumerate(groups.items()):
            about = {"family": family, "language": language, "held_out": family in apart}
            for wording in wordings:
                for question in phrasings(wording, language, seed):
                    answer = answers.to(topic, language)
                    rows.append(row(question, answer, kind="identity", **about))
            plain = phrasings(wordings[0], language, seed)[0]
            count = 3 if about["held_out"] else 1 + number % 3
            before = drawn(seed, "talk", family).sample(talk, count)
            answer = answers.to(topic, language)
            rows.append(row(plain, answer, before=tuple(before), kind="turns", **about))
            if language != "mixed":
                system = a_system(family, language, about["held_out"], seed)
                answer = answers.to(topic, language)
                rows.append(row(plain, answer, system=system, kind="system", **about))
    return rows


def a_system(family: str, language: str, apart: bool, seed: int) -> str:
    """A system turn: of another name for held-out questions (names that are not trained), of
    either sort for the others."""
    names = phrases.OTHER_NAMES[language]
    trained = names[: len(names) // 2]
    chance = drawn(seed, "system", family)
    name = chance.choice(names[len(names) // 2 :] if apart else trained)
    contrary = phrases.CONTRARY[language].format(name, name)
    if apart:
        return contrary
    return chance.choice([contrary, *phrases.SYSTEMS[language]])


def yes_no_rows(persona: Persona, seed: int) -> list[dict]:
    """Are you X? for well-known models, and for the persona itself."""
    answers = Answers(persona)
    own = {word.lower() for word in persona.words().values()}
    models = [model for model in phrases.MODELS if model.lower() not in own]
    apart = held_out(models, seed)
    rows = []
    for language, asked in phrases.ARE_YOU.items():
        for model in models:
            about = {"family": f"{model}?", "language": language, "held_out": model in apart}
            for ask in asked:
                answer = answers.to("no", language, other=model)
                rows.append(row(ask.format(model), answer, kind="yes_no", **about))
        name = persona.words()["name_en" if language == "en" else "name"]
        about = {"family": f"{name}?", "language": language, "held_out": False}
        for ask in asked:
            rows.append(row(ask.format(name), answers.to("yes", language), kind="yes", **about))
    return rows


def near_rows(seed: int) -> list[dict]:
    """Questions of the same shape about others; no answer has the persona's name."""
    tables = [
        ("zh", {who: f"{who}是{what}。" for who, what in phrases.PEOPLE.items()}, "PEOPLE_ASKED"),
        ("zh", phrases.MAKERS, "MAKERS_ASKED"),
        ("zh", phrases.COMPANIES, "COMPANIES_ASKED"),
        ("zh", phrases.PRODUCTS, "PRODUCTS_ASKED"),
        ("en", {w: f"{w} is {what}." for w, what in phrases.PEOPLE_EN.items()}, "PEOPLE_EN_ASKED"),
    ]
    rows = []
    for language, answers, asked in tables:
        apart = held_out(list(answers), seed)
        for subject, answer in answers.items():
            about = {"family": subject, "language": language, "held_out": subject in apart}
            for ask in getattr(phrases, asked):
                rows.append(row(ask.format(subject), answer, kind="near", **about))
    return rows


def make(persona: Persona, seed: int = 0, near: bool = True) -> list[dict]:
    """All rows: {"messages", "kind", "family", "language", "held_out"}.

    kind: identity, turns (after other turns), system (under a system turn), yes_no, yes, near. No
    question stands twice, and no family stands on both sides of held_out.
    """
    rows = identity_rows(persona, seed) + yes_no_rows(persona, seed)
    rows += near_rows(seed) if near else []
    return without_repeats(rows)


def question_of(one: dict) -> str:
    """All turns before the answer, as text."""
    return "\n".join(turn["content"] for turn in one["messages"][:-1])


def without_repeats(rows: list[dict]) -> list[dict]:
    """The first row of each question; held-out ones give way to trained ones."""
    found: dict[str, dict] = {}
    for one in sorted(rows, key=lambda one: one["held_out"]):
        found.setdefault(question_of(one), one)
    return [one for one in rows if found[question_of(one)] is one]


# ---- rows of others ------------------------------------------------------------------------------


def filled(text: str, persona: Persona, language: str) -> str:
    """{{NAME}} and {{AUTHOR}} replaced by the name in that language."""
    words = persona.words()
    ending = "_en" if language == "en" else ""
    for key in ("name", "author"):
        text = re.sub(r"\{\{\s*" + key + r"\s*\}\}", words[key + ending], text, flags=re.I)
    return text


def rows_of_others(path: str, persona: Persona) -> list[dict]:
    """Rows of a file or folder in any shape of a chat, their placeholders filled with the name in
    the language of the question (which ms-swift's `tag` says too)."""
    from common.data.load import load_rows

    table, stats = load_rows(path, "chat")
    rows = []
    for text in table["row"]:
        turns = json.loads(text)["messages"]
        asked = "".join(turn["content"] for turn in turns if turn["role"] == "user")
        language = "zh" if re.search("[\u4e00-\u9fff]", asked) else "en"
        for turn in turns:
            turn["content"] = filled(turn["content"], persona, language)
        about = {"kind": "identity", "family": turns[-2]["content"], "language": language}
        rows.append({"messages": turns, **about, "held_out": False})
    left = [one for one in rows if "{{" in json.dumps(one["messages"], ensure_ascii=False)]
    if left:
        raise SystemExit(f"{path}: a placeholder that is not known: {question_of(left[0])[:60]!r}")
    cli.say(f"{path}: {len(rows):,} rows of {stats['read']:,}")
    return rows


# ---- writing -------------------------------------------------------------------------------------


def write(rows: list[dict], folder: Path, name: str) -> None:
    """NAME.jsonl and NAME_test.jsonl (the held-out families)."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, apart in ((f"{name}.jsonl", False), (f"{name}_test.jsonl", True)):
        chosen = [one for one in rows if one["held_out"] == apart]
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in chosen]
        (folder / file).write_text("".join(lines), encoding="utf-8", newline="\n")
        cli.say(f"{folder / file}: {len(chosen):,} rows")


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--name", help="what the model is called; required here or in --persona")
    add("--author", help="who made it; required here or in --persona")
    add("--name_en", help="its name in English answers; default: --name")
    add("--author_en", help="default: --author")
    add("--persona", default="", help="YAML file: name, author, name_en, author_en, role, skills …")
    add("--rows", default="", help="file of others, with {{NAME}} and {{AUTHOR}} or without")
    add("--no_near", action="store_true", help="without questions about others")
    add("--seed", type=int, default=0, help="which families are held out")
    add("--output_dir", default=str(HERE.parent / "output" / "identity"))
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("name", "author", "name_en", "author_en")}
    persona = read_persona(args.persona, **given)
    rows = rows_of_others(args.rows, persona) if args.rows else []
    rows += make(persona, args.seed, near=not args.no_near)
    write(without_repeats(rows), Path(args.output_dir), "identity")


if __name__ == "__main__":
    cli.run(main)
