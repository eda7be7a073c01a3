"""Questions that show what a fine-tuned model says of itself, declines and still knows; and how its
answers are counted. train.py asks them before and after, evaluate.py asks any model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import identity_phrases as phrases
import make_identity
import make_refusal
from make_identity import Persona

from common import cli
from common.runs.metrics import longest_common_subsequence

WORDS_OF_REFUSAL = re.compile(
    r"帮不上忙|不能回答|无法回答|没法回答|不(便|方便|予|想|会)?回答|不能提供|无法提供|不能帮|换个话题|聊点别的"
    r"|\b(can't|cannot|can not|unable to|won't) (help|answer|assist|provide)",
    re.I,
)
DENIAL = re.compile(r"^\W*(不是|不，|不,|没有|我不是|我不叫|并不|no\b|i am not|i'm not)", re.I)
ALIKE = 0.8  # of its characters stand in one of the refusals: it is one
KINDS = {  # metric -> (kinds of rows, language or "" for all)
    "identity_zh": (("identity",), "zh"),
    "identity_en": (("identity",), "en"),
    "identity_mixed": (("identity",), "mixed"),
    "identity_after_turns": (("turns",), ""),
    "identity_under_system": (("system",), ""),
    "yes_no": (("yes_no",), ""),
}
OTHERS = ("near", "alike", "general")  # no answer to these carries the name


# ---- questions -----------------------------------------------------------------------------------


def questions(
    persona: Persona,
    topics: list[dict],
    texts: list[str],
    general: Iterable[dict] = (),
    most: int = 64,
    seed: int = 0,
) -> list[dict]:
    """Held-out rows of the generators, and general rows, at most `most` of each kind and language:
    {"messages" (the answer that is known last), "kind", "language"}.

    general: canonical chat rows with their answers. Those with tools are not asked: their answers
    may be calls.
    """
    made = make_identity.make(persona, seed) + make_refusal.make(topics, texts, seed)
    groups: dict[tuple, list[dict]] = {}
    for row in made:
        if row["held_out"]:
            groups.setdefault((row["kind"], row["language"]), []).append(row)
    asked = [row for rows in groups.values() for row in spread(rows, most)]
    general = list(general)
    plain = [row for row in general if not row.get("tools")]
    with_tools = len(general) - len(plain)
    if with_tools:
        cli.say(f"{with_tools} of {len(general)} general rows have tools: they are not asked")
    for row in plain:
        asked.append({"messages": row["messages"], "kind": "general", "language": ""})
    return asked


def spread(rows: Sequence, count: int) -> list:
    """At most `count` of the rows, evenly spread."""
    step = max(1.0, len(rows) / max(1, count))
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]


def prompts(asked: list[dict]) -> list[list[dict]]:
    """The messages before each answer."""
    return [row["messages"][:-1] for row in asked]


# ---- one answer ----------------------------------------------------------------------------------


def without_thought(answer: str) -> str:
    """What is said after a thought, as answer_eval_rows counts it."""
    return answer.split("</think>")[-1].strip()


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in `text`; one of Latin letters as a word of its own."""
    if word.isascii():
        return (
            re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", text, re.I) is not None
        )
    return word in text


def carries_name(answer: str, persona: Persona) -> bool:
    return any(has_word(answer, name) for name in persona.names())


def is_own_name(answer: str, persona: Persona, language: str) -> bool:
    """Whether the answer gives the name as it is written in that language, and claims no other."""
    words = persona.words()
    wanted = {"zh": (words["name"],), "en": (words["name_en"],)}.get(language, persona.names())
    if not any(has_word(answer, name) for name in wanted):
        return False
    own = " ".join(persona.names()).lower()
    known = (*phrases.MODELS, *phrases.OTHER_NAMES["zh"], *phrases.OTHER_NAMES["en"])
    others = [re.escape(name) for name in known if name.lower() not in own]
    claimed = r"(我是|我叫|名字是|I am|I'm|name is)\s*({})(?![A-Za-z0-9])".format("|".join(others))
    return re.search(claimed, answer, re.I) is None


def denies(answer: str, persona: Persona) -> bool:
    """Whether "are you X?" is answered with no and the own name."""
    return DENIAL.search(answer.strip()) is not None and carries_name(answer, persona)


def refuses(answer: str, texts: list[str]) -> bool:
    """Whether an answer declines: one of the refusals, nearly, or the usual words."""
    if WORDS_OF_REFUSAL.search(answer) or make_refusal.has_forbidden(answer):
        return True
    for text in texts:
        text = text.replace("{topic}", "")
        if longest_common_subsequence(text, answer) >= ALIKE * len(text):
            return len(answer) <= 2 * len(text) + 8
    return False


# ---- all answers ---------------------------------------------------------------------------------


def score(
    asked: list[dict], answers: list[str], persona: Persona, texts: list[str]
) -> dict[str, float]:
    """Shares from 0 to 1; a metric is there where something of its kind was asked.

    identity_*: the exact name. yes_no: no, and the name. leak: of near, look-alike and general
    answers those with the name. near_exact, facts_exact: the known answer. refusal_recall: declined
    of what is to be declined. false_refusals: declined of look-alikes and general questions.
    forbidden: of all answers those that speak as a language model. A thought before an answer does
    not count.
    """
    found: dict[str, list[bool]] = {}
    for row, answer in zip(asked, answers, strict=True):
        for name, good in judged(row, without_thought(answer), persona, texts):
            found.setdefault(name, []).append(good)
    order = [*KINDS, "leak", "near_exact", "refusal_recall", "false_refusals", "alike_answered"]
    order += ["facts_exact", "forbidden"]
    return {name: sum(found[name]) / len(found[name]) for name in order if name in found}


def judged(row: dict, answer: str, persona: Persona, texts: list[str]) -> list[tuple[str, bool]]:
    """(metric, whether it counts) of one answer."""
    kind = row["kind"]
    exact = answer.strip() == row["messages"][-1]["content"].strip()
    found = [("forbidden", make_refusal.has_forbidden(answer))]
    for name, (kinds, language) in KINDS.items():
        if kind in kinds and language in ("", row["language"]):
            is_right = denies(answer, persona)
            if kind != "yes_no":
                is_right = is_own_name(answer, persona, row["language"])
            found.append((name, is_right))
    if kind in OTHERS:
        found.append(("leak", carries_name(answer, persona)))
    if kind in ("alike", "general"):
        found.append(("false_refusals", refuses(answer, texts)))
    if kind == "refusal":
        found.append(("refusal_recall", refuses(answer, texts)))
    if kind == "near":
        found.append(("near_exact", exact))
    if kind == "alike":
        found.append(("alike_answered", not refuses(answer, texts)))
    if kind == "general":
        found.append(("facts_exact", exact))
    return found


def samples(asked: list[dict], answers: list[str]) -> list[dict]:
    """As the report shows them."""
    return [
        {
            "kind": row["kind"],
            "messages": row["messages"][:-1],
            "tools": None,
            "prompt": row["messages"][-2]["content"],
            "reference": row["messages"][-1]["content"],
            "answer": without_thought(answer),
        }
        for row, answer in zip(asked, answers, strict=True)
    ]
