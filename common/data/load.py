"""Rows from the files people have: read, checked, counted, kept as Arrow.

    rows, stats = load_rows("a.jsonl:0.7 folder_b:0.3", kind="chat")

No torch, no process group: N ranks may call everything at once, one works and the others wait on a
file lock.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from common.data import encodings, files, records, shapes, turns
from common.data.cache import cached, sha256, write_rows
from common.data.progress import Progress
from common.data.turns import BadRow

READERS = (encodings, files, records, shapes, turns)
MODULES = (__file__, *(module.__file__ for module in READERS))
# rows are read anew after an edit of the code that reads them
VERSION = "".join(files.sha256(Path(module))[:8] for module in MODULES)
HEAD = 50  # records from which the shape of a file is recognised


# ---- records -> rows -----------------------------------------------------------------------------


def column_renames(column_map) -> dict[str, str]:
    """Text like `instruction=问题,output=回答`, or such a dict -> {their name: ours}."""
    if isinstance(column_map, str):
        pairs = [pair.partition("=")[::2] for pair in column_map.split(",") if pair.strip()]
    else:
        pairs = list((column_map or {}).items())
    renames = {theirs.strip(): ours.strip() for ours, theirs in pairs}
    if not all(theirs and ours for theirs, ours in renames.items()):
        raise SystemExit(
            f'column_map {column_map!r}: write it like "instruction=问题,output=回答" (ours=theirs)'
        )
    return renames


def renamed(record: dict, renames: dict[str, str]) -> dict:
    """A record with our names; a column that has one of them already gives way."""
    if not renames:
        return record
    overwritten = set(renames.values()) - set(renames)
    kept = {name: value for name, value in record.items() if name not in overwritten}
    return {renames.get(name, name): value for name, value in kept.items()}


def as_json(row: dict, encoding: str) -> str:
    """A canonical row as JSON; BadRow where its characters cannot have been meant."""
    try:
        text = json.dumps(row, ensure_ascii=False)
    except TypeError as error:  # dates and bytes of parquet, in tools or calls
        raise BadRow("a value that JSON has not", str(error)) from None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            "broken characters", "bytes of another encoding, or half a surrogate pair"
        ) from error
    if encodings.is_guess(encoding) and not text.isascii():
        try:
            text.encode(encoding).decode()
        except UnicodeError:
            return text
        raise BadRow("broken characters", f"UTF-8 in a {encoding.upper()} file")
    return text


def prompt_key(text: str) -> int:
    """64-bit hash (signed) of a normalised prompt."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shape_of(path: Path, kind: str, head: list[dict], renames: dict[str, str]):
    """The shape of a file, from its first records as they are after renaming.

    SystemExit with one clear line where there is none.
    """
    columns = list(dict.fromkeys(chain(*head)))
    seen = ", ".join(name[:40] for name in columns[:20])
    absent = [name for name in renames if name not in columns]
    if absent:
        raise SystemExit(f"{path}: column_map: no column {', '.join(absent)}; columns seen: {seen}")
    head = [renamed(record, renames) for record in head]
    shape = shapes.detect(kind, head)
    if shape is None:
        others = [other for other in shapes.SHAPES if other != kind and shapes.detect(other, head)]
        if "chat" in others:
            others = [other for other in others if other != "reward"]  # which reads chats too
        hint = f"these are rows of kind {' or '.join(others)}, not {kind}; " if others else ""
        if kind == "preference" and any(records.is_good(record) is not None for record in head):
            hint += "an answer with a label true or false (KTO) is no pair; "
        if any(records.is_broken_text(record.get(name)) for record in head for name in columns):
            hint += "turns are kept as text that is neither JSON nor Python, json.dumps writes it; "
        accepted = "; ".join(shape.columns for shape in shapes.SHAPES[kind])
        raise SystemExit(
            f"{path}: no {kind} rows recognised; columns seen: {seen}; {hint}accepted: {accepted}; "
            "rename yours with --column_map ours=theirs"
        )
    return shape


def drop(stats: dict, where: str, bad: BadRow, strict: bool) -> None:
    """Count a record that cannot be used; SystemExit where rows have to be good."""
    what = f"{where}: {bad.reason}"
    if bad.detail:
        what += f" ({bad.detail})"
    if strict:
        raise SystemExit(f"{what}; without --strict_data true such rows are counted and left out")
    stats["dropped"][bad.reason] = stats["dropped"].get(bad.reason, 0) + 1
    stats["examples"].setdefault(bad.reason, what)


