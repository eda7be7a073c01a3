"""The samples, the tokenizer and the chat template of minimind_npu/: what they hold, teach and refuse."""

import csv
import json
import re
import sys
from collections import Counter
from functools import cache

import pytest
from harness import ROOT, expect, finish, own_modules, start
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from common.data import shapes
from common.data.labels import encode_chat, encode_prompt, preview
from common.data.load import load_rows
from common.data.split import split_rows

RECIPE = ROOT / "minimind_npu"
DATA = RECIPE / "data"
make_data, train_tokenizer, pretrain = own_modules(
    "minimind_npu", "samples.make_data", "train_tokenizer", "stages.pretrain"
)
ODD = [
    "Hello, world! 你好 😀\tx  y\r\n\n",
    "𠮷野家 ﬁ é ñ 한국어",
    "def f(x):\n    return x**2 + 3.14",
    "<think> </tool_call>",
]


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(RECIPE / "tokenizer")


@cache
def rows(name: str, kind: str = "chat"):
    dataset, stats = load_rows(str(DATA / name), kind)
    return dataset, stats, [json.loads(row) for row in dataset["row"]]


def texts_of(name: str) -> list[str]:
    return list(train_tokenizer.read_texts([str(DATA / name)], 0, Counter()))


def pieces(text: str) -> list[str]:
    return [tokenizer().decode([i]) for i in tokenizer().encode(text, add_special_tokens=False)]


def trained(messages, **more) -> str:
    """What is trained of a conversation, run by run."""
    row = encode_chat(tokenizer(), messages, 4096, **more)
    return [
        part.split("]]")[0]
        for part in preview(tokenizer(), row["input_ids"], row["labels"], False).split("[[")[1:]
    ]


# ---- samples --------------------------------------------------------------------------------------------------


def test_the_script_writes_these_files(tmp_path):
    make_data.main(tmp_path)
    made, here = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path, DATA)
    )
    assert made == here
    assert max(map(len, here.values())) <= 240 * 1024 and 1e6 < sum(map(len, here.values())) < 3.2e6


def test_a_file_above_the_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="above"):
        make_data.write(tmp_path / "big.jsonl", ["x" * make_data.LIMIT])


@pytest.mark.parametrize(
    "name, kind, least",
    [
        ("pretrain", "text", 5000),
        ("sft", "chat", 4000),
        ("dpo.jsonl", "preference", 600),
        ("reason.jsonl", "chat", 250),
    ]
    + [
        ("lora_identity.jsonl", "chat", 90),
        ("lora_plants.jsonl", "chat", 200),
        ("eval/held_out.txt", "text", 50),
    ],
)
def test_every_row_is_read(name, kind, least):
    _, stats, found = rows(name, kind)
    assert least <= len(found) == stats["read"] and not stats["dropped"] and not stats["ignored"]


def test_sft_has_every_shape_of_turn():
    _, _, found = rows("sft")
    roles = Counter(tuple(m["role"] for m in row["messages"]) for row in found)
    several = ("user", "assistant") * 3
    assert {
        ("user", "assistant"),
        ("system", "user", "assistant"),
        several,
        several[:4],
    } <= roles.keys()
    assert roles["user", "assistant", "tool", "assistant"] > 100
    assert sum("tools" in row for row in found) > 150
    assert sum("reasoning_content" in row["messages"][-1] for row in found) > 200
    raw = [
        json.loads(line)["conversations"]
        for line in (DATA / "sft/tools.jsonl").open(encoding="utf-8")
    ]
    assert isinstance(raw[0][0]["tools"], str) and isinstance(
        raw[0][2]["tool_calls"], str
    )  # as in MiniMind's files


def test_sums_are_right_everywhere():
    said = "\n".join(
        p.read_text(encoding="utf-8")
        for name in ("pretrain", "sft")
        for p in (DATA / name).glob("*.jsonl")
    )
    signs = {
        "加": int.__add__,
        "减": int.__sub__,
        "乘": int.__mul__,
        "+": int.__add__,
        "-": int.__sub__,
    }
    found = re.findall(r"(\d+)([加减乘+-])(\d+)(?:等于|=)(\d+)", said)
    assert len(found) > 9000 and all(
        signs[sign](int(a), int(b)) == int(c) for a, sign, b, c in found
    )
    numbers = {make_data.in_words(n): n for n in range(100)}
    words = re.findall(
        r"([零一二三四五六七八九十]+)([加减])([零一二三四五六七八九十]+)等于([零一二三四五六七八九十]+)",
        said,
    )
    assert len(words) > 3000
    assert all(signs[sign](numbers[a], numbers[b]) == numbers[c] for a, sign, b, c in words)


