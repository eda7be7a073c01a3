"""Low-rank adapters (Hu et al. 2021) on every linear layer of the blocks: y = W x + alpha / r * B A
x.

W is frozen; A is random and B zero, so that training starts from the model as it is. Files are in
PEFT's layout: they open with peft on the exported model, and a PEFT adapter of these layers opens
here. The stage is sft.py on few weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from stages.sft import COLUMNS, KIND, encode, loss, metrics  # noqa: F401
from torch import Tensor, nn

PREFIX = "base_model.model."  # PEFT's names begin so
WEIGHTS = "adapter_model.safetensors"


class LoRALinear(nn.Module):
    """A frozen nn.Linear with an adapter of rank r beside it; `on` False leaves the adapter out."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float):
        super().__init__()
        where = base.weight.device
        self.base_layer = base.requires_grad_(False)
        self.scaling = alpha / r
        self.on = True
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=where)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=where)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self.on:
            return y
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        update = self.lora_B(self.lora_A(self.dropout(x)))
        return y + (self.scaling * update).to(y.dtype)


# ---- on a model ----------------------------------------------------------------------------------


def add(model: nn.Module, r: int, alpha: float, dropout: float = 0.0) -> nn.Module:
    """Freeze the model and put an adapter on each linear layer of its blocks but the router.
    Returns the model."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name and not name.endswith("mlp.gate"):
            replace(model, name, LoRALinear(module, r, alpha, dropout))
    return model


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, LoRALinear) of each adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


@contextlib.contextmanager
def switched_off(model: nn.Module):
    """Inside, the model is the frozen one."""
    adapters = [module for _, module in layers(model)]
    try:
        for module in adapters:
            module.on = False
        yield
    finally:
        for module in adapters:
            module.on = True


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add every adapter to its weight and put the plain layer back. Returns the model."""
    for name, module in list(layers(model)):
        weight = module.base_layer.weight
        update = module.scaling * module.lora_B.weight.float() @ module.lora_A.weight.float()
        weight += update.to(weight.dtype)
        replace(model, name, module.base_layer)
    return model


# ---- on disk -------------------------------------------------------------------------------------


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by name."""
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def save(model: nn.Module, folder: Path, base: str, weights: dict | None = None) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT writes them.

    weights: the adapters' tensors by name, unset those that the model holds.
    """
    from peft import LoraConfig

    names, modules = zip(*layers(model), strict=True)
    first = modules[0]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=first.lora_A.out_features,
        base_model_name_or_path=base,
        inference_mode=True,
        lora_alpha=first.scaling * first.lora_A.out_features,
        lora_dropout=first.dropout.p,
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    weights = own_weights(model) if weights is None else weights
    tensors = {PREFIX + name: value.contiguous().cpu() for name, value in weights.items()}
    save_file(tensors, folder / WEIGHTS)


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """A model without adapters -> with the one in `folder`. SystemExit when its layers are not this
    model's."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(folder)
    tensors = load_file(Path(folder, WEIGHTS))
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    add(model, config.r, config.lora_alpha, config.lora_dropout)
    wanted = own_weights(model)
    unfit = sorted(wanted.keys() ^ weights.keys())
    unfit += [
        name for name in wanted if name in weights and wanted[name].shape != weights[name].shape
    ]
    if unfit:
        raise SystemExit(f"{folder} is an adapter of another model: {unfit[0]} does not fit")
    model.load_state_dict(weights, strict=False)
    return model
