"""Files -> records: paths with weights, folders, gz, encodings, and readers that say which line is
wrong.

Own readers, because `datasets` names neither file nor line of what is wrong, and takes nulls,
numbers and unknown columns without a word.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from common.data.shapes import BadRow

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")


def entries(data_path) -> list[tuple[Path, float | None]]:
    """Text like `a b` or `a:0.7 b:0.3`, or a list of such words -> paths with weights (None where
    none is given)."""
    if isinstance(data_path, Path) or (
        isinstance(data_path, str) and Path(data_path).expanduser().exists()
    ):
        data_path = [data_path]  # one path, perhaps with spaces in its name
    names = data_path.split() if isinstance(data_path, str) else [str(p) for p in data_path]
    found = []
    for name in names:
        weighted = (
            re.fullmatch(r"(.+):(\d*\.?\d+)", name)
            if not Path(name).expanduser().exists()
            else None
        )
        path, weight = (weighted[1], float(weighted[2])) if weighted else (name, None)
        if not Path(path).expanduser().exists():
            raise SystemExit(
                f"{path}: no such file or folder (a data set of a hub must be downloaded first)"
            )
        found.append((Path(path).expanduser(), weight))
    weights = [w for _, w in found]
    if not found:
        raise SystemExit("no data path given")
    if any(weights) and not all(weights):
        raise SystemExit(
            "data weights: give every path a weight above 0 (a.jsonl:0.7 b.jsonl:0.3) or none of them"
        )
    return found


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """`with atomic_file(path) as part`: write to `part`, which takes the name `path` when the block
    ends well; a kill never leaves half a file under that name."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """`with atomic_folder(path) as part`: fill the new folder `part`, which takes the place of
    `path` when the block ends well; an earlier folder stays until then."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def suffix_of(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def data_files(path: Path) -> tuple[list[Path], list[str]]:
    """The data files of a folder, sorted, and the names of what is ignored; a file is itself."""
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise SystemExit(
                f"{path}: unknown kind of file; accepted: {' '.join(SUFFIXES)}, each also .gz, or a folder"
            )
        return [path], []
    inside = sorted(p for p in path.rglob("*") if p.is_file())
    visible = [
        p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)
    ]
    files = [p for p in visible if suffix_of(p) in SUFFIXES]
    if not files:
        raise SystemExit(
            f"{path}: no data file in this folder; accepted: {' '.join(SUFFIXES)}, each also .gz"
        )
    ignored = [str(p.relative_to(path)) for p in sorted(set(inside) - set(files))]
    return files, ignored[:10] + ([f"{len(ignored) - 10} more"] if len(ignored) > 10 else [])


@contextmanager
def _readable(path: Path):
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with _readable(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _open(path: Path):
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def encoding_of(path: Path) -> str:
    """utf-8 (with or without BOM), utf-16 by its BOM, else a vote of the lines between utf-8 and
    GB18030.

    The vote: GB18030 reads most UTF-8 Chinese as other characters, so one bad byte must not turn
    the whole file."""
    if suffix_of(path) == ".parquet":
        return "binary"
    with _readable(path), _open(path) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
            return "utf-8-sig"
        except UnicodeDecodeError:
            file.seek(0)
        votes, tails = 0, bytes(range(0x80, 0xC0))
        while line := file.readline(1 << 16).lstrip(
            tails
        ):  # a piece of a long line may begin inside a character
            try:
                votes += not codecs.utf_8_decode(line, "strict", False)[0].isascii()
            except UnicodeDecodeError:
                votes -= 1
    return "utf-8-sig" if votes >= 0 else "gb18030"


def _json_lines(lines) -> Iterator:
    for number, line in enumerate(lines, 1):
        if line := line.replace("\0", "").strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, BadRow("wrong JSON", getattr(error, "msg", "nested too deeply"))


def _json_objects(text, path: Path) -> Iterator:
    """A JSON array, or objects one after another, parsed one object at a time from a moving
    buffer."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[\]]*")
    buffer, at, line, ended = "", 0, 1, False
    while True:
        start = between.match(buffer, at).end()
        line += buffer.count("\n", at, start)
        at, end = start, 0
        try:
            if at < len(buffer):
                record, end = decode(buffer, at)
        except (ValueError, RecursionError) as error:
            wrong, why = getattr(error, "pos", at), getattr(error, "msg", str(error))
            cut_off = len(buffer) - wrong < 32 or why.startswith("Unterminated")
            if ended or not cut_off:
                line += buffer.count("\n", at, wrong)
                raise SystemExit(
                    f"{path}:{line}: wrong JSON ({why}); repair the file or fetch it again"
                ) from None
        if end:
            yield line, record
            line += buffer.count("\n", at, end)
            at = end
        elif ended:
            return
        else:  # doubling keeps the repeated parsing of one very long object linear
            more = text.read(max(1 << 16, len(buffer) - at))
            buffer, at, ended = buffer[at:] + more.replace("\0", ""), 0, not more


def _table(lines, path: Path) -> Iterator:
    """csv or tsv; the delimiter is the one that the header uses most, cells may hold line
    breaks."""
    lines = (line.replace("\0", "") for line in lines)
    header = next(lines, "")
    delimiter = "\t" if suffix_of(path) == ".tsv" else max(",\t;", key=header.count)
    csv.field_size_limit(1 << 30)
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    names, number = None, 1
    while True:
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if names is None:
                names = [cell.strip() for cell in cells]
            elif len(cells) == len(names):
                yield number, dict(zip(names, cells, strict=True))
            elif cells:
                yield (
                    number,
                    BadRow("wrong number of cells", f"{len(cells)}, the header has {len(names)}"),
                )
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise SystemExit(
                    f'{path}:{number}: a quote (") is opened here and never closed'
                ) from None
            yield number, BadRow("wrong csv quoting", str(error))
        number = reader.line_num + 1


def _parquet(path: Path) -> Iterator:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=500):
        for record in batch.to_pylist():
            number += 1
            yield number, record


def records(path: Path, encoding: str) -> Iterator:
    """(line or row number, record or BadRow) of one file. Bytes that do not decode become
    surrogates, found later."""
    suffix = suffix_of(path)
    with _readable(path):
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        newline = "" if suffix in (".csv", ".tsv") else None
        with io.TextIOWrapper(
            _open(path), encoding, errors="surrogateescape", newline=newline
        ) as text:
            if suffix in (".csv", ".tsv"):
                yield from _table(text, path)
            elif suffix == ".txt":
                yield from (
                    (n, {"text": t})
                    for n, line in enumerate(text, 1)
                    if (t := line.strip("\0 \t\n\u3000"))
                )
            else:
                head = text.read(1 << 16).strip("\0 \t\n")
                text.seek(0)
                spread = (
                    head.startswith("[") or head.split("\n", 1)[0].strip() == "{"
                )  # array, or indented objects
                yield from _json_objects(text, path) if spread else _json_lines(text)
