"""Rows as a recipe's training sees them: its own script, up to the point where it has token rows.

    python tools/manager/preview_worker.py ROWS SCRIPT [flags of the script]

The last line of its output is JSON. Nothing is trained, and no weights are loaded.
"""

from __future__ import annotations

import inspect
import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path

MARK = "danpu-preview "
LONGEST = 4096  # tokens of a row that is shown
BINS = 24
IGNORED = -100
BROKEN = "\N{REPLACEMENT CHARACTER}"
MOST_HELD = 8  # ids that one character may have


def objects_of(function) -> list:
    """What a function was given before it is called: arguments of partials, variables around it."""
    found = []
    while isinstance(function, partial):
        found += [*function.args, *function.keywords.values()]
        function = function.func
    around = inspect.getclosurevars(function).nonlocals.values() if callable(function) else ()
    for one in around:
        found.append(one)
        if isinstance(one, partial):
            found += objects_of(one)
    return found


def tokenizer_of(encode):
    """The one that a recipe's encode uses; None where it is hidden."""
    for one in objects_of(encode):
        for candidate in (one, getattr(one, "tokenizer", None)):
            if hasattr(candidate, "convert_ids_to_tokens") and hasattr(candidate, "decode"):
                return candidate
    return None


def pieces(tokenizer, ids: list[int], labels: list[int]) -> list[dict]:
    """[{"text", "label"}]: each token, or the few of one character."""
    found = []
    held: list[int] = []
    for place, token in enumerate(ids):
        held.append(token)
        text = tokenizer.decode(held) if tokenizer else f"{token} "
        following = labels[place + 1 : place + 2]
        is_last = not following or (following[0] != IGNORED) != (labels[place] != IGNORED)
        if text.endswith(BROKEN) and not is_last and len(held) < MOST_HELD:
            continue
        found.append({"text": text, "label": labels[place] != IGNORED})
        held = []
    return found


def sides(row: dict, columns: tuple[str, ...]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of a token row: one, or of a pair the preferred one and the other. A column of
    ids is called ..input_ids, that of its labels ..labels; without one every token is trained."""
    found = []
    for name in columns:
        ids = row.get(name)
        if name.endswith("input_ids") and ids:
            labels = row.get(name.replace("input_ids", "labels")) or ids
            found.append((list(ids), list(labels)))
    return found


def shown(row: dict, columns, tokenizer) -> list[dict]:
    found = []
    for ids, labels in sides(row, columns):
        found.append(
            {
                "tokens": pieces(tokenizer, ids[:LONGEST], labels[:LONGEST]),
                "length": len(ids),
                "label_tokens": sum(label != IGNORED for label in labels),
            }
        )
    return found


def histogram(lengths: list[int]) -> dict:
    if not lengths:
        return {"bins": [], "counts": [], "mean": 0, "max": 0}
    longest = max(lengths)
    width = max(1, -(-longest // BINS))
    counts = [0] * (longest // width + 1)
    for length in lengths:
        counts[length // width] += 1
    mean = round(sum(lengths) / len(lengths), 1)
    bins = [width * i for i in range(len(counts))]
    return {"bins": bins, "counts": counts, "mean": mean, "max": longest}


def tell(prepared, stats: dict, encode, columns, rows: int) -> None:
    tokenizer = tokenizer_of(encode)
    found = []
    lengths = []
    for place, row in enumerate(prepared.train_ids):
        here = sides(row, columns)
        lengths += [len(ids) for ids, _ in here]
        if place < rows:
            found += shown(row, columns, tokenizer)
    examples = stats.get("examples") or {}
    answer = {
        "rows": found,
        "lengths": histogram(lengths),
        "read": stats.get("read"),
        "used": stats.get("used"),
        "dropped": {str(name): count for name, count in stats.get("dropped", {}).items()},
        "examples": {str(name): str(text) for name, text in examples.items()},
        "notes": [f"{count} x {note}" for note, count in (stats.get("notes") or {}).items()],
    }
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    os._exit(0)


def main() -> None:
    rows = int(sys.argv[1])
    script = Path(sys.argv[2]).resolve()
    sys.argv = [str(script), *sys.argv[3:]]
    sys.path[:1] = [str(script.parent), str(script.parent.parent)]
    from common.data import prepare as module

    whole = module.prepare

    def prepare(loaded, stats, encode, *args, **kwargs):
        bound = inspect.signature(whole).bind(loaded, stats, encode, *args, **kwargs)
        bound.apply_defaults()
        prepared = whole(loaded, stats, encode, *args, **kwargs)
        tell(prepared, stats, encode, bound.arguments["columns"], rows)

    module.prepare = prepare  # scripts take it from there when they are imported
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
