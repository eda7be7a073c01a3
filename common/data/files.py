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

from common.data import encodings
from common.data.progress import Progress
from common.data.records import is_turn, is_turns
from common.data.shapes import SHAPES, detect
from common.data.turns import BadRow

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
ACCEPTED = f"accepted: {' '.join(SUFFIXES)}, each also .gz"
TABLES = (".csv", ".tsv")
SHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".et", ".numbers")
# beside the data of a folder, about them
DESCRIPTIONS = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "danpu_manifest.json",
)
# under these keys the rows of a file may stand beside what is said of it
WRAPPERS = {
    "data",
    "dataset",
    "dialogs",
    "dialogues",
    "examples",
    "instances",
    "items",
    "list",
    "records",
    "results",
    "rows",
    "samples",
    "test",
    "train",
    "validation",
}
# what columns are called
COLUMNS = {
    word.strip("():")
    for table in SHAPES.values()
    for shape in table
    for word in re.split(r",? ", shape.columns)
}
# words of names that set files of a folder apart
HELD_OUT = re.compile(
    r"(test|valid|validation|val|dev|eval)(set|ing|data)?\d*|.*(测试|验证).*", re.I
)
TRAIN = re.compile(r"train(set|ing|data)?\d*|.*训练.*", re.I)
MIB = 1 << 20
HEAD = 1 << 16  # characters in which the layout of a JSON file is recognised
BOM = "\ufeff"  # stands inside a file too, where several were joined


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
        if suffix_of(path) in SHEETS:
            raise SystemExit(f"{path}: {_export(path)}")
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
        if suffix_of(file) in SHEETS and not hidden:
            ignored.insert(0, f"{name} ({_export(file)})")
        elif hidden or suffix_of(file) not in SUFFIXES or name.name in DESCRIPTIONS:
            ignored.append(str(name))
        else:
            files.append(file)
    if not files:
        sheets = f"; {ignored[0]}" if ignored and "(" in ignored[0] else ""
        raise SystemExit(f"{path}: no data file in this folder; {ACCEPTED}{sheets}")
    if len(ignored) > 10:
        ignored[10:] = [f"{len(ignored) - 10} more"]
    return files, ignored


def _export(path: Path) -> str:
    return (
        f"a spreadsheet is not read; save it as CSV UTF-8 in Excel or WPS, or "
        f"pandas.read_excel({path.name!r}).to_csv({path.stem + '.csv'!r}, index=False)"
    )


def held_out_files(path: Path, files: list[Path]) -> list[Path]:
    """Which files of a folder its names set apart for tests and validation: test.jsonl, val/0.csv,
    data-dev.json … beside others. None of a file that was named itself."""
    apart = [file for file in files if path.is_dir() and _is_held_out(file.relative_to(path))]
    return apart if len(apart) < len(files) else []


def says_held_out(path: Path) -> bool:
    """Whether the name of a file or folder says that it is for tests or validation."""
    return _is_held_out(Path(path.name))


def _is_held_out(name: Path) -> bool:
    """By the name of the file or, where that says nothing, by those of its folders."""
    words = re.split(r"[-_. ]+", name.name.split(".")[0])
    words = [word for word in words if word not in ("", "of") and not word.isdigit()]
    if any(TRAIN.fullmatch(word) for word in words):
        return False
    if any(HELD_OUT.fullmatch(word) for word in words[:1] + words[-1:]):
        return True
    return any(HELD_OUT.fullmatch(part) for part in name.parts[:-1])


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
    """utf-8 (with or without BOM), utf-16 or utf-32 by their BOM, else the best guess.

    SystemExit where none is good; `guess` says what was guessed.
    """
    if suffix_of(path) == ".parquet":
        return "binary"
    with _readable(path), _open(path) as file:
        return encodings.detect(file)


def told_encoding(path: Path) -> str:
    """encoding_of, and a line for people where it is a guess."""
    encoding = encoding_of(path)
    said = guess(path, encoding)
    if said:
        print(said, flush=True)
    return encoding


