"""Attention over packed rows of a prefix language model: each document sees itself alone, its
prefix from everywhere.

In a document the prefix is two-sided and the rest is causal. That is two calls of a plain
variable-length kernel, without any mask: the prefix among itself, and the rest, causal, over the
whole document. On a CPU the same is done in blocks of queries with explicit products
(common/fast/attention_cpu.py), on a device without such a kernel with one dense mask.

T tokens of a row, n documents, H heads, d size of a head.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.fast import attention, attention_cpu
from common.fast.attention_cpu import BLOCK, Block, BlockwiseAttention


class Document(NamedTuple):
    """In plain numbers: its first column, the tokens of its prefix, and all its tokens."""

    start: int
    prefix: int
    length: int


class Columns(NamedTuple):
    """Some columns of every document of a row, one document after the other."""

    index: Tensor  # [columns]
    cu_seqlens: Tensor  # [n + 1] int32, the documents' boundaries within `index`
    max_seqlen: int


class Documents:
    """Boundaries and prefixes of one packed row; what all layers need of them is computed once."""

    def __init__(self, cu_seqlens: Tensor, prefix: Tensor):
        """cu_seqlens: [n + 1] first column of each document and the end; prefix: [n] columns where
        prefixes end."""
        self.cu_seqlens = cu_seqlens.to(torch.int32)
        self.prefix = prefix

    @functools.cached_property
    def plain(self) -> tuple[Document, ...]:
        prefix_ends = attention.on_host(self.prefix).tolist()
        edges = pairwise(attention.on_host(self.cu_seqlens).tolist())
        return tuple(
            Document(start, prefix_end - start, end - start)
            for (start, end), prefix_end in zip(edges, prefix_ends, strict=True)
            if end > start
        )

    @functools.cached_property
    def max_seqlen(self) -> int:
        return max(document.length for document in self.plain)

    @functools.cached_property
    def prefixes(self) -> Columns:
        return self._columns(
            [torch.arange(start, start + prefix) for start, prefix, _ in self.plain]
        )

    @functools.cached_property
    def rests(self) -> Columns:
        return self._columns(
            [torch.arange(start + prefix, start + length) for start, prefix, length in self.plain]
        )

    def _columns(self, parts: list[Tensor]) -> Columns:
        device = self.cu_seqlens.device
        lengths = [len(part) for part in parts]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        index = attention.to_device(torch.cat(parts), device)
        return Columns(index, attention.to_device(cu_seqlens, device), max(lengths))

    @functools.cached_property
    def mask(self) -> Tensor:
        """Bool [T, T], True where a column may be seen."""
        column = torch.arange(int(self.cu_seqlens[-1]), device=self.cu_seqlens.device)
        owner = torch.bucketize(column, self.cu_seqlens[1:].to(column), right=True)
        seen = (column <= column[:, None]) | (column < self.prefix[owner])
        return seen & (owner == owner[:, None])


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """query, key, value [H, T, d] -> [T, H, d]."""
    if query.device.type != "cpu":
        return _elsewhere(query, key, value, documents, attention.varlen_kernel(query))
    blocks = functools.partial(_blocks, documents.plain, query.dtype)
    return BlockwiseAttention.apply(query, key, value, blocks, query.shape[-1] ** -0.5)


def _elsewhere(query, key, value, documents: Documents, kernel) -> Tensor:
    """As prefix_attention, by a kernel of attention.varlen_kernel, or one mask where there is
    none."""
    if kernel is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=documents.mask)
        return out.transpose(0, 1)
    scale = query.shape[-1] ** -0.5
    prefixes = documents.prefixes
    rests = documents.rests
    of_prefixes = kernel(
        *(x[:, prefixes.index] for x in (query, key, value)),
        prefixes.cu_seqlens,
        prefixes.max_seqlen,
        scale,
        causal=False,
    )
    of_rests = kernel(
        query[:, rests.index],
        key,
        value,
        rests.cu_seqlens,
        rests.max_seqlen,
        scale,
        cu_seqlens_k=documents.cu_seqlens,
        max_seqlen_k=documents.max_seqlen,
    )
    out = torch.empty_like(query.transpose(0, 1))
    return out.index_copy(0, prefixes.index, of_prefixes).index_copy(0, rests.index, of_rests)


@functools.lru_cache(maxsize=4)  # all layers of a step ask for the same ones
def _blocks(documents: tuple[Document, ...], dtype: torch.dtype) -> list[Block]:
    """Short neighbours that fit into one block of queries share it."""
    blocks = []
    joined = []
    for document in documents:
        if joined and sum(each.length for each in joined) + document.length > BLOCK:
            blocks.append(_joined(joined, dtype))
            joined = []
        if document.length <= BLOCK:
            joined.append(document)
        else:
            blocks += _long(document, dtype)
    if joined:
        blocks.append(_joined(joined, dtype))
    return blocks


def _joined(documents: list[Document], dtype: torch.dtype) -> Block:
    """One block of several short documents under a small mask."""
    first = documents[0].start
    last = documents[-1].start + documents[-1].length
    edges = torch.tensor([*(document.start for document in documents), last])
    prefixes = torch.tensor([document.start + document.prefix for document in documents])
    seen = Documents(edges - first, prefixes - first).mask
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return Block(first, last, first, last, bias)


def _long(document: Document, dtype: torch.dtype):
    """Blocks of one document: of the prefix without a mask, of the rest under a causal one."""
    start, prefix, length = document
    for a in range(0, prefix, BLOCK):
        b = min(prefix, a + BLOCK)
        yield Block(start + a, start + b, start, start + prefix, None)
    bank = attention_cpu.causal_mask_bank(1, dtype, attention_cpu.bank_width(length))
    for a in range(prefix, length, BLOCK):
        b = min(length, a + BLOCK)
        mask = attention_cpu.mask_window(bank, a, b - a, b)
        yield Block(start + a, start + b, start, start + b, mask)
