"""One process, DistributedDataParallel, or DeepSpeed ZeRO: what differs between them, out of the
loop's way."""

from __future__ import annotations

import contextlib
import copy

import torch
import torch.distributed as dist
from model import SparseFeedForward
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import cli, device


@contextlib.contextmanager
def whole_weights():
    """Inside, loading does not spread weights over ranks although ZeRO-3 is configured: the engine
    does that later."""
    from transformers.integrations import deepspeed as settings

    config = (
        settings._hf_deepspeed_config_weak_ref() if settings._hf_deepspeed_config_weak_ref else None
    )
    settings.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            settings.set_hf_deepspeed_config(config)


def wrap(objective: nn.Module, optimizer, training, dtype: torch.dtype):
    """-> (what to call, DeepSpeed's engine or None)."""
    if training.deepspeed:
        return (zero_engine(objective, optimizer, training, dtype),) * 2
    if training.world_size == 1:
        return objective, None
    where = [training.device.index] if training.device.type != "cpu" else None
    return DistributedDataParallel(objective, device_ids=where), None


def zero_engine(objective: nn.Module, optimizer, training, dtype: torch.dtype):
    """deepspeed.initialize with the file's settings and what the flags say."""
    import deepspeed

    config = copy.deepcopy(training.hf_deepspeed_config.config)
    config |= {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }
    config.pop("train_batch_size", None)
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config[name] = {**config.get(name, {}), "enabled": dtype is kind}
    zero = config["zero_optimization"]
    for name in [key for key, value in zero.items() if value == "auto"]:
        zero.pop(name)  # DeepSpeed's own default
    if zero["stage"] == 3 and any(isinstance(m, SparseFeedForward) for m in objective.modules()):
        deepspeed.utils.set_z3_leaf_modules(
            objective, [SparseFeedForward]
        )  # experts may get no token
    parameters = [p for p in objective.parameters() if p.requires_grad]
    engine = deepspeed.initialize(
        model=objective, optimizer=optimizer, model_parameters=parameters, config=config
    )[0]
    if dtype is torch.float16:
        device.patch_overflow_check(engine.optimizer)
    return engine


def last_of(micro: int, steps: int, net):
    """The context of a forward and backward: DDP exchanges gradients in the last micro-batch of a
    step only."""
    quiet = micro < steps - 1 and isinstance(net, DistributedDataParallel)
    return net.no_sync() if quiet else contextlib.nullcontext()


def backward(engine, scaler, loss: torch.Tensor, micro: int, steps: int) -> None:
    """Gradients of one micro-batch; `loss` is its part of the ranks' mean."""
    if engine is None:
        scaler.scale(loss).backward()
        return
    engine.backward(loss * steps)  # DeepSpeed averages over micro-batches
    if micro < steps - 1:
        engine.step()


def update(engine, optimizer, scaler, trained: list, limit: float) -> None:
    """Clip the gradients and step, unless fp16 overflowed."""
    if engine is not None:
        engine.step()
        return
    scaler.unscale_(optimizer) if scaler.is_enabled() else None
    torch.nn.utils.clip_grad_norm_(trained, limit or float("inf"))
    scaler.step(optimizer) if scaler.is_enabled() else optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def summed(values: dict, where: torch.device) -> dict[str, float]:
    """Each value (tensor or number) added up over the ranks, in float32 (HCCL has no float64)."""
    names = sorted(values)
    numbers = torch.stack(
        [torch.as_tensor(values[name], dtype=torch.float32, device=where) for name in names]
    )
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return dict(zip(names, numbers.tolist(), strict=True))


def largest(value: float, where: torch.device) -> float:
    """The largest of the ranks' values: they must never decide differently."""
    if not dist.is_initialized():
        return value
    number = torch.tensor(value, dtype=torch.float32, device=where)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return number.item()


def refuse_nan(loss: float, step: int) -> None:
    """End before the update when the loss is no number; every rank has the same sum."""
    if loss != loss or loss in (float("inf"), float("-inf")):
        cli.fail(
            f"step {step}: the loss is {loss}; stopped before the update. The last checkpoint is whole: lower "
            "--learning_rate, or --bf16 false for float32"
        )
