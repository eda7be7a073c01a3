"""The estimate of memory before a run of train_llava, held to what runs take."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from harness import ROOT, expect, finish, own_modules, start
from PIL import Image
from test_llava_build import TEXTS
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, Qwen3Config

from common import tiny

build_model, memory, llava, parts, batches = own_modules(
    "train_llava", "build_model", "memory", "model", "parts", "batches"
)
LIVE_BYTES = ROOT / "tests/support/live_bytes.py"
SIDE = 56


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A LLaVA small enough for a test whose memory goes to activations, stored in bf16 as real ones
    are; 64 tokens a picture."""
    folder = tmp_path_factory.mktemp("sizes")
    tokenizer = tiny.make_tokenizer(
        TEXTS,
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(ROOT / "train_llava/chat_template.jinja").read_text(encoding="utf-8"),
    )
    llm = Qwen3Config(
        vocab_size=len(tokenizer) + 1,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    tower = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=7,
    )
    side = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size=side, crop_size=side)
    model = build_model.build(
        tiny.save_tiny(llm, tokenizer, folder),
        tiny.save_tiny(tower, processor, folder, model_class=CLIPVisionModel),
        folder / "llava",
        dtype=build_model.torch.bfloat16,
    )
    rows = []
    for number in range(200):
        pixels = np.full((SIDE, SIDE, 3), number % 256, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        asked = [
            {"from": "human", "value": f"<image>\n{TEXTS[number % 2]}"},
            {"from": "gpt", "value": TEXTS[(number + 1) % 2]},
        ]
        rows.append({"image": f"{number}.png", "conversations": asked})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return SimpleNamespace(model=model, rows=folder / "rows.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, more",
    [
        ("projector", []),
        ("lora", ["--feature_cache_gb", 0]),
        ("full", ["--per_device_train_batch_size", 3]),
    ],
)
def test_the_estimate_is_what_a_run_takes(sizes, tmp_path, kind, more):
    command = ["python", LIVE_BYTES, ROOT / "train_llava/train.py", "--train_type", kind]
    command += ["--model_name_or_path", sizes.model, "--data_path", sizes.rows, "--bf16", "true"]
    command += ["--output_dir", tmp_path, "--model_max_length", 1024, "--max_steps", 2]
    command += ["--eval_generate", 0, "--max_eval_samples", 4, "--report_to", "none"]
    command += ["--save_strategy", "no", "--gradient_accumulation_steps", 2]
    done = expect(finish(start([*command, *more])))
    told = re.search(r"memory: about (\d+) MiB in each", done.stdout)
    estimate = int(told[1]) * 2**20
    measured = json.loads(done.stdout.rpartition("PEAK ")[2])["bytes"]
    assert measured > 40 * 2**20, "too little to mean anything"
    assert abs(estimate / measured - 1) < 0.2, f"{estimate:,} estimated, {measured:,} taken"


@pytest.mark.parametrize("kind", [*parts.TRAINED])
def test_parts_are_counted_as_they_are_loaded(sizes, kind):
    config, _ = llava.check_model(str(sizes.model))
    model = llava.open_model(str(sizes.model))
    parts.choose_trained(model, kind)
    outside = {
        name: p for name, p in model.named_parameters() if parts.part_of(name) != "language model"
    }
    cut = "vision tower" not in parts.TRAINED[kind]
    assert sum(memory.elements_beside(config, cut).values()) == sum(
        p.numel() for p in outside.values()
    )


def test_the_most_pictures_of_a_batch():
    rows = [
        {"input_ids": [1] * 10, "labels": [-100] * 9 + [1], "pictures": list(range(count))}
        for count in (0, 3, 1, 2)
    ]
    assert batches.PictureRows(rows).most_pictures(2) == 5
    windows = batches.PictureWindows(rows, 10, 8, 0)
    assert windows.most_pictures(1) == 3 and windows.most_pictures(9) == 6
