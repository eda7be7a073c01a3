"""Run recipes as a user would (through their shells or the launcher) and read what they leave."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import forking

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.parent.name for path in ROOT.glob("*/train.py"))
# chip and number of simulated NPUs of processes that many tests start
OFTEN = (("Ascend910B2", 2), ("Ascend910A", 2))
TIMEOUT = 600  # seconds; nothing here takes a third of it


def environment(**extra) -> dict[str, str]:
    """The user's environment with this Python first on PATH and none of danpu's own variables but
    DANPU_CACHE."""
    ours = (
        "MODEL",
        "DATA",
        "OUTPUT",
        "NPROC",
        "DEVICES",
        "NNODES",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "HOSTFILE",
        "DS_ACCELERATOR",  # set in this process by tests that call device.training_defaults
    )
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ours and k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in extra.items()}


_registered: dict[str, dict] = {}  # recipe: its modules whose classes the Auto classes know


def keep_registered(recipe: str, modules: dict) -> None:
    """The first copy stays in use: a second one would take its place in the Auto classes."""
    kept = _registered.setdefault(recipe, {})
    for name, module in modules.items():
        is_registered = name.startswith(("modeling_", "tokenization_"))
        if is_registered and Path(module.__file__).parent == ROOT / recipe:
            kept.setdefault(name, module)


def own_modules(recipe: str, *names: str, **known) -> list:
    """Modules of a recipe; other recipes have files of the same names, so nothing of it stays
    importable.

    known: modules of the recipe that were loaded before, e.g. a model that the Auto classes know.
    """
    folder = ROOT / recipe
    path = sys.path[:]
    own = {file.relative_to(folder).parts[0].removesuffix(".py") for file in folder.rglob("*.py")}

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in own]

    before = {name: sys.modules.pop(name) for name in loaded()}
    keep_registered(recipe, before)
    sys.path.insert(0, str(folder))
    sys.modules.update(_registered.get(recipe, {}) | known)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        keep_registered(recipe, {name: sys.modules[name] for name in loaded()})
        sys.path[:] = path
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)


@functools.cache
def fork_folder() -> Path:
    """Of the fork servers: that of the test session, else one for this process."""
    if folder := os.environ.get("DANPU_FORKS"):
        return Path(folder)
    folder = Path(tempfile.mkdtemp(prefix="danpu-forks-"))
    (folder / "owner").write_text(str(os.getpid()))
    return folder


def forked_python(env: dict) -> str | None:
    """The client of a fork server (forking.py) for processes with these variables."""
    if env.get("HOME") != os.environ.get("HOME"):
        return None  # the libraries write there
    often = forking.watched(env) in often_asked_for()
    client = forking.client(fork_folder(), env, often)
    return str(client) if client else None


@functools.cache
def often_asked_for() -> list[dict]:
    """Variables, those that a fork server heeds, of most processes that tests start."""
    found = [environment()]
    if "npu_sim.simulator" in sys.modules:
        simulator = sys.modules["npu_sim.simulator"]
        found += [environment(**simulator.environment(*chip)) for chip in OFTEN]
    return [forking.watched(env) for env in found]


def start(command: list, fork: bool | None = None, **env) -> subprocess.Popen:
    """Start a command in a process group of its own; stdout and stderr are kept apart.

    Python processes with equal variables, what they start, and what shells start on simulated NPUs
    are forks of a server that has the libraries imported. Shells on the CPU start Python as a
    user's do, unless `fork` is True; with False all do.
    """
    words, folder, env = [str(word) for word in command], env.pop("cwd", ROOT), environment(**env)
    is_python = words[0] in ("python", sys.executable)
    fork = is_python or "NPU_SIM_SOC" in env if fork is None else fork
    client = forked_python(env) if fork else None
    if client:
        env["PYTHON_EXEC"] = client
        env["PATH"] = f"{Path(client).parent}:{env['PATH']}"
        words[0] = client if is_python else words[0]
    return subprocess.Popen(
        words,
        cwd=folder,
        env=env,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen, timeout: int = TIMEOUT) -> subprocess.CompletedProcess:
    """Wait; a run that hangs is killed with its group and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"hung for {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def shell(script: str | Path, *flags, **env) -> subprocess.CompletedProcess:
    """bash SCRIPT FLAGS and wait."""
    return finish(start(["bash", script, *flags], **env))


def expect(result: subprocess.CompletedProcess, code: int = 0) -> subprocess.CompletedProcess:
    """Assert the exit code and show the output when it differs."""
    assert result.returncode == code, (
        f"exit {result.returncode}, not {code}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    )
    return result


def error_line(result: subprocess.CompletedProcess, code: int) -> str:
    """The one error line of a run that must fail with `code`: no traceback, and it is the last
    thing printed."""
    expect(result, code)
    assert "Traceback" not in result.stderr + result.stdout, result.stderr[-3000:]
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    # what the launcher says of the ranks that only lost this one
    lines = [line for line in lines if " failed first; of the others " not in line]
    errors = [line for line in lines if line.startswith(("error: ", "launch: "))]
    assert len(errors) == 1 and lines[-1] == errors[0], result.stderr[-3000:]
    return errors[0]


def history(output: str | Path) -> dict[int, float]:
    """step -> training loss, from the finished run's trainer_state.json."""
    state = json.loads((Path(output) / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def report(output: str | Path) -> dict:
    return json.loads((Path(output) / "report.json").read_text())


def weights(folder: str | Path) -> dict:
    """All tensors of a model or adapter folder."""
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def weights_sha(folder: str | Path) -> str:
    """sha256 over names and bytes of all tensors: equal only for bit-equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights(folder).items()):
        digest.update(
            name.encode()
            + tensor.contiguous().view(-1).view(dtype=__import__("torch").uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def largest_difference(a: dict, b: dict) -> float:
    """Largest absolute difference over two sets of tensors with equal names."""
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def make_rows(lengths, seed: int = 0, prompt: int = 3, vocab: int = 97) -> list[dict]:
    """Random token rows of the given lengths, the first `prompt` tokens without a label."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, length in enumerate(lengths):
        ids = torch.randint(vocab, (length,), generator=generator).tolist()
        rows.append(
            {"row_id": i, "input_ids": ids, "labels": ([-100] * prompt + ids[prompt:])[:length]}
        )
    return rows


def pack(rows: list[dict]) -> dict:
    """One packed batch of `rows`, as a model takes it."""
    from common import collators

    batch = collators.PackedCollator()([rows])
    batch.pop("row_ids")
    return batch
