"""Attention over packed rows whose documents share beginnings: what several begin with stands in
the row once.

    start[:-1] | start[-1] first | start[-1] second | ...

Each document has the positions that it would have alone. The queries of a later one are its own
columns; its keys are the columns of the start and its own, and `kv_index` names them. So every
document has boundaries of its queries and of its keys, and its queries are the last of its keys.
The start costs one forward and one backward, however many follow it.

`register()` adds this attention to transformers; rows without `kv_index` are computed as
attention.py does. A layer whose output is wanted in few columns is called with `asked`, too.

T tokens of a row, n documents, S keys of all documents, H query heads, K key/value heads.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.collators import joined, row_ids_of
from common.data.spelling import IGNORE
from common.fast import attention
from common.fast.attention_cpu import (
    BLOCK,
    STEP,
    Block,
    BlockwiseAttention,
    bank_width,
    causal_mask_bank,
    mask_window,
    round_up,
)

NAME = "packed_shared_start"


# ---- the row ----
def pack(rows: list[dict]) -> dict:
    """Rows -> the packed row in which each leaves out its first `row["shared"]` tokens, those of
    the last row before it that shares none.

    Returns input_ids, labels, position_ids [1, T]; cu_seq_lens_q, cu_seq_lens_k [n + 1] int32, the
    boundaries of queries and keys; kv_index [S], columns of the keys; max_length_q, max_length_k;
    row_ids as collators.PackedCollator. The first own token of a row has no label: nothing before
    it in the row predicts it.
    """
    ids = []
    labels = []
    positions = []
    keys = []
    queries_of = []  # how many each row has
    keys_of = []
    column = 0
    beginning = 0  # column of the row that shares none
    for row in rows:
        shared = row["shared"]
        own = len(row["input_ids"]) - shared
        if not shared:
            beginning = column
        ids.append(row["input_ids"][shared:])
        labels.append(row["labels"][shared:])
        positions.append(np.arange(shared, shared + own))
        keys.append(np.arange(beginning, beginning + shared))
        keys.append(np.arange(column, column + own))
        queries_of.append(own)
        keys_of.append(shared + own)
        column += own
    cu_seqlens_q = torch.tensor([0, *queries_of]).cumsum(0)
    cu_seqlens_k = torch.tensor([0, *keys_of]).cumsum(0)
    joined_labels = joined(labels)
    joined_labels[cu_seqlens_q[:-1]] = IGNORE
    return {
        "input_ids": joined(ids)[None],
        "labels": joined_labels[None],
        "position_ids": joined(positions)[None],
        "kv_index": joined(keys),
        "cu_seq_lens_q": cu_seqlens_q.to(torch.int32),
        "cu_seq_lens_k": cu_seqlens_k.to(torch.int32),
        "max_length_q": max(queries_of),
        "max_length_k": max(keys_of),
        "row_ids": row_ids_of(rows),
    }


class Asked(NamedTuple):
    """Of a packed row, the columns whose attention is wanted: the last ones of its documents.

    index: int64 [Q]. cu_seqlens: int32 [n + 1], their boundaries by document, which may have none.
    longest: most of a document.
    """

    index: Tensor
    cu_seqlens: Tensor
    longest: int


def asked_columns(wanted: Tensor, cu_seqlens: Tensor) -> Asked | None:
    """From the first wanted column of each document to its end, rounded up to STEP where the
    document is long enough; None where that is not much less than all.

    wanted: int64 [N], ascending. cu_seqlens: [n + 1], of the row's documents.
    """
    columns = wanted.tolist()
    edges = cu_seqlens.tolist()
    counts = []
    parts = []
    for start, end in pairwise(edges):
        place = bisect_left(columns, start)
        count = 0
        if place < len(columns) and columns[place] < end:
            count = round_up(end - columns[place], end - start)
        counts.append(count)
        parts.append(torch.arange(end - count, end))
    if not 0 < sum(counts) <= edges[-1] // 2:
        return None
    boundaries = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return Asked(torch.cat(parts), boundaries, max(counts))


# ---- transformers' interface ----
def register() -> str:
    """The name to give as `attn_implementation`."""
    return attention.register(NAME, forward)


def require(model) -> None:
    """ValueError for a model with another attention: it would take no notice of kv_index."""
    name = model.config.get_text_config()._attn_implementation
    if name != NAME:
        raise ValueError(f"rows with shared beginnings need attn_implementation {NAME}, not {name}")


def forward(module, query, key, value, attention_mask, **kwargs):
    """query [1, H, T, d], key and value [1, K, T, d] -> [1, T, H, d], None. With `asked` (an Asked)
    the other columns are 0, or computed as well."""
    kv_index = kwargs.pop("kv_index", None)
    asked = kwargs.pop("asked", None)
    packs = attention.can_pack(module, query, key, attention_mask, **kwargs)
    if kv_index is None and (asked is None or not packs):
        return attention.packed_forward(module, query, key, value, attention_mask, **kwargs)
    if not packs:
        raise ValueError("this model's attention cannot share a beginning between sequences")
    scale = attention.softmax_scale(query, kwargs.get("scaling"))
    query, key, value = (attention.to_autocast(x)[0] for x in (query, key, value))
    if kv_index is not None:
        key = key.index_select(1, kv_index)
        value = value.index_select(1, kv_index)
    keys = (scale, kwargs["cu_seq_lens_k"], kwargs["max_length_k"])
    if asked is None:
        out = _attend(query, key, value, kwargs["cu_seq_lens_q"], kwargs["max_length_q"], *keys)
        return out[None], None
    heads, columns, size = query.shape
    query = query.index_select(1, asked.index)
    found = _attend(query, key, value, asked.cu_seqlens, asked.longest, *keys)
    out = found.new_zeros(columns, heads, size).index_copy(0, asked.index, found)
    return out[None], None


def _attend(
    query, key, value, cu_seqlens_q, max_seqlen_q, scale, cu_seqlens_k, max_seqlen_k
) -> Tensor:
    """query [H, T, d], key and value [K, S, d] -> [T, H, d]."""
    if query.device.type == "cpu":
        return on_cpu(query, key, value, cu_seqlens_q, scale, cu_seqlens_k)
    kernel = attention.varlen_kernel(query)
    if kernel is None:
        return sequence_by_sequence(query, key, value, cu_seqlens_q, scale, cu_seqlens_k)
    return kernel(query, key, value, cu_seqlens_q, max_seqlen_q, scale, cu_seqlens_k, max_seqlen_k)


def sequence_by_sequence(query, key, value, cu_seqlens_q, scale, cu_seqlens_k) -> Tensor:
    """torch's own attention on each document; where no kernel for packed rows runs."""
    edges = pairwise(attention.on_host(cu_seqlens_q).tolist())
    key_edges = pairwise(attention.on_host(cu_seqlens_k).tolist())
    grouped = len(query) != len(key)
    parts = []
    for (start, end), (key_start, key_end) in zip(edges, key_edges, strict=True):
        seen = _causal_at_the_end(end - start, key_end - key_start, query.device)
        q = query[None, :, start:end]
        k = key[None, :, key_start:key_end]
        v = value[None, :, key_start:key_end]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _causal_at_the_end(queries: int, keys: int, device=None) -> Tensor:
    """Bool [queries, keys]: whether a query may look at a key; the queries are the last keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


# ---- on CPUs: blocks of products ----
class Sequence(NamedTuple):
    start: int  # of its queries, columns of the row
    end: int
    key_start: int  # of its keys, places in kv_index
    key_end: int


@torch.compiler.disable  # a product per sequence: traced, each new row would be compiled anew
def on_cpu(query, key, value, cu_seqlens_q, scale, cu_seqlens_k) -> Tensor:
    edges = tuple(cu_seqlens_q.tolist())
    key_edges = tuple(cu_seqlens_k.tolist())
    group = len(query) // len(key)
    blocks = functools.partial(make_blocks, edges, key_edges, group, query.dtype)
    return BlockwiseAttention.apply(query, key, value, blocks, scale)


@functools.lru_cache(maxsize=4)  # all layers of a step ask for the same ones
def make_blocks(
    edges: tuple[int, ...], key_edges: tuple[int, ...], group: int, dtype: torch.dtype
) -> list[Block]:
    """Boundaries of queries and keys -> blocks; short neighbours share one."""
    sequences = [
        Sequence(*of_queries, *of_keys)
        for of_queries, of_keys in zip(pairwise(edges), pairwise(key_edges), strict=True)
    ]
    longest = max(sequence.key_end - sequence.key_start for sequence in sequences)
    bank = causal_mask_bank(group, dtype, bank_width(longest, STEP))
    last = sequences[-1]
    blocks = []
    joined = []
    for sequence in sequences:
        if joined and sequence.key_end - joined[0].key_start > BLOCK:
            blocks.append(_join(joined, last, group, dtype))
            joined = []
        if sequence.key_end - sequence.key_start <= BLOCK:
            joined.append(sequence)
        else:
            blocks += _cut(sequence, last, bank)
    if joined:
        blocks.append(_join(joined, last, group, dtype))
    return [block for block in blocks if block.end > block.start]  # some have keys alone


def _join(sequences: list[Sequence], last: Sequence, group: int, dtype: torch.dtype) -> Block:
    """One block of several short sequences under a small mask; `last` of the row ends what may be
    rounded up."""
    start = sequences[0].start
    end = sequences[-1].end
    key_start = sequences[0].key_start
    key_end = sequences[-1].key_end
    seen = torch.block_diag(
        *(_causal_at_the_end(s.end - s.start, s.key_end - s.key_start) for s in sequences)
    )
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen.bool(), -torch.inf)
    rows = round_up(end - start, last.end - start)
    columns = round_up(key_end - key_start, last.key_end - key_start)
    mask = F.pad(mask, (0, columns - (key_end - key_start)), value=-torch.inf)
    mask = F.pad(mask, (0, 0, 0, rows - (end - start)))
    return Block(start, end, key_start, key_start + columns, mask.repeat(group, 1))


def _cut(sequence: Sequence, last: Sequence, bank: Tensor):
    """Blocks of one long sequence."""
    keys = sequence.key_end - sequence.key_start
    for start in range(sequence.start, sequence.end, BLOCK):
        end = min(sequence.end, start + BLOCK)
        past = keys - (sequence.end - start)  # keys before the block's first query
        rows = round_up(end - start, last.end - start)
        columns = round_up(past + end - start, last.key_end - sequence.key_start)
        mask = mask_window(bank, past, rows, columns)
        yield Block(start, end, sequence.key_start, sequence.key_start + columns, mask)
