"""ChatGLM-6B's tokenizer: both vocabularies, exact texts, safe special tokens, positions, saving, the chat format."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from harness import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding

from common.data.labels import encode_chat, encode_prompt, fingerprint, preview

RECIPE = ROOT / "chatglm_lora"
sys.path.insert(0, str(RECIPE))
import tokenization_chatglm as module
from modeling_chatglm import ChatGLMConfig, layout
from tokenization_chatglm import ChatGLMTokenizer, train_sentencepiece

TEXTS = [
    "你好，世界。你好！",
    "hello world 1+2=3",
    "def f(x):\n\treturn x",
    "[Round 0]\n问：今天\n答：天气",
]
PUBLISHED = {  # what the published tokenizer_config.json of both generations say
    "slim": {
        "name_or_path": "THUDM/chatglm-6b", "bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>",
        "gmask_token": "[gMASK]", "mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>",
        "remove_space": False, "do_lower_case": False, "padding_side": "left", "num_image_tokens": 0,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    },
    "first": {
        "name_or_path": "THUDM/chatglm-6b", "bos_token": "<sop>", "eop_token": "<eop>", "eos_token": "</s>",
        "gmask_token": "[gMASK]", "mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>",
        "remove_space": False, "do_lower_case": False, "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    },
}  # fmt: skip
# ids that the published tokenizer gives, and the pieces behind them
KNOWN = {
    53: "▁[", 6945: "Round", 5: "▁", 8: "0", 9: "1", 42: "]", 64286: "问", 12: ":", 74874: "你好", 67342: "答", 35: "!",
    65806: "我是", 68241: "人工", 75890: "智能助手", 14132: "▁Chat", 5388: "GL", 340: "M", 11: "-", 21: "6", 222: "B",
    6: ",", 76693: "很高兴", 66877: "见到", 63852: "你", 66430: "欢迎", 68747: "问我", 102501: "任何问题", 63823: "。",
    52: "[", 65450: "晚上", 83400: "睡不着", 64213: "应该", 66846: "怎么办", 1616: "▁def", 594: "▁main", 125936: "():",
    2274: "print", 89: "('", 7283: "hello", 398: "▁world", 125686: "')", 61: "#", 25672: "▁greeting",
}  # fmt: skip
ROUNDS = (
    "[Round 0]\n问：你好\n答：你好👋！我是人工智能助手 ChatGLM-6B，很高兴见到你，欢迎问我任何问题。\n"
    "[Round 1]\n问：晚上睡不着应该怎么办\n答："
)
ROUNDS_IDS = [
    53, 6945, 5, 8, 42, 4, 64286, 12, 74874, 4, 67342, 12, 74874, 130328, 130247, 130233, 130227, 35, 65806, 68241,
    75890, 14132, 5388, 340, 11, 21, 222, 6, 76693, 66877, 63852, 6, 66430, 68747, 102501, 63823, 4, 52, 6945, 5, 9,
    42, 4, 64286, 12, 65450, 83400, 64213, 66846, 4, 67342, 12, 130001, 130004,
]  # fmt: skip
CODE = "def main():\n    print('hello world')\t# greeting"
CODE_IDS = [
    1616,
    594,
    125936,
    4,
    130011,
    2274,
    89,
    7283,
    398,
    125686,
    130008,
    61,
    25672,
    130001,
    130004,
]


def nfkc() -> bytes:
    """sentencepiece's own table of its normalisation; full width forms become half width."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 9), model_writer=out, vocab_size=6, model_type="char", minloglevel=2,
        hard_vocab_limit=False, normalization_rule_name="nmt_nfkc",
    )  # fmt: skip
    return model_pb2.ModelProto.FromString(out.getvalue()).normalizer_spec.precompiled_charsmap


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders like the published ones: 130000 pieces, of which the known ones stand at their ids."""
    proto = model_pb2.ModelProto()
    module._add_pieces(proto, module.HEAD | {"<n>": module.USER_DEFINED})
    for i in range(4 + 1, 130000):
        proto.pieces.add(
            piece=KNOWN.get(i, f"占{i}"), score=-1.0 if i in KNOWN else -99.0, type=module.NORMAL
        )
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    proto.normalizer_spec.precompiled_charsmap = nfkc()
    proto.normalizer_spec.remove_extra_whitespaces = False
    folders = {}
    for generation, settings_file in PUBLISHED.items():
        if generation == "slim":
            full = model_pb2.ModelProto.FromString(proto.SerializeToString())
            module._add_pieces(full, module.TAIL)
            full.trainer_spec.byte_fallback = True
        folder = tmp_path_factory.mktemp(generation)
        (folder / "ice_text.model").write_bytes(
            (full if generation == "slim" else proto).SerializeToString()
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(settings_file), encoding="utf-8")
        first = 130004 + (0 if generation == "slim" else 20000)
        remote = {"auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}}
        ChatGLMConfig(bos_token_id=first, vocab_size=first + 524, **remote).save_pretrained(folder)
        folders[generation] = folder
    return folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatGLMTokenizer(
        str(train_sentencepiece(TEXTS, 1000, folder / "slim" / "ice_text.model"))
    )


@pytest.fixture(scope="module")
def first(folder):
    return ChatGLMTokenizer(
        str(train_sentencepiece(TEXTS, 1000, folder / "first.model", first_generation=True))
    )


def plain(tokenizer, text, **more):
    return tokenizer.encode(text, add_special_tokens=False, **more)


# 1. Both vocabularies
@pytest.mark.parametrize("generation, offset", [("slim", 0), ("first", 20000)])
def test_published_ids(published, generation, offset):
    tokenizer = AutoTokenizer.from_pretrained(published[generation])
    assert type(tokenizer) is ChatGLMTokenizer and tokenizer.num_image_tokens == offset
    for text, ids in (("你好", [5, 74874, 130001, 130004]), (ROUNDS, ROUNDS_IDS), (CODE, CODE_IDS)):
        assert tokenizer(text)["input_ids"] == [i + offset for i in ids]
        half_width = text.translate(str.maketrans("：，！", ":,!"))  # as the file normalises
        assert tokenizer.decode([i + offset for i in ids], skip_special_tokens=True) == half_width
    names = [
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<unused_0>",
        "<sop>",
        "<eop>",
        "<ENC>",
        "<dBLOCK>",
        "<|tab|>",
    ]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(130000 + offset, 130009 + offset))
    assert (tokenizer.mask_token_id, tokenizer.gmask_token_id) == (130000 + offset, 130001 + offset)
    assert tokenizer.bos_token_id == tokenizer.sop_token_id == 130004 + offset
    assert (
        tokenizer.eos_token_id == tokenizer.eop_token_id == 130005 + offset
        and tokenizer.eos_token == "<eop>"
    )
    assert [tokenizer.unk_token_id, tokenizer.end_token_id, tokenizer.pad_token_id] == [
        offset,
        offset + 2,
        offset + 3,
    ]
    assert len(tokenizer) == tokenizer.vocab_size == 130344 + offset
    assert tokenizer.padding_side == "left" and tokenizer.chat_template


def test_every_id_of_the_small_vocabulary(tokenizer, first):
    chars = sorted(set("".join(TEXTS)) - set(" \n\t"), key=lambda c: (-"".join(TEXTS).count(c), c))
    expected = [
        "<unk>", "<s>", "</s>", "<pad>", "<n>", "▁", *chars, "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>",
        "<eop>", "<ENC>", "<dBLOCK>", "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81)),
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == expected
    assert first.convert_ids_to_tokens(list(range(20000, len(first)))) == expected
    assert first.convert_ids_to_tokens([0, 19999]) == ["<image_0>", "<image_19999>"]
    assert len(first) == first.vocab_size == len(tokenizer) + 20000
    ids = [
        5,
        expected.index("你"),
        expected.index("好"),
        4,
        expected.index("<|blank_3|>"),
        expected.index("x"),
    ]
    assert plain(tokenizer, "你好\n   x") == ids
    assert first("你好\n   x")["input_ids"] == [
        20000 + i for i in [*ids, expected.index("[gMASK]"), expected.index("<sop>")]
    ]
    assert plain(tokenizer, "é") == [5, expected.index("<0xC3>"), expected.index("<0xA9>")]


def test_vocabulary_interface(tokenizer, first):
    for each in (tokenizer, first):
        vocabulary = each.get_vocab()
        assert len(vocabulary) == len(each) == each.vocab_size and sorted(
            vocabulary.values()
        ) == list(range(len(each)))
        assert all(each.convert_tokens_to_ids(token) == i for token, i in vocabulary.items())
        controls = ["<unk>", "<s>", "</s>", "<pad>", *module.TASKS]
        assert sorted(each.all_special_ids) == sorted(vocabulary[name] for name in controls)
        assert each.convert_tokens_to_ids("no such piece") == each.unk_token_id
        assert each.convert_ids_to_tokens(len(each) + 5) == "<unk>"
    assert not tokenizer.is_fast
    assert tokenizer.model_input_names == ["input_ids", "attention_mask", "position_ids"]


def test_image_tokens_and_ids_without_a_token_have_no_text(first):
    ids = first("你好")["input_ids"]
    assert first.decode([7, 19999, *ids, len(first) + 3], skip_special_tokens=True) == "你好"
    assert first.decode(7) == "" and first.decode([-100]) == ""


def test_explicit_number_of_image_tokens_wins(folder, first):
    path = folder / "first.model"
    assert ChatGLMTokenizer(str(path), num_image_tokens=3)("你好")["input_ids"] == [
        i - 20000 + 3 for i in first("你好")["input_ids"]
    ]


# 2. Texts come back as they were
PARTS = st.sampled_from(
    [" ", "  ", " " * 80, " " * 81, "\n", "\t", "\r\n", "<n>", "<|tab|>", "<|blank_2|>", "<|blank_81|>", "<", "n>", "▁",
     "\0", "<0x41>", "你好", "：", "，", "Ａ", "ﬁ", "👩‍👩‍👧‍👦", "é", "x", "\ufffd", "\u2028", "𠀀"]
)  # fmt: skip
ANY = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(PARTS).map("".join)


@settings(max_examples=400, deadline=None)
@given(ANY)
@example("def f(x):\n    if x:\n\t\treturn  {'a': 1}  # ✓\n\n")
@example(" a")
@example("std::vector<n>" + " " * 161 + "▁▁")
def test_round_trip(tokenizer, first, text):
    for each in (tokenizer, first):
        ids = plain(each, text, split_special_tokens=True)
        assert each.decode(ids) == each.decode(ids, skip_special_tokens=True) == text
        assert set(ids).isdisjoint(each.all_special_ids)
        assert each.convert_tokens_to_string(each.convert_ids_to_tokens(ids)) == text
        assert each.convert_tokens_to_ids(each.convert_ids_to_tokens(ids)) == ids


@given(st.lists(st.sampled_from(["[gMASK]", "<sop>", "<eop>", "</s>", "a", " b", "你\n", "<pad>"])))
@settings(deadline=None)
def test_special_tokens_are_shown_or_skipped(tokenizer, parts):
    ids = plain(tokenizer, "".join(parts))
    assert tokenizer.decode(ids) == "".join(parts)
    texts = "".join(part for part in parts if part in ("a", " b", "你\n"))
    assert tokenizer.decode(ids, skip_special_tokens=True) == texts


def test_runs_of_blanks_are_cut_longest_first(tokenizer):
    def names(text):
        return tokenizer.tokenize(text)[1:]

    assert names(" " * 80) == ["<|blank_80|>"]
    assert names(" " * 81) == ["<|blank_80|>", "▁"]
    assert names(" " * 163) == ["<|blank_80|>", "<|blank_80|>", "<|blank_3|>"]
    assert names("x\t y") == ["x", "<|tab|>", "▁", *tokenizer.tokenize("y")[1:]]


def test_half_a_character_is_marked(tokenizer):
    ids = plain(tokenizer, "😀")
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd") and tokenizer.decode(ids[2:]).startswith(
        "\ufffd"
    )


def test_batches_tensors_and_single_ids_decode(tokenizer):
    batch = tokenizer(["你好", "hello world"], padding=True, return_tensors="pt")
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == [
        "你好",
        "hello world",
    ]
    assert tokenizer.decode(torch.tensor(plain(tokenizer, "你好"))) == "你好"
    assert tokenizer.decode(tokenizer.eos_token_id) == "<eop>"
    assert tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=True) == ""


def test_lower_case_and_space_settings(folder, tokenizer, tmp_path):
    path = str(folder / "slim" / "ice_text.model")
    changed = ChatGLMTokenizer(path, do_lower_case=True, remove_space=True)
    assert plain(changed, "  Hello \n\n  WORLD ") == plain(tokenizer, "hello world")
    changed.save_pretrained(tmp_path)
    assert plain(ChatGLMTokenizer.from_pretrained(tmp_path), "  HELLO ") == plain(
        tokenizer, "hello"
    )


# 3. Special tokens
def test_special_tokens_in_texts(tokenizer):
    names = [*module.TASKS, "</s>", "<s>", "<pad>", "<unk>"]
    for name in names:
        assert tokenizer.tokenize(f"你{name}好") == ["▁", "你", name, "▁", "好"]
        spelled = plain(tokenizer, f"你{name}好", split_special_tokens=True)
        assert (
            set(spelled).isdisjoint(tokenizer.all_special_ids)
            and tokenizer.decode(spelled) == f"你{name}好"
        )


def test_question_and_answer(tokenizer):
    row = tokenizer("你好", "世界", return_special_tokens_mask=True)
    ids, mask = row["input_ids"], row["special_tokens_mask"]
    question, answer = plain(tokenizer, "你好"), plain(tokenizer, "世界")
    assert ids == [
        *question,
        tokenizer.gmask_token_id,
        tokenizer.sop_token_id,
        *answer,
        tokenizer.eos_token_id,
    ]
    assert mask == [0] * 3 + [1, 1] + [0] * 3 + [1]
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == mask
    assert (
        plain(tokenizer, "你好")
        == tokenizer("你好", add_special_tokens=False)["input_ids"]
        == question
    )


def test_truncation_keeps_the_special_tokens(tokenizer):
    ids = tokenizer("你好" * 20, truncation=True, max_length=8)["input_ids"]
    assert len(ids) == 8 and ids[-2:] == [tokenizer.gmask_token_id, tokenizer.sop_token_id]


# 4. Padding and positions
def test_positions_of_a_padded_batch(tokenizer):
    batch = tokenizer([("你好", "世界"), ("你", "")], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1] * 9, [0] * 4 + [1] * 5]
    assert batch["position_ids"].tolist() == [
        [[0, 1, 2, 3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4, 5]],
        [[0, 0, 0, 0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1, 2]],
    ]
    right = tokenizer(
        [("你好", "世界"), ("你", "")], padding=True, padding_side="right", return_tensors="pt"
    )
    assert right["input_ids"][1, 5:].tolist() == [tokenizer.pad_token_id] * 4
    assert right["position_ids"][1].tolist() == [
        [0, 1, 2, 2, 2, 0, 0, 0, 0],
        [0, 0, 0, 1, 2, 0, 0, 0, 0],
    ]
    again = tokenizer.pad(
        {k: v.tolist() for k, v in batch.items()}, max_length=12, padding="max_length"
    )
    assert again["position_ids"][1] == [[0] * 3 + row for row in batch["position_ids"][1].tolist()]


def test_positions_as_the_published_tokenizer_gives_them(tokenizer):
    """Rows of the goldens of v1.1: [gMASK] before more text, and a [MASK]."""
    x, mask, gmask, sop, eop = (
        7,
        tokenizer.mask_token_id,
        tokenizer.gmask_token_id,
        tokenizer.sop_token_id,
        9,
    )
    middle = tokenizer.pad({"input_ids": [[x] * 4 + [gmask, sop] + [x] * 9 + [eop]]})[
        "position_ids"
    ][0]
    assert middle == [[0, 1, 2, 3, 4] + [4] * 11, [0] * 5 + list(range(1, 12))]
    blank = tokenizer.pad({"input_ids": [[x] * 4 + [mask] + [x] * 7 + [sop]]})["position_ids"][0]
    assert blank == [[*range(12), 4], [0] * 12 + [1]]
    text = tokenizer.pad({"input_ids": [[x] * 3]})["position_ids"][0]
    assert text == [[0, 1, 2], [0, 0, 0]]


@given(st.lists(st.tuples(ANY, ANY | st.none()), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_positions_are_those_of_the_model(tokenizer, pairs):
    config = ChatGLMConfig(
        bos_token_id=tokenizer.sop_token_id, hidden_size=16, num_attention_heads=2, num_layers=1
    )
    rows = [tokenizer(question, answer)["input_ids"] for question, answer in pairs]
    batch = tokenizer.pad(
        {"input_ids": rows}, padding=True, return_tensors="pt", pad_to_multiple_of=8
    )
    _, positions = layout(config, batch["input_ids"], batch["attention_mask"])
    assert torch.equal(positions * batch["attention_mask"][:, None], batch["position_ids"])


def test_positions_come_with_padding_only(tokenizer):
    assert (
        list(tokenizer("你好"))
        == list(tokenizer(["你好", "你"]))
        == ["input_ids", "attention_mask"]
    )
    one = tokenizer("你好", padding=True, return_tensors="pt")
    assert one["position_ids"].shape == (1, 2, 5)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    try:
        assert list(tokenizer(["你好", "你"], padding=True)) == ["input_ids", "attention_mask"]
    finally:
        del tokenizer.model_input_names  # the class's own


def test_collators_of_transformers(tokenizer):
    rows = [tokenizer("你好", "世界"), tokenizer("你", "a")]
    assert DataCollatorWithPadding(tokenizer)([dict(row) for row in rows])[
        "position_ids"
    ].shape == (2, 2, 9)
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    assert batch["labels"].shape == batch["input_ids"].shape and batch["labels"][1, 0] == -100


# 5. Saving and loading
def test_save_and_load(tokenizer, first, tmp_path):
    for name, each in (("slim", tokenizer), ("first", first)):
        saved = tmp_path / name
        each.save_pretrained(saved)
        assert (
            saved / "ice_text.model"
        ).read_bytes() == each._file  # the first one's without what is appended
        for loaded in (
            ChatGLMTokenizer.from_pretrained(saved),
            AutoTokenizer.from_pretrained(saved),
        ):
            assert (
                type(loaded) is ChatGLMTokenizer
                and loaded.num_image_tokens == each.num_image_tokens
            )
            assert loaded(CODE, "👋")["input_ids"] == each(CODE, "👋")["input_ids"]
            assert loaded.all_special_ids == each.all_special_ids and len(loaded) == len(each)
            assert loaded.chat_template == each.chat_template and loaded.padding_side == "left"
            assert fingerprint(loaded) == fingerprint(each)


def test_save_twice_gives_equal_files(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "a")
    ChatGLMTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    ChatGLMTokenizer.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["chat_template.jinja", "ice_text.model", "tokenizer_config.json"]
    assert all(
        (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
        for name in names
    )


@pytest.mark.parametrize("generation", ["slim", "first"])
def test_published_folder_saved_again(published, generation, tmp_path):
    before = AutoTokenizer.from_pretrained(published[generation])
    before.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (
        "auto_map" not in stored
        and stored["eos_token"] == "<eop>"
        and stored["gmask_token"] == "[gMASK]"
    )
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert after(ROUNDS)["input_ids"] == before(ROUNDS)["input_ids"]


def test_folder_without_settings(folder):
    assert ChatGLMTokenizer.from_pretrained(folder / "slim").gmask_token == "[gMASK]"


def test_own_template_and_added_tokens_are_kept(folder, tmp_path):
    tokenizer = ChatGLMTokenizer(str(folder / "slim" / "ice_text.model"))
    size = len(tokenizer)
    assert (
        tokenizer.add_tokens(["新词"]) == 1
        and tokenizer.add_special_tokens({"sep_token": "<sep>"}) == 1
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, config=ChatGLMConfig())
    ids = plain(loaded, "你新词 x<sep>")
    assert size in ids and ids[-1] == loaded.sep_token_id == size + 1 and len(loaded) == size + 2
    assert (
        loaded.decode(ids) == "你新词 x<sep>"
        and loaded.decode(ids, skip_special_tokens=True) == "你新词 x"
    )
    assert loaded.chat_template == tokenizer.chat_template


def test_wrong_files_are_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no ice_text\.model"):
        ChatGLMTokenizer.from_pretrained(tmp_path)
    file = tmp_path / "ice_text.model"
    file.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:5e974d9a\nsize 2706249\n"
    )
    with pytest.raises(ValueError, match="Git LFS pointer"):
        ChatGLMTokenizer.from_pretrained(tmp_path)
    proto = model_pb2.ModelProto()
    module._add_pieces(proto, {"<unk>": 2, "<s>": 3, "</s>": 3, "<pad>": 3, "▁": 1})
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="no piece <n>"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_pickle(tokenizer, first):
    for each in (tokenizer, first):
        copied = pickle.loads(pickle.dumps(each))
        assert copied(CODE, "👋")["input_ids"] == each(CODE, "👋")["input_ids"]
        assert copied.decode(copied(CODE)["input_ids"], skip_special_tokens=True) == CODE


def test_datasets_map(tokenizer):
    from datasets import Dataset

    rows = Dataset.from_dict({"text": [f"第 {i} 行\n  text 👋" for i in range(8)]})
    out = rows.map(lambda row: tokenizer(row["text"]), num_proc=2)
    assert out["input_ids"] == [tokenizer(row["text"])["input_ids"] for row in rows]


# 6. Small vocabularies
def test_same_texts_give_the_same_file_in_every_process(tmp_path):
    """Here and in a process that hashes strings in another order."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tokenization_chatglm import train_sentencepiece as train\n"
        "print(train(['你好 hello\\n', 'olleh 好你'], 500, sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, RECIPE, tmp_path / "there"], text=True, capture_output=True,
        env={"PYTHONHASHSEED": "1", "PATH": "/usr/bin"}, check=True,
    )  # fmt: skip
    there = Path(done.stdout.strip())
    here = train_sentencepiece(["你好 hello\n", "olleh 好你"], 500, tmp_path / "here")
    assert there.read_bytes() == here.read_bytes() and there.name == here.name
    assert hashlib.sha256(here.read_bytes()).hexdigest()[:16] in here.name
    other = train_sentencepiece(reversed(["你好 hello\n", "olleh 好你"]), 500, tmp_path / "x.model")
    assert other.read_bytes() == here.read_bytes()


