"""chatglm_lora: convert.py (ChatGLM2/3 -> Glm, tokenizer, prompts, 150528 -> 130528, adapters) and merge.py."""

import io
import json
import os
import pickle
import shutil
import sys

import older
import pytest
import sentencepiece
import torch
from harness import ROOT, error_line, expect, finish, start, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

RECIPE = ROOT / "chatglm_lora"
sys.path.insert(0, str(RECIPE))
import convert
import fast_tokenizer
import merge
from modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenization_chatglm import ChatGLMTokenizer, train_sentencepiece
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GlmForCausalLM,
    PreTrainedTokenizerFast,
)

from common.convert import weight_files
from common.data.labels import encode_chat, encode_prompt
from common.data.spelling import IGNORE

GOLDEN = ROOT / "tests/golden/chatglm2"
TEXTS = [
    "[Round 1]\n\n问：你好\n\n答：你好👋！我是人工智能助手 ChatGLM2-6B，很高兴见到你，欢迎问我任何问题。",
    "hello world, philosophy and sop\n  def main():\n\tprint('1 + 1 = 2')", "一加一等于几？等于二。",
]  # fmt: skip


def run(script, *flags):
    return finish(start([sys.executable, RECIPE / script, *flags]))


def trained(**more):
    out = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    sentencepiece.SentencePieceTrainer.train(
        model_writer=out, minloglevel=2, hard_vocab_limit=False,
        **settings | {"remove_extra_whitespaces": False, "sentence_iterator": iter(TEXTS * 5)} | more,
    )  # fmt: skip
    return model_pb2.ModelProto.FromString(out.getvalue())


@pytest.fixture(scope="module")
def sentences():
    """A sentencepiece model like that of ChatGLM2: BPE with bytes, digits apart, nothing normalised."""
    return trained(
        split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0
    )


@pytest.fixture(scope="module")
def fast(sentences):
    return fast_tokenizer.make_tokenizer(sentences, "chatglm3")


def original(folder, proto=None, hint="", **changes):
    """A folder like a published ChatGLM2: golden weights and config.json, and a tokenizer where `proto` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        k: v for k, v in json.loads((GOLDEN / "config.json").read_text()).items() if k[0] != "_"
    }
    tensors = load_file(GOLDEN / "weights.safetensors")
    if proto is not None:
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "ChatGLMTokenizer", "hint": hint})
        )
        config["padded_vocab_size"] = 512
        for name in (
            "transformer.embedding.word_embeddings.weight",
            "transformer.output_layer.weight",
        ):
            tensors[name] = tensors[name].repeat(4, 1)[:512].clone()
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def convert_folder(folder, out, **more):
    convert.to_native(folder, out, **more)
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()


# ---- weights ----------------------------------------------------------------------------------------------------


def test_weights_keep_their_bits_and_logits_are_those_of_the_original(tmp_path):
    """The bits are those of the weights; the kernels of another CPU round logits differently."""
    import numpy

    folder = original(tmp_path / "in")
    model = convert_folder(folder, tmp_path / "out")
    assert type(model) is GlmForCausalLM
    wanted = load_file(folder / "model.safetensors")
    found = weights(tmp_path / "out")
    for old, new in convert.native_names(model.config).items():
        parts = [found.pop(name) for name in new]
        assert torch.equal(torch.cat(parts), wanted.pop(old)), old
    assert not found and not wanted
    cases = numpy.load(GOLDEN / "cases.npz")
    ids, logits = (torch.from_numpy(cases[f"single__{name}"]) for name in ("input_ids", "logits"))
    assert torch.allclose(model(ids).logits, logits, atol=1e-5)
    assert model.config.max_position_embeddings == 512 and model.config.pad_token_id == 0
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 0


def test_pickled_shards_become_sharded_safetensors(tmp_path):
    """Files of today's torch and of the oldest kind, with the buffer that the published ones contain."""
    folder = original(tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    plain = weights(convert_folder(folder, tmp_path / "plain").config._name_or_path)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:9],
        "pytorch_model-00002-of-00002.bin": names[9:],
    }
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
    shards["pytorch_model-00002-of-00002.bin"].append("transformer.rotary_pos_emb.inv_freq")
    for i, (file, part) in enumerate(shards.items()):
        torch.save(
            {name: tensors[name].half() for name in part},
            folder / file,
            _use_new_zipfile_serialization=i == 0,
        )
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    model = convert_folder(folder, tmp_path / "out", shard_gb=5e-5)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 1e5 for file in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    found = weights(tmp_path / "out")
    assert set(index["weight_map"]) == set(found) == set(plain) == set(model.state_dict())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in found.values())
    assert model.dtype == torch.float16 and all(
        torch.equal(found[name], plain[name].half()) for name in plain
    )

    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(SystemExit, match="1 weight files are missing: pytorch_model-00001"):
        convert.to_native(folder, tmp_path / "none")