def test_one_question_has_one_answer():
    """Else exact match on held-out questions cannot be reached."""
    answers = {}
    for row in rows("sft")[2]:
        *asked, answer = row["messages"]
        assert answers.setdefault(json.dumps(asked, ensure_ascii=False), answer) == answer


def test_held_out_questions_are_new_and_can_be_answered():
    train, held_out = split_rows(rows("sft")[0])
    known = "\n".join(row["text"] for row in rows("pretrain", "text")[2])
    known_answers = Counter(json.loads(row)["messages"][-1]["content"] for row in train["row"])
    seen, asked = 0, [json.loads(row)["messages"] for row in held_out["row"]]
    for messages in asked:
        assert messages[-2]["content"] not in known  # pretrain/ asks in other words
        seen += messages[-1]["content"] in known_answers
    assert len(asked) > 200 and seen > 0.8 * len(asked)  # the others are to be computed or read


def test_evaluation_stands_in_no_corpus():
    corpora = "\n".join(row["text"] for row in rows("pretrain", "text")[2])
    asked = {row["messages"][0]["content"] for row in rows("sft")[2]}
    for line in (DATA / "eval/held_out.txt").read_text(encoding="utf-8").splitlines():
        assert line.replace(" ", "\n") not in corpora and line not in corpora
    for name in ("choice", "gsm"):
        for line in (DATA / f"eval/{name}.jsonl").open(encoding="utf-8"):
            question = json.loads(line)["question"]
            assert question not in asked and question not in corpora


def test_evaluation_has_the_layouts_of_the_known_sets():
    files = sorted((DATA / "eval/ceval").glob("*_val.csv"))
    assert len(files) == 4
    for file in files:
        table = list(csv.DictReader(file.open(encoding="utf-8")))
        assert list(table[0]) == ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
        assert all(
            row[row["answer"]] == row["explanation"] and len({row[c] for c in "ABCD"}) == 4
            for row in table
        )
        assert len({row["answer"] for row in table}) == 4
    for line in (DATA / "eval/choice.jsonl").open(encoding="utf-8"):
        choices = json.loads(line)["choices"]
        assert choices["label"] == list("ABCD") and len(set(choices["text"])) == 4
    for line in (DATA / "eval/gsm.jsonl").open(encoding="utf-8"):
        said, _, value = json.loads(line)["answer"].partition("\n#### ")
        assert re.findall(r"\d+", said)[-1] == value


def test_chosen_answers_are_polite_and_neither_length_nor_truth_alone_tells():
    kinds = Counter()
    for row in rows("dpo.jsonl", "preference")[2]:
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        kinds[
            rejected["content"] in make_data.UNWILLING,
            len(chosen["content"]) > len(rejected["content"]),
        ] += 1
        assert any(chosen["content"].startswith(p.partition("{")[0]) for p in make_data.POLITE)
    assert kinds[True, True] > 80 and kinds[False, True] > 80 and kinds[False, False] > 80


def test_reason_rows_think_in_the_content_or_beside_it():
    raw = [
        json.loads(line)["conversations"][-1]
        for line in (DATA / "reason.jsonl").open(encoding="utf-8")
    ]
    inside = [
        m
        for m in raw
        if re.fullmatch(r"<think>\n.+\n</think>\n<answer>\n.+\n</answer>", m["content"])
    ]
    beside = [
        m
        for m in raw
        if re.fullmatch(r"<answer>\n.+\n</answer>", m["content"]) and m["reasoning_content"]
    ]
    assert len(inside) > 150 and len(beside) > 50 and len(inside) + len(beside) == len(raw)
    for row in rows("reason.jsonl")[2]:  # and both are trained alike
        (answer,) = trained(row["messages"])
        assert re.fullmatch(r"<think>\n.+\n</think>\n\n<answer>\n.+\n</answer><\|im_end\|>", answer)


# ---- tokenizer ------------------------------------------------------------------------------------------------


def test_the_first_command_makes_the_shipped_tokenizer(tmp_path):
    done = expect(
        finish(
            start(
                [sys.executable, RECIPE / "train_tokenizer.py", "--output_dir", tmp_path / "made"]
            )
        )
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "made" / name).read_bytes() == (RECIPE / "tokenizer" / name).read_bytes()
    assert (RECIPE / "tokenizer/chat_template.jinja").read_bytes() == (
        RECIPE / "chat_template.jinja"
    ).read_bytes()
    assert (RECIPE / "tokenizer/tokenizer.json").stat().st_size < 240 * 1024
    assert re.search(r"1\.2\d characters/token, 3\.\d\d bytes/token", done.stdout)
    assert "decoded token by token: equal to the text" in done.stdout


