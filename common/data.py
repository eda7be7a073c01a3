"""Rows from the files people have: read, checked, counted, cached as Arrow, split, checked for leaks, tokenised.

    rows, stats = load_rows("a.jsonl:0.7 folder_b:0.3", kind="chat")
    train, held_out = split_rows(rows)

No torch, no process group: N ranks may call everything at once, one works and the others wait on a file lock.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from common import files
from common import rows as shapes
from common.rows import BadRow

FORKED_FROM = 5000  # fewer rows than this are tokenised faster than worker processes start
GRAM = 13  # characters; the window of the near-duplicate check
NEAR = 0.3  # a prompt is leaked if this share of its 13-grams stands in the test prompts (one edit costs 13 of them)
BOILERPLATE = 3  # 13-grams in more test prompts than this are an instruction they share, not their content
VERSION = "".join(files.sha256(Path(module))[:8] for module in (__file__, files.__file__, shapes.__file__))


# ---- rows ---------------------------------------------------------------------------------------------------


def _columns(column_map) -> dict[str, str]:
    """Text like `instruction=问题,output=回答`, or such a dict -> {their name: ours}."""
    if isinstance(column_map, str):
        pairs = [pair.partition("=")[::2] for pair in column_map.split(",") if pair.strip()]
    else:
        pairs = list((column_map or {}).items())
    if not all(ours.strip() and theirs.strip() for ours, theirs in pairs):
        raise SystemExit(f'column_map {column_map!r}: write it like "instruction=问题,output=回答" (ours=theirs)')
    return {theirs.strip(): ours.strip() for ours, theirs in pairs}


def _shape_of(path: Path, kind: str, head: list[dict], renames: dict[str, str]):
    """The shape of a file, from its first records as they are after renaming; one clear line where there is none."""
    seen = ", ".join(name[:40] for name in list(dict.fromkeys(chain(*head)))[:20])
    if absent := [name for name in renames if not any(name in record for record in head)]:
        raise SystemExit(f"{path}: column_map: no column {', '.join(absent)}; columns seen: {seen}")
    head = [_renamed(record, renames) for record in head]
    shape = shapes.detect(kind, head)
    if shape is None:
        others = [other for other in shapes.SHAPES if other != kind and shapes.detect(other, head)]
        hint = f"these are rows of kind {' or '.join(others)}, not {kind}; " if others else ""
        accepted = "; ".join(s.columns for s in shapes.SHAPES[kind])
        raise SystemExit(
            f"{path}: no {kind} rows recognised; columns seen: {seen}; {hint}accepted: {accepted}; "
            "rename yours with --column_map ours=theirs"
        )
    return shape


def _renamed(record: dict, renames: dict[str, str]) -> dict:
    if not renames:
        return record
    kept = {name: value for name, value in record.items() if name not in renames.values() or name in renames}
    return {renames.get(name, name): value for name, value in kept.items()}


def _spelled(row: dict, encoding: str) -> str:
    """A canonical row as JSON; BadRow where its characters cannot have been meant."""
    spelled = json.dumps(row, ensure_ascii=False)
    try:
        spelled.encode()
    except UnicodeEncodeError as error:
        raise BadRow("broken characters", "bytes of another encoding, or half a surrogate pair") from error
    if encoding == "gb18030" and not spelled.isascii():
        try:
            spelled.encode("gb18030").decode()
        except UnicodeDecodeError:
            return spelled
        raise BadRow("broken characters", "UTF-8 in a GB18030 file")
    return spelled


def prompt_key(text: str) -> int:
    """64-bit hash (signed) of a normalised prompt."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _drop(stats: dict, where: str, bad: BadRow, strict: bool) -> None:
    what = f"{where}: {bad.reason}" + (f" ({bad.detail})" if bad.detail else "")
    if strict:
        raise SystemExit(f"{what}; without --strict_data true such rows are counted and left out")
    stats["dropped"][bad.reason] = stats["dropped"].get(bad.reason, 0) + 1
    stats["examples"].setdefault(bad.reason, what)