def test_dtype_and_a_full_output_folder(tmp_path):
    folder = original(tmp_path / "in")
    assert convert_folder(folder, tmp_path / "out", dtype="bfloat16").dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(SystemExit, match="not empty"):
        convert.to_native(folder, tmp_path / "out")


LAYER = "transformer.encoder.layers.1."


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(f"{LAYER}mlp.dense_4h_to_h.weight"), f"lacks 1 tensors: {LAYER}mlp.dense_4h_to_h.weight"),
    (lambda t: t.update({f"{LAYER}mlp.extra": torch.zeros(1)}), f"unknown 1 tensors: {LAYER}mlp.extra"),
    (lambda t: t.update({f"{LAYER}self_attention.query_key_value.weight": torch.zeros(120, 64)}), "shape"),
    (lambda t: t.update({"transformer.output_layer.weight": torch.zeros(150, 64)}), "shape"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tmp_path, change, words):
    folder = original(tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit, match=words.replace(".", r"\.")):
        convert.to_native(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("change", [
    {"post_layer_norm": False}, {"apply_residual_connection_post_layernorm": True}, {"rmsnorm": False},
    {"add_bias_linear": True}, {"quantization_bit": 4}, {"pre_seq_len": 128}, {"original_rope": False},
    {"multi_query_attention": False},
])  # fmt: skip
def test_features_that_glm_lacks_are_refused(tmp_path, change):
    ((name, value),) = change.items()
    with pytest.raises(SystemExit, match=f"{name}={value}"):
        convert.to_native(original(tmp_path / "in", **change), tmp_path / "out")


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    (b"PK\x03\x04 cut off", "cannot be read"), (b"", "cannot be read"),
])  # fmt: skip
def test_broken_files_are_one_line(tmp_path, content, words):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(SystemExit, match=words):
        weight_files.Weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SystemExit, match="cannot be read"):
        weight_files.Weights(tmp_path)


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path, zipped):
    folder = original(tmp_path / "in")
    (folder / "model.safetensors").unlink()
    torch.save(
        {"x": Evil(tmp_path / "ran")},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(SystemExit, match="holds code"):
        convert.to_native(folder, tmp_path / "out")
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"x": Evil(tmp_path / "ran")}, file)
    with pytest.raises(SystemExit, match="holds code|cannot be read"):
        convert.to_native(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_rope_ratio_as_base_or_as_interpolation(tmp_path):
    """ChatGLM3-6B-32K and GLM-4 enlarge the base; ChatGLM2-6B-32K divides the positions, as its code shows."""
    plain = convert_folder(original(tmp_path / "plain"), tmp_path / "plain-out")
    ids, places = torch.arange(10, 22)[None], torch.arange(12)[None]
    wide = convert_folder(original(tmp_path / "wide", rope_ratio=3), tmp_path / "wide-out")
    assert (
        wide.config.rope_parameters["rope_theta"] == 30000
        and wide.config.rope_parameters["rope_type"] == "default"
    )
    folder = original(tmp_path / "long", rope_ratio=4)
    (folder / "modeling_chatglm.py").write_text("seq_idx = torch.arange(seq_len) / self.rope_ratio")
    long = convert_folder(folder, tmp_path / "long-out")
    expected = plain(ids, position_ids=places).logits
    assert torch.allclose(long(ids, position_ids=4 * places).logits, expected, atol=2e-5)
    assert not torch.allclose(wide(ids, position_ids=places).logits, expected, atol=1e-2)


def test_the_command(tmp_path):
    folder = original(tmp_path / "in")
    result = expect(
        run("convert.py", "--model", folder, "--output_dir", tmp_path / "out", "--dtype", "float16")
    )
    assert "no tokenizer.model" in result.stdout and "float16" in result.stdout
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float16
    )
    assert "--to slim" in error_line(
        run("convert.py", "--model", folder, "--output_dir", tmp_path / "o", "--to", "slim"), 1
    )
    assert "config.json" in error_line(
        run("convert.py", "--model", tmp_path, "--output_dir", tmp_path / "o"), 1
    )


