"""Which device, which dtype; a broken torch_npu must not break anything else."""

import subprocess
import sys

import psutil
import pytest
import torch
from harness import ROOT, environment

from common import device
from common.runs import card_install, memory


def python(code, **env):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=120
    )


def test_answers_agree_with_each_other():
    assert device.kind() in ("cpu", "cuda", "npu")
    assert (device.device_count() == 0) == (device.kind() == "cpu")
    assert device.device().type == device.kind()
    assert device.dist_backend() == {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[device.kind()]
    assert device.half_dtype() in (None, torch.bfloat16, torch.float16)
    assert 0 < memory.peak_mb() < psutil.virtual_memory().total / 2**20
    assert device.name()


def test_autocast_and_scaler():
    x = torch.ones(2, 2, device=device.device())
    with device.autocast(torch.float32):
        assert (x @ x).dtype is torch.float32
    if device.half_dtype() is torch.bfloat16:
        with device.autocast(torch.bfloat16):
            assert (x @ x).dtype is torch.bfloat16
    assert not device.grad_scaler(torch.bfloat16).is_enabled()


def test_seed_makes_numbers_repeat():
    draws = []
    for _ in range(2):
        device.seed_all(3)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]


def test_precision_is_the_devices_unless_the_user_chose():
    half = device.half_dtype()
    assert device.training_defaults(set())["bf16"] == (half is torch.bfloat16)
    assert "bf16" not in device.training_defaults(
        {"fp16"}
    ) and "bf16" not in device.training_defaults({"bf16"})


@pytest.mark.parametrize("name, words", [("tpu", "not one of"), ("npu", "cannot be used")])
def test_a_device_that_is_not_there(name, words):
    if name == device.kind():
        pytest.skip(f"this machine has a {name}")
    done = python("from common import device; device.kind()", DANPU_DEVICE=name)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_broken_torch_npu_is_one_line_and_a_normal_run(tmp_path):
    """The wheel without CANN: its import fails with a missing libhccl.so."""
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file')"
    )
    done = subprocess.run(
        [sys.executable, "-m", "common.device"], cwd=ROOT, env=environment(PYTHONPATH=tmp_path), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split()[0] == device.kind()
    assert (
        len(done.stderr.splitlines()) == 1
        and "libhccl.so" in done.stderr
        and "Traceback" not in done.stderr
    )
    code = "from common import device; import transformers, peft; print(transformers.utils.is_torch_npu_available())"
    assert python(code, PYTHONPATH=tmp_path).stdout.strip() == "False"


NVIDIA = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sun Jul 14 20:04:49 UTC 2024
GCC version:  gcc version 12
"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(driver, built_for, **variables): with this NVIDIA driver and a torch that sees no
    card behind it."""

    def make(driver, built_for, **variables):
        file = tmp_path / "version"
        if driver:
            file.write_text(NVIDIA.format(driver))
        monkeypatch.setattr(card_install, "DRIVER", file)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for name in (*card_install.HIDING, "DANPU_DEVICE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    "driver, built_for, words",
    [
        ("535.183.01", "13.0", ["driver 535.183.01 is too old", "CUDA 13.0", "/cu126"]),
        ("470.1", "12.6", ["driver 470.1 is too old", "525 or newer", "/cu126"]),
        ("580.65.06", None, ["without CUDA", "pip install torch==2.13.0 (or"]),
        ("550.54", None, ["without CUDA", "/cu126"]),
        ("580.65.06", "13.0", ["sees none behind driver 580.65.06", "nvidia-smi"]),
    ],
)
def test_a_card_that_cannot_be_used_is_not_a_silent_cpu_run(machine, driver, built_for, words):
    machine(driver, built_for)
    message, fatal = device.install_problem()
    assert fatal and len(message.splitlines()) == 1
    assert message.startswith("launch: this machine has an NVIDIA card, but ")
    assert message.endswith("(or DANPU_DEVICE=cpu)")
    for word in words:
        assert word in message
    machine(driver, built_for, DANPU_DEVICE="cpu")
    assert device.install_problem() == ("", False)


def test_hidden_cards_are_told(machine):
    machine("580.65.06", "13.0", CUDA_VISIBLE_DEVICES="")
    assert "CUDA_VISIBLE_DEVICES='' hides it" in device.install_problem()[0]


def test_a_machine_without_cards_trains_on_its_cpu(machine):
    machine(None, "13.0")
    assert device.install_problem() == ("", False)


BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    "capability, works",
    [
        ((7, 0), False), ((7, 5), True), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 3), True), ((11, 0), False),
        ((12, 1), True), ((13, 0), True), ((6, 1), False),
    ],
)  # fmt: skip
def test_a_card_that_torch_has_no_code_for_is_named(monkeypatch, capability, works):
    """V100 under a CUDA 13 build: seen, and the first kernel fails."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    found = card_install.why_unused()
    assert (found is None) == works
    if not works:
        assert found.startswith("Tesla V100") and "pip install torch==2.13.0" in found
        assert ("cu126" in found) == (capability < (7, 5))


def test_a_started_script_asks_too():
    """Without the launcher: python train.py, python app.py."""
    code = (
        "from common import cli, device\n"
        "device.install_problem = lambda: ('launch: a card, but no', True)\n"
        "cli.run(lambda: print('trained'))"
    )
    done = python(code)
    assert done.returncode == 1 and done.stderr.strip() == "launch: a card, but no"
    assert "trained" not in done.stdout


@pytest.mark.parametrize(
    "capability, tools, compiles",
    [((9, 0), ("gcc",), True), ((6, 0), ("gcc",), False), ((9, 0), (), False)],
)
def test_what_cannot_be_compiled_is_not_compiled_unasked(monkeypatch, capability, tools, compiles):
    """Triton knows no card before 7.0, and starts by a C compiler, which slim images lack."""
    monkeypatch.setattr(device, "kind", lambda: "cuda")
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(device.os.path, "exists", lambda path: True)
    monkeypatch.setattr(device.shutil, "which", lambda name: name if name in tools else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.delenv("CC", raising=False)
    assert device.compiles() is compiles
