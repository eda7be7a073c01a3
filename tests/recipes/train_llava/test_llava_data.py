"""What train_llava reads, refuses and counts, and how its rows become tokens: every label belongs to an
answer, every picture's block is whole."""

import base64
import io
import json
import pickle
import re
import tarfile
from collections import Counter

import pytest
from harness import ROOT, own_modules
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common import tiny
from common.data import labels
from common.data.pictures import open_picture
from common.data.spelling import IGNORE
from common.data.split import split_rows

rows, encoding, make_data = own_modules("train_llava", "rows", "encoding", "make_data")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS_ONLY = (  # pictures first, contents are parts, as llava-hf's templates have it
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% for p in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IMG = {"type": "image"}
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]


def made_tokenizer(template: str):
    return tiny.make_tokenizer(
        ["图里有什么？一个红色的圆。", "what is it"],
        vocab_size=400,
        special_tokens=SPECIAL,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=template,
    )


TOKENIZER = made_tokenizer(CHATML)
IMAGE_ID = TOKENIZER.convert_tokens_to_ids("<image>")
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def said(role: str, *parts) -> dict:
    content = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)
    return {"role": role, "content": content}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def encode(messages, pictures=(), n=5, window=1000, tokenizer=TOKENIZER):
    row = {"messages": messages, "pictures": list(pictures)}
    return encoding.encode(row, tokenizer, IMAGE_ID, n, window)


def blocks_of(ids) -> list[int]:
    """Lengths of runs of image tokens."""
    text = "".join("#" if token == IMAGE_ID else " " for token in ids)
    return [len(run) for run in re.findall("#+", text)]


# ---- tokens --------------------------------------------------------------------------------------


def test_a_picture_is_a_block_without_labels():
    talk = [said("user", IMG, words("\n图里有什么？")), said("assistant", "一个圆。")]
    found = encode(talk, [7], n=5)
    ids, wanted = found["input_ids"], found["labels"]
    assert blocks_of(ids) == [5] and found["pictures"] == [7] and not found["truncated"]
    trained = [token for token, label in zip(ids, wanted, strict=True) if label != IGNORE]
    assert TOKENIZER.decode(trained) == "一个圆。<|im_end|>"
    plain = TOKENIZER.apply_chat_template(talk, tokenize=False)
    assert TOKENIZER.decode(ids).replace("<image>" * 5, "<image>") == plain


def test_the_mark_typed_into_a_text_is_text():
    talk = [said("user", IMG, words("<image> 和 <image> 是什么？")), said("assistant", "<image>")]
    found = encode(talk, [0])
    assert blocks_of(found["input_ids"]) == [5]
    assert TOKENIZER.decode(found["input_ids"]).count("<image>") == 5 + 3


def test_prompts_are_what_stands_before_the_answer_in_training():
    talk = [
        *(said("user", words("看："), IMG, words("是什么？")), said("assistant", "圆。")),
        *(said("user", "颜色呢？"), said("assistant", "红色。")),
    ]
    row = {"messages": talk, "pictures": ["a.png"]}
    asked = encoding.encode_prompt(row, TOKENIZER, IMAGE_ID, 5)
    whole = encode(talk, [0])
    last = len(TOKENIZER("红色。<|im_end|>\n")["input_ids"])
    first = len(whole["input_ids"]) - last
    assert asked["input_ids"] == whole["input_ids"][:first] and asked["pictures"] == ["a.png"]
    open_row = {"messages": talk[:1], "pictures": ["a.png"]}
    asked = encoding.encode_prompt(open_row, TOKENIZER, IMAGE_ID, 5)
    assert whole["input_ids"][: len(asked["input_ids"])] == asked["input_ids"]


def test_templates_that_take_parts_only():
    """Plain texts would vanish in them without a word."""
    tokenizer = made_tokenizer(PARTS_ONLY)
    talk = [said("user", words("左边是"), IMG, words("什么？")), said("assistant", "圆。")]
    talk += [said("user", "右边呢？"), said("assistant", "方。")]
    found = encode(talk, [0], tokenizer=tokenizer)
    trained = [token for token in found["labels"] if token != IGNORE]
    assert tokenizer.decode(trained).replace(" ", "") == "圆。方。<|im_end|>"
    assert encoding.MOVED in found["notes"]
    first = [said("user", IMG, words("什么？")), said("assistant", "圆。")]
    assert encoding.MOVED not in encode(first, [0], tokenizer=tokenizer)["notes"]


