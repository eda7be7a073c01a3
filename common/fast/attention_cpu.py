"""Packed attention on CPUs, by explicit matrix products.

torch's fused attention is slow there in backward and for short documents. So queries go in blocks
that skip the keys of the future, short neighbours share a block under one small mask, and heads
that share a key/value head are folded into the rows of one product. Only long documents go to the
fused attention.

T tokens of a row, H query heads, K key/value heads, d size of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common import device

BLOCK = 128  # query rows of one product; neighbours are joined up to this length
# sizes of products are multiples of it: oneDNN compiles a kernel for every new shape in half
# precision
STEP = 32
# documents of so many tokens are faster in torch's fused attention
LONG = {torch.bfloat16: 768, torch.float16: 768, torch.float32: 640}
# on Intel's CPUs all that share no block: in fp32 with heads up to SMALL_HEAD, 1.3 times as fast;
# in bf16 with larger ones that share no key/value head, 1.25 to 1.5 times
LONG_ON_INTEL = BLOCK
SMALL_HEAD = 64


class Block(NamedTuple):
    """One product: some queries of the row against some of its keys."""

    start: int  # of the queries
    end: int
    key_start: int
    key_end: int
    bias: Tensor | None  # added to the scores; see BlockwiseAttention


class Span(NamedTuple):
    """Neighbouring documents that share one block, or a single one of any length."""

    length: int
    mask: Tensor | None  # [group * length, length] where there are several, else None


@torch.compiler.disable  # a product per document: traced, each new row would be compiled anew
def packed_attention(query, key, value, cu_seqlens, max_seqlen, scale) -> Tensor:
    """Causal attention inside each document of a row.

    query [H, T, d], key and value [K, T, d], cu_seqlens [documents + 1] -> [T, H, d]. max_seqlen is
    not needed here; the kernels of accelerators take it (attention.varlen_kernel).
    """
    group = len(query) // len(key)
    long_from = fused_from(query.dtype, query.shape[-1], group)
    runs = _split_runs(tuple(cu_seqlens.tolist()), group, query.dtype, long_from)
    sizes = [sum(span.length for span in run) for run in runs]
    queries, keys, values = (x.split(sizes, 1) for x in (query, key, value))
    parts = [
        _run_attention(q, k, v, run, scale, long_from)
        for q, k, v, run in zip(queries, keys, values, runs, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fused_from(dtype: torch.dtype, head_size: int, group: int) -> int:
    """Tokens from which a document goes to the fused attention. group: query heads of a key/value
    head."""
    is_small = head_size <= SMALL_HEAD
    gains = {torch.float32: is_small, torch.bfloat16: not is_small and group == 1}
    if gains.get(dtype) and device.cpu_vendor() == "GenuineIntel":
        return LONG_ON_INTEL
    return LONG.get(dtype, LONG[torch.float32])


def _run_attention(query, key, value, run: list[Span], scale: float, long_from: int) -> Tensor:
    group = len(query) // len(key)
    if not _is_long(run[0], long_from):
        blocks = functools.partial(_causal_blocks, run, group, query.dtype)
        return BlockwiseAttention.apply(query, key, value, blocks, scale)
    out = F.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=group > 1
    )
    return out[0].transpose(0, 1)


@functools.lru_cache(maxsize=4)  # all layers of a step ask for the same one
def _split_runs(
    cu_seqlens: tuple[int, ...], group: int, dtype: torch.dtype, long_from: int
) -> list[list[Span]]:
    """Boundaries of documents -> runs that are computed together: a document of `long_from` tokens
    or more alone, or neighbours without such a one."""
    runs = []
    after_long = True
    for lengths in join_short(cu_seqlens):
        span = Span(sum(lengths), _joined_mask(lengths, group, dtype))
        long = _is_long(span, long_from)
        if long or after_long:
            runs.append([])
        runs[-1].append(span)
        after_long = long
    return runs


def _is_long(span: Span, long_from: int) -> bool:
    return span.mask is None and span.length >= long_from


def join_short(cu_seqlens: Iterable[int]) -> list[list[int]]:
    """Boundaries of documents -> their lengths, neighbours that fit into one block together."""
    joined = []
    for start, end in pairwise(cu_seqlens):
        length = end - start
        if not length:
            continue
        if joined and sum(joined[-1]) + length <= BLOCK:
            joined[-1].append(length)
        else:
            joined.append([length])
    return joined


def _joined_mask(lengths: list[int], group: int, dtype: torch.dtype) -> Tensor | None:
    """[group * sum, sum]: 0 where a token may look, else -inf; None for a single document."""
    if len(lengths) == 1:
        return None
    allowed = causal_inside(lengths)
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
    return mask.repeat(group, 1)


def _causal_blocks(run: list[Span], group: int, dtype: torch.dtype):
    """Yields the blocks of a run without a long document."""
    bank = causal_mask_bank(group, dtype)
    total = sum(span.length for span in run)
    first = 0
    for length, mask in run:
        last = first + length
        if mask is not None:
            yield Block(first, last, first, last, mask)
            first = last
            continue
        for start in range(first, last, BLOCK):
            end = min(last, start + BLOCK)
            rows = round_up(end - start, total - start)
            columns = round_up(end - first, total - first)
            window = mask_window(bank, start - first, rows, columns)
            yield Block(start, end, first, first + columns, window)
        first = last


def causal_inside(lengths: Iterable[int]) -> Tensor:
    """Bool [sum, sum]: whether a token may look at another, inside its own document."""
    owner = torch.repeat_interleave(torch.tensor(lengths))
    return (owner[:, None] == owner).tril_()


@functools.lru_cache(maxsize=4)
def causal_mask_bank(
    group: int, dtype: torch.dtype, width: int = max(LONG.values()) + BLOCK
) -> Tensor:
    """[group, BLOCK, width], 0 and -inf: query i of a block may look at the columns up to
    width - BLOCK + i. The mask of every block of causal queries is a window of it (mask_window)."""
    mask = torch.full((BLOCK, width), -torch.inf, dtype=dtype)
    return mask.triu_(width - BLOCK + 1).repeat(group, 1, 1)


def bank_width(longest: int, spare: int = 0) -> int:
    """Width of a bank for `longest` keys; rounded up, so that few different ones are kept."""
    return -(-longest // 1024) * 1024 + BLOCK + spare


def mask_window(bank: Tensor, past: int, rows: int, columns: int) -> Tensor:
    """[group * rows, columns]: the mask of `rows` queries whose first one has `past` keys before
    it; -inf beyond the bank's last column."""
    left = bank.shape[2] - BLOCK - past
    window = bank[:, :rows, left : left + columns]
    missing = columns - window.shape[2]
    if missing:
        window = F.pad(window, (0, missing), value=-torch.inf)
    return window.reshape(-1, columns)


