"""From pixels to what the language model sees: the tower without what it computes in vain, the
projector, and the forward that a trainer wraps.

P pictures, N features of each, H width of the tower (times the layers that are looked at), D width
of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from types import MethodType

import torch
from model import TOWERS, picture_side
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from common.fast.losses import without_adapter


class Normaliser:
    """What an image processor does to pixels once they have their size, on the device: uint8
    travels, a fourth of the bytes."""

    def __init__(self, image_processor):
        self.height, self.width = picture_side(image_processor)
        factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        self.factor = factor
        is_on = bool(image_processor.do_normalize)
        self.mean = list(image_processor.image_mean) if is_on else [0.0] * 3
        self.std = list(image_processor.image_std) if is_on else [1.0] * 3

    def __call__(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [P, 3, height, width] -> dtype, same shape."""
        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return ((pixels.float() * self.factor - mean) / std).to(dtype)

    def blank(self, device) -> Tensor:
        return torch.zeros(1, 3, self.height, self.width, dtype=torch.uint8, device=device)


# ---- the tower -----------------------------------------------------------------------------------


def layers_of(config) -> list[int]:
    """Which hidden states of the tower are looked at, counted from its embeddings (0)."""
    layers = config.vision_feature_layer
    layers = layers if isinstance(layers, (list, tuple)) else [layers]
    count = config.vision_config.num_hidden_layers
    return [layer if layer >= 0 else count + 1 + layer for layer in layers]


def tower_layers(tower: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds a tower's list of layers, and the list's name in it."""
    for module in tower.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                return module, name
    raise ValueError(f"{type(tower).__name__} has no list of layers")


def cut_tower(model) -> int:
    """Take away, in memory only, the layers of a tower behind those that are looked at: their
    output is thrown away. whole_tower puts them back. -> how many.

    model: a LlavaForConditionalGeneration whose tower does not train.
    """
    config = model.config
    tower = model.model.vision_tower
    needed = max(layers_of(config))
    count = config.vision_config.num_hidden_layers
    if needed >= count or not TOWERS[config.vision_config.model_type].can_be_cut:
        return 0
    holder, name = tower_layers(tower)
    layers = getattr(holder, name)
    model._cut = (layers, count, config.vision_feature_layer)
    absolute = layers_of(config)
    is_list = isinstance(config.vision_feature_layer, (list, tuple))
    _set_layers(model, layers[:needed], needed, absolute if is_list else absolute[0])
    return count - needed


def _set_layers(model, layers: nn.ModuleList, count: int, looked_at) -> None:
    tower = model.model.vision_tower
    holder, name = tower_layers(tower)
    setattr(holder, name, layers)
    # 5.x resolves indices of hidden states by the config
    for config in (tower.config, model.config.vision_config, model.model.config.vision_config):
        config.num_hidden_layers = count
    for config in (model.config, model.model.config):
        config.vision_feature_layer = looked_at


@contextmanager
def whole_tower(model) -> Iterator[None]:
    """While this lasts, a tower under cut_tower has all its layers, as its file has."""
    inner = without_adapter(model)
    cut = inner.__dict__.pop("_cut", None)
    if cut is None:
        yield
        return
    holder, name = tower_layers(inner.model.vision_tower)
    short = getattr(holder, name)
    short_facts = (short, len(short), inner.config.vision_feature_layer)
    _set_layers(inner, *cut)
    try:
        yield
    finally:
        _set_layers(inner, *short_facts)
        inner._cut = cut


def keep_in_eval(tower: nn.Module) -> None:
    """Without dropout, also after the train() that a trainer calls in every step."""
    tower.eval()
    tower.train = MethodType(_stay, tower)


def _stay(self, mode: bool = True):
    return self


def is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def tower_features(tower: nn.Module, config, pixels: Tensor) -> Tensor:
    """The hidden states that the projector takes, as LlavaModel selects them: [P, N, H]."""
    with torch.no_grad() if is_frozen(tower) else nullcontext():
        states = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    chosen = [states[layer] for layer in layers_of(config)]
    if config.vision_feature_select_strategy == "default":
        chosen = [state[:, 1:] for state in chosen]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)


# ---- tower and projector -------------------------------------------------------------------------


def features_of(model, pictures: Tensor, normaliser: Normaliser) -> Tensor:
    """uint8 pixels [P, 3, height, width], or features that are known already -> [P, N, H]."""
    if pictures.dtype != torch.uint8:
        return pictures
    tower = model.model.vision_tower
    dtype = next(tower.parameters()).dtype
    return tower_features(tower, model.config, normaliser(pictures, dtype))


def project(model, features: Tensor) -> list[Tensor]:
    """[P, N, H] -> [N, D] of each picture."""
    projector = model.model.multi_modal_projector
    dtype = next(projector.parameters()).dtype
    return list(projector(features.to(dtype)))


def as_outputs(projected: list[Tensor]) -> dict:
    """What the model takes in place of pixels, in forward and in generate."""
    return {"image": BaseModelOutputWithPooling(pooler_output=projected)}


def see(model, pictures: Tensor, normaliser: Normaliser) -> dict:
    """Pictures of some rows, in the order of their tokens -> mm_encoder_outputs of a forward or of
    generate. model: with or without an adapter."""
    inner = without_adapter(model)
    return as_outputs(project(inner, features_of(inner, pictures, normaliser)))


# ---- the forward that is trained -----------------------------------------------------------------


def for_training(model, normaliser: Normaliser):
    """From here on the model also takes `pictures`: uint8 pixels [P, 3, height, width] or tower
    features [P, N, H], in the order of their tokens; returns the model.

    A batch without any runs what is trained over a blank picture, with gradients of 0: ranks that
    have one would wait for the others.
    """
    forward = partial(_forward, stock=type(model).forward, normaliser=normaliser)

    @wraps(type(model).forward)  # keeps the signature, which Trainer and generate read
    def patched(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    model.forward = MethodType(patched, model)
    return model


def _forward(self, *args, stock, normaliser: Normaliser, pictures: Tensor | None = None, **kwargs):
    if pictures is None:
        return stock(self, *args, **kwargs)
    if len(pictures):
        seen = as_outputs(project(self, features_of(self, pictures, normaliser)))
        return stock(self, *args, mm_encoder_outputs=seen, **kwargs)
    # before the language model, as with pictures: ranks under ZeRO-3 gather weights in one order
    nothing = _of_nothing(self, pictures, normaliser)
    output = stock(self, *args, **kwargs)
    if output.loss is not None:
        output.loss = output.loss + 0 * nothing
    return output


def _of_nothing(model, pictures: Tensor, normaliser: Normaliser) -> Tensor:
    """A number that depends on tower and projector as the loss of a picture would."""
    if pictures.dtype == torch.uint8:
        nothing = normaliser.blank(pictures.device)
    else:
        nothing = pictures.new_zeros(1, *pictures.shape[1:])
    projected = project(model, features_of(model, nothing, normaliser))
    return projected[0].float().sum()