def test_templates_without_pictures_are_refused():
    blind = made_tokenizer("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    with pytest.raises(SystemExit, match="writes 0 image tokens"):
        encode([said("user", IMG), said("assistant", "圆")], [0], tokenizer=blind)


def test_a_window_below_one_picture():
    with pytest.raises(SystemExit, match="a picture alone takes 576 tokens"):
        encoding.check_window(576, 512)
    encoding.check_window(576, 1024)


def test_pictures_that_leave_no_room_are_counted_with_their_number():
    talk = [said("user", IMG, IMG, words("一样吗？")), said("assistant", "一样。")]
    with pytest.raises(ValueError, match="2 pictures take 100 tokens, the window has 90"):
        encode(talk, [0, 1], n=50, window=90)


def test_early_turns_go_first_and_take_their_pictures_along():
    talk = []
    for i in range(4):
        talk += [said("user", IMG, words(f"问题{i}？" * 3)), said("assistant", f"回答{i}。" * 3)]
    whole = encode(talk, [10, 11, 12, 13], n=20)
    found = encode(talk, [10, 11, 12, 13], n=20, window=len(whole["input_ids"]) - 1)
    assert found["truncated"] and found["pictures"] == [11, 12, 13] and "notes" not in found
    text = TOKENIZER.decode(found["input_ids"])
    assert "问题0" not in text and "回答1。回答1。回答1。<|im_end|>" in text


def test_the_only_picture_stays_with_later_questions():
    talk = [said("user", IMG, words("\n它是什么？")), said("assistant", "圆。" * 20)]
    talk += [said("user", "什么颜色？"), said("assistant", "红色。")]
    found = encode(talk, [3], n=20, window=60)
    assert found["pictures"] == [3] and found["notes"] == [encoding.CARRIED]
    text = TOKENIZER.decode(found["input_ids"]).replace("<image>" * 20, "<image>")
    begin = "<|im_start|>user\n<image>\n什么颜色？<|im_end|>"
    assert text.startswith(begin) and text.endswith("红色。<|im_end|>\n")


def test_words_are_cut_and_pictures_are_not():
    talk = [said("user", words("啊" * 300), IMG, words("哦" * 300)), said("assistant", "圆" * 300)]
    found = encode(talk, [0], n=30, window=100)
    assert len(found["input_ids"]) <= 100 and blocks_of(found["input_ids"]) == [30]
    assert found["labels"][-1] == END and found["truncated"]


SAID = st.text(alphabet="圆方红a <>\n", max_size=60).map(lambda text: text + "圆")
PART = st.one_of(st.just(IMG), SAID.map(words))
QUESTION = st.one_of(SAID.map(lambda text: [words(text)]), st.lists(PART, min_size=1, max_size=4))


@st.composite
def talks(draw):
    messages = [said("system", draw(SAID))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 5))):
        question = draw(QUESTION)
        only_words = all(part["type"] == "text" for part in question)
        content = "".join(part["text"] for part in question) if only_words else question
        messages.append({"role": "user", "content": content})
        messages.append(said("assistant", draw(SAID)))
    return messages


