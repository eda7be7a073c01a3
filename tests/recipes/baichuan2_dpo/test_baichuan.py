"""baichuan2_dpo: the model's structure and packed rows, convert.py, the fast tokenizer and the chat template.

Its numbers are compared with the original implementation in test_golden.py.
"""

import copy
import io
import json
import socket
import sys

import numpy
import older
import pytest
import sentencepiece
import torch
from harness import ROOT, error_line, expect, finish, own_modules, start, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from common import collators
from common.data.labels import encode_chat, encode_prompt
from common.fast import losses

RECIPE = ROOT / "baichuan2_dpo"


modeling, convert, fast_tokenizer = own_modules(
    RECIPE.name, "modeling_baichuan", "convert", "fast_tokenizer"
)
GOLDEN = {size: ROOT / f"tests/golden/baichuan2_{size}" for size in ("7b", "13b")}
LENGTHS = [5, 30, 1, 200, 64, 300, 130, 3]


def run(script, *flags):
    return finish(start([sys.executable, RECIPE / script, *flags]))


def build(seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 120, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "initializer_range": 0.2}
    return modeling.BaichuanForCausalLM(modeling.BaichuanConfig(**sizes | more)).eval()


def make_rows(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 120, (length,), generator=generator).tolist() for length in lengths]
    return [
        {"row_id": i, "input_ids": row, "labels": [-100, *row[1:]]} for i, row in enumerate(rows)
    ]


def collate(rows, packed):
    batch = collators.PackedCollator()([rows]) if packed else collators.PaddedCollator(0)(rows)
    return {name: value for name, value in batch.items() if name != "row_ids"}


def golden(size, name):
    return torch.from_numpy(numpy.load(GOLDEN[size] / "cases.npz")[name])