def round_up(size: int, most: int) -> int:
    """The next multiple of STEP, but not above `most`."""
    return min(-(-size // STEP) * STEP, most)


class BlockwiseAttention(torch.autograd.Function):
    """Attention in blocks of queries: query [H, T, d], key and value [K, S, d] -> [T, H, d]. The
    backward computes the probabilities again instead of keeping them for every layer.

    blocks: () -> Blocks that hold every query once. A bias is [H / K * queries, keys] for all
        key/value heads, [H, queries, keys], or None where every key is seen. One for all heads may
        have more rows than there are queries: as many are computed, and left out.
    """

    @staticmethod
    def forward(ctx, query, key, value, blocks: Callable[[], Iterable[Block]], scale: float):
        ctx.save_for_backward(query, key, value)
        ctx.blocks = blocks
        ctx.scale = scale
        heads, tokens, size = query.shape
        groups = len(key)
        query = query.view(groups, heads // groups, tokens, size)
        out = torch.empty(tokens, heads, size, dtype=query.dtype)
        grouped_out = _grouped(out, groups)
        with torch.autocast("cpu", enabled=False):
            for start, end, key_start, key_end, bias in blocks():
                rows = _rows(query, bias, end - start)
                q = query[:, :, start : start + rows]
                probs = _probs(q, key[:, key_start:key_end], bias, scale)
                result = torch.bmm(probs, value[:, key_start:key_end])
                result = result.view(groups, -1, rows, size)
                grouped_out[:, :, start:end] = result[:, :, : end - start]
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        heads, tokens, size = query.shape
        groups = len(key)
        query = query.view(groups, heads // groups, tokens, size)
        grad = _grouped(grad.to(query.dtype), groups)
        # laid out like the projections that they flow back into
        d_query = _grouped(torch.empty(tokens, heads, size, dtype=query.dtype), groups)
        # in fp32: blocks are summed
        d_key = torch.zeros(key.shape[1], groups, size).transpose(0, 1)
        d_value = torch.zeros(key.shape[1], groups, size).transpose(0, 1)
        with torch.autocast("cpu", enabled=False):
            for start, end, key_start, key_end, bias in ctx.blocks():
                rows = _rows(query, bias, end - start)
                q = query[:, :, start : start + rows]
                g = grad[:, :, start : start + rows]
                if rows > end - start:
                    g = g.clone()
                    g[:, :, end - start :] = 0
                k = key[:, key_start:key_end]
                v = value[:, key_start:key_end]
                probs = _probs(q, k, bias, ctx.scale)
                q = q.flatten(1, 2)
                g = g.flatten(1, 2)
                d_value[:, key_start:key_end] += torch.bmm(probs.transpose(1, 2), g)
                d_probs = torch.bmm(g, v.transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
                d_scores.mul_(ctx.scale)
                d_rows = torch.bmm(d_scores, k).view(groups, -1, rows, size)
                d_query[:, :, start:end] = d_rows[:, :, : end - start]
                d_key[:, key_start:key_end] += torch.bmm(d_scores.transpose(1, 2), q)
        d_query = d_query.reshape(heads, tokens, size)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """A view of [T, H, d] as [groups, H / groups, T, d]."""
    tokens, _, size = x.shape
    return x.view(tokens, groups, -1, size).permute(1, 2, 0, 3)


def _rows(query: Tensor, bias: Tensor | None, queries: int) -> int:
    """Query rows of a product: those of the bias where it is one for all heads."""
    if bias is None or bias.dim() == 3:
        return queries
    return len(bias) // query.shape[1]


def _probs(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """query [K, G, rows, d], key [K, keys, d] -> [K, G * rows, keys]; softmax is fp32 inside."""
    query = query.flatten(1, 2)
    key = key.transpose(1, 2)
    if bias is None:
        scores = torch.bmm(query, key).mul_(scale)
    else:
        scores = torch.baddbmm(bias, query, key, alpha=scale)
    return torch.softmax(scores, -1)