def _rows(path: Path, kind: str, renames: dict[str, str], stats: dict, strict: bool) -> Iterator[dict]:
    """The usable rows of one file; everything else is counted in `stats`."""
    encoding = files.encoding_of(path)
    records = files.records(path, encoding)
    start = list(islice(records, 50))
    head = [record for _, record in start if isinstance(record, dict)]
    if not start:
        stats["ignored"].append(f"{path} (no rows)")
        return
    shape = _shape_of(path, kind, head, renames) if head else None
    stats["shapes"][str(path)] = shape.name if shape else "none"
    stats["encodings"][str(path)] = encoding.removesuffix("-sig")
    for number, record in chain(start, records):
        stats["read"] += 1
        try:
            if isinstance(record, BadRow):
                raise record
            if not isinstance(record, dict) or shape is None:
                raise BadRow("not an object", type(record).__name__)
            row = shape.convert(_renamed(record, renames))
            spelled = _spelled(row, encoding)
        except BadRow as bad:
            _drop(stats, f"{path}:{number}", bad, strict)
        else:
            stats["used"] += 1
            yield {"row": spelled, "prompt_key": prompt_key(shapes.prompt_of(row)), "source": f"{path}:{number}"}


def _refuse_useless(path: Path, stats: dict) -> None:
    """SystemExit if a path has no row, or more unusable rows than usable ones."""
    if not stats["read"]:
        raise SystemExit(f"{path}: no rows (empty)")
    lost = stats["read"] - stats["used"]
    if 2 * lost > stats["read"]:
        reasons = "; ".join(f"{n} {reason}, e.g. {stats['examples'][reason]}" for reason, n in stats["dropped"].items())
        raise SystemExit(f"{path}: {lost} of {stats['read']} rows cannot be used (more than half): {reasons}")


def _load(path: Path, kind: str, renames: dict[str, str], strict: bool, cache_dir):
    """One path of the command line -> (Dataset, stats), from the cache where its contents are known."""
    paths, ignored = files.data_files(path)
    contents = [(str(p), files.sha256(p)) for p in paths]
    key = json.dumps(["rows", VERSION, kind, renames, contents])

    def build(folder: Path) -> dict:
        stats = {"read": 0, "used": 0, "dropped": {}, "examples": {}, "shapes": {}, "encodings": {}, "ignored": []}
        write_rows(chain.from_iterable(_rows(p, kind, renames, stats, strict) for p in paths), folder / "rows.arrow")
        _refuse_useless(path, stats)
        return stats | {"sha256": hashlib.sha256(json.dumps([sha for _, sha in contents]).encode()).hexdigest()}

    dataset, stats = cached(key, build, cache_dir)
    if strict and stats["dropped"]:
        raise SystemExit(f"{next(iter(stats['examples'].values()))}; strict data was asked for")
    return dataset, stats | {"ignored": ignored + stats["ignored"]}


def load_rows(data_path, kind: str = "chat", column_map=None, strict: bool = False, cache_dir=None, seed: int = 0):
    """Files, folders or several of them -> (datasets.Dataset, stats).

    data_path: path, "a b", "a:0.7 b:0.3", or a list of such. Weights are proportions of the result: the most rows that
    keep them with no row twice, drawn by `seed`. A .txt line is a row of kind "text".
    kind: "chat", "preference" or "text"; column_map: "ours=theirs,…" or a dict, applied before the shape is detected.
    strict: the first unusable row ends the run instead of being counted.
    cache_dir: where Arrow files are kept (default $DANPU_CACHE or ~/.cache/danpu), keyed by the contents of the files.

    Columns: row (canonical JSON, see common/rows.py), prompt_key (int64, hash of the normalised prompt), source
    ("file:line", "file:row" for parquet). stats: {read, used, dropped {reason: n}, examples {reason: "file:line: …"},
    shapes {file: shape}, encodings {file: name}, ignored [names], sha256}, with weights also not_drawn.
    SystemExit with one line for everything the user has to repair."""
    from datasets import concatenate_datasets

    entries, renames = files.entries(data_path), _columns(column_map)
    loaded = [_load(path, kind, renames, strict, cache_dir) for path, _ in entries]
    parts, stats = [dataset for dataset, _ in loaded], _merged([s for _, s in loaded])
    if entries[0][1] is not None:
        shares = np.array([weight for _, weight in entries]) / sum(weight for _, weight in entries)
        total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
        for i, share in enumerate(shares):
            count = max(1, int(total * share + 1e-6))
            drawn = np.random.default_rng([seed, i]).permutation(len(parts[i]))[:count]
            parts[i] = parts[i].select(np.sort(drawn))
    dataset = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    if entries[0][1] is not None:
        stats |= {"not_drawn": stats["used"] - len(dataset), "used": len(dataset)}
    return dataset, stats


