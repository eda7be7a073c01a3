"""common/data: readers, shapes, checks, cache, split, leaks, tokens, prepare, progress."""

import gzip
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from harness import expect, finish, start
from hypothesis import given, settings
from hypothesis import strategies as st
from row_shapes import CHATS, HELLO, HI, PAIRS, TEXTS, A, Q, chat

from common import cli
from common.data import cache as prepared
from common.data import files, progress, shapes
from common.data.cache import cached, write_rows
from common.data.load import load_rows, prompt_key, summary
from common.data.prepare import prepare
from common.data.progress import Progress
from common.data.split import leak_check, split_rows
from common.data.tokens import tokenise, tokenise_split

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DANPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, rows, encoding="utf-8"):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding=encoding
    )
    return path


def load(path, kind="chat", **more):
    dataset, stats = load_rows(path, kind, **more)
    return [json.loads(r) for r in dataset["row"]], stats


def refuses(call, *parts):
    with pytest.raises(SystemExit) as stop:
        call()
    message = str(stop.value)
    assert "\n" not in message and all(part in message for part in parts), message
    return message


# ---- shapes --------------------------------------------------------------------------------------

ALL = [("chat", *c) for c in CHATS.values()] + [("preference", *c) for c in PAIRS.values()]
ALL += [("text", name, row, {"text": text}) for name, row, text in TEXTS.values()]


@pytest.mark.parametrize(("kind", "shape", "row", "want"), ALL, ids=[*CHATS, *PAIRS, *TEXTS])
def test_every_shape(tmp_path, kind, shape, row, want):
    path = write(tmp_path / "a.jsonl", [row])
    got, stats = load(path, kind)
    assert got == [want] and stats["shapes"] == {str(path): shape}


def test_frame_of_context_rows(tmp_path):
    """Several lines each, a transcript inside, a frame without a question, a frame inside a question."""
    frame = "Instruction: {}\nInput: {}\nAnswer: "
    rows = [
        {"context": frame.format("一\n二", "三\nAnswer: 四\nInput: 五"), "target": A},
        {
            "context": frame.format(f"Human: {HI}\nAssistant: {HELLO}\nHuman: {Q}\nAssistant:", ""),
            "target": A,
        },
        {"context": f"解释 Instruction: {Q}\nAnswer: ", "target": A},
        {"context": f"Instruction: {Q}\nInput: {HI}", "target": A},
        {"context": frame.format("", " "), "target": A},
    ]
    got, stats = load(write(tmp_path / "a.jsonl", rows))
    assert got[:2] == [chat("一\n二\n三\nAnswer: 四\nInput: 五", A), chat(HI, HELLO, Q, A)]
    assert got[2:] == [chat(row["context"], A) for row in rows[2:4]]
    assert (
        stats["dropped"] == {"empty prompt": 1} and "a.jsonl:5" in stats["examples"]["empty prompt"]
    )


@pytest.mark.parametrize(
    "known", ["alpaca", "belle", "firefly", "messages", "sharegpt", "question"]
)
def test_context_target_beside_a_known_shape_loses(tmp_path, known):
    """Sets keep an old column as `context` or `target`; the shape that was read before is read still."""
    shape, row, want = CHATS[known]
    path = write(tmp_path / "a.jsonl", [{"context": "旧的", "target": "旧的"} | row])
    got, stats = load(path)
    assert got == [want] and stats["shapes"] == {str(path): shape}


@pytest.mark.parametrize(
    "history", ["说过的话", [HI, HELLO], [[HI]], [[HI, None]], {"问": "答"}, 3, True]
)
def test_a_history_that_is_none_drops_the_row(tmp_path, history):
    good = [{"content": f"{Q}{i}", "summary": A, "history": [[HI, HELLO]]} for i in range(2)]
    got, stats = load(
        write(tmp_path / "a.jsonl", [*good, {"content": Q, "summary": A, "history": history}])
    )
    assert got == [chat(HI, HELLO, row["content"], A) for row in good]
    assert sum(stats["dropped"].values()) == 1 and "a.jsonl:3" in next(
        iter(stats["examples"].values())
    )


