"""The two towers of a model while it trains: what moves, adapters, dropped patches, and the forward
that a trainer wraps.

ChineseCLIPModel, CLIPModel, SiglipModel and TwoTowers name their parts alike: text_model,
vision_model, text_projection, visual_projection (SigLIP has none), logit_scale, logit_bias.

B pairs, H width of a tower, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from contrastive import MAX_LOG_SCALE, SIGMOID_BIAS, SIGMOID_LOG_SCALE
from model import Preparation, add_bias, image_features, text_features
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from common import cli
from common.data.files import atomic_file

TOWERS = {"text": "text_model", "image": "vision_model"}
PROJECTIONS = {"text": "text_projection", "image": "visual_projection"}
SCALES = ("logit_scale", "logit_bias")
TRAINED = {  # --train -> the parts that move; the scale always does
    "both": (*TOWERS.values(), *PROJECTIONS.values()),
    "text": (TOWERS["text"], PROJECTIONS["text"]),
    "image": (TOWERS["image"], PROJECTIONS["image"]),
    "projection": tuple(PROJECTIONS.values()),
}
# towers that add their positions before the encoder, so that patches can be left out behind them
MASKABLE = (
    "clip_vision_model",
    "chinese_clip_vision_model",
    "siglip_vision_model",
    "vit",
    "deit",
    "dinov2",
)


def part_of(name: str) -> str:
    """text, image, projection or scale: where a parameter of this name belongs."""
    first = name.split(".")[0]
    for part, tower in TOWERS.items():
        if first == tower:
            return part
    return "projection" if first in PROJECTIONS.values() else "scale"


# ---- what moves ----------------------------------------------------------------------------------


def choose_trained(model, train: str, lora_towers: tuple[str, ...], kind: str) -> None:
    """What is not to move gets no gradient; a tower of which nothing moves stays in eval mode.

    train: a key of TRAINED. lora_towers: those of which only an adapter (add_lora) moves.
    kind: softmax or sigmoid; only the second one has a bias to learn.
    """
    moving = TRAINED[train]
    adapted = [TOWERS[part] for part in lora_towers]
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        moves = first in moving or first in SCALES
        if first in adapted:
            moves = ".lora_" in name
        if first == "logit_bias":
            moves = kind == "sigmoid"
        parameter.requires_grad_(moves)
    for part in frozen_towers(model):
        keep_in_eval(getattr(model, TOWERS[part]))


def frozen_towers(model) -> list[str]:
    """Of text and image those of which nothing moves."""
    return [
        part
        for part, name in TOWERS.items()
        if not any(p.requires_grad for p in getattr(model, name).parameters())
    ]


def keep_in_eval(tower: nn.Module) -> None:
    """Without dropout, also after the train() that a trainer calls in every step."""
    tower.eval()
    tower.train = MethodType(_stay, tower)


def _stay(self, mode: bool = True):
    return self


def freeze_unused(model, preparation: Preparation) -> list[str]:
    """Take the gradient from parameters that no embedding depends on (a pooler, a mask token):
    DistributedDataParallel would wait for theirs, DeepSpeed would let them decay. -> their names.
    """
    moving = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in SCALES
    }
    batch = preparation.tokens(["x"])
    batch["pixel_values"] = preparation.pixels(Image.new("RGB", (32, 32)))[None]
    was_training = model.training
    model.eval()
    found = text_features(model, batch)[0, 0] + image_features(model, batch)[0, 0]
    gradients = torch.autograd.grad(found, list(moving.values()), allow_unused=True)
    model.train(was_training)
    unused = [name for name, g in zip(moving, gradients, strict=True) if g is None]
    for name in unused:
        moving[name].requires_grad_(False)
    return unused


def settle_scale(model, kind: str, is_fresh: bool) -> None:
    """Where the scale and the bias of a loss begin.

    transformers begins a SiglipModel at 0 and 0, and CLIP's classes have no bias: such a model
    learns a sigmoid loss from log 10 and -10, as SigLIP did.
    """
    if kind != "sigmoid":
        return
    if not hasattr(model, "logit_bias"):
        cli.say("note: this model has no bias for a sigmoid loss yet: it begins at log 10 and -10")
        add_bias(model, SIGMOID_BIAS)
        is_fresh = True
    if is_fresh or float(model.logit_scale.detach()) == float(model.logit_bias.detach()) == 0:
        with torch.no_grad():
            model.logit_scale.fill_(SIGMOID_LOG_SCALE)
            model.logit_bias.fill_(SIGMOID_BIAS)


def rates(args, training) -> dict[str, float]:
    """Learning rate of each part (part_of)."""
    own = {
        "text": args.text_learning_rate,
        "image": args.image_learning_rate,
        "projection": args.projection_learning_rate,
        "scale": None,
    }
    return {part: training.learning_rate if rate is None else rate for part, rate in own.items()}


def parameter_groups(model, rate_of: dict[str, float], weight_decay: float) -> list[dict]:
    """For an optimizer: a group for each rate, with and without weight decay. Biases, norms and
    the scale (everything of one dimension) do not decay."""
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = weight_decay if parameter.dim() > 1 else 0.0
        rate = rate_of[part_of(name)]
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


# ---- adapters ------------------------------------------------------------------------------------


def add_lora(model, args) -> None:
    """Low-rank adapters inside the towers that --lora_towers names, and nowhere else.

    They become part of the model, whose scale and projections train beside them; save_merged makes
    one plain folder of all.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = []
    for part in args.lora_towers.split(","):
        layers += adapted_layers(getattr(model, TOWERS[part]), TOWERS[part], args.target_modules)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha or 2 * args.lora_r,
        lora_dropout=args.lora_dropout,
        target_modules=layers,
    )
    inject_adapter_in_model(config, model)