def _rows(
    path: Path,
    kind: str,
    renames: dict[str, str],
    stats: dict,
    strict: bool,
    held_out: bool,
) -> Iterator[dict]:
    """The usable rows of one file; everything else is counted in `stats`."""
    name = str(path).encode(errors="replace").decode()  # it may hold bytes of another encoding
    encoding = files.encoding_of(path)
    found = files.records(path, encoding)
    start = list(islice(found, HEAD))
    if not start:
        stats["ignored"].append(f"{path} (no rows)")
        return
    head = records.usable([record for _, record in start])
    shape = _shape_of(path, kind, head, renames) if head else None
    stats["shapes"][str(path)] = shape.name if shape else "none"
    stats["encodings"][str(path)] = encoding.removesuffix("-sig")
    guess = files.guess(path, encoding)
    if guess:
        stats["guesses"].append(guess)

    with Progress(f"read {path.name}") as progress:
        for number, record in chain(start, found):
            stats["read"] += 1
            progress.update()
            source = f"{name}:{number}"
            try:
                row, notes = _canonical(record, shape, renames)
                text = as_json(row, encoding)
            except BadRow as bad:
                drop(stats, source, bad, strict)
                continue
            stats["used"] += 1
            for note in notes:
                stats["changed"][note] = stats["changed"].get(note, 0) + 1
                stats["examples"].setdefault(note, source)
            key = prompt_key(shapes.prompt_of(row))
            yield {"row": text, "prompt_key": key, "source": source, "held_out": held_out}


def _canonical(
    record, shape: shapes.Shape | None, renames: dict[str, str]
) -> tuple[dict, list[str]]:
    """-> (canonical row, what was left out of the record)."""
    record = records.as_record(record)
    if shape is None:
        raise BadRow("not an object", type(record).__name__)
    notes: list[str] = []
    return shape.convert(renamed(record, renames), notes), notes


# ---- files -> rows -------------------------------------------------------------------------------


def load_rows(
    data_path,
    kind: str = "chat",
    column_map=None,
    strict: bool = False,
    cache_dir=None,
    seed: int = 0,
):
    """Files, folders or several of them -> (datasets.Dataset, stats).

    data_path: path, "a b", "a:0.7 b:0.3", or a list of such. Weights are proportions of the result:
    the most rows that keep them with no row twice, drawn by `seed`. A .txt line is a row of kind
    "text".
    kind: "chat", "reward", "preference" or "text"; column_map: "ours=theirs,…" or a dict, applied
        before the shape is detected.
    strict: the first unusable row ends the run instead of being counted.
    cache_dir: where Arrow files are kept (default $DANPU_CACHE or ~/.cache/danpu), keyed by the
        contents of the files.

    Columns: row (canonical JSON, see common/data/shapes.py), prompt_key (int64, hash of the
    normalised prompt), source ("file:line", "file:row" for parquet), held_out (bool: the names in a
    folder set the file apart, see files.held_out_files). stats: {read, used, dropped {reason: n},
    changed {what was left out of a row: n}, examples {reason: "file:line: …"}, shapes {file:
    shape}, encodings {file: name}, guesses [encodings that were guessed, with examples], set_apart
    [files], ignored [names], sha256}, with weights also not_drawn. SystemExit with one line for
    everything the user has to repair.
    """
    from datasets import concatenate_datasets

    entries = files.entries(data_path)
    renames = column_renames(column_map)
    parts = []
    all_stats = []
    for path, _ in entries:
        part, part_stats = _load(path, kind, renames, strict, cache_dir)
        parts.append(part)
        all_stats.append(part_stats)
    stats = merged(all_stats)

    weights = [weight for _, weight in entries]
    weighted = weights[0] is not None  # files.entries: all or none
    if weighted:
        parts = drawn(parts, weights, seed)
    dataset = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    if weighted:
        stats["not_drawn"] = stats["used"] - len(dataset)
        stats["used"] = len(dataset)
    return dataset, stats