def test_shapes_survive_parquet(tmp_path):
    """Arrow gives every struct all keys, with None where a row had none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("messages tools", "sharegpt", "alpaca history"):
        pq.write_table(pa.Table.from_pylist([CHATS[name][1]] * 3), tmp_path / "a.parquet")
        assert load(tmp_path / "a.parquet")[0] == [CHATS[name][2]] * 3, name


def test_column_map(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"问题": Q, "回答": A, "output": "old"}])
    for mapped in ("instruction=问题, output=回答", {"instruction": "问题", "output": "回答"}):
        assert load(path, column_map=mapped)[0] == [chat(Q, A)]
    refuses(
        lambda: load(path, column_map="instruction=题,output=回答"), "no column 题", "问题, 回答"
    )
    refuses(lambda: load(path, column_map="instruction"), "ours=theirs")


def test_kind_decides_and_wrong_kind_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"content": "正文", "summary": "摘要"}])
    assert load(path)[0] == [chat("正文", "摘要")] and load(path, "text")[0] == [{"text": "正文"}]
    wrong = {
        "chat": [{"text": "x"}, PAIRS["triple"][1]],
        "text": [CHATS["alpaca"][1]],
        "preference": [CHATS["alpaca"][1]],
    }
    for kind, rows in wrong.items():
        for row in rows:
            path = write(tmp_path / "b.jsonl", [row])
            refuses(
                lambda p=path, k=kind: load(p, k),
                "these are rows of kind",
                f"not {kind}",
                "columns seen",
            )
    path = write(tmp_path / "c.jsonl", [{"foo": "x", "bar": "y"}])
    refuses(
        lambda: load(path),
        "c.jsonl",
        "foo, bar",
        "instruction, output",
        "conversations: from, value",
        "--column_map",
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "human", "tools", "name"]),
            inner,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    case=st.sampled_from(ALL), column=st.integers(0, 9), value=json_values, where=st.integers(0, 3)
)
def test_any_damage_is_a_bad_row(case, column, value, where):
    """Whatever stands in a column or in a turn: a canonical row or BadRow, never another error."""
    kind, _, row, _ = case
    row = json.loads(json.dumps(row))
    name = list(row)[column % len(row)]
    if isinstance(row[name], list) and row[name] and where:
        row[name][where % len(row[name])] = value
    else:
        row[name] = value
    shape = shapes.detect(kind, [case[2]])
    for damaged in (row, {k: v for k, v in row.items() if k != name}):
        try:
            done = shape.convert(damaged)
        except shapes.BadRow:
            continue
        shapes.prompt_of(json.loads(json.dumps(done)))


# ---- readers -------------------------------------------------------------------------------------

ROWS = [{"instruction": f"第{i}题：{Q}", "output": f"{A}{i}"} for i in range(5)]
WANT = [chat(r["instruction"], r["output"]) for r in ROWS]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)
CSV = "instruction,output\n" + "".join(f'"{r["instruction"]}",{r["output"]}\n' for r in ROWS)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("crlf.jsonl", LINES.replace("\n", "\r\n")),
        ("blank.jsonl", "\n\n" + LINES.replace("\n", "\n  \n") + "\n"),
        ("nul.jsonl", LINES.replace("第", "第\0")),
        ("array.json", json.dumps(ROWS, ensure_ascii=False)),
        ("indented.json", json.dumps(ROWS, ensure_ascii=False, indent=2)),
        ("objects.json", "\n".join(json.dumps(r, ensure_ascii=False, indent=1) for r in ROWS)),
        ("a.csv", CSV),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("semicolon.csv", CSV.replace(",", ";")),
        ("a.tsv", CSV.replace(",", "\t")),
    ],
    ids=lambda v: v if len(v) < 20 else "",
)
def test_readers(tmp_path, name, text, encoding, zipped):
    path = tmp_path / (name + ".gz" * zipped)
    raw = text.encode(encoding)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    got, stats = load(path)
    assert got == WANT and stats["read"] == stats["used"] == 5 and not stats["dropped"]
    assert stats["encodings"] == {str(path): encoding.removesuffix("-sig")}


def test_txt_lines(tmp_path):
    (tmp_path / "a.txt").write_text("第一行\r\n\n　 \n第二行\n", encoding="gb18030", newline="")
    dataset, _ = load_rows(tmp_path / "a.txt", "text")
    assert [json.loads(r)["text"] for r in dataset["row"]] == ["第一行", "第二行"]
    assert [s.rsplit(":", 1)[1] for s in dataset["source"]] == ["1", "4"]
    refuses(lambda: load(tmp_path / "a.txt"), "kind text, not chat")


def test_sources_name_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:2], ensure_ascii=False, indent=2))
    (tmp_path / "b.csv").write_text('instruction,output\n"两行\n问题",答\n再问,再答\n')
    assert [s.rsplit(":", 1)[1] for s in load_rows(tmp_path / "a.json")[0]["source"]] == ["2", "6"]
    assert [s.rsplit(":", 1)[1] for s in load_rows(tmp_path / "b.csv")[0]["source"]] == ["2", "4"]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.text(max_size=40), min_size=1, max_size=8),
    indent=st.sampled_from([None, 1]),
    step=st.integers(1, 9),
)
def test_array_parser_in_small_pieces(rows, indent, step):
    class Pieces:
        def __init__(self, text):
            self.text = text
            self.at = 0

        def read(self, _):
            self.at += step
            return self.text[self.at - step : self.at]

    objects = [{"text": r, "n": i} for i, r in enumerate(rows)]
    text = json.dumps(objects, ensure_ascii=False, indent=indent)
    assert [r for _, r in files._json_objects(Pieces(text), Path("x"))] == objects


def test_folder(tmp_path):
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    write(folder / "b.jsonl", ROWS[1:2])
    write(folder / "sub" / "c.jsonl", ROWS[2:3])
    (folder / "a.csv").write_text(CSV.split("\n")[0] + "\n" + CSV.split("\n")[1] + "\n")
    for name in (".hidden.jsonl", "README.md", ".git/x.json", "empty.jsonl"):
        (folder / name).write_text("")
    got, stats = load(folder)
    assert got == WANT[:3] and len(stats["shapes"]) == 3
    assert set(stats["ignored"]) >= {
        ".hidden.jsonl",
        "README.md",
        ".git/x.json",
        f"{folder / 'empty.jsonl'} (no rows)",
    }
    assert "README.md" in summary(stats) and "3 used of 3" in summary(stats)
    for i in range(300):
        (folder / f"{i}.jpg").write_text("")
    assert len(load(folder)[1]["ignored"]) == 12 and "293 more" in load(folder)[1]["ignored"]
    (tmp_path / "none").mkdir()
    refuses(lambda: load(tmp_path / "none"), "no data file in this folder")


def test_one_bad_byte_does_not_change_the_encoding(tmp_path):
    lines = LINES.encode().splitlines(keepends=True)
    lines[2] = lines[2].replace("题".encode(), b"\xe9\xa2")
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    got, stats = load(tmp_path / "a.jsonl")
    assert got == WANT[:2] + WANT[3:] and stats["dropped"] == {"broken characters": 1}
    assert "a.jsonl:3" in stats["examples"]["broken characters"]


def test_mixed_encodings_are_counted(tmp_path):
    for first, second in (("utf-8", "gb18030"), ("gb18030", "utf-8")):
        lines = LINES.splitlines(keepends=True) * 3
        path = tmp_path / f"{first}.jsonl"
        path.write_bytes("".join(lines[5:]).encode(first) + "".join(lines[:5]).encode(second))
        got, stats = load(path)
        assert got == WANT * 2 and stats["dropped"] == {"broken characters": 5}, (first, stats)


BROKEN = {  # name: (file name, bytes, parts of the message)
    "empty": ("a.jsonl", b"", ["no rows"]),
    "blank": ("a.json", b"\n \n", ["no rows"]),
    "header only": ("a.csv", b"instruction,output\n", ["no rows"]),
    "cut array": (
        "a.json",
        json.dumps(ROWS, indent=0).encode()[:-20],
        ["a.json:", "wrong JSON", "repair"],
    ),
    "wrong array": (
        "a.json",
        b'[{"instruction": "q",\n "output": nope}]',
        ["a.json:2", "wrong JSON"],
    ),
    "not json": ("a.jsonl", b"hello\nworld\n", ["2 of 2 rows", "wrong JSON", "a.jsonl:1"]),
    "list rows": ("a.jsonl", b'"text"\n3\n', ["not an object"]),
    "nested": ("a.jsonl", b'{"a":' * 100_000, ["wrong JSON"]),
    "open quote": ("a.csv", b'instruction,output\nq,a\n"q,a\nq,a\n', ["a.csv:3", "never closed"]),
    "cut gz": ("a.jsonl.gz", gzip.compress(LINES.encode())[:-12], ["cannot be read"]),
    "no gz": ("a.jsonl.gz", LINES.encode(), ["cannot be read", "a.jsonl.gz"]),
    "no parquet": ("a.parquet", b"PAR1xxxx", ["cannot be read"]),
    "unknown suffix": ("a.docx", b"x", ["unknown kind of file", ".jsonl"]),
}


@pytest.mark.parametrize(("name", "raw", "parts"), BROKEN.values(), ids=list(BROKEN))
def test_broken_files_are_one_line(tmp_path, name, raw, parts):
    (tmp_path / name).write_bytes(raw)
    refuses(lambda: load(tmp_path / name), *parts)
    assert not list((tmp_path / "cache").glob("*.part")) if (tmp_path / "cache").exists() else True


def test_missing_path_and_hub_name(tmp_path):
    refuses(lambda: load(tmp_path / "no.jsonl"), "no.jsonl: no such file or folder")
    refuses(lambda: load("someone/some_set"), "no such file or folder")
    refuses(lambda: load([]), "no data path")


# ---- rows that cannot be used --------------------------------------------------------------------

U = {"role": "user", "content": "问"}
B = {"role": "assistant", "content": "答"}
DROPS = [
    ("missing output", "chat", {"instruction": Q, "output": None}),
    ("missing output", "chat", {"instruction": Q}),
    ("missing instruction", "chat", {"instruction": None, "output": A}),
    ("empty prompt", "chat", {"instruction": " ", "input": "", "output": A}),
    ("empty answer", "chat", {"instruction": Q, "output": ""}),
    ("empty answer", "chat", {"instruction": Q, "output": " \n　\t"}),
    ("output is not text", "chat", {"instruction": Q, "output": True}),
    ("output is not text", "chat", {"instruction": Q, "output": float("nan")}),
    ("instruction is not text", "chat", {"instruction": [Q], "output": A}),
    ("wrong history", "chat", {"instruction": Q, "output": A, "history": ["x"]}),
    ("roles out of order", "chat", {"messages": [U, U, B]}),
    ("roles out of order", "chat", {"messages": [B, U, B]}),
    ("roles out of order", "chat", {"messages": [U, {"role": "system", "content": "x"}, B]}),
    ("last turn not from assistant", "chat", {"messages": [U, B, U]}),
    ("unknown role", "chat", {"messages": [U, {"role": "narrator", "content": "x"}]}),
    ("no turns", "chat", {"messages": []}),
    ("content is not text", "chat", {"messages": [U, {"role": "assistant", "content": ["答"]}]}),
    (
        "wrong tool_calls",
        "chat",
        {"messages": [U, {"role": "assistant", "content": "", "tool_calls": "{oops"}]},
    ),
    ("wrong tools", "chat", {"messages": [U, B], "tools": "oops"}),
    ("broken characters", "chat", {"instruction": "\ud800", "output": A}),
    (
        "chosen and rejected are the same",
        "preference",
        {"prompt": Q, "chosen": "好 的", "rejected": " 好  的\n"},
    ),
    ("empty answer", "preference", {"prompt": Q, "chosen": "好", "rejected": " "}),
    ("missing rejected", "preference", {"prompt": Q, "chosen": "好"}),
    (
        "prompt does not end with the user",
        "preference",
        {"prompt": [U, B], "chosen": "好", "rejected": "坏"},
    ),
    ("empty text", "text", {"text": "  "}),
    ("text is not text", "text", {"text": 5}),
]
FINE = {
    "chat": [{"instruction": Q, "output": A}, {"messages": [U, B]}],
    "preference": [{"prompt": Q, "chosen": "好", "rejected": "坏"}],
    "text": [{"text": "文"}],
}


@pytest.mark.parametrize(("reason", "kind", "row"), DROPS)
def test_drop_reasons(tmp_path, reason, kind, row):
    fine = next(f for f in FINE[kind] if next(iter(row)) in f)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [fine, row, fine, fine]))
    got, stats = load(path, kind)
    assert len(got) == 3 and stats["read"] == 4 and stats["dropped"] == {reason: 1}
    assert stats["examples"][reason].startswith(f"{path}:2: {reason}")
    refuses(lambda: load(path, kind, strict=True), f"{path}:2: {reason}")  # from the cache
    refuses(
        lambda: load(path, kind, strict=True, cache_dir=tmp_path / "other"), f"{path}:2: {reason}"
    )  # while reading
    write(path, [fine] + [row] * 2 if reason != "broken characters" else [fine] + [{}] * 2)
    refuses(lambda: load(path, kind), "2 of 3 rows cannot be used")


def test_pairs_with_different_prompts(tmp_path):
    good = PAIRS["hh"][1]
    other = good | {"rejected": "\n\nHuman: 别的问题\n\nAssistant: 不好"}
    later = good | {
        "rejected": f"\n\nHuman: {HI}\n\nAssistant: 嗯\n\nHuman: {Q}\n\nAssistant: 不好"
    }
    _, stats = load(write(tmp_path / "a.jsonl", [good] * 3 + [other, later]), "preference")
    assert stats["dropped"] == {"chosen and rejected answer different prompts": 2}


def test_wrong_lines_and_cells_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES + '{"instruction": "cut')
    _, stats = load(tmp_path / "a.jsonl")
    assert (
        stats["dropped"] == {"wrong JSON": 1}
        and "a.jsonl:6: wrong JSON" in stats["examples"]["wrong JSON"]
    )
    (tmp_path / "a.csv").write_text(CSV + "一,二,三\n" + 'x"y,z\n' + '"x"y,z\n')
    got, stats = load(tmp_path / "a.csv")
    assert len(got) == 6 and stats["dropped"] == {
        "wrong number of cells": 1,
        "wrong csv quoting": 1,
    }


def test_three_megabyte_row(tmp_path):
    long = "长" * 3_000_000
    write(tmp_path / "a.jsonl", [{"instruction": Q, "output": long}])
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": Q, "output": long}]))
    for name in ("a.jsonl", "b.json"):
        assert load(tmp_path / name)[0] == [chat(Q, long)]


# ---- weights -------------------------------------------------------------------------------------


def numbered(path, count, tag):
    return write(path, [{"instruction": f"{tag}{i}", "output": "答"} for i in range(count)])


def test_weights(tmp_path):
    a = numbered(tmp_path / "a.jsonl", 100, "a")
    b = numbered(tmp_path / "b.jsonl", 60, "b")
    assert len(load(f"{a} {b}")[0]) == 160
    dataset, stats = load_rows(f"{a}:0.8 {b}:0.2")
    sources = dataset["source"]
    assert len(set(sources)) == 125 and sum("a.jsonl" in s for s in sources) == 100
    assert stats["used"] == 125 and stats["read"] == 160 and stats["not_drawn"] == 35
    again, _ = load_rows([f"{a}:8", f"{b}:2"])  # proportions, not fractions
    assert list(again["source"]) == list(sources) and again._fingerprint == dataset._fingerprint
    other, _ = load_rows(f"{a}:0.8 {b}:0.2", seed=1)
    assert set(other["source"]) != set(sources)
    refuses(lambda: load(f"{a}:0.5 {b}"), "every path a weight")
    refuses(lambda: load(f"{a}:0 {b}:1"), "every path a weight")


def test_path_with_a_space_or_a_colon(tmp_path):
    assert len(load(str(numbered(tmp_path / "my file.jsonl", 3, "a")))[0]) == 3
    (tmp_path / "x.jsonl:1").mkdir()
    numbered(tmp_path / "x.jsonl:1" / "a.jsonl", 2, "a")
    assert len(load(str(tmp_path / "x.jsonl:1"))[0]) == 2


# ---- cache ---------------------------------------------------------------------------------------


def built(cache):
    return sorted(cache.glob("*/rows.arrow"))


def test_cache_is_reused_and_follows_contents(tmp_path, cache):
    path = numbered(tmp_path / "a.jsonl", 9, "a")
    first, stats = load_rows(path)
    stamp = built(cache)[0].stat().st_mtime_ns
    again, same = load_rows(path)
    assert built(cache)[0].stat().st_mtime_ns == stamp and len(built(cache)) == 1
    assert (
        stats == same
        and list(first["row"]) == list(again["row"])
        and first._fingerprint == again._fingerprint
    )
    numbered(path, 9, "b")
    assert "b0" in load_rows(path)[0]["row"][0] and len(built(cache)) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "no meta", "cut meta", "leftover"])
def test_incomplete_cache_is_rebuilt(tmp_path, cache, damage):
    path = numbered(tmp_path / "a.jsonl", 9, "a")
    want = list(load_rows(path)[0]["row"])
    arrow = built(cache)[0]
    meta = arrow.with_name("meta.json")
    if damage in ("cut", "empty"):
        arrow.write_bytes(arrow.read_bytes()[:-100] if damage == "cut" else b"")
    elif damage == "cut meta":
        meta.write_text(meta.read_text()[:20])
    elif damage == "leftover":  # a process was killed while it wrote
        arrow.parent.rename(arrow.parent.with_suffix(".part"))
    else:
        (arrow if damage == "gone" else meta).unlink()
    assert list(load_rows(path)[0]["row"]) == want
    assert not list(cache.glob("*.part"))


def test_a_large_file_is_read_again_only_after_a_write(tmp_path, cache, monkeypatch):
    """Size and date may be set back, as a broken disk or a clever tool leaves them; the time of the change may not."""
    file = tmp_path / "shard.parquet"
    file.write_bytes(b"a" * 100)
    monkeypatch.setattr(prepared, "REMEMBERED_FROM", 100)
    monkeypatch.setattr(prepared, "SETTLED", -1)
    read = []
    stock = prepared.files.sha256
    monkeypatch.setattr(prepared.files, "sha256", lambda path: read.append(1) or stock(path))
    first = prepared.sha256(file)
    assert first == prepared.sha256(file) == stock(file) and len(read) == 1
    stat = file.stat()
    time.sleep(0.02)  # the clock of a file system has ticks
    file.write_bytes(b"b" + b"a" * 99)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepared.sha256(file) == stock(file) != first and len(read) == 2
    monkeypatch.setattr(prepared, "SETTLED", 3600)
    file.write_bytes(b"c" * 100)  # written a moment ago: perhaps still being written
    prepared.sha256(file), prepared.sha256(file)
    assert len(read) == 4


def test_unwritable_cache_is_one_line(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 9, "a")
    (tmp_path / "file").write_text("")
    refuses(
        lambda: load(path, cache_dir=tmp_path / "file" / "cache"),
        "cannot keep prepared data",
        "DANPU_CACHE",
    )


def test_full_disk_is_one_line(tmp_path):
    def build(folder):
        with open("/dev/full", "w") as full:
            full.write("x" * 100_000)

    refuses(lambda: cached("k", build, tmp_path / "c"), "free some space", "DANPU_CACHE")
    assert not list((tmp_path / "c").glob("*.part"))


def encode(row):
    """One token per character; rows whose prompt ends in 7 have no label left."""
    asked, answer = (turn["content"] for turn in row["messages"][-2:])
    if asked.endswith("7"):
        return None
    ids = [ord(c) for c in asked + answer]
    return {
        "input_ids": ids,
        "labels": [-100] * len(asked) + ids[len(asked) :],
        "truncated": asked.endswith("3"),
    }


def _rank(path, cache, log, gate):
    gate.wait()

    def marked(row):
        with open(log, "a") as file:
            file.write("x\n")
        return encode(row)

    dataset, _ = load_rows(path, cache_dir=cache)
    tokens, counts = tokenise(dataset, marked, "k", cache_dir=cache)
    assert len(tokens) == 90 and counts["truncated"] == 10


def test_several_processes_build_once(tmp_path, cache):
    path = numbered(tmp_path / "a.jsonl", 100, "a")
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(4)
    ranks = [context.Process(target=_rank, args=(path, cache, log, gate)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert len(log.read_text().splitlines()) == 100


def _holder(lock, gate):
    with FileLock(lock):
        gate.wait()
        time.sleep(1)


def test_a_waiting_process_says_so(tmp_path, monkeypatch, capsys):
    def build(folder):
        write_rows(iter([{"row": "{}", "prompt_key": 1, "source": "a:1"}]), folder / "rows.arrow")
        return {}

    monkeypatch.setattr(prepared, "SILENT_WAIT", 0.1)
    cached("k", build, tmp_path)
    assert capsys.readouterr().out == ""
    [lock] = tmp_path.glob("*.lock")
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(2)
    other = context.Process(target=_holder, args=(lock, gate))
    other.start()
    gate.wait()
    assert len(cached("k", build, tmp_path)[0]) == 1
    other.join()
    folder = lock.with_suffix("")
    assert capsys.readouterr().out == f"waiting for another process that prepares {folder}\n"


# ---- split and leaks -----------------------------------------------------------------------------


def prompts(dataset):
    return [shapes.prompt_of(json.loads(r)) for r in dataset["row"]]


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.integers(0, 30), min_size=1, max_size=120),
    ratio=st.sampled_from([0.01, 0.05, 0.3, 0.9]),
    most=st.sampled_from([1, 5, 500]),
    seed=st.integers(0, 3),
)
def test_split_properties(asked, ratio, most, seed):
    from datasets import Dataset

    keys = [prompt_key(f"问题{n}") for n in asked]
    dataset = Dataset.from_dict({"prompt_key": keys, "n": list(range(len(keys)))})
    train, held = split_rows(dataset, ratio, most, seed)
    assert sorted([*train["n"], *held["n"]]) == list(range(len(keys)))
    assert set(train["prompt_key"]).isdisjoint(held["prompt_key"])
    if len(set(asked)) > 1:
        smallest = min(keys.count(k) for k in set(keys))
        assert 1 <= len(held) <= max(smallest, min(most, int(ratio * len(keys)))) and len(train)
    else:
        assert not len(held)
    assert list(split_rows(dataset, ratio, most, seed)[1]["n"]) == list(held["n"])


def test_split_off_seeded_and_stable(tmp_path):
    dataset, _ = load_rows(numbered(tmp_path / "a.jsonl", 400, "问题"))
    assert len(split_rows(dataset, 0)[1]) == 0 and len(split_rows(dataset, max_eval=0)[1]) == 0
    held = [set(split_rows(dataset, seed=s)[1]["source"]) for s in (0, 1)]
    assert len(held[0]) == len(held[1]) == 20 and len(held[0] & held[1]) < 10
    more, _ = load_rows(numbered(tmp_path / "a.jsonl", 440, "问题"))
    assert len(held[0] & set(split_rows(more)[1]["source"])) >= 15  # added rows move few
    refuses(lambda: split_rows(dataset, 1.5), "eval_ratio")


def test_same_prompt_in_other_spelling_has_one_key(tmp_path):
    rows = [
        {"instruction": t, "output": f"答{i}"}
        for i, t in enumerate(["你好  ＡＢＣ１", " 你好 ABC1\n", "你好ABC1"])
    ]
    keys = load_rows(write(tmp_path / "a.jsonl", rows))[0]["prompt_key"]
    assert keys[0] == keys[1] != keys[2]


def test_leak_check(tmp_path):
    base = "小明家的果园里今年一共收了三百二十个苹果，卖掉一半以后又送给邻居四十个，请问现在还剩下多少个苹果？"
    near = base.replace("三百二十", "三百三十").replace("请问", "问")
    far = (
        "把一根绳子对折三次以后量得每段长十二厘米，再把它完全展开拉直，请问这根绳子原来一共有多长？"
    )
    rows = [
        {"instruction": t, "output": "答"}
        for t in (base, base + " \n", near, far, "你好", "你好吗")
    ]
    train, _ = load_rows(write(tmp_path / "a.jsonl", rows))
    test = write(
        tmp_path / "test.jsonl",
        [{"question": base, "answer": "120"}, {"question": "你好", "answer": "好"}],
    )
    kept, leaked = leak_check(train, test, "chat")
    assert len(leak_check(train, tmp_path / "a.jsonl")[0]) == 0
    assert leaked == 4 and prompts(kept) == [shapes.normalise(far), "你好吗"]


def test_leak_check_spares_a_common_instruction(tmp_path):
    def task(word):
        return f"请判断下面这条用户评论的情感倾向是正面还是负面，只回答一个词，不要解释：{word}"

    rows = [{"instruction": task(f"第{i}种东西不错"), "output": "正面"} for i in range(20)]
    train, _ = load_rows(write(tmp_path / "a.jsonl", rows))
    test = write(
        tmp_path / "t.jsonl",
        [
            {"instruction": task(w), "output": "负面"}
            for w in ("很差", "太贵", "难吃", "太慢", "破")
        ],
    )
    assert leak_check(train, test)[1] == 0


# ---- tokens --------------------------------------------------------------------------------------


def test_a_row_may_become_several(tmp_path, cache):
    dataset, _ = load_rows(numbered(tmp_path / "a.jsonl", 20, "a"))

    def twice(row):
        return [found for found in (encode(row), encode(row)) if found]

    once, counts = tokenise(dataset, encode, "once")
    tokens, doubled = tokenise(dataset, twice, "twice")
    assert len(tokens) == 2 * len(once) and doubled["tokens"] == 2 * counts["tokens"]
    assert tokens["source"][::2] == tokens["source"][1::2] == list(once["source"])
    assert doubled["dropped"] == counts["dropped"] == {"no label left": 2}, "a row is counted once"


def test_held_out_rows_that_cannot_be_used_are_counted_and_end_nothing(tmp_path, cache):
    dataset, _ = load_rows(numbered(tmp_path / "a.jsonl", 20, "a"))
    good = dataset.select([0, 1, 2])
    bad = dataset.select([7])  # encode() leaves it no label
    train, held_out, counts = tokenise_split(good, bad, encode, "k")
    assert len(train) == 3 and len(held_out) == 0 and counts["dropped"] == {"no label left": 1}
    assert len(tokenise_split(good, bad, encode, "k")[1]) == 0, "from the cache"
    train, held_out, counts = tokenise_split(
        dataset.select([3, 7]), dataset.select([4, 7]), encode, "k"
    )
    assert (len(train), len(held_out)) == (1, 1) and counts["dropped"] == {"no label left": 2}
    assert "a.jsonl:8" in counts["examples"]["no label left"]
    assert tokenise_split(good, dataset.select([]), encode, "k")[1] == []


def test_an_empty_system_turn_is_one(tmp_path):
    """Templates write a system turn of their own where a row has none."""
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    for content, kept in (("", True), ("  ", True), (None, False)):
        row = {"messages": [{"role": "system", "content": content}, *turns]}
        got, _ = load(write(tmp_path / "a.jsonl", [row]), "chat")
        assert (got[0]["messages"][0] == {"role": "system", "content": content}) is kept
        assert got[0]["messages"][-2:] == turns


INTERRUPTED = """
import os, sys, time
sys.path.insert(0, sys.argv[3])
from common import cli
from common.data.load import load_rows
from common.data.tokens import tokenise