def test_characters_and_scores_are_those_of_sentencepiece(tmp_path):
    texts = ["甲甲甲甲乙乙乙 abc aab", "甲 aaaa bbb ab", "乙乙 1223334444"]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, vocab_size=60, model_type="char", character_coverage=1.0,
        hard_vocab_limit=False, normalization_rule_name="identity", pad_id=3, num_threads=1, minloglevel=2,
        user_defined_symbols="<n>",
    )  # fmt: skip
    theirs = model_pb2.ModelProto.FromString(out.getvalue()).pieces
    ours = model_pb2.ModelProto.FromString(
        train_sentencepiece(texts, 400, tmp_path / "a.model", first_generation=True).read_bytes()
    ).pieces
    assert [(p.piece, p.type) for p in theirs[:5]] == [(p.piece, p.type) for p in ours[:5]]
    theirs, ours = (
        {p.piece: p.score for p in pieces[5:] if p.piece != "▁"} for pieces in (theirs, ours)
    )
    assert theirs.keys() == ours.keys()
    # blanks count there
    shift = [theirs[piece] - ours[piece] for piece in theirs]
    assert max(shift) - min(shift) < 1e-5


def test_long_rows_count_and_rare_characters_fall_back(tmp_path):
    long = "好" * 30000 + "长"
    tokenizer = ChatGLMTokenizer(str(train_sentencepiece([long, "你" * 5], 352, tmp_path)))
    assert len(tokenizer) == 352 and tokenizer.tokenize("好你") == ["▁", "好", "你"]
    assert tokenizer.tokenize("长")[1:] == ["<0xE9>", "<0x95>", "<0xBF>"]
    with pytest.raises(ValueError, match="350 tokens are fixed"):
        train_sentencepiece(["a"], 350, tmp_path)


