"""The last layer of the language model, computed where a label is predicted and nowhere else: no
loss depends on what it says at the other positions, only on their keys and values. On CPUs its
attention is asked from each document's first label on.

With 576 tokens of a picture and an answer of 20 that is nearly the whole layer. Exact; calls
without labels (generation, logits) are untouched.

B rows, T tokens, N positions that predict a label, D width.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from common.data.counts import label_index
from common.fast import shared_start
from common.fast.losses import without_adapter

BY_POSITION = ("self_attn.q_proj", "self_attn.o_proj", "mlp")  # that see one position at a time


class Positions:
    """Where the call that is being computed has labels. Kept until the next call: a backward with
    checkpointing computes the layer again."""

    def __init__(self):
        self.index: Tensor | None = None  # [N] places in the flattened [B, T]
        self.count = 0  # B * T
        self.asked: shared_start.Asked | None = None  # of the attention, in a packed row

    def note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        labels = kwargs.get("labels")
        self.index = None
        self.asked = None
        if labels is None or kwargs.get("shift_labels") is not None:
            return
        index = kwargs.get("label_index")
        self.index = label_index(labels) if index is None else index
        self.count = labels.numel()
        edges = kwargs.get("cu_seq_lens_q")
        if edges is not None and labels.device.type == "cpu":
            self.asked = shared_start.asked_columns(self.index, edges)


def is_mixture(text_config) -> bool:
    """Of experts, whose balance is that of all tokens: its last layer stays whole."""
    return hasattr(text_config, "router_aux_loss_coef")


def only_at_labels(model: nn.Module) -> bool:
    """From here on the last layer leaves out what no label needs; False for a language model whose
    layers are built another way.

    model: a LlavaForConditionalGeneration under losses.use_chunked_loss, its adapter on it.
    """
    inner = without_adapter(model)
    language_model = inner.model.language_model
    config = language_model.config
    layers = getattr(language_model, "layers", None)
    if not layers or is_mixture(config):
        return False
    found = [_child(layers[-1], name) for name in BY_POSITION]
    if None in found:
        return False
    positions = Positions()
    norms = (_child(layers[-1], "post_attention_layernorm"), _child(language_model, "norm"))
    for module in (*found, *filter(None, norms)):
        module.forward = partial(_at_labels, module.forward, positions)
    if config._attn_implementation == shared_start.NAME:
        attention = layers[-1].self_attn
        attention.forward = partial(_asked, attention.forward, positions)
    # an adapter calls the forward of what it stands on, without its hooks; generate calls that
    for called in {id(one): one for one in (model, inner)}.values():
        called.register_forward_pre_hook(positions.note, with_kwargs=True)
    return True


def _child(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _asked(stock, positions: Positions, *args, **kwargs):
    return stock(*args, asked=positions.asked, **kwargs)


def _at_labels(stock, positions: Positions, hidden: Tensor) -> Tensor:
    """[B, T, D] -> [B, T, width of the module], 0 where nothing is predicted."""
    rows = hidden.flatten(0, -2)
    if positions.index is None or len(rows) != positions.count:
        return stock(hidden)
    index = positions.index.to(hidden.device)
    said = stock(rows.index_select(0, index)[None])[0]
    out = said.new_zeros(len(rows), said.shape[-1]).index_copy(0, index, said)
    return out.view(*hidden.shape[:-1], -1)