def encode(row):
    (lambda name: os.path.exists(name) or open(name, "x"))(sys.argv[1] + ".begun")
    time.sleep(0.01)
    return {"input_ids": [1, 2], "labels": [1, 2]}

def main():
    rows, _ = load_rows(sys.argv[1], "text", cache_dir=sys.argv[2])
    print(os.getpid(), flush=True)
    tokenise(rows, encode, "k", num_proc=2, cache_dir=sys.argv[2])

cli.run(main)
"""


@pytest.mark.parametrize("everybody", [False, True])
def test_an_interruption_while_workers_tokenise_is_one_line(tmp_path, everybody):
    """Of this process alone, or of the whole group, as Ctrl-C is in a terminal."""
    (tmp_path / "rows.txt").write_text("".join(f"{i}\n" for i in range(5001)), encoding="utf-8")
    (tmp_path / "script.py").write_text(INTERRUPTED, encoding="utf-8")
    words = ["python", tmp_path / "script.py", tmp_path / "rows.txt", tmp_path / "cache", ROOT]
    process = start(words)
    pid = int(process.stdout.readline())
    deadline = time.monotonic() + 60
    while not (tmp_path / "rows.txt.begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) >= 3  # two workers, and who stands between
    for one in [*children, pid] if everybody else [pid]:
        os.kill(int(one), signal.SIGTERM)
    result = expect(finish(process, 60), 75)
    assert result.stdout.count("interrupted. ") == 1 and "Traceback" not in result.stderr


def test_what_encode_notes_is_counted(tmp_path, cache):
    dataset, _ = load_rows(numbered(tmp_path / "a.jsonl", 9, "a"))

    def noted(row):
        return {**encode(row), "notes": ["half of it"]} if "a3" in str(row) else encode(row)

    _, counts = tokenise(dataset, noted, "k")
    assert counts["notes"] == {"half of it": 1}
    assert counts["examples"]["half of it"] == f"{tmp_path / 'a.jsonl'}:4: half of it"


def test_tokenise(tmp_path, cache):
    dataset, _ = load_rows(numbered(tmp_path / "a.jsonl", 20, "a"))
    tokens, counts = tokenise(dataset, encode, "k")
    assert tokens.column_names == ["input_ids", "labels", "length", "truncated", "source"]
    assert tokens[0]["input_ids"] == [97, 48, ord("答")] and tokens[0]["labels"] == [
        -100,
        -100,
        ord("答"),
    ]
    assert counts == {
        "rows": 18,
        "truncated": 2,
        "dropped": {"no label left": 2},
        "notes": {},
        "examples": {"no label left": f"{tmp_path / 'a.jsonl'}:8: no label left"},
        "tokens": sum(tokens["length"]),
        "label_tokens": 18,
    }
    again, same = tokenise(dataset, lambda row: 1 / 0, "k")  # from the cache
    assert same == counts and list(again["source"]) == list(tokens["source"])
    with pytest.raises(ZeroDivisionError):
        tokenise(dataset, lambda row: 1 / 0, "other key")
    train, _ = split_rows(dataset)
    assert tokenise(train, encode, "k")[1]["rows"] < 18
    refuses(lambda: tokenise(dataset, lambda row: None, "none"), "none of 20 rows has a label left")


def test_tokenise_other_columns(tmp_path):
    dataset, _ = load_rows(write(tmp_path / "a.jsonl", [PAIRS["triple"][1]]), "preference")
    names = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
    tokens, counts = tokenise(
        dataset,
        lambda r: dict(zip(names, [[1, 2], [-100, 2]] * 2, strict=True)),
        "k",
        columns=names,
    )
    assert tokens[0]["length"] == 4 and counts["tokens"] == 4 and counts["label_tokens"] == 2


def test_tokenise_in_workers_keeps_order_and_errors(tmp_path):
    dataset, _ = load_rows(numbered(tmp_path / "a.jsonl", 5001, "a"))
    tokens, counts = tokenise(dataset, encode, "k", num_proc=2)
    lines = [int(s.rsplit(":", 1)[1]) for s in tokens["source"]]
    assert (
        lines == sorted(lines)
        and counts["dropped"] == {"no label left": 500}
        and len(lines) == 4501
    )

    def stops(row):
        raise SystemExit("this template cannot do that")

    refuses(
        lambda: tokenise(dataset, stops, "s", num_proc=2),
        "a.jsonl:",
        "this template cannot do that",
    )
    first_half, _ = tokenise(
        dataset,
        lambda r: encode(r) if len(r["messages"][0]["content"]) < 4 else None,
        "h",
        num_proc=2,
    )
    assert len(first_half) == 90  # one worker kept nothing


HANG = """
import sys, torch
sys.path.insert(0, {root!r})
from common.data import tokens
from common.data.load import load_rows
torch.set_num_threads(4)
big = torch.randn(600, 600)
print((big @ big).sum().item() > 0, torch.randn(4_000_000).exp().sum() > 0)  # starts the OpenMP threads
def encode(row):
    n = int((torch.ones(600, 600) @ torch.ones(600, 600))[0, 0] + torch.randn(300_000).exp().sum() * 0)
    return {{"input_ids": [1, n], "labels": [-100, n], "truncated": False}}