@settings(max_examples=150, deadline=None)
@given(talks(), st.integers(1, 12), st.integers(24, 260))
def test_truncation_and_labels_hold_for_any_row(messages, n, window):
    """Any turns, pictures and windows: labels are answers' tokens and end with the end token, the blocks are
    whole, the numbers fit, nothing is longer than the window, and the last answer is there."""
    count = encoding.count_pictures(messages)
    try:
        found = encode(messages, range(count), n=n, window=window)
    except ValueError as error:
        assert "pictures take" in str(error) and n * count + encoding.LEAST_TEXT > window
        return
    ids, wanted, kept = found["input_ids"], found["labels"], found["pictures"]
    assert len(ids) == len(wanted) <= window
    assert ids.count(IMAGE_ID) == n * len(kept) and all(run % n == 0 for run in blocks_of(ids))
    assert kept == sorted(kept) and len(set(kept)) == len(kept)
    assert all(label in (IGNORE, token) for token, label in zip(ids, wanted, strict=True))
    assert all(
        label == IGNORE for token, label in zip(ids, wanted, strict=True) if token == IMAGE_ID
    )
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    runs = [run for trained, run in labels.runs_of(ids, wanted) if trained]
    assert runs and all(run[-1] == END for run in runs)
    for run in runs:
        text = TOKENIZER.decode(run[:-1])
        assert any(answer.startswith(text) for answer in answers)
    last = TOKENIZER.decode(runs[-1][:-1])
    assert answers[-1].startswith(last)
    whole = encode(messages, range(count), n=n, window=10**6)
    assert found["truncated"] == (len(whole["input_ids"]) > window)
    if not found["truncated"]:
        assert [TOKENIZER.decode(run[:-1]) for run in runs] == answers and kept == list(
            range(count)
        )


# ---- rows ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DANPU_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / "pictures" / f"{i}.png")
    return folder


def put(folder, name: str, content) -> str:
    lines = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / name).write_text(lines, encoding="utf-8")
    return str(folder / name)


def llava(value: str, image=None, answer: str = "圆。") -> dict:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": "0", "conversations": turns} | ({} if image is None else {"image": image})


def read(path, **settings):
    found, pictures, stats = rows.load_rows_with_pictures(path, **settings)
    return [json.loads(row) for row in found["row"]], pictures, stats


def shown(row: dict, pictures) -> list[str]:
    return [pictures[number].path.rpartition("/")[2] for number in row["pictures"]]


def test_llava_rows(folder):
    data = [
        llava("<image>\n这是什么？", "pictures/0.png"),
        llava("第一张<image>，第二张<image>，一样吗？", ["pictures/1.png", "pictures/0.png"]),
        llava("一加一？", answer="二"),
        llava("这是什么？\n<image>", "pictures/2.png"),
    ]
    data[3]["conversations"] += llava("再看<image>")["conversations"]
    data[3]["image"] = ["pictures/2.png", "pictures/3.png"]
    found, pictures, stats = read(put(folder, "a.json", data))
    assert stats["used"] == stats["read"] == 4 and stats["with_pictures"] == 3
    assert len(pictures) == stats["pictures"] == 4
    assert [shown(row, pictures) for row in found] == [
        ["0.png"],
        ["1.png", "0.png"],
        [],
        ["2.png", "3.png"],
    ]
    assert found[0]["messages"][0]["content"] == [IMG, words("\n这是什么？")]
    assert found[1]["messages"][0]["content"][1] == IMG
    assert found[2]["messages"][0]["content"] == "一加一？"
    assert found[3]["messages"][2]["content"] == [words("再看"), IMG]
    assert open_picture(pictures[1]).getpixel((0, 0)) == (40, 0, 0)
    again = rows.Pictures(pickle.loads(pickle.dumps(pictures.table)))  # for worker processes
    assert list(again) == list(pictures)
    assert "4 different ones in 3 rows; 1 rows have none" in rows.describe(stats)


