"""ChatGLM-6B as a native transformers model: generation, KV cache, checkpointing, packed rows; no
remote code.

Importing this module tells the Auto classes about it; published checkpoints of both vocabularies
load as they are.

A row is prompt [gMASK] <sop> answer <eop>. What stands before <sop>, the prefix, is seen by every
token of the row, also by tokens in front; <sop> and what follows are causal. Every token has two
positions: its place, which stays at [gMASK] from <sop> on, and its place within the answer (<sop>
is 1), 0 in the prefix. `layout` computes both, for training and for generation. Source: Du et al.
2022, "GLM: General Language Model Pretraining with Autoregressive Blank Infilling", and the
behaviour of the published v1.1 code.

B rows, T tokens, S keys, H heads, d size of a head, D width, n documents of a packed row.
"""

from __future__ import annotations

import functools
import math

import torch
from configuration_chatglm import ChatGLMConfig
from prefix_attention import Documents, prefix_attention
from tokenization_chatglm import ChatGLMTokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


def layout(
    config: ChatGLMConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the prefix of each row or document ends, and the two positions of each token.

    Args:
        input_ids: [B, T]
        attention_mask: [B, T], 0 on padding
        cu_seqlens: [n + 1] boundaries of the documents of a packed row, B = 1
    Returns:
        prefix [B] (or [n]): column of the row's (document's) first <sop>; position_ids [B, 2, T], 0
        on left padding.
    ValueError when a row lacks <sop>, or [gMASK] and [MASK].
    """
    width = input_ids.shape[1]
    column = torch.arange(width, device=input_ids.device)
    if cu_seqlens is not None:
        kept = torch.ones_like(input_ids)
        begin = cu_seqlens[:-1].to(input_ids)
        owner = torch.bucketize(column, cu_seqlens[1:].to(column), right=True)[None]
    else:
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        begin = kept.argmax(1)
        owner = torch.arange(len(input_ids), device=column.device)[:, None]

    def first(token: int) -> Tensor:
        """Column of the first `token` of each row or document, [B] or [n]; T where there is
        none."""
        at = torch.where((input_ids == token) & (kept > 0), column, width)
        if cu_seqlens is None:
            return at.amin(1)
        return torch.full_like(begin, width).scatter_reduce(0, owner[0], at[0], "amin")

    prefix = first(config.bos_token_id)
    mask = first(config.gmask_token_id)
    mask = torch.where(mask < width, mask, first(config.mask_token_id))
    if (torch.maximum(prefix, mask) >= width).any():
        raise ValueError(
            "every row of ChatGLM needs [gMASK] (or [MASK]) and <sop>: text, [gMASK], <sop>, answer"
        )
    place = torch.where(column < prefix[owner], column - begin[owner], (mask - begin)[owner])
    block = column - prefix[owner] + 1
    return prefix, torch.stack([place, block], 1).clamp_(min=0)


def visible(prefix: Tensor, attention_mask: Tensor | None, queries: int, keys: int) -> Tensor:
    """Bool mask [B, 1, queries, keys], True where the last `queries` of `keys` columns may look.

    prefix [B]: as in `layout`; attention_mask [B, keys], 0 on padding. Padding sees itself, so that
    no row is empty.
    """
    column = torch.arange(keys, device=prefix.device)
    row = column[keys - queries :, None]
    seen = (column <= row) | (column < prefix[:, None, None])
    if attention_mask is not None:
        seen = (seen & attention_mask.bool()[:, None]) | (column == row)
    return seen[:, None]


@functools.cache
def inverse_frequencies(size: int, device: torch.device) -> Tensor:
    """fp32 [size / 2]. The original rounds them to fp16; the weights were trained with these."""
    exponent = torch.arange(0, size, 2, device="cpu").float() / size
    return (1 / 10000**exponent).half().float().to(device)


def rotary(position_ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """position_ids [B, 2, T] -> cos, sin [B, T, 1, 2, size] in fp32: `size` values of a head for
    each position.

    In half precision, as the original computes them, neighbouring positions fall together from some
    hundred on.
    """
    frequencies = inverse_frequencies(size, position_ids.device)
    angle = position_ids.transpose(1, 2)[..., None].float() * frequencies
    angle = torch.cat([angle, angle], -1)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, d]: its first half turned by the first position, its second half by the second
    one."""
    halves = x.float().unflatten(-1, (2, -1))
    a, b = halves.chunk(2, -1)
    turned = halves * cos + torch.cat([-b, a], -1) * sin
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        # rows: q, k, v of head 0, of 1 ...
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        cos,
        sin,
        mask: Tensor | None,
        documents: Documents | None,
        cache: Cache | None,
    ):
        # heads of this rank, maybe not all
        fused = self.query_key_value(hidden).unflatten(-1, (-1, 3 * self.head_dim))
        query, key, value = fused.chunk(3, -1)
        query = rotate(query, cos, sin).transpose(1, 2)
        key = rotate(key, cos, sin).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if documents is not None:
            out = prefix_attention(query[0], key[0], value[0], documents)[None]
        else:
            out = attend(query, key, value, mask).transpose(1, 2)
        return self.dense(out.flatten(-2))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """query [B, H, T, d], key and value [B, H, S, d], mask bool or None -> [B, H, T, d]."""
    if query.shape[2] > 1 or query.device.type != "cpu" or query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # one query a row: torch's fused kernel for CPUs takes ten times as long in half precision
    scores = torch.matmul(query, key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, -1).to(value.dtype), value)