def adapted_layers(tower: nn.Module, prefix: str, names: str) -> list[str]:
    """Full names of the linear layers of a tower that --target_modules means."""
    linear = [name for name, layer in tower.named_modules() if type(layer) is nn.Linear]
    if names != "all-linear":
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        found = [name for name in linear if any(f".{name}".endswith(f".{w}") for w in wanted)]
        if not found:
            known = sorted({name.split(".")[-1] for name in linear})
            raise SystemExit(
                f"--target_modules {names}: no layer of {prefix} is called so; give all-linear or "
                f"some of {','.join(known)}"
            )
        linear = found
    return [f"{prefix}.{name}" for name in linear]


def make_plain(folder: str | Path, numbers: tuple[str, ...], factor: float | None) -> None:
    """Bring the files of a saved model into the form of the plain one: adapters are added to the
    weights that they belong to, and numbers have no dimension (ZeRO-3 writes what it trains).

    numbers: names of weights without a dimension. factor: lora_alpha / r; None: adapters, if there
        are any, stay beside the weights.
    """
    from safetensors.torch import load_file, save_file

    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(file)
        wrong = [name for name in numbers if name in tensors and tensors[name].dim()]
        has_adapters = any(".lora_A." in name for name in tensors)
        if not wrong and (factor is None or not has_adapters):
            continue
        tensors |= {name: tensors[name].reshape(()) for name in wrong}
        if factor is not None:
            tensors = merged(tensors, factor)
        with atomic_file(file) as part:
            save_file(tensors, part, {"format": "pt"})