# ---- tokenizer of ChatGLM2 and 3 --------------------------------------------------------------------------------


def same_ids(tokenizer, proto, text):
    original = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    found = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert found == original.encode(text)
    assert tokenizer.decode(found) == original.decode(found)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.text("你好问：答\n hel▁o1<>s/0x[]👋"),
        st.lists(st.sampled_from(TEXTS)).map("".join),
    )
)
def test_ids_are_those_of_sentencepiece(sentences, fast, text):
    same_ids(fast, sentences, text)


@pytest.mark.parametrize("more", [
    {"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}, {"add_dummy_prefix": False},
    {"user_defined_symbols": ["<n>", "<tab>", "你好", "[x]"]}, {"split_by_whitespace": False},
])  # fmt: skip
def test_other_settings_of_sentencepiece(more):
    proto = trained(**more)
    tokenizer = fast_tokenizer.make_tokenizer(proto, "chatglm2")
    fast_tokenizer.compare(tokenizer, proto)
    for text in [
        *TEXTS,
        "",
        " ",
        "  a  b ",
        "\n 你好",
        "<n>你好<n>[x]",
        "ｆｕｌｌ，",
        "<s></s>",
        "▁",
        "\0",
        "a<tab>b",
    ]:
        same_ids(tokenizer, proto, text)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_that_overlap(seed):
    """Two letters and hundreds of pieces: every text can be joined in many ways."""
    import random

    source = random.Random(seed)
    texts = ["".join(source.choices("aab ", k=60)) for _ in range(200)]
    proto = trained(sentence_iterator=iter(texts), vocab_size=600)
    tokenizer = fast_tokenizer.make_tokenizer(proto, "chatglm2")
    for _ in range(500):
        same_ids(tokenizer, proto, "".join(source.choices("ab ▁", k=source.randrange(40))))


def test_a_tokenizer_that_differs_is_refused(sentences):
    other = model_pb2.ModelProto.FromString(sentences.SerializeToString())
    for piece in other.pieces:
        piece.score = -piece.score
    with pytest.raises(SystemExit, match="differently"):
        fast_tokenizer.compare(fast_tokenizer.make_tokenizer(sentences, "chatglm2"), other)


def test_models_that_are_not_bpe_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        trained(model_type="unigram", byte_fallback=False, vocab_size=90).SerializeToString()
    )
    with pytest.raises(SystemExit, match="not a BPE model"):
        fast_tokenizer.read_model(path)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SystemExit, match="not a sentencepiece model"):
        fast_tokenizer.read_model(path)


@pytest.mark.parametrize("family, count", [("chatglm2", 5), ("chatglm3", 9)])
def test_a_converted_folder_needs_no_code_of_ours(tmp_path, sentences, family, count):
    folder = original(
        tmp_path / "in", sentences, hint="<|assistant|>" if family == "chatglm3" else ""
    )
    model = convert_folder(folder, tmp_path / "out")
    program = (
        "import sys, json\nfrom transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
        f"t = AutoTokenizer.from_pretrained('{tmp_path / 'out'}')\n"
        "assert isinstance(t, PreTrainedTokenizerFast) and 'fast_tokenizer' not in sys.modules\n"
        "ids = t(['你好', 'hello world'], padding=True)['input_ids']\n"
        "print(json.dumps([ids, len(t), t.eos_token_id, t.pad_token_id]))"
    )
    ids, size, eos, pad = json.loads(
        expect(finish(start([sys.executable, "-c", program], cwd=tmp_path))).stdout
    )
    original_ids = sentencepiece.SentencePieceProcessor(model_proto=sentences.SerializeToString())
    first = len(sentences.pieces)
    rows = [[first + 1, first + 3, *original_ids.encode(text)] for text in ("你好", "hello world")]
    width = max(map(len, rows))
    assert ids == [[0] * (width - len(row)) + row for row in rows], (
        "[gMASK] sop in front, padding on the left"
    )
    assert (size, eos, pad) == (first + count, 2, 0)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.model_max_length == 512
    specials = fast_tokenizer.SPECIALS[family]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(first, first + count))
    assert tokenizer.decode([first + 1, *rows[1][2:], 2], skip_special_tokens=True) == "hello world"
    batch = tokenizer(["你好", "hello world"], padding=True, return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3).shape[0] == 2
    ends = [2, first + 6, first + 8] if family == "chatglm3" else 2
    assert model.generation_config.eos_token_id == ends
    if family == "chatglm3":
        (theirs,) = older.read([tmp_path / "out"])
        older.agree(tmp_path / "out", theirs)
    assert "philosophy" in tokenizer.decode(
        tokenizer("philosophy sop", add_special_tokens=False)["input_ids"]
    )
    assert first + 3 not in tokenizer("philosophy sop eop", add_special_tokens=False)["input_ids"]


