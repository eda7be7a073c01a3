"""Which device, which dtype; a broken torch_npu must not break anything else."""

import subprocess
import sys

import psutil
import pytest
import torch
from harness import ROOT, environment

from common import device
from common.runs import memory


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