def guess(path: Path, encoding: str) -> str:
    """What there is to say about an encoding that was guessed, with an example; else ""."""
    if not encodings.is_guess(encoding):
        return ""
    codec = codecs.lookup(encoding)
    with _open(path) as file, codec.streamreader(file, errors="replace") as text:
        shown = next((line for line in text if not line.isascii()), "")
    shown = encodings.around(shown)
    return f"{path}: read as {encoding}, e.g. {shown!r}; if that is wrong, save it as UTF-8"


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
        else:
            yield from _json(text, path)


def _text_lines(lines) -> Iterator:
    for number, line in enumerate(lines, 1):
        line = line.strip("\0 \t\n\u3000" + BOM)
        if line:
            yield number, {"text": line}


# ---- JSON ----------------------------------------------------------------------------------------


def _json(text, path: Path) -> Iterator:
    """An object a line, objects one after another, an array of them, lists of turns, or one object
    that holds all rows."""
    head = text.read(HEAD)
    text.seek(0)
    head = head.strip("\0 \t\n" + BOM)
    if head.startswith("["):
        found = _json_objects(text, path, *_lists(head))
    elif _is_one_per_line(head):
        found = _json_lines(text)
    else:
        found = _json_objects(text, path)
    yield from _unwrapped(found, path)


def _is_one_per_line(head: str) -> bool:
    """Whether one of the first two lines is JSON of its own (a bad one may stand beside it), or
    there is but one."""
    lines = [line for line in head.split("\n") if line.strip()]
    if len(lines) < 2 or not head.startswith("{"):
        return True
    for line in lines[:2]:
        try:
            if isinstance(json.loads(line), dict | list):
                return True
        except (ValueError, RecursionError):
            continue
    try:
        json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError) as error:
        return getattr(error, "pos", 0) < len(lines[0])  # the first line is wrong by itself
    return False


def _lists(head: str) -> tuple[bool, bool]:
    """Of a file that begins with `[`: (whether its records are lists of turns, whether these stand
    in an array)."""
    inner = head[1:].lstrip("\0 \t\n")
    if inner.startswith("["):
        return True, True
    try:
        first, _ = json.JSONDecoder().raw_decode(inner)
    except (ValueError, RecursionError):
        first = None  # longer than the head
    return is_turn(first), False


def _json_lines(lines) -> Iterator:
    for number, line in enumerate(lines, 1):
        line = line.replace("\0", "").strip().strip(BOM)
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = BadRow("wrong JSON", getattr(error, "msg", "nested too deeply"))
        yield number, record


def _json_objects(text, path: Path, lists: bool = False, in_array: bool = False) -> Iterator:
    """The values of one or more arrays, or those that stand one after another: parsed one at a
    time from a moving buffer.

    lists: a value is a list itself; in_array: those stand in an array.
    """
    decode = json.JSONDecoder().raw_decode
    # brackets are skipped, unless values begin with one
    between = re.compile(r"[\s,\]\ufeff]*" if lists else r"[\s,\[\]\ufeff]*")
    opening = re.compile(r"[\s\ufeff]*\[") if in_array else None
    buffer = ""
    at = 0  # where the next object begins in the buffer
    line = 1  # and in which line of the file
    ended = False
    while True:
        if opening and (opened := opening.match(buffer)):
            line += buffer.count("\n", 0, opened.end())
            at = opened.end()
            opening = None
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


# ---- one object that holds all rows --------------------------------------------------------------


def _unwrapped(found: Iterator, path: Path) -> Iterator:
    """(line, record) as they come; where a file is but one object, the rows that stand in it."""
    first = next(found, None)
    if first is None:
        return
    second = next(found, None)
    if second is not None or not isinstance(first[1], dict):
        yield first
        if second is not None:
            yield second
        yield from found
        return
    line, record = first
    rows = _rows_of(record, path)
    if rows is None:
        yield line, record
    else:
        # rows have numbers here: in which line each stands is not known any more
        yield from enumerate(rows, 1)