def test_which_tokenizer(tmp_path, sentences, capsys):
    """ChatGLM2 and 3 have the same sizes: files of the folder tell, else the user; GLM-4 keeps its own."""
    config = {"padded_vocab_size": 65024}
    assert convert.guess_family(tmp_path, config) is None
    assert (
        convert.guess_family(tmp_path, config | {"_name_or_path": "THUDM/chatglm3-6b"})
        == "chatglm3"
    )
    assert convert.guess_family(tmp_path, {"padded_vocab_size": 151552}) == "glm4"
    (tmp_path / "tokenization_chatglm.py").write_text("class ChatGLMTokenizer: pass")
    assert convert.guess_family(tmp_path, config) == "chatglm2"
    (tmp_path / "tokenization_chatglm.py").write_text(
        'role_special_tokens = ["<|system|>", "<|assistant|>"]'
    )
    assert convert.guess_family(tmp_path, config) == "chatglm3"
    folder = original(tmp_path / "in", sentences)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(SystemExit, match="--family"):
        convert.to_native(folder, tmp_path / "out")
    convert.to_native(folder, tmp_path / "out", family="glm4")
    assert (
        "glm-4-9b-chat-hf" in capsys.readouterr().out
        and not (tmp_path / "out/tokenizer.json").exists()
    )
    wrong = original(tmp_path / "wrong", sentences, eos_token_id=7)
    with pytest.raises(SystemExit, match="eos_token_id 7, not 2"):
        convert.to_native(wrong, tmp_path / "out2")


# ---- prompts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(sentences):
    """text -> ids as the original reads one text, and the id of the first special token."""
    original = sentencepiece.SentencePieceProcessor(model_proto=sentences.SerializeToString())
    return original.encode, len(sentences.pieces)


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def trained_ids(row):
    return [label for label in row["labels"] if label != IGNORE]


def test_prompts_of_chatglm2(sentences, reader):
    """[gMASK] sop, rounds from 1; the answer is read as a text of its own, as the original was tuned."""
    tokenizer, (read, first) = fast_tokenizer.make_tokenizer(sentences, "chatglm2"), reader
    front = [first + 1, first + 3]
    single = front + read("[Round 1]\n\n问：你好\n\n答：")
    assert encode_prompt(tokenizer, talk("你好")) == single
    row = encode_chat(tokenizer, talk("你好", "hello world"), 200)
    assert row["input_ids"] == single + read("hello world") + [2]
    assert trained_ids(row) == read("hello world") + [2]

    rounds = "[Round 1]\n\n问：你好\n\n答：你好！\n\n[Round 2]\n\n问：一加一等于几？\n\n答："
    turns = talk("你好", " 你好！\n", "一加一等于几？", "等于二。")
    assert encode_prompt(tokenizer, turns[:3]) == front + read(rounds)
    row = encode_chat(tokenizer, turns, 200)
    assert row["input_ids"] == front + read(rounds) + read("等于二。") + [2]
    assert tokenizer.decode(trained_ids(row)) == "你好！ 等于二。</s>", (
        "earlier answers have no end in this format"
    )
    named = encode_prompt(tokenizer, [{"role": "system", "content": "hello"}, *talk("你好")])
    assert named == front + read("hello\n\n[Round 1]\n\n问：你好\n\n答：")


def test_prompts_of_chatglm3(sentences, reader):
    """Role token, line break and text, each read as a text of its own; what ends an answer is the next role token."""
    tokenizer, (read, first) = fast_tokenizer.make_tokenizer(sentences, "chatglm3"), reader
    system, user, assistant = first + 5, first + 6, first + 7
    front = [first + 1, first + 3]
    turns = talk("你好", "hello world", "一加一等于几？", "等于二。")
    row = encode_chat(tokenizer, turns, 200)
    answers = [read("\n") + read("hello world"), read("\n") + read("等于二。")]
    start = [*front, user, *read("\n"), *read("你好"), assistant]
    assert row["input_ids"] == (
        start
        + answers[0]
        + [user, *read("\n"), *read("一加一等于几？"), assistant]
        + answers[1]
        + [2]
    )
    assert trained_ids(row) == answers[0] + [user] + answers[1] + [2]
    assert encode_prompt(tokenizer, turns[:1]) == start
    named = encode_prompt(tokenizer, [{"role": "system", "content": "hello"}, *talk("你好")])
    assert named == [*front, system, *read("\n"), *read("hello"), *start[2:]]


