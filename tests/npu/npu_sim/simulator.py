"""A simulated Ascend NPU for tests: torch_npu as published, on a CANN that computes on the CPU. Not Huawei software.

python tests/npu/npu_sim/simulator.py                               # build once, say how to use it
python tests/npu/npu_sim/simulator.py --soc Ascend910A --devices 2 -- bash train_qwen/train_zero2.sh
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
from collections.abc import Iterator
from pathlib import Path

BANNER = "[npu-sim] SIMULATED"
"""What every process that touches a simulated NPU prints on stderr, once."""

HERE = Path(__file__).resolve().parent
MOST_DEVICES = 64


def environment(soc: str = "Ascend910B2", devices: int = 2, **extra) -> dict[str, str]:
    """Variables to lay over os.environ so that a child process sees a simulated NPU (builds on first use).

    Args:
        soc: chip as CANN names it, e.g. Ascend910B2 (bf16) or Ascend910A (fp16 only, saturates on overflow).
        devices: number of NPUs, 0 to 64. Further keywords become variables too, and win.
    Errors: RuntimeError when the simulator cannot be built, ValueError for an impossible number of devices.
    """
    if not 0 <= devices <= MOST_DEVICES:
        raise ValueError(f"npu_sim: {devices} devices; 0 to {MOST_DEVICES} can be simulated")
    folder, python = build(), Path(sys.executable).parent
    overlay = _sourced(folder / "ascend-toolkit/set_env.sh")
    overlay |= {
        "PATH": f"{folder / 'bin'}:{python}:{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(_torch_npu_folder()), os.environ.get("PYTHONPATH")])
        ),
        "NPU_SIM_SOC": soc,
        "NPU_SIM_DEVICES": str(devices),
        "NPU_SIM_HCCL_TIMEOUT": "120",  # a test must not wait for the hours that a training run may
        "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",  # an operator without an NPU kernel is an error, not a silent CPU run
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "TORCH_EXTENSIONS_DIR": _extensions(
            folder
        ),  # DeepSpeed's operators differ from those compiled for the CPU
        "OMP_NUM_THREADS": "1",
    }
    return overlay | {name: str(value) for name, value in extra.items()}


def _sourced(script: Path) -> dict[str, str]:
    """The variables that sourcing `script` sets or changes."""
    before = {k: v for k, v in os.environ.items() if not k.startswith("BASH_FUNC_")}
    command = ["bash", "-c", 'source "$0" && env -0', str(script)]
    printed = subprocess.run(command, env=before, check=True, capture_output=True).stdout
    after = dict(pair.split("=", 1) for pair in os.fsdecode(printed).split("\0") if "=" in pair)
    return {
        k: v
        for k, v in after.items()
        if before.get(k) != v and k not in ("_", "SHLVL", "PWD", "OLDPWD")
    }


def _extensions(folder: Path) -> str:
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return f"{chosen}/npu_sim" if chosen else str(folder.with_name(f"extensions-{folder.name}"))


def build() -> Path:
    """The folder of the compiled simulator; made on first use, safe with several processes at once.

    Errors: RuntimeError with the reason when pip cannot fetch torch_npu or the compiler fails.
    """
    wheel, version = _torch_npu_folder(), _torch_version().split("+")[0]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        f"torch-npu=={version}",
        "--target",
    ]
    _made_once(wheel, pip, f"fetching torch-npu {version}", needed="torch_npu/lib/libtorch_npu.so")
    digest = hashlib.sha256(f"{_torch_version()} {platform.machine()}".encode())
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), *HERE.glob("*.sh")]):
        digest.update(source.read_bytes())
    command = ["bash", str(HERE / "build.sh"), sys.executable]
    folder = cache() / f"cann-{digest.hexdigest()[:12]}"
    return _made_once(folder, command, "compiling the simulated CANN", needed="bin/npu-smi")


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(f"npu_sim: {sys.executable} has no torch") from None


def _torch_npu_folder() -> Path:
    """Where the torch_npu wheel is unpacked: beside the environment, since without a CANN it breaks `import torch`."""
    version = _torch_version().split("+")[0]
    return cache() / f"torch_npu-{version}-py{sys.version_info[0]}{sys.version_info[1]}"


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
        raise RuntimeError(
            f"npu_sim: {folder} belongs to somebody else; set NPU_SIM_CACHE to a folder of yours"
        )
    return folder


def _made_once(folder: Path, command: list[str], what: str, needed: str) -> Path:
    """`folder`, made by `command <temporary folder>` and renamed when it is whole, i.e. holds `needed`."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / "lock"):
            if not folder.is_dir():  # else another process was faster
                _make(folder, command, what, needed)
    except OSError as error:
        raise RuntimeError(
            f"npu_sim: {what} failed: {error}; NPU_SIM_CACHE names another folder"
        ) from None
    return folder


def _make(folder: Path, command: list[str], what: str, needed: str) -> None:
    for left in folder.parent.glob(
        f"{folder.name}.*"
    ):  # by a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        print(f"npu_sim: {what} (once, into {folder.parent})", file=sys.stderr, flush=True)
        done = subprocess.run(
            [*command, str(unfinished)], capture_output=True, text=True, errors="replace"
        )
        if done.returncode or not (unfinished / needed).exists():
            raise RuntimeError(f"npu_sim: {what} failed: {_reason(done)}")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(done: subprocess.CompletedProcess) -> str:
    """The most telling line of what a failed command printed."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if "error" in line.lower() or "not found" in line or "No module" in line
    ]
    return (telling or lines or [f"exit code {done.returncode}"])[0][:500]


def main() -> None:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description="A simulated Ascend NPU, for tests. Not Huawei software. Without a command it is built.",
        usage="%(prog)s [--soc NAME] [--devices N] [-- COMMAND ...]",
    )
    parser.add_argument(
        "--soc", default="Ascend910B2", help="Ascend910B2 (bf16), Ascend910A (fp16 only), ..."
    )
    parser.add_argument("--devices", type=int, default=2, help="number of NPUs")
    args, command = parser.parse_args(words[:at]), words[at + 1 :]
    try:
        overlay = environment(args.soc, args.devices)
        if command:
            os.execvpe(command[0], command, os.environ | overlay)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    script = os.path.relpath(__file__)
    print(f"simulated CANN  {build()}\ntorch_npu       {_torch_npu_folder()}\n")
    print(f"One command on it:   python {script} --soc Ascend910A --devices 2 -- npu-smi info")
    print(f"A shell on it:       python {script} -- bash")


if __name__ == "__main__":
    main()
