"""Folders whose contents never arrived: one line that says so, wherever a model is opened."""

import json

import pytest
import torch
from test_labels import QWEN2, byte_level
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.convert import adapter, model_folder, models, weight_files
from common.demo.chat_model import ChatModel

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 123456\n"
INDEX = {
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


OPENERS = {
    "config": lambda folder: models.load(AutoConfig, str(folder)),
    "tokenizer": lambda folder: models.load(AutoTokenizer, str(folder), "--tokenizer"),
    "weights": lambda folder: models.load(AutoModelForCausalLM, str(folder), dtype="auto"),
    "chat": ChatModel,
    "converter": weight_files.Weights,
    "base of an adapter": lambda folder: adapter.check_base(made_adapter(folder), str(folder)),
}


def made_adapter(base):
    (base / "adapter").mkdir()
    settings = {"base_model_name_or_path": str(base)}
    (base / "adapter/adapter_config.json").write_text(json.dumps(settings))
    return base / "adapter"


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pointer_of_any_kind_of_file_is_named(name, opener, folder):
    (folder / name).write_text(POINTER)
    with pytest.raises(
        SystemExit, match=rf"Git LFS pointers without contents \({name}\); git lfs pull"
    ) as end:
        OPENERS[opener](folder)
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("opener", ["config", "weights", "chat"])
def test_an_index_without_its_shards_is_named_before_anything_is_read(opener, folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    (folder / "model-00001-of-00002.safetensors").write_text("x")
    with pytest.raises(SystemExit, match=r"names files that are not there \(model-00002-of-00002"):
        OPENERS[opener](folder)


def test_an_adapter_that_is_a_pointer_is_named(folder):
    made = made_adapter(folder)
    (made / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(SystemExit, match=r"Git LFS pointers .*\(adapter_model.safetensors\)"):
        adapter.check_base(made)


def test_what_is_whole_or_no_folder_passes(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    model_folder.check(folder, weights=False)
    (folder / "model.safetensors").write_text("the one file that is read")
    model_folder.check(folder)
    model_folder.check("org/name")
    names = [f"{i}.json" for i in range(5)]
    assert model_folder.listed(names) == "0.json, 1.json, 2.json and 2 more"


@pytest.mark.parametrize("fault", [torch.AcceleratorError, torch.distributed.DistBackendError])
def test_a_fault_of_the_card_is_not_blamed_on_the_folder(monkeypatch, fault):
    def breaks(*args):
        raise fault("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(models, "_load", breaks)
    monkeypatch.setattr(models.model_folder, "check", lambda *args, **kwargs: None)
    with pytest.raises(fault, match="ECC"):
        models.load(AutoModelForCausalLM, "a/model")


@pytest.mark.parametrize("kind, is_read", [("qwen2", True), ("llama", False)])
def test_code_of_a_tokenizer_is_never_run_and_never_passed_over_in_silence(
    tmp_path, capsys, kind, is_read
):
    """transformers reads tokenizer.json in its place where it knows a tokenizer for the model."""
    ran = tmp_path / "ran"
    code = f"import os\nos.mkdir({str(ran)!r})\n\n\nclass Own:\n    pass\n"
    byte_level(QWEN2).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "own.py").write_text(code)
    assert model_folder.unused_class(tmp_path) is None
    file = tmp_path / "tokenizer_config.json"
    auto = {"AutoTokenizer": ["own.Own", "own.Own"]}
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Own", "auto_map": auto})
    )
    if is_read:
        models.load(AutoTokenizer, str(tmp_path))
        assert "the code of its tokenizer (Own) is not run" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="auto_map"):
            models.load(AutoTokenizer, str(tmp_path))
    assert not ran.exists()