def test_other_layouts(folder):
    messages = [
        {"role": "user", "content": "<image>是什么？"},
        {"role": "assistant", "content": "圆"},
    ]
    factory = [{"messages": messages, "images": ["pictures/0.png"]}]
    typed = [
        {"type": "text", "text": "标记 <image> 是字。"},
        {"type": "image", "image": "pictures/1.png"},
        {"type": "image_url", "image_url": {"url": "pictures/2.png"}},
    ]
    parts = [{"messages": [{"role": "user", "content": typed}, messages[1]]}]
    bare = [
        {
            "messages": [{"role": "user", "content": [typed[0], IMG]}, messages[1]],
            "images": ["pictures/3.png"],
        }
    ]
    vqa = [{"image": "pictures/4.png", "question": "几个？", "answer": 3}]
    found, pictures, stats = read(put(folder, "factory.json", factory))
    assert found[0]["messages"][0]["content"] == [IMG, words("是什么？")]
    found, pictures, _ = read(put(folder, "parts.json", parts))
    assert found[0]["messages"][0]["content"] == [words("标记 <image> 是字。"), IMG, IMG]
    assert shown(found[0], pictures) == ["1.png", "2.png"]
    found, pictures, _ = read(put(folder, "bare.json", bare))
    assert shown(found[0], pictures) == ["3.png"]
    found, pictures, _ = read(put(folder, "vqa.jsonl", vqa))
    assert found[0]["messages"][0]["content"] == [IMG, words("\n几个？")]
    assert found[0]["messages"][1]["content"] == "3"
    pair = {"human": "<image>几个？", "assistant": "三"}
    found, _, _ = read(
        put(folder, "pairs.json", [{"conversation": [pair], "image": "pictures/1.png"}])
    )
    assert found[0]["messages"][0]["content"] == [IMG, words("几个？")]
    history = {"instruction": "还有呢？", "output": "没有", "history": [["<image>好？", "好"]]}
    found, _, _ = read(put(folder, "history.json", [history | {"images": ["pictures/1.png"]}]))
    assert found[0]["messages"][0]["content"] == [IMG, words("好？")]
    about = {"question": "好？", "answer": "好", "path": "docs/a.txt", "image": None}
    assert read(put(folder, "about.jsonl", about))[0][0]["pictures"] == []


def test_captions_get_varied_questions(folder):
    lines = "".join(f"图{i}\tpictures/{i % 6}.png\n" for i in range(40))
    found, pictures, stats = read(put(folder, "a.tsv", "text\timage\n" + lines))
    assert stats["shapes"] and list(stats["shapes"].values()) == ["text/image"]
    asked = {json.dumps(row["messages"][0]["content"], ensure_ascii=False) for row in found}
    assert len(asked) > 8 and found[3]["messages"][1]["content"] == "图3"
    assert read(str(folder / "a.tsv"))[0] == found  # the same in every run