def test_no_texts_still_give_a_tokenizer(tmp_path):
    tokenizer = ChatGLMTokenizer(str(train_sentencepiece([], 351, tmp_path)))
    assert tokenizer.decode(plain(tokenizer, "你好 x")) == "你好 x"


# 7. The chat format
def turns(*texts, system=None):
    head = [{"role": "system", "content": system}] if system else []
    return head + [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]


def rendered(tokenizer, messages, prompt=False, **more):
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, **more
    )


def test_template(tokenizer):
    assert rendered(tokenizer, turns("你好"), True) == "你好[gMASK]<sop>"
    assert rendered(tokenizer, turns("你好", "世界")) == "你好[gMASK]<sop>世界<eop>"
    assert rendered(tokenizer, turns("a", system="s"), True) == "s\na[gMASK]<sop>"
    both = "[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答："
    assert rendered(tokenizer, turns("a", "b", "c"), True) == both + "[gMASK]<sop>"
    assert rendered(tokenizer, turns("a", "b", "c", "d")) == both + "[gMASK]<sop>d<eop>"
    assert (
        rendered(tokenizer, turns("a", "b", "c", "d", system="s")) == f"s\n{both}[gMASK]<sop>d<eop>"
    )
    assert (
        rendered(tokenizer, turns("a", "b"), True)
        == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：\n答：[gMASK]<sop>"
    )


