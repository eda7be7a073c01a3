"""A checkpoint counts only when it is whole."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.runs import checkpoint, digests


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
    "marker is a list": lambda c: (c / checkpoint.MARKER).write_text("[1]"),
    "marker names files in a list": lambda c: (c / checkpoint.MARKER).write_text(
        '{"files": ["model.safetensors"]}'
    ),
    "marker without sizes": lambda c: (c / checkpoint.MARKER).write_text(
        '{"files": {"model.safetensors": {}}}'
    ),
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


# ---- ranges, ranks, sizes ------------------------------------------------------------------------


@pytest.fixture
def ranges(monkeypatch):
    """Small ones, so that small files have several; blocks that part no number."""
    monkeypatch.setattr(digests, "RANGE", 4096)
    monkeypatch.setattr(digests, "BLOCK", 1024)


def test_large_files_are_read_in_ranges_and_older_checkpoints_whole(output, ranges):
    """The fixture's markers hold plain sums of files that count as large now."""
    marker = output / "checkpoint-5" / checkpoint.MARKER
    content = json.loads(marker.read_text())
    assert "damaged" in checkpoint.why_incomplete(output / "checkpoint-5"), "other sums now"
    del content["format"]  # as a version that knew no ranges wrote it
    marker.write_text(json.dumps(content))
    assert checkpoint.why_incomplete(output / "checkpoint-5") is None
    _flip(output / "checkpoint-5/optimizer.pt")
    assert "optimizer.pt is damaged" in checkpoint.why_incomplete(output / "checkpoint-5")

    newer = output / "checkpoint-10"
    checkpoint.mark_complete(newer, step=10)
    assert checkpoint.why_incomplete(newer) is None
    file = newer / "optimizer.pt"
    parts = [
        hashlib.sha256(part).digest()
        for part in (file.read_bytes()[:4096], file.read_bytes()[4096:])
    ]
    known = json.loads((newer / checkpoint.MARKER).read_text())["files"]["optimizer.pt"]
    assert known == {"size": 5000, "sha256": hashlib.sha256(b"".join(parts)).hexdigest()}
    for at in (10, 4990):
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
        assert "optimizer.pt is damaged" in checkpoint.why_incomplete(newer)
        content[at] ^= 1
        file.write_bytes(content)
    marker = newer / checkpoint.MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 3}))
    assert "newer version" in checkpoint.why_incomplete(newer)


def test_ranks_look_at_what_they_wrote(output):
    folder = output / "checkpoint-5"
    names = {
        0: ["model.safetensors", "global_step/mp_rank_00_model_states.pt", "random_0.pt"],
        1: ["global_step/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "rng_state_1.pth"],
        12: ["global_step/zero_pp_rank_12_mp_rank_00_model_states.pt", "fsdp/__12_0.distcp"],
    }
    for rank, files in names.items():
        assert {checkpoint.written_by(name) for name in files} == {rank}
    (folder / "rng_state_1.pth").write_bytes(b"1" * 10)
    shares = [checkpoint.look_at(folder, rank) for rank in range(2)]
    assert list(shares[1]) == ["rng_state_1.pth"] and "model.safetensors" in shares[0]
    checkpoint.mark_complete(folder, shares[0] | shares[1], step=5)
    together = json.loads((folder / checkpoint.MARKER).read_text())["files"]
    checkpoint.mark_complete(folder, step=5)
    assert json.loads((folder / checkpoint.MARKER).read_text())["files"] == together


def test_sizes_alone_are_asked_for_by_name(output, monkeypatch):
    monkeypatch.setenv("DANPU_CHECKSUM", "size")
    folder = output / "checkpoint-10"
    checkpoint.mark_complete(folder, step=10)
    assert checkpoint.why_incomplete(folder) is None
    assert "without checksums" in checkpoint.why_foreign(folder)
    _flip(folder / "optimizer.pt")
    assert checkpoint.why_incomplete(folder) is None, "as documented"
    _cut(folder / "optimizer.pt", -1)
    assert "4,999 bytes instead of 5,000" in checkpoint.why_incomplete(folder)
    save_file({"weight": torch.tensor([1.0, float("nan")])}, folder / "model.safetensors")
    with pytest.raises(SystemExit, match="weight holds NaN"):
        checkpoint.mark_complete(folder, step=10)
    monkeypatch.setenv("DANPU_CHECKSUM", "crc")
    with pytest.raises(SystemExit, match="'crc' is neither sha256 nor size"):
        digests.method()


def test_later_checkpoints_are_not_read_at_every_save(output, monkeypatch):
    monkeypatch.setattr(digests, "digest", None)
    (output / "checkpoint-20").mkdir()
    checkpoint.rotate(output, limit=2, step=5)
    assert [p.name for p in checkpoint.all_checkpoints(output)] == ["checkpoint-10", "checkpoint-5"]


# ---- weights ---------------------------------------------------------------------------------------------------


def spoilt(value: float, dtype=torch.float32) -> dict:
    weights = {"a.weight": torch.ones(4, 6), "b.weight": torch.ones(300, 700)}
    weights["b.weight"][299, 699] = value
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


@pytest.mark.usefixtures("ranges")
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
