"""Attention over packed rows of a prefix language model: each document sees itself alone, its
prefix from everywhere.

In a document the prefix is two-sided and the rest is causal. That is two calls of a plain
variable-length kernel, without any mask: the prefix among itself, and the rest, causal, over the
whole document. On a CPU the same is done in blocks of queries with explicit products
(common/fast/attention.py), on a device without such a kernel with one dense mask.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from common.fast import attention

BLOCK = attention.BLOCK


class Documents:
    """Boundaries and prefixes of one packed row; what all layers need of them is computed once."""

    def __init__(self, starts: Tensor, prefix: Tensor):
        """starts: [n + 1] first column of each document and the end; prefix: [n] columns where
        prefixes end."""
        self.starts, self.prefix = starts, prefix

    @functools.cached_property
    def key(self) -> tuple:
        """((start, length of the prefix, length), ...) as plain numbers."""
        edges, ends = self.starts.tolist(), self.prefix.tolist()
        return tuple(
            (a, end - a, b - a) for a, b, end in zip(edges, edges[1:], ends, strict=False) if b > a
        )

    @functools.cached_property
    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int, int]]:
        """Columns of all prefixes and of all the rest, the boundaries of both within their own, the
        longest of each."""
        device = self.starts.device
        inside = [torch.arange(a, a + prefix) for a, prefix, _ in self.key]
        rest = [torch.arange(a + prefix, a + length) for a, prefix, length in self.key]
        edges = [
            torch.tensor([0, *map(len, parts)]).cumsum(0).to(torch.int32)
            for parts in (inside, rest)
        ]
        longest = tuple(
            max(sizes)
            for sizes in (map(len, inside), map(len, rest), (length for *_, length in self.key))
        )
        return (
            *(torch.cat(x).to(device) for x in (inside, rest)),
            *(x.to(device) for x in edges),
            longest,
        )

    @functools.cached_property
    def mask(self) -> Tensor:
        """Bool [T, T], True where a column may be seen."""
        column = torch.arange(int(self.starts[-1]), device=self.starts.device)
        owner = torch.bucketize(column, self.starts[1:].to(column), right=True)
        seen = (column <= column[:, None]) | (column < self.prefix[owner])
        return seen & (owner == owner[:, None])


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """query, key, value [H, T, d] -> [T, H, d]."""
    if query.device.type == "cpu":
        blocks = functools.partial(iter, _blocks(documents.key, query.dtype))
        return attention.Products.apply(query, key, value, blocks, query.shape[-1] ** -0.5)
    return _elsewhere(query, key, value, documents, attention.compute_packed(query))


def _elsewhere(query, key, value, documents: Documents, kernel) -> Tensor:
    """As prefix_attention, by a variable-length kernel (attention.compute_packed), or one mask
    where there is none."""
    if kernel is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=documents.mask
        ).transpose(0, 1)
    scale = query.shape[-1] ** -0.5
    inside, rest, inside_starts, rest_starts, (longest_prefix, longest_rest, longest) = (
        documents.split
    )
    q, k, v = (x[:, inside] for x in (query, key, value))
    first = kernel(q, k, v, inside_starts, longest_prefix, scale, causal=False)
    starts = documents.starts.to(torch.int32)
    second = kernel(query[:, rest], key, value, rest_starts, longest_rest, scale, starts, longest)
    out = torch.empty_like(query.transpose(0, 1))
    return out.index_copy(0, inside, first).index_copy(0, rest, second)


@functools.lru_cache(maxsize=4)  # all layers of a step ask for the same ones
def _blocks(documents: tuple, dtype: torch.dtype) -> list[tuple]:
    """Documents -> what attention.Products takes; short neighbours that fit into one block of
    queries share it."""
    blocks, joined = [], []
    for document in documents:
        length = document[2]
        if joined and sum(size for *_, size in joined) + length > BLOCK:
            blocks.append(_joined(joined, dtype))
            joined = []
        if length <= BLOCK:
            joined.append(document)
        else:
            blocks += _long(*document, dtype)
    return blocks + ([_joined(joined, dtype)] if joined else [])


def _joined(documents: list[tuple], dtype: torch.dtype) -> tuple:
    """One block of several short documents under a small mask."""
    edges = torch.tensor([start for start, *_ in documents] + [sum(documents[-1][::2])])
    seen = Documents(
        edges - edges[0],
        torch.tensor([start + prefix for start, prefix, _ in documents]) - edges[0],
    ).mask
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return int(edges[0]), int(edges[-1]), int(edges[0]), int(edges[-1]), bias


def _long(start: int, prefix: int, length: int, dtype: torch.dtype):
    """Blocks of one document: of the prefix without a mask, of the rest under a staircase."""
    for a in range(0, prefix, BLOCK):
        yield start + a, start + min(prefix, a + BLOCK), start, start + prefix, None
    stairs = attention.staircase(1, dtype, (), -(-length // 1024) * 1024 + BLOCK)[0]
    for a in range(prefix, length, BLOCK):
        b = min(length, a + BLOCK)
        left = stairs.shape[1] - BLOCK - a
        yield start + a, start + b, start, start + b, stairs[: b - a, left : left + b]
