"""What of a run is on disk: exact checkpoints and the finished model.

A checkpoint holds float32 weights, optimizer, scaler, random states, the position in the data and
the trackers' run ids. It counts once complete.json, written last, names every file with its sha256
(common/runs/checkpoint.py).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from stages import lora
from torch import nn

from common import cli, device
from common.runs import checkpoint


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def full_weights(model: nn.Module, engine) -> dict[str, torch.Tensor]:
    """The trained float32 weights by name, on the CPU; with DeepSpeed gathered from all ranks,
    which must all call."""
    if engine is None:
        return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad and (whole := safe_get_full_fp32_param(p)) is not None and cli.is_main():
            found[name] = whole.detach().cpu().clone()
    return found


def write_model(folder: Path, model, tokenizer, base: str, engine=None) -> None:
    """The model (of an adapter its own weights) and tokenizer, ready to be loaded. All ranks call
    it."""
    weights = full_weights(model, engine)
    if cli.is_main():
        if any(True for _ in lora.layers(model)):
            tensors = {lora.PREFIX + name: value for name, value in weights.items()}
            lora.save(model, folder, base, tensors)
        else:
            kept, model.config.use_cache = model.config.use_cache, True
            model.save_pretrained(folder, state_dict=weights)
            model.config.use_cache = kept
        tokenizer.save_pretrained(folder)
    barrier()


def keep_base(base: str, model, tokenizer, training) -> str:
    """The folder of the weights that an adapter belongs to; random ones are saved as
    OUTPUT/base."""
    if Path(base).is_dir() or "/" in base:
        return base
    folder = Path(training.output_dir) / "base"
    write_model(folder, model, tokenizer, base)
    return str(folder)


def random_state() -> dict[str, torch.Tensor]:
    state = {"host": torch.get_rng_state()}
    return state if device.kind() == "cpu" else state | {"device": device.module().get_rng_state()}


def save(
    out: Path,
    model,
    tokenizer,
    base: str,
    parts: dict,
    progress: dict,
    engine,
    facts: dict,
    limit: int,
) -> None:
    """OUT/checkpoint-<step>. All ranks call it.

    parts: optimizer and scaler; facts: step, world_size, engine ... for the marker; limit: whole
        ones that stay.
    """
    folder = out / f"checkpoint-{progress['step']}"
    if cli.is_main():
        shutil.rmtree(folder, ignore_errors=True)  # torn: from a whole one this run had continued
        folder.mkdir(parents=True)
    barrier()
    write_model(folder, model, tokenizer, base, engine)
    if engine is not None:
        engine.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=True)
    elif cli.is_main():
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(states, folder / "training.pt")
    if cli.is_main():
        torch.save(progress, folder / "progress.pt")
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(random_state(), folder / f"random_{rank}.pt")
    barrier()
    if cli.is_main():
        checkpoint.mark_complete(folder, weights_only=False, **facts)
        for old in checkpoint.all_checkpoints(out)[max(1, limit) :]:
            shutil.rmtree(old)
    barrier()


def read_progress(folder: Path) -> dict:
    return torch.load(folder / "progress.pt", map_location="cpu", weights_only=True)


def restore(folder: Path, model, parts: dict, engine, seed: int) -> None:
    """Put back what `save` wrote; with another number of processes random states without a file
    start from `seed`."""
    if engine is not None:
        engine.load_checkpoint(str(folder), tag="zero", load_module_strict=False)
    else:
        file = next(folder.glob("*model.safetensors"))
        weights = {name.removeprefix(lora.PREFIX): value for name, value in load_file(file).items()}
        odd = model.load_state_dict(weights, strict=False).unexpected_keys
        if odd:
            raise SystemExit(f"{file} does not fit the model: {odd[0]}")
        saved = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    restore_random(folder, seed)


def restore_random(folder: Path, seed: int) -> None:
    """This rank's random states; where another number of processes left none, they start from
    `seed` and the step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    file = folder / f"random_{rank}.pt"
    if not file.is_file():
        torch.manual_seed(seed + checkpoint.step_of(folder) + rank)
        return
    state = torch.load(file, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["host"])
    if "device" in state and device.kind() != "cpu":
        device.module().set_rng_state(state["device"])


def save_final(out: Path, model, tokenizer, base: str, name: str, engine) -> Path:
    """OUT/final, which appears whole, and its weights once more under the name that MiniMind gives
    them."""
    part, final = out / "final.part", out / "final"
    if cli.is_main():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    barrier()
    write_model(part, model, tokenizer, base, engine)
    if cli.is_main():
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        named = out / f"{name}.safetensors"
        named.unlink(missing_ok=True)
        weights = next(final.glob("*model.safetensors"))
        try:
            os.link(weights, named)
        except OSError:  # a file system without links
            shutil.copy2(weights, named)
    barrier()
    return final


def new_progress(before: dict) -> dict:
    """Where a run begins; `before`: {"metrics", "samples"} of the untrained model."""
    return {
        "step": 0,
        "epoch": 0,
        "at": 0,
        "tokens": 0,
        "label_tokens": 0,
        "seconds": 0.0,
        "history": [],
        "before": before,
        "trackers": {},
    }