def test_tools_of_chatglm3(sentences):
    tokenizer = fast_tokenizer.make_tokenizer(sentences, "chatglm3")
    tool = {
        "name": "get_weather",
        "description": "天气",
        "parameters": {"type": "object", "properties": {}},
    }
    call = {
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "北京", "days": 3}},
    }
    messages = [
        *talk("北京天气"), {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "晴"}, {"role": "assistant", "content": "晴天"},
    ]  # fmt: skip
    row = encode_chat(tokenizer, messages, 900, tools=[{"type": "function", "function": tool}])
    text, said = tokenizer.decode(row["input_ids"]), tokenizer.decode(trained_ids(row))
    offer = "You have access to the following tools:\n" + json.dumps(
        [tool], indent=4, ensure_ascii=False
    )
    assert (
        text.startswith("[gMASK]<sop><|system|>")
        and offer in text
        and "<|observation|> \n 晴<|assistant|>" in text
    )
    spoken = (
        "get_weather\n ```python\ntool_call(city='北京', days=3)\n```<|observation|> \n 晴天</s>"
    )
    assert said.strip() == spoken
    with pytest.raises(ValueError, match="ChatGLM2 has no tools"):
        encode_prompt(fast_tokenizer.make_tokenizer(sentences, "chatglm2"), talk("?"), tools=[tool])


def test_special_tokens_in_data_stay_text(sentences, reader):
    for family in ("chatglm2", "chatglm3"):
        tokenizer = fast_tokenizer.make_tokenizer(sentences, family)
        row = encode_chat(tokenizer, talk("a </s> [gMASK] <sop>", "b <|user|> </s> c"), 400)
        assert row["input_ids"].count(2) == 1 and row["input_ids"].count(reader[1] + 1) == 1
        assert row["input_ids"].count(reader[1] + 6) == (family == "chatglm3")


# ---- ChatGLM-6B: 150528 -> 130528 -------------------------------------------------------------------------------

IMAGES = 37


def build(tokenizer, seed=0, **more):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
    }
    settings |= {
        "inner_hidden_size": 48,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return ChatGLMForConditionalGeneration(
        ChatGLMConfig(**settings | {"initializer_range": 0.3} | more)
    ).eval()


@pytest.fixture(scope="module")
def first_generation(tmp_path_factory):
    """A folder like the first published one: image tokens in front, special tokens not in the file, fp16, buffers."""
    folder = tmp_path_factory.mktemp("first")
    path = train_sentencepiece(TEXTS, 1000, folder / "ice_text.model", first_generation=True)
    tokenizer = ChatGLMTokenizer(str(path), num_image_tokens=IMAGES)
    tokenizer.save_pretrained(folder)
    model = build(tokenizer).half()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        f"transformer.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(4).half()
        for i in range(2)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, model.float(), tokenizer


def test_slim_has_the_same_logits_and_texts(first_generation, tmp_path):
    folder, model, old = first_generation
    expect(
        run(
            "convert.py",
            "--model",
            folder,
            "--output_dir",
            tmp_path / "slim",
            "--max_shard_size",
            "2e-5",
        )
    )
    assert len(list((tmp_path / "slim").glob("*.safetensors"))) > 1
    slim = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=torch.float32).eval()
    new = AutoTokenizer.from_pretrained(tmp_path / "slim")
    assert (
        type(new) is ChatGLMTokenizer
        and new.num_image_tokens == 0
        and len(new) == len(old) - IMAGES
    )
    assert slim.config.vocab_size == model.config.vocab_size - IMAGES
    for name in ("bos", "eos", "pad", "mask", "gmask"):
        assert (
            getattr(slim.config, f"{name}_token_id")
            == getattr(model.config, f"{name}_token_id") - IMAGES
        )
    for text in TEXTS:
        ids = torch.tensor([old(text)["input_ids"]])
        assert new(text)["input_ids"] == (ids - IMAGES)[0].tolist()
        assert torch.equal(slim(ids - IMAGES).logits, model(ids).logits[..., IMAGES:])
    assert convert.Weights(tmp_path / "slim")["lm_head.weight"].dtype == torch.float16
    line = error_line(
        run("convert.py", "--model", tmp_path / "slim", "--output_dir", tmp_path / "again"), 1
    )
    assert "no image tokens" in line


