"""The embedded default: a Qwen3 and a CLIP tower of toy size, put together by build_model.py like
any two models."""

from __future__ import annotations

import hashlib
from pathlib import Path

import build_model
from filelock import FileLock
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, Qwen3Config

from common import tiny
from common.data.cache import cache_root

HERE = Path(__file__).resolve().parent
SIDE = 48  # pixels
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", build_model.IMAGE_TOKEN]


def tiny_model(texts: list[str]) -> str:
    """Folder of a small random LLaVA whose tokenizer knows `texts`; the same texts give the same
    one, and any number of processes may ask for it."""
    llm = tiny_llm(texts)
    vision = tiny_tower()
    code = Path(build_model.__file__).read_text(encoding="utf-8")
    key = hashlib.sha256("\n".join([llm, vision, code]).encode()).hexdigest()[:16]
    folder = cache_root() / "tiny" / f"llava-{key}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            build_model.build(llm, vision, folder)
    return str(folder)


def tiny_llm(texts: list[str]) -> str:
    tokenizer = tiny.make_tokenizer(
        texts,
        vocab_size=2000,
        special_tokens=SPECIAL,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.05,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return tiny.save_tiny(config, tokenizer, cache_root() / "tiny")


def tiny_tower() -> str:
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=12,
        initializer_range=0.02,
    )
    side = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size=side, crop_size=side)
    return tiny.save_tiny(config, processor, cache_root() / "tiny", model_class=CLIPVisionModel)
