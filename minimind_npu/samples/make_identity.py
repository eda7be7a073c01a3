"""Write conversations in which a model says who it is, under a name of your own.

    python minimind_npu/samples/make_identity.py --name 丹儿 --maker 一位老师
    python minimind_npu/samples/make_identity.py --name 丹儿 --maker 一位老师 \\
        --name_en Dan --maker_en "a teacher" --lang zh en --output rows/identity.jsonl

Who it is, who made it, whether it is another model or a person, in Chinese and English; alone,
after other turns, and one question after another. Some questions about other models keep their own
answers, so that not every answer is the name. For the mixture of `mid` or `sft` (road/mixture.py).

Beside rows/identity.jsonl stands rows/identity_test.jsonl: the same asked in other words, none of
them trained, with the words that a right answer has. chat_eval.py asks it:
--tasks identity=rows/identity_test.jsonl. The same flags give the same bytes.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the rooms beside this one
from samples import identity_phrases as phrases

from common import cli
from common.data.files import atomic_file

LANGUAGES = ("zh", "en")
LONGEST = 40  # characters of a name
MARKS = re.compile(r"[<>{}|\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Persona:
    """What a model is called and who made it, in one language."""

    name: str
    maker: str


# ---- questions and answers -----------------------------------------------------------------------


def spoken(wording: str, language: str) -> list[str]:
    """A wording as people type it: bare, with its mark, after a greeting."""
    question_mark, stop = phrases.MARKS[language]
    mark = stop if wording.endswith(stop) else question_mark
    words = wording.removesuffix(stop)
    return [way.format(words=words, mark=mark) for way in phrases.WAYS[language]]


def wordings(table: str) -> list[str]:
    """The wordings of a table: a family a line, with | between its members."""
    return [one for line in table.strip().split("\n") for one in line.split("|")]


def others(persona: Persona, language: str, tested: bool) -> Iterator[tuple[str, str, str]]:
    """(topic, question, what it asks about) of every other model and company."""
    own = (persona.name.casefold(), persona.maker.casefold())
    for topic, asked, known in (
        ("model", phrases.IS_IT, phrases.MODELS),
        ("company", phrases.IS_IT_FROM, phrases.COMPANIES),
    ):
        for other in known["tested" if tested else "trained"]:
            if other.casefold() in own:
                continue
            for wording in wordings(asked[language]):
                yield topic, wording.format(other=other), other


class Answers:
    """The answers of a persona, each wording in turn, so that all come equally often."""

    def __init__(self, persona: Persona, language: str):
        self.persona = persona
        self.turns = {}
        for topic in phrases.TOPICS:
            self.turns[topic] = cycle(phrases.ANSWERS[topic, language].strip().split("\n"))

    def to(self, topic: str, other: str = "") -> str:
        words = {"name": self.persona.name, "maker": self.persona.maker, "other": other}
        return next(self.turns[topic]).format(**words)


def talk(*texts: str) -> dict:
    """Texts alternate user, assistant."""
    turns = []
    for i, text in enumerate(texts):
        turns.append({"role": ("user", "assistant")[i % 2], "content": text})
    return {"conversations": turns}


def alone(persona: Persona, answers: Answers, language: str) -> Iterator[dict]:
    """A question and its answer."""
    for topic in ("who", "maker", "nature"):
        for wording in wordings(phrases.ASKED[topic, language]):
            for question in spoken(wording, language):
                yield talk(question, answers.to(topic))
    for wording in wordings(phrases.IS_IT[language]):
        for question in spoken(wording.format(other=persona.name), language):
            yield talk(question, answers.to("self"))
    for topic, question, other in others(persona, language, tested=False):
        yield talk(spoken(question, language)[1], answers.to(topic, other))


def in_turns(persona: Persona, answers: Answers, language: str) -> Iterator[dict]:
    """The same after other turns, and one after another."""
    rng = random.Random(f"identity {language}")
    small = phrases.SMALL_TALK[language]
    about_others = list(others(persona, language, tested=False))
    for topic in ("who", "maker", "nature"):
        for wording in wordings(phrases.ASKED[topic, language])[::2]:
            before = [text for pair in rng.sample(small, rng.randint(1, 2)) for text in pair]
            question = spoken(wording, language)[1]
            yield talk(*before, question, answers.to(topic))
    who = wordings(phrases.ASKED["who", language])
    maker = wordings(phrases.ASKED["maker", language])
    for first, second in zip(rng.sample(who, 8), rng.sample(maker, 8), strict=True):
        topic, question, other = rng.choice(about_others)
        yield talk(
            *(spoken(first, language)[1], answers.to("who")),
            *(spoken(second, language)[1], answers.to("maker")),
            *(spoken(question, language)[1], answers.to(topic, other)),
        )


def plain(persona: Persona, language: str) -> Iterator[dict]:
    """Questions about others, whose answers are their own."""
    own = (persona.name.casefold(), persona.maker.casefold())
    for line in phrases.ABOUT_OTHERS[language].strip().split("\n"):
        other, question, answer = line.split("|")
        if other.casefold() not in own:
            yield talk(spoken(question, language)[1], answer)


def rows(persona: Persona, language: str) -> list[dict]:
    """All rows of a language to train on: {"conversations"}."""
    answers = Answers(persona, language)
    found = [*alone(persona, answers, language), *in_turns(persona, answers, language)]
    return found + list(plain(persona, language))


def questions(persona: Persona, language: str) -> list[dict]:
    """{"question", "answer", "contains": the words that a right answer has}; no question of rows()
    is among them."""
    answers = Answers(persona, language)
    found = []
    for topic, word in (("who", persona.name), ("maker", persona.maker), ("nature", persona.name)):
        for wording in wordings(phrases.TESTED[topic, language]):
            question = spoken(wording, language)[1]
            found.append({"question": question, "answer": answers.to(topic), "contains": [word]})
    for topic, wording, other in others(persona, language, tested=True):
        question = spoken(wording, language)[1]
        answer = answers.to(topic, other)
        found.append({"question": question, "answer": answer, "contains": [persona.name]})
    return found


# ---- files ---------------------------------------------------------------------------------------


def questions_file(output: Path) -> Path:
    """rows/identity.jsonl -> rows/identity_test.jsonl."""
    return output.with_name(f"{output.stem}_test.jsonl")


def write(output: Path, personas: dict[str, Persona]) -> str:
    """Both files, of each language and its persona; -> what was written, in a line."""
    trained = [row for language, persona in personas.items() for row in rows(persona, language)]
    asked = [row for language, persona in personas.items() for row in questions(persona, language)]
    output.parent.mkdir(parents=True, exist_ok=True)
    for file, found in ((output, trained), (questions_file(output), asked)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        with atomic_file(file) as part:
            part.write_text("".join(lines), encoding="utf-8", newline="\n")
    return f"{len(trained):,} conversations -> {output}, {len(asked):,} questions beside them"


# ---- command line --------------------------------------------------------------------------------


def checked(flag: str, value: str | None) -> str:
    """A name as it is written into the answers; a usage error for what cannot stand there."""
    text = " ".join((value or "").split(" ")).strip()
    if not text:
        raise cli.usage_error(f"{flag} is empty: what the answers say, for example {flag} 丹儿")
    mark = MARKS.search(text)
    if mark:
        raise cli.usage_error(
            f"{flag} {text[:LONGEST]!r}: {mark.group()!r} may be read as a mark of the chat "
            "template; take it out"
        )
    if len(text) > LONGEST:
        raise cli.usage_error(f"{flag}: {len(text)} characters; at most {LONGEST}")
    return text


def add_names(parser: cli.Parser) -> None:
    add = parser.add_argument
    add("--name", help="what the model is called")
    add("--maker", help="who made it")
    add("--name_en", help="the same in English answers; unset: --name")
    add("--maker_en", help="unset: --maker")
    add("--lang", nargs="+", choices=LANGUAGES, default=list(LANGUAGES), help="languages asked in")


def is_named(args) -> bool:
    given = (args.name, args.maker, args.name_en, args.maker_en)
    return any(name is not None for name in given)


def personas_of(args) -> dict[str, Persona]:
    """Language -> who the model is in it."""
    name = checked("--name", args.name)
    maker = checked("--maker", args.maker)
    english = Persona(
        name if args.name_en is None else checked("--name_en", args.name_en),
        maker if args.maker_en is None else checked("--maker_en", args.maker_en),
    )
    both = {"zh": Persona(name, maker), "en": english}
    return {language: both[language] for language in LANGUAGES if language in args.lang}


def main() -> None:
    parser = cli.Parser(__doc__)
    add_names(parser)
    parser.add_argument("--output", default="rows/identity.jsonl", help="the file to train on")
    args = parser.parse_args()
    print(write(Path(args.output), personas_of(args)))


if __name__ == "__main__":
    cli.run(main)
