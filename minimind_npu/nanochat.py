"""nanochat's network, as transformers has it (NanoChatForCausalLM), and what this recipe needs to
train it.

    model = build(config_of(6400, hidden_size=256, num_hidden_layers=4, num_attention_heads=2))

Folders that this recipe writes open in transformers alone, and published ones open here. The block:
no weights in its norms, query and key normalised after the rotation, relu squared, a head of its
own whose logits are softly capped. Start of the weights as in nanochat (Karpathy 2025): what is
added to the residual begins at zero, the head near zero. To train, `quicken` puts layers with fewer
passes over memory in the place of transformers' own: what those compute, with their parameters.

B rows, T tokens, H heads, d size of a head, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import NanoChatConfig, NanoChatForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.nanochat.modeling_nanochat import eager_attention_forward

from common.fast.attention import autocast_dtype, to_autocast

MODEL_TYPE = NanoChatConfig.model_type
EMBEDDING_STD = 0.8
HEAD_STD = 0.001
EXPANSION = 4  # of the feed-forward layer
POSITIONS = 2048  # at least, as in published configs


def config_of(
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    window: int = POSITIONS,
) -> NanoChatConfig:
    """window: tokens of a training row. Ids of the special tokens are this recipe's."""
    return NanoChatConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=EXPANSION * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max(POSITIONS, window),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


class CappedHead(nn.Linear):
    """Logits between -cap and cap: cap * tanh(x / cap). transformers' model caps them behind its
    head; here they leave the head so, and losses in chunks (common/fast/losses.py, which look for
    `logit_cap`) see them."""

    def __init__(self, weight: nn.Parameter, cap: float):
        vocabulary, width = weight.shape
        super().__init__(width, vocabulary, bias=False, device="meta")
        self.weight = weight
        self.logit_cap = cap

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logit_cap * torch.tanh(super().forward(hidden) / self.logit_cap)


def build(config: NanoChatConfig) -> NanoChatForCausalLM:
    """A model with random float32 weights (torch's global generator)."""
    model = NanoChatForCausalLM(config)
    width = config.hidden_size
    with torch.no_grad():
        nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
        nn.init.normal_(model.lm_head.weight, std=HEAD_STD)
        for layer in model.model.layers:
            attention = layer.self_attn
            bound = math.sqrt(3 / width)  # a uniform distribution of deviation 1 / sqrt(D)
            for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
                nn.init.uniform_(matrix.weight, -bound, bound)
            nn.init.uniform_(layer.mlp.fc1.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(attention.o_proj.weight)
            nn.init.zeros_(layer.mlp.fc2.weight)
    return model


def cap_in_head(model: NanoChatForCausalLM) -> NanoChatForCausalLM:
    """Let the head itself cap the logits; changes the model and returns it. Its config says nothing
    of a cap from here on, see `as_published`."""
    cap = model.config.final_logit_softcapping
    if cap is not None:
        model.set_output_embeddings(CappedHead(model.lm_head.weight, cap))
        model.config.final_logit_softcapping = None
    return model


@contextlib.contextmanager
def as_published(model: nn.Module):
    """Inside, the config of a model says where its logits are capped, as transformers reads it."""
    head = model.get_output_embeddings()
    cap = head.logit_cap if isinstance(head, CappedHead) else None
    if cap is not None:
        model.config.final_logit_softcapping = cap
    try:
        yield
    finally:
        if cap is not None:
            model.config.final_logit_softcapping = None


# ---- layers with fewer passes --------------------------------------------------------------------


def quicken(model: NanoChatForCausalLM) -> NanoChatForCausalLM:
    """Put the layers below in the place of transformers' own, with the same parameters under the
    same names; changes the model and returns it."""
    eps = model.config.rms_norm_eps
    layers = model.model.layers
    for i, stock in enumerate(layers):
        layers[i] = Layer(stock, eps)
    model.model.norm = Norm(eps)  # the residual begins with it too, and stays float32
    return model


def by_hand() -> bool:
    """Whether the Functions below pay: without a gradient one costs more than its work on a few
    rows, and a compiler fuses what is written plainly better."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def inverse_length(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, fp32 [..., 1]."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def along(grad: Tensor, y: Tensor) -> Tensor:
    """mean(grad * y) over the last dimension, [..., 1]: what a norm takes out of a gradient."""
    if grad.dtype is torch.float16:  # scaled gradients add up beyond its largest number
        return along(grad.float(), y.float()).to(grad.dtype)
    return torch.linalg.vecdot(grad, y).div_(y.shape[-1])[..., None]


class _Normalise(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) in `dtype`."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, dtype: torch.dtype):
        inverse = inverse_length(x, eps)
        y = (x * inverse).to(dtype)
        ctx.save_for_backward(y, inverse)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        y, inverse = ctx.saved_tensors
        across = torch.addcmul(grad, y, along(grad, y), value=-1)
        return (across * inverse).to(ctx.dtype), None, None


class Norm(nn.Module):
    """for_products: what comes out is in the dtype of the products that follow; else in x's."""

    def __init__(self, eps: float, for_products: bool = False):
        super().__init__()
        self.eps = eps
        self.for_products = for_products

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x) if self.for_products else x.dtype
        if not by_hand():
            return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(dtype)
        return _Normalise.apply(x, self.eps, dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x [B, T, H, d] turned by angles whose cos and sin are [B, T, 1, d / 2]: number i of a head
    with number i + d/2, in nanochat's direction; back: in the other one."""
    out = torch.empty_like(x)
    a, b = x.chunk(2, -1)
    turned_a, turned_b = out.chunk(2, -1)
    sign = -1 if back else 1
    torch.mul(a, cos, out=turned_a).addcmul_(b, sin, value=sign)
    torch.mul(b, cos, out=turned_b).addcmul_(a, sin, value=-sign)
    return out


class _RotateAndNormalise(torch.autograd.Function):
    """x [B, T, H, d], cos and sin [B, T, 1, d / 2] -> [B, T, H, d]: rotated, then normalised. A
    rotation changes no length, so it may come last, and one saved tensor is enough."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, eps: float):
        inverse = inverse_length(x, eps)
        y = rotated((x * inverse).to(x.dtype), cos, sin)
        ctx.save_for_backward(y, cos, sin, inverse)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, cos, sin, inverse = ctx.saved_tensors
        across = torch.addcmul(grad, y, along(grad, y), value=-1)
        across = rotated(across, cos, sin, back=True)
        return (across * inverse).to(y.dtype), None, None, None


def rotate_and_normalise(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    if by_hand():
        return _RotateAndNormalise.apply(x, cos, sin, eps)
    if torch.compiler.is_compiling():
        a, b = x.chunk(2, -1)
        turned = torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
    else:
        turned = rotated(x, cos, sin)
    return F.rms_norm(turned, x.shape[-1:], eps=eps)


class Attention(nn.Module):
    """NanoChatAttention's projections and facts; rotation and norm in one pass each way."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(stock, name))
        self.config = stock.config
        self.layer_idx = stock.layer_idx
        self.head_dim = stock.head_dim
        self.num_key_value_groups = stock.num_key_value_groups
        self.scaling = stock.scaling
        self.dropout = stock.attention_dropout
        self.is_causal = True
        self.eps = stock.q_norm.eps

    def project(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, D] -> query [B, H, T, d], key and value [B, K, T, d]."""
        hidden = to_autocast(hidden)  # once for all three
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden).view(shape)
        key = self.k_proj(hidden).view(shape)
        value = self.v_proj(hidden).view(shape).transpose(1, 2)
        halves = (x[:, :, None, : self.head_dim // 2] for x in rotation)
        cos, sin = (x.to(query.dtype) for x in halves)
        query = rotate_and_normalise(query, cos, sin, self.eps).transpose(1, 2)
        key = rotate_and_normalise(key, cos, sin, self.eps).transpose(1, 2)
        return query, key, value

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask, cache, **kwargs) -> Tensor:
        """What `project` gives -> [B, T, H * d], before o_proj."""
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        how = {"dropout": self.dropout if self.training else 0.0, "scaling": self.scaling}
        heads, _ = attend(self, query, key, value, mask, **how, **kwargs)
        return heads.flatten(2)


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor):
        above = x.clamp_min(0)
        ctx.save_for_backward(above)
        return above * above

    @staticmethod
    def backward(ctx, grad):
        (above,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, above, value=2)


class FeedForward(nn.Module):
    """NanoChatMLP's matrices around relu squared (So et al. 2021)."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.fc1 = stock.fc1
        self.fc2 = stock.fc2

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = self.fc1(hidden_states)
        if by_hand():
            return self.fc2(_SquaredRelu.apply(hidden))
        return self.fc2(hidden.relu().square())


class Layer(GradientCheckpointingLayer):
    """NanoChatDecoderLayer's parts. What stands before and after attention has one shape in all
    steps and can be compiled (loop/compiled.py)."""

    def __init__(self, stock: nn.Module, eps: float):
        super().__init__()
        self.self_attn = Attention(stock.self_attn)
        self.mlp = FeedForward(stock.mlp)
        self.input_layernorm = Norm(eps, for_products=True)
        self.post_attention_layernorm = Norm(eps, for_products=True)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; the rest as NanoChatModel gives it."""
        projected = self.before(hidden_states, position_embeddings)
        kwargs["position_ids"] = position_ids
        heads = self.self_attn(*projected, attention_mask, past_key_values, **kwargs)
        return self.after(hidden_states, heads)

    def before(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> query, key, value: see Attention.project."""
        return self.self_attn.project(self.input_layernorm(hidden), rotation)

    def after(self, hidden: Tensor, heads: Tensor) -> Tensor:
        hidden = hidden + self.self_attn.o_proj(heads)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
