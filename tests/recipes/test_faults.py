"""Faults in every training loop: the Trainer recipes, the stages of minimind_npu, its quick start.

Kills, signals and full disks follow each other in one folder, always with the same command: in the
end it is bit for bit the run that nothing happened to.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from harness import ROOT, error_line, expect, finish, own_modules, weights

sys.path.insert(0, str(ROOT / "tests/support/faults"))
from loops import LOOPS, PRETRAIN, STAGES, newest_step, outcome, without_end

from common import callbacks
from common.runs import errors, plan, run_folder

NAMES = ("loop.parallel", "loop.state", "loop.tracking")
parallel, state, tracking = own_modules("minimind_npu", *NAMES)
slow = pytest.mark.slow
DIFFERENT = ("train_qwen", "minimind_npu-depth", "minimind_npu-quickstart")  # one of each kind
MINIMIND = [f"minimind_npu-{stage}" for stage in STAGES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(loop, number of processes) -> folder of the run that nothing happens to."""
    made = {}

    def make(name, nproc=1):
        if (name, nproc) not in made:
            made[name, nproc] = tmp_path_factory.mktemp("whole") / "out"
            expect(LOOPS[name].run(made[name, nproc], *needs(name, make), nproc=nproc))
        return made[name, nproc]

    return make


def needs(name, whole) -> list:
    """What a stage cannot begin without."""
    if name == "minimind_npu-distill":
        return ["--teacher", whole("minimind_npu-sft") / "final"]
    if name == "minimind_npu-mid":
        return ["--from_weight", whole("minimind_npu-depth") / "final"]
    return []


def assert_same_end(out, expected):
    assert outcome(out) == outcome(expected)
    assert not list(out.rglob("*.part*"))


# ---- kills ---------------------------------------------------------------------------------------

# processes, how often; some 30 kills in all. What a save takes is a tenth of a second
RANDOM_KILLS = {name: (1, 2) for name in LOOPS if name != "minimind_npu-mid"} | {
    "train_qwen": (1, 4),
    "minimind_npu-depth": (1, 4),
    "minimind_npu-quickstart": (1, 3),
}
PAIRS = [(name, *how) for name, how in RANDOM_KILLS.items()]
PAIRS += [("train_qwen", 2, 3), ("minimind_npu-depth", 2, 3)]


@slow
@pytest.mark.parametrize("name, nproc, kills", PAIRS)
def test_killed_at_random_again_and_again(whole, tmp_path, name, nproc, kills):
    """Each start is killed within 0.3 seconds after its first save began, ranks together."""
    loop = LOOPS[name]
    flags = needs(name, whole)
    faults = []
    saved = 0
    for _ in range(kills):
        faults.append(f"kill-all@{random.SystemRandom().uniform(0, 0.3):.3f}")
        result = loop.run(tmp_path, *flags, nproc=nproc, fault=faults[-1])
        if result.returncode == 0:
            break
        assert result.returncode in (1, -signal.SIGKILL), (faults, result.stderr[-2000:])
        newest = newest_step(tmp_path)
        assert newest >= saved, f"{faults}: a complete checkpoint was lost"
        saved = newest
    expect(loop.run(tmp_path, *flags, nproc=nproc))
    assert outcome(tmp_path) == outcome(whole(name, nproc)), faults


POINTS = {  # of a stage each: the writer is one, what it writes are models and adapters
    "depth": "kill-in-file@model.safetensors:2",
    "mid": "kill@complete.json.part:2",
    "sft": "kill-in-file@training.pt:2",
    "lora": "kill-in-file@adapter_model.safetensors:2",
    "dpo": "kill-in-file@progress.pt:2",
    "distill": "kill-in-file@random_0.pt:2",
    "reason": "kill@complete.json.part:2",
}