def png(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_in_tars_and_tsv(folder):
    """Chinese-CLIP's files; two sets whose pictures have the same ids; a tar."""
    for name, color in (("train", (9, 0, 0)), ("valid", (0, 9, 0))):
        put(folder, f"{name}_imgs.tsv", f"1\t{base64.b64encode(png(color)).decode()}\n")
        put(folder, f"{name}_texts.jsonl", {"text_id": 1, "text": "一张图", "image_ids": [1]})
    with tarfile.open(folder / "more.tar", "w") as tar:
        info = tarfile.TarInfo("x/9.png")
        info.size = len(png((0, 0, 9)))
        tar.addfile(info, io.BytesIO(png((0, 0, 9))))
    put(folder, "z.json", [llava("<image>", "x/9.png")])
    found, pictures, stats = rows.load_rows_with_pictures(str(folder))
    assert stats["used"] == 3 and sum(found["held_out"]) == 1
    of_row = [json.loads(row)["pictures"][0] for row in found["row"]]
    colors = [open_picture(pictures[number]).getpixel((0, 0)) for number in of_row]
    assert colors == [(9, 0, 0), (0, 9, 0), (0, 0, 9)]
    tar = read(str(folder / "z.json"), image_folder=folder / "more.tar")
    assert tar[1][0].form == "member"


def test_rows_that_cannot_be_used_are_counted_with_an_example(folder):
    data = [llava("<image>好", "pictures/0.png") for _ in range(12)]
    data += [
        llava("<image>", ["pictures/0.png", "pictures/1.png"]),
        llava("没有标记", "pictures/0.png"),
        llava("<image>"),
        llava("<image>", "pictures/unknown.png"),
        llava("<image>", "../../etc/passwd.png"),
        llava("<image>", "/etc/passwd.png"),
        llava("<image>", "https://example.com/a.png"),
        llava("<image>", "data:image/png;base64,AAAA"),
        llava("<image>", {"bytes": "x", "path": None}),
        {"conversations": llava("好")["conversations"], "video": "a.mp4"},
    ]
    path = put(folder, "a.jsonl", "".join(json.dumps(row) + "\n" for row in data))
    found, pictures, stats = read(path)
    assert len(found) == stats["used"] == 12 and stats["read"] == len(data)
    assert stats["dropped"] == {
        "<image> and pictures differ": 3,
        "a picture outside the picture folder": 2,
        "a web address": 1,
        "a picture inside a table": 2,
        "a row with video or sound": 1,
        "a picture that is missing": 1,
    }
    example = stats["examples"]["a picture that is missing"]
    assert "a.jsonl:16" in example and example.endswith("pictures/unknown.png)")
    assert "1 <image> for 2 pictures" in stats["examples"]["<image> and pictures differ"]
    assert "--image_folder" in stats["examples"]["a picture outside the picture folder"]
    with pytest.raises(SystemExit, match="a.jsonl:13"):
        read(path, strict=True)


def test_a_missing_picture_that_came_back_is_found(folder):
    data = [llava("<image>", "pictures/0.png"), llava("<image>", "pictures/new.png")]
    path = put(folder, "a.json", data)
    assert read(path)[2]["dropped"] == {"a picture that is missing": 1}
    Image.new("RGB", (4, 4)).save(folder / "pictures/new.png")
    found, pictures, stats = read(path)
    assert len(found) == 2 and len(pictures) == 2 and not stats["dropped"]


def test_all_pictures_missing_is_one_line(folder, tmp_path):
    path = put(folder, "a.json", [llava("<image>", "0.png"), llava("<image>", "1.png")])
    with pytest.raises(SystemExit, match="all rows have a picture that is missing.*--image_folder"):
        read(path)
    assert len(read(path, image_folder=folder / "pictures")[0]) == 2
    with pytest.raises(SystemExit, match="no folder, tar"):
        read(path, image_folder=tmp_path / "none")
    with pytest.raises(SystemExit, match="neither conversations nor captions"):
        read(put(folder, "b.jsonl", {"a": 1, "b": 2}))
    with pytest.raises(SystemExit, match="--allow_urls true"):
        read(put(folder, "c.jsonl", {"url": "https://x/1.png", "caption": "x"}))


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    Image.new("RGB", (4, 4)).save(secret / "0.png")
    (folder / "link").symlink_to(secret)
    data = [llava("<image>", "pictures/0.png")] * 2 + [llava("<image>", "link/0.png")]
    _, _, stats = read(put(folder, "a.json", data))
    assert stats["dropped"] == {"a picture outside the picture folder": 1}


def test_rows_that_share_a_picture_stay_on_one_side(folder):
    data = [llava(f"<image>问题{i}？", f"pictures/{i % 6}.png") for i in range(60)]
    data += [llava("<image><image>", ["pictures/0.png", "pictures/1.png"])]
    found, _, _ = rows.load_rows_with_pictures(put(folder, "a.json", data))
    assert len(set(found["prompt_key"])) == 5
    train, held_out = split_rows(found, 0.2, 100)
    sides = [
        {n for row in part["row"] for n in json.loads(row)["pictures"]}
        for part in (train, held_out)
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    other, _, _ = rows.load_rows_with_pictures(put(folder, "b.json", data[::-1]))
    assert sorted(set(other["prompt_key"])) == sorted(set(found["prompt_key"]))


def test_pictures_of_the_web_are_fetched_when_allowed(folder, tmp_path):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    handler = partial(SimpleHTTPRequestHandler, directory=str(folder / "pictures"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    later, page = folder / "pictures/77.png", folder / "pictures/88.png"
    page.write_text("<html>come again later")
    data = [llava("<image>", f"{address}/{i}.png") for i in (1, 2, 3, 77, 88)]
    try:
        found, pictures, stats = read(put(folder, "a.json", data), allow_urls=True)
        assert stats["dropped"] == {"a web address that gives nothing": 2}
        assert [open_picture(place).getpixel((0, 0))[0] for place in pictures] == [40, 80, 120]
        assert all(str(tmp_path / "cache") in place.path for place in pictures)
        # what failed is asked for again by the next run, of which all ranks read the same
        for file in (later, page):
            Image.new("RGB", (8, 8), (200, 0, 0)).save(file)
        _, pictures, stats = read(put(folder, "a.json", data), allow_urls=True)
        assert not stats["dropped"] and len(pictures) == 5
    finally:
        server.shutdown()
        server.server_close()


def test_ranks_of_a_run_are_one_run(monkeypatch):
    assert rows.this_run() != rows.this_run()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "1234")
    first = rows.this_run()
    monkeypatch.setenv("RANK", "1")
    assert rows.this_run() == first
    monkeypatch.setenv("MASTER_PORT", "1235")
    assert rows.this_run() != first


# ---- the samples ---------------------------------------------------------------------------------

DATA = ROOT / "train_llava" / "data"


def test_the_script_writes_these_files(tmp_path):
    make_data.main(tmp_path)
    written = {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*.*")}
    assert written == {str(f.relative_to(DATA)): f.read_bytes() for f in DATA.rglob("*.*")}
    assert max(map(len, written.values())) <= 250 * 1024


def asked_in(held_out: bool) -> tuple[list[tuple[str, str]], list[dict], object]:
    """((question, answer) of all rows with pictures, rows, pictures) of one side of the samples."""
    found, pictures, stats = rows.load_rows_with_pictures(str(DATA / "questions"))
    assert not stats["dropped"] and stats["used"] == stats["read"]
    sides = zip(found["row"], found["held_out"], strict=True)
    chosen = [json.loads(row) for row, is_apart in sides if is_apart == held_out]
    pairs = []
    for row in chosen:
        texts = [message["content"] for message in encoding.without_pictures(row)["messages"]]
        if row["pictures"]:
            pairs += zip(texts[::2], texts[1::2], strict=True)
    return pairs, chosen, pictures


@pytest.mark.parametrize("held_out", [False, True])
def test_whoever_does_not_look_is_right_by_chance(held_out):
    pairs, chosen, _ = asked_in(held_out)
    answers: dict[str, Counter] = {}
    for question, answer in pairs:
        answers.setdefault(question, Counter())[answer] += 1
    best = sum(max(of.values()) for of in answers.values()) / len(pairs)
    assert best < 0.3
    for question, of in answers.items():
        assert len(set(of.values())) == 1 or not held_out, (question, of)
        assert max(of.values()) - min(of.values()) <= 2, (question, of)
    shares = Counter(min(2, len(row["pictures"])) for row in chosen)
    assert 0.03 < shares[0] / len(chosen) < 0.07 and 0.03 < shares[2] / len(chosen) < 0.07


def test_the_first_answers_of_a_conversation_tell_nothing_of_the_next():
    """Answers of one picture are drawn apart from each other: knowing one, the best guess of the other is
    hardly better."""
    pairs = Counter()
    _, chosen, _ = asked_in(held_out=False)
    for row in chosen:
        texts = [message["content"] for message in row["messages"]]
        if len(texts) == 4 and texts[3] in make_data.NUMBERS:
            pairs[texts[1], texts[3]] += 1
    by_color = {
        color: [n for (c, _), n in pairs.items() if c == color] for color in make_data.COLORS
    }
    best = sum(max(of) for of in by_color.values()) / pairs.total()
    assert pairs.total() >= 200 and best < 0.4  # 0.25 but for chance


def test_no_held_out_picture_is_trained_on_and_pictures_show_what_is_said():
    train, held_out = asked_in(False), asked_in(True)
    named = [{n for row in side[1] for n in row["pictures"]} for side in (train, held_out)]
    assert not named[0] & named[1] and len(named[0]) >= 700
    pictures = held_out[2]
    bytes_of = [{pictures[n].read() for n in side} for side in named]
    assert not bytes_of[0] & bytes_of[1]
    seen = 0
    for row in held_out[1]:
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            if answer["content"] in make_data.COLORS and len(row["pictures"]) == 1:
                pixels = open_picture(pictures[row["pictures"][0]]).getcolors()
                _, most = max(pair for pair in pixels if min(pair[1]) < 200)
                expected = make_data.COLORS[answer["content"]]
                assert max(abs(a - b) for a, b in zip(most, expected, strict=True)) <= 16, question
                seen += 1
    assert seen >= 40
