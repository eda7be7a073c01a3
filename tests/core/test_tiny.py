"""The embedded default: tokenizer, chat template, tiny checkpoint, and the sample data that it learns from."""

import importlib.util
import json
import multiprocessing
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPConfig, CLIPModel, Qwen3Config

from common import tiny
from common.data.labels import encode_chat, encode_prompt
from common.data.load import load_rows
from common.data.spelling import IGNORE

RECIPE = ROOT / "train_qwen"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def train_tokenizer():
    texts = [file.read_text(encoding="utf-8") for file in sorted((RECIPE / "data").glob("*.jsonl"))]
    template = (RECIPE / "chat_template.jinja").read_text(encoding="utf-8")
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return tiny.make_tokenizer(texts, 2000, SPECIAL, template, PLAIN, **names)


tokenizer = cache(train_tokenizer)


def small(vocab_size, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3Config(vocab_size=vocab_size, tie_word_embeddings=True, **sizes, **heads, **changes)


# ---- tokenizer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "你是谁？我是小丹。",
        "汉字以外：鬱龘 😀👩‍👩‍👧 ١٢ １２ ½ Ⅳ",
        "  two  spaces , don't .\n\n\ttab\r\n",
        "<think>\n想\n</think>\n\n7加8等于15。",
        "\x00\x7f\u200b\ufeff",
        "",
    ],
)
def test_any_text_survives(text):
    ids = tokenizer()(text)["input_ids"]
    assert tokenizer().decode(ids) == text
    assert tokenizer().decode(ids, skip_special_tokens=True) == text


def test_digits_and_chinese_characters_stand_alone():
    assert tokenizer().tokenize("2024") == list("2024")
    assert len(tokenizer().tokenize("7加8等于15。")) == 8
    assert len(tokenizer().tokenize("一加二等于3")) == 6


def test_special_and_plain_tokens():
    assert tokenizer().convert_tokens_to_ids(SPECIAL) == [0, 1, 2]
    assert all(len(tokenizer().tokenize(token)) == 1 for token in SPECIAL + PLAIN)
    ids = tokenizer()("<|im_start|>a<think>b<|im_end|>")["input_ids"]
    assert tokenizer().decode(ids, skip_special_tokens=True) == "a<think>b"
    assert (tokenizer().eos_token, tokenizer().pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tiny.make_tokenizer(["a"], 300, ["</s>"], eos_token="</s>").pad_token == "</s>"


def test_the_bound_on_the_vocabulary_holds():
    assert (
        len(tiny.make_tokenizer(["很多很多不同的字" * 9], 262, ["</s>"], plain_tokens=["<x>"]))
        == 262
    )


def test_a_named_token_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="<eos>"):
        tiny.make_tokenizer(["a"], 300, ["</s>"], eos_token="<eos>")


# ---- chat template ------------------------------------------------------------------------------------------


def render(messages, **settings):
    return tokenizer().apply_chat_template(messages, tokenize=False, **settings)