def test_slim_without_its_tokenizer_is_refused(first_generation, tmp_path):
    shutil.copytree(first_generation[0], tmp_path / "in")
    (tmp_path / "in/ice_text.model").unlink()
    with pytest.raises(SystemExit, match="ice_text.model"):
        convert.to_slim(tmp_path / "in", tmp_path / "out")


def test_a_pad_id_among_the_images_becomes_pad(first_generation):
    _, model, tokenizer = first_generation
    fields = model.config.to_dict() | {"pad_token_id": 0}
    assert convert.slim_config(ChatGLMConfig(**fields), tokenizer, IMAGES).pad_token_id == 3


# ---- adapters ---------------------------------------------------------------------------------------------------


def random_adapter(model, targets, folder, base, r=3):
    """A saved adapter with random A and B."""
    from peft import LoraConfig, get_peft_model

    from common.convert import adapter

    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=32, target_modules=targets)
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    adapter.remember_base(folder, str(base))
    return model.eval()


def test_an_adapter_of_the_fused_original_is_converted(tmp_path):
    """Merged into the fused weights and then converted = converted and then merged."""
    folder = original(tmp_path / "in")
    convert.to_native(folder, tmp_path / "base")
    tensors, lora, names = load_file(folder / "model.safetensors"), {}, []
    generator = torch.Generator().manual_seed(5)
    for layer in range(2):
        for kind in ("self_attention.query_key_value", "mlp.dense_h_to_4h"):
            name = f"transformer.encoder.layers.{layer}.{kind}"
            rows, columns = tensors[f"{name}.weight"].shape
            a = torch.randn(3, columns, generator=generator) * 0.3
            b = torch.randn(rows, 3, generator=generator) * 0.3
            lora |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            tensors[f"{name}.weight"] += 32 / 3 * b @ a
            names.append(name)
    (tmp_path / "old").mkdir()
    save_file(lora, tmp_path / "old/adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "bias": "none",
    }
    settings |= {
        "base_model_name_or_path": "THUDM/chatglm2-6b",
        "target_modules": ["query_key_value", "dense_h_to_4h"],
    }
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    expected = convert_folder(folder, tmp_path / "merged").state_dict()

    from peft import PeftModel

    convert.to_native_adapter(tmp_path / "old", tmp_path / "new", str(tmp_path / "base"))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "new"
    )
    found = model.merge_and_unload().state_dict()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(SystemExit, match="use_dora"):
        convert.to_native_adapter(tmp_path / "old", tmp_path / "none", str(tmp_path / "base"))
    with pytest.raises(SystemExit, match="--base"):
        convert.to_native_adapter(tmp_path / "old", tmp_path / "none", None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of a small ChatGLM-6B with its tokenizer and auto_map, the model)."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = ChatGLMTokenizer(str(train_sentencepiece(TEXTS, 1000, folder / "ice_text.model")))
    tokenizer.save_pretrained(folder)
    model = build(tokenizer, seed=3)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('never run')\n")
    return folder, model


def row_of(folder):
    return torch.tensor([AutoTokenizer.from_pretrained(folder)("你好 hello")["input_ids"]])


@pytest.mark.parametrize("layout", ["native", "original"])
def test_merge(base, tmp_path, layout):
    folder, model = base
    tuned = random_adapter(
        AutoModelForCausalLM.from_pretrained(folder),
        ["query_key_value", "dense_h_to_4h"],
        tmp_path / "adapter",
        folder,
    )
    ids = row_of(folder)
    flags = [
        "--adapter",
        tmp_path / "adapter",
        "--output_dir",
        tmp_path / "merged",
        "--layout",
        layout,
    ]
    expect(run("merge.py", *flags))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(ids).logits, tuned(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, model(ids).logits, atol=0.1)
    assert torch.equal(row_of(tmp_path / "merged"), ids)
    names, own = set(weights(tmp_path / "merged")), set(model.state_dict())
    config = json.loads((tmp_path / "merged/config.json").read_text())
    if layout == "native":
        assert names == own
        return
    buffers = {f"transformer.layers.{i}.attention.rotary_emb.inv_freq" for i in range(2)}
    assert (
        names == own | buffers and len(names) == 13 * 2 + 4
    )  # 13 * 28 + 4 = 368 of the published one
    published = {"architectures", "model_type", "torch_dtype", "auto_map", *merge.PUBLISHED}
    assert (
        set(config) == published
        and config["num_layers"] == 2
        and config["torch_dtype"] == "float32"
    )
    assert (tmp_path / "merged/modeling_chatglm.py").is_file() and (
        tmp_path / "merged/ice_text.model"
    ).is_file()
    assert "not empty" in error_line(run("merge.py", *flags), 1)


