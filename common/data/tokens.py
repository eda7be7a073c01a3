"""Rows -> token rows, kept as Arrow; safe when N ranks call it at once."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common.data import files
from common.data.cache import cached
from common.data.load import VERSION
from common.data.progress import Progress
from common.data.spelling import IGNORE

FORKED_FROM = 5000  # fewer rows than this are tokenised faster than worker processes start
NO_LABEL = "no label left"
# an edited reader or tokeniser makes new rows
CODE = VERSION + files.sha256(Path(__file__))[:8]


class _Stop(Exception):
    """A SystemExit on its way out of a worker process, where it would end the worker without a
    word."""


# ---- one batch, perhaps in a worker process ------------------------------------------------------


def _encode_batch(
    batch: dict,
    worker: int | None,
    encode: Callable,
    columns: tuple[str, ...],
    refusals: Path,
    progress: Progress,
    workers: int,
) -> dict:
    """Rows as read -> token rows; worker: which of the processes this is, None where only one
    works."""
    if worker is not None and "torch" in sys.modules:
        # OpenMP hangs in a fork of a process that has used its threads
        sys.modules["torch"].set_num_threads(1)
    out = {name: [] for name in (*columns, "length", "truncated", "source")}
    for row, source in zip(batch["row"], batch["source"], strict=True):
        try:
            found = encode(json.loads(row))
        except SystemExit as error:
            raise _Stop(f"{source}: {error}") from None
        except ValueError as error:  # the chat template refuses the row
            _refuse(refusals, " ".join(str(error).split()), source)
            continue
        usable = _usable(found, columns)
        if not usable:
            _refuse(refusals, NO_LABEL, source)
        for tokens in usable:
            _append(out, tokens, columns, source)
        for note in {note for tokens in usable for note in tokens.get("notes", [])}:
            _write(refusals, "noted", note, source)
    if not worker:  # the first worker speaks for all: their shares are equal
        progress.update(len(batch["row"]) * workers)
    return out


def _usable(found: dict | list | None, columns: tuple[str, ...]) -> list[dict]:
    if not found:
        return []
    if not isinstance(found, list):
        found = [found]
    return [tokens for tokens in found if _has_labels(tokens, columns)]


def _has_labels(tokens: dict, columns: tuple[str, ...]) -> bool:
    """Whether every column of labels has one; the first is never a target of a causal model."""
    for name in columns:
        if not name.endswith("labels"):
            continue
        if all(label == IGNORE for label in tokens[name][1:]):
            return False
    return True


def _append(out: dict, tokens: dict, columns: tuple[str, ...], source: str) -> None:
    for name in columns:
        out[name].append(tokens[name])
    lengths = [len(tokens[name]) for name in columns if name.endswith("input_ids")]
    out["length"].append(sum(lengths))
    out["truncated"].append(bool(tokens.get("truncated")))
    out["source"].append(source)


def _refuse(refusals: Path, reason: str, source: str) -> None:
    _write(refusals, "refused", reason, source)


def _write(folder: Path, kind: str, reason: str, source: str) -> None:
    with open(folder / f"{os.getpid()}.{kind}", "a", encoding="utf-8") as file:
        file.write(json.dumps([reason, source]) + "\n")


# ---- all rows ------------------------------------------------------------------------------------


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

    encode(row dict) -> {"input_ids": [T], "labels": [T], "truncated": bool, "notes": [str]?}, a
    list of such, or None. It must depend on nothing that `key` does not name (tokenizer, template,
    max length, version of the code). columns: the lists of ints it returns. A ValueError of encode
    drops the row under its text. required: SystemExit when no row is left.
    num_proc: worker processes (default: all cores; 1 below 5,000 rows).
    Columns: `columns` as int32, length (tokens), truncated, source. Rows without a label are
    dropped.
    counts: {"rows", "truncated", "dropped": {"no label left": n}, "notes": {note of encode: n},
        "examples", "tokens", "label_tokens"}.
    """
    columns = tuple(columns)
    workers = (num_proc or _cores()) if len(dataset) >= FORKED_FROM else 1

    def build(folder: Path) -> dict:
        try:
            tokens = _map(dataset, encode, columns, workers, folder)
        except _Stop as stop:
            raise SystemExit(str(stop)) from None
        refused = _written(folder, "refused")
        if required and not len(tokens):
            raise SystemExit(f"none of {len(dataset)} rows has a label left: {_why(refused)}")
        return _counts(tokens, columns, refused, _written(folder, "noted"))

    full_key = json.dumps(["tokens", CODE, dataset._fingerprint, columns, required, key])
    return cached(full_key, build, cache_dir)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _map(dataset, encode: Callable, columns: tuple[str, ...], workers: int, folder: Path):
    from datasets import Features, List, Value, is_progress_bar_enabled

    features = {name: List(Value("int32")) for name in columns}
    features |= {"length": Value("int32"), "truncated": Value("bool"), "source": Value("string")}
    progress = Progress("tokenise", total=len(dataset))
    if is_progress_bar_enabled():
        progress.shown = False  # datasets draws a bar of its own
    return dataset.map(
        _encode_batch,
        fn_kwargs={
            "encode": encode,
            "columns": columns,
            "refusals": folder,
            "progress": progress,
            "workers": workers,
        },
        batched=True,
        batch_size=200,
        with_rank=True,
        num_proc=workers if workers > 1 else None,
        remove_columns=dataset.column_names,
        features=Features(features),
        cache_file_name=str(folder / "tokens.arrow"),
        load_from_cache_file=False,
        # the folder has its own key; hashing a tokenizer is slow and unstable
        new_fingerprint="tokens",
        desc="tokenise",
    )


