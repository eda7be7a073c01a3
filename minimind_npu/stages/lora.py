"""Low-rank adapters (Hu et al. 2021) on every linear layer of the blocks: y = W x + alpha / r * B A
x.

W is frozen; A is random and B zero, so that training starts from the model as it is. Files are in
PEFT's layout: they open with peft on the exported model, and a PEFT adapter of these layers opens
here. The stage is sft.py on few weights.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from stages.sft import COLUMNS, KIND, encode, loss, metrics  # noqa: F401
from torch import Tensor, nn

PREFIX = "base_model.model."  # PEFT's names begin so


class LoRALinear(nn.Module):
    """A frozen nn.Linear with an adapter of rank r beside it; `on` False leaves the adapter out."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer, self.scaling, self.on = base.requires_grad_(False), alpha / r, True
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=base.weight.device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self.on:
            return y
        kind = x.device.type
        low = self.dropout(x if torch.is_autocast_enabled(kind) else x.to(self.lora_A.weight.dtype))
        return y + (self.scaling * self.lora_B(self.lora_A(low))).to(y.dtype)


def add(model: nn.Module, r: int, alpha: float, dropout: float = 0.0) -> nn.Module:
    """Freeze the model and put an adapter on each linear layer of its blocks but the router.
    Returns the model."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name and not name.endswith("mlp.gate"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module, r, alpha, dropout))
    return model


def layers(model: nn.Module):
    """(name, LoRALinear) of each adapter."""
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)
    )


@contextlib.contextmanager
def switched_off(model: nn.Module):
    """Inside, the model is the frozen one."""
    found = [module for _, module in layers(model)]
    try:
        for module in found:
            module.on = False
        yield
    finally:
        for module in found:
            module.on = True


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add every adapter to its weight and put the plain layer back. Returns the model."""
    for name, module in list(layers(model)):
        weight = module.base_layer.weight
        weight += (module.scaling * module.lora_B.weight.float() @ module.lora_A.weight.float()).to(
            weight.dtype
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.base_layer)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under PEFT's names."""
    return {f"{PREFIX}{n}": p.detach() for n, p in model.named_parameters() if ".lora_" in n}


def save(model: nn.Module, folder: Path, base: str, tensors: dict | None = None) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT writes them."""
    from peft import LoraConfig

    names, first = zip(*layers(model), strict=True)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=first[0].lora_A.out_features,
        base_model_name_or_path=base,
        inference_mode=True,
        lora_alpha=first[0].scaling * first[0].lora_A.out_features,
        lora_dropout=first[0].dropout.p,
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = state(model) if tensors is None else tensors
    save_file(
        {name: t.contiguous().cpu() for name, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """A model without adapters -> with the one in `folder`. SystemExit when its layers are not this
    model's."""
    from peft import LoraConfig

    config, tensors = (
        LoraConfig.from_pretrained(folder),
        load_file(Path(folder, "adapter_model.safetensors")),
    )
    add(model, config.r, config.lora_alpha, config.lora_dropout)
    wanted = state(model)
    if wanted.keys() != tensors.keys() or any(
        wanted[n].shape != t.shape for n, t in tensors.items()
    ):
        odd = sorted(wanted.keys() ^ tensors.keys())[:1] or ["its shapes"]
        raise SystemExit(f"{folder} is an adapter of another model: {odd[0]} does not fit")
    model.load_state_dict(
        {name.removeprefix(PREFIX): t for name, t in tensors.items()}, strict=False
    )
    return model
