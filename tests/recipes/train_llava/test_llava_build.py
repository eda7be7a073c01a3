"""build_model.py of train_llava: any language model and any tower, and what it refuses."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import ROOT, error_line, expect, finish, own_modules, start, weights
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessorPil,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from common import tiny

build_model, llava, tiny_base = own_modules("train_llava", "build_model", "model", "tiny_base")

TEXTS = ["图里有几个红色的圆形？两个。", "描述这张图片。左边有一个蓝色的三角形。", "abc 123"]
SIDE = 28
SQUARE = {"height": SIDE, "width": SIDE}
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
SEEN = dict(SMALL, image_size=SIDE, patch_size=7)
LLMS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
TOWERS = {
    "clip": (CLIPConfig, CLIPModel, CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), 16),
    "chinese_clip": (
        ChineseCLIPConfig,
        ChineseCLIPModel,
        ChineseCLIPImageProcessorPil(size=SQUARE, do_center_crop=False),
        16,
    ),
    "siglip": (SiglipConfig, SiglipModel, SiglipImageProcessorPil(size=SQUARE), 16),
    "dinov2": (Dinov2Config, Dinov2Model, BitImageProcessorPil(size=SQUARE, crop_size=SQUARE), 16),
    "clip_alone": (
        CLIPVisionConfig,
        CLIPVisionModel,
        CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE),
        16,
    ),
}


def make_llm(folder: Path, kind="qwen3", tied=True, spare=40, template=True, dtype=None) -> str:
    tokenizer = tiny.make_tokenizer(
        TEXTS,
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(ROOT / "train_llava/chat_template.jinja").read_text() if template else None,
    )
    more = {"head_dim": 16} if kind == "qwen3" else {}
    config = LLMS[kind](
        **SMALL,
        **more,
        vocab_size=len(tokenizer) + spare,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return tiny.save_tiny(config, tokenizer, folder, dtype=dtype)


def make_tower(folder: Path, kind="clip") -> tuple[str, int]:
    make_config, model_class, processor, tokens = TOWERS[kind]
    if kind in ("dinov2", "clip_alone"):
        config = make_config(**SEEN, initializer_range=0.2)
    else:
        config = make_config(text_config=dict(SMALL, vocab_size=50), vision_config=SEEN)
    return tiny.save_tiny(config, processor, folder, model_class=model_class), tokens


@pytest.mark.parametrize(
    ("llm", "tied", "spare", "tower", "more"),
    [
        ("qwen3", True, 40, "clip", {}),
        ("qwen3", False, 0, "siglip", {}),
        ("qwen2", True, 0, "chinese_clip", {}),
        ("llama", False, 40, "dinov2", {"image_aspect_ratio": "pad"}),
        ("qwen2", False, 40, "clip_alone", {"vision_feature_layer": [-2, -3]}),
    ],
)
def test_parts_are_what_they_were(tmp_path, llm, tied, spare, tower, more):
    """Opened by plain transformers; logits and features equal those of the parts to the last bit."""
    own_llm = make_llm(tmp_path, llm, tied, spare)
    own_tower, tokens = make_tower(tmp_path, tower)
    out = build_model.build(own_llm, own_tower, tmp_path / "llava", **more)
    facts = build_model.prove(out, own_llm, own_tower)
    assert facts["logits"] == facts["features"] == 0.0
    assert facts["image_tokens"] == tokens
    before = json.loads((Path(own_llm) / "config.json").read_text())["vocab_size"]
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.config.text_config.vocab_size == before + (spare == 0)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.generation_config.eos_token_id is not None
    assert model.generation_config.pad_token_id is not None
    stored = weights(out)["multi_modal_projector.linear_1.weight"]
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, stored)


def test_the_projector_follows_the_seed(tmp_path):
    llm, (tower, _) = make_llm(tmp_path), make_tower(tmp_path)
    outs = [
        build_model.build(llm, tower, tmp_path / str(i), seed=seed)
        for i, seed in enumerate((1, 1, 2))
    ]
    found = [weights(out)["multi_modal_projector.linear_2.weight"] for out in outs]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_half_precision_is_the_llms(tmp_path):
    llm = make_llm(tmp_path, dtype=torch.bfloat16)
    tower, _ = make_tower(tmp_path)
    out = build_model.build(llm, tower, tmp_path / "llava")
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    facts = build_model.prove(out, llm, tower)
    assert facts["logits"] == facts["features"] == 0.0


def test_the_template_takes_pictures_and_leaves_texts_alone(tmp_path):
    llm, (tower, _) = make_llm(tmp_path), make_tower(tmp_path)
    out = build_model.build(llm, tower, tmp_path / "llava")
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    plain = [
        {"role": "system", "content": "简短"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
    ]
    alone = AutoModelForCausalLM.from_pretrained(llm).config  # the folder opens
    assert alone.vocab_size
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(llm).apply_chat_template(plain, tokenize=False)
    assert processor.apply_chat_template(plain) == expected
    typed = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "先看"},
                {"type": "image"},
                {"type": "text", "text": "再说"},
            ],
        }
    ]
    assert "先看<image>再说<|im_end|>" in processor.apply_chat_template(typed)


def test_an_image_token_that_the_tokenizer_has(tmp_path):
    llm, (tower, _) = make_llm(tmp_path, spare=0), make_tower(tmp_path)
    out = build_model.build(llm, tower, tmp_path / "llava", image_token="<|endoftext|>")
    config, processor = llava.check_model(str(out))
    assert config.image_token_id == processor.image_token_id == 0
    before = json.loads((Path(llm) / "config.json").read_text())["vocab_size"]
    assert config.text_config.vocab_size == before


def test_old_names_load(tmp_path):
    """What is written has the names of the first LLaVA folders, which every version reads."""
    llm, (tower, _) = make_llm(tmp_path, tied=False), make_tower(tmp_path)
    out = build_model.build(llm, tower, tmp_path / "llava")
    names = set(weights(out))
    assert "language_model.model.embed_tokens.weight" in names
    assert "language_model.lm_head.weight" in names
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert not any("text_model" in name or "position_ids" in name for name in names)


# ---- what is refused ------------------------------------------------------------------------------


def config_folder(folder: Path, **settings) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def test_parts_of_other_kinds_are_refused_by_name(tmp_path):
    llm, (tower, _) = make_llm(tmp_path), make_tower(tmp_path)
    naflex = config_folder(tmp_path / "naflex", model_type="siglip2_vision_model")
    qwen_vl = config_folder(tmp_path / "vl", model_type="qwen2_5_vl")
    swin = config_folder(tmp_path / "swin", model_type="swin")
    for parts, words in (
        ((llm, naflex), "NaFlex SigLIP2"),
        ((llm, qwen_vl), "Qwen-VL"),
        ((qwen_vl, tower), "Qwen-VL"),
        ((llm, swin), "a vision tower of the kind swin"),
        ((tower, tower), "no language model"),
        ((str(tmp_path / "gone"), tower), "no such folder"),
        ((make_llm(tmp_path, template=False), tower), "--chat_template"),
    ):
        with pytest.raises(SystemExit, match=words):
            build_model.build(*parts, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_tower_of_the_hub_may_lie_there_as_a_pickle(tmp_path, monkeypatch):
    """Older ones have no safetensors; what the hub does not have is one line."""
    hub, here = tmp_path / "hub", tmp_path / "here"
    for folder in (hub, here):
        folder.mkdir()
    (hub / "config.json").write_text("{}")
    torch.save({"vision_model.x": torch.ones(2)}, hub / "pytorch_model.bin")
    (hub / "tf_model.h5").write_bytes(b"large")

    def fetch(name: str, allow_patterns: list[str]) -> str:
        if name != "org/clip":
            raise LocalEntryNotFoundError(f"nothing of {name} is here")
        for file in hub.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, here)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    weights_there = build_model.Weights(build_model.adapter.local_folder("org/clip"))
    assert list(weights_there) == ["vision_model.x"] and not (here / "tf_model.h5").exists()
    with pytest.raises(SystemExit, match="org/gone: no such folder, and the hub gives nothing"):
        build_model.build(make_llm(tmp_path), "org/gone", tmp_path / "out")
    (hub / "model.safetensors").write_bytes(b"")
    (here / "pytorch_model.bin").unlink()
    build_model.adapter.local_folder("org/clip")
    assert not (here / "pytorch_model.bin").exists()


def test_mistakes_are_one_line(tmp_path):
    llm, (tower, _) = make_llm(tmp_path), make_tower(tmp_path)
    command = ["python", ROOT / "train_llava/build_model.py", "--llm", llm, "--vision", tower]
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    result = finish(start([*command, "--output", full]))
    assert "not empty" in error_line(result, 1)
    assert (full / "mine.txt").read_text() == "kept"
    result = finish(start([*command, "--output", tmp_path / "o", "--vision_feature_layer", "-9"]))
    assert "the tower has 3 layers" in error_line(result, 2)
    done = expect(finish(start([*command, "--output", tmp_path / "o"])))
    assert "16 = 16" in done.stdout and "0.0e+00" in done.stdout


def test_a_killed_build_leaves_no_half_folder(tmp_path):
    llm, (tower, _) = make_llm(tmp_path), make_tower(tmp_path)
    code = (
        f"import sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'train_llava')!r}]\n"
        "import build_model\n"
        "def slow(*args):\n"
        "    print('writing', flush=True); time.sleep(60)\n"
        "build_model.new_projector = slow\n"
        f"build_model.build({llm!r}, {tower!r}, {str(tmp_path / 'out')!r})"
    )
    process = start([sys.executable, "-c", code])
    for line in process.stdout:
        if "writing" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    time.sleep(0.1)
    assert not (tmp_path / "out").exists()
    assert build_model.build(llm, tower, tmp_path / "out").is_dir()


def test_a_llava_whose_halves_do_not_agree_is_refused(tmp_path):
    out = tiny_base.tiny_model(TEXTS)
    import shutil

    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    file = broken / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"num_additional_image_tokens": 0}))
    with pytest.raises(SystemExit, match="8 image tokens .* 9 features"):
        llava.check_model(str(broken))
    file.write_text(json.dumps(settings))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"image_token_index": 7}))
    with pytest.raises(SystemExit, match="token 3 of the tokenizer, and the config says 7"):
        llava.check_model(str(broken))


def test_a_projector_of_another_kind_is_refused(tmp_path):
    """transformers would put a random one in its place."""
    import shutil

    from safetensors.torch import load_file, save_file

    out = tiny_base.tiny_model(TEXTS)
    llava.check_projector(str(out))
    other = Path(shutil.copytree(out, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    renamed = {
        name.replace("multi_modal_projector.linear_1", "mm_projector.0"): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=r"no multi_modal_projector.linear_1.*mm_projector.0"):
        llava.check_projector(str(other))
    with pytest.raises(SystemExit, match="is not LLaVA's"):
        llava.Llava(other, device="cpu")