class MLP(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden), approximate="tanh"))


class ChatGLMLayer(GradientCheckpointingLayer):
    """One block. The residual is the normed input, times sqrt(2 L)."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.alpha = math.sqrt(2 * config.residual_scale_layers)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, *inputs) -> Tensor:
        normed = self.input_layernorm(hidden)
        hidden = normed * self.alpha + self.attention(normed, *inputs)
        normed = self.post_attention_layernorm(hidden)
        return normed * self.alpha + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ChatGLMLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # 28 buffers of the published files: recomputed
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ):
        """As in transformers, but a checkpoint that lacks weights, or has others, is a ValueError,
        not a warning."""
        name = pretrained_model_name_or_path
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            keys = sorted(map(str, info[what]))
            if keys:
                some = ", ".join(keys[:3])
                raise ValueError(f"{len(keys)} {what.replace('_', ' ')} in {name}: {some}")
        return (model, info) if output_loading_info else model


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The blocks without the head: [B, T] -> last_hidden_state [B, T, D]; arguments as of the whole
    model."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMLayer(config, i) for i in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, value):
        self.word_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        prefix_lengths=None,
        cu_seq_lens_q=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds")
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        packed = cu_seq_lens_q is not None
        dense = attention_mask is not None and attention_mask.dim() == 4
        if position_ids is None or (prefix_lengths is None and not dense):
            if past or input_ids is None:
                raise ValueError(
                    "position_ids and prefix_lengths (or a 4-D mask) are needed with a cache or "
                    "embeddings"
                )
            prefix_lengths, position_ids = layout(
                self.config, input_ids, None if dense else attention_mask, cu_seq_lens_q
            )
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        if packed and (dense or past or (use_cache and not self.training)):
            raise ValueError("a packed row needs use_cache=False and no attention_mask")

        mask = None
        documents = None
        if packed:
            documents = Documents(cu_seq_lens_q, prefix_lengths)
        elif dense:
            mask = ~attention_mask  # of the original: True is hidden
        else:
            mask = visible(prefix_lengths, attention_mask, hidden.shape[1], past + hidden.shape[1])
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        cos, sin = rotary(position_ids, head_dim // 2)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask, documents, past_key_values)
        hidden = self.final_layernorm(hidden)
        return BaseModelOutputWithPast(hidden, past_key_values if use_cache else None)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its head; the class name of the published config.json."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        prefix_lengths=None,
        cu_seq_lens_q=None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and the loss where labels are given.

        Args:
            input_ids: [B, T]
            inputs_embeds: [B, T, D] instead, then with position_ids and prefix_lengths
            attention_mask: [B, S], 0 on padding; or as the original makes it: bool [B, 1, T, S],
                True where hidden
            position_ids: [B, 2, T] from `layout`, computed if unset
            prefix_lengths: [B], or [n] of a packed row, from `layout`, computed if unset
            cu_seq_lens_q: [n + 1] boundaries of the documents of a packed row (B = 1, no cache)
            labels: [B, T], not shifted, -100 where there is none
        """
        output = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            prefix_lengths,
            cu_seq_lens_q,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, output.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, attention_mask=None, **kwargs
    ):
        """The prefix and positions of training, from all tokens so far; with a cache only the new
        ones are run."""
        # generate()'s guess is one-dimensional; what a tokenizer gave is the same again
        kwargs.pop("position_ids", None)
        if attention_mask is not None and attention_mask.dim() > 2:
            raise ValueError("generate() takes a 2-D attention_mask, 0 on padding")
        if getattr(kwargs.get("past_key_values"), "is_compileable", False):
            raise ValueError("a static cache is not supported: leave cache_implementation away")
        # a rank that has finished before the others goes on with a mask that grows alone
        kept = None if attention_mask is None else attention_mask[:, : input_ids.shape[1]]
        prefix, positions = layout(self.config, input_ids, kept)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            attention_mask=attention_mask,
            position_ids=positions,
            **kwargs,
        )
        return inputs | {"prefix_lengths": prefix}


def register() -> None:
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    # as the published auto_map
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)


register()
