"""A simulated Ascend NPU for tests: torch_npu as published, on a CANN that computes on the CPU. Not Huawei software.

    python tests/npu_sim/simulator.py                               # build once, say how to use it
    python tests/npu_sim/simulator.py --soc Ascend910A --devices 2 -- bash train_qwen/train_zero2.sh
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

BANNER = "[npu-sim] SIMULATED"
"""What every process that touches a simulated NPU prints on stderr, once."""

HERE = Path(__file__).resolve().parent
SOURCES = ("build.sh", "cann.cpp", "kernels.cpp")


def environment(soc: str = "Ascend910B2", devices: int = 2, **extra) -> dict[str, str]:
    """Variables to lay over os.environ so that a child process sees a simulated NPU (builds on first use).

    Args:
        soc: chip as CANN names it, e.g. Ascend910B2 (bf16) or Ascend910A (fp16 only, saturates on overflow).
        devices: number of NPUs. Further keywords become variables too and win.
    """
    toolkit = build()
    script = f'source "{toolkit}/ascend-toolkit/set_env.sh" && env -0'
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BASH_FUNC_")}
    printed = subprocess.run(["bash", "-c", script], env=clean, check=True, capture_output=True, text=True).stdout
    sourced = dict(pair.split("=", 1) for pair in printed.split("\0") if "=" in pair)
    changed = {k: v for k, v in sourced.items() if clean.get(k) != v and k not in ("_", "SHLVL", "PWD", "OLDPWD")}
    # this Python stays the first one behind npu-smi
    changed["PATH"] = f"{toolkit / 'bin'}:{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    changed |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(torch_npu_folder()), os.environ.get("PYTHONPATH")])),
        "NPU_SIM_SOC": soc,
        "NPU_SIM_DEVICES": str(devices),
        "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",  # an operator without an NPU kernel is an error, not a silent CPU run
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    return changed | {name: str(value) for name, value in extra.items()}


def build() -> Path:
    """The folder of the compiled simulator; made on first use, safe with several processes at once.

    Errors: RuntimeError with the reason when pip cannot fetch torch_npu or the compiler fails.
    """
    _install_torch_npu()
    digest = hashlib.sha256(f"{importlib.metadata.version('torch')} {platform.machine()}".encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    command = ["bash", str(HERE / "build.sh"), sys.executable]
    return _made_once(cache() / f"cann-{digest.hexdigest()[:12]}", command, "compiling the simulated CANN")


def torch_npu_folder() -> Path:
    """Where the torch_npu wheel is unpacked: beside the environment, since without a CANN it breaks `import torch`."""
    version = importlib.metadata.version("torch").split("+")[0]
    return cache() / f"torch_npu-{version}-py{sys.version_info[0]}{sys.version_info[1]}"


def _install_torch_npu() -> Path:
    folder = torch_npu_folder()
    version = folder.name.split("-")[1]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"torch-npu=={version}", "--target"]
    return _made_once(folder, command, f"fetching torch-npu {version}")


def cache() -> Path:
    """NPU_SIM_CACHE, ~/.cache/danpu/npu_sim, or a private folder under the temporary one where there is no home."""
    if chosen := os.environ.get("NPU_SIM_CACHE"):
        return Path(chosen).absolute()
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and os.access(home, os.W_OK):
        return home / ".cache" / "danpu" / "npu_sim"
    folder = Path(tempfile.gettempdir()) / f"danpu-npu_sim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():  # libraries are loaded from it
        raise RuntimeError(f"npu_sim: {folder} belongs to somebody else; set NPU_SIM_CACHE to a folder of yours")
    return folder


def _made_once(folder: Path, command: list[str], what: str) -> Path:
    """`folder`, made by `command <temporary folder>` and renamed when whole. RuntimeError with the command's words."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / "lock"):
        if folder.is_dir():  # another process was faster
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            print(f"npu_sim: {what} (once, into {folder.parent})", file=sys.stderr, flush=True)
            done = subprocess.run([*command, str(unfinished)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"npu_sim: {what} failed: {_reason(done)}")
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(done: subprocess.CompletedProcess) -> str:
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "not found" in line]
    return (telling or lines or [f"exit code {done.returncode}"])[0][:500]


def main() -> None:
    parser = argparse.ArgumentParser(description="A simulated Ascend NPU, for tests. Not Huawei software.")
    parser.add_argument("--soc", default="Ascend910B2", help="Ascend910B2 (bf16), Ascend910A (fp16 only), ...")
    parser.add_argument("--devices", type=int, default=2, help="number of NPUs")
    parser.add_argument("command", nargs="*", help="after --: a command to run on the simulated NPU")
    args = parser.parse_args()
    try:
        overlay = environment(args.soc, args.devices)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    if args.command:
        os.execvpe(args.command[0], args.command, os.environ | overlay)
    print(f"simulated CANN: {build()}\ntorch_npu:      {torch_npu_folder()}\n")
    print("run a command on it:  python tests/npu_sim/simulator.py --soc Ascend910A --devices 2 -- npu-smi info")
    print("or in a shell:        source <(python tests/npu_sim/simulator.py -- export -p)")


if __name__ == "__main__":
    main()