def original(folder, size="7b", proto=None, **changes):
    """A folder like a published one: golden weights and config.json, and a tokenizer where `proto` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        k: v
        for k, v in json.loads((GOLDEN[size] / "config.json").read_text()).items()
        if k[0] != "_"
    }
    tensors = load_file(GOLDEN[size] / "weights.safetensors")
    if proto is not None:
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
        config["vocab_size"] = 512
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name].repeat(2, 1)
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def convert_folder(folder, out, **more):
    convert.to_native(folder, out, **more)
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()


# ---- model ------------------------------------------------------------------------------------------------------


def gradients(model, batches):
    """Gradients of the loss summed over all labels of `batches`, divided by their number."""
    model.zero_grad()
    for batch in batches:
        model(
            **batch, use_cache=False, num_items_in_batch=sum(length - 1 for length in LENGTHS)
        ).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        assert torch.allclose(
            found[name], expected[name], rtol=1e-4, atol=2e-5 * expected[name].abs().max()
        ), name


@pytest.mark.parametrize("how", ["stock loss", "chunked loss", "checkpointing"])
@pytest.mark.parametrize("alibi", [True, False])
def test_packed_equals_padded_and_each_row_alone(alibi, how, tmp_path):
    from common.fast import attention

    build(alibi=alibi).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=attention.register()
    ).train()
    attention.refuse_unpackable(model)
    rows = make_rows()
    expected = gradients(model, [collate([row], False) for row in rows])
    assert_close(gradients(model, [collate(rows, False)]), expected)
    if how == "chunked loss":
        batch = collate(rows, False)
        stock = model(**batch, use_cache=False).loss
        losses.use_chunked_loss(model)
        torch.testing.assert_close(
            model(**batch, use_cache=False).loss, stock, rtol=1e-5, atol=1e-5
        )
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    assert_close(gradients(model, [collate(rows, True)]), expected)


def test_sequence_logprobs_of_a_packed_row():
    model, rows = losses.use_chunked_loss(build()), make_rows()
    found = losses.sequence_logprobs(model, **collate(rows, True), use_cache=False)
    alone = [
        losses.sequence_logprobs(model, **collate([row], False), use_cache=False) for row in rows
    ]
    assert torch.allclose(found, torch.cat(alone), rtol=1e-5, atol=1e-4)


def test_a_packed_row_builds_no_square_mask(monkeypatch):
    model, batch = build(), collate(make_rows(), True)
    monkeypatch.setattr(modeling, "sdpa_mask", None)
    with torch.no_grad():
        model(**batch)  # with a fresh cache, too
    with pytest.raises(TypeError):
        model(batch["input_ids"])


def test_what_a_packed_row_cannot_have():
    model, batch = build(), collate(make_rows(), True)
    filled = model(batch["input_ids"]).past_key_values
    for wrong in (
        {"past_key_values": filled},
        {"attention_mask": torch.ones_like(batch["input_ids"])},
    ):
        with pytest.raises(ValueError, match="packed row"):
            model(**batch | wrong)
    with pytest.raises(ValueError, match="2-D"):
        model(batch["input_ids"][:, :4], attention_mask=torch.ones(1, 1, 4, 4).bool())


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generation_from_padded_prompts(cache):
    """Each row as it is alone, token by token without a cache."""
    model, rows = build(), make_rows([9, 4, 13])
    width, wanted = 13, []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        for _ in range(8):
            ids = torch.cat(
                [ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1
            )
        wanted.append(ids[0, -8:])
    ids = torch.stack(
        [torch.tensor([0] * (width - len(r["input_ids"])) + r["input_ids"]) for r in rows]
    )
    how = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    out = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        **how,
    )
    assert torch.equal(out[:, width:], torch.stack(wanted))


def test_neighbours_stay_apart_in_bf16():
    """slope * position in bf16 gives 256 and 257 one value; a distance of one is exact anywhere."""
    slopes = modeling.alibi_slopes(40)
    arguments = {
        "batch_size": 1,
        "q_length": 1,
        "kv_length": 2000,
        "q_offset": 1999,
        "kv_offset": 0,
    }
    mask = modeling.AlibiMask(**arguments, attention_mask=None)
    bias = mask.bias(slopes, torch.zeros(1, dtype=torch.bfloat16))
    assert bias.shape == (1, 40, 1, 2000) and not bias[..., -1].any()
    assert torch.equal(bias[0, :, 0, -2], -slopes.bfloat16())
    model, ids = build(), torch.tensor([make_rows([1200])[0]["input_ids"]])
    exact, half = model(ids).logits, copy.deepcopy(model).bfloat16()(ids).logits.float()
    assert (half - exact).abs()[:, -100:].mean() < 0.02 * exact.abs().mean()


def test_the_head_is_never_written():
    model, ids = build(), torch.arange(3, 40)[None]
    raw = model.lm_head.weight.detach().clone()
    evaluated = model(ids).logits
    assert torch.equal(model.train()(ids).logits, evaluated) and torch.equal(
        model.lm_head.weight, raw
    )
    hidden = model.model(ids).last_hidden_state
    assert torch.allclose(evaluated, hidden @ torch.nn.functional.normalize(raw).T, atol=1e-5)
    assert raw.norm(dim=-1).std() > 0.05, (
        "the rows differ in length, so that a plain head would be told apart"
    )


@pytest.mark.parametrize("more", [{}, {"alibi": False}, {"norm_head": False}])
def test_saved_models_open_again(tmp_path, more):
    model, ids = build(**more), torch.arange(3, 40)[None]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is modeling.BaichuanForCausalLM and torch.equal(
        again(ids).logits, model(ids).logits
    )
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing keys.*model.norm.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_published_folder_is_sent_to_convert(tmp_path):
    with pytest.raises(ValueError, match="convert.py"):
        AutoModelForCausalLM.from_pretrained(original(tmp_path, "13b"))


@pytest.mark.parametrize("more, words", [
    ({"attention_dropout": 0.1}, "attention_dropout"), ({"num_key_value_heads": 2}, "key/value"),
    ({"tie_word_embeddings": True}, "share"),
])  # fmt: skip
def test_configs_that_would_be_computed_wrongly(more, words):
    with pytest.raises(ValueError, match=words):
        modeling.BaichuanConfig(**more)


def test_lora_finds_the_projections_and_leaves_the_head(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    names = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name, _ in model.named_parameters()
        if "lora_" in name
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    batch = collate(make_rows(), True)
    losses.use_chunked_loss(model)(**batch, use_cache=False).loss.backward()
    assert model.get_base_model().lm_head.weight.grad is None


ZERO3 = """
import json, sys
sys.path[:0] = [{root!r}, {recipe!r}]
import deepspeed, torch, modeling_baichuan
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to compile
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
settings = {{"train_batch_size": 1, "zero_optimization": {{"stage": 3, "stage3_param_persistence_threshold": 0}},
            "optimizer": {{"type": "Adam", "params": {{"lr": 1e-3, "torch_adam": True}}}}}}