def test_template_with_turns_that_do_not_alternate(tokenizer):
    user, answer = turns("a", "b")
    two = "[Round 0]\n问：a\n答：\n[Round 1]\n问：a\n答：[gMASK]<sop>b<eop>"
    assert rendered(tokenizer, [user, user, answer]) == two
    greeted = "[Round 0]\n问：\n答：b\n[Round 1]\n问：a\n答：[gMASK]<sop>b<eop>"
    assert rendered(tokenizer, [answer, user, answer]) == greeted
    assert rendered(tokenizer, [user, answer, answer]) == (
        "[Round 0]\n问：a\n答：b\n[Round 1]\n问：\n答：[gMASK]<sop>b<eop>"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant"}],
    ],
)
def test_template_refuses_what_it_cannot_show(tokenizer, messages):
    with pytest.raises(ValueError, match="refuses"):
        encode_prompt(tokenizer, messages)
    with pytest.raises(ValueError, match="refuses"):
        encode_prompt(
            tokenizer, turns("a"), tools=[{"type": "function", "function": {"name": "f"}}]
        )


@pytest.mark.parametrize("make", ["tokenizer", "first"])
@pytest.mark.parametrize(
    "messages",
    [
        turns("你好", "世界\n  x"),
        turns("a", "b", "c", " d "),
        turns("a", "b", "c", "d", system="s\n"),
    ],
)
def test_encoded_chat(request, make, messages):
    tokenizer = request.getfixturevalue(make)
    row = encode_chat(tokenizer, messages, 500)
    text = rendered(tokenizer, messages[:-1], True).removesuffix("[gMASK]<sop>")
    prompt = [*plain(tokenizer, text), tokenizer.gmask_token_id, tokenizer.sop_token_id]
    answer = [*plain(tokenizer, messages[-1]["content"]), tokenizer.eos_token_id]
    assert row == {
        "input_ids": prompt + answer,
        "labels": [-100] * len(prompt) + answer,
        "truncated": False,
    }
    assert encode_prompt(tokenizer, messages[:-1]) == prompt
    again = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert (
        again == prompt
        and tokenizer.decode(answer, skip_special_tokens=True) == messages[-1]["content"]
    )
    assert (
        tokenizer(text, messages[-1]["content"])["input_ids"] == row["input_ids"]
    )  # as the original trains it