def _merged(all_stats: list[dict]) -> dict:
    merged = {"read": 0, "used": 0, "dropped": {}, "examples": {}, "shapes": {}, "encodings": {}, "ignored": []}
    for stats in all_stats:
        for name in ("read", "used", "ignored"):
            merged[name] = merged[name] + stats[name]
        for reason, count in stats["dropped"].items():
            merged["dropped"][reason] = merged["dropped"].get(reason, 0) + count
        merged["examples"] = stats["examples"] | merged["examples"]
        merged["shapes"] |= stats["shapes"]
        merged["encodings"] |= stats["encodings"]
    digests = [stats["sha256"] for stats in all_stats]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return merged | {"sha256": joined}


def summary(stats: dict) -> str:
    """The lines to print about a load: counts, each reason with its example, shapes and encodings found."""
    kinds = {f"{shape} ({stats['encodings'][file]})" for file, shape in stats["shapes"].items()}
    found = ", ".join(sorted(kinds))
    lines = [f"rows: {stats['used']:,} used of {stats['read']:,} read in {len(stats['shapes'])} file(s): {found}"]
    if stats.get("not_drawn"):
        lines.append(f"  {stats['not_drawn']:,} not drawn, to keep the weights")
    lines += [f"  {n:,} dropped, e.g. {stats['examples'][why]}" for why, n in stats["dropped"].items()]
    if stats["ignored"]:
        lines.append(f"  ignored: {', '.join(stats['ignored'])}")
    return "\n".join(lines)


# ---- cache --------------------------------------------------------------------------------------------------


def write_rows(rows: Iterator[dict], path: Path) -> None:
    """{"row", "prompt_key", "source"} one by one -> an Arrow stream file; some thousand rows are alive at a time."""
    import pyarrow as pa

    schema = pa.schema([("row", pa.string()), ("prompt_key", pa.int64()), ("source", pa.string())])
    batch, size = [], 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for row in rows:
            batch.append(row)
            size += len(row["row"])
            if len(batch) == 1000 or size > 1 << 24:  # the size too: one row may be megabytes long
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch, size = [], 0
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def _whole(folder: Path):
    """(Dataset, stats) of a cache folder, or None where it is absent or torn (a file missing or of another size)."""
    from datasets import Dataset, concatenate_datasets

    try:
        meta = json.loads((folder / "meta.json").read_text())
        if any((folder / name).stat().st_size != size for name, size in meta["files"].items()):
            return None
        dataset = concatenate_datasets([Dataset.from_file(str(folder / name)) for name in meta["files"]])
    except (OSError, ValueError, KeyError):
        return None
    dataset._fingerprint = folder.name  # datasets would hash file times; equal contents must give equal later keys
    return dataset, meta["stats"]


def cache_root(cache_dir=None) -> Path:
    """Where prepared things are kept: the argument, $DANPU_CACHE or ~/.cache/danpu."""
    return Path(cache_dir or os.environ.get("DANPU_CACHE") or "~/.cache/danpu").expanduser()