def test_buffers_of_the_original_layout_are_those_of_the_published_checkpoint(tmp_path):
    """The golden weights contain them as the original code made them."""
    golden = ROOT / "tests/golden/chatglm"
    tensors = load_file(golden / "weights.safetensors")
    config = {
        k: v for k, v in json.loads((golden / "config.json").read_text()).items() if k[0] != "_"
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(golden / "weights.safetensors", tmp_path / "model.safetensors")
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "native")
    merge.to_original(tmp_path / "native", tmp_path / "out", str(tmp_path))
    found = weights(tmp_path / "out")
    assert set(found) == set(tensors) and all(
        torch.equal(found[name], tensors[name]) for name in tensors
    )
    for path in (tmp_path / "native").glob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(path).items()}, path, {"format": "pt"})
    merge.to_original(tmp_path / "native", tmp_path / "half", str(tmp_path))
    name = "transformer.layers.1.attention.rotary_emb.inv_freq"
    assert torch.equal(weights(tmp_path / "half")[name], tensors[name].half())


def test_an_adapter_folder_without_tokenizer_takes_that_of_its_base(base, tmp_path):
    folder, _ = base
    random_adapter(
        AutoModelForCausalLM.from_pretrained(folder),
        ["query_key_value"],
        tmp_path / "adapter",
        folder,
    )
    assert not (tmp_path / "adapter/tokenizer_config.json").exists()

    class Args:
        adapter, base, to_adapter, lora_alpha = str(tmp_path / "adapter"), None, None, 32

    with merge.adapter_folder(Args) as ready:
        merge.merge(ready, tmp_path / "merged", None, "native")
    assert torch.equal(row_of(tmp_path / "merged"), row_of(folder))


# ---- chatglm-lora.pt --------------------------------------------------------------------------------------------


def old_file(path, base, pattern, targets=("query_key_value",), **extra):
    """What upstream's trainer left, names by `pattern`; -> {module: (A, B)}."""
    generator, pairs, content = torch.Generator().manual_seed(9), {}, dict(extra)
    for name, weight in base.state_dict().items():
        module = name.removesuffix(".weight")
        if not (name.endswith(".weight") and module.rpartition(".")[2] in targets):
            continue
        rows, columns = weight.shape
        a = torch.randn(4, columns, generator=generator) * 0.2
        b = torch.randn(rows, 4, generator=generator) * 0.2
        pairs[module] = a, b
        content |= {pattern.format(module, "A"): a, pattern.format(module, "B"): b}
    torch.save(content, path)
    return pairs


PATTERNS = [
    "base_model.model.{}.lora_{}.default.weight", "base_model.model.{}.lora_{}.weight",
    "module.base_model.model.{}.lora_{}.default.weight", "{}.lora_{}.weight",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_old_adapters_become_peft_folders(base, tmp_path, pattern):
    from peft import PeftModel

    folder, model = base
    frozen = {
        "base_model.model.lm_head.0.weight": model.lm_head.weight.detach().half()
    }  # CastOutputToFloat's name
    pairs = old_file(
        tmp_path / "chatglm-lora.pt", model, pattern, ("query_key_value", "dense"), **frozen
    )
    merge.write_adapter(tmp_path / "chatglm-lora.pt", tmp_path / "adapter", str(folder), 32)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    )
    found, before = loaded.merge_and_unload().state_dict(), model.state_dict()
    for name in before:
        a, b = pairs.get(name.removesuffix(".weight"), (torch.zeros(1, 1), torch.zeros(1, 1)))
        assert torch.allclose(found[name], before[name] + 32 / 4 * b @ a, atol=1e-5), name
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["r"] == 4 and sorted(settings["target_modules"]) == ["dense", "query_key_value"]
    assert merge.adapter.check_base(tmp_path / "adapter") == str(folder)


