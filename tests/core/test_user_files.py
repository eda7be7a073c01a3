"""What people's files hold: each input as it was met, and what is right."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import cli, tiny
from common.data import encodings, files
from common.data.files import held_out_files
from common.data.labels import encode_chat, encode_prompt, preview
from common.data.load import load_rows, summary
from common.data.prepare import prepare
from common.data.records import as_record
from common.data.split import describe_split, leak_check, split_rows
from common.data.turns import BadRow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DANPU_CACHE", str(tmp_path / "cache"))


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(*rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path, kind="chat"):
    dataset, stats = load_rows(path, kind)
    return [json.loads(row) for row in dataset["row"]], stats


def turns(path):
    return [row["messages"] for row in load(path)[0]]


def refuses(call, *parts):
    with pytest.raises(SystemExit) as stop:
        call()
    message = str(stop.value)
    assert "\n" not in message and all(part in message for part in parts), message


SEA = [user("海水咸吗"), bot("咸的。")]
RAIN = [user("雨水咸吗"), bot("不咸。")]
TALK = [{"from": "human", "value": "海水咸吗"}, {"from": "gpt", "value": "咸的。"}]
ROWS = [
    {"instruction": "海水咸吗", "output": "咸的。"},
    {"instruction": "雨水咸吗", "output": "不咸。"},
]
CSV = "instruction,output\n海水咸吗,咸的。\n雨水咸吗,不咸。\n"

# ---- layouts -------------------------------------------------------------------------------------

LAYOUTS = {  # name of the file: its text
    "wrapped.json": json.dumps({"version": 2, "data": ROWS}),
    "indented_wrap.json": json.dumps({"info": {"by": "us"}, "data": ROWS}, indent=1),
    "wrap_of_lists.json": json.dumps({"data": [SEA, RAIN]}),
    "columns.json": json.dumps({k: {"0": ROWS[0][k], "1": ROWS[1][k]} for k in ROWS[0]}),
    "columns_of_lists.json": json.dumps({k: [row[k] for row in ROWS] for k in ROWS[0]}),
    "index.json": json.dumps({"0": ROWS[0], "1": ROWS[1]}, indent=2),
    "by_id.json": json.dumps({"a1": ROWS[0], "b7": ROWS[1]}),
    "split.json": json.dumps(
        {"columns": list(ROWS[0]), "index": [0, 1], "data": [list(r.values()) for r in ROWS]}
    ),
    "lists.jsonl": lines(SEA, RAIN),
    "array_of_lists.json": json.dumps([SEA, RAIN], indent=1),
    "one_list.jsonl": lines(SEA) + lines(RAIN),
    "first_line_cut.jsonl": '{"instruction": "坏\n' + lines(*ROWS),
    "joined.jsonl": "\ufeff" + lines(ROWS[0]) + "\ufeff" + lines(ROWS[1]),
    "joined.json": "\ufeff" + json.dumps(ROWS[:1]) + "\ufeff" + json.dumps(ROWS[1:]),
    "joined.csv": "\ufeffinstruction,output\n海水咸吗,咸的。\n\ufeffinstruction,output\n雨水咸吗,不咸。\n",
    "other_order.csv": "instruction,output\n海水咸吗,咸的。\noutput,instruction\n不咸。,雨水咸吗\n",
    "separator.csv": "\ufeffsep=;\r\n" + CSV.replace(",", ";").replace("\n", "\r\n"),
    "quoted_separator.csv": '"sep=;"\n' + CSV.replace(",", ";"),
    "blank_first.csv": "\r\n  \r\n,,\r\n" + CSV.replace("\n", "\r\n"),
    "blank_end.csv": CSV + ",,,\n\n",
    "json_text.csv": table(["id", "messages"], [1, json.dumps(SEA)], [2, json.dumps(RAIN)]),
    "python_text.csv": table(["messages"], [str(SEA)], [str(RAIN)]),
    "json_text.jsonl": lines(
        {"conversations": json.dumps(TALK)}, {"conversations": json.dumps(RAIN)}
    )
    .replace("from", "role")
    .replace("human", "user")
    .replace("value", "content"),
    "pairs_text.jsonl": lines(
        {"conversation": json.dumps([{"human": "海水咸吗", "assistant": "咸的。"}])},
        {"conversation": json.dumps([{"human": "雨水咸吗", "assistant": "不咸。"}])},
    ),
    "trl_text.csv": table(
        ["prompt", "completion"], *([json.dumps([turn]) for turn in talk] for talk in (SEA, RAIN))
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_read(tmp_path, name):
    assert turns(write(tmp_path / name, LAYOUTS[name])) == [SEA, RAIN]


def test_lines_of_cells_end_as_everywhere(tmp_path):
    text = 'question,answer\r\n"一行\r\n二行","答\r\n完"\r\n"旧\r式",答\r\n'
    got = turns(write(tmp_path / "a.csv", text))
    assert got == [[user("一行\n二行"), bot("答\n完")], [user("旧\n式"), bot("答")]]


def test_lines_are_counted_from_the_top_of_a_table(tmp_path):
    path = write(tmp_path / "a.csv", "\nsep=;\ninstruction;output\n海;咸\n雨;淡;多\n")
    _, stats = load(path)
    assert stats["examples"]["wrong number of cells"].startswith(f"{path}:5:")


def test_a_table_joined_to_one_of_other_columns(tmp_path):
    """Its rows are not taken for those of the first one."""
    text = CSV + "answer,question\n雪是冷的。,雪冷吗\n"
    got, stats = load(write(tmp_path / "a.csv", text))
    assert [row["messages"] for row in got] == [SEA, RAIN]
    named = {"a header of other columns inside the file": 1, "missing instruction": 1}
    assert stats["dropped"] == named


def test_lists_inside_another_kind_of_file_are_no_rows(tmp_path):
    vocabulary = json.dumps({"version": "1", "added_tokens": [{"id": 0, "content": "<s>"}]})
    path = write(tmp_path / "tokenizer.json", vocabulary)
    refuses(lambda: load(path, "text"), "columns seen: version, added_tokens")


def test_what_is_no_table_of_rows_is_told(tmp_path):
    both = json.dumps({"train": ROWS, "test": ROWS})
    refuses(lambda: load(write(tmp_path / "a.json", both)), "several lists", "train, test")
    numpy = table(
        ["messages"], *[["[{'role': 'user', 'content': '海'}\n {'role': 'assistant'}]"]] * 2
    )
    refuses(lambda: load(write(tmp_path / "b.csv", numpy)), "neither JSON nor Python", "json.dumps")
    twice = "instruction,output,output\n问,答,答\n"
    refuses(lambda: load(write(tmp_path / "a.csv", twice)), "two columns 'output'")
    refuses(lambda: load(write(tmp_path / "a.xlsx", b"PK")), "a.xlsx", "CSV UTF-8", "to_csv")


# ---- encodings -----------------------------------------------------------------------------------

SIMPLIFIED = "天气真好，我们去公园散步吧。"
ENCODED = [  # (encoding it was written in, text, what it is read as)
    ("gb18030", SIMPLIFIED, "gb18030"),
    ("gbk", "這句話用繁體字寫成，也在國標碼裏。", "gb18030"),
    ("big5", "請問圖書館幾點關門？晚上九點。", "big5hkscs"),
    ("shift_jis", "図書館は何時に閉まりますか。九時です。", "cp932"),
    ("euc_jp", "図書館は何時に閉まりますか。九時です。", "euc_jp"),
    ("euc_kr", "도서관은 몇 시에 문을 닫습니까 보통 저녁 아홉 시에 닫고 주말에는 쉽니다", "cp949"),
    ("cp1252", "À quelle heure ferme le café ? “Vers neuf heures”, dit-il.", "cp1252"),
    ("latin-1", "Für Überraschungen ist gesorgt, señor", "cp1252"),
    ("utf-16-le", SIMPLIFIED, "utf-16-le"),
    ("utf-16-be", SIMPLIFIED, "utf-16-be"),
    ("utf-16", SIMPLIFIED, "utf-16"),
    ("utf-32", SIMPLIFIED, "utf-32"),
]


@pytest.mark.parametrize(("written", "text", "name"), ENCODED, ids=[e[0] for e in ENCODED])
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_encoding_is_recognised_and_a_guess_is_named(tmp_path, written, text, name, form):
    rows = [[user(f"{i} {text}"), bot(text)] for i in range(2)]
    if form == "jsonl":
        content = lines(*({"messages": row} for row in rows))
    else:
        cells = [[turn["content"] for turn in row] for row in rows]
        content = table(["question", "answer"], *cells)
    path = write(tmp_path / f"a.{form}", content.encode(written))
    dataset, stats = load_rows(path)
    assert [json.loads(row)["messages"] for row in dataset["row"]] == rows
    assert stats["encodings"] == {str(path): name}
    said = summary(stats)
    if name in ("utf-16", "utf-32"):
        assert not stats["guesses"]
    else:
        assert f"a.{form}: read as {name}, e.g. " in said and text[4:12] in said


def test_an_encoding_that_is_none_is_refused_with_an_example(tmp_path):
    russian = lines({"instruction": "Привет, как дела", "output": "Хорошо, спасибо большое"})
    path = write(tmp_path / "a.jsonl", russian.encode("cp1251"))
    refuses(lambda: load(path), "a.jsonl", "neither UTF-8 nor", "gb18030", "iconv")


def test_a_character_cut_at_the_end_is_no_other_encoding(tmp_path):
    content = lines(*ROWS).encode() + '{"instruction": "半'.encode()[:-1]
    got, stats = load(write(tmp_path / "a.jsonl", content))
    assert len(got) == 2 and stats["encodings"] == {str(tmp_path / "a.jsonl"): "utf-8"}


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
def test_a_terminal_that_cannot_show_it_gets_a_question_mark(tmp_path, encoding):
    code = "from common import cli\ncli.run(lambda: cli.say('好\\U0001f600\\udcb5!'))\n"
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = "好" if encoding == "gbk" else "?"
    assert done.stdout.decode(encoding).strip() == f"{shown}??!"


def test_shells_ask_for_utf8_files_and_keep_the_terminal(tmp_path):
    fake = write(tmp_path / "locale", "#!/bin/sh\necho GBK\n")
    fake.chmod(0o755)
    script = f'source "{ROOT}/common/launch.sh"; use_utf8; echo $PYTHONUTF8 $PYTHONIOENCODING'
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    for path, want in ((str(tmp_path), "1 GBK:replace"), ("", "1")):
        done = subprocess.run(
            ["bash", "-c", script],
            env=env | {"PATH": f"{path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == want


def test_a_name_of_other_bytes_is_read(tmp_path):
    name = os.fsdecode("数据".encode("gbk"))
    path = write(tmp_path / f"{name}.jsonl", lines(*ROWS))
    dataset, _ = load_rows(str(path))
    assert len(dataset) == 2 and dataset["source"][0].endswith("?.jsonl:1")


# ---- what stands in a row ------------------------------------------------------------------------

CELLS = {  # name: (row, the messages it means)
    "number": ({"instruction": "六乘七", "output": 42}, [user("六乘七"), bot("42")]),
    "float": ({"question": "圆周率", "answer": 3.14}, [user("圆周率"), bot("3.14")]),
    "number given": (
        {"instruction": "平方是多少", "input": 7, "output": 49},
        [user("平方是多少\n7"), bot("49")],
    ),
    "null instruction": (
        {"instruction": None, "input": "海水咸吗", "output": "咸的。"},
        SEA,
    ),
    "nan instruction": (
        {"instruction": float("nan"), "input": "海水咸吗", "output": "咸的。"},
        SEA,
    ),
    "nan input": ({"instruction": "海水咸吗", "input": float("nan"), "output": "咸的。"}, SEA),
    "nan system": (
        {"instruction": "海水咸吗", "output": "咸的。", "system": float("nan"), "history": None},
        SEA,
    ),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "海水"}, {"text": "咸吗"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "咸的。", "image_url": None}],
                },
            ]
        },
        SEA,
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "说短些"}, *SEA]},
        [system("说短些"), *SEA],
    ),
    "empty system": ({"messages": [system(""), *SEA]}, [system(""), *SEA]),
    "null system": ({"messages": [system(None), *SEA]}, SEA),
    "a question about a word": (
        {"instruction": "Human: 是谁说的", "output": "人。"},
        [user("Human: 是谁说的"), bot("人。")],
    ),
    "a question about the other": (
        {"prompt": "Assistant：怎么念", "response": "助手。"},
        [user("Assistant：怎么念"), bot("助手。")],
    ),
    "an answered transcript": (
        {"instruction": "Human: 好\nAssistant: 好呀\n怎么译成英文？", "output": "Hi"},
        [user("Human: 好\nAssistant: 好呀\n怎么译成英文？"), bot("Hi")],
    ),
    "a transcript": (
        {
            "instruction": "Human: 好\nAssistant: 好呀\nHuman: 海水咸吗\nAssistant:",
            "output": "咸的。",
        },
        [user("好"), bot("好呀"), *SEA],
    ),
    "learned": (
        {"messages": [user("好"), bot("不好", weight=0), SEA[0], bot("咸的。", weight=1)]},
        [user("好"), bot("不好", train=False), *SEA],
    ),
    "loss": (
        {"messages": [user("好"), bot("不好", loss=False), SEA[0], bot("咸的。", loss=True)]},
        [user("好"), bot("不好", train=False), *SEA],
    ),
    "filled switches": (
        {"messages": [user("海水咸吗") | {"train": None}, bot("咸的。", train=True)]},
        SEA,
    ),
    "a question is not learned anyway": (
        {"conversations": [TALK[0] | {"weight": 0}, TALK[1] | {"weight": 1.0}]},
        SEA,
    ),
    "ends with what is not learned": (
        {"messages": [*SEA, user("再说"), bot("胡说", train=False)]},
        SEA,
    ),
    "good by kto": ({"prompt": "海水咸吗", "completion": "咸的。", "label": True}, SEA),
    "weight of the row": ({"instruction": "海水咸吗", "output": "咸的。", "weight": 1.0}, SEA),
    "an ordinary label": ({"question": "海水咸吗", "answer": "咸的。", "label": 0}, SEA),
    "pictures apart": ({"question": "海水咸吗", "answer": "咸的。", "images": []}, SEA),
}


@pytest.mark.parametrize("name", CELLS)
def test_row_means(tmp_path, name):
    row, want = CELLS[name]
    got, stats = load(write(tmp_path / "a.jsonl", lines(row)))
    assert [r["messages"] for r in got] == [want] and not stats["dropped"]


DROPPED = {  # reason: row
    "weight of a turn is neither 0 nor 1": {"messages": [SEA[0], bot("咸的。", weight=0.5)]},
    "loss of a turn is neither 0 nor 1": {"messages": [SEA[0], bot("咸的。", loss="no")]},
    "train on a turn of the user": {"messages": [SEA[0] | {"train": True}, SEA[1]]},
    "train_detail of a turn": {"messages": [SEA[0], bot("咸", train_detail=[{"begin_offset": 0}])]},
    "no answer to learn": {"messages": [SEA[0], bot("咸的。", weight=0)]},
    "weight of a row is neither 0 nor 1": {"messages": SEA, "weight": 0.3},
    "weight is 0": {"messages": SEA, "weight": 0},
    "train is false": {"messages": SEA, "train": False},
    "label is false": {"messages": SEA, "label": False},
    "kto_tag is false": {"messages": SEA, "kto_tag": "false"},
    "a part of a turn is not text": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, SEA[1]]
    },
    "a row with pictures or sound": {
        "messages": [user("<image>这是什么"), bot("海。")],
        "images": ["a.png"],
    },
    "tools of several turns": {
        "messages": [
            user("甲") | {"tools": [{"name": "a"}]},
            bot("乙"),
            user("丙") | {"tools": [{"name": "b"}]},
            bot("丁"),
        ]
    },
    "wrong tools": {"messages": SEA, "tools": ["search"]},
}


@pytest.mark.parametrize("reason", DROPPED)
def test_row_is_dropped_by_name(tmp_path, reason):
    path = write(tmp_path / "a.jsonl", lines({"messages": RAIN}, DROPPED[reason]))
    got, stats = load(path)
    assert [row["messages"] for row in got] == [RAIN] and stats["dropped"] == {reason: 1}
    assert stats["examples"][reason].startswith(f"{path}:2: {reason}")


def test_weights_of_a_table_are_read_too(tmp_path):
    table = "instruction,output,weight\n海水咸吗,咸的。,1\n雨水咸吗,咸的。,0.0\n雪咸吗,不,0.5\n冰咸吗,不,1.0\n"
    got, stats = load(write(tmp_path / "a.csv", table))
    assert len(got) == 2
    assert stats["dropped"] == {"weight is 0": 1, "weight of a row is neither 0 nor 1": 1}


def test_labelled_answers_are_no_pairs(tmp_path):
    row = {"prompt": "海水咸吗", "completion": "咸的。", "label": 1}
    path = write(tmp_path / "a.jsonl", lines(row, row | {"completion": "甜的。", "label": 0}))
    assert load(path)[1]["dropped"] == {"label is false": 1}
    refuses(lambda: load(path, "preference"), "KTO", "no pair")


def test_a_pair_is_learned_whole(tmp_path):
    pair = {"prompt": [*RAIN, SEA[0]], "chosen": [bot("咸的。")], "rejected": [bot("甜的。")]}
    pair["prompt"][1] = bot("不咸。", weight=0)
    half = pair | {"chosen": [bot("咸的。", weight=0)]}
    got, stats = load(write(tmp_path / "a.jsonl", lines(pair, half)), "preference")
    assert [row["prompt"] for row in got] == [[*RAIN, SEA[0]]]
    assert stats["dropped"] == {"an answer of a pair is not to be learned": 1}


def test_pairs_kept_as_text(tmp_path):
    cells = [json.dumps([turn]) for turn in (*SEA, bot("甜的。"))]
    text = table(["prompt", "chosen", "rejected"], cells)
    got, _ = load(write(tmp_path / "a.csv", text), "preference")
    assert got == [{"prompt": [SEA[0]], "chosen": [SEA[1]], "rejected": [bot("甜的。")]}]


def test_words_before_the_first_question_are_left_out_and_counted(tmp_path):
    hello = {"from": "gpt", "value": "您好，我能帮什么忙？"}
    first = {"conversations": [hello, *TALK]}
    after_system = {"conversations": [{"from": "system", "value": "短"}, hello, hello, *TALK]}
    path = write(tmp_path / "a.jsonl", lines(first, after_system, {"conversations": TALK}))
    got, stats = load(path)
    assert [row["messages"] for row in got] == [SEA, [system("短"), *SEA], SEA]
    assert not stats["dropped"] and list(stats["changed"].values()) == [2]
    assert f"2 rows changed: {next(iter(stats['changed']))}, e.g. {path}:1" in summary(stats)


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TRACKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LAST_ONLY = TRACKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")


@pytest.mark.parametrize("template", [CHATML, TRACKED, LAST_ONLY])
def test_a_turn_that_is_not_learned_has_no_label(template):
    tokenizer = tiny.make_tokenizer(
        ["海水咸吗咸的雨水不", "user assistant"],
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
    )
    silent = [RAIN[0], bot("咸的。", train=False), *SEA]
    spoken = [RAIN[0], bot("咸的。"), *SEA]
    row = encode_chat(tokenizer, silent, 200)
    shown = preview(tokenizer, row["input_ids"], row["labels"], color=False)
    assert shown.count("[[") == 1 and "[[咸的。<|im_end|>]]" in shown.split("海水咸吗")[1]
    both = encode_chat(tokenizer, spoken, 200)
    assert both["input_ids"] == row["input_ids"]
    assert (both["labels"] != row["labels"]) == (template is not LAST_ONLY)
    assert encode_prompt(tokenizer, silent[:3]) == encode_prompt(tokenizer, spoken[:3])
    assert encode_chat(tokenizer, silent[:2], 200) is None


# ---- calls and nulls -----------------------------------------------------------------------------

TIDE = {
    "name": "tide",
    "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
}
CALL = {"name": "tide", "arguments": {"port": "青岛"}}
CALLED = {
    "messages": [
        user("青岛涨潮了吗"),
        bot("", tool_calls=[{"type": "function", "function": CALL}]),
        {"role": "tool", "content": "涨潮"},
        bot("涨了。"),
    ],
    "tools": [{"type": "function", "function": TIDE}],
}


@pytest.mark.parametrize("content", [None, "", "我看看。"])
@pytest.mark.parametrize("where", ["row", "user", "system"])
def test_old_function_calls_are_tool_calls(tmp_path, content, where):
    old = CALL | {"arguments": json.dumps(CALL["arguments"])}
    messages = [
        user("青岛涨潮了吗"),
        {"role": "assistant", "content": content, "function_call": old},
        {"role": "function", "name": "tide", "content": "涨潮"},
        bot("涨了。", function_call=None),
    ]
    row = {"messages": messages}
    if where == "row":
        row["functions"] = [TIDE]
    elif where == "user":
        messages[0]["functions"] = [TIDE]
    else:
        messages.insert(0, system("") | {"functions": json.dumps([TIDE])})
    want = json.loads(json.dumps(CALLED))
    want["messages"][1]["content"] = content or ""
    want["messages"][2]["name"] = "tide"
    assert load(write(tmp_path / "a.jsonl", lines(row)))[0] == [want]


def test_calls_of_tool_roles(tmp_path):
    talk = [
        {"role": "user", "content": "青岛涨潮了吗"},
        {"role": "tool_call", "content": json.dumps(CALL)},
        {"role": "tool_response", "content": "涨潮"},
        {"role": "assistant", "content": "涨了。"},
    ]
    row = {"messages": talk, "tools": json.dumps([{"type": "function", "function": TIDE}])}
    assert load(write(tmp_path / "a.jsonl", lines(row)))[0] == [CALLED]


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def asked_of(tools, **arguments):
    name = tools[0]["function"]["name"]
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [user("问"), bot("", tool_calls=[call])], "tools": tools}


FILLED = [
    asked_of([tool("tide", port={"type": "string", "enum": ["青岛", None]})], port="青岛"),
    asked_of([tool("wind", level={"type": "integer", "default": None})], level=3),
    asked_of(
        [tool("both", port={"type": "string"}, level={"type": "integer"})], port="烟台", level=4
    ),
]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_keys_that_arrow_filled_in_go(tmp_path, form):
    """In parquet, and in the JSON that `datasets` writes of such a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(FILLED)
    assert table.to_pylist() != FILLED, "Arrow fills nothing in any more"
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    else:
        write(path, lines(*table.to_pylist()))
    got, _ = load(path)
    # a default that is null cannot be told from one that was filled in: it stays where it stands
    for row in got:
        for schema in row["tools"][0]["function"]["parameters"]["properties"].values():
            if schema.get("default", 0) is None and schema != {"type": "integer", "default": None}:
                del schema["default"]
    plain = json.loads(json.dumps(FILLED))
    for schema in (got[2]["tools"][0]["function"]["parameters"]["properties"]["level"],):
        schema.pop("default", None)
    assert got == plain