@slow
@pytest.mark.parametrize("name", MINIMIND)
def test_killed_inside_a_save_and_inside_a_removal(whole, tmp_path, name):
    """minimind_npu's own writer; that of the Trainer recipes: core/test_training.py."""
    loop = LOOPS[name]
    flags = needs(name, whole)
    # the torn checkpoint is the first that the second start removes
    for fault, complete in ((POINTS[name.partition("-")[2]], 1), ("kill-in-rotation@2", 3)):
        expect(loop.run(tmp_path, *flags, fault=fault), -signal.SIGKILL)
        assert newest_step(tmp_path) == complete, fault
    again = expect(loop.run(tmp_path, *flags))
    assert "continuing from" in again.stdout
    assert_same_end(tmp_path, whole(name))


# ---- signals -------------------------------------------------------------------------------------

STEP_FIRST = "stopping: this step is finished and saved first (once more: stop at once)"
END_FIRST = "the training is done: what is left, model and report, is written first (once more"
AT_ONCE = "stopped at once. The same command goes on"
BEFORE = "interrupted. The same command goes on"
SIGNALS = [  # where it comes; what is said; the exit code
    ("signal@evaluate:1", BEFORE, 75),
    ("signal@checkpoint-2", STEP_FIRST, 75),
    ("signal@evaluate:1", STEP_FIRST, 75),
    ("two-signals@checkpoint-6", AT_ONCE, 75),
    ("two-signals@final.part", AT_ONCE, 75),
    ("signal@final.part", END_FIRST, 0),
]
QUICK_SIGNALS = [  # its epochs are short: it stops at once
    ("signal@generate", BEFORE, 75),
    ("signal@checkpoint-8", BEFORE, 75),
    ("signal@final.part", BEFORE, 75),
    ("signal@report.json.part", BEFORE, 75),
]


@slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_a_signal_says_is_what_happens(whole, tmp_path, name):
    loop = LOOPS[name]
    is_quick = "quick" in name
    flags = [] if is_quick else ["--eval_steps", 4]
    for fault, words, code in QUICK_SIGNALS if is_quick else SIGNALS:
        saved = newest_step(tmp_path)
        done = expect(loop.run(tmp_path, *flags, fault=fault), code)
        assert words in done.stdout, (fault, done.stdout)
        assert ("saved. Continue with" in done.stdout) == (words == STEP_FIRST), fault
        assert newest_step(tmp_path) > saved or words != STEP_FIRST, fault
        assert (tmp_path / "final").exists() == ("report" in fault or code == 0), fault
    if code:
        expect(loop.run(tmp_path))
    assert_same_end(tmp_path, whole(name))


@slow
def test_a_second_signal_ends_every_rank_at_once(whole, tmp_path):
    loop = LOOPS["train_qwen"]
    process = loop.start(tmp_path, nproc=2)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            break
    done = expect(finish(process, timeout=60), 75)
    assert "launch: stopped at once" in done.stderr and "SIGKILL" not in done.stderr
    expect(loop.run(tmp_path, nproc=2))
    assert_same_end(tmp_path, whole("train_qwen", 2))


def test_a_signal_in_the_last_step_is_told_that_it_was_the_last(capfd):
    """The promise of the step before it is put right."""
    stop = callbacks.SafeStop()
    stop.handle(signal.SIGTERM, None)
    assert STEP_FIRST in capfd.readouterr().out
    args = SimpleNamespace(device="cpu", world_size=1)
    control = SimpleNamespace()
    stop.on_step_end(args, SimpleNamespace(global_step=8, max_steps=8), control)
    assert END_FIRST in capfd.readouterr().out and not stop.stopped
    stop.training_is_done()
    assert not capfd.readouterr().out, "once is enough"


# ---- full disks ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 MB, and how it gets free again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


REPORT = ("loss.png.part", "report.json.part", "trainer_state.json", "run.json.part:2")
FULL = ("checkpoint-1", "final.part", *REPORT)


@slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_a_full_disk_is_one_line_and_the_same_command_ends_the_run(whole, small_disk, name):
    """At the first checkpoint, the model, the pictures, the report and the mark of the end."""
    loop = LOOPS[name]
    out = small_disk / "out"
    for place in FULL:
        if "quick" in name:
            place = place.replace("checkpoint-1", "checkpoint-4")  # of its first epoch
        line = error_line(loop.run(out, fault=f"full-disk@{place}"), 1)
        assert "no space left" in line and str(small_disk) in line and "GiB free" in line, place
        assert run_folder.read_run_file(out).get("step") is None, place
        (small_disk / "filler").unlink()
    expect(loop.run(out))
    assert_same_end(out, whole(name))


@pytest.mark.parametrize(
    "done, strategy, due", [(1, "steps", True), (0.5, "steps", False), (1, "no", False)]
)
def test_the_last_step_is_saved_however_rarely_others_are(done, strategy, due):
    """What comes after it, the model and the report, can be made again."""
    training = SimpleNamespace(save_strategy=strategy, save_steps=1000)
    run = SimpleNamespace(
        stopped=False,
        training=training,
        plan=SimpleNamespace(fraction_done=lambda: done),
        is_due=lambda every: False,
    )
    assert tracking.Run.save_is_due(run) == due


def test_a_disk_too_small_is_told_before_the_first_step(monkeypatch, capsys, tmp_path):
    """By every loop: minimind_npu's begin with tracking.Run."""
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    training = SimpleNamespace(
        output_dir=tmp_path,
        save_strategy="steps",
        save_total_limit=2,
        world_size=1,
        device=torch.device("cpu"),
        report_to=[],
    )
    model = torch.nn.Linear(4, 4)
    model.config = SimpleNamespace(tie_word_embeddings=True)
    steps = SimpleNamespace(describe=str, total_steps=lambda: 1, fraction_done=lambda: 0.0)
    monkeypatch.setattr(tracking, "peak_flops", lambda dtype, where: 1.0)
    progress = {"step": 0, "seconds": 0.0, "trackers": {}}
    tracking.Run(training, progress, model, torch.float32, steps, {}).bar.close()
    said = capsys.readouterr().out
    assert "warning: 0.0 GiB free" in said and "lower --save_total_limit or choose another" in said


# ---- numbers -------------------------------------------------------------------------------------

ZERO = ["--deepspeed", ROOT / "minimind_npu/ds_zero2.json"]
POISONED = {  # what runs: (loop, processes, flags, the backward pass of the third step)
    "minimind_npu": (PRETRAIN, 1, ["--max_grad_norm", 0], 3),
    "minimind_npu-ddp": (LOOPS["minimind_npu-depth"], 2, [], 3),
    "minimind_npu-zero-2": (PRETRAIN, 2, ZERO, 3),
    "minimind_npu-quickstart": (LOOPS["minimind_npu-quickstart"], 1, [], 8),
}


@slow
@pytest.mark.parametrize("case", POISONED)
def test_nan_in_the_gradient_alone_stops_before_anything_is_saved(tmp_path, case):
    """The loss of that step is sound. The Trainer recipes: core/test_training.py."""
    loop, nproc, flags, at = POISONED[case]
    result = loop.run(tmp_path, *flags, nproc=nproc, fault=f"nan-grad@{at}")
    line = error_line(result, 1)
    assert f"step {at}: the norm of the gradients is" in line and "stopped" in line
    kept = newest_step(tmp_path)
    assert 0 < kept < at and not (tmp_path / "final").exists()
    assert len(list(tmp_path.glob("checkpoint-*"))) == min(kept, 2) or "quick" in case
    for folder in tmp_path.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_weights_that_are_not_finite_become_no_model_of_minimind(tmp_path):
    """Those of the Trainer recipes: core/test_checkpoint.py."""

    def write(folder):
        model = {"good": torch.ones(2), "bad": torch.tensor([1.0, math.nan])}
        safetensors.torch.save_file(model, folder / "model.safetensors")

    with pytest.raises(SystemExit, match="bad holds NaN"):
        state.save_final(tmp_path, write)
    assert not list(tmp_path.iterdir())


