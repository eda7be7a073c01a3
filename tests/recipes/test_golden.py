"""golden_check.py: the numbers of the original implementations, and that the check can fail."""

import json
import shutil
import sys

import pytest
import torch
from golden_check import MODELS, difference, ending, worst
from harness import ROOT, error_line, expect, finish, start
from safetensors.torch import load_file, save_file

GOLDEN = ROOT / "tests/golden"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def run(name, folder):
    return finish(start([sys.executable, ROOT / "tests/golden_check.py", name, folder]))


@pytest.mark.parametrize("name", FOLDERS)
def test_numbers_of_the_original(name):
    result = expect(run(name, GOLDEN / name))
    lines = result.stdout.splitlines()
    assert len(lines) == 1, "one JSON line, nothing else"
    report = json.loads(lines[0])
    assert report["ok"] and report["name"] == name
    whole = {case for case in report["skipped"] if "." not in case}
    assert not whole, "no case is left out altogether"
    assert any("sequences" in found for found in report["cases"].values())
    assert any("loss" in found for found in report["cases"].values())
    if name == "chatglm_v11":
        assert set(report["skipped"]) == {"rope_table.fp16"}, (
            "all derived masks and positions are compared"
        )


def test_every_folder_has_its_model():
    assert set(FOLDERS) == set(MODELS)


def altered(folder, out, name, change):
    """A copy of a golden folder with one tensor changed."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "weights.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, out / "weights.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("name, tensor, change", [
    ("chatglm", "transformer.layers.1.mlp.dense_h_to_4h.bias", lambda x: x + 1e-3),
    ("chatglm2", "transformer.encoder.layers.0.self_attention.query_key_value.weight", lambda x: x * 1.001),
    ("chatglm_v11", "transformer.layers.0.attention.dense.bias", lambda x: x * float("nan")),
    ("baichuan2_7b", "lm_head.weight", lambda x: x + 1e-3),
    ("baichuan2_13b", "model.layers.1.self_attn.W_pack.weight", lambda x: x.roll(1, 0)),
    ("internlm1", "model.layers.1.self_attn.o_proj.bias", lambda x: x + 1e-3),
    ("internlm2", "model.layers.0.attention.wqkv.weight", lambda x: x.roll(1, 0)),
    ("minimind_moe", "model.layers.1.mlp.gate.weight", lambda x: x.roll(1, 0)),
    ("minimind2_moe", "model.layers.0.mlp.shared_experts.0.up_proj.weight", lambda x: x * 1.001),
    ("minimind_dense", "model.layers.0.self_attn.q_norm.weight", lambda x: x * 1.001),
])  # fmt: skip
def test_other_weights_fail(tmp_path, name, tensor, change):
    result = expect(run(name, altered(GOLDEN / name, tmp_path / "other", tensor, change)), 1)
    report = json.loads(result.stdout)
    assert not report["ok"]
    worst_logits = [found["logits"] for found in report["cases"].values() if "logits" in found]
    assert all(value == "nan" or value > 5e-5 for value in worst_logits)


def test_a_folder_whose_weights_do_not_fit_is_one_line(tmp_path):
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    folder = altered(GOLDEN / "chatglm2", tmp_path / "cut", name, lambda x: x[:, :-1].contiguous())
    assert "dense_4h_to_h" in error_line(run("chatglm2", folder), 1)


@pytest.mark.parametrize("name, folder, words", [
    ("gpt9", GOLDEN / "chatglm", "unknown model gpt9"), ("chatglm", "nowhere", "no weights.safetensors"),
    ("chatglm", ROOT / "tests", "no golden folder"),
])  # fmt: skip
def test_usage(name, folder, words):
    assert words in error_line(run(name, folder), 2)


def test_a_folder_of_other_sizes(tmp_path):
    """The same checks on another model: three layers, six heads in three groups, longer answers that end early."""
    import numpy
    from transformers import GenerationConfig, GlmForCausalLM

    config = json.loads((GOLDEN / "chatglm2/config.json").read_text())
    sizes = {
        "num_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "multi_query_group_num": 3,
        "kv_channels": 8,
    }
    config |= sizes | {
        "padded_vocab_size": 97,
        "ffn_hidden_size": 40,
        "eos_token_id": 5,
        "pad_token_id": 1,
    }
    sys.path.insert(0, str(ROOT / "chatglm_lora"))
    import convert

    torch.manual_seed(3)
    settings = convert.glm_config(config)
    settings.initializer_range = 0.3
    model = GlmForCausalLM(settings).eval()
    weights, parts = {}, model.state_dict()
    for old, new in convert.native_names(settings).items():
        weights[old] = torch.cat([parts[name] for name in new])
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))

    ids, mask = torch.randint(6, 97, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[1, :4] = 0
    names, qkv = list(weights), "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    grads = {old: torch.cat([dict(model.named_parameters())[n].grad for n in new])
             for old, new in convert.native_names(settings).items()}  # fmt: skip
    model.generation_config = GenerationConfig(
        max_new_tokens=20, pad_token_id=1, eos_token_id=int(out.logits[0, -1].argmax())
    )
    config["eos_token_id"] = model.generation_config.eos_token_id
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = model.generate(
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True
    )
    arrays = {
        "any__input_ids": ids, "any__attention_mask": mask, "any__labels": ids, "any__logits": out.logits,
        "any__loss": out.loss, "any__grad_norms": torch.stack([grads[n].norm() for n in names]),
        "any__grad_qkv0": grads[qkv],
        "said__input_ids": ids, "said__attention_mask": mask, "said__sequences": said.sequences,
        "said__step_logits": torch.stack(said.logits, 1), "said__mystery": ids,
    }  # fmt: skip
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    numpy.savez(tmp_path / "cases.npz", **arrays, any__grad_names=numpy.array(names))
    report = json.loads(expect(run("chatglm2", tmp_path)).stdout)
    assert set(report["cases"]["any"]) == {"logits", "loss", "grad_norms", "grad"}
    assert report["cases"]["said"] == {"sequences": 0, "logits": report["cases"]["said"]["logits"]}
    assert report["skipped"] == {"said.mystery": "nothing here compares this array"}


def test_differences_that_are_no_numbers_are_the_worst():
    found = worst({"logits": 1.0}, {"logits": float("nan")}, {"logits": 2.0})
    assert not found["logits"] <= 1e9
    assert difference(torch.zeros(2), torch.zeros(3)) == float("inf")


def test_the_end_of_a_generated_row():
    tokens = torch.tensor([[7, 5, 1, 1], [7, 8, 9, 5]])
    eos, counted = ending(tokens, 5, 1)
    assert eos == 5 and counted.tolist() == [[True, True, False, False], [True] * 4]
    eos, counted = ending(
        torch.tensor([[7, 5, 9, 1]]), 5, 1
    )  # went on behind its end: nothing stopped it
    assert eos is None and counted.all()
