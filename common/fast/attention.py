"""Attention over packed rows: several documents in one row, each attending only to itself, without
a dense block mask.

`register()` adds an implementation to transformers' attention interface; models stay stock. It is
used where a row comes with `cu_seq_lens_q` (common.collators.PackedCollator): on accelerators by a
variable-length kernel (torch's varlen_attn, Ascend's fused attention), on CPUs by attention_cpu.
Everything else (padded batches, generation with a cache, sliding windows) goes to transformers'
own sdpa implementation, mask included.

B rows, T tokens, S keys, H query heads, K key/value heads, d size of a head.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from common.fast import attention_cpu

NAME = "packed"
PACKS: set[str] = set()  # implementations that keep the documents of a row apart
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# what some models want of their attention and neither the kernels nor sdpa compute
EXTRAS = {"softcap": "capped attention scores", "s_aux": "attention sinks"}


def register(name: str = NAME, forward: Callable | None = None) -> str:
    """Add an implementation to transformers; pass the returned name as `attn_implementation` to
    from_pretrained.

    forward: packed_forward unless given; a recipe whose rows need another one brings it under a
        name of its own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, forward or packed_forward)
    AttentionMaskInterface.register(name, _mask)
    PACKS.add(name)
    _find_documents_unasked()
    return name


def _find_documents_unasked() -> None:
    """transformers asks the device in every forward whether the positions of a row restart. A
    single row may be taken for a packed one unasked, as transformers itself does where a model is
    traced: a mask, where one is built at all, is the same."""
    from transformers import masking_utils

    stock = masking_utils.find_packed_sequence_indices
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def find(position_ids: Tensor) -> Tensor | None:
        if position_ids.device.type == "cpu" or len(position_ids) > 1:
            return stock(position_ids)
        before_the_first = position_ids[:, :1] - 1
        return (torch.diff(position_ids, prepend=before_the_first) != 1).cumsum(-1)

    masking_utils.find_packed_sequence_indices = find


def refuse_unpackable(model) -> None:
    """SystemExit for a model whose attention this module cannot reach: its packed rows would see
    each other."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    remedy = "use --packing false (where every window is packed, another architecture)"
    kinds = set(getattr(inner.config.get_text_config(), "layer_types", None) or ())
    others = sorted(kinds - ATTENTION_LAYERS)
    if others:
        raise SystemExit(
            f"{type(inner).__name__} has layers that carry a state from token to token "
            f"({', '.join(others)}), and so from one packed row into the next: {remedy}"
        )
    name = inner.config._attn_implementation
    # a model that asks transformers for its attention; others in PACKS bring their own
    asks = name in ALL_ATTENTION_FUNCTIONS
    if name not in PACKS or (asks and not inner._supports_attention_backend):
        raise SystemExit(
            f"{type(inner).__name__} has an attention of its own, which would look from one packed "
            f"row into the next: {remedy}"
        )


# ---- transformers' interface ----
class _LazyMask:
    """The stock mask of a packed row, built only if an attention layer cannot do without it (once
    for all layers)."""

    def __init__(self, build, local_size: int | None):
        """local_size: tokens that a layer's window or chunk has; None: all."""
        self.build = build
        self.local_size = local_size

    @functools.cached_property
    def tensor(self) -> Tensor | None:
        return self.build()


def _mask(**kwargs):
    from transformers.masking_utils import sdpa_mask

    build = functools.partial(sdpa_mask, **kwargs)
    square = kwargs["q_length"] == kwargs["kv_length"] > 1
    unpadded = kwargs.get("attention_mask") is None
    packed = square and unpadded and not kwargs.get("allow_is_causal_skip", True)
    return _LazyMask(build, kwargs.get("local_size")) if packed else build()


def packed_forward(module, query, key, value, attention_mask, **kwargs):
    """query [B, H, T, d], key and value [B, K, S, d] -> [B, T, H, d], None."""
    kernel = None
    if can_pack(module, query, key, attention_mask, **kwargs):
        kernel = varlen_kernel(query)
    if kernel is None:
        return _stock_forward(module, query, key, value, attention_mask, **kwargs)
    scale = softmax_scale(query, kwargs.get("scaling"))
    query, key, value = (to_autocast(x)[0] for x in (query, key, value))
    cu_seqlens = kwargs["cu_seq_lens_q"]
    out = kernel(query, key, value, cu_seqlens, kwargs.get("max_length_q"), scale)
    return out[None], None