def test_fp16_may_skip_steps_but_not_twenty_in_a_row():
    gradients = parallel.Gradients(torch.float16)
    for step in range(19):
        gradients.refuse(math.inf, step)
    gradients.refuse(1.0, 19)
    for step in range(19):
        gradients.refuse(math.nan, step)
    with pytest.raises(SystemExit, match="step 40: fp16 overflowed for the 20th step in a row"):
        gradients.refuse(math.inf, 40)
    with pytest.raises(SystemExit, match="step 1: the norm of the gradients is inf"):
        parallel.Gradients(torch.bfloat16).refuse(math.inf, 1)


@pytest.mark.parametrize("scales, expected", [((8.0, 4.0), math.inf), ((8.0, 16.0), 3.0)])
def test_a_step_that_the_scaler_left_out_counts_whatever_its_norm(scales, expected):
    """Of an NPU that saturates: the gradients of an overflow are finite there."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([3.0])
    told = iter(scales)

    def nothing(*_):
        pass

    scaler = SimpleNamespace(
        is_enabled=lambda: True,
        get_scale=lambda: next(told),
        unscale_=nothing,
        step=nothing,
        update=nothing,
    )
    norms = []
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parallel.update(None, optimizer, scaler, [parameter], 0.0, norms.append)
    assert norms == [expected]


# ---- what was edited in between ------------------------------------------------------------------

READ = ("train_qwen", "chinese_bloom", "chatglm_lora", "baichuan2_dpo", "minimind_npu-sft")


@slow
@pytest.mark.parametrize("name", [*READ, "minimind_npu-quickstart"])
def test_edited_data_batch_and_template_are_named(whole, tmp_path, name):
    """Between a kill and the same command: refused, and nothing is touched."""
    loop = LOOPS[name]
    out = without_end(whole(name), tmp_path / "out")
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"step": None}))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    changed = [f"{loop.batch.removeprefix('--')} "]
    edited = None
    flags = [loop.batch, 1]
    if loop.data:
        edited = tmp_path / "edited.jsonl"
        lines = (ROOT / loop.data).read_text(encoding="utf-8").splitlines()
        edited.write_text("\n".join(lines[:-1]), encoding="utf-8")
        changed += ["data '", "chat_template_sha '"]
    else:
        flags += ["--num_samples", 101]
        changed += ["data '"]
    line = error_line(loop.run(out, *flags, data=edited, fault="other-template@"), 2)
    assert all(f"{what}" in line and " -> " in line for what in changed), line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


# ---- folders of others ---------------------------------------------------------------------------


@pytest.fixture
def ordinary_user(tmp_path_factory):
    """Inside, this process is the user nobody; the tests run as root, who may write anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def read_only():
    """A folder of root's that everybody may read."""
    folder = Path("/tmp") / f"danpu-read-only-{os.getpid()}"
    folder.mkdir(mode=0o755)
    (folder / "run.json").write_text("{}")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("below", ["", "new/run"])
def test_a_folder_that_this_user_may_not_write_is_one_line(read_only, ordinary_user, capsys, below):
    out = str(read_only / below)
    args = SimpleNamespace(output_dir=out, resume_from_checkpoint=None, world_size=1)
    with pytest.raises(SystemExit) as stop:
        run_folder.open_output(args, {"seed": 1})
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(lines) == 1
    assert f"--output_dir {read_only / below} cannot be" in lines[0] and "ermission" in lines[0]


def test_a_file_that_this_user_may_not_write_is_one_line(read_only, ordinary_user):
    with pytest.raises(PermissionError) as error:
        (read_only / "checkpoint-1").mkdir()
    line = errors.explain(error.value)
    assert f"{read_only}/checkpoint-1 cannot be written" in line and "owner or mode" in line
