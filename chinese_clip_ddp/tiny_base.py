"""The embedded default: a ChineseCLIPModel of about a million parameters whose tokenizer knows the
characters of the captions at hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from model import Preparation
from transformers import BertTokenizer, ChineseCLIPConfig, ChineseCLIPImageProcessorPil
from transformers import ChineseCLIPModel as Model

from common import tiny
from common.data.cache import cache_root

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ASCII = "0123456789abcdefghijklmnopqrstuvwxyz"
MOST_CHARACTERS = 8000
SIDE = 48  # pixels
PATCH = 16


def make_tokenizer(texts: Iterable[str]) -> BertTokenizer:
    """BERT's tokenizer with a vocabulary of single characters, the most frequent first."""
    counted = Counter(character for text in texts for character in text.lower())
    found = [c for c, _ in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))]
    found = [c for c in found if not c.isspace()][:MOST_CHARACTERS]
    words = dict.fromkeys([*SPECIAL, *ASCII, *(f"##{c}" for c in ASCII), *found])
    vocabulary = {word: number for number, word in enumerate(words)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=128)


def tiny_model(texts: Iterable[str]) -> str:
    """Folder of a small random ChineseCLIPModel; the same texts give the same one."""
    tokenizer = make_tokenizer(texts)
    size = {"height": SIDE, "width": SIDE}
    processor = ChineseCLIPImageProcessorPil(size=size, do_center_crop=False)
    tower = dict(hidden_size=128, num_attention_heads=4, intermediate_size=256)
    config = ChineseCLIPConfig(
        text_config=dict(
            **tower,
            num_hidden_layers=1,
            initializer_range=0.05,
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(**tower, num_hidden_layers=3, image_size=SIDE, patch_size=PATCH),
        projection_dim=128,
        logit_scale_init_value=math.log(20),
    )
    preparation = Preparation(tokenizer, processor)
    return tiny.save_tiny(
        config, preparation, cache_root() / "tiny", model_class=Model, teach=tell_places_apart
    )


def tell_places_apart(model) -> None:
    """Positions that are large enough to be seen from the first step on: where a thing stands is
    half of what the sample's captions say."""
    weight = model.vision_model.embeddings.position_embedding.weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight.normal_(std=0.5, generator=generator)