def test_nulls_that_were_meant_stay(tmp_path):
    tools = [
        tool(
            "book",
            seat={"type": ["string", "null"], "default": None, "enum": ["窗", None]},
            default={"type": "string"},
            enum={"type": "object", "properties": {"required": {"type": "null"}}},
        )
    ]
    row = asked_of(tools, seat=None, enum={"required": None}, default="x")
    assert load(write(tmp_path / "a.jsonl", lines(row)))[0] == [row]
    as_text = json.loads(json.dumps(row))
    call = as_text["messages"][1]["tool_calls"][0]["function"]
    call["arguments"]["unknown"] = None  # of a tool that has no such property
    want = json.loads(json.dumps(as_text))
    call["arguments"] = json.dumps(call["arguments"])
    as_text["tools"] = json.dumps(as_text["tools"])
    assert load(write(tmp_path / "b.jsonl", lines(as_text)))[0] == [want], "text is never filled in"


# ---- folders, splits, leaks ----------------------------------------------------------------------


def test_names_set_files_apart(tmp_path):
    folder = tmp_path / "set"
    apart = ["test.jsonl", "my_dev.json", "val/0.csv", "data/test-00000-of-00001.parquet"]
    apart += ["valid_zh.jsonl.gz", "测试集.csv"]
    others = ["train.jsonl", "data/train-00000-of-00002.parquet", "devops.json", "contest.csv"]
    others += ["train_test.jsonl"]
    paths = [folder / name for name in (*apart, *others)]
    folder.mkdir()
    assert held_out_files(folder, paths) == [folder / name for name in apart]
    assert held_out_files(folder, paths[:2]) == [], "all there is"
    assert held_out_files(folder / "test.jsonl", [folder / "test.jsonl"]) == [], "named itself"