def drawn(parts: list, weights: list[float], seed: int) -> list:
    """Of every part as many rows, in their order, as its weight asks for."""
    shares = np.array(weights) / sum(weights)
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    chosen = []
    for i, (part, share) in enumerate(zip(parts, shares, strict=True)):
        count = max(1, int(total * share + 1e-6))
        rows = np.random.default_rng([seed, i]).permutation(len(part))[:count]
        chosen.append(part.select(np.sort(rows)))
    return chosen


def _load(path: Path, kind: str, renames: dict[str, str], strict: bool, cache_dir):
    """One path of the command line -> (Dataset, stats), from the cache where its contents are
    known."""
    paths, ignored = files.data_files(path)
    apart = files.held_out_files(path, paths)
    contents = [(str(file), sha256(file, cache_dir)) for file in paths]
    key = json.dumps(["rows", VERSION, kind, renames, contents, list(map(str, apart))])

    def build(folder: Path) -> dict:
        stats = no_stats()
        rows = (_rows(file, kind, renames, stats, strict, file in apart) for file in paths)
        write_rows(chain.from_iterable(rows), folder / "rows.arrow")
        refuse_useless(path, stats)
        digests = json.dumps([digest for _, digest in contents])
        return stats | {"sha256": hashlib.sha256(digests.encode()).hexdigest()}

    dataset, stats = cached(key, build, cache_dir)
    if strict and stats["dropped"]:
        example = stats["examples"][next(iter(stats["dropped"]))]
        raise SystemExit(f"{example}; strict data was asked for")
    stats["ignored"] = ignored + stats["ignored"]
    stats["set_apart"] = list(map(str, apart))
    return dataset, stats


def refuse_useless(path: Path, stats: dict) -> None:
    """SystemExit if a path has no row, or more unusable rows than usable ones."""
    if not stats["read"]:
        raise SystemExit(f"{path}: no rows (empty)")
    lost = stats["read"] - stats["used"]
    if 2 * lost > stats["read"]:
        reasons = "; ".join(
            f"{count} {reason}, e.g. {stats['examples'][reason]}"
            for reason, count in stats["dropped"].items()
        )
        raise SystemExit(
            f"{path}: {lost} of {stats['read']} rows cannot be used (more than half): {reasons}"
        )


# ---- counts --------------------------------------------------------------------------------------


def no_stats() -> dict:
    """What a load counts, before its first record."""
    return {
        "read": 0,
        "used": 0,
        "dropped": {},
        "changed": {},
        "examples": {},
        "shapes": {},
        "encodings": {},
        "guesses": [],
        "set_apart": [],
        "ignored": [],
    }


def merged(all_stats: list[dict]) -> dict:
    """The counts of several loads as those of one."""
    total = no_stats()
    for stats in all_stats:
        for name in ("read", "used", "ignored", "guesses", "set_apart"):
            total[name] = total[name] + stats[name]
        for name in ("dropped", "changed"):
            for reason, count in stats[name].items():
                total[name][reason] = total[name].get(reason, 0) + count
        total["examples"] = stats["examples"] | total["examples"]
        total["shapes"] |= stats["shapes"]
        total["encodings"] |= stats["encodings"]
    digests = [stats["sha256"] for stats in all_stats]
    if len(digests) == 1:
        total["sha256"] = digests[0]
    else:
        total["sha256"] = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return total


def summary(stats: dict) -> str:
    """The lines to print about a load: counts, each reason with its example, shapes and encodings
    found."""
    found = {f"{shape} ({stats['encodings'][file]})" for file, shape in stats["shapes"].items()}
    lines = [
        f"rows: {stats['used']:,} used of {stats['read']:,} read "
        f"in {len(stats['shapes'])} file(s): {', '.join(sorted(found))}"
    ]
    if stats.get("not_drawn"):
        lines.append(f"  {stats['not_drawn']:,} not drawn, to keep the weights")
    for reason, count in stats["dropped"].items():
        lines.append(f"  {count:,} dropped, e.g. {stats['examples'][reason]}")
    for what, count in stats["changed"].items():
        lines.append(f"  {count:,} rows changed: {what}, e.g. {stats['examples'][what]}")
    lines += [f"  {guess}" for guess in stats["guesses"]]
    if stats["set_apart"]:
        names = ", ".join(stats["set_apart"])
        lines.append(f"  held out, not trained on, by their names: {names}")
    if stats["ignored"]:
        lines.append(f"  ignored: {', '.join(stats['ignored'])}")
    return "\n".join(lines)
