"""Conversations about pictures from what people have, and captions as the answers of such.

    rows, pictures, stats = load_rows_with_pictures("a.json captions.csv:0.3", "/data/pictures")

No picture is opened: a row names its pictures by their number in `pictures`. No torch, no process
group: N ranks may call everything at once, one works and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from common.data import files, load, pictures, records, shapes, turns
from common.data.cache import cache_root, cached
from common.data.pictures import PictureError, Place, tar_members, tsv_pictures
from common.data.progress import Progress
from common.data.turns import BadRow

HERE = Path(__file__).resolve().parent
VERSION = load.VERSION + "".join(
    files.sha256(Path(module))[:8] for module in (__file__, pictures.__file__)
)
IMAGE = {"type": "image"}  # the part of a message that stands for one picture
MARK = "\ufdd0"  # for it while rows are read: no character, so no text has it
WRITTEN = "<image>"  # as data sets write it
IMAGES = ("images", "image", "image_path", "img_path", "image_file", "image_name", "img")
PICTURES = (  # columns, in the order of preference
    *IMAGES,
    *("file_name", "filename", "file_path", "filepath", "path", "picture", "image_ids"),
    *("图片", "图像", "图片路径"),
)
TEXTS = (  # of captions; one that is said to be Chinese goes first
    *("zh_prompt", "caption_zh", "zh_caption", "text_zh", "chinese", "text", "caption", "captions"),
    *("texts", "prompt", "sentence", "sentences", "description", "title"),
    *("文本", "描述", "标题", "图片描述"),
)
ADDRESSES = ("url", "image_url", "img_url", "urls", "链接")
NOT_READ = ("video", "videos", "audio", "audios")
QUESTIONS = ("instruction", "input", "prompt", "question", "query", "content", "context", "ask")
CAPTION_ASKED = (
    *("请描述这张图片。", "这张图里有什么？", "图上画的是什么？", "用一句话说说这张图。"),
    *("你在图里看到了什么？", "给这张图写一句说明。", "请说明图片的内容。", "看图说话。"),
)
UNREACHABLE = "a web address that gives nothing"
OUTSIDE = "a picture outside the picture folder"
MAX_NAME = 1024  # characters; longer is no name of a file
BATCH_ROWS = 1000


class Found(NamedTuple):
    """A row as it was read. names: of its pictures, in the order of their marks."""

    row: dict
    prompt: str
    names: list[str]


class Where(NamedTuple):
    """root: the folder out of which no picture's name may lead, and where relative ones begin.
    packed: pictures that lie in tars and *_imgs.tsv there, by their names."""

    root: str
    packed: dict[str, Place]
    allow_urls: bool


# ---- all of it -----------------------------------------------------------------------------------


def load_rows_with_pictures(
    data_path,
    image_folder: str | Path = "",
    column_map=None,
    strict: bool = False,
    cache_dir=None,
    seed: int = 0,
    allow_urls: bool = False,
):
    """Files, folders or several of them -> (datasets.Dataset, Pictures, stats).

    data_path: path, "a b", "a:0.7 b:0.3", or a list of such. Rows: LLaVA's json (`conversations`,
        `image`), LLaMA-Factory's (`messages`, `images`), messages with typed parts, question and
        answer with a picture, text and picture (these become captions), Chinese-CLIP's
        *_texts.jsonl; rows without a picture may stand among them.
    image_folder: where relative names of pictures begin, default the folder of the file that names
        them; a tar or *_imgs.tsv in it, or named itself, is looked into. What lies outside, by ..
        or by links, is refused.
    allow_urls: fetch pictures that are web addresses into the cache.

    Columns, as those of load_rows: row (JSON: {"messages", "pictures": [numbers], "tools"?}; the
    content of a turn with pictures is a list of {"type": "image"} and {"type": "text", "text"}),
    prompt_key (equal for rows that share a picture, also by way of others), source, held_out.
    stats: as those of load_rows; pictures, with_pictures (rows) besides. SystemExit with one line
    for what the user has to repair.
    """
    from datasets import concatenate_datasets

    entries = files.entries(data_path)
    image_folder = checked_folder(image_folder)
    renames = load.column_renames(column_map)
    parts = []
    all_stats = []
    for path, _ in entries:
        part, part_stats = _load(path, image_folder, renames, strict, allow_urls, cache_dir)
        parts.append(part)
        all_stats.append(part_stats)
    stats = load.merged(all_stats)

    parts = [_without_missing(part, stats, strict) for part in parts]
    weights = [weight for _, weight in entries]
    used = sum(map(len, parts))
    if weights[0] is not None:  # files.entries: all or none
        parts = load.drawn(parts, weights, seed)
    found = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    stats["not_drawn"] = used - len(found)
    stats["used"] = len(found)
    rows, table = _numbered(found, stats, cache_dir)
    return rows, table, stats


def describe(stats: dict) -> str:
    """The lines to print about a load."""
    without = stats["used"] - stats["with_pictures"]
    return (
        f"{load.summary(stats)}\n"
        f"pictures: {stats['pictures']:,} different ones in {stats['with_pictures']:,} rows; "
        f"{without:,} rows have none"
    )


def checked_folder(image_folder: str | Path) -> str:
    """An existing folder, tar or *_imgs.tsv as an absolute path, "" for none; else SystemExit."""
    if not image_folder:
        return ""
    path = Path(image_folder).expanduser()
    if not path.is_dir() and not (path.is_file() and _is_packed(path)):
        raise SystemExit(
            f"--image_folder {image_folder}: no folder, tar or *_imgs.tsv of that name"
        )
    return os.path.abspath(path)


class Pictures(Sequence):
    """The different pictures of all rows: pictures[number] -> Place. Memory-mapped."""

    def __init__(self, table):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Place:
        return Place(*json.loads(self.table[int(number)]["place"]))


def _load(path: Path, image_folder: str, renames, strict: bool, allow_urls: bool, cache_dir):
    """One path of the command line -> (Dataset, stats), from the cache where it is known."""
    paths, ignored = files.data_files(path)
    tables = [file for file in paths if not _is_packed(file)]
    if not tables:
        raise SystemExit(f"{path}: pictures, but no file with conversations or captions about them")
    apart = files.held_out_files(path, tables)
    contents = [(str(file), files.sha256(file)) for file in tables]
    packed = {str(file): _packed_files(file, image_folder) for file in tables}
    stamps = [_stamp(file) for file in sorted(set(chain(*packed.values())))]
    key = [VERSION, image_folder, allow_urls, renames, contents, stamps, list(map(str, apart))]

    def build(folder: Path) -> dict:
        stats = load.no_stats()
        rows = chain.from_iterable(
            _rows(file, image_folder, packed[str(file)], renames, stats, strict, allow_urls)
            for file in tables
        )
        marked = (row | {"held_out": Path(row.pop("file")) in apart} for row in rows)
        _write(marked, folder / "rows.arrow", FOUND)
        load.refuse_useless(path, stats)
        digests = json.dumps([digest for _, digest in contents])
        return stats | {"sha256": hashlib.sha256(digests.encode()).hexdigest()}

    key = ["pictured rows", *key]
    dataset, stats = cached(json.dumps(key), build, cache_dir)
    if UNREACHABLE in stats["dropped"]:  # what failed once is asked for again by every run
        dataset, stats = cached(json.dumps([*key, this_run()]), build, cache_dir)
    if strict and stats["dropped"]:
        example = stats["examples"][next(iter(stats["dropped"]))]
        raise SystemExit(f"{example}; strict data was asked for")
    stats["ignored"] = ignored + stats["ignored"]
    stats["set_apart"] = list(map(str, apart))
    return dataset, stats


def this_run() -> str:
    """The same in all processes of a run on this machine, and in no other run."""
    if "RANK" not in os.environ:
        return f"{os.getpid()} {time.time_ns()}"
    return f"{os.getppid()} {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


FOUND = {  # columns of rows as they are kept first
    "row": "string",
    "prompt_key": "int64",
    "source": "string",
    "places": "list",
    "held_out": "bool",
}


def _write(rows: Iterator[dict], path: Path, columns: dict[str, str]) -> None:
    """Rows one by one -> an Arrow stream file."""
    import pyarrow as pa

    kinds = {
        "string": pa.string(),
        "int64": pa.int64(),
        "list": pa.list_(pa.string()),
        "bool": pa.bool_(),
    }
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        rows = iter(rows)
        while batch := list(islice(rows, BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


# ---- files -> rows -------------------------------------------------------------------------------


def _rows(
    file: Path,
    image_folder: str,
    packed: list[Path],
    renames: dict[str, str],
    stats: dict,
    strict: bool,
    allow_urls: bool,
) -> Iterator[dict]:
    """The usable rows of one file; everything else is counted in `stats`."""
    name = str(file).encode(errors="replace").decode()  # it may hold bytes of another encoding
    encoding = files.encoding_of(file)
    found = files.records(file, encoding)
    start = list(islice(found, load.HEAD))
    if not start:
        stats["ignored"].append(f"{file} (no rows)")
        return
    head = records.usable([record for _, record in start])
    shape, read = _reader(file, head, renames)
    stats["shapes"][str(file)] = shape
    stats["encodings"][str(file)] = encoding.removesuffix("-sig")
    guess = files.guess(file, encoding)
    if guess:
        stats["guesses"].append(guess)
    root = image_folder if image_folder and os.path.isdir(image_folder) else _base(file)
    where = Where(root, _unpacked(packed, stats), allow_urls)

    with Progress(f"read {file.name}") as progress:
        for number, record in chain(start, found):
            source = f"{name}:{number}"
            progress.update()
            try:
                made = _places_of(read, record, renames, where, encoding, stats, source)
            except BadRow as bad:
                stats["read"] += 1
                load.drop(stats, source, bad, strict)
                continue
            stats["read"] += len(made)
            stats["used"] += len(made)
            yield from (row | {"source": source, "file": str(file)} for row in made)


def _base(file: Path) -> str:
    return os.path.abspath(file.parent)


def _places_of(read, record, renames, where: Where, encoding: str, stats, source) -> list[dict]:
    """One record -> its rows, each with the places of its pictures; BadRow where one is wrong."""
    record = load.renamed(records.as_record(record), renames)
    for name in NOT_READ:
        if record.get(name):
            raise BadRow("a row with video or sound", f"column {name}")
    rows = []
    for found, notes in read(record):
        places = [_place(name, where) for name in found.names]
        rows.append(
            {
                "row": load.as_json(found.row, encoding),
                "prompt_key": load.prompt_key(found.prompt),
                "places": [json.dumps(list(vars(place).values())) for place in places],
            }
        )
        for note in notes:
            stats["changed"][note] = stats["changed"].get(note, 0) + 1
            stats["examples"].setdefault(note, source)
    return rows


def _reader(file: Path, head: list[dict], renames: dict[str, str]) -> tuple[str, Callable]:
    """What the records of a file are -> (name of the shape, record -> [(Found, notes)])."""
    head = [load.renamed(record, renames) for record in head]
    columns = list(dict.fromkeys(map(str, chain(*head))))
    seen = ", ".join(name[:40] for name in columns[:20])
    absent = [theirs for theirs, ours in renames.items() if ours not in columns]
    if absent:
        raise SystemExit(f"{file}: column_map: no column {', '.join(absent)}; columns seen: {seen}")
    shape = shapes.detect("chat", _chats(head))
    if shape is not None:
        has_turns = shape.name in ("messages", "sharegpt", "human/assistant")
        return shape.name, lambda record: _conversation(record, shape, has_turns)
    picture = next((name for name in PICTURES if name in columns), "")
    text = next((name for name in TEXTS if name in columns), "")
    if picture and text:
        return f"{text}/{picture}", lambda record: _captions(record, text, picture)
    addresses = [name for name in ADDRESSES if name in columns]
    if text and addresses:
        hint = f"--column_map image={addresses[0]} --allow_urls true fetches them"
        raise SystemExit(f"{file}: its pictures are web addresses (column {addresses[0]}); {hint}")
    raise SystemExit(
        f"{file}: neither conversations nor captions; columns seen: {seen}; accepted: "
        "conversations or messages (with image or images), question/answer with image, "
        f"{', '.join(TEXTS[5:7])} … with {', '.join(PICTURES[1:3])} …; rename yours with "
        "--column_map ours=theirs"
    )


# ---- conversations -------------------------------------------------------------------------------


def _conversation(record: dict, shape, has_turns: bool) -> list[tuple[Found, list[str]]]:
    notes: list[str] = []
    chat, names = _as_chat(record)
    row = shape.convert(chat, notes)
    asked = [turn for turn in row["messages"] if turn["role"] == "user"]
    marks = sum(turn["content"].count(MARK) for turn in asked)
    if names and not marks and not has_turns:  # questions in columns of their own need no mark
        asked[0]["content"] = MARK * len(names) + "\n" + asked[0]["content"]
        marks = len(names)
    if marks != len(names):
        raise BadRow(
            f"{WRITTEN} and pictures differ", f"{marks} {WRITTEN} for {len(names)} pictures"
        )
    prompt = shapes.prompt_of(row).replace(MARK, "")
    for turn in asked:
        if MARK in turn["content"]:
            turn["content"] = parts_of(turn["content"], MARK)
    return [(Found(row, prompt, names), notes)]


def parts_of(text: str, mark: str = WRITTEN) -> list[dict]:
    """A text with marks -> {"type": "image"} and {"type": "text", "text"} in its order."""
    parts = []
    for i, piece in enumerate(text.split(mark)):
        if i:
            parts.append(dict(IMAGE))
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _as_chat(record: dict) -> tuple[dict, list[str]]:
    """A record as one of text alone, MARK where a picture belongs -> (record, pictures' names)."""
    record, _ = records.tidy(record)
    kept = {name: value for name, value in record.items() if name not in IMAGES}
    named: list[str] = []
    for column, value in list(kept.items()):
        if column in records.DIALOGUES and isinstance(value, list):
            kept[column] = [_turn(turn, named) for turn in value]
        elif column == "history" and isinstance(value, list):
            kept[column] = [_pair(pair) for pair in value]
        elif column in QUESTIONS and isinstance(value, str):
            kept[column] = _marked(value)
    column = next((name for name in PICTURES if _names_pictures(record, name)), "")
    beside = _names(record[column]) if column else []
    if named and beside and named != beside:
        raise BadRow("pictures named twice", f"in the turns and in the column {column}")
    return kept, named or beside


def _pair(pair):
    """A question of the history with its answer."""
    is_pair = isinstance(pair, list) and pair and isinstance(pair[0], str)
    return [_marked(pair[0]), *pair[1:]] if is_pair else pair


def _names_pictures(record: dict, column: str) -> bool:
    """Whether a column holds pictures; a path or file name may also be that of a text."""
    value = record.get(column)
    if turns.is_absent(value):
        return False
    return column in IMAGES or str(value).lower().endswith(pictures.SUFFIXES)


def _chats(head: list[dict]) -> list[dict]:
    """Those of the first records of a file that can be read as chats."""
    found = []
    for record in head:
        try:
            found.append(_as_chat(record)[0])
        except BadRow:
            continue
    return found


def _marked(text: str) -> str:
    return text.replace(MARK, "").replace(WRITTEN, MARK)


def _turn(turn, named: list[str]):
    """A turn whose words are one text; `named` gets the pictures that its parts name."""
    if not isinstance(turn, dict):
        return turn
    if isinstance(turn.get("human"), str):
        return turn | {"human": _marked(turn["human"])}
    column = next((name for name in turns.CONTENTS if name in turn), "content")
    value = turn.get(column)
    if isinstance(value, str):
        is_asked = turns.role_of(turn) == "user"
        return turn | {column: _marked(value)} if is_asked else turn
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return turn
    return turn | {column: "".join(_part(part, named) for part in value)}


def _part(part: dict, named: list[str]) -> str:
    kind = part.get("type")
    if kind in turns.TEXT_PARTS:
        return turns.text_in(part, "text").replace(MARK, "")
    if kind not in ("image", "image_url", "input_image"):
        raise BadRow("a part of a turn is neither text nor picture", str(kind)[:40])
    names = ("image", "image_url", "path", "url", "file_name")
    given = next((part[name] for name in names if not turns.is_absent(part.get(name))), None)
    if given is not None:
        named += _names(given)
    return MARK


# ---- captions ------------------------------------------------------------------------------------


def _captions(record: dict, text: str, picture: str) -> list[tuple[Found, list[str]]]:
    """Every text of a record with every picture of it, as the answer to one of CAPTION_ASKED."""
    said = [
        item.get("raw", item.get("caption")) if isinstance(item, dict) else item
        for item in turns.as_list(_opened(record.get(text)))
    ]
    names = _names(record.get(picture))
    if not said:
        raise BadRow("no text", f"column {text} is empty")
    if not names:
        raise BadRow("no picture named", f"column {picture} is empty")
    found = []
    for one in said:
        answer = turns.filled_in({"text": one}, "text", "no text").strip()
        for name in names:
            number = load.prompt_key(f"{name} {answer}")
            asked = CAPTION_ASKED[number % len(CAPTION_ASKED)]
            words = f"{MARK}\n{asked}" if number // 64 % 2 else f"{asked}\n{MARK}"
            messages = [turns.said("user", parts_of(words, MARK)), turns.said("assistant", answer)]
            found.append((Found({"messages": messages}, asked, [name]), []))
    return found


def _opened(value):
    """A list that stands in a cell of csv as text; None and "" as no element."""
    if turns.is_absent(value) or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return turns.from_text(value)
        except ValueError:
            return value
    return value


# ---- names of pictures -> places -----------------------------------------------------------------


def _names(value) -> list[str]:
    return [_name(item) for item in turns.as_list(_opened(value))]


def _name(value) -> str:
    if isinstance(value, dict):  # the Hub's Image column, OpenAI's image_url
        if value.get("bytes"):
            raise BadRow("a picture inside a table", "write it to a file, or into *_imgs.tsv")
        value = value.get("path") or value.get("url")
    if turns.is_number(value):  # of Chinese-CLIP's image_ids
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("no picture named", f"{type(value).__name__} in its column")
    value = value.strip()
    if value.startswith("data:") or len(value) > MAX_NAME:
        raise BadRow("a picture inside a table", "write it to a file, or into *_imgs.tsv")
    if "\0" in value:
        raise BadRow("no picture named", "a name with a zero in it")
    return value


def _place(name: str, where: Where) -> Place:
    """Where a picture lies that a row names."""
    if re.match(r"(https?:)?//", name):
        if not where.allow_urls:
            raise BadRow("a web address", f"{name[:60]}; --allow_urls true fetches it")
        return fetched(name)
    if name in where.packed:
        return where.packed[name]
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://"))
    name = name.replace("\\", "/")
    path = os.path.normpath(os.path.join(where.root, name))
    if os.path.commonpath([where.root, path]) != where.root:
        raise BadRow(
            OUTSIDE,
            f"{name[:80]} is not in {where.root}; --image_folder names another",
        )
    return Place(path, root=where.root)


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".tar" or path.name.endswith("_imgs.tsv")


def _packed_files(file: Path, image_folder: str) -> list[Path]:
    """The tars and *_imgs.tsv in which the pictures of a data file may lie; first those that are
    called like it."""
    base = Path(image_folder) if image_folder else file.parent
    if base.is_file():
        return [base]
    stem = re.sub(r"_texts$", "", file.name.split(".")[0])
    found = [path for path in sorted(base.iterdir()) if _is_packed(path) and path.is_file()]
    found = [path for path in found if not path.name.startswith(".")]
    own = [path for path in found if path.name in (f"{stem}_imgs.tsv", f"{stem}.tar")]
    return own + [path for path in found if path not in own]


def _stamp(path: Path) -> list:
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


def _unpacked(paths: list[Path], stats: dict) -> dict[str, Place]:
    """{name: Place} of the pictures in tars and *_imgs.tsv; the first of a name is taken."""
    found: dict[str, Place] = {}
    for path in paths:
        at = os.path.abspath(path)
        try:
            if path.suffix.lower() == ".tar":
                for name, offset, size in tar_members(path):
                    place = Place(at, "member", offset, size, name)
                    found.setdefault(name.removeprefix("./"), place)
            else:
                for _, name, offset, size in tsv_pictures(path):
                    if name:
                        found.setdefault(name, Place(at, "base64", offset, size, name))
        except (PictureError, OSError) as error:
            stats["guesses"].append(f"{path}: {error}; what stands before is used")
    return found


# ---- pictures that are not there -----------------------------------------------------------------


def _without_missing(part, stats: dict, strict: bool):
    """The rows whose pictures are all there; the others are counted. Looked up anew in every run:
    pictures come and go."""
    places = set()
    for batch in part.select_columns(["places"]).with_format("arrow").iter(10_000):
        places |= set(batch["places"].combine_chunks().flatten().unique().to_pylist())
    faults = _faults({place: Place(*json.loads(place)) for place in places})
    if not faults:
        return part
    kept = []
    left_out = []
    for i, (named, source) in enumerate(zip(part["places"], part["source"], strict=True)):
        bad = next((faults[place] for place in named if place in faults), None)
        if bad is None:
            kept.append(i)
            continue
        stats["used"] -= 1
        load.drop(stats, source, bad, strict)
        left_out.append(bad.reason)
    if 2 * len(kept) < len(part):
        how_many = "all" if not kept else f"{len(part) - len(kept):,} of {len(part):,}"
        raise SystemExit(
            f"{how_many} rows have {left_out[0]}, e.g. {stats['examples'][left_out[0]]}; relative "
            "names begin at --image_folder, or else at the folder of the file that names them"
        )
    return part.select(kept)


def _faults(places: dict[str, Place]) -> dict[str, BadRow]:
    """{place: why there is no such file}; one look into a folder serves all its files."""
    folders: dict[str, dict[str, list[str]]] = {}
    roots: dict[str, str] = {}
    for key, place in places.items():
        folder, name = os.path.split(place.path)
        folders.setdefault(folder, {}).setdefault(name, []).append(key)
        roots[folder] = place.root
    faults = {}
    with Progress("look for pictures", total=len(places), unit="files") as progress:
        for folder, names in folders.items():
            leads_out = roots[folder] and not pictures.inside(folder, roots[folder])
            absent = set(names) if leads_out else set(names) - _present(folder)
            reason = OUTSIDE if leads_out else "a picture that is missing"
            for name in absent:
                bad = BadRow(reason, os.path.join(folder, name))
                faults |= dict.fromkeys(names[name], bad)
            progress.update(len(names))
    return faults


def _present(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


# ---- numbers -------------------------------------------------------------------------------------


def _numbered(found, stats: dict, cache_dir):
    """Rows with places -> (rows with numbers, the table of the places)."""
    same = [VERSION, found._fingerprint, len(found), stats["dropped"]]
    numbers: dict[str, int] = {}

    def build_table(folder: Path) -> dict:
        for batch in found.select_columns(["places"]).with_format("arrow").iter(10_000):
            for place in batch["places"].combine_chunks().flatten().unique().to_pylist():
                numbers.setdefault(place, len(numbers))
        _write(({"place": place} for place in numbers), folder / "p.arrow", {"place": "string"})
        return {}

    table, _ = cached(json.dumps(["pictures", *same]), build_table, cache_dir)

    def build_rows(folder: Path) -> dict:
        known = numbers or {place: i for i, place in enumerate(table[:]["place"])}
        places = found.select_columns(["places"])
        of_row = [
            [known[place] for place in named]
            for batch in places.iter(BATCH_ROWS)
            for named in batch["places"]
        ]
        prompts = found.select_columns(["prompt_key"]).with_format("numpy")[:]["prompt_key"]
        keys = _split_keys(np.asarray(prompts), of_row, list(known))
        columns = {name: kind for name, kind in FOUND.items() if name != "places"}
        _write(_with_numbers(found, of_row, keys), folder / "rows.arrow", columns)
        return {"with_pictures": sum(map(bool, of_row))}

    rows, counts = cached(json.dumps(["numbered rows", *same]), build_rows, cache_dir)
    stats |= {"pictures": len(table), **counts}
    return rows, Pictures(table)


def _with_numbers(found, of_row: list[list[int]], keys: np.ndarray) -> Iterator[dict]:
    i = 0
    with Progress("number pictures", total=len(found)) as progress:
        for batch in found.select_columns(["row", "source", "held_out"]).iter(BATCH_ROWS):
            for row, source, apart in zip(*batch.values(), strict=True):
                text = f'{row[:-1]}, "pictures": {of_row[i]}}}'
                key = int(keys[i])
                yield {"row": text, "prompt_key": key, "source": source, "held_out": apart}
                i += 1
            progress.update(len(batch["row"]))


def _split_keys(prompts: np.ndarray, of_row: list[list[int]], places: list[str]) -> np.ndarray:
    """int64 [rows], equal for rows that have to stay on one side: those that share a picture, also
    by way of a third row; of rows without a picture, those that ask the same."""
    own = [load.prompt_key(_name_of(Place(*json.loads(place)))) for place in places]
    group = list(range(len(places)))  # of each picture: another one of its group, or itself

    def first(picture: int) -> int:
        while group[picture] != picture:
            group[picture] = group[group[picture]]
            picture = group[picture]
        return picture

    for numbers in of_row:
        for other in numbers[1:]:
            one, two = sorted((first(numbers[0]), first(other)), key=own.__getitem__)
            group[two] = one  # the smallest key speaks for all, in whatever order they come
    keys = prompts.astype(np.int64)
    for i, numbers in enumerate(of_row):
        if numbers:
            keys[i] = own[first(numbers[0])]
    return keys


def _name_of(place: Place) -> str:
    """The same on every machine."""
    return place.name or os.path.relpath(place.path, place.root or "/")


# ---- web addresses -------------------------------------------------------------------------------


def fetched(address: str) -> Place:
    """A picture of the web, kept in the cache under its address. BadRow where it cannot be had."""
    import requests

    if address.startswith("//"):
        address = f"https:{address}"
    folder = cache_root() / "fetched"
    file = folder / hashlib.sha256(address.encode()).hexdigest()[:32]
    if file.exists():
        return Place(str(file))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with requests.get(address, timeout=20, stream=True) as answer:
            answer.raise_for_status()
            size = 0
            with files.atomic_file(file) as part, open(part, "wb") as opened:
                for block in answer.iter_content(1 << 16):
                    size += len(block)
                    if size > pictures.MAX_BYTES:
                        raise BadRow("a picture that is too large", address[:60])
                    opened.write(block)
                opened.flush()
                pictures.identified(part.read_bytes())  # or a page that says "later" would stay
    except (requests.RequestException, OSError, PictureError) as error:
        raise BadRow(UNREACHABLE, f"{address[:60]}: {error}"[:120]) from None
    return Place(str(file))
