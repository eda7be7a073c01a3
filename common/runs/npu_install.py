"""Import torch with or without torch_npu, never with a broken one. Import this before torch.

A torch_npu wheel without a working CANN makes `import torch` itself fail (its autoload hook) and
transformers imports torch_npu unguarded; importing this module first turns such an install into one
clear line (NPU_ERROR) and a normal CPU/CUDA run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import warnings

# Importing this module changes the environment and sys.modules, on purpose: torch must not load a
# broken torch_npu by itself, and afterwards no library may find one.
_wanted = os.environ.get("DANPU_DEVICE", "").lower()
_autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
if "torch" not in sys.modules:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch  # noqa: F401

from common.runs import machine

CANN_PLACES = (
    "/usr/local/Ascend/cann",
    "/usr/local/Ascend/ascend-toolkit/latest",
    "~/Ascend/ascend-toolkit/latest",
)


def cann_home() -> str | None:
    """CANN's folder: what its set_env.sh exported, else the first of its usual places that
    exists."""
    exported = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    return exported or next(filter(os.path.isdir, map(os.path.expanduser, CANN_PLACES)), None)


def npu_hardware() -> bool:
    """Whether the Ascend driver shows a card to this machine (or container)."""
    return bool(machine.ascend_cards())


def _version_mismatch() -> ImportError | None:
    """torch_npu works with the torch of its own version only."""
    try:
        torch_version = importlib.metadata.version("torch").split("+")[0]
        npu_version = importlib.metadata.version("torch-npu").split("+")[0]
    except importlib.metadata.PackageNotFoundError:  # built from source: its import will tell
        return None
    wanted = npu_version.split(".post")[0].split("rc")[0]
    if torch_version.split(".post")[0].split("rc")[0] == wanted:
        return None
    return ImportError(
        f"torch-npu {npu_version} belongs to torch {wanted}, and torch is {torch_version}: "
        "pip install -r requirements-npu.txt"
    )


def _load_torch_npu() -> Exception | None:
    """Import torch_npu if it is installed; what stands in the way, in one line with the remedy,
    else None."""
    if importlib.util.find_spec("torch_npu") is None or _wanted in machine.WITHOUT_NPU:
        return None
    mismatch = _version_mismatch()
    if mismatch:
        return mismatch
    try:
        with warnings.catch_warnings():  # it changes the filters of the whole process
            import torch_npu  # noqa: F401
    except Exception as error:
        words = " ".join(str(error).split())
        if "cannot open shared object" not in words and "ASCEND" not in words:
            return error  # for instance a second accelerator
        place = cann_home() or CANN_PLACES[0]
        remedy = f"source {os.path.join(place.removesuffix('/latest'), 'set_env.sh')}"
        if not cann_home():
            remedy = f"install CANN and then {remedy}"
        return ImportError(f"CANN is missing or its environment is not set ({words}): {remedy}")
    return None


NPU_ERROR: Exception | None = _load_torch_npu()
"""Why an installed torch_npu cannot be used; None when it works or is not installed."""
if NPU_ERROR is not None or _wanted in machine.WITHOUT_NPU:
    for _name in [name for name in sys.modules if name.split(".")[0] == "torch_npu"]:
        del sys.modules[_name]
    sys.modules["torch_npu"] = (
        None  # transformers, peft, accelerate and deepspeed now see "not installed"
    )
if _autoload is None:
    os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
else:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload
