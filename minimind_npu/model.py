"""The language model: dense or mixture of experts, in both generations of MiniMind, as a
transformers model.

    model = build("26m", vocab_size=6400)                 # random weights, float32
    model = MiniMindForCausalLM.from_pretrained(folder)

Importing this module tells transformers' Auto classes about it.

A block is RMSNorm -> attention with rotary positions and grouped key/value heads -> RMSNorm ->
SwiGLU, both added to the residual; the head shares its weight with the embedding. Generation 3
normalises each head of query and key before the rotation (then the dense model is Qwen3's, the
sparse one Qwen3-MoE's); generation 2 does not (Llama's; with experts Qwen2-MoE's, its shared expert
always on). Names of parameters are those of the original weight files.

B rows, T tokens, N = B * T, D width, H heads, K key/value heads, d size of a head, V vocabulary, E
experts.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

# Su et al. 2021 (rotary positions) stretched as in Peng et al. 2023 (YaRN): from 2,048 positions to
# 16 times as many
YARN = {
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


class MiniMindConfig(PretrainedConfig):
    """Fields of the original's config; `None` takes what the generation (2 or 3) has.

    intermediate_size, moe_intermediate_size: width of the SwiGLU, of one expert.
    norm_topk_prob: weights of the chosen experts sum to 1. With one expert per token that leaves
        the router without a gradient from the language model's loss, so `build` switches it off;
        the original has it on.
    seq_aux: balance the experts within each sequence (generation 2), not over the batch.
    inference_rope_scaling: stretch positions 16-fold beyond 2,048 (YaRN).
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=6400,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=None,
        head_dim=None,
        intermediate_size=None,
        max_position_embeddings=32768,
        rms_norm_eps=None,
        rope_theta=1e6,
        inference_rope_scaling=False,
        generation=3,
        use_moe=False,
        num_experts=4,
        num_experts_per_tok=None,
        n_shared_experts=None,
        moe_intermediate_size=None,
        norm_topk_prob=True,
        router_aux_loss_coef=None,
        seq_aux=None,
        hidden_act="silu",
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        use_cache=True,
        **kwargs,
    ):
        if generation not in (2, 3):
            raise ValueError(f"generation {generation}: 2 or 3")
        # two fields have another name in the original's generation 2
        num_experts = kwargs.pop("n_routed_experts", None) or num_experts
        router_aux_loss_coef = kwargs.pop("aux_loss_alpha", router_aux_loss_coef)
        self.generation = generation
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = self._own(num_key_value_heads, 2, 4)
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or swiglu_width(hidden_size, generation)
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.inference_rope_scaling = inference_rope_scaling
        self.rms_norm_eps = self._own(rms_norm_eps, 1e-5, 1e-6)
        self.use_moe = use_moe
        self.num_experts = num_experts
        self.num_experts_per_tok = self._own(num_experts_per_tok, 2, 1)
        self.n_shared_experts = self._own(n_shared_experts, 1, 0)
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.router_aux_loss_coef = self._own(router_aux_loss_coef, 0.01, 5e-4)
        self.seq_aux = self._own(seq_aux, True, False)
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _own(self, value, second, third):
        """The value, or where there is none what this generation has."""
        if value is not None:
            return value
        return second if self.generation == 2 else third


def swiglu_width(hidden_size: int, generation: int) -> int:
    """8/3 (generation 2) or pi (generation 3) times the width, up to a multiple of 64."""
    width = int(hidden_size * 8 / 3) if generation == 2 else hidden_size * math.pi
    return 64 * math.ceil(width / 64)


# ---- sizes ---------------------------------------------------------------------------------------

TOY = dict(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.04,
)
SIZES = {
    "26m": dict(hidden_size=512, num_hidden_layers=8, generation=2),
    "104m": dict(hidden_size=768, num_hidden_layers=16, generation=2),
    "145m-moe": dict(hidden_size=640, num_hidden_layers=8, generation=2, use_moe=True),
    "64m": dict(hidden_size=768, num_hidden_layers=8),
    "198m-moe": dict(hidden_size=768, num_hidden_layers=8, use_moe=True),
    "tiny": TOY,
    "tiny-moe": TOY | dict(hidden_size=96, use_moe=True),
    "depth": {},  # all of it follows from --depth
}


def build(size: str, vocab_size: int = 6400, **changes) -> MiniMindForCausalLM:
    """A model of SIZES with random fp32 weights (torch's global generator); KeyError for an unknown
    size."""
    return MiniMindForCausalLM(config_of(size, vocab_size, **changes))


def config_of(size: str, vocab_size: int = 6400, **changes) -> MiniMindConfig:
    settings = SIZES[size] | changes
    if settings.get("use_moe") and settings.get("generation", 3) == 3:
        settings.setdefault("norm_topk_prob", False)
    return MiniMindConfig(vocab_size=vocab_size, **settings)


# ---- layers --------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019),
    computed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


@functools.cache
def frequencies(size: int, theta: float, stretched: bool, device: torch.device) -> Tensor:
    """Angle per position of each pair of a head's `size` numbers, fp32 [size / 2].

    stretched: YaRN divides by its factor where a wave is longer than the original window, keeps
        short ones.
    """
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    if stretched:
        low = max(0, math.floor(pair_with_turns(YARN["beta_fast"], size, theta)))
        high = min(size // 2 - 1, math.ceil(pair_with_turns(YARN["beta_slow"], size, theta)))
        ramp = ((torch.arange(size // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        plain = plain * (1 - ramp + ramp / YARN["factor"])
    return plain.to(device)


def pair_with_turns(turns: float, size: int, theta: float) -> float:
    """The (fractional) pair of numbers whose wave turns so often within the original window."""
    window = YARN["original_max_position_embeddings"]
    return size * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rotary(config: MiniMindConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """position_ids [B, T] -> cos, sin [B, 1, T, d], fp32."""
    window = YARN["original_max_position_embeddings"]
    stretched = config.inference_rope_scaling and config.max_position_embeddings > window
    angle = frequencies(config.head_dim, float(config.rope_theta), stretched, position_ids.device)
    angle = position_ids[:, None, :, None].float() * angle
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, d] turned by its position: number i of a head pairs with number i + d/2."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """Causal attention, K key/value heads shared by H query heads (Ainslie et al. 2023)."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        queries = config.num_attention_heads * self.head_dim
        shared = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        if config.generation == 3:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def project(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, D] -> query [B, H, T, d], key and value [B, K, T, d]."""
        hidden = to_autocast(hidden)  # once for all three
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden).view(shape)
        key = self.k_proj(hidden).view(shape)
        value = self.v_proj(hidden).view(shape).transpose(1, 2)
        if self.config.generation == 3:
            query = self.q_norm(query)
            key = self.k_norm(key)
        cos, sin = (x.to(query.dtype) for x in rotation)
        query = rotate(query.transpose(1, 2), cos, sin)
        key = rotate(key.transpose(1, 2), cos, sin)
        return query, key, value

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask, cache, **kwargs) -> Tensor:
        """What `project` gives -> [B, T, H * d], before o_proj."""
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        heads, _ = attend(
            self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return heads.flatten(2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: MiniMindConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = to_autocast(x)  # once for both
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseFeedForward(nn.Module):
    """Each token goes through its `num_experts_per_tok` likeliest experts, and through the shared
    ones.

    Tokens are sorted by expert once, so that an expert is three products over its tokens, however
    many they are.
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        width = config.moe_intermediate_size if config.generation == 3 else config.intermediate_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            [FeedForward(config, width) for _ in range(config.num_experts)]
        )
        shared = config.n_shared_experts or 0
        if shared:
            self.shared_experts = nn.ModuleList(
                [FeedForward(config, config.intermediate_size) for _ in range(shared)]
            )

    def forward(
        self, x: Tensor, token_mask: Tensor, owner: Tensor, sequences: int
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D], token_mask [N] (0 at padding), owner [N] (sequence of each token, of so many
        sequences) -> [B, T, D], balance loss."""
        flat = x.flatten(0, 1)
        # in half precision experts that differ a little would be tied
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(flat.float(), self.gate.weight.float()).softmax(-1)
        weight, chosen = self.choose(scores)
        picks = chosen.shape[1]

        order = chosen.flatten().argsort(stable=True)
        # bincount would make the host wait for the device
        experts = torch.arange(self.config.num_experts, device=x.device)
        sizes = (chosen.flatten()[:, None] == experts).sum(0)
        flat = to_autocast(flat)
        slots = flat[:, None].expand(-1, picks, -1).flatten(0, 1)  # each token `picks` times
        done = grouped(self.experts, slots.index_select(0, order), sizes)
        done = done.index_select(0, order.argsort()).view(*chosen.shape, -1)
        out = (done * weight[..., None].to(done.dtype)).sum(1)
        if self.config.n_shared_experts:
            for expert in self.shared_experts:
                out = out + expert(flat)
        balance = self.balance(scores, chosen, token_mask, owner, sequences)
        return out.view(x.shape), balance

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """scores [N, E] -> weight and number of the chosen experts, [N, picks] both."""
        config = self.config
        weight, chosen = scores.topk(config.num_experts_per_tok, sorted=False)
        # generation 2 leaves a single expert its probability
        several = config.generation == 3 or config.num_experts_per_tok > 1
        if config.norm_topk_prob and several:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return weight, chosen

    def balance(
        self, scores: Tensor, chosen: Tensor, token_mask: Tensor, owner: Tensor, sequences: int
    ) -> Tensor:
        """E * sum over experts of (share of tokens sent to it) * (mean probability of it), times
        its coefficient.

        Smallest when all experts get the same (Fedus et al. 2021). Only in training; padding does
        not count.
        """
        config = self.config
        if not (self.training and config.router_aux_loss_coef):
            return scores.new_zeros(())
        sent = F.one_hot(chosen, config.num_experts).sum(1) * token_mask[:, None]
        likely = scores * token_mask[:, None]
        tokens = token_mask[:, None].to(scores.dtype)
        if config.seq_aux:
            sent = sent.to(scores.dtype)
            balance = self.balance_by_sequence(sent, likely, tokens, owner, sequences)
        else:
            size = tokens.sum().clamp(min=1)
            picks = config.num_experts_per_tok if config.generation == 2 else 1
            balance = (sent.sum(0) / size / picks * (likely.sum(0) / size)).sum()
        return config.num_experts * config.router_aux_loss_coef * balance

    def balance_by_sequence(
        self, sent: Tensor, likely: Tensor, tokens: Tensor, owner: Tensor, sequences: int
    ) -> Tensor:
        """sent, likely [N, E], tokens [N, 1] -> mean over the sequences that have tokens."""

        def by_owner(x: Tensor) -> Tensor:
            return x.new_zeros(sequences, x.shape[1]).index_add(0, owner, x)

        sizes = by_owner(tokens)
        per_token = sizes.clamp(min=1)
        share = by_owner(sent) / per_token / self.config.num_experts_per_tok
        balances = share * (by_owner(likely) / per_token)
        return balances.sum() / (sizes > 0).sum().clamp(min=1)


def to_autocast(x: Tensor) -> Tensor:
    """`x` as products under autocast take it, which would cast it anew for each of them."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def grouped(experts: nn.ModuleList, rows: Tensor, sizes: Tensor) -> Tensor:
    """rows [M, D] sorted by expert, sizes [E] -> [M, D]: each part through its expert.

    On accelerators with torch's grouped product the host need not know the sizes; elsewhere it is E
    calls.
    """
    rows = to_autocast(rows)
    has_product = rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    if has_product and all(is_plain(expert) for expert in experts):
        return grouped_swiglu(experts, rows, sizes)
    parts = zip(experts, rows.split(sizes.tolist()), strict=True)
    return torch.cat([expert(part) for expert, part in parts])


def is_plain(expert: nn.Module) -> bool:
    """Whether it is three linear layers with their weights at hand: no adapter, not spread by
    ZeRO-3."""
    return all(type(p) is nn.Linear and p.weight.numel() for p in expert.children())


def grouped_swiglu(experts: nn.ModuleList, rows: Tensor, sizes: Tensor) -> Tensor:
    """What `grouped` computes, as three products; rows in bfloat16."""
    ends = sizes.cumsum(0).to(torch.int32)

    def product(x: Tensor, name: str) -> Tensor:
        weights = [getattr(expert, name).weight.to(x.dtype) for expert in experts]
        return F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)

    hidden = F.silu(product(rows, "gate_proj")) * product(rows, "up_proj")
    return product(hidden, "down_proj")


# ---- the model -----------------------------------------------------------------------------------


class Layer(GradientCheckpointingLayer):
    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.use_moe:
            self.mlp = SparseFeedForward(config)
        else:
            self.mlp = FeedForward(config, config.intermediate_size)

    def forward(
        self, hidden: Tensor, rotation, mask, cache, balance: tuple | None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """-> hidden [B, T, D], balance loss; `balance`: see MiniMindModel.balanced, where there are
        experts.

        What stands before and after attention has one shape in all steps and can be compiled
        (loop/compiled.py); attention sees documents, whose number changes.
        """
        heads = self.self_attn(*self.before(hidden, rotation), mask, cache, **kwargs)
        return self.after(hidden, heads, balance)

    def before(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> query, key, value: see Attention.project."""
        return self.self_attn.project(self.input_layernorm(hidden), rotation)

    def after(self, hidden: Tensor, heads: Tensor, balance: tuple | None) -> tuple[Tensor, Tensor]:
        hidden = hidden + self.self_attn.o_proj(heads)
        normed = self.post_attention_layernorm(hidden)
        if balance is None:
            return hidden + self.mlp(normed), hidden.new_zeros(())
        out, aux = self.mlp(normed, *balance)
        return hidden + out, aux


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Layer"]
    _skip_keys_device_placement = ["past_key_values"]

    def _init_weights(self, module):
        """Normal weights; what is added to the residual is smaller by the number of additions
        (Radford et al. 2019)."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, (Attention, FeedForward)):
            last = module.o_proj if isinstance(module, Attention) else module.down_proj
            nn.init.normal_(last.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers))


@dataclass
class ModelOutput(BaseModelOutputWithPast):
    """aux_loss: the summed balance of the experts; 0 outside training, and of a dense model."""

    aux_loss: Tensor | None = None


class MiniMindModel(MiniMindPreTrainedModel):
    """The blocks without the head; arguments as of MiniMindForCausalLM."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        token_mask=None,
        output_hidden_states=None,
        **kwargs,
    ) -> ModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask = attention_mask
        if mask is None or mask.ndim == 2:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        balance = None
        if self.config.use_moe:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
            balance = self.balanced(hidden, attention_mask, token_mask, cu_seqlens)
        rotation = rotary(self.config, position_ids)
        aux = hidden.new_zeros(())
        states = (hidden,)
        for layer in self.layers:
            hidden, more = layer(hidden, rotation, mask, past_key_values, balance, **kwargs)
            aux = aux + more
            if output_hidden_states:
                states = (*states, hidden)
        hidden = self.norm(hidden)
        return ModelOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
            aux_loss=aux,
        )

    def balanced(
        self, hidden: Tensor, attention_mask, token_mask, cu_seqlens
    ) -> tuple[Tensor, Tensor, int]:
        """(token_mask [N], owner [N]: the sequence of each token, number of sequences) for the
        balance of experts."""
        rows, length = hidden.shape[:2]
        if token_mask is None and attention_mask is not None and attention_mask.ndim == 2:
            token_mask = attention_mask[:, -length:]
        if token_mask is None:
            token_mask = torch.ones(rows, length, device=hidden.device)
        place = torch.arange(rows * length, device=hidden.device)
        if cu_seqlens is None:
            owner = place // length
            sequences = rows
        else:
            owner = torch.bucketize(place, cu_seqlens[1:].to(place), right=True)
            sequences = len(cu_seqlens) - 1
        return token_mask.flatten(), owner, sequences


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """input_ids [B, T] -> logits [B, T, V] (of the last `logits_to_keep` positions, 0: all).

        Args:
            attention_mask: [B, T], 0 on padding (either side); a packed row has none, but
                cu_seq_lens_q/k [n + 1], max_length_q/k and positions that restart
                (common/fast/attention.py).
            labels: [B, T], -100 without; shifted here. loss is their mean cross entropy
                (num_items_in_batch: the divisor instead of their number) without aux_loss, the
                summed balance of the experts in training.
            token_mask: [B, T], 0 at the padding of a packed row; the balance leaves it out.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = logits_to_keep  # positions, or how many of the last ones
        if isinstance(keep, int):
            keep = slice(-keep, None) if keep else slice(None)
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            vocab = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=out.aux_loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )


AutoConfig.register(MiniMindConfig.model_type, MiniMindConfig, exist_ok=True)
AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)
