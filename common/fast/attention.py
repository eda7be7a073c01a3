"""Attention over packed rows: several documents in one row, each attending only to itself, no dense
block mask.

`register()` adds an implementation to transformers' attention interface; models stay stock. It is
used where a row comes with `cu_seq_lens_q` (common.collators.PackedCollator); everything else
(padded batches, generation with a cache, sliding windows) goes to transformers' own sdpa
implementation, mask included.

On CPU torch's fused attention is slow in backward and for short documents, so documents up to LONG
tokens are computed with explicit matrix products: heads that share a key/value head are folded into
the rows, queries go in blocks that skip the keys of the future, and backward computes the
probabilities again instead of keeping them for every layer.

Sequences may share a beginning that stands in the row once: `key_columns` names the columns of the
keys of each sequence, one after another, with boundaries `cu_seq_lens_k`; its queries are the last
of them (`cu_seq_lens_q`).
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "packed"
PACKS = {NAME}  # implementations that keep packed rows apart; a recipe that brings its own adds it
BLOCK = (
    128  # query rows of one product; documents are joined up to this length under one small mask
)
# sizes of products are multiples of it: oneDNN compiles a kernel for every new shape in half
# precision
STEP = 32
LONG = {
    torch.bfloat16: 768,
    torch.float16: 768,
    torch.float32: 640,
}  # from here torch's fused attention is faster


class _LazyMask:
    """The stock mask of a packed row, built only if an attention layer cannot do without it (once
    for all layers)."""

    def __init__(self, build):
        self.build = build

    @functools.cached_property
    def tensor(self) -> Tensor | None:
        return self.build()


def _mask(**kwargs):
    from transformers.masking_utils import sdpa_mask

    build = functools.partial(sdpa_mask, **kwargs)
    square = kwargs["q_length"] == kwargs["kv_length"] > 1
    packed = (
        square
        and kwargs.get("attention_mask") is None
        and not kwargs.get("allow_is_causal_skip", True)
    )
    return _LazyMask(build) if packed else build()


def _attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    **kwargs,
):
    """query [B, H, T, d], key and value [B, K, S, d] -> [B, T, H, d], None (the interface of
    transformers)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lazy, starts = isinstance(attention_mask, _LazyMask), kwargs.get("cu_seq_lens_q")
    packed = (
        starts is not None
        and (attention_mask is None or lazy)
        and query.shape[:1] + query.shape[2:3] == (1, key.shape[2])
    )
    plain = (
        not dropout
        and getattr(module, "is_causal", True)
        and not any(
            kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache")
        )
    )
    longest, columns, far = (
        kwargs.get("max_length_q"),
        kwargs.get("key_columns"),
        kwargs.get("max_length_k"),
    )
    near = sliding_window is None or (far is not None and far <= sliding_window)
    compute = compute_packed(query) if packed and plain and near else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if columns is not None:
        if not (packed and plain and near):
            raise ValueError("this model's attention cannot share a beginning between sequences")
        query, key, value = (_autocast(x)[0] for x in (query, key, value))
        key, value = key.index_select(1, columns), value.index_select(1, columns)
        key_starts, compute = kwargs["cu_seq_lens_k"], compute or _sequence_by_sequence
        return compute(
            query, key, value, starts, longest, scale, key_starts=key_starts, longest_key=far
        )[None], None
    if compute is None:
        if (
            starts is not None and len(starts) > 2 and not lazy
        ):  # a cache hides from transformers that the row is packed
            raise ValueError(
                "a packed row on this path needs use_cache=False and no attention_mask"
            )
        mask = attention_mask.tensor if lazy else attention_mask
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    query, key, value = (_autocast(x)[0] for x in (query, key, value))
    return compute(query, key, value, starts, longest, scale)[None], None


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@functools.cache
def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slope of each head, fp32 [heads]: 2^(-8i/n), filled up from 2n where `heads` is no
    power of two n."""
    n = 2 ** (heads.bit_length() - 1)
    more = [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]
    return torch.tensor([2 ** (-8 * i / n) for i in range(1, n + 1)] + more)


def alibi_attention(query, key, value, starts, longest, scale, slopes):
    """Packed causal attention with ALiBi (Press et al. 2021): head h adds -slopes[h] * distance to
    its scores.

    query, key, value [H, T, d]; starts [documents + 1]; longest: tokens of the longest document;
    slopes [H]. Returns [T, H, d].
    """
    query, key, value = (_autocast(x) for x in (query, key, value))
    if query.device.type == "cpu":
        return _on_cpu(query, key, value, starts, longest, scale, tuple(slopes.tolist()))
    compute = compute_packed(query) if query.shape[-1] <= 248 else None  # 8 columns come to it
    if compute is None:
        return _document_by_document(query, key, value, starts, scale, slopes)
    size = query.shape[-1]
    query, key = _alibi_columns(query, key, starts, scale, slopes)
    value = F.pad(value, (0, query.shape[-1] - size))  # the kernels want one size
    return compute(query, key, value, starts, longest, scale)[..., :size]


def _alibi_columns(
    query: Tensor, key: Tensor, starts: Tensor, scale: float, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """query and key [H, T, d] with 8 more columns whose product is slope * position / scale.

    A softmax does not see what all keys share, so slope * position of the key is the same as -slope
    * distance, and a plain fused kernel (which sums in fp32) computes ALiBi. The factors are split
    so that half precision holds them:
    the position into multiples of 256 and a rest, the slope into three parts.
    """
    tokens = torch.arange(query.shape[1], device=query.device)
    first = starts.long()[torch.bucketize(tokens, starts[1:].long(), right=True)]
    position = (tokens - first).float()
    high = (position / 256).floor()
    parts, rest = [], slopes.float() / scale
    for _ in range(3):
        parts.append(rest.to(query.dtype))
        rest = rest - parts[-1].float()
    slopes = torch.stack(parts, -1)  # [H, 3]
    zeros = slopes.new_zeros(len(slopes), 2)
    columns = torch.cat([slopes * 256, slopes, zeros], -1)[:, None].expand(-1, query.shape[1], -1)
    split = torch.stack([high] * 3 + [position - 256 * high] * 3 + [0 * high] * 2, -1).to(key.dtype)
    return torch.cat([query, columns], -1), torch.cat([key, split.expand(len(key), -1, -1)], -1)


def _document_by_document(query, key, value, starts, scale, slopes):
    """torch's own attention on each document with its bias; where no kernel for packed rows
    runs."""
    edges, parts = _on_host(starts).tolist(), []
    for a, b in zip(edges, edges[1:], strict=False):
        place = torch.arange(b - a, device=query.device)
        distance = place[None, :] - place[:, None]
        bias = (
            (slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf).to(query.dtype)
        )
        q, k, v = (x[None, :, a:b] for x in (query, key, value))
        parts.append(
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=scale)[0].transpose(
                0, 1
            )
        )
    return torch.cat(parts)


def _sequence_by_sequence(query, key, value, starts, longest, scale, key_starts, longest_key=None):
    """torch's own attention on each sequence, whose queries are the last of its keys; where no
    kernel above runs."""
    edges, key_edges, parts = _on_host(starts).tolist(), _on_host(key_starts).tolist(), []
    for (a, b), (c, d) in zip(pairwise(edges), pairwise(key_edges), strict=True):
        seen = torch.ones(b - a, d - c, dtype=torch.bool, device=query.device).tril_(d - c - b + a)
        q, k, v = query[None, :, a:b], key[None, :, c:d], value[None, :, c:d]
        grouped = len(query) != len(key)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
        parts.append(o[0].transpose(0, 1))
    return torch.cat(parts)


def compute_packed(query: Tensor):
    """The function that computes a packed row on this device in this dtype; None where only a block
    mask is left."""
    if query.device.type == "cpu":
        return _on_cpu
    from common import device

    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    # the fused kernels want a half dtype
    fits = (
        dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
    )
    library = device.varlen_attention() if fits and kind == device.kind() else None
    return {"torch": _torch_varlen, "torch_npu": _npu_varlen, None: None}[library]


def _npu_varlen(
    query, key, value, starts, longest, scale, key_starts=None, longest_key=None, causal=True
):
    """Ascend's fused kernel through transformers. query [H, T, d], key and value [K, S, d] -> [T,
    H, d].

    key_starts: boundaries of the keys where they are not those of the queries; causal is then
        aligned at the ends.
    """
    from transformers.integrations.npu_flash_attention import npu_flash_attn_varlen_func

    query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    starts, key_starts = _on_host(starts), _on_host(starts if key_starts is None else key_starts)
    return npu_flash_attn_varlen_func(
        query, key, value, starts, key_starts, softmax_scale=scale, causal=causal
    )


_copied: list[tuple[Tensor, Tensor]] = []


def _on_host(starts: Tensor) -> Tensor:
    """The boundaries on the CPU: copied, which waits for the device, once for all layers of a
    step."""
    for original, copy in _copied:
        if original is starts:
            return copy
    _copied.append((starts, starts.cpu()))
    del _copied[:-4]
    return _copied[-1][1]


def _torch_varlen(
    query, key, value, starts, longest, scale, key_starts=None, longest_key=None, causal=True
):
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    longest = int(starts.diff().max()) if longest is None else int(longest)
    longest_key = longest if longest_key is None else int(longest_key)
    return varlen_attn(
        query,
        key,
        value,
        starts,
        starts if key_starts is None else key_starts,
        longest,
        longest_key,
        scale=scale,
        window_size=(-1, 0 if causal else -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )


@torch.compiler.disable  # a product per document: traced, each new row would be compiled anew
def _on_cpu(
    query, key, value, starts, longest, scale, slopes=(), key_starts=None, longest_key=None
):
    """query [H, T, d], key and value [K, T, d], starts [n + 1] -> [T, H, d]; slopes of ALiBi per
    head (then H = K).

    key_starts: boundaries of the keys where they are not those of the queries; queries are then the
        last of their keys.
    """
    if key_starts is not None:
        edges = tuple(starts.tolist()), tuple(key_starts.tolist())
        blocks = functools.partial(
            iter, _shared_blocks(*edges, len(query) // len(key), query.dtype)
        )
        return Products.apply(query, key, value, blocks, scale)
    runs = _plan(tuple(starts.tolist()), len(query) // len(key), query.dtype, slopes)
    sizes = [size for size, _ in runs]
    parts = []
    for q, k, v, (_, documents) in zip(
        *(x.split(sizes, 1) for x in (query, key, value)), runs, strict=True
    ):
        if documents is None:
            gqa = len(q) != len(k)
            o = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=gqa
            )
            parts.append(o[0].transpose(0, 1))
        else:
            blocks = functools.partial(
                _blocks, documents, len(q) // len(k), q.dtype, slopes, q.shape[1]
            )
            parts.append(Products.apply(q, k, v, blocks, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.lru_cache(maxsize=4)  # all layers of a step ask for the same one
def _plan(
    starts: tuple[int, ...], group: int, dtype: torch.dtype, slopes=()
) -> list[tuple[int, list | None]]:
    """Document boundaries -> runs (tokens, None) of one long document or (tokens, [(start, length,
    bias), ...]).

    Neighbouring documents are joined while they fit into one block of queries: one product instead
    of many tiny ones. torch's fused attention knows no ALiBi, so with slopes no document is a long
    one.
    """
    long, runs = float("inf") if slopes else LONG.get(dtype, LONG[torch.float32]), []
    for length in (b - a for a, b in zip(starts, starts[1:], strict=False) if b > a):
        if length >= long:
            runs.append((length, None))
            continue
        if not runs or runs[-1][1] is None:
            runs.append((0, []))
        size, documents = runs[-1]
        if documents and sum(documents[-1][1]) + length <= BLOCK:
            documents[-1][1].append(length)
        else:
            documents.append((size, [length]))
        runs[-1] = (size + length, documents)
    bias = lambda lengths: _joined(lengths, group, dtype, slopes) if len(lengths) > 1 else None  # noqa: E731
    return [
        (size, docs and [(start, sum(lengths), bias(lengths)) for start, lengths in docs])
        for size, docs in runs
    ]


def _joined(lengths: list[int], group: int, dtype: torch.dtype, slopes: tuple = ()) -> Tensor:
    """[group * sum, sum] ([H, sum, sum] with slopes): 0, or ALiBi's bias, where a token may look,
    -inf elsewhere."""
    owner = torch.repeat_interleave(torch.tensor(lengths))
    allowed = (owner[:, None] == owner).tril_()
    if slopes:
        place = torch.arange(len(owner))
        return _biased(place[None, :] - place[:, None], allowed, slopes, dtype)
    return (
        torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf).repeat(group, 1)
    )


def _biased(distance: Tensor, allowed: Tensor, slopes: tuple, dtype: torch.dtype) -> Tensor:
    """distance, allowed [q, k] -> [H, q, k]: slope * distance (key minus query) where allowed, else
    -inf."""
    bias = torch.tensor(slopes)[:, None, None] * distance
    return bias.masked_fill_(~allowed, -torch.inf).to(dtype)


@functools.lru_cache(maxsize=4)
def staircase(
    group: int, dtype: torch.dtype, slopes: tuple = (), width: int = max(LONG.values()) + BLOCK
) -> Tensor:
    """[group, BLOCK, width] ([H, BLOCK, width] with slopes): query i of a block may look at columns
    up to width - BLOCK + i."""
    if slopes:
        distance = torch.arange(width)[None, :] - (width - BLOCK) - torch.arange(BLOCK)[:, None]
        return _biased(distance, distance <= 0, slopes, dtype)
    return (
        torch.full((BLOCK, width), -torch.inf, dtype=dtype)
        .triu_(width - BLOCK + 1)
        .repeat(group, 1, 1)
    )


def _blocks(documents: list, group: int, dtype: torch.dtype, slopes: tuple, total: int):
    """Yields what Products takes: start and end of a block of queries, of its keys, and its
    bias."""
    longest = max(length for _, length, _ in documents)
    stairs = (
        staircase(group, dtype, slopes, -(-longest // 1024) * 1024 + BLOCK)
        if slopes
        else staircase(group, dtype)
    )
    for start, length, bias in documents:
        for a in range(0, length, BLOCK):
            b = min(length, a + BLOCK)
            left, end = stairs.shape[2] - BLOCK - a, start + b
            if bias is not None:
                block = bias
            elif slopes:
                block = stairs[:, : b - a, left : left + b]
            else:
                rows, end = _round_up(b - a, total - start - a), start + _round_up(b, total - start)
                block = _window(stairs, rows, left, end - start)
            yield start + a, start + b, start, end, block


def _round_up(size: int, most: int) -> int:
    """The next multiple of STEP, but not above `most`."""
    return min(-(-size // STEP) * STEP, most)


@functools.lru_cache(maxsize=4)  # all layers of a step ask for the same ones
def _shared_blocks(edges: tuple, key_edges: tuple, group: int, dtype: torch.dtype) -> list[tuple]:
    """What Products takes for sequences whose queries are the last of their keys; short neighbours
    share a block."""
    sequences, blocks, joined = list(zip(pairwise(edges), pairwise(key_edges), strict=True)), [], []
    longest, queries, keys = max(d - c for _, (c, d) in sequences), edges[-1], key_edges[-1]
    stairs = staircase(group, dtype, (), -(-longest // 1024) * 1024 + BLOCK + STEP)

    def flush():
        if joined:
            (a, _), (c, _) = joined[0]
            (_, b), (_, d) = joined[-1]
            seen = [
                torch.ones(y - x, w - v, dtype=torch.bool).tril_(w - v - y + x)
                for (x, y), (v, w) in joined
            ]
            bias = torch.zeros(b - a, d - c, dtype=dtype).masked_fill_(
                ~torch.block_diag(*seen).bool(), -torch.inf
            )
            rows, columns = _round_up(b - a, queries - a), _round_up(d - c, keys - c)
            bias = F.pad(bias, (0, columns - (d - c)), value=-torch.inf)
            bias = F.pad(bias, (0, 0, 0, rows - (b - a)))
            blocks.append((a, b, c, c + columns, bias.repeat(group, 1)))
            joined.clear()

    for (a, b), (c, d) in sequences:
        if d - c <= BLOCK:
            if joined and d - joined[0][1][0] > BLOCK:
                flush()
            joined.append(((a, b), (c, d)))
            continue
        flush()
        for x in range(a, b, BLOCK):
            y = min(b, x + BLOCK)
            past = d - c - (b - x)  # keys before the block's first query
            rows, columns = _round_up(y - x, queries - x), _round_up(past + y - x, keys - c)
            left = stairs.shape[2] - BLOCK - past
            bias = _window(stairs, rows, left, columns)
            blocks.append((x, y, c, c + columns, bias))
    flush()
    return blocks


def _window(stairs: Tensor, rows: int, left: int, columns: int) -> Tensor:
    """[group * rows, columns] of a staircase from column `left`; -inf where it ends."""
    found = stairs[:, :rows, left : left + columns]
    return F.pad(found, (0, columns - found.shape[2]), value=-torch.inf).reshape(-1, columns)


class Products(torch.autograd.Function):
    """Attention in blocks of queries: query [H, T, d], key and value [K, S, d] -> [T, H, d]. The
    backward computes the probabilities again instead of keeping them.

    blocks: callable that yields (start, end) of the queries, (first, last) of their keys, and the
    bias, as one tuple of five: [H / K * queries, keys] for all heads, [H, queries, keys], or None
    where every key is seen. Every query once. A bias for all heads may have more rows than there
    are queries: as many are computed, and left out.
    """

    @staticmethod
    def _rows(query, bias, a, b):
        """Query rows of the product: those of the bias."""
        return b - a if bias is None or bias.dim() == 3 else len(bias) // query.shape[1]

    @staticmethod
    def _probs(query, key, bias, scale):
        query, key = query.flatten(1, 2), key.transpose(1, 2)
        scores = (
            torch.bmm(query, key).mul_(scale)
            if bias is None
            else torch.baddbmm(bias, query, key, alpha=scale)
        )
        return torch.softmax(scores, -1)  # fp32 inside

    @staticmethod
    def forward(ctx, query, key, value, blocks, scale):
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        (heads, tokens, size), groups = query.shape, len(key)
        query = query.view(groups, heads // groups, tokens, size)
        out = torch.empty(tokens, heads, size, dtype=query.dtype)
        folded = out.view(tokens, groups, -1, size).permute(1, 2, 0, 3)
        with torch.autocast("cpu", enabled=False):
            for a, b, first, last, bias in blocks():
                rows = Products._rows(query, bias, a, b)
                probs = Products._probs(query[:, :, a : a + rows], key[:, first:last], bias, scale)
                heads_out = torch.bmm(probs, value[:, first:last]).view(groups, -1, rows, size)
                folded[:, :, a:b] = heads_out[:, :, : b - a]
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        (heads, tokens, size), groups, scale = query.shape, len(key), ctx.scale
        query = query.view(groups, heads // groups, tokens, size)
        grad = grad.to(query.dtype).view(tokens, groups, -1, size).permute(1, 2, 0, 3)
        # laid out like the projections that they flow back into
        d_query = (
            torch.empty(tokens, heads, size, dtype=query.dtype)
            .view(tokens, groups, -1, size)
            .permute(1, 2, 0, 3)
        )
        d_key, d_value = (
            torch.zeros(key.shape[1], groups, size).transpose(0, 1) for _ in range(2)
        )  # fp32: blocks are summed
        with torch.autocast("cpu", enabled=False):
            for a, b, first, last, bias in ctx.blocks():
                rows = Products._rows(query, bias, a, b)
                q, g = query[:, :, a : a + rows], grad[:, :, a : a + rows]
                if rows > b - a:
                    g = g.clone()
                    g[:, :, b - a :] = 0
                k, v = key[:, first:last], value[:, first:last]
                probs = Products._probs(q, k, bias, scale)
                q, g = q.flatten(1, 2), g.flatten(1, 2)
                d_value[:, first:last] += torch.bmm(probs.transpose(1, 2), g)
                d_probs = torch.bmm(g, v.transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype).mul_(scale)
                d_query[:, :, a:b] = torch.bmm(d_scores, k).view(groups, -1, rows, size)[
                    :, :, : b - a
                ]
                d_key[:, first:last] += torch.bmm(d_scores.transpose(1, 2), q)
        return (
            d_query.reshape(heads, tokens, size),
            d_key.to(key.dtype),
            d_value.to(value.dtype),
            None,
            None,
        )


def register() -> str:
    """Add the implementation to transformers; pass the returned name as `attn_implementation` to
    from_pretrained."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def refuse_unpackable(model) -> None:
    """SystemExit for a model whose attention this module cannot reach: its packed rows would see
    each other."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = inner.config._attn_implementation
    if name not in PACKS or (name == NAME and not inner._supports_attention_backend):
        raise SystemExit(
            f"{type(inner).__name__} has an attention of its own, which would look from one packed row into the next: "
            "use --packing false (where every window is packed, another architecture)"
        )
