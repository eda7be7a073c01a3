"""The only place that knows cuda / npu / cpu. Import it before torch and transformers: it keeps a
broken torch_npu away from them (common/runs/npu_install.py)."""

from __future__ import annotations

import functools
import os
import random
import sys

from common.runs.npu_install import NPU_ERROR, cann_home, npu_hardware

# isort: split
import torch

from common.data.cache import cache_root
from common.runs import card_install

# what torch.compile finds there it runs: not in /tmp, its default, where everybody may put some
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "compiled"))
LOADER_WORKERS = 2  # processes that make batches while an accelerator computes
DDP_TIMEOUT = 600  # seconds that a rank waits for others in a collective, unless --ddp_timeout says


def kind() -> str:
    """npu, cuda or cpu: the device this process trains on. `DANPU_DEVICE` overrides the choice."""
    wanted = os.environ.get("DANPU_DEVICE", "").lower()
    if wanted not in ("", "npu", "cuda", "cpu"):
        raise SystemExit(f"DANPU_DEVICE={wanted!r} is not one of npu, cuda, cpu")
    usable = {
        "npu": NPU_ERROR is None and hasattr(torch, "npu") and torch.npu.is_available(),
        "cuda": torch.cuda.is_available(),
        "cpu": True,
    }
    if wanted and not usable[wanted]:
        found = card_install.why_unused() or card_install.why_amd_unused()
        reasons = {"npu": NPU_ERROR, "cuda": found}
        reason = reasons[wanted] or "no such device is visible"
        raise SystemExit(f"DANPU_DEVICE={wanted} cannot be used: {reason}")
    return wanted or next(name for name, ok in usable.items() if ok)


def module(name: str | None = None):
    """torch.cuda, torch.npu or torch.cpu."""
    return getattr(torch, name or kind())


def device_count() -> int:
    """Visible accelerators; 0 on a CPU-only machine."""
    return 0 if kind() == "cpu" else module().device_count()


def device(local_rank: int | None = None) -> torch.device:
    """This process's device, made current (HCCL refuses two ranks on one card). `local_rank`
    defaults to LOCAL_RANK."""
    if kind() == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if local_rank is None else local_rank
    module().set_device(index)
    return torch.device(kind(), index)


def half_dtype() -> torch.dtype | None:
    """bfloat16 where the hardware computes it, else float16 on an accelerator, else None (train in
    float32)."""
    if kind() == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    real = {"including_emulation": False} if kind() == "cuda" else {}
    return torch.bfloat16 if module().is_bf16_supported(**real) else torch.float16


def train_dtype(training) -> torch.dtype:
    """The dtype a run computes in: what --bf16 and --fp16 say, else float32."""
    if training.bf16:
        return torch.bfloat16
    return torch.float16 if training.fp16 else torch.float32


def length_multiple(dtype: torch.dtype) -> int:
    """Tokens of a packed row are rounded up to a multiple of it: on a CPU each new length compiles
    new kernels for half precision, some milliseconds for each product."""
    return 64 if kind() == "cpu" and dtype is not torch.float32 else 1


def dist_backend() -> str:
    """torch.distributed backend of this device."""
    return {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}[kind()]


def varlen_attention() -> str | None:
    """Library whose variable-length attention kernel runs here: "torch", "torch_npu" (both want a
    chip with bf16)."""
    if half_dtype() is not torch.bfloat16 or torch.version.hip:  # not tried on AMD's cards
        return None
    return {"cuda": "torch", "npu": "torch_npu"}.get(kind())


def compile_pays() -> bool:
    """Whether kernels made by torch.compile are faster than torch's own in any run: on the NVIDIA
    cards that Triton supports (8.0 and newer). Not on NPUs, for which there is no back end; on a
    CPU small networks in half precision gain a third, behind some seconds of a compiler that not
    every machine has: that is for the user to say."""
    is_off = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
    if is_off or kind() != "cuda" or torch.version.hip:  # not tried on AMD's cards
        return False
    return module().get_device_capability() >= (8, 0)


def overflow_saturates() -> bool:
    """Whether an overflow gives the largest number and a sticky flag here instead of inf
    (first-generation NPUs)."""
    return kind() == "npu" and not torch.npu.utils.is_support_inf_nan()


def clear_overflow_flag() -> None:
    """Forget the overflows so far, on a chip that saturates."""
    torch.npu.utils.clear_npu_overflow_flag()


def overflow_flag() -> bool:
    """Whether anything overflowed since the last clearing, on a chip that saturates."""
    return bool(torch.npu.utils.get_npu_overflow_flag())


def autocast(dtype: torch.dtype):
    """Autocast context for `dtype`, a no-op for float32. SystemExit where bf16 is not supported."""
    if dtype is torch.bfloat16 and kind() != "cpu" and half_dtype() is not torch.bfloat16:
        raise SystemExit(
            f"{name()} has no bf16: train in fp16 (autocast would silently run in float32)"
        )
    return torch.autocast(kind(), dtype=dtype, enabled=dtype is not torch.float32)