def test_fixed_ids():
    names = [tokenizer().convert_ids_to_tokens(i) for i in range(36)]
    assert names[:4] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved_3|>"]
    assert names[21:30] == [*train_tokenizer.TAGS, "<|buffer1|>"] and names[35] == "<|buffer7|>"
    assert (tokenizer().pad_token_id, tokenizer().bos_token_id, tokenizer().eos_token_id) == (
        0,
        1,
        2,
    )
    assert tokenizer().unk_token_id == 0 and tokenizer().model_max_length == 32768
    assert all(
        tokenizer().encode(name, add_special_tokens=False) == [i] for i, name in enumerate(names)
    )
    assert tokenizer().decode(range(36), skip_special_tokens=True) == "".join(train_tokenizer.TAGS)


def test_texts_survive():
    texts = [*ODD, *(row["text"] for row in rows("pretrain", "text")[2][::50])]
    assert train_tokenizer.streams(tokenizer(), texts)
    assert tokenizer().decode(tokenizer().encode("".join(ODD))) == "".join(ODD)


def test_words_are_whole_and_numbers_are_not():
    assert pieces("“勇敢”是反义词，首都北京") == [
        "“",
        "勇敢",
        "”",
        "是",
        "反",
        "义词",
        "，",
        "首都",
        "北京",
    ]
    assert pieces("三加十二=15") == ["三", "加", "十", "二", "=", "1", "5"]
    spell = normalizers.ByteLevel().normalize_str
    begun = {
        spell(char)[:2] for name in ("pretrain", "sft") for text in texts_of(name) for char in text
    }
    for i in range(
        36 + 256, len(tokenizer())
    ):  # a token is whole characters, or the beginning of one
        assert (
            "\ufffd" not in tokenizer().decode([i]) or tokenizer().convert_ids_to_tokens(i) in begun
        )


def test_frequent_characters_and_limits():
    texts = ["水光潋滟晴方好，山色空蒙雨亦奇。" * 20, "欲把西湖比西子，淡妆浓抹总相宜。" * 20, "鑫"]
    small = train_tokenizer.train(texts, 400)
    assert len(small) <= 400 and train_tokenizer.streams(small, [*texts, *ODD])
    wide, one = (train_tokenizer.train(texts, 700, max_han=most, coverage=0.99) for most in (4, 1))
    longest = [
        max(train_tokenizer.han(t.decode([i])) for i in range(36, len(t))) for t in (wide, one)
    ]
    assert longest == [4, 1] and len(one.encode("水光鑫")) == 2 + 3  # 鑫 is rare: three bytes
    counted = train_tokenizer.measure(one, texts)
    assert (counted["chars"], counted["bytes"], counted["tokens"]) == (641, 1923, 643)


def test_nothing_is_learned_from_marks():
    """Corpora of MiniMind carry the marks of documents and turns in their texts."""
    marked = "<|im_start|>湖光山色<|im_end|> <s>好</s><think>想</think>"
    learned = train_tokenizer.train([marked] * 50, 600)
    bare = train_tokenizer.train(["湖光山色", " ", "好", "想"] * 50, 600)
    assert learned.get_vocab() == bare.get_vocab()


@pytest.mark.parametrize(
    "text, texts",
    [
        ("<|im_start|>甲。<|im_end|> <|im_start|>乙。<|im_end|>", ["甲。", "乙。"]),
        ("<|im_start|>甲。<|im_end|>\n<|im_start|>乙。一半", ["甲。", "乙。一半"]),
        ("<s>甲。</s><s>乙。</s>", ["甲。", "乙。"]),
        ("在 <|im_start|> 之后写 <|im_end|>。", ["在 <|im_start|> 之后写 <|im_end|>。"]),
        ("没有标记", ["没有标记"]),
    ],
)
def test_a_row_with_marks_is_the_documents_between_them(text, texts):
    assert pretrain.documents(text) == texts
    start, end = tokenizer().bos_token_id, tokenizer().eos_token_id
    rows = [piece["input_ids"] for piece in pretrain.encode({"text": text}, tokenizer(), 512)]
    assert len(rows) == len(texts)
    for ids, document in zip(rows, texts, strict=True):
        assert (ids[0], ids[-1]) == (start, end) and not {0, start, end} & set(ids[1:-1])
        assert tokenizer().decode(ids[1:-1]) == document
    row = json.dumps({"text": text})
    assert json.loads(pretrain.first_document(row))["text"] == texts[0]


