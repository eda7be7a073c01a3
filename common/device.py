"""The only place that knows cuda / npu / cpu. Import it before torch and transformers.

A torch_npu wheel without a working CANN makes `import torch` itself fail (its autoload hook) and transformers imports
torch_npu unguarded; importing this module first turns such an install into one clear line and a normal CPU/CUDA run.
"""

from __future__ import annotations

import os
import random
import sys

_autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
if "torch" not in sys.modules:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch

NPU_ERROR: Exception | None = None
"""Why an installed torch_npu cannot be used; None when it works or is not installed."""
try:
    import torch_npu  # noqa: F401
except ModuleNotFoundError as error:
    NPU_ERROR = None if error.name == "torch_npu" else error
except Exception as error:  # missing libhccl.so, a second accelerator, a version that does not match torch
    NPU_ERROR = error
if NPU_ERROR is not None:
    for _name in [name for name in sys.modules if name.split(".")[0] == "torch_npu"]:
        del sys.modules[_name]
    sys.modules["torch_npu"] = None  # transformers, peft, accelerate and deepspeed now see "not installed"
if _autoload is None:
    os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
else:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload


def kind() -> str:
    """npu, cuda or cpu: the device this process trains on. `DANPU_DEVICE` overrides the choice."""
    wanted = os.environ.get("DANPU_DEVICE", "").lower()
    if wanted not in ("", "npu", "cuda", "cpu"):
        raise SystemExit(f"DANPU_DEVICE={wanted!r} is not one of npu, cuda, cpu")
    usable = {"npu": hasattr(torch, "npu") and torch.npu.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if wanted and not usable[wanted]:
        reason = NPU_ERROR if wanted == "npu" and NPU_ERROR else "no such device is visible"
        raise SystemExit(f"DANPU_DEVICE={wanted} cannot be used: {reason}")
    return wanted or next(name for name, ok in usable.items() if ok)


def module(name: str | None = None):
    """torch.cuda, torch.npu or torch.cpu."""
    return getattr(torch, name or kind())


def device_count() -> int:
    """Visible accelerators; 0 on a CPU-only machine."""
    return 0 if kind() == "cpu" else module().device_count()


def device(local_rank: int | None = None) -> torch.device:
    """This process's device, made current (HCCL refuses two ranks on one card). `local_rank` defaults to LOCAL_RANK."""
    if kind() == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if local_rank is None else local_rank
    module().set_device(index)
    return torch.device(kind(), index)


def half_dtype() -> torch.dtype | None:
    """bfloat16 where the hardware computes it, else float16 on an accelerator, else None (train in float32)."""
    if kind() == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    supported = (
        module().is_bf16_supported(including_emulation=False) if kind() == "cuda" else module().is_bf16_supported()
    )
    return torch.bfloat16 if supported else torch.float16


def dist_backend() -> str:
    """torch.distributed backend of this device."""
    return {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}[kind()]


def compile_pays() -> bool:
    """Whether torch.compile works and repays its start-up here (inductor has no NPU back end in the pinned stack)."""
    return kind() == "cuda"


def supports_4bit() -> bool:
    """Whether bitsandbytes' 4-bit kernels run here."""
    return kind() == "cuda"


def supports_varlen_attention() -> bool:
    """Whether torch's variable-length attention kernel runs here (a CUDA card with bf16)."""
    return kind() == "cuda" and half_dtype() is torch.bfloat16


def autocast(dtype: torch.dtype):
    """Autocast context for `dtype`; float32 gives one that does nothing. SystemExit where bf16 is not supported."""
    if dtype is torch.bfloat16 and kind() != "cpu" and half_dtype() is not torch.bfloat16:
        raise SystemExit(f"{name()} has no bf16: use --fp16 true (autocast would silently run in float32)")
    return torch.autocast(kind(), dtype=dtype, enabled=dtype is not torch.float32)


def grad_scaler(dtype: torch.dtype):
    """Gradient scaler, active for float16 on accelerators. torch_npu's own class, since torch's lets the ranks of a
    saturating NPU (910A) drift apart after an overflow."""
    enabled = dtype is torch.float16 and kind() != "cpu"
    return (
        module().amp.GradScaler(enabled=enabled) if kind() == "npu" else torch.amp.GradScaler(kind(), enabled=enabled)
    )


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch (every device)."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def name() -> str:
    """Human name of the device, e.g. "NVIDIA H100" or "CPU (Intel Xeon, 8 cores, bf16)"."""
    if kind() != "cpu":
        return module().get_device_name(0)
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "CPU")
    return f"{model} ({os.cpu_count()} cores{', bf16' if half_dtype() else ''})"


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.read().splitlines()
    except OSError:
        return []


def peak_memory_mb() -> float:
    """Peak memory of this process in MiB: of the device's allocator, or resident memory on CPU."""
    if kind() != "cpu":
        return module().max_memory_allocated() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def total_memory_mb() -> float:
    """Memory of this process's device (of the machine on CPU) in MiB."""
    if kind() != "cpu":
        return module().get_device_properties(0).total_memory / 2**20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def prepare(training_args_given: set[str]) -> dict:
    """Settle what libraries guess wrongly, before TrainingArguments are built.

    Args:
        training_args_given: flag names the user typed; those are left alone.
    Returns:
        defaults for TrainingArguments on this device: use_cpu, bf16/fp16, optim, ddp_backend.
    """
    here, half = kind(), half_dtype()
    defaults: dict = {"use_cpu": here == "cpu"}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        defaults["ddp_backend"] = dist_backend()
    if not {"bf16", "fp16"} & training_args_given:
        defaults |= {"bf16": half is torch.bfloat16, "fp16": half is torch.float16}
    if here == "npu":
        # fused AdamW and fp16 crash together in torch_npu, and its own fused optimizer trains on stale gradients
        defaults["optim"] = "adamw_torch"
    if here == "cpu":
        # without it DeepSpeed takes an NPU whose driver is absent, and compiles a shared-memory op for minutes
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return defaults


if __name__ == "__main__":  # `python -m common.device`: "<kind> <count>", read by launch.sh
    if NPU_ERROR is not None:
        print(f"torch_npu is installed but unusable ({NPU_ERROR}); continuing without it", file=sys.stderr)
    print(kind(), device_count())
