"""Baichuan2 as a thin Llama: ALiBi instead of rotation (13B), and the head whose rows are
normalised (NormHead).

Importing this module tells the Auto classes about it. convert.py makes its checkpoints; a
Baichuan2-7B whose head stays frozen needs none of this and becomes a plain LlamaForCausalLM.

ALiBi (Press et al. 2021, "Train short, test long") is computed from the distance itself: slope *
position in bfloat16, as the original adds it, cannot tell neighbours apart from position 256 on.
Packed rows (`cu_seq_lens_q`) are computed document by document. With ALiBi the attention is always
this module's own, whatever attn_implementation says.

B rows, T tokens, S keys, H heads, d size of a head, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
)
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate, sdpa_mask
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

from common.fast.alibi import alibi_attention, alibi_slopes
from common.fast.attention import PACKS

NAME = "baichuan_alibi"


class BaichuanConfig(LlamaConfig):
    """Fields of Llama and two more; the defaults are those of Baichuan2-13B.

    alibi: a bias by distance instead of rotated positions; norm_head: logits are h . w / |w|.
    """

    model_type = "baichuan"
    base_model_tp_plan = None  # each rank would need the slopes of its own heads

    vocab_size: int = 125696
    hidden_size: int = 5120
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0
    alibi: bool = True
    norm_head: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.alibi and (
            self.attention_dropout or self.num_key_value_heads != self.num_attention_heads
        ):
            raise ValueError(
                "ALiBi goes with attention_dropout 0 and as many key/value heads as query heads"
            )
        if self.norm_head and self.tie_word_embeddings:
            raise ValueError("a normalised head cannot share its weight with the embedding")


class AlibiMask:
    """Takes the mask's place on its way through the layers; the bias is built once, when the first
    layer needs it."""

    def __init__(self, **arguments):
        self.arguments = arguments  # of transformers' mask functions
        self.built: dict[tuple, Tensor] = {}

    def bias(self, slopes: Tensor, like: Tensor) -> Tensor:
        """[B or 1, H, T, S] in the dtype of `like`: slope * (key - query), its lowest value where
        none may look."""
        key = (like.dtype, like.device)
        if key not in self.built:
            self.built[key] = self._build(slopes, like)
        return self.built[key]

    def _build(self, slopes: Tensor, like: Tensor) -> Tensor:
        # never skipped: "causal" means two things where a static cache is longer than the queries
        arguments = self.arguments | {"allow_is_causal_skip": False}
        seen = sdpa_mask(**arguments).to(like.device)
        query = torch.arange(arguments["q_length"], device=like.device) + arguments["q_offset"]
        key = torch.arange(arguments["kv_length"], device=like.device) + arguments["kv_offset"]
        bias = (slopes[:, None, None] * (key[None, :] - query[:, None])).to(like.dtype)
        return bias.masked_fill(~seen, torch.finfo(like.dtype).min)


class AlibiAttention(LlamaAttention):
    """LlamaAttention with the same parameters: no rotation, a bias by distance. hidden [B, T, D] ->
    [B, T, D], None."""

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        cu_seq_lens_q=None,
        max_length_q=None,
        **kwargs,
    ):
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if not isinstance(attention_mask, AlibiMask):
            raise ValueError("ALiBi takes a 2-D attention_mask, 0 on padding")
        slopes = alibi_slopes(self.config.num_attention_heads, query.device)
        if cu_seq_lens_q is None:
            bias = attention_mask.bias(slopes, query)
            heads = F.scaled_dot_product_attention(
                query, key, value, attn_mask=bias, scale=self.scaling
            )
            return self.o_proj(heads.transpose(1, 2).flatten(2)), None

        padded = attention_mask.arguments.get("attention_mask") is not None
        if len(query) > 1 or query.shape != key.shape or padded:
            raise ValueError(
                "a packed row is one row, without attention_mask and without a filled cache"
            )
        if max_length_q is None:
            max_length_q = cu_seq_lens_q.diff().max()
        row = alibi_attention(
            query[0], key[0], value[0], cu_seq_lens_q, int(max_length_q), self.scaling, slopes
        )
        return self.o_proj(row[None].flatten(2)), None


class NoRotation(nn.Module):
    def forward(self, hidden_states, position_ids):
        return None


class NormHead(nn.Module):
    """hidden [..., D] -> logits [..., V]: h . w / |w| with the raw rows w, in training and in
    evaluation.

    The weight is never written, which ZeRO-3's partitioned parameters would not survive. The
    lengths are fp32 and divide the logits, not the rows: that costs one number per row instead of a
    second weight.
    """

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.in_features = width
        self.out_features = vocabulary
        self.bias = None
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight)
        length = torch.linalg.vector_norm(self.weight, dim=-1, dtype=torch.float32).clamp_min(1e-12)
        return (logits / length).to(logits.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class BaichuanPreTrainedModel(LlamaPreTrainedModel):
    config_class = BaichuanConfig
    config: BaichuanConfig

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        if self.config.alibi:
            return NAME
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, NormHead):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, name, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a checkpoint that lacks weights, or has others, is a ValueError,
        not a warning."""
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            keys = sorted(map(str, info[what]))
            if not keys:
                continue
            problem = f"{len(keys)} {what.replace('_', ' ')} in {name}: {', '.join(keys[:3])}"
            if "q_proj" in " ".join(keys):
                problem += "; a published checkpoint goes through convert.py"
            raise ValueError(problem)
        return (model, info) if output_loading_info else model


class BaichuanModel(BaichuanPreTrainedModel, LlamaModel):
    """The blocks without the head; arguments as of LlamaModel."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        if config.alibi:
            self.rotary_emb = NoRotation()
            for layer in self.layers:
                layer.self_attn.__class__ = AlibiAttention


class BaichuanForCausalLM(BaichuanPreTrainedModel, LlamaForCausalLM):
    """Baichuan2 with its head; arguments as of LlamaForCausalLM, for packed rows as of
    common.collators."""

    def __init__(self, config: BaichuanConfig):
        # past LlamaForCausalLM, which would make its own blocks and head
        LlamaPreTrainedModel.__init__(self, config)
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        if config.norm_head:
            self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def create_masks_for_generate(self, attention_mask=None, **kwargs):
        """With a static cache generate() builds the mask itself; ALiBi's is built in the model,
        from the 2-D one."""
        if self.config.alibi:
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)


def register() -> None:
    AttentionMaskInterface.register(NAME, AlibiMask)
    PACKS.add(NAME)
    AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig, exist_ok=True)
    AutoModel.register(BaichuanConfig, BaichuanModel, exist_ok=True)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)


register()