def _written(folder: Path, kind: str) -> list[tuple[str, str]]:
    """(reason, source) of every row that was left out, or noted."""
    found = []
    for file in folder.glob(f"*.{kind}"):
        lines = file.read_text(encoding="utf-8").splitlines()
        found += [tuple(json.loads(line)) for line in lines]
    return found


def _why(refused: list[tuple[str, str]]) -> str:
    """Why no row is left: the first reason that a template gave, or the usual one."""
    for reason, source in refused:
        if reason != NO_LABEL:
            return f"{source}: {reason}"
    return "the length limit cuts off every answer, or the chat template marks none"


def _counts(tokens, columns: tuple[str, ...], refused: list, noted: list) -> dict:
    counts = {
        "rows": len(tokens),
        "truncated": 0,
        "dropped": dict(Counter(reason for reason, _ in refused)),
        "notes": dict(Counter(note for note, _ in noted)),
        "examples": {},
        "tokens": 0,
        "label_tokens": 0,
    }
    for reason, source in refused + noted:
        counts["examples"].setdefault(reason, f"{source}: {reason}")
    label_columns = [name for name in columns if name.endswith("labels")]
    for table in tokens.with_format("arrow").iter(1000):
        counts["truncated"] += int(table["truncated"].to_numpy().sum())
        counts["tokens"] += int(table["length"].to_numpy().sum())
        for name in label_columns:
            labels = table[name].combine_chunks().flatten().to_numpy()
            counts["label_tokens"] += int((labels != IGNORE).sum())
    return counts


def tokenise_split(train, held_out, encode: Callable, key: str, **settings):
    """`tokenise` both parts -> (token rows to train on, token rows held out, the counts of both).

    Held-out rows may all be unusable (then none are held out); they are counted like the others.
    """
    train_ids, counts = tokenise(train, encode, key, **settings)
    if not len(held_out):
        return train_ids, [], counts
    eval_ids, more = tokenise(held_out, encode, key, required=False, **settings)
    for kind in ("dropped", "notes"):
        for reason, count in more[kind].items():
            counts[kind][reason] = counts[kind].get(reason, 0) + count
    counts["examples"] = more["examples"] | counts["examples"]
    counts["truncated"] += more["truncated"]
    return train_ids, eval_ids, counts
