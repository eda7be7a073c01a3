"""How a run is spread over processes: one, DistributedDataParallel or DeepSpeed ZeRO."""

from __future__ import annotations

import logging
import os
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common import device, voice
from common.runs import heartbeat, machine

SAY_BUILD_AFTER = 3  # seconds; an optimizer that lies there compiled takes one


def engine(args) -> str:
    """ "zero-2", "zero-3", "ddp" or "single": how the optimizer state is laid out over ranks."""
    config = deepspeed_config(args)
    if config is not None:
        return f"zero-{config.get('zero_optimization', {}).get('stage', 0)}"
    return "ddp" if args.world_size > 1 else "single"


def deepspeed_config(args) -> dict | None:
    """DeepSpeed's settings, from --deepspeed or from `accelerate launch`; None without it."""
    config = getattr(args, "hf_deepspeed_config", None)
    plugin = getattr(args, "deepspeed_plugin", None)
    if config is None and plugin is not None:  # from `accelerate launch`
        config = plugin.hf_ds_config
    return None if config is None else config.config


def load_dtype(training, trains_all: bool) -> torch.dtype:
    """The dtype to load a model in: float32 where these weights are the masters of a run that
    trains them all (one process, DDP), else the one that it computes in.

    DeepSpeed makes float32 masters of its own, and from the half dtype: a float32 copy in every
    rank would only be thrown away. What is loaded as it is stored stays a mapped file, which the
    ranks share.
    """
    own_masters = trains_all and not engine(training).startswith("zero")
    return torch.float32 if own_masters else device.train_dtype(training)


def prepare_deepspeed(timeout: int = device.DDP_TIMEOUT) -> None:
    """Import DeepSpeed so that no start compiles for minutes on a CPU, or waits for a killed build.

    timeout: seconds, of the process group's collectives.
    """
    remove_stale_build_locks()
    import deepspeed

    if os.environ.get("DANPU_VERBOSE") != "1":
        deepspeed.utils.logger.setLevel(logging.ERROR)
    if device.kind() != "cpu":
        return
    # an optional op that takes minutes to compile
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" in os.environ:
        deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=timeout))


def build_cpu_optimizer(training) -> None:
    """Compile what DeepSpeed offloads the optimizer to, once on a machine, before anything is read:
    DeepSpeed itself does it without a word when the model is loaded. All ranks call it."""
    config = deepspeed_config(training) or {}
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    optimizer = config.get("optimizer") or {}
    is_adam = str(optimizer.get("type")).lower() in ("adam", "adamw")
    of_torch = optimizer.get("params", {}).get("torch_adam", False)
    if offload.get("device", "none") == "none" or not is_adam or of_torch:
        return
    from deepspeed.ops.op_builder import CPUAdamBuilder

    line = (
        "DeepSpeed compiles its CPU Adam, once on this machine: a minute or two, more where "
        "other work is done"
    )
    later = threading.Timer(SAY_BUILD_AFTER, voice.say, [line])
    later.daemon = True
    later.start()
    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(
            "the settings of --deepspeed offload the optimizer, and DeepSpeed could not compile "
            "its CPU Adam. It needs a C++ compiler (apt-get install g++) and ninja "
            f"(pip install ninja): {reason}"
        ) from None
    finally:
        later.cancel()
    heartbeat.wait_for_all("it compiles DeepSpeed's CPU Adam")


def remove_stale_build_locks() -> None:
    """A killed build of DeepSpeed's operators leaves a lock that the next start would wait for,
    for ever."""
    for lock in machine.stale_build_locks():
        Path(lock).unlink(missing_ok=True)
        voice.say(f"removed {lock}, left by a killed build; DeepSpeed would wait for it for ever")


def open_cpu_group(timeout: int) -> None:
    """The process group of several ranks on a CPU: opened by transformers it would ignore
    --ddp_timeout and wait for half an hour.

    timeout: seconds, of its collectives.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if device.kind() == "cpu" and not is_alone and not dist.is_initialized():
        dist.init_process_group(device.dist_backend(), timeout=timedelta(seconds=timeout))


def patch_overflow_check(optimizer) -> None:
    """Let DeepSpeed's fp16 `optimizer` see overflows of a saturating NPU; it looks for inf and NaN
    only.

    As in torch_npu's own scaler the flag is cleared before the first backward of a step and read
    before the update, and an overflow on one rank counts on all.
    """
    if not device.overflow_saturates():
        return
    if not hasattr(optimizer, "has_overflow"):
        raise SystemExit(
            f"fp16 overflow on {device.name()} is seen in ZeRO stages 1 to 3 only: "
            "set the stage in --deepspeed"
        )
    stock_scale = optimizer.scale_if_loss
    stock_check = optimizer.has_overflow
    cleared = False

    def scale_if_loss(value):
        nonlocal cleared
        if not cleared:
            device.clear_overflow_flag()
            cleared = True
        return stock_scale(value)

    def has_overflow(*args, **kwargs):
        nonlocal cleared
        flag = torch.tensor(float(device.overflow_flag()), device=device.device())
        cleared = False
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return stock_check(*args, **kwargs) or bool(flag.item())

    optimizer.scale_if_loss = scale_if_loss
    optimizer.has_overflow = has_overflow
