"""Why the NVIDIA or AMD cards of a machine are not used: a driver older than torch's build, a build
for other cards or without code for the card at hand, cards that a variable hides.

Builds of torch 2.13.0 and their cards: PyTorch's release matrix (RELEASE.md).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_DRIVER = {"12": 525, "13": 580}  # CUDA's major version: the driver it needs on Linux
INDEX = "https://download.pytorch.org/whl"
OLDER = f"pip install torch==2.13.0 --index-url {INDEX}/cu126"  # 5.0 to 9.0, V100 too
USUAL = "pip install torch==2.13.0"  # CUDA 13.0: 7.5 (T4) to 12.0
HIDING = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
AMD_CARDS = Path("/sys/class/kfd/kfd/topology/nodes")
AMD_MEMORY = 7e9  # bytes; less is a chip inside a CPU
AMD = f"pip install torch==2.13.0 --index-url {INDEX}/rocm7.2"
AMD_HIDING = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def driver_version() -> str | None:
    """Of the NVIDIA driver, e.g. "535.183.01"; None where none is loaded."""
    try:
        text = DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else "unknown"


def why_unused() -> str | None:
    """What is wrong and what to do, to go on behind "this machine has an NVIDIA card, but"; None
    where there is no driver of theirs or all visible cards can be used."""
    driver = driver_version()
    if torch.cuda.is_available():
        return card_without_code()
    if driver is None:
        return None
    if hidden_by(HIDING):
        return hidden_by(HIDING)
    built_for = torch.version.cuda
    if built_for is None:
        return (
            f"torch {torch.__version__} is a build without CUDA (driver {driver}): "
            f"{install_line(driver)}"
        )
    needed = OLDEST_DRIVER.get(built_for.split(".")[0], 0)
    if major(driver) < needed:
        return (
            f"its driver {driver} is too old for torch {torch.__version__} (CUDA {built_for}, "
            f"driver {needed} or newer): {install_line(driver)}, or a newer driver"
        )
    return (
        f"torch {torch.__version__} (CUDA {built_for}) sees none behind driver {driver}: ask "
        "nvidia-smi; a container needs --gpus all"
    )


def hidden_by(variables: tuple[str, ...]) -> str | None:
    for name in variables:
        if os.environ.get(name) in ("", "-1", "none", "void"):
            return f"{name}={os.environ[name]!r} hides it: unset {name}"
    return None


def amd_card() -> bool:
    """Whether the kernel knows an AMD card with memory of its own."""
    for file in AMD_CARDS.glob("*/mem_banks/*/properties"):
        try:
            bank = dict(re.findall(r"(\w+) (\d+)", file.read_text(encoding="utf-8")))
        except OSError:
            continue
        in_the_card = bank.get("heap_type", "0") != "0"
        if in_the_card and int(bank.get("size_in_bytes", 0)) > AMD_MEMORY:
            return True
    return False


def why_amd_unused() -> str | None:
    """As why_unused, for AMD's cards."""
    if torch.cuda.is_available() or not amd_card():
        return None
    if torch.version.hip is None:
        return f"torch {torch.__version__} is no build for ROCm: {AMD}"
    return hidden_by(AMD_HIDING) or (
        f"torch {torch.__version__} sees none: this user needs /dev/kfd and /dev/dri (groups "
        "render and video), a container --device /dev/kfd --device /dev/dri"
    )


def install_line(driver: str) -> str:
    """The build of the pinned torch that runs on this driver."""
    if major(driver) >= OLDEST_DRIVER["13"]:
        return USUAL
    if major(driver) >= OLDEST_DRIVER["12"]:
        return OLDER
    return f"update the driver to {OLDEST_DRIVER['12']} or newer, and {OLDER}"


def major(driver: str) -> int:
    number = driver.split(".")[0]
    return int(number) if number.isdigit() else 0


def card_without_code() -> str | None:
    """A visible card that torch's build has no machine code for, in one line."""
    if torch.version.cuda is None:  # ROCm names its chips otherwise
        return None
    built = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not any(runs_on(arch, capability) for arch in built):
            shown = ".".join(map(str, capability))
            return (
                f"{torch.cuda.get_device_name(index)} (capability {shown}) is not among those "
                f"that torch {torch.__version__} is built for ({', '.join(built)}): "
                f"{OLDER if capability < (7, 5) else USUAL}, or DEVICES=... without it"
            )
    return None


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` runs: sm_80 on 8.0 and newer of 8, compute_80 (compiled when it is
    loaded) on all newer."""
    kind, _, number = arch.partition("_")
    digits = re.match(r"\d+", number)
    if not digits:
        return False
    built = (int(digits[0][:-1]), int(digits[0][-1]))
    if kind == "compute":
        return capability >= built
    return capability[0] == built[0] and capability >= built
