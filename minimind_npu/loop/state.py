"""What of a run is on disk: exact checkpoints and the finished model.

A checkpoint holds float32 weights, optimizer, scaler, random states and `progress` (the position in
the data, the losses, the trackers' run ids). It counts once complete.json, written last, names
every file with its sha256 (common/runs/checkpoint.py). How a model is written is the caller's:
`write_model(folder)`, which all ranks call.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from loop.parallel import barrier, rank
from safetensors.torch import load_file
from torch import nn

from common import cli, device
from common.data.files import atomic_folder
from common.runs import checkpoint
from common.runs.engine import engine as engine_name

# ---- weights -------------------------------------------------------------------------------------


def full_weights(model: nn.Module, engine=None) -> dict[str, torch.Tensor]:
    """The trained float32 weights by name, on the CPU of rank 0; with DeepSpeed gathered from all
    ranks, which must all call."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if engine is None:
        return {name: p.detach().cpu() for name, p in trained.items()}
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, p in trained.items():
        full = safe_get_full_fp32_param(p)
        if full is not None and cli.is_main():
            weights[name] = full.detach().cpu().clone()
    return weights


def load_weights(model: nn.Module, folder: Path, prefix: str) -> None:
    """The tensors of a folder into the model; `prefix` may stand before their names."""
    for file in folder.glob("*.safetensors"):
        weights = {name.removeprefix(prefix): value for name, value in load_file(file).items()}
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
        if unexpected:
            raise SystemExit(f"{file} does not fit the model: {unexpected[0]}")


def save_final(out: str | Path, write_model: Callable[[Path], None]) -> Path:
    """OUT/final, which appears complete, or not at all where its weights are not finite. All ranks
    call it."""
    final = Path(out, "final")
    writes = cli.is_main()
    with atomic_folder(final) if writes else nullcontext(f"{final}.part") as part:
        barrier()
        write_model(Path(part))
        barrier()
        if writes:
            checkpoint.refuse_not_finite(part)
    barrier()
    return final


# ---- checkpoints ---------------------------------------------------------------------------------


def save(
    training, write_model: Callable[[Path], None], stateful: dict, engine, progress: dict
) -> None:
    """OUT/checkpoint-<step>. All ranks call it.

    training: TrainingArguments, or what has their output_dir, world_size and save_total_limit.
    stateful: {"optimizer", "scaler"}, which have a state_dict; engine: DeepSpeed's, or None.
    """
    step = progress["step"]
    out = Path(training.output_dir)
    folder = out / f"checkpoint-{step}"
    if cli.is_main():
        # an incomplete one: this run has continued from one before it
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    barrier()
    write_model(folder)
    if engine is not None:
        engine.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=True)
    elif cli.is_main():
        states = {name: one.state_dict() for name, one in stateful.items()}
        torch.save(states, folder / "training.pt")
    if cli.is_main():
        torch.save(progress, folder / "progress.pt")
    torch.save(random_state(), folder / f"random_{rank()}.pt")
    barrier()
    if cli.is_main():
        checkpoint.mark_complete(
            folder,
            weights_only=False,
            step=step,
            world_size=training.world_size,
            engine=engine_name(training),
        )
        checkpoint.rotate(out, max(1, training.save_total_limit or 1), step)
    barrier()


def restore(
    folder: Path, model: nn.Module, stateful: dict, engine, seed: int, prefix: str = ""
) -> None:
    """Put back what `save` wrote but the progress; see load_weights and restore_random."""
    if engine is not None:
        engine.load_checkpoint(str(folder), tag="zero", load_module_strict=False)
    else:
        load_weights(model, folder, prefix)
        states = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        for name, one in stateful.items():
            one.load_state_dict(states[name])
    restore_random(folder, seed)


# ---- random states -------------------------------------------------------------------------------


def random_state() -> dict[str, torch.Tensor]:
    state = {"host": torch.get_rng_state()}
    if device.kind() != "cpu":
        state["device"] = device.module().get_rng_state()
    return state


def restore_random(folder: Path, seed: int) -> None:
    """This rank's random states; where another number of processes left none, they start from
    `seed` and the step."""
    file = folder / f"random_{rank()}.pt"
    if not file.is_file():
        torch.manual_seed(seed + checkpoint.step_of(folder) + rank())
        return
    state = torch.load(file, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["host"])
    if "device" in state and device.kind() != "cpu":
        device.module().set_rng_state(state["device"])


# ---- progress ------------------------------------------------------------------------------------


def new_progress(before: dict) -> dict:
    """Where a run begins; `before`: {"metrics", "samples"} of the untrained model."""
    return {
        "step": 0,
        "epoch": 0,
        "at": 0,  # windows taken of this epoch by all processes
        "tokens": 0,
        "label_tokens": 0,
        "seconds": 0.0,
        "history": [],
        "before": before,
        "trackers": {},
    }


def read_progress(folder: Path) -> dict:
    return torch.load(folder / "progress.pt", map_location="cpu", weights_only=True)