def test_files_set_apart_are_held_out(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    asked = [f"第{i}个问题" for i in range(30)]
    write(folder / "train.jsonl", lines(*({"instruction": q, "output": "答"} for q in asked)))
    tested = [*asked[:2], *(f"考题{i}" for i in range(6))]
    write(folder / "test.jsonl", lines(*({"instruction": q, "output": "答"} for q in tested)))
    write(folder / "dataset_info.json", json.dumps({"mine": {"file_name": "train.jsonl"}}))
    rows, stats = load_rows(folder)
    assert stats["ignored"] == ["dataset_info.json"] and len(rows) == 38
    assert f"by their names: {folder / 'test.jsonl'}" in summary(stats)
    train, held_out = split_rows(rows, 0.05, 5)
    assert len(train) == 28 and len(held_out) == 5
    assert all("test.jsonl" in source for source in held_out["source"])
    said = "\n".join(describe_split(rows, train, held_out, 0.05, 5))
    assert "2 left out" in said and "3 of the files held out are not used" in said


def test_a_spreadsheet_in_a_folder_is_named(tmp_path):
    write(tmp_path / "a.jsonl", lines(*ROWS))
    write(tmp_path / "b.xlsx", b"PK")
    ignored = load(tmp_path)[1]["ignored"]
    assert len(ignored) == 1 and ignored[0].startswith("b.xlsx (") and "CSV UTF-8" in ignored[0]


def with_text(texts):
    return [{"system": t, "instruction": "这段话讲了什么？", "output": f"{t}。"} for t in texts]


def test_the_system_turn_is_part_of_the_prompt(tmp_path):
    rows, _ = load_rows(
        write(tmp_path / "a.jsonl", lines(*with_text(f"第{i}段" for i in range(40))))
    )
    assert len(set(rows["prompt_key"])) == 40
    train, held_out = split_rows(rows, 0.1)
    assert len(held_out) == 4 and not describe_split(rows, train, held_out, 0.1, 500)
    other = write(tmp_path / "test.jsonl", lines(*with_text(["另一段", "第3段"])))
    assert leak_check(rows, other)[1] == 1, "the same question about another text is no leak"
    bare = write(tmp_path / "bare.jsonl", lines({"instruction": "这段话讲了什么？", "output": "x"}))
    assert leak_check(rows, bare)[1] == 40, "a test without a text asks what all of them ask"


def encode(row):
    return {"input_ids": [1, 2], "labels": [1, 2]}


def test_a_share_that_was_not_asked_for_is_said(tmp_path, capsys):
    rows = [{"instruction": f"写诗{i % 2}", "output": f"诗{i}"} for i in range(40)]
    dataset, stats = load_rows(write(tmp_path / "a.jsonl", lines(*rows)))
    prepare(dataset, stats, encode, cli.DataArgs(), "chat", seed=0, depends_on=[])
    said = capsys.readouterr().out
    assert "20 of 40 rows are held out, --eval_ratio 0.05 asks for 2" in said
    assert "2 different prompts" in said


def test_nothing_left_after_the_leak_check_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(*ROWS))
    dataset, stats = load_rows(path)
    args = cli.DataArgs(leak_check=str(path), eval_ratio=0.0)
    refuses(
        lambda: prepare(dataset, stats, encode, args, "chat", seed=0, depends_on=[]),
        f"--leak_check {path}",
        "nothing is left",
    )


def test_guesses_are_ranked_apart():
    """The right encoding is clearly the best one for a long text of each kind."""
    for written, text, name in ENCODED[:8]:
        sample = text.encode(written) * 3
        scores = {guess.name: encodings._score(guess, sample) for guess in encodings.GUESSES}
        assert scores[name] > 0.6, (written, scores)
        assert encodings._best(sample) == name


def test_records_that_are_lists_or_turns_have_columns():
    assert as_record(SEA) == {"messages": SEA}
    for other in (["a", "b"], "text", 3, None, [SEA]):
        with pytest.raises(BadRow):
            as_record(other)
    assert files.suffix_of(Path("a.CSV.gz")) == ".csv"