tokens.FORKED_FROM = 10
dataset, _ = load_rows({path!r})
print(len(tokens.tokenise(dataset, encode, "k", num_proc=2)[0]))
"""


def run(code, timeout=60, **env):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"} | env,
    )


def test_workers_do_not_hang_after_torch_threads(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 40, "a")
    done = run(HANG.format(root=str(ROOT), path=str(path)), OMP_NUM_THREADS="4")
    assert done.returncode == 0 and done.stdout.split()[-1] == "40", done.stderr[-2000:]


MEMORY = """
import json, resource, sys
sys.path.insert(0, {root!r})
import datasets, pyarrow, numpy
from common.data.load import load_rows
from common.data.split import split_rows
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
load_rows({small!r})
before = peak()
dataset, stats = load_rows({big!r})
assert stats["used"] == {count}, stats
train, held = split_rows(dataset)
print(len(train), len(held), peak() - before)
"""


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_memory_stays_bounded(tmp_path, form):
    """150,000 rows (66 MB in UTF-8, 110 MB as objects): the peak grows by what a batch needs, 26 to 30 MiB."""
    count = 150_000
    row = {"instruction": "题NUMBER" + "问" * 60, "output": "答" * 70}
    row = json.dumps(row, ensure_ascii=False)
    small = numbered(tmp_path / "small.jsonl", 10, "a")
    with open(tmp_path / f"big.{form}", "w", encoding="utf-8") as file:
        joiner = "\n" if form == "jsonl" else ", "
        file.write("[" * (form == "json"))
        for i in range(count):
            file.write(row.replace("NUMBER", str(i)) + joiner * (i < count - 1))
        file.write("]" * (form == "json"))
    big = tmp_path / f"big.{form}"
    done = run(MEMORY.format(root=str(ROOT), small=str(small), big=str(big), count=count))
    assert done.returncode == 0, done.stderr[-2000:]
    train, held, grown = map(int, done.stdout.splitlines()[-1].split())
    assert train + held == count and held == 500
    assert grown < 60, f"peak grew by {grown} MiB"


def test_rows_that_the_template_refuses_are_counted_under_its_words(tmp_path):
    def encode(row):
        if "坏" in row["messages"][0]["content"]:
            raise ValueError("the template\n refuses it")
        return {"input_ids": [1, 2], "labels": [-100, 2]}

    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": p, "response": "好"}) for p in ("一", "坏", "三")),
        encoding="utf-8",
    )
    loaded, _ = load_rows(path, "chat", cache_dir=tmp_path / "cache")
    tokens, counts = tokenise(loaded, encode, "k", cache_dir=tmp_path / "cache")
    assert len(tokens) == 2 and counts["dropped"] == {"the template refuses it": 1}
    assert counts["examples"]["the template refuses it"].endswith(
        "a.jsonl:2: the template refuses it"
    )


# ---- prepare -------------------------------------------------------------------------------------


def test_prepare_splits_tokenises_counts_and_says_so(tmp_path, capsys):
    rows, stats = load_rows(numbered(tmp_path / "a.jsonl", 40, "a"))
    test = write(tmp_path / "t.jsonl", [{"instruction": f"a{i}", "output": A} for i in range(5)])
    args = cli.DataArgs(eval_ratio=0.2, leak_check=str(test))
    train, held_out, read = prepare(rows, stats, encode, args, "chat", seed=0, depends_on=[])
    held_out_lines = {source.rsplit(":", 1)[1] for source in read["source"]}
    leaked = 5 - len(held_out_lines & {"1", "2", "3", "4", "5"})
    assert leaked > 0 and len(read) == 8 and set(held_out["source"]) <= set(read["source"])
    assert not set(train["source"]) & set(read["source"])
    assert stats["dropped"] == {"in test file": leaked, "no label left": 4}
    assert stats["used"] == len(train) and stats["held_out"] == len(held_out)
    assert len(train) + len(held_out) == 40 - 4 - leaked
    assert stats["truncated"] == sum(train["truncated"]) + sum(held_out["truncated"])
    said = capsys.readouterr().out
    assert f"  {leaked} left out: their prompts stand in {test}" in said
    assert "  4 dropped: " in said and "no label left" in said
    assert f"split: {len(train)} rows to train on, {len(held_out)} held out" in said


def test_prepare_makes_new_rows_of_what_decides_them(tmp_path, monkeypatch):
    """Another key, window or seed, and an edit of the file in which `encode` stands."""
    monkeypatch.syspath_prepend(tmp_path)
    calls = []
    source = "def encode(row, calls):\n    calls.append(row)\n    return {'input_ids': [1, 2], 'labels': [1, 2]}\n"

    def made_anew(source, depends_on=(), seed=0, window=10):
        (tmp_path / "recipe_of_test.py").write_text(source)
        importlib.invalidate_caches()
        sys.modules.pop("recipe_of_test", None)
        module = importlib.import_module("recipe_of_test")
        rows, stats = load_rows(path)
        calls.clear()
        args = cli.DataArgs(eval_ratio=0.2, model_max_length=window)
        encode = partial(module.encode, calls=calls)
        prepare(rows, stats, encode, args, "chat", seed=seed, depends_on=list(depends_on))
        return len(calls)

    path = numbered(tmp_path / "a.jsonl", 10, "a")
    assert made_anew(source) == 10
    assert made_anew(source) == 0, "kept"
    assert made_anew(source, depends_on=["another template"]) == 10
    assert made_anew(source, window=11) == 10
    assert made_anew(source, seed=1) == 10
    assert made_anew(source + "# edited\n") == 10


# ---- progress ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def count_to_ten(clock, seconds_each, total=10):
    with Progress("count", total=total, unit="steps") as counter:
        for _ in range(10):
            clock[0] += seconds_each
            counter.update(1000)


def test_progress_says_nothing_about_short_work(clock, capsys):
    count_to_ten(clock, 0.4)
    assert capsys.readouterr() == ("", "")


def test_progress_says_a_line_now_and_then(clock, capsys):
    count_to_ten(clock, 6, total=10_000)
    assert capsys.readouterr().out.splitlines() == [
        "count: 1,000 of 10,000 steps, 6 s, about 54 s left",
        "count: 5,000 of 10,000 steps, 30 s, about 30 s left",
        "count: 9,000 of 10,000 steps, 54 s, about 6 s left",
    ]
    count_to_ten(clock, 10, total=None)
    assert capsys.readouterr().out.splitlines()[-1] == "count: 9,000 steps, 90 s"


def test_progress_of_other_ranks_is_silent(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    count_to_ten(clock, 60)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("count", total=2) as bar:
        bar.update(2)
    out, err = capsys.readouterr()
    assert out == "" and "count: 100%" in err and "2/2" in err


# ---- the recipes' samples ------------------------------------------------------------------------

SAMPLES = sorted(ROOT.glob("*/make_data.py"))


@pytest.mark.parametrize("script", SAMPLES, ids=lambda p: p.parent.name)
def test_samples_are_what_their_script_writes(script, tmp_path):
    """Twice, with another hash seed each: nothing depends on the order of a set."""
    for seed in ("1", "2"):
        out = tmp_path / seed
        subprocess.run(
            [sys.executable, script, out], check=True, env=os.environ | {"PYTHONHASHSEED": seed}
        )
        written = {file.relative_to(out): file.read_bytes() for file in out.rglob("*.*")}
        shipped = script.parent / "data"
        # settings that people copy and edit (.yaml) are written by hand
        samples = [file for file in shipped.rglob("*.*") if file.suffix != ".yaml"]
        assert written == {file.relative_to(shipped): file.read_bytes() for file in samples}
    limit = 400 << 10
    if any(file.name.endswith("_imgs.tsv") for file in written):
        limit = 800 << 10  # pictures
    if (script.parent / "pretrain.py").exists():
        limit = 3 << 20
    assert sum(map(len, written.values())) < limit


def test_a_sample_with_every_shape_of_its_users():
    """All rows are used, no prompt twice, and each of many facts is asked in at least three ways."""
    rows, stats = load(ROOT / "chatglm_lora/data")
    assert 900 <= stats["used"] == stats["read"] <= 1300 and not stats["dropped"]
    assert len({shapes.prompt_of(row) for row in rows}) == len(rows)
    found = {Path(file).stem: shape for file, shape in stats["shapes"].items()}
    assert (
        found["orders"] == found["adverts"] == "content/summary"
        and found["notices"] == "context/target"
    )
    assert found["floors"] == "belle multi-turn" and "gb18030" in stats["encodings"].values()
    assert {len(row["messages"]) for row in rows} == {2, 4, 6}
    answers = Counter(row["messages"][-1]["content"] for row in rows if len(row["messages"]) == 2)
    assert sum(n >= 3 for n in answers.values()) > 150
    assert len(set("".join(m["content"] for row in rows for m in row["messages"]))) < 700
