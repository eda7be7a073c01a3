"""Rows are read from what people have, and batches keep their shape."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import encoded, photo
from harness import ROOT, expect, finish, own_modules, start
from PIL import Image
from transformers import BertTokenizer, ChineseCLIPImageProcessorPil

from common.data import pictures
from common.data.pictures import PictureError, Place, open_picture
from common.data.split import split_rows

RECIPE = ROOT / "chinese_clip_ddp"
rows, batches, make_data = own_modules("chinese_clip_ddp", "rows", "batches", "make_data")


def reason_of(source, size=None) -> str:
    with pytest.raises(PictureError) as caught:
        open_picture(source, size)
    return caught.value.reason


# ---- rows ----------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path) -> Path:
    """Four pictures in a folder."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    for i, name in enumerate("abcd"):
        (folder / f"{name}.png").write_bytes(encoded(Image.new("RGB", (8, 8), (i * 60, 0, 0))))
    return folder


def load(path, **settings):
    found, stats = rows.load_pairs(path, **settings)
    return found, stats


def told(path, **settings) -> list[tuple[str, str]]:
    """(text, picture) of each row; every picture opens."""
    found, stats = load(path, **settings)
    assert stats["read"] == stats["used"] + sum(stats["dropped"].values())
    pairs = []
    for row in found:
        place = Place(**row["place"])
        if not stats["missing"]["count"]:
            open_picture(place)
        pairs.append((row["text"], place.name or Path(place.path).name))
    return pairs


