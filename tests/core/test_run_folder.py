"""One output folder, several runs: what is started, continued, refused, deleted."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from common import cli
from common.runs import checkpoint, run_folder

SETTINGS = {"learning_rate": 1.0, "seed": 42}


def args(**changes):
    base = dict(resume_from_checkpoint=None, world_size=2, hf_deepspeed_config=None, max_steps=12)
    return SimpleNamespace(**base | changes)


def look(out, settings=SETTINGS, overwrite=False, keeps_order=False, **changes):
    return run_folder.inspect(args(**changes), out, dict(settings), overwrite, keeps_order)


def save(out, step, complete=True, **facts):
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(9)}, folder / "model.safetensors")
    if complete:
        checkpoint.mark_complete(folder, step=step, **{"world_size": 2, "engine": "ddp"} | facts)
    return folder


def finish(out):
    (out / "final").mkdir()
    (out / "report.json").write_text("{}")
    run_folder.write_run_file(out, {"settings": SETTINGS, "step": 12})


def test_new_folder_starts(tmp_path):
    assert look(tmp_path / "a" / "b") == run_folder.Verdict()
    assert (tmp_path / "a/b/run.json").is_file()


def test_same_run_continues_even_when_told_to_overwrite(tmp_path):
    look(tmp_path)
    folder = save(tmp_path, 4)
    save(tmp_path, 8, complete=False)
    for overwrite in (False, True):
        verdict = look(tmp_path, overwrite=overwrite)
        assert verdict.start == str(folder) and "checkpoint-8" in verdict.say[0]


def test_finished_run_is_told_and_extended_run_is_not_finished_until_it_is(tmp_path):
    look(tmp_path)
    folder = save(tmp_path, 12)
    finish(tmp_path)
    assert look(tmp_path).exit == 0
    longer = SETTINGS | {"num_train_epochs": 5}
    assert look(tmp_path, longer).exit == 2
    assert look(tmp_path, longer, resume_from_checkpoint="true").start == str(folder)
    assert look(tmp_path, longer).start == str(folder), (
        "killed while it continued: the same command goes on"
    )


def test_another_run_is_refused_or_replaced(tmp_path):
    look(tmp_path)
    save(tmp_path, 4)
    (tmp_path / "mine.txt").write_text("keep")
    other = SETTINGS | {"seed": 7}
    verdict = look(tmp_path, other)
    assert verdict.exit == 2 and "seed 42 -> 7" in verdict.error
    assert look(tmp_path, other, overwrite=True).start == ""
    assert not (tmp_path / "checkpoint-4").exists() and (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_wrote_is_never_deleted(tmp_path, overwrite):
    for name in ("final", "runs"):
        (tmp_path / name).mkdir()
    assert look(tmp_path, overwrite=overwrite).exit == 2
    assert (tmp_path / "final").is_dir() and (tmp_path / "runs").is_dir()


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    verdict = look(tmp_path / "file")
    assert verdict.exit == 1 and "cannot be used" in verdict.error


def test_resume_from_another_folder_leaves_a_usable_run_file(tmp_path):
    elsewhere = save(tmp_path / "old", 4)
    out = tmp_path / "new"
    assert look(out, resume_from_checkpoint=str(elsewhere)).start == str(elsewhere)
    assert look(out).start == ""
    assert look(out, resume_from_checkpoint=str(tmp_path / "nowhere")).exit == 1


def test_checkpoints_that_do_not_fit(tmp_path):
    look(tmp_path)
    save(tmp_path, 4)
    assert "at the same row" in look(tmp_path, keeps_order=True, world_size=1).say[0]
    assert "order of the data" in look(tmp_path, world_size=1).say[0]
    assert "--max_steps" in look(tmp_path, world_size=1, max_steps=-1).error
    zero = SimpleNamespace(config={"zero_optimization": {"stage": 2}})
    assert "zero-2" in look(tmp_path, hf_deepspeed_config=zero).error
    save(tmp_path, 6, weights_only=True)
    assert "no optimizer state" in look(tmp_path).error


RESUME = {"resume_from_checkpoint": "true"}


@pytest.mark.parametrize("name", ["new", "empty", "started"])
def test_nothing_to_resume_starts_with_a_line(tmp_path, name):
    """A scheduler may always ask for it."""
    out = tmp_path / name
    if name != "new":
        out.mkdir()
    if name == "started":  # and killed before the first save
        look(out)
    verdict = look(out, **RESUME)
    assert verdict.exit is None and verdict.start == ""
    assert verdict.say == [f"nothing to resume in {out}: starting at step 0"]
    assert look(out).say == [], "who does not ask is not told"


def test_killed_in_its_first_save_the_same_command_starts_again(tmp_path):
    look(tmp_path)
    folder = save(tmp_path, 4, complete=False)
    verdict = look(tmp_path)
    assert verdict.exit is None and verdict.start == ""
    assert "checkpoint-4: it was never completed" in verdict.say[0]
    assert "starting at step 0" in verdict.say[1] and folder.is_dir()
    asked = look(tmp_path, **RESUME)
    assert asked.exit == 1 and "no complete checkpoint" in asked.error
    assert "leave --resume_from_checkpoint away" in asked.error


@pytest.mark.parametrize("flags", [{}, RESUME], ids=["default", "asked"])
def test_every_checkpoint_damaged_stops_before_work_is_lost(tmp_path, flags):
    look(tmp_path)
    run_folder.write_run_file(tmp_path, {"settings": SETTINGS, "before": {"metrics": {}}})
    for step in (4, 8):
        (save(tmp_path, step) / "model.safetensors").write_bytes(b"x")
    save(tmp_path, 12, complete=False)
    verdict = look(tmp_path, **flags)
    assert verdict.exit == 1 and "no complete checkpoint" in verdict.error
    assert len(verdict.say) == 3 and "Put back what is damaged" in verdict.error
    assert len(checkpoint.all_checkpoints(tmp_path)) == 3
    assert run_folder.read_run_file(tmp_path)["before"], "nothing was written"
    if not flags:  # the remedy that is named
        assert look(tmp_path, overwrite=True).exit is None
        assert not checkpoint.all_checkpoints(tmp_path)


def test_rotation_keeps_what_was_just_saved(tmp_path):
    for step in (2, 4, 5):
        save(tmp_path, step)
    save(tmp_path, 8, complete=False)
    save(tmp_path, 9)
    checkpoint.rotate(tmp_path, limit=1, step=5, best=str(tmp_path / "checkpoint-2"))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-5",
        "checkpoint-9",
    ]


def test_printed_command_continues_and_never_wipes(monkeypatch):
    words = "train.py --data_path a:1 --overwrite_output_dir true --deepspeed=mine.json --overwrite-output-dir"
    monkeypatch.setattr("sys.argv", [*words.split(), "--output_dir", "my run"])
    monkeypatch.delenv("DANPU_RERUN", raising=False)
    both = "python train.py --data_path a:1 --deepspeed=mine.json --output_dir 'my run'"
    assert cli.resume_command() == both
    monkeypatch.setenv("DANPU_RERUN", "NPROC=2 bash r/train_zero2.sh --data_path a:1")
    assert cli.resume_command() == "NPROC=2 bash r/train_zero2.sh --data_path a:1"
