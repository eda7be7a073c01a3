"""One process, DistributedDataParallel or DeepSpeed ZeRO: what differs between them, kept out of
the loop."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import cli
from common.runs.engine import patch_overflow_check

SKIPS = 20  # steps in a row that fp16 may leave out: the scale has fallen a million times by then


def barrier() -> None:
    cli.wait_for_all("what rank 0 writes")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def whole_weights():
    """Inside, loading does not spread weights over ranks although ZeRO-3 is configured: the engine
    does that later."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    config = reference() if reference else None
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def wrap(
    module: nn.Module,
    optimizer,
    training,
    dtype: torch.dtype,
    leaf_modules: Sequence[type[nn.Module]] = (),
):
    """-> (what to call for a forward, DeepSpeed's engine or None).

    leaf_modules: classes whose weights ZeRO-3 gathers together, because a forward may leave out
        some of their parts (an expert that gets no token).
    """
    if training.deepspeed:
        engine = zero_engine(module, optimizer, training, dtype, leaf_modules)
        return engine, engine
    if training.world_size == 1:
        return module, None
    cards = None if training.device.type == "cpu" else [training.device.index]
    return DistributedDataParallel(module, device_ids=cards), None


def zero_engine(module: nn.Module, optimizer, training, dtype: torch.dtype, leaf_modules):
    """deepspeed.initialize with the file's settings and what the flags say."""
    import deepspeed

    config = zero_config(training, dtype)
    present = {type(part) for part in module.modules()}
    leaves = [kind for kind in leaf_modules if kind in present]
    if leaves and config["zero_optimization"]["stage"] == 3:
        deepspeed.utils.set_z3_leaf_modules(module, leaves)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=config,
    )
    if dtype is torch.float16:
        patch_overflow_check(engine.optimizer)
    return engine


def zero_config(training, dtype: torch.dtype) -> dict:
    config = copy.deepcopy(training.hf_deepspeed_config.config)
    config |= {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }
    config.pop("train_batch_size", None)
    config["bf16"] = {**config.get("bf16", {}), "enabled": dtype is torch.bfloat16}
    config["fp16"] = {**config.get("fp16", {}), "enabled": dtype is torch.float16}
    zero = config["zero_optimization"]
    # without a value DeepSpeed takes its own default
    config["zero_optimization"] = {k: value for k, value in zero.items() if value != "auto"}
    return config


def sync_in_last(net, micro: int, steps: int):
    """The context of the forward and backward of micro-batch `micro` of `steps`: DDP exchanges
    gradients in the last one only."""
    if micro < steps - 1 and isinstance(net, DistributedDataParallel):
        return net.no_sync()
    return contextlib.nullcontext()


def backward(engine, scaler, loss: torch.Tensor, micro: int, steps: int) -> None:
    """Gradients of one micro-batch; `loss` is its share of the ranks' mean."""
    if engine is None:
        scaler.scale(loss).backward()
        return
    engine.backward(loss * steps)  # DeepSpeed averages over micro-batches
    if micro < steps - 1:
        engine.step()  # counts the micro-batch; weights change in the last one


def update(
    engine, optimizer, scaler, trained: list, max_norm: float, refuse: Callable[[float], None]
) -> None:
    """Clip the gradients (0: not at all) and step, unless fp16 overflowed.

    refuse: ends the run at a norm of the gradients that is not finite, see Gradients.
    """
    if engine is not None:
        engine.step()  # it has stepped when the norm is known; nothing of that is saved
        refuse(float(engine.get_global_grad_norm() or 0.0))
        return
    if scaler.is_enabled():
        scaler.unscale_(optimizer)  # the norm to clip is that of the true gradients
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm or math.inf).item()
    if not scaler.is_enabled():
        refuse(norm)
        optimizer.step()
    elif scaled_step(optimizer, scaler):
        refuse(norm)
    else:
        refuse(math.inf)
    optimizer.zero_grad(set_to_none=True)


def scaled_step(optimizer, scaler) -> bool:
    """A step; False where fp16 overflowed and the scaler left it out. Only its scale tells: where
    an NPU saturates, the gradients of an overflow are finite."""
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


class Gradients:
    """Ends a run whose gradients are not finite: at once, in fp16 after SKIPS steps in a row that
    its scaler left out. Every rank has the same norms."""

    def __init__(self, dtype: torch.dtype):
        self.is_scaled = dtype is torch.float16
        self.skipped = 0  # in a row

    def refuse(self, norm: float, step: int) -> None:
        if math.isfinite(norm):
            self.skipped = 0
            return
        self.skipped += 1
        if not self.is_scaled:
            raise SystemExit(
                f"step {step}: the norm of the gradients is {norm}; stopped, and nothing of this "
                "step is saved. Checkpoints so far are sound: lower --learning_rate, or train in "
                "float32"
            )
        if self.skipped == SKIPS:
            raise SystemExit(
                f"step {step}: fp16 overflowed for the {SKIPS}th step in a row; stopped. Lower "
                "--learning_rate, or train in bf16 or float32"
            )


def summed(values: dict, where: torch.device) -> dict[str, float]:
    """Each value (tensor or number) added up over the ranks, in float32 (HCCL has no float64)."""
    names = sorted(values)
    scalars = [torch.as_tensor(values[name], dtype=torch.float32, device=where) for name in names]
    totals = torch.stack(scalars)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return dict(zip(names, totals.tolist(), strict=True))


def largest(value: float, where: torch.device) -> float:
    """The largest of the ranks' values: they must never decide differently."""
    if not dist.is_initialized():
        return value
    number = torch.tensor(value, dtype=torch.float32, device=where)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return number.item()


def refuse_nan(loss: float, step: int) -> None:
    """End before the update when the loss is not finite; every rank has the same sum."""
    if not math.isfinite(loss):
        cli.fail(
            f"step {step}: the loss is {loss}; stopped before the update. The last checkpoint is "
            "complete: lower --learning_rate, or --bf16 false for float32"
        )
