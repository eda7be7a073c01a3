"""InternLM2's names and rows of weights beside those of Llama's blocks, in both directions.

wqkv holds query, key and value rows by key/value group: the queries of the group, its key, its
value; a bias the same way.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

OUTER = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output"}
BLOCK = {  # native module of a block -> InternLM2's
    "self_attn.q_proj": "attention.wqkv",
    "self_attn.k_proj": "attention.wqkv",
    "self_attn.v_proj": "attention.wqkv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
IN_BLOCK = re.compile(r"(model\.layers\.\d+)\.(.+?)(\.weight|\.bias|)$")


def published_name(native: str) -> str:
    """A native parameter or module -> InternLM2's name of it."""
    block = IN_BLOCK.match(native)
    if block:
        place, module, kind = block.groups()
        return f"{place}.{BLOCK[module]}{kind}"
    module, dot, kind = native.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}{dot}{kind}"
    return OUTER.get(native, native)


def native_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Native parameters (or modules) -> {InternLM2's name: its native ones}: three for wqkv, in the
    order q, k, v."""
    found = {}
    for name in names:
        found.setdefault(published_name(name), []).append(name)
    return found


def split_wqkv(tensor: Tensor, heads: int, groups: int) -> list[Tensor]:
    """[(heads + 2 groups) D, ...] by groups -> q [heads D, ...], k and v [groups D, ...], each with
    memory of its own."""
    size = len(tensor) // (heads + 2 * groups)
    queries = heads // groups
    rows = tensor.view(groups, queries + 2, size, *tensor.shape[1:])
    parts = (rows[:, :queries], rows[:, queries : queries + 1], rows[:, queries + 1 :])
    return [part.clone(memory_format=torch.contiguous_format).flatten(0, 2) for part in parts]


def join_wqkv(query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """What split_wqkv takes apart; of gradients too."""
    rows = [part.view(groups, len(part) // groups, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(rows, 1).flatten(0, 1)
