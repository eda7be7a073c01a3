"""internlm_sft/convert.py: weights, configs, adapters, refusals; what is native already; merge.py.

The numbers of the original implementations are compared in test_golden.py; the variants that it has not (bias, other
groups, rotation beyond the trained length) with the few lines of `published_logits`.
"""

import json
import math
import os
import signal
import sys

import pytest
import torch
from harness import ROOT, error_line, expect, finish, own_modules, start, weights
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.convert import models

RECIPE = ROOT / "internlm_sft"
convert, layout, tiny_base, published = own_modules(
    RECIPE.name, "convert", "layout", "tiny_base", "published"
)
GOLDEN = {name: ROOT / "tests/golden" / name for name in ("internlm1", "internlm2")}
TEXTS = ["你好，我是书生。", "hello world, who are you?"]
LAYER = "model.layers.1."


def run(script, *flags):
    return finish(start([sys.executable, RECIPE / script, *flags]))


def original(folder, name="internlm2", **changes):
    """A folder like a published one: golden weights and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((GOLDEN[name] / "config.json").read_text())
    config = {key: value for key, value in config.items() if key[0] != "_"}
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(load_file(GOLDEN[name] / "weights.safetensors"), folder / "model.safetensors")
    return folder


def convert_folder(folder, out, **more):
    convert.to_native(folder, out, **more)
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()


# ---- the original, as its papers and files describe it ----------------------------------------------------------


def norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotated(x, config):
    """[T, heads, D] turned by position; beyond the trained length the base grows (dynamic NTK)."""
    length, _, size = x.shape
    scaling = config.get("rope_scaling") or {"factor": 1.0}
    base, trained = config["rope_theta"], config["max_position_embeddings"]
    if config.get("rope_scaling") and length > trained:
        growth = scaling["factor"] * length / trained - (scaling["factor"] - 1)
        base *= growth ** (size / (size - 2))
    angles = torch.outer(torch.arange(length), base ** (-torch.arange(0, size, 2) / size))
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
    return x * cos + half * sin


def published_logits(folder, ids):
    """[T] -> [T, V] of a checkpoint with wqkv, straight from its files."""
    config = json.loads((folder / "config.json").read_text())
    tensors, eps = weights(folder), config["rms_norm_eps"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    x = tensors["model.tok_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        own = {
            k.split(f"layers.{layer}.")[1]: v for k, v in tensors.items() if f"layers.{layer}." in k
        }
        h = norm(x, own["attention_norm.weight"], eps)
        rows = F.linear(h, own["attention.wqkv.weight"], own.get("attention.wqkv.bias"))
        rows = rows.view(len(ids), groups, heads // groups + 2, size)
        query = rotated(rows[:, :, :-2].flatten(1, 2), config).transpose(0, 1)
        key = rotated(rows[:, :, -2], config).transpose(0, 1).repeat_interleave(heads // groups, 0)
        value = rows[:, :, -1].transpose(0, 1).repeat_interleave(heads // groups, 0)
        seen = torch.ones(len(ids), len(ids)).tril().log()
        found = (query @ key.mT / math.sqrt(size) + seen).softmax(-1) @ value
        found = found.transpose(0, 1).flatten(1)
        x = x + F.linear(found, own["attention.wo.weight"], own.get("attention.wo.bias"))
        h = norm(x, own["ffn_norm.weight"], eps)
        gate = F.silu(h @ own["feed_forward.w1.weight"].T) * (h @ own["feed_forward.w3.weight"].T)
        x = x + gate @ own["feed_forward.w2.weight"].T
    return norm(x, tensors["model.norm.weight"], eps) @ tensors["output.weight"].T


def variant(folder, heads=6, groups=2, bias=False, **more):
    """A random checkpoint in the published layout."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": 48}
    fields = sizes | {"bias": bias, "initializer_range": 0.2, "intermediate_size": 64} | more
    tiny_base.write_original(folder, fields, 3, TEXTS)
    if bias:
        tensors = weights(folder)
        generator = torch.Generator().manual_seed(4)
        for name, tensor in tensors.items():
            if name.endswith(".bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("more", [
    {"bias": True}, {"groups": 1}, {"groups": 6}, {"heads": 8, "groups": 4, "bias": True},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    {"rope_scaling": None, "rope_theta": 500.0},
])  # fmt: skip
def test_logits_of_other_variants(tmp_path, more):
    folder = variant(tmp_path / "in", **more)
    ids = torch.arange(3, 43)
    model = convert_folder(folder, tmp_path / "out")
    wanted = published_logits(folder, ids)
    assert wanted.abs().max() > 1, "logits that say something"
    assert torch.allclose(model(ids[None]).logits[0], wanted, atol=2e-5)
    assert type(model) is LlamaForCausalLM and model.config.attention_bias is more.get(
        "bias", False
    )


