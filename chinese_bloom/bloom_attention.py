"""Bloom's attention without stored [heads, T, T] scores: packed rows document by document, fused
kernels elsewhere.

`use(model)` changes a stock BloomForCausalLM in place; weights, names and saved files stay as they
are. The bias is -slope * distance (Press et al. 2021, "Train short, test long"), computed from the
distance itself: the stock model adds slope * position in the model's dtype, and bfloat16 cannot
tell neighbours apart from position 256 on.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add

from common.fast.alibi import alibi_attention, alibi_slopes
from common.fast.attention import PACKS, autocast_dtype

NAME = "alibi"


class PackedRow(NamedTuple):
    """Takes the mask's place on its way through the blocks, so that recomputed activations find it
    too."""

    cu_seqlens: Tensor  # [documents + 1]
    max_seqlen: int


_row: PackedRow | None = None  # of the forward pass that is building its mask


def _mask(**kwargs):
    # never skipped: "causal" means two things where a static cache is longer than the queries
    return _row or sdpa_mask(**kwargs | {"allow_is_causal_skip": False})


class FastBloomAttention(BloomAttention):
    """BloomAttention with the same parameters. hidden_states, residual [B, T, D] -> [B, T, D],
    None."""

    def forward(
        self,
        hidden_states,
        residual,
        alibi,
        attention_mask,
        layer_past=None,
        use_cache=False,
        output_attentions=False,
        **kwargs,
    ):
        query, key, value = self._reshape(self.query_key_value(hidden_states))  # [B, H, T, d]
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        heads = self._attend(query, key, value, attention_mask)
        out = self.dense(heads.flatten(2))
        return dropout_add(out, residual, self.hidden_dropout, self.training), None

    def _attend(self, query, key, value, mask) -> Tensor:
        """query, key, value [B, H, T or S, d] -> [B, T, H, d]."""
        slopes = alibi_slopes(self.num_heads, query.device)
        scale = self.inv_norm_factor
        dropout = self.attention_dropout.p if self.training else 0.0
        if isinstance(mask, PackedRow) and not dropout:
            row = alibi_attention(
                query[0], key[0], value[0], mask.cu_seqlens, mask.max_seqlen, scale, slopes
            )
            return row[None]
        bias = self._bias(mask, slopes, query.shape[2], key.shape[2], autocast_dtype(query))
        heads = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale
        )
        return heads.transpose(1, 2)

    def _bias(self, mask, slopes: Tensor, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
        """[1 or B, H, queries, keys]: slope * (key - query), the dtype's lowest value where a query
        may not look."""
        place = torch.arange(keys, device=slopes.device)
        distance = place[None, :] - place[keys - queries :, None]
        allowed = distance <= 0
        if isinstance(mask, PackedRow):
            owner = torch.bucketize(place, mask.cu_seqlens[1:].long(), right=True)
            allowed = allowed & (owner[:, None] == owner)
        elif mask is not None:  # [B, 1, queries, keys], true where a query may look
            allowed = mask[..., :keys]
        bias = (slopes[:, None, None] * distance).to(dtype)
        return bias.masked_fill(~allowed, torch.finfo(dtype).min).view(-1, *bias.shape)


def _forward(self, *args, **kwargs):
    global _row
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        _row = PackedRow(cu_seqlens, int(kwargs["max_length_q"]))
    try:
        return self._bloom_forward(*args, **kwargs)
    finally:
        _row = None


def use(model):
    """Give a BloomForCausalLM this attention; returns the model. Call before peft or
    use_chunked_loss wrap it."""
    AttentionMaskInterface.register(NAME, _mask)
    PACKS.add(NAME)
    model.config._attn_implementation = NAME
    for module in model.modules():
        if type(module) is BloomAttention:
            module.__class__ = FastBloomAttention
    if "_bloom_forward" not in model.__dict__:
        # with the signature, which generate reads
        forward = functools.wraps(type(model).forward)(_forward)
        model._bloom_forward = model.forward
        model.forward = MethodType(forward, model)
    return model
