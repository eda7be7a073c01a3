"""Files -> records: paths with weights, folders, gz, encodings, readers that name the wrong line.

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

from common.data.progress import Progress
from common.data.shapes import BadRow

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
ACCEPTED = f"accepted: {' '.join(SUFFIXES)}, each also .gz"
TABLES = (".csv", ".tsv")
MIB = 1 << 20
LINE_BYTES = 1 << 16  # a longer line is looked at in pieces
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # inside a character of UTF-8, never its first


# ---- paths ---------------------------------------------------------------------------------------


def entries(data_path) -> list[tuple[Path, float | None]]:
    """Text like `a b` or `a:0.7 b:0.3`, or a list of such words -> paths with weights.

    The weight is None where none is given. SystemExit for what is not there.
    """
    found = [_entry(word) for word in _words(data_path)]
    if not found:
        raise SystemExit("no data path given")
    weights = [weight for _, weight in found]
    weighted = any(weight is not None for weight in weights)
    if weighted and not all(weights):
        raise SystemExit(
            "data weights: give every path a weight above 0 (a.jsonl:0.7 b.jsonl:0.3) "
            "or none of them"
        )
    return found


def _words(data_path) -> list[str]:
    if isinstance(data_path, Path):
        return [str(data_path)]
    if not isinstance(data_path, str):
        return [str(path) for path in data_path]
    words = data_path.split()
    if words and Path(data_path).expanduser().exists():
        return [data_path]  # one path, perhaps with spaces in its name
    return words


def _entry(word: str) -> tuple[Path, float | None]:
    path = Path(word).expanduser()
    weight = None
    weighted = re.fullmatch(r"(.+):(\d*\.?\d+)", word)
    if weighted and not path.exists():
        path = Path(weighted[1]).expanduser()
        weight = float(weighted[2])
    if not path.exists():
        raise SystemExit(
            f"{path}: no such file or folder (a data set of a hub must be downloaded first)"
        )
    return path, weight


def suffix_of(path: Path) -> str:
    """`.csv` of `a.CSV.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def data_files(path: Path) -> tuple[list[Path], list[str]]:
    """The data files of a folder, sorted, and the names of what is ignored; a file is itself."""
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise SystemExit(f"{path}: unknown kind of file; {ACCEPTED}, or a folder")
        return [path], []

    files = []
    ignored = []
    for file in sorted(path.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or suffix_of(file) not in SUFFIXES:
            ignored.append(str(name))
        else:
            files.append(file)
    if not files:
        raise SystemExit(f"{path}: no data file in this folder; {ACCEPTED}")
    if len(ignored) > 10:
        ignored[10:] = [f"{len(ignored) - 10} more"]
    return files, ignored


# ---- writing all or nothing ----------------------------------------------------------------------


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """`with atomic_file(path) as part`: write `part`, which becomes `path` when the block ends.

    A kill never leaves half a file under the name `path`; after an error `path` is as before.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """`with atomic_folder(path) as part`: fill `part`, which becomes `path` when the block ends.

    `part` is new and empty. An earlier folder `path` stays until then, and after an error.
    """
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


def check_empty(path: str | Path) -> None:
    """SystemExit where `path` is a file, or a folder with something in it."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SystemExit(f"{path} is not empty; choose another --output_dir")


def new_folder(path: str | Path):
    """`with new_folder(path) as part`: atomic_folder for a result; refuses to replace anything."""
    check_empty(path)
    return atomic_folder(path)


# ---- bytes ---------------------------------------------------------------------------------------


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with _readable(path), open(path, "rb") as file:
        size = path.stat().st_size // MIB
        with Progress(f"check {path.name}", total=size, unit="MiB") as progress:
            while block := file.read(MIB):
                digest.update(block)
                progress.update()
    return digest.hexdigest()


def _open(path: Path):
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def encoding_of(path: Path) -> str:
    """utf-8 (with or without BOM), utf-16 by its BOM, else what most lines are: utf-8 or GB18030.

    Lines vote, because GB18030 reads most UTF-8 Chinese as other characters: one bad byte must not
    turn the whole file.
    """
    if suffix_of(path) == ".parquet":
        return "binary"
    with _readable(path), _open(path) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        file.seek(0)
        if _is_utf8(file):
            return "utf-8-sig"
        file.seek(0)
        return "utf-8-sig" if _mostly_utf8(file) else "gb18030"


def _is_utf8(file) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while block := file.read(MIB):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _mostly_utf8(file) -> bool:
    votes = 0
    while piece := file.readline(LINE_BYTES):
        # a piece of a long line may begin inside a character
        line = piece.lstrip(CONTINUATION_BYTES)
        try:
            text, _ = codecs.utf_8_decode(line, "strict", False)
        except UnicodeDecodeError:
            votes -= 1
            continue
        if not text.isascii():
            votes += 1
    return votes >= 0


# ---- records -------------------------------------------------------------------------------------


def records(path: Path, encoding: str) -> Iterator:
    """(line or row number, record or BadRow) of one file.

    Bytes that do not decode become surrogates, which are found later.
    """
    with _readable(path):
        if suffix_of(path) == ".parquet":
            yield from _parquet(path)
        else:
            yield from _text_records(path, encoding)


def _parquet(path: Path) -> Iterator:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=500):
        for record in batch.to_pylist():
            number += 1
            yield number, record


def _text_records(path: Path, encoding: str) -> Iterator:
    suffix = suffix_of(path)
    newline = "" if suffix in TABLES else None  # the csv reader wants line ends as they are
    raw = _open(path)
    with io.TextIOWrapper(raw, encoding, errors="surrogateescape", newline=newline) as text:
        if suffix in TABLES:
            yield from _table(text, path)
        elif suffix == ".txt":
            yield from _text_lines(text)
        elif _is_one_per_line(text):
            yield from _json_lines(text)
        else:
            yield from _json_objects(text, path)


def _text_lines(lines) -> Iterator:
    for number, line in enumerate(lines, 1):
        line = line.strip("\0 \t\n\u3000")
        if line:
            yield number, {"text": line}


def _is_one_per_line(text) -> bool:
    """Whether a JSON file has an object a line: it is no array, and no indented object."""
    head = text.read(1 << 16).strip("\0 \t\n")
    text.seek(0)
    first_line = head.partition("\n")[0].strip()
    return not head.startswith("[") and first_line != "{"


def _json_lines(lines) -> Iterator:
    for number, line in enumerate(lines, 1):
        line = line.replace("\0", "").strip()
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = BadRow("wrong JSON", getattr(error, "msg", "nested too deeply"))
        yield number, record


def _json_objects(text, path: Path) -> Iterator:
    """A JSON array, or objects one after another: parsed one at a time from a moving buffer."""
    decode = json.JSONDecoder().raw_decode
    between = re.compile(r"[\s,\[\]]*")
    buffer = ""
    at = 0  # where the next object begins in the buffer
    line = 1  # and in which line of the file
    ended = False
    while True:
        start = between.match(buffer, at).end()
        line += buffer.count("\n", at, start)
        at = start
        end = 0
        try:
            if at < len(buffer):
                record, end = decode(buffer, at)
        except (ValueError, RecursionError) as error:
            wrong = getattr(error, "pos", at)
            why = getattr(error, "msg", str(error))
            perhaps_cut = len(buffer) - wrong < 32 or why.startswith("Unterminated")
            if ended or not perhaps_cut:
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
        else:
            # doubling keeps the repeated parsing of one very long object linear
            more = text.read(max(1 << 16, len(buffer) - at))
            ended = not more
            buffer = buffer[at:] + more.replace("\0", "")
            at = 0


def _table(lines, path: Path) -> Iterator:
    """csv or tsv; the delimiter is what the header uses most, cells may hold line breaks."""
    lines = (line.replace("\0", "") for line in lines)
    header = next(lines, "")
    delimiter = "\t" if suffix_of(path) == ".tsv" else max(",\t;", key=header.count)
    csv.field_size_limit(1 << 30)
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    names = None
    number = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise SystemExit(
                    f'{path}:{number}: a quote (") is opened here and never closed'
                ) from None
            yield number, BadRow("wrong csv quoting", str(error))
            number = reader.line_num + 1
            continue
        if cells is None:
            return
        if names is None:
            names = [cell.strip() for cell in cells]
        elif len(cells) == len(names):
            yield number, dict(zip(names, cells, strict=True))
        elif cells:
            counts = f"{len(cells)}, the header has {len(names)}"
            yield number, BadRow("wrong number of cells", counts)
        number = reader.line_num + 1
