"""What a run trains on: rows that are made here (the words `identity` and `refusal`) beside the
user's files, in the proportion that was asked for.

    identity refusal general.jsonl            made rows are --identity_ratio of the rows
    identity refusal general.jsonl:0.7        general rows are 0.7 of them, made rows the rest
    identity a.jsonl:0.4 b.jsonl:0.3          the same of several files

All made rows are used, and as many general ones as keep the proportion, none of them twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import make_identity
import make_refusal
import numpy as np
from datasets import concatenate_datasets

from common import cli
from common.data import load, shapes
from common.data.cache import cache_root
from common.data.files import atomic_file, entries
from common.data.split import split_rows
from common.runs import flags

MADE = ("identity", "refusal")
PLACEHOLDER = re.compile(r"\{\{\s*(NAME|AUTHOR)\s*\}\}", re.I)
# of the README, "Measured"
ALONE = (
    "warning: only rows about the model itself are trained. The built-in model lost 33% of its "
    "facts then and changed 17% of its answers to near questions, beside general rows none "
    '(README, "Measured"). Give some: DATA="identity refusal general.jsonl"'
)


def words_of(data_path: str) -> tuple[list[str], list[str]]:
    """DATA -> (made words, the others). A file or folder that is called like a made word is named
    ./identity."""
    if data_path not in MADE and Path(data_path).expanduser().exists():
        return [], [data_path]  # one path, perhaps with spaces in its name
    words = data_path.split()
    for word in words:
        name, weight = word.partition(":")[::2]
        if name in MADE and weight:
            raise cli.usage_error(
                f"--data_path {word}: made rows are all used; give the files weights, or say the "
                "share of made rows with --identity_ratio"
            )
    return [w for w in words if w in MADE], [w for w in words if w not in MADE]


def say_unused(args) -> None:
    """A line for the flags about made rows that have no effect on this --data_path."""
    made, others = words_of(args.data_path)
    if not made:
        flags.say_unused(["identity_ratio"], "--data_path names no made rows")
    elif not others:
        flags.say_unused(["identity_ratio"], "--data_path names made rows only")
    if "identity" not in made:
        flags.say_unused(["near_questions"], "--data_path does not name identity")


def made_rows(
    made: list[str], persona, topics: list[dict], texts: list[str], near: bool = True
) -> list[dict]:
    """The rows of the generators that were asked for, held-out families too."""
    rows = []
    if "identity" in made:
        rows += make_identity.make(persona, near=near)
    if "refusal" in made:
        rows += make_refusal.make(topics, texts)
    return rows


def as_table(rows: list[dict], name: str):
    """Made rows as load_rows gives them: through a file, whose lines reports can name."""
    lines = [json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n" for row in rows]
    text = "".join(lines).encode()
    folder = cache_root() / "made" / hashlib.sha256(text).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    if not file.is_file():
        with atomic_file(file) as part:
            part.write_bytes(text)
    return load.load_rows([str(file)], "chat")


def load_mixed(args, made: list[dict], others: list[str], seed: int):
    """-> (rows, stats) as load.load_rows gives them, the held-out rows marked.

    Held out are general rows, by their prompts; where there are none, the made rows of held-out
    families. All else about the proportion stands above.
    """
    if not made:
        return general_rows(args, args.data_path, seed)
    share = share_of_made(others, args.identity_ratio)
    parts = []
    for name in MADE:
        chosen = [row for row in made if made_by(row) == name and not row["held_out"]]
        parts += [as_table(chosen, name)] if chosen else []
    if not others:
        cli.say(ALONE)
        apart, stats = as_table([row for row in made if row["held_out"]], "held_out")
        tables = [*(table for table, _ in parts), marked(apart)]
        return concatenate_datasets(tables), load.merged([*(s for _, s in parts), stats])

    general, stats = general_rows(args, others, seed)
    train, apart = split_rows(general, args.eval_ratio, args.max_eval_samples, seed=seed)
    train = in_proportion(sum(len(table) for table, _ in parts), train, share, seed)
    rows = concatenate_datasets([*(table for table, _ in parts), train, marked(apart)])
    total = load.merged([*(s for _, s in parts), stats])
    total["not_drawn"] = total["used"] - len(rows)
    total["used"] = len(rows)
    return rows, total


def made_by(row: dict) -> str:
    return "refusal" if row["kind"] in ("refusal", "alike") else "identity"


def general_rows(args, paths, seed: int):
    """The user's files; SystemExit where a name was to be filled in."""
    found = load.load_rows(paths, "chat", args.column_map or None, args.strict_data, seed=seed)
    refuse_placeholders(found[0])
    return found


def share_of_made(others: list[str], ratio: float) -> float:
    """The share of made rows: what the weights of the files leave, or else `ratio`."""
    weights = [weight for _, weight in entries(others)] if others else []
    if None in weights or not weights:
        return ratio
    if cli.given_by_user("identity_ratio"):
        raise cli.usage_error("--identity_ratio and weights in --data_path say the same; give one")
    if not 0 < sum(weights) < 1:
        raise cli.usage_error(
            f"--data_path: the files' weights sum to {sum(weights):g}; they are shares of all rows "
            "and leave the rest to made ones, e.g. identity refusal general.jsonl:0.7"
        )
    return 1 - sum(weights)


def in_proportion(made: int, general, share: float, seed: int):
    """As many general rows as make `made` rows their share, none twice; said where they are too
    few."""
    wanted = round(made * (1 - share) / share)
    count = min(wanted, len(general))
    cli.say(f"mixing: {made:,} made rows and {count:,} of {len(general):,} general ones")
    if wanted > len(general):
        cli.say(
            f"warning: made rows are {made / (made + count):.2f} of the rows, not {share:g}: there "
            "are no more general ones"
        )
    chosen = np.random.default_rng([seed, 22]).permutation(len(general))[:count]
    return general.select(np.sort(chosen))


def marked(rows):
    """The rows, set apart to be held out."""
    return rows.remove_columns("held_out").add_column("held_out", [True] * len(rows))


def refuse_placeholders(rows) -> None:
    """SystemExit for rows whose name nobody has filled in."""
    for row, source in zip(rows["row"], rows["source"], strict=True):
        found = PLACEHOLDER.search(row)
        if found:
            raise SystemExit(
                f"{source}: {found.group()} is not filled in; python make_identity.py --rows FILE "
                "--name … --author … writes such rows with the name"
            )


def are_general(rows, token_rows, names: tuple[str, ...], texts: list[str]) -> list[bool]:
    """Of each token row whether its answers neither carry the name nor are a refusal: what the
    model should answer as before. SystemExit where there are none."""
    found = set()
    for row, source in zip(rows["row"], rows["source"], strict=True):
        answers = [t["content"] for t in json.loads(row)["messages"] if t["role"] == "assistant"]
        if not any(word in answer for answer in answers for word in (*names, *texts)):
            found.add(source)
    general = [source in found for source in token_rows["source"]]
    if not any(general):
        raise SystemExit(
            "--kl_weight: every row has the name or a refusal, none is general; name general rows "
            "in --data_path, or leave out --kl_weight"
        )
    return general


def training_keys(rows) -> set[int]:
    """Hashes of the prompts that are trained."""
    return {
        key for key, apart in zip(rows["prompt_key"], rows["held_out"], strict=True) if not apart
    }


def key_of(row: dict) -> int:
    return load.prompt_key(shapes.prompt_of(row))