def grad_scaler(dtype: torch.dtype):
    """Gradient scaler, active for float16 on accelerators. torch_npu's own class, since torch's
    lets the ranks of a saturating NPU (910A) drift apart after an overflow."""
    enabled = dtype is torch.float16 and kind() != "cpu"
    if kind() == "npu":
        return module().amp.GradScaler(enabled=enabled)
    return torch.amp.GradScaler(kind(), enabled=enabled)


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
    models = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    model = models[0] if models else "CPU"
    return f"{model} ({os.cpu_count()} cores{', bf16' if half_dtype() else ''})"


@functools.cache
def cpu_vendor() -> str:
    """As the CPU names it, "GenuineIntel" or "AuthenticAMD"; "" where it does not."""
    told = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("vendor_id")]
    return told[0] if told else ""


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError:
        return []


def training_defaults(training_args_given: set[str]) -> dict:
    """Settle what libraries guess wrongly, before TrainingArguments are built.

    Args:
        training_args_given: flag names the user typed; those are left alone.
    Returns:
        defaults for TrainingArguments on this device: use_cpu, bf16/fp16, optim, ddp_backend,
        ddp_timeout, dataloader_num_workers.
    """
    here = kind()
    half = half_dtype()
    defaults: dict = {"use_cpu": here == "cpu", "ddp_timeout": DDP_TIMEOUT}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        defaults["ddp_backend"] = dist_backend()
    if not {"bf16", "fp16"} & training_args_given:
        defaults |= {"bf16": half is torch.bfloat16, "fp16": half is torch.float16}
    if here != "cpu":
        # not persistent: a resumed run would draw other random numbers from the second epoch on
        defaults["dataloader_num_workers"] = LOADER_WORKERS
    if here == "npu":
        defaults["optim"] = "adamw_torch"  # why not a fused one: `unsupported_flags`
        home = cann_home()
        if home:  # DeepSpeed's NPU back end fails with a KeyError without it
            os.environ.setdefault("ASCEND_HOME_PATH", home)
    if here == "cpu":
        # without it DeepSpeed takes an NPU whose driver is absent, and compiles a shared-memory op
        # for minutes
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return defaults


def limit_collectives(seconds: int) -> None:
    """Let HCCL, too, give up a collective after --ddp_timeout; what the user has exported stays."""
    if kind() == "npu":
        os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(seconds))


def unsupported_flags(flags) -> str | None:
    """What the flags (bf16, fp16, optim, torch_compile, deepspeed) ask for that this device gets
    wrong, else None."""
    if kind() == "cpu":
        return None
    optim = str(getattr(flags.optim, "value", flags.optim))
    if flags.bf16 and half_dtype() is not torch.bfloat16:
        return f"--bf16 true: {name()} has no bf16. Leave the flag away, or --fp16 true"
    if kind() != "npu":
        return None
    if optim == "adamw_torch_npu_fused":
        # it keeps a flat copy of the gradients that Trainer's zero_grad(set_to_none=True) cuts off
        return (
            "--optim adamw_torch_npu_fused repeats the first step's gradients under Trainer. "
            "Use --optim adamw_torch"
        )
    if flags.fp16 and "fused" in optim and not flags.deepspeed:
        # torch_npu's scaler hands it an argument that its step() does not take
        return f"--optim {optim} crashes with fp16 on an NPU. Use --optim adamw_torch"
    if flags.deepspeed and not os.environ.get("ASCEND_HOME_PATH"):
        return "--deepspeed on an NPU needs ASCEND_HOME_PATH: source CANN's set_env.sh"
    if flags.torch_compile:
        return (
            "--torch_compile true: the default back end cannot compile for an NPU. "
            "Leave the flag away"
        )
    return None


def install_problem() -> tuple[str, bool]:
    """What to tell about devices that are there and not used ("" if nothing), and whether that must
    end the run."""
    chosen = bool(os.environ.get("DANPU_DEVICE"))
    if NPU_ERROR is not None and npu_hardware() and kind() == "cpu" and not chosen:
        return f"launch: this machine has an NPU, but {NPU_ERROR} (or DANPU_DEVICE=cpu)", True
    asked = {"NVIDIA": card_install.why_unused, "AMD": card_install.why_amd_unused}
    for whose, why in asked.items():
        unused = None if kind() == "npu" or (chosen and kind() == "cpu") else why()
        if unused:
            card = f"launch: this machine has an {whose} card"
            return f"{card}, but {unused} (or DANPU_DEVICE=cpu)", True
    if NPU_ERROR is not None:
        return f"torch_npu is installed but unusable ({NPU_ERROR}); continuing without it", False
    if sys.modules.get("torch_npu") and kind() == "cpu":
        remedy = "A container needs --device /dev/davinci0"
        return f"torch_npu sees no NPU; continuing on the CPU. {remedy}", False
    return "", False


def main() -> int:
    """`python -m common.device` prints "<kind> <count>"; 1 when a device is there and cannot be
    used."""
    message, fatal = install_problem()
    if message:
        print(message, file=sys.stderr)
    if not fatal:
        print(kind(), device_count())
    return int(fatal)


if __name__ == "__main__":
    sys.exit(main())