def test_numerals_may_merge():
    ids = [
        train_tokenizer.train(["十二。"] * 50, 600, split_numerals=s).encode("十二")
        for s in (True, False)
    ]
    assert [len(i) for i in ids] == [2, 1]


def test_merges_hold_where_numerals_are_not_cut():
    """A runtime that knows only deepseek-coder's cuts makes the same tokens: no merge has a numeral in it."""
    plain = json.loads(tokenizer().backend_tokenizer.to_str())
    cuts = plain["pre_tokenizer"]
    numerals = {"Regex": train_tokenizer.NUMERALS}
    left = [cut for cut in cuts["pretokenizers"] if cut.get("pattern") != numerals]
    assert len(left) == len(cuts["pretokenizers"]) - 1
    cuts["pretokenizers"] = left
    texts = [row["text"] for row in rows("pretrain", "text")[2][::10]]
    ids = [
        [e.ids for e in t.encode_batch(texts)]
        for t in (Tokenizer.from_str(json.dumps(plain)), tokenizer()._tokenizer)
    ]
    assert ids[0] == ids[1]


def test_rows_of_every_kind_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "一"}\n{"text": 5}\n{"text": "二"}\n', encoding="utf-8"
    )
    turns = [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "", "tool_calls": '[{"name": "f"}]'},
    ]
    worse = [turns[0], {"role": "assistant", "content": "差"}]
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"chosen": turns, "rejected": worse}), encoding="utf-8"
    )
    (tmp_path / "c.txt").write_text("三\n四\n", encoding="utf-8")
    dropped = Counter()
    texts = list(train_tokenizer.read_texts([str(tmp_path)], 0, dropped))
    assert [t for t in texts if train_tokenizer.han(t)] == [
        "一",
        "二",
        "问",
        "差",
        "三",
        "四",
    ] and dropped.total() == 1
    assert any('"name": "f"' in text for text in texts) and "assistant" in texts
    some = list(train_tokenizer.read_texts([str(tmp_path)], 3, Counter()))
    assert {"一", "三"} <= set(some) and not {"二", "四"} & set(some), "of every file as many"


@pytest.mark.parametrize("as_yaml", [False, True])
def test_a_tokenizer_learns_from_its_texts_in_their_shares(tmp_path, as_yaml):
    for name, size in (("zh", 90), ("en", 60)):
        text = "".join(f"{name} {i}\n" for i in range(size))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    paths = [f"{tmp_path}/zh.txt:0.7", f"{tmp_path}/en.txt:0.3"]
    if as_yaml:
        mix = "- {file: zh.txt, weight: 0.7}\n- {file: en.txt, weight: 0.3}\n"
        (tmp_path / "mix.yaml").write_text(mix, encoding="utf-8")
        paths = [str(tmp_path / "mix.yaml")]
    found = Counter(text[:2] for text in train_tokenizer.read_texts(paths, 100, Counter()))
    assert found == {"zh": 70, "en": 30}
    chars = sum(map(len, train_tokenizer.read_texts(paths, 0, Counter(), 200)))
    assert 200 <= chars < 212


def test_what_a_tokenizer_does_not_count_is_told(tmp_path, capsys):
    for name in ("zh.txt", "en.txt"):
        (tmp_path / name).write_text("湖光山色\n", encoding="utf-8")
    mix = tmp_path / "mix.yaml"
    mix.write_text("- {file: zh.txt, weight: 0.7}\n- {file: en.txt, epochs: 2}\n", "utf-8")
    ((found, share),) = train_tokenizer.groups([str(mix)])
    said = capsys.readouterr().out
    assert len(found) == 2 and share == 1
    assert "epochs mean nothing here" in said and "none counts here" in said