def can_pack(
    module,
    query: Tensor,
    key: Tensor,
    attention_mask,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> bool:
    """Whether this is one packed row without a cache, and plain causal attention over it: nothing
    that the kernels do not compute (dropout, caps, a window shorter than the documents)."""
    masked = not (attention_mask is None or isinstance(attention_mask, _LazyMask))
    if cu_seq_lens_q is None or masked or len(query) > 1 or query.shape[2] != key.shape[2]:
        return False
    if dropout or not getattr(module, "is_causal", True):
        return False
    extras = (*EXTRAS, "position_bias", "cache")
    if any(kwargs.get(name) is not None for name in extras):
        return False
    local_size = attention_mask.local_size if attention_mask is not None else None
    windows = [size for size in (sliding_window, local_size) if size is not None]
    return not windows or (max_length_k is not None and max_length_k <= min(windows))


def _stock_forward(module, query, key, value, attention_mask, **kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name, what in EXTRAS.items():
        if kwargs.get(name) is not None:
            raise SystemExit(
                f"{type(module).__name__} has {what}, which the attention here does not compute; "
                "take a model without them"
            )
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    lazy = isinstance(attention_mask, _LazyMask)
    # a cache hides from transformers that the row is packed
    if cu_seqlens is not None and len(cu_seqlens) > 2 and not lazy:
        raise ValueError("a packed row on this path needs use_cache=False and no attention_mask")
    mask = attention_mask.tensor if lazy else attention_mask
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def softmax_scale(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that attention over `x` is computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def to_autocast(x: Tensor) -> Tensor:
    """Custom kernels are not autocast by torch."""
    return x.to(autocast_dtype(x))


# ---- kernels ----
def varlen_kernel(query: Tensor) -> Callable | None:
    """The function that computes a packed row on this device in this dtype; None where only a block
    mask is left.

    It takes (query [H, T, d], key [K, T, d], value [K, T, d], cu_seqlens [documents + 1] int32,
    max_seqlen, scale) and gives [T, H, d]. On accelerators also cu_seqlens_k and max_seqlen_k,
    where keys have boundaries of their own (queries are then the last of their keys), and causal.
    """
    kind = query.device.type
    if kind == "cpu":
        return attention_cpu.packed_attention

    size = query.shape[-1]
    half = autocast_dtype(query) in (torch.bfloat16, torch.float16)
    # the fused kernels want a half dtype
    if not half or size > 256 or size % 8:
        return None
    return _kernel_of(kind)


@functools.cache
def _kernel_of(kind: str) -> Callable | None:
    """Asked in every layer: what the device can do is looked up once."""
    from common import device

    if kind != device.kind():
        return None
    library = device.varlen_attention()
    return {"torch": _torch_varlen, "torch_npu": _npu_varlen, None: None}[library]


def _torch_varlen(
    query,
    key,
    value,
    cu_seqlens_q,
    max_seqlen_q,
    scale,
    cu_seqlens_k=None,
    max_seqlen_k=None,
    causal=True,
):
    query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    if max_seqlen_q is None:
        max_seqlen_q = cu_seqlens_q.diff().max()
    return varlen_attn()(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
        int(max_seqlen_q),
        int(max_seqlen_q if max_seqlen_k is None else max_seqlen_k),
        scale=scale,
        window_size=(-1, 0 if causal else -1),
    )


@functools.cache
def varlen_attn() -> Callable:
    """torch's kernel, which takes fewer key than query heads: by itself until torch 2.11, where it
    is told to in later ones."""
    from torch.nn.attention import varlen

    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        return functools.partial(varlen.varlen_attn, enable_gqa=True)
    return varlen.varlen_attn


def _npu_varlen(
    query,
    key,
    value,
    cu_seqlens_q,
    max_seqlen_q,
    scale,
    cu_seqlens_k=None,
    max_seqlen_k=None,
    causal=True,
):
    """Ascend's fused kernel through transformers; it wants the boundaries on the CPU."""
    from transformers.integrations.npu_flash_attention import npu_flash_attn_varlen_func

    query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    return npu_flash_attn_varlen_func(
        query,
        key,
        value,
        on_host(cu_seqlens_q),
        on_host(cu_seqlens_k),
        softmax_scale=scale,
        causal=causal,
    )


def on_host(cu_seqlens: Tensor) -> Tensor:
    """The boundaries on the CPU. A copy waits for the device; all layers of a step share one, and
    of a batch that brings them (counts.for_model) there is none."""
    if cu_seqlens.device.type == "cpu":
        return cu_seqlens
    if not hasattr(cu_seqlens, "on_host"):
        cu_seqlens.on_host = cu_seqlens.cpu()
    return cu_seqlens.on_host


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy there that does not wait for the device."""
    if device.type == "cpu":
        return values
    there = values.pin_memory().to(device, non_blocking=True)
    there.on_host = values
    return there