def test_template_drops_earlier_thoughts():
    messages = [
        {"role": "system", "content": "说中文。"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "在。", "reasoning_content": "旧"},
        {"role": "user", "content": "一加一"},
        {"role": "assistant", "content": "二。", "reasoning_content": "新"},
    ]
    head = (
        "<|im_start|>system\n说中文。<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n在。<|im_end|>\n"
        "<|im_start|>user\n一加一<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(messages) == head + "<think>\n新\n</think>\n\n二。<|im_end|>\n"
    assert (
        render(messages, enable_thinking=False) == head + "<think>\n\n</think>\n\n二。<|im_end|>\n"
    )
    assert render(messages[:4], add_generation_prompt=True) == head
    off = render(messages[:4], add_generation_prompt=True, enable_thinking=False)
    assert off == head + "<think>\n\n</think>\n\n"
    written = [*messages[:4], {"role": "assistant", "content": "<think>\n新\n</think>\n\n二。"}]
    assert render(written) == render(messages)


def test_template_with_tools():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
    messages = [
        {"role": "user", "content": "天气？"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "晴。"},
    ]
    text = render(messages, tools=[TOOL])
    assert (
        '<tools>\n{"type": "function", "function": {"name": "weather", "parameters": {}}}\n</tools>'
        in text
    )
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n<think>\n\n</think>\n\n{one}\n{one}<|im_end|>\n" in text
    assert "<|im_start|>user\n<tool_response>\n晴\n</tool_response><|im_end|>\n" in text
    for asked in (1, 3):  # what generation starts from is what stood before the answer in training
        for thinking in ({}, {"enable_thinking": False}):
            prompt = render(messages[:asked], tools=[TOOL], add_generation_prompt=True, **thinking)
            assert render(messages, tools=[TOOL], **thinking).startswith(prompt)


# ---- checkpoint ---------------------------------------------------------------------------------------------


def test_checkpoint_opens_like_any_other(tmp_path):
    state = torch.get_rng_state()
    folder = tiny.save_tiny(small(len(tokenizer())), tokenizer(), tmp_path, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    model, reloaded = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.dtype == torch.float32 and (Path(folder) / "model.safetensors").is_file()
    text = render([{"role": "user", "content": "3加4等于几？😀"}], add_generation_prompt=True)
    assert reloaded(text)["input_ids"] == tokenizer()(text)["input_ids"]
    assert reloaded.chat_template == tokenizer().chat_template
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    torch.manual_seed(3)
    expected = type(model)(small(len(tokenizer())))
    ids = torch.tensor([reloaded(text)["input_ids"]])
    assert torch.equal(model.eval()(ids).logits, expected.eval()(ids).logits)


def test_what_is_there_is_used_again(tmp_path):
    def make(**changes):
        return tiny.save_tiny(small(len(tokenizer())), tokenizer(), tmp_path, **changes)

    first = make()
    before = (Path(first) / "model.safetensors").stat()
    assert make() == first and (Path(first) / "model.safetensors").stat().st_ino == before.st_ino
    assert len({first, make(seed=1), make(dtype=torch.bfloat16)}) == 3
    assert AutoModelForCausalLM.from_pretrained(make(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not list(tmp_path.glob(".draft-*"))


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(tiny, "_random_model", fail)
    with pytest.raises(OSError, match="No space"):
        tiny.save_tiny(small(len(tokenizer())), tokenizer(), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    monkeypatch.undo()
    assert AutoModelForCausalLM.from_pretrained(
        tiny.save_tiny(small(len(tokenizer())), tokenizer(), tmp_path)
    )


def test_too_small_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokens"):
        tiny.save_tiny(small(100), tokenizer(), tmp_path)


def test_other_classes(tmp_path):
    part = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = part | {"vocab_size": len(tokenizer()), "eos_token_id": 2}
    config = CLIPConfig(
        text_config=text,
        vision_config=part | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    folder = tiny.save_tiny(config, tokenizer(), tmp_path, model_class=CLIPModel)
    assert CLIPModel.from_pretrained(folder).config.projection_dim == 16
    assert (
        AutoTokenizer.from_pretrained(folder)("你好")["input_ids"]
        == tokenizer()("你好")["input_ids"]
    )


def _rank(folder, barrier, answers):
    torch.set_num_threads(1)
    mine = train_tokenizer()
    barrier.wait()
    answers.put(tiny.save_tiny(small(len(mine)), mine, folder))


def test_ranks_at_once_share_one_checkpoint(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(3), fork.Queue()
    ranks = [fork.Process(target=_rank, args=(tmp_path, barrier, answers)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    folders = {answers.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(folders) == 1 and [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert [str(path) for path in tmp_path.iterdir() if path.is_dir()] == list(folders)
    assert AutoModelForCausalLM.from_pretrained(folders.pop())


# ---- sample data --------------------------------------------------------------------------------------------


@cache
def sample_rows():
    return load_rows(str(RECIPE / "data"), "chat")


@pytest.fixture(autouse=True, scope="module")
def private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANPU_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_the_script_writes_these_files(tmp_path):
    spec = importlib.util.spec_from_file_location("make_data", RECIPE / "make_data.py")
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    make_data.main(tmp_path)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_bytes() for file in (RECIPE / "data").iterdir()}
    assert all(len(content) < 250 * 1024 for content in written.values())


def test_every_row_is_used_once():
    rows, stats = sample_rows()
    assert 500 <= len(rows) <= 1100 and not any(stats["dropped"].values())
    assert len(set(rows["prompt_key"])) == len(rows)


def plain(text):
    return "".join(c for c in unicodedata.normalize("NFKC", text) if c.isalnum() or c in "+、")


def test_held_out_questions_can_be_answered_from_others():
    rows, _ = sample_rows()
    asked, facts = Counter(), Counter()
    for row, source in zip(rows["row"], rows["source"], strict=True):
        messages = json.loads(row)["messages"]
        asked[plain(json.dumps(messages[:-1], ensure_ascii=False))] += 1
        task = Path(source.rsplit(":", 1)[0]).stem
        if task in ("identity", "sums", "units", "opposites"):
            facts[task, messages[-1]["content"]] += 1
    assert max(asked.values()) == 1  # no two differ in punctuation only
    assert min(n for (task, _), n in facts.items() if task != "sums") >= 3
    assert sum(n for (task, _), n in facts.items() if task == "sums") >= 400


def test_rows_fit_the_window_and_train_what_they_answer():
    rows, _ = sample_rows()
    for row in map(json.loads, rows["row"]):
        encoded = encode_chat(tokenizer(), row["messages"], 256, row.get("tools"))
        assert not encoded["truncated"]
        trained = tokenizer().decode([label for label in encoded["labels"] if label != IGNORE])
        assert trained.endswith(row["messages"][-1]["content"] + "<|im_end|>")
        prompt = encode_prompt(tokenizer(), row["messages"][:-1], row.get("tools"))
        assert encoded["input_ids"][: len(prompt)] == prompt