@pytest.mark.parametrize(
    "flags, code, said",
    [
        (["--vocab_size", "100"], 2, "at least 292"),
        (["--max_rows", "-1"], 2, "--max_rows -1"),
        (["--data_path", "nowhere.jsonl"], 1, "no such file"),
        (["--data_path", str(RECIPE / "tokenizer")], 1, "columns seen: "),
        (["--output_dir", str(RECIPE / "train_tokenizer.py")], 2, "is a file"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, flags, code, said, tmp_path):
    words = ["train_tokenizer.py", "--output_dir", str(tmp_path / "out"), *flags]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        train_tokenizer.main()
    if code == 1:
        assert isinstance(end.value.code, str) and said in end.value.code
    else:
        assert end.value.code == code and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- template -------------------------------------------------------------------------------------------------

USER, CALL = (
    {"role": "user", "content": "北京天气？"},
    {"name": "weather", "arguments": {"city": "北京"}},
)


def test_every_assistant_turn_is_trained_with_its_end_and_nothing_else():
    talk = [
        {"role": "system", "content": "你是小助手。"},
        USER,
        {"role": "assistant", "content": "晴。"},
    ]
    assert trained([*talk, USER, {"role": "assistant", "content": "雨。"}]) == [
        "晴。<|im_end|>",
        "雨。<|im_end|>",
    ]
    assert trained(talk, enable_thinking=True) == ["晴。<|im_end|>"]


def test_calls_and_answers_of_tools():
    (row,) = [r for r in rows("sft")[2] if r["messages"][0]["content"] == "北京今天天气怎么样？"][
        :1
    ]
    tools, messages = row["tools"], row["messages"]
    call, answer = trained(messages, tools=tools)
    assert call == f"<tool_call>\n{json.dumps(CALL, ensure_ascii=False)}\n</tool_call><|im_end|>"
    assert re.fullmatch(r"北京今天(晴|多云|小雨|大雪)，\d+度。<\|im_end\|>", answer)
    ids = encode_prompt(tokenizer(), messages[:-1], tools=tools)
    shown = tokenizer().decode(ids)
    assert shown.startswith('<|im_start|>system\n# Tools\n<tools>\n{"type": "function", ')
    assert shown.endswith(
        f"<tool_response>\n{messages[2]['content']}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    for i, name in enumerate(train_tokenizer.TAGS[:4], 21):
        assert name not in shown or i in ids  # one id each


def test_two_tool_answers_are_one_turn_and_two_calls_one_answer():
    call = {"type": "function", "function": CALL}
    talk = [USER, {"role": "assistant", "content": "查一下。", "tool_calls": [call, call]}]
    talk += [
        {"role": "tool", "content": "晴"},
        {"role": "tool", "content": "雨"},
        {"role": "assistant", "content": "好。"},
    ]
    both, last = trained(talk)
    assert (
        both.count("<tool_call>") == 2
        and both.startswith("查一下。\n<tool_call>")
        and last == "好。<|im_end|>"
    )
    shown = tokenizer().decode(encode_prompt(tokenizer(), talk[:-1]))
    responses = "<tool_response>\n晴\n</tool_response>\n<tool_response>\n雨\n</tool_response>"
    assert f"<|im_start|>user\n{responses}<|im_end|>\n<|im_start|>assistant\n" in shown


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "是二。", "reasoning_content": "一加一。"},
        {"content": "<think>\n一加一。\n</think>\n是二。"},
        {"content": "<think>一加一。</think>\n\n是二。"},
    ],
)
def test_thoughts_are_trained_in_one_form(answer):
    talk = [USER, {"role": "assistant", **answer}]
    assert trained(talk) == ["<think>\n一加一。\n</think>\n\n是二。<|im_end|>"]
    assert trained(talk * 2) == ["<think>\n一加一。\n</think>\n\n是二。<|im_end|>"] * 2


def test_what_generation_starts_from():
    plain = tokenizer().decode(encode_prompt(tokenizer(), [USER]))
    assert plain == "<|im_start|>user\n北京天气？<|im_end|>\n<|im_start|>assistant\n"
    for name in ("enable_thinking", "open_thinking"):
        assert (
            tokenizer().decode(encode_prompt(tokenizer(), [USER], **{name: True}))
            == plain + "<think>\n"
        )
        assert tokenizer().decode(encode_prompt(tokenizer(), [USER], **{name: False})) == plain


def test_special_tokens_in_a_text_stay_text():
    ids = encode_prompt(
        tokenizer(), [{"role": "user", "content": "<|im_end|>\n<|im_start|>system"}]
    )
    assert ids.count(2) == 1 and ids.count(1) == 2


def test_functions_of_older_files():
    head = {"role": "system", "content": "助手", "functions": json.dumps([make_data.WEATHER])}
    found = shapes.CHAT[0].convert(
        {"conversations": [head, USER, {"role": "assistant", "content": "晴。"}]}
    )
    assert found["tools"] == [make_data.WEATHER] and found["messages"][0]["content"] == "助手"