def test_the_reference_of_these_tests_is_the_original():
    import numpy

    cases = numpy.load(GOLDEN["internlm2"] / "cases.npz")
    ids, wanted = (torch.from_numpy(cases[f"single__{n}"][0]) for n in ("input_ids", "logits"))
    folder = GOLDEN["internlm2"]
    assert torch.allclose(published_logits(folder, ids), wanted, atol=2e-5)


# ---- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_keep_their_bits(tmp_path, name):
    folder = original(tmp_path / "in", name)
    model = convert_folder(folder, tmp_path / "out")
    found, wanted = weights(tmp_path / "out"), weights(folder)
    if name == "internlm2":
        found = tiny_base.published_tensors(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    ends = model.generation_config
    assert (model.config.pad_token_id, ends.eos_token_id, ends.pad_token_id) == (2, 2, 2)
    assert model.config.max_position_embeddings == 512 and model.config.tie_word_embeddings is False


def test_pickled_shards_become_sharded_safetensors(tmp_path):
    """Files of today's torch and of the oldest kind, with buffers that are computed."""
    folder = original(tmp_path / "in")
    tensors = weights(folder)
    plain = convert_folder(folder, tmp_path / "plain").state_dict()
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    inv_freq = "model.layers.0.attention.rotary_emb.inv_freq"
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:5],
        "pytorch_model-00002-of-00002.bin": names[5:],
    }
    for i, (file, part) in enumerate(shards.items()):
        content = {key: tensors[key].half() for key in part} | (
            {inv_freq: torch.ones(4)} if i else {}
        )
        torch.save(content, folder / file, _use_new_zipfile_serialization=i == 0)
    index = {"weight_map": {key: file for file, part in shards.items() for key in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = convert_folder(folder, tmp_path / "out", shard_gb=3e-5)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert model.dtype == torch.float16
    assert all(torch.equal(value, plain[key].half()) for key, value in model.state_dict().items())
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(SystemExit, match="1 weight files are missing: pytorch_model-00001"):
        convert.to_native(folder, tmp_path / "none")


@pytest.mark.parametrize("name, change, words", [
    ("internlm2", lambda t: t.pop(f"{LAYER}feed_forward.w2.weight"), f"lacks 1 tensors: {LAYER}feed_forward.w2"),
    ("internlm2", lambda t: [t.pop(k) for k in list(t) if LAYER in k], f"lacks 7 tensors: {LAYER}attention.wo.w"),
    ("internlm2", lambda t: t.update({f"{LAYER}attention.wo.bias": torch.zeros(64)}), f"unknown 1 tensors: {LAYER}"),
    ("internlm2", lambda t: t.update({f"{LAYER}attention.wqkv.weight": torch.zeros(95, 64)}), r"wqkv.weight has the shape \[95"),
    ("internlm2", lambda t: t.update({"output.weight": torch.zeros(150, 64)}), "output.weight has the shape"),
    ("internlm1", lambda t: t.pop(f"{LAYER}self_attn.o_proj.bias"), f"lacks 1 tensors: {LAYER}self_attn.o_proj.bias"),
    ("internlm1", lambda t: t.update({"v_head.weight": torch.zeros(1, 48)}), "unknown 1 tensors: v_head"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tmp_path, name, change, words):
    folder = original(tmp_path / "in", name)
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit, match=words):
        convert.to_native(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("change, words", [
    ({"num_attention_heads": 7}, "num_attention_heads 7"), ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu"), ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"rope_scaling": {"type": "yarn"}}, "yarn"),
    ({"model_type": "internlm3"}, "internlm3 needs no conversion"), ({"bias": True}, "lacks 4 tensors"),
])  # fmt: skip
def test_configs_that_llama_does_not_compute_are_refused(tmp_path, change, words):
    with pytest.raises(SystemExit, match=words):
        convert.to_native(original(tmp_path / "in", **change), tmp_path / "out")


@pytest.mark.parametrize("fields, wanted", [
    ({}, {"rope_type": "default", "rope_theta": 10000.0}),
    ({"rope_theta": 1000000, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 1e6}),
    ({"rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 1}},
     {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 1.0}),
    ({"rope_theta": 5e7, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
     {"rope_type": "linear", "rope_theta": 5e7, "factor": 2.5}),
    ({"rotary": {"base": 10000, "type": "origin"}}, {"rope_type": "default", "rope_theta": 10000.0}),
    ({"rotary": {"base": 20000, "type": "dynamic", "scaling_factor": 2}},
     {"rope_type": "dynamic", "rope_theta": 20000.0, "factor": 2.0}),
    ({"rotary": {"base": 10000, "type": "dynamic"}}, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}),
])  # fmt: skip
def test_rotation_of_every_generation(fields, wanted):
    assert convert.rotation(fields) == wanted


def test_a_config_that_calls_itself_internlm_is_read_by_its_weights(tmp_path):
    """The first published InternLM2 has model_type internlm; the first InternLM says neither groups nor bias."""
    folder = original(tmp_path / "in", model_type="internlm")
    model = convert_folder(folder, tmp_path / "out")
    assert model.config.num_key_value_heads == 2 and not model.config.attention_bias
    folder = original(tmp_path / "first", "internlm1")
    config = json.loads((folder / "config.json").read_text())
    del config["bias"]
    (folder / "config.json").write_text(json.dumps(config))
    model = convert_folder(folder, tmp_path / "second")
    assert model.config.num_key_value_heads == 4 and model.config.attention_bias


def test_a_killed_conversion_leaves_no_model(tmp_path):
    """kill -9 between two tensors: no folder under the name asked for, and the same command again works."""
    folder = original(tmp_path / "in")
    child = os.fork()
    if not child:
        whole = convert.parts_of
        convert.parts_of = lambda tensor, native, config: (
            os.kill(os.getpid(), signal.SIGKILL)
            if "w1" in str(native) or "mlp" in native[0]
            else whole(tensor, native, config)
        )
        convert.to_native(folder, tmp_path / "out")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    convert_folder(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_command(tmp_path):
    folder = original(tmp_path / "in", torch_dtype="float16")
    said = {"do_sample": True, "temperature": 0.8, "top_p": 0.7, "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(said))
    (folder / "modeling_internlm2.py").write_text("raise SystemExit('this was run')\n")
    flags = ["--model", folder, "--output_dir", tmp_path / "out"]
    result = expect(run("convert.py", *flags, "--dtype", "bfloat16"))
    assert "no tokenizer.model" in result.stdout and "bfloat16" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    told = model.generation_config
    assert model.dtype == torch.bfloat16
    assert (told.do_sample, told.temperature, told.top_p) == (True, 0.8, 0.7)
    assert not list((tmp_path / "out").glob("*.py"))
    assert "not empty" in error_line(run("convert.py", *flags), 1)
    flags = ["--model", folder, "--output_dir", tmp_path / "new", "--base", tmp_path / "out"]
    assert "--base changes nothing" in error_line(run("convert.py", *flags), 2)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content, words", [("{", "cannot be read"), ("[]", "no JSON object")])
def test_broken_settings_are_one_line(tmp_path, file, content, words):
    folder = tmp_path / "in"
    tiny_base.write_original(folder, {"num_hidden_layers": 1}, 0, TEXTS)
    (folder / file).write_text(content)
    with pytest.raises(SystemExit, match=words):
        convert.to_native(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_git_pointers_are_told(tmp_path):
    folder = original(tmp_path / "in")
    (folder / "tokenizer.model").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    line = error_line(run("convert.py", "--model", folder, "--output_dir", tmp_path / "out"), 1)
    assert "Git LFS pointers" in line and "tokenizer.model" in line


# ---- what is given to train.py instead --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["internlm", "internlm2"])
def test_a_published_folder_gets_the_command_to_paste(tmp_path, kind):
    auto_map = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
    folder = original(tmp_path / "my model", model_type=kind, auto_map=auto_map)
    (folder / "configuration.py").write_text("raise SystemExit('this was run')\n")
    with pytest.raises(SystemExit) as stop:
        models.check_model(str(folder))
    command = f"python {RECIPE}/convert.py --model '{folder}' --output_dir models/'my model-native'"
    assert command in str(stop.value) and "\n" not in str(stop.value)
    assert "tools.download internlm/x, then" in published.how_to_convert("internlm/x")


def test_internlm3_opens_without_a_question(tmp_path):
    """Its config is native; auto_map would ask on a terminal whether its code may run."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"]}
    fields |= {
        "qkv_bias": False,
        "bias": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm3.X"},
    }
    for name in ("attention_bias", "mlp_bias"):
        fields.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "modeling_internlm3.py").write_text("raise SystemExit('this was run')\n")
    program = (
        "import os, pty, sys; ends = pty.openpty(); os.dup2(ends[1], 0); assert sys.stdin.isatty()\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(RECIPE)!r}]; import published\n"
        "from transformers import AutoModelForCausalLM; from common.convert import models\n"
        f"model = models.load(AutoModelForCausalLM, {str(tmp_path)!r}, dtype='auto')\n"
        "print(type(model).__name__, model.config.model_type)"
    )
    done = expect(finish(start([sys.executable, "-c", program])))
    assert "LlamaForCausalLM internlm3" in done.stdout
    assert "[y/N]" not in done.stdout + done.stderr


# ---- adapters ---------------------------------------------------------------------------------------------------

SETTINGS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 12, "bias": "none"}


def old_adapter(folder, tensors, kinds, r=3):
    """A peft folder with random A and B on the modules of those kinds -> {weight: its update}."""
    generator, lora, updates = torch.Generator().manual_seed(5), {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in kinds:
            continue
        a = torch.randn(r, tensor.shape[1], generator=generator) * 0.2
        b = torch.randn(tensor.shape[0], r, generator=generator) * 0.2
        lora |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        updates[name] = 12 / r * b @ a
    folder.mkdir()
    save_file(lora, folder / "adapter_model.safetensors")
    told = SETTINGS | {
        "base_model_name_or_path": "internlm/internlm2-chat-7b",
        "target_modules": list(kinds),
    }
    (folder / "adapter_config.json").write_text(json.dumps(told | {"r": r}))
    return updates


def test_an_adapter_on_wqkv_gives_the_same_logits(tmp_path):
    """Merged into the published weights = converted and put on the converted base."""
    from common.convert import adapter

    folder = variant(tmp_path / "in", heads=6, groups=2)
    convert.to_native(folder, tmp_path / "base")
    tensors = weights(folder)
    kinds = ("wqkv", "wo", "w1", "w2", "w3", "output")
    updates = old_adapter(tmp_path / "old", tensors, kinds)
    ids = torch.arange(3, 43)
    before = published_logits(folder, ids)
    save_file(
        tensors | {k: tensors[k] + v for k, v in updates.items()}, folder / "model.safetensors"
    )
    wanted = published_logits(folder, ids)
    assert (wanted - before).abs().max() > 0.1

    flags = ["--model", tmp_path / "old", "--output_dir", tmp_path / "new"]
    assert "--base" in error_line(run("convert.py", *flags), 1)
    convert.to_native_adapter(tmp_path / "old", tmp_path / "new", str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    tuned = adapter.put_on(base, tmp_path / "new").eval()
    assert torch.allclose(tuned(ids[None]).logits[0], wanted, atol=1e-4)
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "new")
    expect(run("merge.py", "--adapter", tmp_path / "new", "--output_dir", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(ids[None]).logits[0], wanted, atol=1e-4)
    other = variant(tmp_path / "other", heads=6, groups=2, intermediate_size=80)
    convert.to_native(other, tmp_path / "another")
    flags = [
        "--adapter",
        tmp_path / "new",
        "--output_dir",
        tmp_path / "no",
        "--base",
        tmp_path / "another",
    ]
    assert "differ" in error_line(run("merge.py", *flags), 1)


def test_an_adapter_of_the_first_internlm_keeps_its_names(tmp_path):
    folder = original(tmp_path / "in", "internlm1")
    convert.to_native(folder, tmp_path / "base")
    old_adapter(tmp_path / "old", weights(folder), ("q_proj", "o_proj", "down_proj"))
    convert.to_native_adapter(tmp_path / "old", tmp_path / "new", str(tmp_path / "base"))
    found, wanted = weights(tmp_path / "new"), weights(tmp_path / "old")
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("change, words", [
    ({"use_dora": True}, "use_dora"), ({"r": 4}, "shape"), ({"alpha_pattern": {"wqkv": 8}}, "alpha_pattern"),
])  # fmt: skip
def test_adapters_that_cannot_be_converted_are_refused(tmp_path, change, words):
    folder = original(tmp_path / "in")
    convert.to_native(folder, tmp_path / "base")
    old_adapter(tmp_path / "old", weights(folder), ("wqkv",))
    told = json.loads((tmp_path / "old/adapter_config.json").read_text())
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(told | change))
    with pytest.raises(SystemExit, match=words):
        convert.to_native_adapter(tmp_path / "old", tmp_path / "new", str(tmp_path / "base"))
    assert not (tmp_path / "new").exists()


def test_an_adapter_of_another_model_has_no_place(tmp_path):
    folder = original(tmp_path / "in")
    convert.to_native(folder, tmp_path / "base")
    old_adapter(tmp_path / "old", {"transformer.h.0.c_attn.weight": torch.zeros(9, 3)}, ("c_attn",))
    with pytest.raises(SystemExit, match="c_attn.lora_A.weight has no place in InternLM"):
        convert.to_native_adapter(tmp_path / "old", tmp_path / "new", str(tmp_path / "base"))
    with pytest.raises(
        SystemExit, match="--base .* published layout of InternLM; python .*convert.py"
    ):
        convert.to_native_adapter(tmp_path / "old", tmp_path / "new", str(folder))