def _rows_of(record: dict, path: Path) -> list | None:
    """The rows that a single object holds: by columns, by row, or as a list beside other keys; None
    where it is a row itself."""
    values = list(record.values())
    if not values:
        return None
    if all(isinstance(value, dict) for value in values):
        return _rows_of_dicts(record)
    columns = record.get("columns")
    lists = record.get("data")
    if isinstance(columns, list) and isinstance(lists, list):  # pandas, orient=split
        return [dict(zip(columns, cells, strict=False)) for cells in map(_as_cells, lists)]
    if all(isinstance(value, list) and not is_turns(value) for value in values):
        sizes = {len(value) for value in values}
        is_named = all(_is_rows(value) for value in values)  # {"train": [...], "test": [...]}
        if len(sizes) == 1 and sizes != {0} and not is_named:
            return [dict(zip(record, cells, strict=True)) for cells in zip(*values, strict=True)]
    lists = {
        name: value
        for name, value in record.items()
        if _is_rows(value) and (name.lower() in WRAPPERS or len(record) == 1)
    }
    if not lists or any(detect(kind, [record]) for kind in SHAPES):
        return None
    if len(lists) > 1:
        raise SystemExit(
            f"{path}: holds several lists of rows ({', '.join(lists)}); write each into a file of "
            "its own"
        )
    return next(iter(lists.values()))


def _rows_of_dicts(record: dict) -> list | None:
    """Of {column: {row: cell}} or {row: {column: cell}}, as pandas writes them."""
    inner = list(record.values())
    if all(value and all(str(key).isdigit() for key in value) for value in inner):
        numbers = list(dict.fromkeys(key for value in inner for key in value))
        return [{column: record[column].get(key) for column in record} for key in numbers]
    same = {frozenset(value) for value in inner}
    if len(same) == 1 and (len(inner) > 1 or next(iter(record)).isdigit()):
        return inner
    return None


def _as_cells(value) -> list:
    return value if isinstance(value, list) else [value]


def _is_rows(value) -> bool:
    if not isinstance(value, list) or not value or is_turns(value):
        return False
    return all(isinstance(item, dict) or is_turns(item) for item in value)


# ---- tables --------------------------------------------------------------------------------------


def _table(lines, path: Path) -> Iterator:
    """csv or tsv; the delimiter is what the header uses most, cells may hold line breaks.

    Before the header blank lines may stand and Excel's `sep=;`. Where tables were joined, headers
    stand between the rows.
    """
    lines = (line.replace("\0", "").removeprefix(BOM) for line in lines)
    number, delimiter, header = _header(lines)
    if suffix_of(path) == ".tsv":
        delimiter = "\t"
    csv.field_size_limit(1 << 30)
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    names = None
    offset = number - 1  # lines before the header
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise SystemExit(
                    f'{path}:{number}: a quote (") is opened here and never closed'
                ) from None
            yield number, BadRow("wrong csv quoting", str(error))
            number = offset + reader.line_num + 1
            continue
        if cells is None:
            return
        stripped = [cell.strip() for cell in cells]
        is_header = names is None or (any(stripped) and sorted(stripped) == sorted(names))
        if is_header:
            names = _column_names(stripped, path)
        elif len(cells) > 1 and COLUMNS.issuperset(stripped):
            names = stripped
            shown = ", ".join(stripped)
            yield number, BadRow("a header of other columns inside the file", shown[:80])
        elif len(cells) == len(names):
            yield number, dict(zip(names, map(_line_ends, cells), strict=True))
        elif any(stripped):
            counts = f"{len(cells)}, the header has {len(names)}"
            yield number, BadRow("wrong number of cells", counts)
        number = offset + reader.line_num + 1


def _header(lines: Iterator[str]) -> tuple[int, str, str]:
    """-> (number of the first line that is neither blank nor `sep=;`, the delimiter, that line)."""
    separator = ""
    for number, line in enumerate(lines, 1):
        told = re.fullmatch(r"\"?sep=(.)\"?\s*", line, re.I)
        if told and not separator:
            separator = told[1]
        elif line.strip(" \t\r\n,;"):
            return number, separator or max(",\t;", key=line.count), line
    return 1, ",", ""


def _column_names(cells: list[str], path: Path) -> list[str]:
    """SystemExit where two columns have one name; what is no name may stand twice (a table without
    header, for who reads these)."""
    twice = [name for name in cells if name.isidentifier() and cells.count(name) > 1]
    if twice:
        raise SystemExit(f"{path}: the header has two columns {twice[0]!r}; rename one of them")
    return cells


def _line_ends(cell: str) -> str:
    return cell.replace("\r\n", "\n").replace("\r", "\n")
