"""A model whose attention is watched, and how its tokens are shown.

T tokens, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from common.data.spelling import encode_text

WATCHED = "watched"
SEEN: dict[int, Tensor] = {}  # layer -> weights [H, T, T] of the newest forward pass


class Misfit(Exception):
    """What a figure cannot show; `param`: the field that is to blame."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.status = status


@dataclass
class Lesson:
    """is_ours: whether the model is the recipe's own, whose parts have known names."""

    tokenizer: object
    model: torch.nn.Module
    is_ours: bool

    @property
    def has_experts(self) -> bool:
        return self.is_ours and self.model.config.use_moe

    def encode(self, text: str, most: int, param: str = "text") -> list[int]:
        """A text as documents are encoded in training; Misfit for none or too many tokens."""
        ids = list(encode_text(self.tokenizer, text))
        if not ids:
            raise Misfit("the text has no tokens", param)
        if len(ids) > most:
            raise Misfit(f"{len(ids)} tokens; this figure shows up to {most}", param)
        return ids

    def piece(self, number: int) -> str:
        """A token as text; a part of a character as its bytes, ⟨e4-bd⟩."""
        text = self.tokenizer.decode([number], clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            return text
        found = self.raw(number)
        return f"⟨{found.hex('-')}⟩" if found else text

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.piece(number) for number in ids]

    def raw(self, number: int) -> bytes:
        """The bytes of a token; b"" where the vocabulary has other spellings."""
        token = self.tokenizer.convert_ids_to_tokens(number)
        if number in self.tokenizer.all_special_ids:
            return token.encode()
        known = letters()
        if not all(letter in known for letter in token):
            return b""
        return bytes(known[letter] for letter in token)


@cache
def letters() -> dict[str, int]:
    """Letters that byte-level vocabularies write bytes with."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def watched(model):
    """The model with attention that leaves its weights in SEEN."""
    AttentionInterface.register(WATCHED, attend)
    AttentionMaskInterface.register(WATCHED, eager_mask)
    model.config._attn_implementation = WATCHED
    return model.eval()


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    out, weights = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    SEEN[module.layer_idx] = weights[0]
    return out, weights


def forward(lesson: Lesson, ids: list[int]) -> Tensor:
    """Token ids -> logits [T, V] in float32; the attention is in SEEN."""
    SEEN.clear()
    out = lesson.model(torch.tensor([ids]), use_cache=False)
    return out.logits[0].float()
