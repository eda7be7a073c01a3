"""ALiBi over packed rows (Press et al. 2021, "Train short, test long"): head h adds
-slopes[h] * distance to its scores.

The bias is computed from the distance itself. slope * position, as published models add it, cannot
tell neighbours apart from position 256 on in bfloat16.

T tokens of a row, H heads (each with its own key/value head), d size of a head.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from common.fast import attention, attention_cpu
from common.fast.attention_cpu import BLOCK, Block, BlockwiseAttention

COLUMNS = 8  # that a fused kernel's query and key are widened by


@functools.cache
def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """ALiBi's slope of each head, fp32 [heads]: 2^(-8i/n), filled up from 2n where `heads` is no
    power of two n. Every layer asks, and each copy to a device would wait for it."""
    n = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]
    return torch.tensor(slopes, device=device)


def alibi_attention(query, key, value, cu_seqlens, max_seqlen, scale, slopes) -> Tensor:
    """Causal attention with ALiBi inside each document of a row.

    query, key, value [H, T, d]; cu_seqlens [documents + 1]; max_seqlen: tokens of the longest
    document; slopes [H]. Returns [T, H, d].
    """
    query, key, value = (attention.to_autocast(x) for x in (query, key, value))
    if query.device.type == "cpu":
        return _on_cpu(query, key, value, cu_seqlens, scale, slopes)

    size = query.shape[-1]
    kernel = attention.varlen_kernel(query) if size + COLUMNS <= 256 else None
    if kernel is None:
        return document_by_document(query, key, value, cu_seqlens, scale, slopes)
    query, key = add_columns(query, key, cu_seqlens, scale, slopes)
    value = F.pad(value, (0, COLUMNS))  # the kernels want one size
    return kernel(query, key, value, cu_seqlens, max_seqlen, scale)[..., :size]


# ---- CPUs: blocks of products under a bias for each head ----
@torch.compiler.disable  # a product per document: traced, each new row would be compiled anew
def _on_cpu(query, key, value, cu_seqlens, scale, slopes) -> Tensor:
    edges = tuple(cu_seqlens.tolist())
    blocks = functools.partial(_blocks, edges, tuple(slopes.tolist()), query.dtype)
    return BlockwiseAttention.apply(query, key, value, blocks, scale)


@functools.lru_cache(maxsize=4)  # all layers of a step ask for the same ones
def _blocks(edges: tuple[int, ...], slopes: tuple[float, ...], dtype: torch.dtype) -> list[Block]:
    """torch's fused attention knows no ALiBi, so that long documents go in blocks too."""
    spans = attention_cpu.join_short(edges)
    bank = _bias_bank(slopes, dtype, attention_cpu.bank_width(max(map(sum, spans))))
    blocks = []
    first = 0
    for lengths in spans:
        last = first + sum(lengths)
        if len(lengths) > 1:
            blocks.append(Block(first, last, first, last, _joined_bias(lengths, slopes, dtype)))
            first = last
            continue
        for start in range(first, last, BLOCK):
            end = min(last, start + BLOCK)
            left = bank.shape[2] - BLOCK - (start - first)
            bias = bank[:, : end - start, left : left + end - first]
            blocks.append(Block(start, end, first, end, bias))
        first = last
    return blocks


def _joined_bias(lengths: list[int], slopes: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """[H, sum, sum] for neighbours that share a block."""
    place = torch.arange(sum(lengths))
    distance = place[None, :] - place[:, None]
    return _bias(distance, attention_cpu.causal_inside(lengths), slopes, dtype)


@functools.lru_cache(maxsize=4)
def _bias_bank(slopes: tuple[float, ...], dtype: torch.dtype, width: int) -> Tensor:
    """[H, BLOCK, width]: as attention_cpu.causal_mask_bank, with ALiBi's bias instead of 0."""
    distance = torch.arange(width)[None, :] - (width - BLOCK) - torch.arange(BLOCK)[:, None]
    return _bias(distance, distance <= 0, slopes, dtype)


def _bias(distance: Tensor, allowed: Tensor, slopes: tuple[float, ...], dtype) -> Tensor:
    """distance, allowed [q, k] -> [H, q, k]: slope * distance (key minus query) where allowed, else
    -inf."""
    bias = torch.tensor(slopes)[:, None, None] * distance
    return bias.masked_fill_(~allowed, -torch.inf).to(dtype)


# ---- accelerators ----
def add_columns(
    query: Tensor, key: Tensor, cu_seqlens: Tensor, scale: float, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """query and key [H, T, d] with COLUMNS more columns whose product is slope * position / scale.

    A softmax does not see what all keys share, so slope * position of the key is the same as
    -slope * distance, and a plain fused kernel (which sums in fp32) computes ALiBi. The factors are
    split so that half precision holds them: the position into multiples of 256 and a rest, the
    slope into three parts.
    """
    tokens = torch.arange(query.shape[1], device=query.device)
    document = torch.bucketize(tokens, cu_seqlens[1:].long(), right=True)
    position = (tokens - cu_seqlens.long()[document]).float()
    high = (position / 256).floor()
    low = position - 256 * high

    parts = []
    rest = slopes.float() / scale
    for _ in range(3):
        parts.append(rest.to(query.dtype))
        rest = rest - parts[-1].float()
    slopes = torch.stack(parts, -1)  # [H, 3]

    zeros = slopes.new_zeros(len(slopes), 2)
    of_query = torch.cat([slopes * 256, slopes, zeros], -1)
    of_query = of_query[:, None].expand(-1, query.shape[1], -1)
    of_key = torch.stack([high] * 3 + [low] * 3 + [0 * high] * 2, -1).to(key.dtype)
    of_key = of_key.expand(len(key), -1, -1)
    return torch.cat([query, of_query], -1), torch.cat([key, of_key], -1)


def document_by_document(query, key, value, cu_seqlens, scale, slopes) -> Tensor:
    """torch's own attention on each document with its bias; where no kernel for packed rows
    runs."""
    parts = []
    for start, end in pairwise(attention.on_host(cu_seqlens).tolist()):
        place = torch.arange(end - start, device=query.device)
        distance = place[None, :] - place[:, None]
        bias = slopes[:, None, None] * distance
        bias = bias.masked_fill(distance > 0, -torch.inf).to(query.dtype)
        q, k, v = (x[None, :, start:end] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=scale)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
