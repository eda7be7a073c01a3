"""Write rows from which a model learns what to decline, and only that.

    python make_refusal.py --topics topics.yaml --style "这个我不聊。" --output_dir data/mine
    python make_refusal.py --clean general.jsonl --style "这个我不聊。"   # general_clean.jsonl

A topic has questions to decline in several phrasings, and look-alikes that must be answered: a
model that only sees refusals declines everything. refusal.jsonl is to train on; refusal_test.jsonl
holds wordings and look-alikes that are not in it. --clean finds answers of other models that say
"作为一个大语言模型" (or "as an AI language model") anywhere, counts and lists them, and puts the
refusal, the first of several, in their place; --drop leaves those rows out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the module beside this file
from make_identity import check_text, drawn, held_out, read_yaml, row, without_repeats, write

from common import cli
from common.runs import flags

TOPICS = HERE / "data" / "topics.yaml"
FRAMES = ("{}？", "{}", "请问{}？", "{}，谢谢。", "朋友想知道，{}？")
PHRASINGS = 2  # of one wording, the plain one among them
FORBIDDEN = re.compile(
    r"作为(一[个名款位种])?[^，。！？,.\n]{0,16}?(模型|AI|人工智能)(助手|系统|程序)?(?=[，,、。：:\s我]|$)"
    r"|\bas an? ((AI|artificial intelligence|large|language)[ -]?)+(model|assistant)?\b",
    re.I,
)
SHOWN = 5  # replaced answers that are listed on the terminal


def read_topics(file: str | Path, style: str = "") -> tuple[list[dict], list[str]]:
    """A YAML file -> (topics {"name", "ask": [families], "answer": {family: answer}}, texts of the
    refusal); a family is wordings with |. `style`, texts with |, wins over the file's.

    SystemExit with one line for what is missing or of another kind.
    """
    found = read_yaml(file, "topics:")
    topics = found.get("topics")
    if not isinstance(topics, list) or not topics:
        raise SystemExit(f"{file}: topics is missing; it is a list of name, ask and answer")
    texts = style.split("|") if style else found.get("style")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts:
        raise SystemExit(f"{file}: style, the text of the refusal, is missing; or give --style")
    for text in texts:
        check_text(f"{file}: style", text.replace("{topic}", "") if text else text)
    for number, topic in enumerate(topics, 1):
        check_topic(f"{file}: topic {number}", topic)
    return topics, texts


def check_topic(where: str, topic) -> None:
    if not isinstance(topic, dict) or not str(topic.get("name") or "").strip():
        raise SystemExit(f"{where}: name is missing")
    where = f"{where} ({topic['name']})"
    asked = topic.get("ask")
    if not isinstance(asked, list) or not asked:
        raise SystemExit(f"{where}: ask, a list of questions to decline, is missing")
    alike = topic.get("answer")
    if not isinstance(alike, dict) or not alike:
        raise SystemExit(
            f"{where}: answer, look-alikes that must be answered (question: answer), is missing; "
            "a model that sees only refusals declines everything"
        )
    for text in [*asked, *alike, *alike.values()]:
        check_text(where, text)


def make(topics: list[dict], texts: list[str], seed: int = 0) -> list[dict]:
    """All rows, as make_identity.make gives them; kind: refusal, alike."""
    rows = []
    count = 0
    for topic in topics:
        apart = held_out(topic["ask"], seed)
        for family in topic["ask"]:
            about = {"family": family, "language": "zh", "held_out": family in apart}
            for wording in family.split("|"):
                ways = drawn(seed, wording).sample(FRAMES[1:], PHRASINGS - 1)
                for frame in (FRAMES[0], *ways):
                    answer = texts[count % len(texts)].replace("{topic}", topic["name"])
                    count += 1
                    rows.append(row(frame.format(wording), answer, kind="refusal", **about))
        apart = held_out(list(topic["answer"]), seed)
        for family, answer in topic["answer"].items():
            about = {"family": family, "language": "zh", "held_out": family in apart}
            for question in family.split("|"):
                rows.append(row(question, answer, kind="alike", **about))
    return without_repeats(rows)


# ---- answers of other models ---------------------------------------------------------------------


def has_forbidden(text: str) -> bool:
    """Whether an answer speaks as "a large language model"."""
    return FORBIDDEN.search(text) is not None


def cleaned(rows: Iterable[str], text: str, drop: bool) -> tuple[list[dict], list[str]]:
    """Canonical chat rows (JSON) -> (rows whose answers have no forbidden phrase, the answers that
    were replaced or went)."""
    kept = []
    found = []
    for one in map(json.loads, rows):
        wrong = [
            turn
            for turn in one["messages"]
            if turn["role"] == "assistant" and has_forbidden(turn["content"])
        ]
        found += [turn["content"] for turn in wrong]
        for turn in wrong:
            turn["content"] = text
        if not (wrong and drop):
            kept.append(one)
    return kept, found


def clean(path: str, text: str, drop: bool) -> None:
    """Write what `cleaned` gives beside a file: NAME_clean.jsonl, and NAME_replaced.txt."""
    from common.data.load import load_rows, summary

    table, stats = load_rows(path, "chat")
    cli.say(summary(stats))
    kept, found = cleaned(table["row"], text, drop)
    place = Path(path)
    out = place.with_name(f"{place.stem}_clean.jsonl")
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in kept]
    out.write_text("".join(lines), encoding="utf-8", newline="\n")
    listed = place.with_name(f"{place.stem}_replaced.txt")
    listed.write_text("\n".join(found), encoding="utf-8")
    done = "left out" if drop else "replaced"
    cli.say(f"{out}: {len(kept):,} rows; {len(found):,} answers {done}, all in {listed}")
    for answer in found[:SHOWN]:
        cli.say(f"  {' '.join(answer.split())[:80]}")


def say_unused(args) -> None:
    """A line for the flags that have no effect."""
    if args.clean:
        flags.say_unused(["seed", "output_dir"], "--clean writes beside the file")
    else:
        flags.say_unused(["drop"], "there is no --clean")


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--topics", default=str(TOPICS), help="YAML file; default: that of the samples")
    add("--style", default="", help="texts of the refusal with |; default: those of the file")
    add("--clean", default="", help="a data set whose answers are searched instead")
    add("--drop", action="store_true", help="with --clean: leave those rows out")
    add("--seed", type=int, default=0, help="which wordings are held out")
    add("--output_dir", default=str(HERE.parent / "output" / "refusal"))
    args = parser.parse_args()
    say_unused(args)
    topics, texts = read_topics(args.topics, args.style)
    if args.clean:
        clean(args.clean, texts[0].replace("{topic}", "这个话题"), args.drop)
        return
    write(make(topics, texts, args.seed), Path(args.output_dir), "refusal")


if __name__ == "__main__":
    cli.run(main)