AB = [("红", "a.png"), ("绿", "b.png")]
TABLES = {
    "a.csv": "text,image\n红,a.png\n绿,b.png\n",
    "b.tsv": "text\timage_path\n红\ta.png\n绿\tb.png\n",
    "c.jsonl": '{"zh_prompt": "红", "prompt": "red", "file_path": "a.png"}\n{"zh_prompt": "绿", "prompt": "green", "file_path": "b.png"}\n',
    "d.json": '[{"caption": "红", "image": ["a.png"]}, {"caption": "绿", "image": "./b.png"}]',
    "e.jsonl": '{"file_name": "a.png", "text": ["红"]}\n{"file_name": "b.png", "text": ["绿"]}\n',
    "f.csv": "URL,TEXT,Image\nhttp://x/1,红,a.png\nhttp://x/2,绿,b.png\n",
    "g.jsonl": '{"sentences": [{"raw": "红"}], "filename": "a.png"}\n{"sentences": [{"raw": "绿"}], "filename": "b.png"}\n',
    "h.csv": 'text,images\n红,"[""a.png""]"\n绿,"[""b.png""]"\n',
    "i.jsonl": '{"image": {"path": "a.png", "bytes": null}, "text": "红"}\n{"image": {"path": "b.png"}, "text": "绿"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read(drawn, name):
    (drawn / name).write_text(TABLES[name], encoding="utf-8")
    assert told(drawn / name) == AB


def test_a_table_in_gb18030_is_read_and_told(drawn):
    lines = [f"第{i}张图片是红色的,{'abcd'[i % 4]}.png" for i in range(40)]
    (drawn / "a.csv").write_bytes(("标题,图片\n" + "\n".join(lines) + "\n").encode("gb18030"))
    found, stats = load(drawn / "a.csv", column_map="text=标题,image=图片")
    assert found[3]["text"] == "第3张图片是红色的" and len(found) == 40
    assert stats["encodings"][str(drawn / "a.csv")] == "gb18030" and stats["guesses"]
    assert "gb18030" in rows.describe(stats)


def conversation(image, *turns: str) -> dict:
    who = ("human", "gpt")
    said = [{"from": who[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "1", "image": image, "conversations": said}


def test_conversations_give_their_first_answer(drawn):
    talks = [
        conversation("a.png", "<image>\n这是什么？", "红", "还有呢？", "没有了"),
        conversation("b.png", "<image>", "绿"),
        conversation(["a.png", "b.png"], "<image><image>", "两张"),
        conversation("", "你好", "你好"),
    ]
    (drawn / "llava.json").write_text(json.dumps(talks), encoding="utf-8")
    _, stats = load(drawn / "llava.json")
    assert told(drawn / "llava.json") == AB
    assert stats["dropped"] == {
        "several pictures in one conversation": 1,
        "no picture named": 1,
    }
    assert stats["changed"] == {"only the first answer is taken": 1}


def test_pictures_with_a_text_beside_them(drawn):
    (drawn / "a.txt").write_text("红\n红色的\n", encoding="utf-8")
    (drawn / "b.txt").write_bytes("这是一张绿色的图片".encode("gb18030"))
    (drawn / "c.json").write_text('{"prompt": "蓝", "seed": 1}', encoding="utf-8")
    assert told(drawn) == [
        ("红", "a.png"),
        ("红色的", "a.png"),
        ("这是一张绿色的图片", "b.png"),
        ("蓝", "c.png"),
    ]
    _, stats = load(drawn)
    assert stats["dropped"] == {"no text beside the picture": 1}
    assert stats["texts"] == 4 and stats["pictures"] == 3


def test_folders_are_classes(tmp_path):
    for name in ("猫", "狗", "test/猫"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(6):
            image = Image.new("RGB", (8, 8), (i, len(name), 0))
            (tmp_path / "set" / name / f"test {i}.png").write_bytes(encoded(image))
    found, stats = load(tmp_path / "set")
    assert sorted(set(found["text"])) == ["狗", "猫"] and len(found) == 18
    assert sum(found["held_out"]) == 6  # by the folder's name and not by the picture's
    assert stats["split_by"] == "picture" and "labels" in rows.describe(stats)
    train, held_out = split_rows(found, 0.5)
    assert len(train) == 12 and len(held_out) == 6


def webdataset(file: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file


def test_tars_are_read_by_offset_and_nothing_is_unpacked(tmp_path):
    png = encoded(Image.new("RGB", (8, 8), "red"))
    samples = {
        "x/0": {"png": png, "txt": "红".encode()},
        "x/1": {"json": '{"prompt": "绿"}'.encode(), "png": png},
        "x/2": {"png": png},
        "x/3": {"txt": b"only words"},
        "y/0": {"png": png, "txt": "另一个".encode(), "cls": b"3"},
    }
    file = webdataset(tmp_path / "shard-0.tar", samples)
    before = sorted(tmp_path.rglob("*"))
    assert told(file) == [("红", "x/0.png"), ("绿", "x/1.png"), ("另一个", "y/0.png")]
    _, stats = load(file)
    assert stats["dropped"] == {"no text in the tar": 1, "no picture in the tar": 1}
    assert sorted(tmp_path.rglob("*")) == before
    # of several tars, one torn
    data = file.read_bytes()
    (tmp_path / "shard-1.tar").write_bytes(data[: 4 * 512 + 100])
    _, stats = load(tmp_path)
    assert stats["dropped"]["torn tar"] == 1 and stats["used"] == 3 + 1


def chinese_clip(folder: Path, split: str, texts: list[dict], pictures_: dict[str, bytes]) -> Path:
    lines = [json.dumps(text, ensure_ascii=False) for text in texts]
    (folder / f"{split}_texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    packed = [f"{i}\t{base64.urlsafe_b64encode(d).decode()}\n" for i, d in pictures_.items()]
    (folder / f"{split}_imgs.tsv").write_text("".join(packed), encoding="utf-8")
    return folder / f"{split}_texts.jsonl"


def test_chinese_clips_files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    data = {str(i): encoded(Image.fromarray(np.roll(noise, i))) for i in range(4)}
    assert any(base64.urlsafe_b64encode(d) != base64.b64encode(d) for d in data.values())
    texts = [
        {"text_id": 1, "text": "一", "image_ids": [0, 1]},
        {"text_id": 2, "text": "二", "image_ids": [1]},
        {"text_id": 3, "text": "三", "image_ids": [99]},
        {"text_id": 4, "text": "四", "image_ids": []},
    ]
    file = chinese_clip(tmp_path, "train", texts, data)
    chinese_clip(tmp_path, "valid", [{"text_id": 9, "text": "九", "image_ids": [3]}], data)
    expected = [("一", "0"), ("一", "1"), ("二", "1")]
    assert told(file) == told(tmp_path / "train_imgs.tsv") == expected
    found, stats = load(tmp_path)
    assert stats["dropped"] == {"a text whose picture is missing": 1, "no picture named": 1}
    assert stats["changed"] == {"pictures that no text names": 2 + 3}
    assert [row["text"] for row in found if row["held_out"]] == ["九"]
    # a text with two pictures, a picture with two texts: all three rows stay on one side
    assert len(set(found["prompt_key"])) == 2
    (tmp_path / "train_imgs.tsv").unlink()
    with pytest.raises(SystemExit, match="no train_imgs.tsv beside it"):
        load(file)


def test_bad_rows_are_counted_by_reason(drawn):
    lines = [
        {"text": "红", "image": "a.png"},
        {"text": "红", "image": "a.png"},
        {"text": " 红\u3000", "image": "./a.png"},
        {"text": "", "image": "b.png"},
        {"text": None, "image": "b.png"},
        {"text": "网址", "image": "https://x.example/a.jpg"},
        {"text": "内嵌", "image": "data:image/png;base64,xx"},
        {"text": "没有", "image": ""},
        {"text": "数字", "image": 3},
        *({"text": f"好的{i}", "image": f"{'abcd'[i % 4]}.png"} for i in range(12)),
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"text": "坏\n'
    (drawn / "a.jsonl").write_text(text, encoding="utf-8")
    _, stats = load(drawn / "a.jsonl")
    assert (
        stats["dropped"]
        == {
            "duplicate row": 2,
            "no text": 1,
            "a web address": 1,
            "a picture inside a table": 1,
            "no picture named": 2,
            "missing text": 1,
            "wrong JSON": 1,
        }
        or stats["dropped"].get("no text") == 2
    )
    assert stats["used"] == 13 and stats["read"] == 22
    with pytest.raises(SystemExit, match=r"a.jsonl:2: duplicate row"):
        load(drawn / "a.jsonl", strict=True)


def error_of(path, **settings) -> str:
    with pytest.raises(SystemExit) as caught:
        load(path, **settings)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def test_what_a_user_has_to_repair_is_one_line(drawn, tmp_path):
    (drawn / "no_picture.csv").write_text("text,label\n红,1\n", encoding="utf-8")
    assert "no picture column; columns seen: text, label" in error_of(drawn / "no_picture.csv")
    (drawn / "no_text.csv").write_text("id,image\n1,a.png\n", encoding="utf-8")
    assert "no text column; columns seen: id, image" in error_of(drawn / "no_text.csv")
    (drawn / "urls.csv").write_text("url,text\nhttp://x/a.jpg,红\n", encoding="utf-8")
    assert "download_images.py" in error_of(drawn / "urls.csv")
    (drawn / "urls.txt").write_text("http://x/a.jpg\n", encoding="utf-8")
    assert "download_images.py" in error_of(drawn / "urls.txt")
    lost = "\n".join(f"红{i},{i}.png" for i in range(9))
    (drawn / "lost.csv").write_text("text,image\n" + lost, encoding="utf-8")
    said = error_of(drawn / "lost.csv")
    assert "all pictures are missing" in said and "--image_root" in said
    assert all(f"{drawn}/{i}.png" in said for i in range(3)) and "3.png" not in said
    (drawn / "ids.jsonl").write_text('{"text": "红", "image_ids": [1]}\n', encoding="utf-8")
    assert "image_ids" in error_of(drawn / "ids.jsonl")
    assert "column_map" in error_of(drawn / "no_text.csv", column_map="text=说明")
    assert "image_root" in error_of(drawn / "lost.csv", image_root=tmp_path / "none")
    assert "one picture is no data set" in error_of(drawn / "a.png")
    for file in drawn.glob("*.*s*"):
        file.unlink()
    (drawn / "urls.txt").unlink()
    assert "without a word about them" in error_of(drawn)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither tables" in error_of(empty)


def test_some_missing_pictures_are_told_and_stay(drawn):
    good = [f"好{i},{'abcd'[i % 4]}.png" for i in range(9)]
    (drawn / "t.csv").write_text("\n".join(["text,image", *good, "坏,x.png"]), encoding="utf-8")
    found, stats = load(drawn / "t.csv")
    assert len(found) == 10 and stats["missing"]["count"] == 1
    assert "1 pictures are missing" in rows.describe(stats)
    many = [f"坏{i},{i}.png" for i in range(9)]
    (drawn / "t.csv").write_text("\n".join(["text,image", *good, *many]), encoding="utf-8")
    assert "9 of 13 pictures are missing" in error_of(drawn / "t.csv")
    assert len(load(drawn / "t.csv", missing_limit=0.9)[0]) == 18


def test_nothing_leads_out_of_image_root(drawn, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(Image.new("RGB", (8, 8))))
    (drawn / "link.png").symlink_to(secret)
    names = ["../secret.png", str(secret), "x/../../secret.png", "link.png", "a.png"]
    names += ["b.png", "c.png", "d.png", "sub/../a.png"]
    lines = [json.dumps({"text": f"图{i}", "image": name}) for i, name in enumerate(names)]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(lines), encoding="utf-8")
    found, stats = load(table, image_root=drawn)
    assert stats["dropped"] == {"outside the picture folder": 3}
    places = {row["text"]: Place(**row["place"]) for row in found}
    assert reason_of(places["图3"]) == "outside the picture folder"
    assert open_picture(places["图8"]).size == (8, 8)


def test_rows_are_cached_and_read_anew_after_an_edit(drawn):
    (drawn / "t.csv").write_text("text,image\n红,a.png\n", encoding="utf-8")
    first, stats = load(drawn / "t.csv")
    again, same = load(drawn / "t.csv")
    assert first[0] == again[0] and same == stats
    (drawn / "t.csv").write_text("text,image\n绿,a.png\n", encoding="utf-8")
    assert load(drawn / "t.csv")[0][0]["text"] == "绿"
    # elsewhere the same files are the same data, and split alike
    copy = drawn.parent / "copy"
    drawn.rename(copy)
    moved, other = load(copy / "t.csv")
    assert other["sha256"] == load(copy / "t.csv")[1]["sha256"]
    assert moved[0]["prompt_key"] == load(copy / "t.csv")[0][0]["prompt_key"]


def test_another_folder_of_the_same_relative_name_is_another_one(drawn, monkeypatch):
    """The same files, times included, seen from two places: each row's picture lies beside it."""
    (drawn / "data").mkdir()
    (drawn / "data/t.csv").write_text("text,image\n红,../a.png\n", encoding="utf-8")
    copy = drawn.parent / "copy"
    shutil.copytree(drawn, copy)
    for folder in (drawn, copy):
        monkeypatch.chdir(folder)
        for path in ("data", "data/t.csv"):
            assert load(path)[0][0]["place"]["path"] == str(folder / "a.png")


def test_pipes_beside_the_data_are_passed_over(drawn):
    (drawn / "t.csv").write_text("text,image\n红,a.png\n", encoding="utf-8")
    for name in ("x.tar", "x.csv", "x_imgs.tsv"):
        os.mkfifo(drawn / name)
    found, stats = load(drawn)
    assert len(found) == 1 and sum("x" in name for name in stats["ignored"]) == 3


def test_weights_are_kept(drawn):
    for name in "xy":
        text = "\n".join(f"{name}{i},{'abcd'[i % 4]}.png" for i in range(40))
        (drawn / f"{name}.csv").write_text("text,image\n" + text, encoding="utf-8")
    found, stats = load(f"{drawn}/x.csv:3 {drawn}/y.csv:1")
    count = sum(row["text"].startswith("x") for row in found)
    assert (count, len(found), stats["not_drawn"]) == (40, 53, 27)


def test_pictures_of_one_name_in_two_folders_are_two_pictures(drawn, tmp_path):
    """Else they would be no negatives of each other, one picture of an evaluation, or, with one
    text, a duplicate row."""
    other = tmp_path / "other"
    shutil.copytree(drawn, other)
    for folder in (drawn, other):
        (folder / "pairs.csv").write_text("text,image\n红,a.png\n绿,b.png\n", encoding="utf-8")
    for data in (tmp_path, f"{drawn} {other}", f"{drawn}/pairs.csv:1 {other}/pairs.csv:1"):
        found, stats = load(data)
        assert (len(found), stats["texts"], stats["pictures"]) == (4, 2, 4)
    for folder in (drawn, other):
        (folder / "pairs.csv").unlink()
        for name in "abcd":
            (folder / f"{name}.txt").write_text(name, encoding="utf-8")
    assert load(f"{drawn} {other}")[1]["pictures"] == 8
    # one file that two tables name, by its own name and by its whole one, is one picture
    (drawn / "x.csv").write_text("text,image\n红,a.png\n", encoding="utf-8")
    (drawn / "y.csv").write_text(f"text,image\n绿,{drawn}/a.png\n", encoding="utf-8")
    assert load(f"{drawn}/x.csv {drawn}/y.csv")[1]["pictures"] == 1


def test_a_pair_of_two_files_is_one_pair_and_counted(drawn):
    (drawn / "x.csv").write_text("text,image\n红,a.png\n绿,b.png\n", encoding="utf-8")
    (drawn / "y.csv").write_text("text,image\n绿,b.png\n蓝,b.png\n", encoding="utf-8")
    found, stats = load(f"{drawn}/x.csv {drawn}/y.csv")
    assert list(found["text"]) == ["红", "绿", "蓝"]
    assert (stats["used"], stats["dropped"], stats["not_drawn"]) == (3, {"duplicate row": 1}, 0)
    assert "y.csv:2" in stats["examples"]["duplicate row"]
    with pytest.raises(SystemExit, match="y.csv:2: duplicate row"):
        load(f"{drawn}/x.csv {drawn}/y.csv", strict=True)


def test_rows_that_share_a_text_or_a_picture_stay_on_one_side(drawn):
    """By way of others too: 0-1 share a picture, 1-2 a text, and so on in a chain."""
    lines = []
    for chain in range(40):
        for i in range(4):
            picture = f"{chain}/{i // 2}.png"
            lines.append({"text": f"{chain} {(i + 1) // 2}", "image": picture})
    (drawn / "t.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found, _ = load(drawn / "t.jsonl", missing_limit=1)
    assert len(set(found["prompt_key"])) == 40
    train, held_out = split_rows(found, 0.2)
    for name in ("text_hash", "picture_hash"):
        assert not set(train[name]) & set(held_out[name])
    assert len(held_out) == 32


# ---- batches -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"红绿蓝的图片第张一二三四五六七八九"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def torn_set(folder: Path, count: int, torn: int) -> Path:
    """So many pictures, the first of them torn in one way or another."""
    kinds = (b"", b"<html>", encoded(photo(32, 32), "JPEG")[:200])
    lines = []
    for i in range(count):
        data = kinds[i % 3] if i < torn else encoded(Image.new("RGB", (8, 8), (i, 0, 0)))
        (folder / f"{i}.png").write_bytes(data)
        lines.append(json.dumps({"text": f"第{i}张", "image": f"{i}.png"}))
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "t.jsonl"


PROCESSOR = ChineseCLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)


def test_texts_are_padded_in_steps_and_cut(tokenizer):
    tokens = partial(batches.tokenise, tokenizer, max_length=20)
    found = tokens(["红", "红绿蓝的图片"])
    assert found["input_ids"].shape == (2, 8)
    assert found["attention_mask"].sum(1).tolist() == [3, 8]
    long = tokens(["红" * 30, "绿"])
    assert long["input_ids"].shape == (2, 20)
    assert long["input_ids"][0, -1] == tokenizer.sep_token_id
    assert tokens(["红" * 15])["input_ids"].shape == (1, 20)  # 17 tokens; 24 would be over
    fixed = tokens(["红"], fixed=True)
    assert fixed.keys() == {"input_ids"} and fixed["input_ids"].shape == (1, 20)


def test_cut_and_unknown_captions_are_told(tokenizer):
    found = batches.check_captions(["红绿", "红" * 30, "蓝"], tokenizer, 20)
    assert (found["cut"], found["longest"], found["looked_at"]) == (1, 32, 3)
    assert "1 of 3 captions are cut to 20 tokens" in found["warnings"][0]
    strange = batches.check_captions(["红猫狗鸟", "绿"], tokenizer, 20)
    assert strange["unknown"] == pytest.approx(3 / 5)
    assert "60% of the characters into [UNK]" in strange["warnings"][0]
    word = batches.check_captions(["elephants"], tokenizer, 20)
    assert word["unknown"] == 1.0
    assert batches.check_captions(["红绿蓝"] * 30 + ["猫"], tokenizer, 20)["warnings"] == []
    silent = BertTokenizer(vocab={"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    assert batches.check_captions(["红绿"], silent, 20)["unknown"] == 1.0


def test_torn_pictures_are_replaced_and_batches_keep_their_shape(tmp_path, tokenizer):
    found, _ = load(torn_set(tmp_path, 20, 6))
    data = batches.PairDataset(found, PROCESSOR, seed=3)
    collate = batches.PairCollator(partial(batches.tokenise, tokenizer, max_length=16))
    loader = torch.utils.data.DataLoader(data, batch_size=5, collate_fn=collate)
    reasons = []
    for batch in loader:
        assert batch["pixel_values"].shape == (5, 3, 16, 16)
        assert len(batch["row_ids"]) == len(batch["text_hash"]) == len(batch["input_ids"]) == 5
        for i, row in enumerate(batch["row_ids"]):
            assert row >= 6
            assert batch["text_hash"][i] == found[row]["text_hash"]
            expected = pictures.pixels(Place(**found[row]["place"]), PROCESSOR)
            assert torch.equal(batch["pixel_values"][i], expected)
        assert batch["tokens"] == batch["label_tokens"] == int(batch["attention_mask"].sum())
        reasons += batch["faults"]
    assert sorted(reason for reason, _ in reasons) == [
        *["a web page"] * 2,
        *["empty"] * 2,
        *["torn"] * 2,
    ]
    assert all(f"t.jsonl:{i + 1}: {tmp_path}/{i}.png: " in reasons[i][1] for i in range(6))


def test_held_out_rows_stay_where_their_picture_is_torn(tmp_path):
    found = load(torn_set(tmp_path, 12, 3))[0]
    data = batches.PairDataset(found, PROCESSOR, replaces=False)
    batch = batches.PairCollator()([data[i] for i in range(12)])
    assert batch["row_ids"] == list(range(12)) and batch["text_hash"].tolist() == found["text_hash"]
    assert len(batch["faults"]) == batch["is_faulty"].sum() == 3
    blank = pictures.pixels(batches.blank(), PROCESSOR)
    for is_faulty, values in zip(batch["is_faulty"], batch["pixel_values"], strict=True):
        assert torch.equal(values, blank) == bool(is_faulty)


def test_the_substitute_is_drawn_by_seed_epoch_and_index(tmp_path):
    found, _ = load(torn_set(tmp_path, 60, 10))

    def used(seed: int, epoch: int, order) -> dict[int, int]:
        data = batches.PairDataset(found, PROCESSOR, seed=seed)
        data.set_epoch(epoch)
        return {i: data[i]["row_id"] for i in order}

    first = used(1, 0, range(10))
    torch.manual_seed(7)
    random.seed(7)
    assert used(1, 0, reversed(range(10))) == first  # in whatever order, on whatever rank
    assert used(1, 1, range(10)) != first and used(2, 0, range(10)) != first
    assert all(row >= 10 for row in first.values())
    own = range(30, 40)
    data = batches.PairDataset(found, PROCESSOR, own=own)
    assert {data[i]["row_id"] for i in range(10)} <= set(own)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_read_what_one_process_reads(tmp_path, persistent):
    found, _ = load(torn_set(tmp_path, 24, 6))

    def epochs(workers: int) -> list[list[int]]:
        data = batches.PairDataset(found, PROCESSOR, seed=5)
        loader = torch.utils.data.DataLoader(
            data,
            batch_size=4,
            collate_fn=batches.PairCollator(),
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
        )
        read = []
        for epoch in range(2):
            data.set_epoch(epoch)
            read.append([row for batch in loader for row in batch["row_ids"]])
        return read

    alone = epochs(0)
    assert alone[0] != alone[1]
    assert epochs(2) == alone


RANK = """
import os, sys
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from transformers import ChineseCLIPImageProcessorPil
from batches import PairCollator, PairDataset
from rows import load_pairs

table, meeting = sys.argv[1:]
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
rows, _ = load_pairs(table)
processor = ChineseCLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
data = PairDataset(rows, processor)
sampler = DistributedSampler(data, 2, rank, shuffle=False)  # rank, rank + 2, rank + 4, ...
faults = 0
for batch in DataLoader(data, 4, sampler=sampler, collate_fn=PairCollator()):
    own = torch.tensor(batch["pixel_values"].shape)
    shapes = [torch.zeros_like(own) for _ in range(2)]
    dist.all_gather(shapes, own)
    everyone = [torch.zeros_like(batch["pixel_values"]) for _ in range(2)]
    dist.all_gather(everyone, batch["pixel_values"])
    assert torch.equal(shapes[0], shapes[1]), shapes
    faults += len(batch["faults"])
print("rank", rank, "faults", faults)
"""


def test_a_rank_whose_pictures_are_all_torn_hangs_nobody(tmp_path):
    lines = []
    for i in range(24):
        good = encoded(Image.new("RGB", (8, 8), (i, 0, 0)))
        (tmp_path / f"{i}.png").write_bytes(good[:40] if i % 2 else good)
        lines.append(json.dumps({"text": f"第{i}张", "image": f"{i}.png"}))
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = f"import sys; sys.path[:0] = [{str(RECIPE)!r}, {str(ROOT)!r}]\n"
    words = ["python", "-c", path + RANK, tmp_path / "t.jsonl", tmp_path / "meeting"]
    ranks = [start(words, RANK=rank, WORLD_SIZE=2) for rank in range(2)]
    said = [expect(finish(rank, timeout=120)).stdout for rank in ranks]
    assert "rank 0 faults 0" in said[0] and "rank 1 faults 12" in said[1]


def test_nothing_usable_ends_the_run(tmp_path):
    found, _ = load(torn_set(tmp_path, 6, 6))
    with pytest.raises(SystemExit, match="in a row cannot be used, the first at"):
        batches.PairDataset(found, PROCESSOR)[0]


def test_without_a_processor_no_picture_is_opened(tmp_path):
    found, _ = load(torn_set(tmp_path, 4, 4))
    data = batches.PairDataset(found)
    batch = batches.PairCollator()([data[i] for i in range(4)])
    assert batch["row_ids"] == [0, 1, 2, 3] and "pixel_values" not in batch
    assert not batch["faults"] and "input_ids" not in batch


def test_more_than_a_fifth_of_torn_pictures_stops_the_run():
    said = []
    faults = batches.PictureFaults(limit=0.2, soon=100, say=said.append)
    for i in range(12):
        faults.add([("torn", f"t.jsonl:{i}: torn")] * 2 + [("missing", "m")] * (i == 3), 10)
        if i == 8:
            assert faults.counts == {"torn": 18, "missing": 1}
            assert len(said) == 2 and "t.jsonl:0" in said[0]
            break
    with pytest.raises(
        SystemExit, match=r"21 of 100 pictures cannot be used \(20 torn; 1 missing\)"
    ):
        faults.add([("torn", "x")] * 2, 10)
    even = batches.PictureFaults(limit=0.2, soon=10, say=said.append)
    even.add([("torn", "x")] * 2, 10)  # a fifth is not more than a fifth
    early = batches.PictureFaults(limit=0.2, soon=500, say=said.append)
    early.add([("torn", "x")] * 8, 10)


# ---- the sample ----------------------------------------------------------------------------------


def test_the_samples_are_what_the_script_draws(tmp_path):
    make_data.main(tmp_path)
    made = {file.name: file for file in tmp_path.iterdir()}
    assert made.keys() == {file.name for file in (RECIPE / "data").iterdir()}
    for name, file in made.items():
        kept = RECIPE / "data" / name
        if not name.endswith(".tsv"):
            assert file.read_bytes() == kept.read_bytes()
            continue
        for a, b in zip(pictures.find_places(file), pictures.find_places(kept), strict=True):
            # the bytes of a PNG differ between versions of zlib
            assert a.name == b.name and open_picture(a).tobytes() == open_picture(b).tobytes()


def test_the_samples_hold_combinations_out_and_no_word():
    found, stats = load(RECIPE / "data")
    assert stats["used"] == stats["read"] == stats["pictures"] == 2 * 640 + 128
    assert stats["texts"] == 640 + 128
    train, held_out = split_rows(found, 0.05, 500)
    assert (len(train), len(held_out)) == (1280, 128)
    labels = (RECIPE / "data/labels_cn.txt").read_text(encoding="utf-8").split()
    assert len(labels) == 96

    def named(texts) -> set[str]:
        classes = [[label for label in labels if label in text] for text in texts]
        assert all(len(one) == 1 for one in classes)
        return {one[0] for one in classes}

    unseen = named(held_out["text"])
    assert len(unseen) == 16 and not unseen & named(train["text"])
    assert set("".join(held_out["text"])) <= set("".join(train["text"]))
    for part in (*make_data.COLORS, *make_data.THINGS):
        assert any(part in text for text in train["text"])
