"""Pairs of text and picture from what people have: tables, conversations, folders, tars,
Chinese-CLIP's files.

    rows, stats = load_pairs("a.csv photos/ shards:0.3", image_root="/data/pictures")

No picture is opened and nothing is unpacked: a row says where its picture lies (pictures.Place).
No torch, no process group: N ranks may call everything at once, one works and the others wait.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from common.data import encodings, files, load, pictures, records, shapes, turns
from common.data.cache import cached
from common.data.pictures import SUFFIXES, PictureError, Place, tar_members, tsv_pictures
from common.data.progress import Progress
from common.data.turns import BadRow

HERE = Path(__file__).resolve().parent
# an edited reader makes new rows
VERSION = "".join(
    [load.VERSION, *(files.sha256(Path(file))[:8] for file in (__file__, pictures.__file__))]
)
# what columns are called, in the order of preference; a caption said to be Chinese goes first
TEXTS = (
    *("zh_prompt", "caption_zh", "zh_caption", "text_zh", "chinese", "text", "caption", "captions"),
    *("texts", "prompt", "sentence", "sentences", "description", "title"),
    *("文本", "描述", "标题", "图片描述"),
)
PICTURES = (
    *("image", "images", "image_path", "img_path", "img", "file_path", "filepath", "file_name"),
    *(
        "filename",
        "path",
        "picture",
        "image_file",
        "image_name",
        "图片",
        "图像",
        "图片路径",
        "路径",
    ),
)
ADDRESSES = ("url", "image_url", "img_url", "urls", "link", "链接")
CONVERSATIONS = records.DIALOGUES
ABOUT = (  # beside the data, about them
    *("labels_cn.txt", "templates_cn.txt", "README.md", "README.txt", "LICENSE"),
    "manifest.jsonl",  # of download_images.py
)
SIDECARS = (".txt", ".caption", ".json")  # beside a picture, or in a tar
MAX_NAME = 1024  # characters; longer is no name of a file
MAX_CAPTION = 1 << 20  # bytes of one caption
HEAD = 50  # records from which the columns of a table are known
BATCH_ROWS = 1000
WHOLE = 64 << 20  # bytes; of larger files only both ends are part of their stamp
MIXING = 6364136223846793005  # odd and large: Knuth's multiplier
LABELS = 4  # so many pictures a text on average: the texts are labels, not captions


class Found(NamedTuple):
    """One pair. key: the picture's name within all data, the same on every machine; two files of
    one name in different folders are different pictures."""

    text: str
    place: Place
    key: str


class Source(NamedTuple):
    """A part of the data that is read in one way.

    kind: "table", "tar", "chinese-clip", "captions" (a text beside each picture) or "classes" (a
        folder for each).
    files: what is read; of the last two kinds, the pictures.
    """

    kind: str
    path: Path
    files: list[Path]
    held_out: bool


class Where(NamedTuple):
    """root: where relative names of pictures begin, and out of which none may lead ("": beside the
    data file, no bound); base: the folder of all data, absolute, from which a picture has its
    key."""

    root: str
    base: Path
    renames: dict[str, str]


# ---- all of it -----------------------------------------------------------------------------------


def load_pairs(
    data_path,
    image_root: str | Path = "",
    column_map=None,
    strict: bool = False,
    cache_dir=None,
    seed: int = 0,
    missing_limit: float = 0.2,
):
    """Files, folders or several of them -> (datasets.Dataset, stats), as common's load_rows.

    data_path: path, "a b", "a:0.7 b:0.3", or a list of such: csv, tsv, json, jsonl, parquet with a
        text and a picture's file a row (or conversations about one); a folder of these, of classes
        or of pictures with a text beside each; webdataset tars; Chinese-CLIP's *_texts.jsonl with
        *_imgs.tsv.
    image_root: where relative names of pictures begin; what lies outside is refused. Without it
        they begin at the folder of the file that names them.
    column_map: "text=标题,image=图片".
    missing_limit: share of pictures that may be missing; the others' rows stay, and another row
        stands in when one is opened (batches.py).

    Columns: text, place (a dict, for pictures.Place), source ("file:line"), text_hash and
    picture_hash (int64, of the normalised text and of the picture's name in the data), held_out
    (bool, by the file's name) and prompt_key (int64): rows that share a text or a picture, also by
    way of others, have one key, so that split.split_rows keeps them on one side. Where texts are
    labels of many pictures (LABELS), only the picture counts.
    stats: as those of load_rows; missing {count, first}, texts, pictures, split_by besides.
    SystemExit with one line for everything the user has to repair.
    """
    from datasets import concatenate_datasets

    entries = files.entries(data_path)
    if image_root and not Path(image_root).is_dir():
        raise SystemExit(f"--image_root {image_root}: no such folder")
    where = Where(
        os.path.abspath(image_root) if image_root else "",
        _common_folder([path for path, _ in entries]),
        load.column_renames(column_map),
    )
    parts = []
    all_stats = []
    for path, _ in entries:
        part, part_stats = _load(path, where, strict, cache_dir)
        parts.append(part)
        all_stats.append(part_stats)
    stats = load.merged(all_stats)
    if len(parts) > 1:
        parts = _each_pair_once(parts, stats, strict)

    weights = [weight for _, weight in entries]
    if weights[0] is not None:  # files.entries: all or none
        parts = load.drawn(parts, weights, seed)
        parts = [part.flatten_indices(keep_in_memory=True) for part in parts]
    rows = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    stats["not_drawn"] = stats["used"] - len(rows)
    stats["used"] = len(rows)

    stats["missing"] = _missing(rows)
    _refuse_missing(stats, missing_limit)
    keys, stats["split_by"] = _split_keys(rows)
    columns = rows.select_columns(["text_hash", "picture_hash"]).with_format("numpy")[:]
    stats["texts"] = len(np.unique(columns["text_hash"]))
    stats["pictures"] = len(np.unique(columns["picture_hash"]))
    return rows.add_column("prompt_key", keys), stats


def _each_pair_once(parts: list, stats: dict, strict: bool) -> list:
    """The parts without the rows that an earlier one has too, which are counted."""
    seen = np.empty(0, dtype=np.int64)
    kept = []
    for part in parts:
        columns = part.select_columns(["text_hash", "picture_hash"]).with_format("numpy")[:]
        pairs = columns["text_hash"] * MIXING + columns["picture_hash"]  # of both, modulo 2**64
        again = np.isin(pairs, seen)
        for number in np.flatnonzero(again):
            bad = BadRow("duplicate row", "another file has the same picture with the same text")
            load.drop(stats, part[int(number)]["source"], bad, strict)
        stats["used"] -= int(again.sum())
        kept.append(part.select(np.flatnonzero(~again)) if again.any() else part)
        seen = np.concatenate([seen, pairs])
    return kept


def describe(stats: dict) -> str:
    """The lines to print about a load."""
    lines = [
        load.summary(stats),
        f"pairs: {stats['texts']:,} different texts, {stats['pictures']:,} pictures",
    ]
    if stats["split_by"] == "picture":
        lines.append("  texts are labels here: rows are split by their pictures alone")
    missing = stats["missing"]
    if missing["count"]:
        lines.append(f"  {missing['count']:,} pictures are missing, e.g. {missing['first'][0]}")
    return "\n".join(lines)


def _common_folder(paths: list[Path]) -> Path:
    """Of one path the folder that it is or lies in; of several the smallest one with all these."""
    folders = [path if path.is_dir() else path.parent for path in paths]
    return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))


def _load(path: Path, where: Where, strict: bool, cache_dir):
    """One path of the command line -> (Dataset, stats), from the cache where it is known."""
    sources, ignored = _sources(path)
    stamps = [_stamp(source) for source in sources]
    apart = [str(source.path) for source in sources if source.held_out]
    told = [(kind, str(file), stamp) for kind, file, stamp, _ in stamps]
    # rows hold absolute places, and name their sources as they were typed
    typed = [str(path), os.path.abspath(path), str(where.base)]
    key = json.dumps(["pairs", VERSION, where.root, where.renames, told, apart, typed])

    def build(folder: Path) -> dict:
        stats = load.no_stats()
        seen: set[int] = set()
        rows = (_rows(source, where, stats, strict, seen) for source in sources)
        _write(chain.from_iterable(rows), folder / "rows.arrow")
        load.refuse_useless(path, stats)
        same = json.dumps([identity for *_, identity in stamps])
        return stats | {"sha256": hashlib.sha256(same.encode()).hexdigest()}

    dataset, stats = cached(key, build, cache_dir)
    if strict and stats["dropped"]:
        example = stats["examples"][next(iter(stats["dropped"]))]
        raise SystemExit(f"{example}; strict data was asked for")
    stats["ignored"] = ignored + stats["ignored"]
    stats["set_apart"] = apart
    return dataset, stats


def _rows(
    source: Source, where: Where, stats: dict, strict: bool, seen: set[int]
) -> Iterator[dict]:
    """The usable rows of one source; everything else is counted in `stats`."""
    readers = {
        "table": _table,
        "tar": _tar,
        "chinese-clip": _chinese_clip,
        "captions": _captions,
        "classes": _classes,
    }
    with Progress(f"read {source.path.name}") as progress:
        for place, found in readers[source.kind](source, where, stats):
            progress.update()
            pairs = [found] if isinstance(found, BadRow) else found
            for pair in pairs:
                stats["read"] += 1
                try:
                    row = _row(pair, place, source.held_out, seen)
                except BadRow as bad:
                    load.drop(stats, _shown(place), bad, strict)
                    continue
                stats["used"] += 1
                yield row


def _row(pair: Found | BadRow, source: str, held_out: bool, seen: set[int]) -> dict:
    if isinstance(pair, BadRow):
        raise pair
    text = tidy(pair.text)
    if not text:
        raise BadRow("no text")
    try:
        (text + str(pair.place)).encode()
    except UnicodeEncodeError:
        raise BadRow("broken characters", "bytes of another encoding") from None
    text_hash = text_key(text)
    picture_hash = load.prompt_key(pair.key)
    both = hash((text_hash, picture_hash))
    if both in seen:
        raise BadRow("duplicate row", "the same picture with the same text")
    seen.add(both)
    return {
        "text": text,
        "place": vars(pair.place),  # asdict is ten times as slow
        "source": _shown(source),
        "text_hash": text_hash,
        "picture_hash": picture_hash,
        "held_out": held_out,
    }


def tidy(text: str) -> str:
    return " ".join(text.replace("\0", "").split())


def text_key(text: str) -> int:
    """int64, the same for captions that say the same."""
    return load.prompt_key(shapes.normalise(text).casefold())


def _shown(name: str) -> str:
    """A file's name may hold bytes of another encoding."""
    return name.encode(errors="replace").decode()


def _write(rows: Iterator[dict], path: Path) -> None:
    """Rows one by one -> an Arrow stream file."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    place = dict(path=text, form=text, offset=number, size=number, name=text, root=text)
    schema = pa.schema(
        [
            ("text", text),
            ("place", pa.struct(list(place.items()))),
            ("source", text),
            ("text_hash", number),
            ("picture_hash", number),
            ("held_out", pa.bool_()),
        ]
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(islice(rows, BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


# ---- which files are read how --------------------------------------------------------------------


def _sources(path: Path) -> tuple[list[Source], list[str]]:
    """-> (what a path holds, names of what is ignored). SystemExit where it holds nothing."""
    if path.is_dir():
        return _sources_of_folder(path)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        raise SystemExit(f"{path}: one picture is no data set; name its folder")
    if path.name.endswith((".tar.gz", ".tgz")):
        raise SystemExit(f"{path}: a compressed tar cannot be read by offset; gunzip it first")
    if suffix == ".tar":
        return [Source("tar", path, [path], False)], []
    if texts := _texts_of(path):
        return [Source("chinese-clip", texts, [texts, _pictures_of(texts)], False)], []
    if suffix in (".txt", ".lst"):
        raise SystemExit(
            f"{path}: a text file has no pictures; a list of addresses is fetched with "
            "download_images.py"
        )
    return [Source("table", file, [file], False) for file in files.data_files(path)[0]], []


def _texts_of(path: Path) -> Path | None:
    """The *_texts.jsonl that a file of Chinese-CLIP's layout belongs to; SystemExit where its other
    half is missing."""
    if path.name.endswith("_imgs.tsv"):
        texts = _words_of(path)
        if not texts.is_file():
            raise SystemExit(f"{path}: no {texts.name} beside it")
        return texts
    if not path.name.endswith("_texts.jsonl"):
        return None
    if not _pictures_of(path).is_file():
        raise SystemExit(f"{path}: no {_pictures_of(path).name} beside it")
    return path


def _words_of(pictures: Path) -> Path:
    return pictures.with_name(pictures.name.removesuffix("_imgs.tsv") + "_texts.jsonl")


def _pictures_of(texts: Path) -> Path:
    return texts.with_name(texts.name.removesuffix("_texts.jsonl") + "_imgs.tsv")


def _sources_of_folder(path: Path) -> tuple[list[Source], list[str]]:
    found = list(_walk(path))
    pictures = [file for file in found if file.suffix.lower() in SUFFIXES]
    stems = {file.with_suffix("") for file in pictures}
    named = []
    ignored = []
    sidecars = []
    for file in found:
        if file.suffix.lower() in SUFFIXES or file.name in ABOUT:
            continue
        if file.suffix.lower() in SIDECARS and file.with_suffix("") in stems:
            sidecars.append(file)
        elif kind := _kind_of(file):
            named.append(Source(kind, file, [file], False))
        elif not file.name.endswith("_imgs.tsv"):
            ignored.append(str(file.relative_to(path)))
        elif not _words_of(file).is_file():
            ignored.append(f"{file.relative_to(path)} (no {_words_of(file).name} beside it)")
    if len(ignored) > 10:
        ignored[10:] = [f"{len(ignored) - 10} more"]
    if named:
        apart = files.held_out_files(path, [source.path for source in named])
        return [_completed(source, source.path in apart) for source in named], ignored
    if not pictures:
        raise SystemExit(
            f"{path}: neither tables ({' '.join(files.SUFFIXES)}) nor tars nor pictures in it"
        )
    kind = "captions" if sidecars else "classes"
    if kind == "classes" and all(file.parent == path for file in pictures):
        raise SystemExit(
            f"{path}: {len(pictures):,} pictures without a word about them; put a text beside each "
            f"({pictures[0].stem}.txt), or each into a folder of its class"
        )
    return _by_side(kind, path, pictures), ignored


def _walk(path: Path) -> Iterator[Path]:
    """The files of a folder, links followed, hidden ones passed over."""
    seen = set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _kind_of(file: Path) -> str:
    if not file.is_file():  # a pipe would wait for its writer
        return ""
    if file.suffix.lower() == ".tar":
        return "tar"
    if file.name.endswith("_texts.jsonl"):
        return "chinese-clip"
    if file.name.endswith("_imgs.tsv") or file.name in files.DESCRIPTIONS:
        return ""
    is_table = files.suffix_of(file) in files.SUFFIXES and files.suffix_of(file) != ".txt"
    return "table" if is_table else ""


def _completed(source: Source, held_out: bool) -> Source:
    paths = source.files
    if source.kind == "chinese-clip":
        paths = [source.path, _pictures_of(_texts_of(source.path))]
    return source._replace(files=paths, held_out=held_out)


def _by_side(kind: str, path: Path, pictures: list[Path]) -> list[Source]:
    """Pictures to train on, and those of folders that names set apart (test/, val/)."""
    folders = sorted({file.parent for file in pictures})
    apart = {file.parent for file in files.held_out_files(path, [f / "pictures" for f in folders])}
    sides = []
    for held_out in (False, True):
        side = [file for file in pictures if (file.parent in apart) == held_out]
        if side:
            sides.append(Source(kind, path, side, held_out))
    return sides


def _stamp(source: Source) -> tuple[str, Path, str, str]:
    """(kind, path, what changes when a file does, what is the same on another machine)."""
    stamps = []
    identities = []
    for file in source.files:
        parts = [file]
        if source.kind == "captions":
            parts += [text for text in map(file.with_suffix, SIDECARS) if text.is_file()]
        for part in parts:
            try:
                stat = part.stat()
            except OSError as error:
                raise SystemExit(f"{part}: cannot be read: {error.strerror}") from None
            by_content = source.kind not in ("captions", "classes")
            content = _content(part, stat.st_size) if by_content else ""
            name = part.name if by_content else os.path.relpath(part, source.path)
            identities.append([_shown(name), stat.st_size, content])
            stamps.append([os.fspath(part), stat.st_size, stat.st_mtime_ns, content])
    digests = [hashlib.sha256(json.dumps(s).encode()).hexdigest() for s in (stamps, identities)]
    return source.kind, source.path, *digests


def _content(file: Path, size: int) -> str:
    if size <= WHOLE:
        return files.sha256(file)
    with open(file, "rb") as opened:
        head = opened.read(files.MIB)
        opened.seek(-files.MIB, os.SEEK_END)
        return hashlib.sha256(head + opened.read()).hexdigest()


# ---- tables --------------------------------------------------------------------------------------


def _table(source: Source, where: Where, stats: dict) -> Iterator:
    file = source.path
    encoding = files.encoding_of(file)
    found = files.records(file, encoding)
    start = list(islice(found, HEAD))
    if not start:
        stats["ignored"].append(f"{file} (no rows)")
        return
    head = records.usable([record for _, record in start])
    columns = _columns(file, head, where.renames) if head else ("", "", "none")
    text, picture, stats["shapes"][str(file)] = columns
    stats["encodings"][str(file)] = encoding.removesuffix("-sig")
    if guess := files.guess(file, encoding):
        stats["guesses"].append(guess)
    placed = partial(_place, base=file.parent.absolute(), where=where)
    for number, record in chain(start, found):
        try:
            record = load.renamed(records.as_record(record), where.renames)
            yield f"{file}:{number}", _found(record, text, picture, placed, stats)
        except BadRow as bad:
            yield f"{file}:{number}", bad


def _columns(file: Path, head: list[dict], renames: dict[str, str]) -> tuple[str, str, str]:
    """-> (column of the text, or of the conversation; that of the picture; both as the shape's
    name). SystemExit where one is missing."""
    seen = list(dict.fromkeys(chain(*head)))
    shown = ", ".join(str(name)[:40] for name in seen[:20])
    absent = [name for name in renames if name not in seen]
    if absent:
        raise SystemExit(
            f"{file}: column_map: no column {', '.join(absent)}; columns seen: {shown}"
        )
    head = [load.renamed(record, renames) for record in head]
    filled = [name for name in chain(*head) if any(row.get(name) for row in head)]
    lower = {str(name).lower(): name for name in reversed(filled)}
    mapped = set(renames.values())  # what was named by the user goes first

    def first(names: tuple[str, ...]) -> str:
        ordered = sorted(names, key=lambda name: name not in mapped)
        return next((lower[name] for name in ordered if name in lower), "")

    picture = first(PICTURES)
    text = first(CONVERSATIONS) if picture else ""
    text = text or first(TEXTS)
    if not picture and first(ADDRESSES):
        raise SystemExit(
            f"{file}: its pictures are addresses (column {first(ADDRESSES)}); fetch them: python "
            f"{HERE.name}/download_images.py {file} FOLDER"
        )
    if "image_ids" in lower and not picture:
        raise SystemExit(f"{file}: rows with image_ids; name it X_texts.jsonl beside X_imgs.tsv")
    if not picture:
        raise SystemExit(
            f"{file}: no picture column; columns seen: {shown}; accepted: "
            f"{', '.join(PICTURES[:8])} …; name yours with --column_map image=THEIRS"
        )
    if not text:
        raise SystemExit(
            f"{file}: no text column; columns seen: {shown}; accepted: {', '.join(TEXTS[:8])} …, "
            "conversations; name yours with --column_map text=THEIRS"
        )
    return text, picture, f"{text}/{picture}"


def _found(record: dict, text: str, picture: str, placed, stats: dict) -> list[Found]:
    """The pairs of one record: every text with every picture of it."""
    names = [_name(value) for value in turns.as_list(_opened(record.get(picture)))]
    if text in CONVERSATIONS:
        if len(names) > 1:
            raise BadRow("several pictures in one conversation")
        texts = [_said_of_picture(record, text, stats)]
    else:
        texts = texts_of(record.get(text))
    if not names:
        raise BadRow("no picture named", f"column {picture} is empty")
    places = [placed(name) for name in names]
    return [Found(said, place, key) for said in texts for place, key in places]


def _opened(value):
    """A list that stands in a cell of csv as text, None and "" as no element."""
    if turns.is_absent(value) or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return turns.from_text(value)
        except ValueError:
            return value
    return value


def texts_of(value) -> list[str]:
    """A text or several; Karpathy's sentences hold theirs in `raw`."""
    texts = [
        item.get("raw", item.get("caption")) if isinstance(item, dict) else item
        for item in turns.as_list(_opened(value))
    ]
    if not texts:
        raise BadRow("no text")
    return [turns.text_in({"text": text}, "text") for text in texts]


def _said_of_picture(record: dict, column: str, stats: dict) -> str:
    """The first answer of a conversation."""
    record, _ = records.tidy(record)
    messages, _ = turns.messages_of(record.get(column), record)
    said = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if not said:
        raise BadRow("no text", "nothing is said of the picture")
    if len(said) > 1:
        note = "only the first answer is taken"
        stats["changed"][note] = stats["changed"].get(note, 0) + 1
        stats["examples"].setdefault(note, said[0][:40])
    return said[0]


def _name(value) -> str:
    if isinstance(value, dict):  # the Hub's Image column
        if value.get("bytes"):
            raise BadRow("a picture inside a table", "write it to a file, or into *_imgs.tsv")
        value = value.get("path") or value.get("url")
    if not isinstance(value, str) or not value.strip():
        raise BadRow("no picture named", f"{type(value).__name__} in its column")
    value = value.strip()
    if value.startswith(("http://", "https://", "//")):
        raise BadRow("a web address", f"fetch it: {HERE.name}/download_images.py")
    if value.startswith("data:") or len(value) > MAX_NAME:
        raise BadRow("a picture inside a table", "write it to a file, or into *_imgs.tsv")
    if "\0" in value:
        raise BadRow("no picture named", "a name with a zero in it")
    return value


def _place(name: str, base: Path, where: Where) -> tuple[Place, str]:
    """-> (where a picture lies that a row names, its key)."""
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://"))
    name = os.path.normpath(name.replace("\\", "/"))
    path = os.path.normpath(os.path.join(where.root or base, name))
    if where.root and os.path.commonpath([where.root, path]) != where.root:
        raise BadRow("outside the picture folder", f"{name[:80]} is not in {where.root}")
    return Place(path, root=where.root), _key(path, where)


def _key(path: str, where: Where) -> str:
    """Of a picture that is a file of its own."""
    return os.path.relpath(path, where.root or where.base)


# ---- pictures with a text beside them ------------------------------------------------------------


def _captions(source: Source, where: Where, stats: dict) -> Iterator:
    stats["shapes"][str(source.path)] = "picture with text beside it"
    stats["encodings"][str(source.path)] = "utf-8"
    for file in source.files:
        text = next((t for t in map(file.with_suffix, SIDECARS) if t.is_file()), None)
        if text is None:
            yield str(file), BadRow("no text beside the picture", f"{file.stem}.txt")
            continue
        try:
            with open(text, "rb") as opened:
                said = _captions_in(opened.read(MAX_CAPTION), text.name, where.renames)
            yield str(file), _with_place(file, said, where)
        except BadRow as bad:
            yield str(text), bad
        except OSError as error:
            yield str(text), BadRow("not readable", error.strerror or "")


def _captions_in(data: bytes, name: str, renames: dict[str, str]) -> list[str]:
    """The texts of a sidecar: a line each, or those of a JSON object."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = data.decode(encodings.detect(io.BytesIO(data)), errors="replace")
        except ValueError as error:
            raise BadRow("broken characters", str(error)[:80]) from None
    if not name.lower().endswith(".json"):
        return [line for line in text.splitlines() if line.strip()] or [""]
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("wrong JSON", getattr(error, "msg", "nested too deeply")) from None
    record = load.renamed(records.as_record(record), renames)
    lower = {str(key).lower(): value for key, value in record.items()}
    found = next((lower[key] for key in TEXTS if lower.get(key)), None)
    if found is None:
        raise BadRow("no text", f"its JSON has {', '.join(map(str, record))[:80]}")
    return texts_of(found)


def _with_place(file: Path, texts: list[str], where: Where) -> list[Found]:
    """A picture of a folder with its texts."""
    path = os.path.abspath(file)
    if where.root and os.path.commonpath([where.root, path]) != where.root:
        raise BadRow("outside the picture folder", f"not in {where.root}")
    key = _key(path, where)
    return [Found(text, Place(path, root=where.root), key) for text in texts]


def _classes(source: Source, where: Where, stats: dict) -> Iterator:
    stats["shapes"][str(source.path)] = "class/picture"
    stats["encodings"][str(source.path)] = "utf-8"
    for file in source.files:
        if file.parent == source.path:
            yield str(file), BadRow("no class folder", file.name)
            continue
        try:
            yield str(file), _with_place(file, [file.parent.name], where)
        except BadRow as bad:
            yield str(file), bad


# ---- webdataset ----------------------------------------------------------------------------------


def _tar(source: Source, where: Where, stats: dict) -> Iterator:
    """Members of one key, the name up to its first dot, are one sample: key.jpg with key.txt or
    key.json."""
    file = source.path
    stats["shapes"][str(file)] = "webdataset"
    stats["encodings"][str(file)] = "utf-8"
    samples: dict[str, dict[str, tuple]] = {}
    torn = None
    try:
        for member in tar_members(file):
            folder, _, name = member[0].rpartition("/")
            key, _, suffix = name.partition(".")
            if name and not name.startswith("."):
                samples.setdefault(f"{folder}/{key}", {})["." + suffix.lower()] = member
    except PictureError as error:
        torn = BadRow("torn tar", error.detail)
    with open(file, "rb") as opened:
        for sample in samples.values():
            name = next(iter(sample.values()))[0]
            try:
                yield f"{file}:{name}", _sample(opened, file, sample, where)
            except BadRow as bad:
                yield f"{file}:{name}", bad
    if torn:
        yield str(file), torn


def _sample(opened, file: Path, sample: dict[str, tuple], where: Where) -> list[Found]:
    picture = next((m for suffix, m in sample.items() if suffix.endswith(SUFFIXES)), None)
    if picture is None:
        raise BadRow("no picture in the tar", f"only {' '.join(sample)[:80]}")
    text = next((sample[suffix] for suffix in SIDECARS if suffix in sample), None)
    if text is None:
        raise BadRow("no text in the tar", f"only {' '.join(sample)[:80]}")
    name, offset, size = text
    opened.seek(offset)
    said = _captions_in(opened.read(min(size, MAX_CAPTION)), name, where.renames)
    name, offset, size = picture
    place = Place(os.path.abspath(file), "member", offset, size, name)
    key = f"{os.path.relpath(file, where.base)}:{name}"
    return [Found(line, place, key) for line in said]


# ---- Chinese-CLIP --------------------------------------------------------------------------------


def _chinese_clip(source: Source, where: Where, stats: dict) -> Iterator:
    """X_imgs.tsv (`id<TAB>base64`) with X_texts.jsonl ({"text_id", "text", "image_ids": [...]})."""
    texts, pictures = source.files
    encoding = files.encoding_of(texts)
    stats["shapes"][str(texts)] = "Chinese-CLIP"
    stats["encodings"][str(texts)] = encoding.removesuffix("-sig")
    places = {}
    unused = set()
    for number, name, offset, size in tsv_pictures(pictures):
        if not name:
            yield f"{pictures}:{number}", BadRow("no tab in the line", "id<TAB>base64 is expected")
        elif name in places:
            yield f"{pictures}:{number}", BadRow("a picture's id twice", name[:40])
        else:
            places[name] = Place(os.path.abspath(pictures), "base64", offset, size, name)
            unused.add(name)
    base = os.path.relpath(pictures, where.base)
    for number, record in files.records(texts, encoding):
        try:
            record = load.renamed(records.as_record(record), where.renames)
            names = [str(name) for name in turns.as_list(_opened(record.get("image_ids")))]
            said = texts_of(record.get("text"))
        except BadRow as bad:
            yield f"{texts}:{number}", bad
            continue
        if not names:
            yield f"{texts}:{number}", BadRow("no picture named", "image_ids is empty")
        for name in names:
            unused.discard(name)
            if name in places:
                found = [Found(text, places[name], f"{base}:{name}") for text in said]
            else:
                found = BadRow("a text whose picture is missing", f"id {name[:40]}")
            yield f"{texts}:{number}", found
    if unused:
        note = "pictures that no text names"
        stats["changed"][note] = stats["changed"].get(note, 0) + len(unused)
        stats["examples"].setdefault(note, f"{pictures}: id {min(unused)}")


def lost_texts(data_path, rows, column_map=None, only_held_out: bool = False) -> list[str]:
    """Texts of Chinese-CLIP's files of which no picture is there, each once: load_pairs leaves them
    out and counts them; for an evaluation they are misses.

    rows: what load_pairs gave for this data_path; only_held_out: of the files that names set apart.
    """
    renames = load.column_renames(column_map)
    seen = set(rows["text_hash"])
    lost = []
    sources = chain.from_iterable(_sources(path)[0] for path, _ in files.entries(data_path))
    for source in sources:
        if source.kind != "chinese-clip" or (only_held_out and not source.held_out):
            continue
        texts = source.files[0]
        for _, record in files.records(texts, files.encoding_of(texts)):
            for text in _named_texts(record, renames):
                key = text_key(text)
                if key not in seen:
                    seen.add(key)
                    lost.append(text)
    return lost


def _named_texts(record, renames: dict[str, str]) -> list[str]:
    """Texts of a line of *_texts.jsonl that names pictures; none of one that cannot be read."""
    try:
        record = load.renamed(records.as_record(record), renames)
        said = list(filter(None, map(tidy, texts_of(record.get("text")))))
        for text in said:
            text.encode()
    except (BadRow, UnicodeEncodeError):
        return []
    return said if turns.as_list(_opened(record.get("image_ids"))) else []


# ---- what a set says of itself -------------------------------------------------------------------


def _missing(rows) -> dict:
    """Pictures in files that are not there: {count, first: three of them}."""
    places = rows.select_columns(["place"]).with_format("arrow")
    names: dict[str, set[str]] = {}
    for batch in places.iter(10_000):
        column = batch["place"].combine_chunks()
        for path in column.field("path").unique().to_pylist():
            folder, name = os.path.split(path)
            names.setdefault(folder, set()).add(name)
    count = 0
    first = []
    with Progress("look for pictures", total=sum(map(len, names.values())), unit="files") as shown:
        for folder, wanted in names.items():
            absent = wanted - _present(folder, wanted)
            count += len(absent)
            first += [os.path.join(folder, name) for name in sorted(absent)[: 3 - len(first)]]
            shown.update(len(wanted))
    total = sum(map(len, names.values()))
    return {"count": count, "of": total, "first": first}


def _present(folder: str, wanted: set[str]) -> set[str]:
    """One look into a folder is faster than one at every file."""
    try:
        return wanted & set(os.listdir(folder))
    except OSError:
        return set()


def _refuse_missing(stats: dict, limit: float) -> None:
    missing = stats["missing"]
    count, total = missing["count"], missing["of"]
    if not count or count <= limit * total:
        return
    shown = ", ".join(missing["first"])
    what = "all pictures are" if count == total else f"{count:,} of {total:,} pictures are"
    raise SystemExit(
        f"{what} missing, e.g. {shown}; relative names begin at --image_root, or else at the "
        "folder of the file that names them"
    )


def _split_keys(rows) -> tuple[np.ndarray, str]:
    """-> (int64 [N], the same for rows that have to stay on one side; what that was decided by)."""
    columns = rows.select_columns(["text_hash", "picture_hash"]).with_format("numpy")[:]
    texts, text_of_row = np.unique(columns["text_hash"], return_inverse=True)
    pictures, picture_of_row = np.unique(columns["picture_hash"], return_inverse=True)
    if LABELS * len(texts) <= len(pictures):
        return columns["picture_hash"], "picture"
    # the smallest key of a row's text, then of its picture, and so on until nothing changes
    keys = columns["picture_hash"].copy()
    while True:
        before = keys
        for groups, of_row in ((texts, text_of_row), (pictures, picture_of_row)):
            smallest = np.full(len(groups), np.iinfo(np.int64).max)
            np.minimum.at(smallest, of_row, keys)
            keys = smallest[of_row]
        if (keys == before).all():
            return keys, "text and picture"


def most_common(rows, count: int = 5) -> list[tuple[str, int]]:
    """The texts that stand in most rows."""
    return Counter(rows["text"]).most_common(count)