keep = HfDeepSpeedConfig(settings)
deepspeed.init_distributed("gloo")
model = AutoModelForCausalLM.from_pretrained({folder!r})
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]
ids, seen = torch.arange(3, 40)[None], []
for _ in range(2):
    engine.eval()
    with torch.no_grad():
        seen.append(engine(input_ids=ids).logits.double().sum(-1).abs().sum().item())
    engine.train()
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    seen.append(loss.item())
print("SEEN", json.dumps(seen))
"""


@pytest.mark.slow
def test_zero3_evaluates_and_trains_the_head(tmp_path):
    """The original writes to a partitioned weight at its first evaluation and dies."""
    model, ids, wanted = build(), torch.arange(3, 40)[None], []
    model.save_pretrained(tmp_path / "model")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        with torch.no_grad():
            wanted.append(model.eval()(ids).logits.double().sum(-1).abs().sum().item())
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    program = ZERO3.format(root=str(ROOT), recipe=str(RECIPE), folder=str(tmp_path / "model"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    result = expect(finish(start([sys.executable, "-c", program], **place, DS_ACCELERATOR="cpu")))
    seen = json.loads(
        next(line for line in result.stdout.splitlines() if line.startswith("SEEN"))[5:]
    )
    assert seen == pytest.approx(wanted, rel=1e-4)


# ---- conversion -------------------------------------------------------------------------------------------------


def test_seven_becomes_a_plain_llama_with_equal_bits(tmp_path):
    """The bits are those of the weights; the kernels of another CPU round logits differently."""
    folder = original(tmp_path / "in")
    model = convert_folder(folder, tmp_path / "out")
    assert type(model) is LlamaForCausalLM and model.config.norm_head_folded
    wanted = load_file(folder / "model.safetensors")
    found = weights(tmp_path / "out")
    for name in wanted:
        if name.endswith("W_pack.weight"):
            parts = [found.pop(name.replace("W_pack", f"{x}_proj")) for x in "qkv"]
            assert torch.equal(torch.cat(parts), wanted[name])
        elif name == "lm_head.weight":
            assert torch.equal(found.pop(name), torch.nn.functional.normalize(wanted[name]))
        else:
            assert torch.equal(found.pop(name), wanted[name]), name
    assert not found
    for case in ("single", "multiturn", "batch_leftpad"):
        ids = golden("7b", f"{case}__input_ids")
        mask = torch.ones_like(ids)
        if case == "batch_leftpad":
            mask = golden("7b", f"{case}__attention_mask")
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        assert torch.allclose(logits, golden("7b", f"{case}__logits")[mask.bool()], atol=5e-6)
    assert model.config.max_position_embeddings == 512 and model.generation_config.eos_token_id == 2


def test_a_head_that_trains_needs_its_normalisation(tmp_path):
    folder, ids = original(tmp_path / "in"), golden("7b", "train__input_ids")
    more = {name: golden("7b", f"train__{name}") for name in ("attention_mask", "labels")}
    found = {}
    for keep in (True, False):
        model = convert_folder(folder, tmp_path / str(keep), keep_norm_head=keep)
        model(ids, **more).loss.backward()
        found[keep] = model.lm_head.weight.grad[[5, 60, 190, 255]]
    wanted = golden("7b", "train__grad_lm_head_rows")
    raw = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(weights(tmp_path / "True")["lm_head.weight"], raw)
    assert torch.allclose(found[True], wanted, atol=1e-4 * wanted.abs().max())
    assert (found[False] - wanted).norm() > 0.5 * wanted.norm()


def test_pickled_shards_become_sharded_safetensors(tmp_path):
    """As the published ones are: bf16, with buffers of the rotation; the head is normalised before it is rounded."""
    folder = original(tmp_path / "in")
    tensors = {
        name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    names, raw = sorted(tensors), tensors["lm_head.weight"].float()
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:8],
        "pytorch_model-00002-of-00002.bin": names[8:],
    }
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    shards["pytorch_model-00002-of-00002.bin"].append(
        "model.layers.0.self_attn.rotary_emb.inv_freq"
    )
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    model = convert_folder(folder, tmp_path / "out", shard_gb=5e-5)
    assert model.dtype == torch.bfloat16 and len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    found = weights(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], torch.nn.functional.normalize(raw).bfloat16())
    fused = torch.cat([found[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(fused, tensors["model.layers.1.self_attn.W_pack.weight"])
    exact = weights(
        convert_folder(folder, tmp_path / "exact", dtype="float32").config._name_or_path
    )
    assert torch.equal(exact["lm_head.weight"], torch.nn.functional.normalize(raw))
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(SystemExit, match="1 weight files are missing"):
        convert.to_native(folder, tmp_path / "none")


LAYER = "model.layers.1."


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(f"{LAYER}mlp.down_proj.weight"), f"lacks 1 tensors: {LAYER}mlp.down_proj.weight"),
    (lambda t: t.update({f"{LAYER}mlp.extra": torch.zeros(1)}), f"unknown 1 tensors: {LAYER}mlp.extra"),
    (lambda t: t.update({f"{LAYER}self_attn.W_pack.weight": torch.zeros(143, 48)}), "shape"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(250, 48)}), "shape"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tmp_path, change, words):
    folder = original(tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit, match=words.replace(".", r"\.")):
        convert.to_native(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("change, words", [
    ({"hidden_act": "gelu"}, "hidden_act=gelu"), ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
])  # fmt: skip
def test_configs_that_llama_does_not_compute_are_refused(tmp_path, change, words):
    with pytest.raises(SystemExit, match=words):
        convert.to_native(original(tmp_path / "in", **change), tmp_path / "out")


@pytest.mark.parametrize("fields, code, wanted", [
    ({"max_position_embeddings": 4096, "vocab_size": 125696, "hidden_size": 4096}, None, (False, True)),
    ({"model_max_length": 4096, "vocab_size": 125696, "hidden_size": 5120}, None, (True, True)),
    ({"max_position_embeddings": 4096, "vocab_size": 125696, "hidden_size": 5120}, None, (True, True)),
    ({"max_position_embeddings": 4096, "vocab_size": 64000, "hidden_size": 4096}, None, (False, False)),
    ({"model_max_length": 4096, "vocab_size": 64000, "hidden_size": 5120}, None, (True, False)),
    ({"model_max_length": 4096}, "def rotate_half(x): ...\nself.lm_head = NormHead(a, b)", (False, True)),
    ({"max_position_embeddings": 9}, "alibi_mask = 1\nself.lm_head = nn.Linear(a, b)", (True, False)),
])  # fmt: skip
def test_which_baichuan(tmp_path, fields, code, wanted):
    if code:
        (tmp_path / "modeling_baichuan.py").write_text(code + "\nraise SystemExit('never run')")
    assert convert.kind(tmp_path, fields) == wanted


def test_the_first_baichuan_keeps_its_head(tmp_path):
    """Baichuan-7B: a plain head, so nothing is normalised."""
    folder = original(tmp_path / "in")
    (folder / "modeling_baichuan.py").write_text(
        "self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)"
    )
    model = convert_folder(folder, tmp_path / "out")
    raw = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert type(model) is LlamaForCausalLM and torch.equal(model.lm_head.weight, raw)
    assert not hasattr(model.config, "norm_head_folded")


def test_the_command(tmp_path):
    folder = original(tmp_path / "in", "13b")
    said = {
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 5,
        "user_token_id": 195,
        "transformers_version": "4.29.2",
    }
    (folder / "generation_config.json").write_text(json.dumps(said))
    result = expect(
        run("convert.py", "--model", folder, "--output_dir", tmp_path / "out", "--dtype", "float16")
    )
    assert (
        "no tokenizer.model" in result.stdout
        and "ALiBi" in result.stdout
        and "float16" in result.stdout
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (
        model.dtype == torch.float16
        and model.config.alibi
        and model.config.max_position_embeddings == 128
    )
    told = model.generation_config
    assert (told.temperature, told.top_k, told.do_sample, told.pad_token_id) == (0.3, 5, True, 0)
    assert "not empty" in error_line(
        run("convert.py", "--model", folder, "--output_dir", tmp_path / "out"), 1
    )
    assert "config.json" in error_line(
        run("convert.py", "--model", tmp_path, "--output_dir", tmp_path / "o"), 1
    )


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_an_adapter_on_w_pack_is_converted(tmp_path, size):
    """Merged into W_pack and then converted = converted and then merged."""
    from peft import PeftModel

    folder = original(tmp_path / "in", size)
    convert.to_native(folder, tmp_path / "base")
    tensors, lora = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(5)
    for layer in range(2):
        for module in ("self_attn.W_pack", "self_attn.o_proj"):
            name = f"model.layers.{layer}.{module}"
            rows, columns = tensors[f"{name}.weight"].shape
            a, b = (
                torch.randn(shape, generator=generator) * 0.3 for shape in ((3, columns), (rows, 3))
            )
            lora |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            tensors[f"{name}.weight"] += 32 / 3 * b @ a
    (tmp_path / "old").mkdir()
    save_file(lora, tmp_path / "old/adapter_model.safetensors")
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 32, "bias": "none"}
    told |= {
        "base_model_name_or_path": "baichuan-inc/Baichuan2-7B-Chat",
        "target_modules": ["W_pack", "o_proj"],
    }
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(told))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expected = convert_folder(folder, tmp_path / "merged").state_dict()

    flags = ["--model", tmp_path / "old", "--output_dir", tmp_path / "new"]
    assert "--base" in error_line(run("convert.py", *flags), 1)
    expect(run("convert.py", *flags, "--base", tmp_path / "base"))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "new"
    )
    assert sorted(model.peft_config["default"].target_modules) == [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
    ]
    found = model.merge_and_unload().state_dict()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    (tmp_path / "old/adapter_config.json").write_text(
        json.dumps(told | {"alpha_pattern": {"W_pack": 8}})
    )
    with pytest.raises(SystemExit, match="alpha_pattern"):
        convert.to_native_adapter(tmp_path / "old", tmp_path / "none", str(tmp_path / "base"))
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(told | {"r": 4}))
    with pytest.raises(SystemExit, match="shape"):
        convert.to_native_adapter(tmp_path / "old", tmp_path / "none", str(tmp_path / "base"))


# ---- tokenizer --------------------------------------------------------------------------------------------------

TEXTS = [
    "你好，我是百川大模型，由百川智能的工程师们创造。",
    "hello world, reserved seats\n    def main():\n\tprint('1 + 1 = 2')",
    "一加一等于几？等于二。",
    "<reserved_106>你好<reserved_107>再见</s>",
]
USER, ASSISTANT = fast_tokenizer.USER, fast_tokenizer.ASSISTANT
FIXED = [
    "<reserved_105>",
    USER,
    ASSISTANT,
    "<reserved_1>",
    "<reserved_10>",
    "▁▁▁▁",
    "▁▁",
    "\n",
    "你好",
]


def trained(**more):
    out = io.BytesIO()
    about = {
        "model_type": "bpe",
        "vocab_size": 430,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    about |= {
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "split_digits": True,
        "pad_id": -1,
    }
    sentencepiece.SentencePieceTrainer.train(
        model_writer=out, minloglevel=2, hard_vocab_limit=False,
        **about | {"sentence_iterator": iter(TEXTS * 5), "user_defined_symbols": FIXED} | more,
    )  # fmt: skip
    return model_pb2.ModelProto.FromString(out.getvalue())


@pytest.fixture(scope="module")
def sentences():
    """A sentencepiece model like that of Baichuan2: BPE with bytes, digits apart, nothing normalised."""
    return trained()


@pytest.fixture(scope="module")
def tokenizer(sentences):
    return fast_tokenizer.make_tokenizer(sentences)


def same_ids(tokenizer, proto, text):
    """Its turn tokens as text: as sentencepiece without them; found: as sentencepiece, which has no other specials."""
    original = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    spelt = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert spelt == fast_tokenizer.as_text(proto).encode(text)
    assert tokenizer.decode(spelt) == original.decode(spelt) == text.replace("▁", " ")
    turns = tokenizer.convert_tokens_to_ids([USER, ASSISTANT])
    assert not set(spelt) & set(turns)
    if not any(name in text for name in ("<s>", "</s>", "<unk>")):
        assert tokenizer(text)["input_ids"] == original.encode(text)
    if USER not in text and ASSISTANT not in text:
        assert spelt == original.encode(text)


PARTS = st.sampled_from([*TEXTS, *FIXED, " ", "   ", "<reserved_", "106>", "</s>", "<0x0A>", "👋"])


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.one_of(st.text(), st.text("你好：\n hel▁o1<>s/_0x👋"), st.lists(PARTS).map("".join)))
def test_ids_are_those_of_sentencepiece(sentences, tokenizer, text):
    same_ids(tokenizer, sentences, text)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_that_overlap(seed):
    """Two letters and hundreds of pieces, some of them fixed: every text can be joined in many ways."""
    import random

    source = random.Random(seed)
    texts = ["".join(source.choices("aab ", k=60)) for _ in range(200)]
    proto = trained(
        sentence_iterator=iter(texts),
        vocab_size=600,
        user_defined_symbols=["aba", "ab", "▁▁", "b▁a"],
    )
    tokenizer = fast_tokenizer.make_tokenizer(proto)
    assert tokenizer.chat_template is None, "no turn tokens, no turns"
    fast_tokenizer.compare(tokenizer, proto)
    for _ in range(500):
        same_ids(tokenizer, proto, "".join(source.choices("ab ▁", k=source.randrange(40))))


def test_special_tokens(sentences, tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (
        tokenizer.pad_token_id == 0
        and tokenizer.padding_side == "left"
        and len(tokenizer) == len(sentences.pieces)
    )
    assert tokenizer("你好")["input_ids"] == [tokenizer.convert_tokens_to_ids("你好")], (
        "nothing in front or behind"
    )
    row = tokenizer(f"{USER}hello{ASSISTANT}")["input_ids"]
    assert tokenizer.decode(row, skip_special_tokens=True) == "hello"


def test_a_tokenizer_that_differs_is_refused(sentences, tokenizer):
    other = model_pb2.ModelProto.FromString(sentences.SerializeToString())
    for piece in other.pieces:
        piece.score = -piece.score
    with pytest.raises(SystemExit, match="differently"):
        fast_tokenizer.compare(tokenizer, other)


@pytest.mark.parametrize("more, words", [
    ({"model_type": "unigram", "byte_fallback": False, "vocab_size": 100}, "not a BPE model"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalises"), ({"add_dummy_prefix": True}, "blank in front"),
    ({"bos_id": -1}, "no pieces"),
])  # fmt: skip
def test_models_of_another_kind_are_refused(tmp_path, more, words):
    (tmp_path / "tokenizer.model").write_bytes(trained(**more).SerializeToString())
    with pytest.raises(SystemExit, match=words):
        fast_tokenizer.read_model(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SystemExit, match="not a sentencepiece model"):
        fast_tokenizer.read_model(tmp_path / "tokenizer.model")


def test_a_converted_folder_needs_no_code_of_ours(tmp_path, sentences):
    model = convert_folder(original(tmp_path / "in", proto=sentences), tmp_path / "out")
    program = (
        "import sys, json\nfrom transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast\n"
        f"t = AutoTokenizer.from_pretrained('{tmp_path / 'out'}')\n"
        f"m = AutoModelForCausalLM.from_pretrained('{tmp_path / 'out'}')\n"
        "assert isinstance(t, PreTrainedTokenizerFast) and 'fast_tokenizer' not in sys.modules\n"
        "b = t(['你好', 'hello  world<reserved_106>'], padding=True, return_tensors='pt')\n"
        "assert m.generate(**b, max_new_tokens=2).shape[0] == 2\n"
        "print(json.dumps([b['input_ids'].tolist(), t.model_max_length, t.chat_template]))"
    )
    ids, longest, template = json.loads(
        expect(finish(start([sys.executable, "-c", program], cwd=tmp_path))).stdout
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentences.SerializeToString())
    rows = [processor.encode(text) for text in ("你好", "hello  world<reserved_106>")]
    assert ids == [[0] * (len(rows[1]) - len(rows[0])) + rows[0], rows[1]]
    assert longest == 512 and template == (RECIPE / "templates/baichuan2.jinja").read_text()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        isinstance(again, PreTrainedTokenizerFast)
        and model.config.pad_token_id == again.pad_token_id
    )
    for text in (*TEXTS, *FIXED, "    <reserved_106>"):
        same_ids(again, sentences, text)
    (theirs,) = older.read([tmp_path / "out"])
    older.agree(tmp_path / "out", theirs)
    with pytest.raises(SystemExit, match="does not fit"):
        convert.to_native(
            original(tmp_path / "in", proto=sentences, eos_token_id=7), tmp_path / "none"
        )


# ---- prompts and labels -----------------------------------------------------------------------------------------


def built_by_the_original(proto, messages):
    """What Baichuan2's build_chat_input gives for messages that fit."""
    encode = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()).encode
    pieces = [p.piece for p in proto.pieces]
    turn = {"user": [pieces.index(USER)], "assistant": [pieces.index(ASSISTANT)], "system": []}
    ids = [i for message in messages for i in (*turn[message["role"]], *encode(message["content"]))]
    return ids if messages[-1]["role"] == "assistant" else ids + turn["assistant"]


