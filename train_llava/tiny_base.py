"""The embedded default: a Qwen3 and a CLIP tower of toy size, put together by build_model.py like
any two models.

The tower has seen some drawn pictures before, none of the samples, as every tower that people take
has; the language model and the projector begin from nothing.
"""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path

import build_model
import make_data
import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, Qwen3Config

from common import tiny
from common.data.cache import cache_root

HERE = Path(__file__).resolve().parent
SIDE = make_data.SIDE  # pixels
LESSONS = 3000  # pictures that the tower has seen
LESSON_STEPS = 200
LESSON_SIZE = 64
RATE = 3e-3
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
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=16,
    )
    return tiny.save_tiny(
        config, image_processor(), cache_root() / "tiny", model_class=CLIPVisionModel, teach=teach
    )


def image_processor() -> CLIPImageProcessorPil:
    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size=side, crop_size=side)


# ---- what the tower has seen ---------------------------------------------------------------------


def teach(tower: CLIPVisionModel) -> None:
    """Every patch of it tells shape, color, number and places of what is drawn: a few seconds, in
    the layer that LLaVA looks at."""
    pixels, answers = lessons()
    shapes, colors, numbers, places = answers.T
    sizes = [len(make_data.SHAPES), len(make_data.COLORS), len(make_data.NUMBERS)]
    sizes.append(len(make_data.PLACES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # so small a tower would learn last where things are
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=2.0)
        head = nn.Linear(tower.config.hidden_size, sum(sizes))
        moving = [*tower.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(moving, lr=RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, LESSON_STEPS)
        for _ in range(LESSON_STEPS):
            some = torch.randint(len(pixels), (LESSON_SIZE,))
            states = tower(pixels[some], output_hidden_states=True).hidden_states[-2][:, 1:]
            said = head(states.flatten(0, 1)).split(sizes, 1)
            some = some.repeat_interleave(states.shape[1])
            bits = (places[some, None] >> torch.arange(sizes[3])) & 1
            loss = F.cross_entropy(said[0], shapes[some]) + F.cross_entropy(said[1], colors[some])
            loss = loss + F.cross_entropy(said[2], numbers[some])
            loss = loss + 2 * F.binary_cross_entropy_with_logits(said[3], bits.float())
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def lessons() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures as the processor gives them, and what is on each: shape, color, number - 1, places
    as bits, int64 [n, 4]."""
    chance = random.Random("tower")
    names = {
        word: i for words in (make_data.SHAPES, make_data.COLORS) for i, word in enumerate(words)
    }
    bit = {place: 1 << i for i, place in enumerate(make_data.PLACES)}
    pictures = []
    answers = []
    for number in range(LESSONS):
        found = make_data.scene(chance)
        png = make_data.draw(found, f"tower {number}")
        pictures.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
        places = sum(bit[place] for place in found.places)
        facts = (names[found.shape], names[found.color], len(found.places) - 1, places)
        answers.append(facts)
    processor = image_processor()
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - mean) / std, torch.tensor(answers)
