"""nanochat's network, as transformers has it (NanoChatForCausalLM), and what this recipe needs to
train it.

    model = build(config_of(6400, hidden_size=256, num_hidden_layers=4, num_attention_heads=2))

Folders that this recipe writes open in transformers alone, and published ones open here. The block:
no weights in its norms, query and key normalised after the rotation, relu squared, a head of its
own whose logits are softly capped. Start of the weights as in nanochat (Karpathy 2025): what is
added to the residual begins at zero, the head near zero.

D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from transformers import NanoChatConfig, NanoChatForCausalLM

MODEL_TYPE = NanoChatConfig.model_type
EMBEDDING_STD = 0.8
HEAD_STD = 0.001
EXPANSION = 4  # of the feed-forward layer
POSITIONS = 2048  # at least, as in published configs


def config_of(
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    window: int = POSITIONS,
) -> NanoChatConfig:
    """window: tokens of a training row. Ids of the special tokens are this recipe's."""
    return NanoChatConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=EXPANSION * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max(POSITIONS, window),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


class CappedHead(nn.Linear):
    """Logits between -cap and cap: cap * tanh(x / cap). transformers' model caps them behind its
    head; here they leave the head so, and losses in chunks (common/fast/losses.py, which look for
    `logit_cap`) see them."""

    def __init__(self, weight: nn.Parameter, cap: float):
        vocabulary, width = weight.shape
        super().__init__(width, vocabulary, bias=False, device="meta")
        self.weight = weight
        self.logit_cap = cap

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logit_cap * torch.tanh(super().forward(hidden) / self.logit_cap)


def build(config: NanoChatConfig) -> NanoChatForCausalLM:
    """A model with random float32 weights (torch's global generator)."""
    model = NanoChatForCausalLM(config)
    width = config.hidden_size
    with torch.no_grad():
        nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
        nn.init.normal_(model.lm_head.weight, std=HEAD_STD)
        for layer in model.model.layers:
            attention = layer.self_attn
            bound = math.sqrt(3 / width)  # a uniform distribution of deviation 1 / sqrt(D)
            for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
                nn.init.uniform_(matrix.weight, -bound, bound)
            nn.init.uniform_(layer.mlp.fc1.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(attention.o_proj.weight)
            nn.init.zeros_(layer.mlp.fc2.weight)
    return model


def cap_in_head(model: NanoChatForCausalLM) -> NanoChatForCausalLM:
    """Let the head itself cap the logits; changes the model and returns it. Its config says nothing
    of a cap from here on, see `as_published`."""
    cap = model.config.final_logit_softcapping
    if cap is not None:
        model.set_output_embeddings(CappedHead(model.lm_head.weight, cap))
        model.config.final_logit_softcapping = None
    return model


@contextlib.contextmanager
def as_published(model: nn.Module):
    """Inside, the config of a model says where its logits are capped, as transformers reads it."""
    head = model.get_output_embeddings()
    cap = head.logit_cap if isinstance(head, CappedHead) else None
    if cap is not None:
        model.config.final_logit_softcapping = cap
    try:
        yield
    finally:
        if cap is not None:
            model.config.final_logit_softcapping = None