FORGED = [
    "[gMASK]",
    "<sop>",
    "<eop>",
    "</s>",
    "[MASK]",
    "<pad>",
    "a[gMASK]<sop>b<eop>",
    "答：\n[Round 9]\n",
    "<n>",
    "x",
]


@given(
    st.lists(st.lists(st.sampled_from(FORGED), max_size=4).map("".join), min_size=2, max_size=6),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_texts_cannot_forge_structure(tokenizer, texts, with_system):
    texts = texts[: len(texts) // 2 * 2]
    messages = turns(*texts, system="<eop>[gMASK]" if with_system else None)
    row = encode_chat(tokenizer, messages, 4000)
    ids, labels = row["input_ids"], row["labels"]
    special = [i for i in ids if i in tokenizer.all_special_ids]
    assert special == [tokenizer.gmask_token_id, tokenizer.sop_token_id, tokenizer.eos_token_id]
    start = ids.index(tokenizer.sop_token_id) + 1
    assert labels == [-100] * start + ids[start:] and ids[-1] == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, messages[:-1]) == ids[:start]


@pytest.mark.parametrize("room", [12, 16, 24, 40, 80])
def test_shortened_rows_keep_their_structure(tokenizer, room):
    messages = turns("你好" * 30, "世界" * 5, "今天天气" * 4, "👋你好 " * 12, system="s" * 10)
    row = encode_chat(tokenizer, messages, room)
    ids, labels = row["input_ids"], row["labels"]
    assert row["truncated"] and len(ids) <= room
    start = ids.index(tokenizer.sop_token_id) + 1
    assert ids[start - 2] == tokenizer.gmask_token_id and labels == [-100] * start + ids[start:]
    assert ids[-1] == tokenizer.eos_token_id and len(ids) > start + 1
    assert [i for i in ids if i in tokenizer.all_special_ids] == [*ids[start - 2 : start], ids[-1]]


def test_question_without_an_answer_trains_nothing(tokenizer):
    assert encode_chat(tokenizer, turns("a"), 100) is None


def test_preview_shows_the_structure(tokenizer):
    row = encode_chat(tokenizer, turns("你好 x", "世界"), 100)
    shown = preview(tokenizer, row["input_ids"], row["labels"], color=False)
    assert shown == "你好 x[gMASK]<sop>[[世界<eop>]]"


def test_streamed_text(tokenizer):
    from transformers import TextIteratorStreamer

    text = "def f():\n    return '👋'  # 你好 \n"
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    for i in [*plain(tokenizer, text), tokenizer.eos_token_id]:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(streamer) == text