def test_the_first_pefts_convolution(base, tmp_path):
    """MergedLinear computed y[q and v thirds] += alpha / r * conv1d(A x, B, groups=2)."""
    from peft import PeftModel

    folder, model = base
    generator, content, wanted = torch.Generator().manual_seed(2), {}, {}
    x = torch.randn(5, 32, generator=generator)
    for i in range(2):
        name = f"transformer.layers.{i}.attention.query_key_value"
        a, b = torch.randn(6, 32, generator=generator), torch.randn(64, 3, 1, generator=generator)
        content |= {
            f"base_model.model.{name}.lora_A.weight": a,
            f"base_model.model.{name}.lora_B.weight": b,
        }
        update = torch.nn.functional.conv1d((x @ a.T).T[None], b, groups=2)[0].T * 32 / 3
        wanted[name] = torch.cat([update[:, :32], torch.zeros(5, 32), update[:, 32:]], 1)
    torch.save(content, tmp_path / "chatglm-lora.pt")
    merge.write_adapter(tmp_path / "chatglm-lora.pt", tmp_path / "adapter", str(folder), 32)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    )
    after, before = loaded.merge_and_unload().state_dict(), model.state_dict()
    for name, update in wanted.items():
        found = x @ (after[f"{name}.weight"] - before[f"{name}.weight"]).T
        assert torch.allclose(found, update, atol=1e-3)


def test_an_adapter_on_some_layers(base, tmp_path):
    folder, model = base
    old_file(tmp_path / "all.pt", model, PATTERNS[0])
    content = torch.load(tmp_path / "all.pt", weights_only=True)
    torch.save({k: v for k, v in content.items() if "layers.1" in k}, tmp_path / "some.pt")
    merge.write_adapter(tmp_path / "some.pt", tmp_path / "adapter", str(folder), 16)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["target_modules"] == ["transformer.layers.1.attention.query_key_value"]


A0 = "base_model.model.transformer.layers.0.attention.query_key_value.lora_A.default.weight"


@pytest.mark.parametrize("change, words", [
    (lambda c: c.pop(A0), "only one of lora_A and lora_B"), (lambda c: c.update({A0: c[A0][:, :-1]}), "shape"),
    (lambda c: c.update({A0: c[A0][:-1]}), "shape"), (lambda c: c.clear(), "no LoRA"),
    (lambda c: c.update({"model.layers.0.q_proj.lora_A.weight": torch.zeros(4, 32)}), "no place in ChatGLM-6B"),
    (lambda c: c.update({"lm_head.0.weight": torch.zeros_like(c["lm_head.0.weight"])}), "not that of"),
    (lambda c: c.update({A0: 3}), "not a dictionary of tensors"),
])  # fmt: skip
def test_old_adapters_that_do_not_fit_are_refused(base, tmp_path, change, words):
    folder, model = base
    old_file(
        tmp_path / "x.pt",
        model,
        PATTERNS[0],
        **{"lm_head.0.weight": model.lm_head.weight.detach().clone()},
    )
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(SystemExit, match=words):
        merge.write_adapter(tmp_path / "x.pt", tmp_path / "adapter", str(folder), 32)
    assert not (tmp_path / "adapter").exists()


def test_the_command_for_old_adapters(base, tmp_path):
    folder, model = base
    path = tmp_path / "chatglm-lora.pt"
    pairs = old_file(path, model, PATTERNS[0])
    flags = [
        "--adapter",
        path,
        "--output_dir",
        tmp_path / "merged",
        "--to_adapter",
        tmp_path / "adapter",
    ]
    expect(run("merge.py", *flags, "--base", folder, "--lora_alpha", "8"))
    name = "transformer.layers.0.attention.query_key_value"
    a, b = pairs[name]
    found, before = (
        weights(tmp_path / "merged")[f"{name}.weight"],
        model.state_dict()[f"{name}.weight"],
    )
    assert torch.allclose(found, before + 8 / 4 * b @ a, atol=1e-5)
    assert (tmp_path / "adapter/base_model.json").is_file()
    assert torch.equal(row_of(tmp_path / "merged"), row_of(folder))
    assert "--base" in error_line(
        run("merge.py", "--adapter", path, "--output_dir", tmp_path / "no"), 1
    )
    torch.save({"x": Evil(tmp_path / "ran")}, path)
    line = error_line(
        run("merge.py", "--adapter", path, "--output_dir", tmp_path / "no", "--base", folder), 1
    )
    assert "holds code" in line and not (tmp_path / "ran").exists()
