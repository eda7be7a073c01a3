"""From rows as read to token rows: split, keep a test file's prompts out, tokenise, count."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common import cli
from common.data.split import describe_split, leak_check, split_rows
from common.data.tokens import tokenise_split


class Prepared(NamedTuple):
    """train_ids, eval_ids: datasets.Dataset of token rows (eval_ids is [] where nothing is held
    out); eval_rows: the held-out rows as they were read."""

    train_ids: object
    eval_ids: object
    eval_rows: object


def prepare(
    rows,
    stats: dict,
    encode: Callable[[dict], dict | list | None],
    args: cli.DataArgs,
    kind: str,
    seed: int,
    depends_on: list,
    columns: tuple[str, ...] = ("input_ids", "labels"),
) -> Prepared:
    """The rows of `load_rows` -> token rows to train on and to evaluate on; completes `stats`.

    encode: a row -> {"input_ids": [T], "labels": [T], "truncated": bool}, see tokens.tokenise.
    kind: "chat", "preference" or "text", the shape in which a test file is read.
    depends_on: all that decides the tokens beside rows and code, e.g. fingerprint(tokenizer); the
        file that `encode` stands in counts by itself, so that an edited `encode` makes new rows.
    """
    train, held_out = split_rows(rows, args.eval_ratio, args.max_eval_samples, seed=seed)
    for line in describe_split(rows, train, held_out, args.eval_ratio, args.max_eval_samples):
        cli.say(line)
    if not len(train):
        raise SystemExit(
            f"{args.data_path}: nothing is left to train on: every prompt stands in the files that "
            "are held out by their names; name the files to train on"
        )
    if args.leak_check:
        train, leaked = leak_check(train, args.leak_check, kind, args.column_map or None)
        stats["dropped"]["in test file"] = leaked
        cli.say(f"  {leaked:,} left out: their prompts stand in {args.leak_check}")
        if not len(train):
            raise SystemExit(
                f"--leak_check {args.leak_check}: every row to train on has a prompt that stands "
                "there; nothing is left to learn"
            )

    key = json.dumps([_source_of(encode), args.model_max_length, *depends_on])
    train_ids, eval_ids, counts = tokenise_split(train, held_out, encode, key, columns=columns)

    cli.wait_for_all("it tokenises")  # machines that share no cache end at different times

    stats["dropped"] |= counts["dropped"]
    for reason, count in counts["dropped"].items():
        cli.say(f"  {count:,} dropped: {counts['examples'].get(reason, reason)}")
    stats["notes"] = counts["notes"]
    for note, count in counts["notes"].items():
        cli.say(f"  warning: {count:,} rows, e.g. {counts['examples'][note]}")
    stats["used"] = len(train_ids)
    stats["held_out"] = len(eval_ids)
    stats["truncated"] = counts["truncated"]
    cli.say(
        f"split: {stats['used']:,} rows to train on, {stats['held_out']:,} held out, "
        f"{stats['truncated']:,} shortened"
    )
    if 2 * stats["truncated"] > stats["used"] + stats["held_out"]:
        cli.say(
            f"warning: most rows are longer than --model_max_length {args.model_max_length}: they "
            "lost earlier turns, the middle of their questions or the end of their answers"
        )
    return Prepared(train_ids, eval_ids, held_out)


def _source_of(encode: Callable) -> str:
    function = encode.func if isinstance(encode, partial) else encode
    return Path(inspect.getsourcefile(function)).read_text(encoding="utf-8")
