"""A checkpoint counts only when it is whole."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.runs import checkpoint


@pytest.fixture
def output(tmp_path):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "global_step").mkdir(parents=True)
        for name in (
            "optimizer.pt",
            "rng_state.pth",
            "trainer_state.json",
            "global_step/shard_0.pt",
        ):
            (folder / name).write_bytes(os.urandom(5000))
        save_file({"weight": torch.randn(1250)}, folder / "model.safetensors")
        (folder / "latest").write_text("global_step")
        checkpoint.mark_complete(folder, step=step, world_size=2, engine="ddp")
    return tmp_path


def test_newest_whole_one_is_taken(output):
    assert checkpoint.last_complete(output) == (output / "checkpoint-10", [])
    assert checkpoint.facts(output / "checkpoint-10") == {
        "step": 10,
        "world_size": 2,
        "engine": "ddp",
    }


def _cut(path: Path, keep: int):
    path.write_bytes(path.read_bytes()[:keep])


def _flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "model cut by one byte": lambda c: _cut(c / "model.safetensors", -1),
    "model cut to half": lambda c: _cut(c / "model.safetensors", 2500),
    "model empty": lambda c: _cut(c / "model.safetensors", 0),
    "optimizer cut": lambda c: _cut(c / "optimizer.pt", 2500),
    "rng state cut": lambda c: _cut(c / "rng_state.pth", 4999),
    "trainer state empty": lambda c: _cut(c / "trainer_state.json", 0),
    "one rank's shard missing": lambda c: (c / "global_step/shard_0.pt").unlink(),
    "shard flipped bit": lambda c: _flip(c / "global_step/shard_0.pt"),
    "model flipped bit": lambda c: _flip(c / "model.safetensors"),
    "latest points nowhere": lambda c: (c / "latest").write_text("global_steq"),
    "marker missing": lambda c: (c / checkpoint.MARKER).unlink(),
    "marker cut": lambda c: _cut(c / checkpoint.MARKER, 40),
    "marker empty": lambda c: _cut(c / checkpoint.MARKER, 0),
    "only a half-written marker": lambda c: os.replace(
        c / checkpoint.MARKER, c / (checkpoint.MARKER + ".part")
    ),
    "everything gone": lambda c: [p.unlink() for p in c.rglob("*") if p.is_file()],
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_one_is_skipped_with_its_reason(output, what):
    DAMAGE[what](output / "checkpoint-10")
    found, skipped = checkpoint.last_complete(output)
    assert found == output / "checkpoint-5"
    assert len(skipped) == 1 and "checkpoint-10" in skipped[0] and ": " in skipped[0]


def test_none_left(output):
    for folder in checkpoint.all_checkpoints(output):
        _flip(folder / "optimizer.pt")
    found, skipped = checkpoint.last_complete(output)
    assert found is None and len(skipped) == 2


def test_foreign_folders_are_ignored(output):
    for name in ("checkpoint-best", "checkpoint-20.part", "runs"):
        (output / name).mkdir()
    (output / "checkpoint-99").write_text("a file")
    assert [p.name for p in checkpoint.all_checkpoints(output)] == ["checkpoint-10", "checkpoint-5"]


def test_steps_are_compared_as_numbers(output):
    os.replace(output / "checkpoint-5", output / "checkpoint-100")
    assert checkpoint.last_complete(output)[0].name == "checkpoint-100"
    assert json.loads((output / "checkpoint-100" / checkpoint.MARKER).read_text())["files"]


# ---- weights ---------------------------------------------------------------------------------------------------


def spoilt(value: float, dtype=torch.float32) -> dict:
    weights = {"a.weight": torch.ones(4, 6), "b.weight": torch.ones(300, 700)}
    weights["b.weight"][299, 699] = value
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_never_make_a_checkpoint(tmp_path, value, dtype):
    save_file(spoilt(value, dtype), tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="model.safetensors: b.weight holds NaN or infinite"):
        checkpoint.mark_complete(tmp_path, step=1)
    assert not list(tmp_path.glob(f"{checkpoint.MARKER}*"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model-00002-of-00002.safetensors"])
def test_adapters_and_every_shard_are_looked_at(tmp_path, name):
    save_file(spoilt(1.0), tmp_path / "model-00001-of-00002.safetensors")
    save_file(spoilt(float("nan")), tmp_path / name)
    with pytest.raises(SystemExit, match=f"{name}: b.weight holds"):
        checkpoint.refuse_not_finite(tmp_path)


def test_weights_that_are_finite_pass_whatever_their_kind(tmp_path):
    kinds = [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool]
    weights = {str(kind): torch.ones(3).to(kind) for kind in kinds}
    weights |= {"none": torch.ones(0), "one": torch.tensor(1.0), "large": torch.tensor([3e38] * 9)}
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint.mark_complete(tmp_path, step=1)
    assert checkpoint.why_incomplete(tmp_path) is None
    weights["torch.float8_e5m2"] = torch.tensor([float("inf")]).to(torch.float8_e5m2)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="torch.float8_e5m2 holds"):
        checkpoint.refuse_not_finite(tmp_path)


def test_weights_that_cannot_be_read_again_are_no_checkpoint(tmp_path):
    save_file(spoilt(1.0), tmp_path / "model.safetensors")
    _cut(tmp_path / "model.safetensors", 500)
    with pytest.raises(SystemExit, match="model.safetensors: it cannot be read again"):
        checkpoint.mark_complete(tmp_path, step=1)