def talk(*texts, system=None):
    head = [{"role": "system", "content": system}] if system else []
    return head + [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]


CHATS = [
    talk("你好"),
    talk(" 1 + 1\n\n", "等于 2。", "hello"),
    talk("hi ", "", "再见", system="你是百川。  "),
]


@pytest.mark.parametrize("messages", CHATS)
def test_prompts_are_those_of_the_original(sentences, tokenizer, messages):
    wanted = built_by_the_original(sentences, messages)
    assert encode_prompt(tokenizer, messages) == wanted
    assert (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == wanted
    )


@pytest.mark.parametrize("messages", CHATS)
def test_the_last_answer_and_its_end_are_trained(sentences, tokenizer, messages):
    prompt = built_by_the_original(sentences, messages)
    answer = sentencepiece.SentencePieceProcessor(model_proto=sentences.SerializeToString()).encode(
        "很 好\n"
    ) + [2]
    row = encode_chat(tokenizer, [*messages, {"role": "assistant", "content": "很 好\n"}], 10_000)
    assert row == {
        "input_ids": prompt + answer,
        "labels": [-100] * len(prompt) + answer,
        "truncated": False,
    }


def test_turn_tokens_in_a_text_are_text(sentences, tokenizer):
    messages = talk(f"a{ASSISTANT}b</s>", f"c{USER}d", system=USER)
    row = encode_chat(tokenizer, messages, 10_000)
    user, assistant = tokenizer.convert_tokens_to_ids([USER, ASSISTANT])
    assert [row["input_ids"].count(token) for token in (user, assistant, 2)] == [1, 1, 1]
    assert row["input_ids"][-1] == 2 and tokenizer.decode(row["input_ids"]) == "".join(
        [USER, USER, f"a{ASSISTANT}b</s>", ASSISTANT, f"c{USER}d", "</s>"]
    )


@pytest.mark.parametrize("messages, tools, words", [
    ([{"role": "tool", "content": "x"}], None, "not tool"), (talk("a"), [{"name": "f"}], "no tools"),
    ([*talk("a"), {"role": "system", "content": "late"}], None, "not system"),
])  # fmt: skip
def test_messages_that_baichuan_does_not_know(tokenizer, messages, tools, words):
    with pytest.raises(ValueError, match=words):
        encode_prompt(tokenizer, messages, tools=tools)
