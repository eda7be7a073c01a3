"""Rows -> token rows, kept as Arrow; safe when N ranks call it at once."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common.data.cache import cached
from common.data.load import VERSION

FORKED_FROM = 5000  # fewer rows than this are tokenised faster than worker processes start


class _Stop(Exception):
    """A SystemExit on its way out of a worker process, where it would end the worker without a
    word."""


def _encoded(
    batch: dict, encode: Callable, columns: tuple[str, ...], forked: bool, refusals: Path
) -> dict:
    if forked and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(
            1
        )  # OpenMP hangs in a fork of a process that has used its threads
    out = {name: [] for name in (*columns, "length", "truncated", "source")}
    for row, source in zip(batch["row"], batch["source"], strict=True):
        try:
            found = encode(json.loads(row)) or []
        except SystemExit as error:
            raise _Stop(f"{source}: {error}") from None
        except ValueError as error:  # the chat template refuses the row
            _refuse(refusals, " ".join(str(error).split()), source)
            continue
        usable = [
            tokens
            for tokens in (found if isinstance(found, list) else [found])
            if _has_labels(tokens, columns)
        ]
        if not usable:
            _refuse(refusals, NO_LABEL, source)
        for tokens in usable:
            for name in columns:
                out[name].append(tokens[name])
            out["length"].append(
                sum(len(tokens[name]) for name in columns if name.endswith("input_ids"))
            )
            out["truncated"].append(bool(tokens.get("truncated")))
            out["source"].append(source)
    return out


NO_LABEL = "no label left"


def _has_labels(tokens: dict, columns: tuple[str, ...]) -> bool:
    """Whether every column of labels has one; the first is never a target of a causal model."""
    labels = [tokens[name] for name in columns if name.endswith("labels")]
    return all(any(label != -100 for label in part[1:]) for part in labels)


def _refuse(refusals: Path, reason: str, source: str) -> None:
    with open(refusals / f"{os.getpid()}.refused", "a", encoding="utf-8") as file:
        file.write(json.dumps([reason, source]) + "\n")


def tokenise(
    dataset,
    encode: Callable,
    key: str,
    num_proc=None,
    columns=("input_ids", "labels"),
    cache_dir=None,
    required=True,
):
    """load_rows' Dataset -> (Dataset of token rows, counts), cached; safe when N ranks call it at
    once.

    encode(row dict) -> {"input_ids": [T], "labels": [T], "truncated": bool}, a list of such, or
    None. It must depend on nothing that `key` does not name (tokenizer, template, max length,
    version of the code). columns: the lists of ints it returns. A ValueError of encode drops the
    row under its text. required: SystemExit when no row is left.
    num_proc: worker processes (default: all cores; 1 below 5,000 rows).
    Columns: `columns` as int32, length (tokens), truncated, source. Rows without a label are
    dropped.
    counts: {"rows", "truncated", "dropped": {"no label left": n}, "examples", "tokens",
        "label_tokens"}."""
    from datasets import Features, List, Value

    columns = tuple(columns)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = (num_proc or cores) if len(dataset) >= FORKED_FROM else 1
    features = {name: List(Value("int32")) for name in columns}
    features |= {"length": Value("int32"), "truncated": Value("bool"), "source": Value("string")}

    def build(folder: Path) -> dict:
        try:
            tokens = dataset.map(
                _encoded,
                fn_kwargs={
                    "encode": encode,
                    "columns": columns,
                    "forked": workers > 1,
                    "refusals": folder,
                },
                batched=True,
                batch_size=200,
                num_proc=workers if workers > 1 else None,
                remove_columns=dataset.column_names,
                features=Features(features),
                cache_file_name=str(folder / "tokens.arrow"),
                load_from_cache_file=False,
                # the folder has its own key; hashing a tokenizer is slow and unstable
                new_fingerprint="tokens",
                desc="tokenise",
            )
        except _Stop as stop:
            raise SystemExit(str(stop)) from None
        refused = [
            json.loads(line)
            for file in folder.glob("*.refused")
            for line in file.open(encoding="utf-8")
        ]
        if required and not len(tokens):
            told = [f"{source}: {reason}" for reason, source in refused if reason != NO_LABEL]
            why = (
                told[0]
                if told
                else "the length limit cuts off every answer, or the chat template marks none"
            )
            raise SystemExit(f"none of {len(dataset)} rows has a label left: {why}")
        return _counts(tokens, columns, refused)

    return cached(
        json.dumps(["tokens", VERSION, dataset._fingerprint, columns, required, key]),
        build,
        cache_dir,
    )


def tokenise_split(train, held_out, encode: Callable, key: str, **settings):
    """`tokenise` both parts -> (token rows to train on, token rows held out, the counts of both).

    Held-out rows may all be unusable (then none are held out); they are counted like the others.
    """
    train_ids, counts = tokenise(train, encode, key, **settings)
    if not len(held_out):
        return train_ids, [], counts
    eval_ids, more = tokenise(held_out, encode, key, required=False, **settings)
    for reason, n in more["dropped"].items():
        counts["dropped"][reason] = counts["dropped"].get(reason, 0) + n
    counts["examples"] = more["examples"] | counts["examples"]
    counts["truncated"] += more["truncated"]
    return train_ids, eval_ids, counts


def _counts(tokens, columns: tuple[str, ...], refused: list) -> dict:
    counts = {"rows": len(tokens), "truncated": 0, "dropped": {}, "tokens": 0, "label_tokens": 0}
    counts["dropped"], counts["examples"] = dict(Counter(reason for reason, _ in refused)), {}
    for reason, source in refused:
        counts["examples"].setdefault(reason, f"{source}: {reason}")
    for table in tokens.with_format("arrow").iter(1000):
        counts["truncated"] += int(table["truncated"].to_numpy().sum())
        counts["tokens"] += int(table["length"].to_numpy().sum())
        for name in columns:
            if name.endswith("labels"):
                counts["label_tokens"] += int(
                    (table[name].combine_chunks().flatten().to_numpy() != -100).sum()
                )
    return counts