def merged(tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Weights with adapters beside them -> the weights that do the same."""
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith(".base_layer.weight")]:
        layer = name.removesuffix(".base_layer.weight")
        down = tensors.pop(f"{layer}.lora_A.default.weight").float()
        up = tensors.pop(f"{layer}.lora_B.default.weight").float()
        whole = tensors[name]
        tensors[name] = (whole.float() + factor * up @ down).to(whole.dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}


# ---- dropped patches -----------------------------------------------------------------------------


def drop_patches(tower: nn.Module, ratio: float) -> None:
    """Leave a random share of the patches out while training (FLIP, Li et al. 2023)."""
    hook = partial(_keep_some, ratio, tower.config.patch_size)
    tower.embeddings.register_forward_hook(hook)


def can_drop_patches(config) -> bool:
    return config.model_type in MASKABLE


def _keep_some(ratio: float, size: int, module: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
    """[B, P + n, H] -> [B, P + kept, H], P tokens that are no patches (CLS) first. The positions
    are in the tokens already."""
    if not module.training:
        return tokens
    height, width = args[0].shape[-2:]
    patches = (height // size) * (width // size)
    others = tokens.shape[1] - patches
    kept = max(1, round(patches * (1 - ratio)))
    drawn = torch.rand(len(tokens), patches, device=tokens.device).topk(kept).indices
    places = (drawn + others)[..., None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :others], tokens.gather(1, places)], 1)


# ---- the forward that is trained -----------------------------------------------------------------


def for_training(model):
    """From here on `model(...)` gives what a contrastive loss takes; returns the model.

    It takes input_ids and attention_mask [B, T], pixel_values [B, 3, height, width], or in place of
    either side the vector before the projection, text_pooled and image_pooled [B, H].
    -> {"text_embeds", "image_embeds": normalised [B, E], "scale", "bias"}; with pooled=True the
    vectors before the projection of what was given, under their names.
    """
    model.forward = MethodType(_forward, model)
    model.numbers = give_dimension(model)
    return model


def give_dimension(model) -> tuple[str, ...]:
    """DeepSpeed broadcasts no numbers without a dimension: the scale and the bias get one while
    they train; in files they are as they were. -> their names."""
    numbers = [name for name in SCALES if getattr(model, name, None) is not None]
    numbers = [name for name in numbers if not getattr(model, name).dim()]
    for name in numbers:
        number = getattr(model, name)
        with_one = nn.Parameter(number.detach().reshape(1), requires_grad=number.requires_grad)
        setattr(model, name, with_one)
        model.register_state_dict_post_hook(partial(_take_dimension, name))
        model.register_load_state_dict_pre_hook(partial(_add_dimension, name))
    return tuple(numbers)


def _take_dimension(name: str, module, state_dict: dict, prefix: str, metadata) -> None:
    _reshape(state_dict, prefix + name, ())


def _add_dimension(name: str, module, state_dict: dict, prefix: str, *more) -> None:
    _reshape(state_dict, prefix + name, (1,))


def _reshape(state_dict: dict, name: str, shape: tuple[int, ...]) -> None:
    """A number on another rank (ZeRO-3) is an empty tensor here, and stays one."""
    number = state_dict.get(name)
    if number is not None and number.numel():
        state_dict[name] = number.reshape(shape)


def _forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    text_pooled: Tensor | None = None,
    image_pooled: Tensor | None = None,
    pooled: bool = False,
) -> dict[str, Tensor]:
    found = {"text": text_pooled, "image": image_pooled}
    if input_ids is not None:
        texts = partial(self.get_text_features, input_ids, attention_mask=attention_mask)
        found["text"] = before_projection(self, "text", texts)
    if pixel_values is not None:
        images = partial(self.get_image_features, pixel_values)
        found["image"] = before_projection(self, "image", images)
    if pooled:
        return {f"{part}_pooled": value for part, value in found.items() if value is not None}
    embeds = {
        f"{part}_embeds": F.normalize(project(self, part, value).float(), dim=-1)
        for part, value in found.items()
    }
    # + 0: a bare parameter as an output would be marked ready twice by DistributedDataParallel
    log_scale = self.logit_scale + 0
    # the value within its bounds, the gradient as if there were none: it must find back
    bounded = log_scale + (log_scale.detach().clamp(0, MAX_LOG_SCALE) - log_scale.detach())
    embeds["scale"] = bounded.float().exp().reshape(())
    bias = getattr(self, "logit_bias", None)
    embeds["bias"] = None if bias is None else (bias + 0).float().reshape(())
    return embeds


def before_projection(model, part: str, features: Callable) -> Tensor:
    """What a tower hands to its projection, [B, H], pooled as its class does it."""
    projection = getattr(model, PROJECTIONS[part], None)
    if projection is None:
        return features().pooler_output
    seen: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        features()
    finally:
        hook.remove()
    return seen[0]


def has_projections(config) -> bool:
    """Whether vectors of a model go through layers behind the towers: SigLIP's do not."""
    return config.model_type != "siglip" and getattr(config, "projection", "") != "none"


def project(model, part: str, value: Tensor) -> Tensor:
    """[B, H] -> [B, E]."""
    projection = getattr(model, PROJECTIONS[part], None)
    return value if projection is None else projection(value.to(model.dtype))