def cached(key: str, build: Callable[[Path], dict], cache_dir=None):
    """(Dataset, stats) of `key`: from the cache, or built once while other processes wait.

    build(folder) writes Arrow stream files (*.arrow, read in the order of their names) into an empty folder and
    returns stats that JSON can hold. The folder gets its name only when whole; it is rebuilt if its files changed."""
    from filelock import FileLock

    root = cache_root(cache_dir)
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]
    work = folder.with_suffix(".tmp")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if found := _whole(folder):
                return found
            for leftover in (folder, work):
                shutil.rmtree(leftover, ignore_errors=True)
            work.mkdir()
            try:
                stats = build(work)
                sizes = {file.name: file.stat().st_size for file in sorted(work.glob("*.arrow"))}
                (work / "meta.json").write_text(json.dumps({"files": sizes, "stats": stats}))
                os.replace(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            return _whole(folder)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "check that folder"
        raise SystemExit(f"{root}: cannot keep prepared data: {error}; {remedy} or set DANPU_CACHE") from None


# ---- split and leak check -----------------------------------------------------------------------------------


def _column(dataset, name: str) -> np.ndarray:
    return dataset.select_columns(name).with_format("numpy")[:][name] if len(dataset) else np.zeros(0, np.int64)


def split_rows(dataset, eval_ratio: float = 0.05, max_eval: int = 500, seed: int = 0):
    """(train, eval) by the hash of the prompt: equal prompts are always on one side, added rows move few others.

    eval has at most min(max_eval, eval_ratio * rows) rows, but one whole prompt where there are two or more."""
    if not 0 <= eval_ratio < 1:
        raise SystemExit(f"eval_ratio {eval_ratio}: must be at least 0 and below 1")
    prompts, member, sizes = np.unique(_column(dataset, "prompt_key"), return_inverse=True, return_counts=True)
    held = np.zeros(len(prompts), dtype=bool)
    if eval_ratio and max_eval > 0 and len(prompts) > 1:
        room = min(max_eval, int(len(dataset) * eval_ratio))
        order = np.argsort(_mixed(prompts, seed), kind="stable")
        for prompt in order:
            if sizes[prompt] <= room:
                held[prompt] = True
                room -= sizes[prompt]
            if room <= 0:
                break
        if not held.any():
            held[order[np.argmin(sizes[order])]] = True
    return dataset.select(np.flatnonzero(~held[member])), dataset.select(np.flatnonzero(held[member]))


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64's finaliser: another well-spread order of the keys for each seed."""
    x = keys.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _grams(text: str) -> np.ndarray:
    """Distinct hashes of the 13-character windows of a text without its whitespace; none for a shorter text."""
    codes = np.frombuffer("".join(text.split()).encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < GRAM:
        return np.zeros(0, np.uint64)
    powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(GRAM, dtype=np.uint64)
    return np.unique(_mixed((np.lib.stride_tricks.sliding_window_view(codes, GRAM) * powers).sum(1), 0))


def _prompts(dataset) -> Iterator[str]:
    for batch in dataset.select_columns("row").iter(1000):
        yield from (shapes.prompt_of(json.loads(row)) for row in batch["row"])


def leak_check(train, test_path, kind: str = "chat", column_map=None, cache_dir=None):
    """(train without the rows whose prompt stands in the test files, how many went).

    Equal normalised prompts, and near ones: 30 % (NEAR) of a prompt's 13-grams stand in the test prompts, not counting
    13-grams that more than 3 (BOILERPLATE) test prompts share, which are a common instruction."""
    test, _ = load_rows(test_path, kind, column_map, cache_dir=cache_dir)
    exact = np.isin(_column(train, "prompt_key"), _column(test, "prompt_key"))
    seen, times = np.unique(np.concatenate([_grams(p) for p in set(_prompts(test))]), return_counts=True)
    kept = []
    for i, prompt in enumerate(_prompts(train)):
        if exact[i]:
            continue
        grams = _grams(prompt)
        at = np.minimum(np.searchsorted(seen, grams), max(len(seen) - 1, 0))
        found = seen[at] == grams if len(seen) else np.zeros(len(grams), bool)
        common = found & (times[at] > BOILERPLATE) if len(seen) else found
        leaked, own = np.sum(found & ~common), np.sum(~common)
        if not (leaked and leaked >= NEAR * own):
            kept.append(i)
    return train.select(kept), len(train) - len(kept)


# ---- tokens -------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """A SystemExit on its way out of a worker process, where it would end the worker without a word."""


def _encoded(batch: dict, encode: Callable, columns: tuple[str, ...], forked: bool, refusals: Path) -> dict:
    if forked and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # OpenMP hangs in a fork of a process that has used its threads
    out = {name: [] for name in (*columns, "length", "truncated", "source")}
    for row, source in zip(batch["row"], batch["source"], strict=True):
        try:
            found = encode(json.loads(row)) or []
        except SystemExit as error:
            raise _Stop(f"{source}: {error}") from None
        except ValueError as error:  # the chat template refuses the row
            _refuse(refusals, " ".join(str(error).split()), source)
            continue
        usable = [tokens for tokens in (found if isinstance(found, list) else [found]) if _has_labels(tokens, columns)]
        if not usable:
            _refuse(refusals, NO_LABEL, source)
        for tokens in usable:
            for name in columns:
                out[name].append(tokens[name])
            out["length"].append(sum(len(tokens[name]) for name in columns if name.endswith("input_ids")))
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
    dataset, encode: Callable, key: str, num_proc=None, columns=("input_ids", "labels"), cache_dir=None, required=True
):
    """load_rows' Dataset -> (Dataset of token rows, counts), cached; safe when N ranks call it at once.

    encode(row dict) -> {"input_ids": [T], "labels": [T], "truncated": bool}, a list of such, or None. It must depend on
    nothing that `key` does not name (tokenizer, template, max length, version of the code). columns: the lists of ints
    it returns.
    A ValueError of encode drops the row under its text. required: SystemExit when no row is left.
    num_proc: worker processes (default: all cores; 1 below 5,000 rows).
    Columns: `columns` as int32, length (tokens), truncated, source. Rows without a label are dropped.
    counts: {"rows", "truncated", "dropped": {"no label left": n}, "examples", "tokens", "label_tokens"}."""
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
                fn_kwargs={"encode": encode, "columns": columns, "forked": workers > 1, "refusals": folder},
                batched=True,
                batch_size=200,
                num_proc=workers if workers > 1 else None,
                remove_columns=dataset.column_names,
                features=Features(features),
                cache_file_name=str(folder / "tokens.arrow"),
                load_from_cache_file=False,
                new_fingerprint="tokens",  # the folder has its own key; hashing a tokenizer is slow and unstable
                desc="tokenise",
            )
        except _Stop as stop:
            raise SystemExit(str(stop)) from None
        refused = [json.loads(line) for file in folder.glob("*.refused") for line in file.open(encoding="utf-8")]
        if required and not len(tokens):
            told = [f"{source}: {reason}" for reason, source in refused if reason != NO_LABEL]
            why = told[0] if told else "the length limit cuts off every answer, or the chat template marks none"
            raise SystemExit(f"none of {len(dataset)} rows has a label left: {why}")
        return _counts(tokens, columns, refused)

    return cached(json.dumps(["tokens", VERSION, dataset._fingerprint, columns, required, key]), build, cache_dir)


def tokenise_split(train, held_out, encode: Callable, key: str, **settings):
    """`tokenise` both parts -> (token rows to train on, token rows held out, the counts of both).

    Held-out rows may all be unusable (then none are held out); they are counted like the others.
    """
    train_ids, counts = tokenise(train, encode, key, **settings)
    if not len(held_out):
        return train_ids, [], counts
    held_out_ids, more = tokenise(held_out, encode, key, required=False, **settings)
    for reason, n in more["dropped"].items():
        counts["dropped"][reason] = counts["dropped"].get(reason, 0) + n
    counts["examples"] = more["examples"] | counts["examples"]
    counts["truncated"] += more["truncated"]
    return train_ids, held_out_ids, counts


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
                counts["label_tokens"] += int((table[name].combine_chunks().flatten().to_numpy() != -100).sum())
    return counts
