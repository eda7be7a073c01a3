"""The numbers of train_qwen: parity of all engines, bit-exact resume after kills, faults, what is left on disk."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from harness import (
    ROOT,
    error_line,
    expect,
    finish,
    history,
    largest_difference,
    report,
    start,
    weights,
    weights_sha,
)

from common.runs import checkpoint

pytestmark = pytest.mark.slow
RECIPE = ROOT / "train_qwen"
SHORT = [
    "--max_steps", 12, "--save_steps", 4, "--logging_steps", 1, "--eval_generate", 0, "--report_to", "none",
    "--eval_ratio", 0.02, "--bf16", "false", "--learning_rate", 1e-3, "--model_max_length", 64,
]  # fmt: skip
ENGINES = {
    "ddp": [],
    "zero-2": ["--deepspeed", RECIPE / "ds_zero2.json"],
    "zero-3": ["--deepspeed", RECIPE / "ds_zero3.json"],
}


def begin(output, *flags, nproc=2, engine="ddp", fault=None, **env) -> subprocess.Popen:
    """Start a short training run; `fault` goes to tests/support/faults/faulty.py."""
    script = (
        [ROOT / "tests/support/faults/faulty.py", RECIPE / "train.py", fault]
        if fault
        else [RECIPE / "train.py"]
    )
    command = [
        "python",
        ROOT / "common/launch.py",
        nproc,
        *script,
        *ENGINES[engine],
        *SHORT,
        "--output_dir",
        output,
        *flags,
    ]
    return start(
        command,
        **(
            {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"}
            | env
        ),
    )


def train(output, *flags, code=0, **settings):
    return expect(finish(begin(output, *flags, **settings)), code)


# ---- parity -------------------------------------------------------------------------------------------------

LAYOUTS = {  # name: (processes, engine, rows per device, accumulation); 8 windows a step in each
    "1 process": (1, "ddp", 8, 1),
    "DDP x 2": (2, "ddp", 4, 1),
    "ZeRO-2 x 2": (2, "zero-2", 4, 1),
    "ZeRO-3 x 2": (2, "zero-3", 4, 1),
    "ZeRO-2 x 2, accumulation 4": (2, "zero-2", 1, 4),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Every layout trained on the same batches; name -> output folder."""
    done = {}
    for name, (nproc, engine, size, accumulation) in LAYOUTS.items():
        done[name] = tmp_path_factory.mktemp("parity")
        flags = [
            "--per_device_train_batch_size",
            size,
            "--gradient_accumulation_steps",
            accumulation,
            "--save_strategy",
            "no",
        ]
        train(done[name], *flags, nproc=nproc, engine=engine)
    return done


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "1 process"])
def test_loss_and_weights_equal_those_of_one_process(layouts, name):
    one, other = layouts["1 process"], layouts[name]
    expected, losses = history(one), history(other)
    assert len(expected) == 12 and losses.keys() == expected.keys()
    worst = max(abs(losses[step] - expected[step]) / expected[step] for step in expected)
    assert worst < 1e-4, f"loss differs by {worst:.1e} relative"
    assert largest_difference(weights(one / "final"), weights(other / "final")) < 1e-4
    held_out = [report(folder)["metrics"]["after"]["loss"] for folder in (one, other)]
    assert abs(held_out[0] - held_out[1]) < 1e-4 * held_out[0]
    assert expected[12] < 0.8 * expected[1], (
        "the runs must have learned something for this to mean anything"
    )


def test_answers_under_zero_3_are_those_of_ddp(tmp_path):
    """Generated with weights that are gathered once; training goes on as if nothing had been
    asked."""
    flags = ["--eval_generate", 3, "--max_new_tokens", 8, "--max_steps", 3, "--save_strategy", "no"]
    found = {}
    for engine, fault in (("ddp", None), ("zero-3", "count-gathers@0")):
        done = train(tmp_path / engine, *flags, engine=engine, fault=fault)
        run = json.loads((tmp_path / engine / "run.json").read_text())
        answers = [sample["answer"] for sample in run["before"]["samples"]]
        found[engine] = answers, report(tmp_path / engine)["metrics"]["after"]["exact_match"]
    assert found["ddp"] == found["zero-3"] and len(found["ddp"][0]) == 3
    assert "gathered in generation: 0" in done.stdout
    expected, losses = (history(tmp_path / engine) for engine in found)
    assert all(abs(losses[step] - expected[step]) < 1e-4 * expected[step] for step in expected)


def test_rank_counts_make_one_total(layouts):
    """Token counts and throughput are those of all ranks together."""
    tokens = {name: report(folder)["tokens"] for name, folder in layouts.items()}
    assert len({json.dumps(t) for t in tokens.values()}) == 1, tokens
    assert tokens["1 process"]["total"] > tokens["1 process"]["label"] > 0


@pytest.fixture(scope="module")
def experts(layouts, tmp_path_factory):
    """A model of experts whose loss holds their balance, untrained, with the other runs'
    tokenizer."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("experts")
    tokenizer = AutoTokenizer.from_pretrained(layouts["1 process"] / "final")
    size = {"hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    balance = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
        **(size | heads | balance),
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_balance_of_experts_is_that_of_one_process(experts, tmp_path):
    """It is a mean over experts in a batch: once it was added for each micro-batch and rank."""
    flags = ["--model_name_or_path", experts, "--save_strategy", "no", "--max_steps", 4]
    sizes = {"one": (1, 8, 1), "two": (2, 2, 2)}  # processes, rows per device, accumulation
    losses = {}
    for name, (nproc, size, accumulation) in sizes.items():
        batch = ["--per_device_train_batch_size", size]
        batch += ["--gradient_accumulation_steps", accumulation]
        train(tmp_path / name, *flags, *batch, nproc=nproc)
        losses[name] = history(tmp_path / name)
    assert len(losses["one"]) == 4
    for step, expected in losses["one"].items():
        assert expected > 8  # 6.9 for guessing, and the balance
        assert abs(losses["two"][step] - expected) < 1e-4 * expected


# ---- resume -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """engine -> folder of the run that nothing happened to (made when first asked for)."""
    made = {}

    def make(engine):
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp(f"whole-{engine}")
            train(made[engine], engine=engine)
        return made[engine]

    return make


KILLS = [
    ("ddp", "kill-in-step"),
    ("ddp", "kill-in-marker@3"),
    ("zero-2", "kill-before-marker@2"),
    ("zero-3", "kill-in-optimizer@2"),
]


@pytest.mark.parametrize("engine, fault", KILLS)
def test_killed_run_continues_bit_exactly(uninterrupted, tmp_path, engine, fault):
    if "@" not in fault:
        fault += f"@{random.SystemRandom().randrange(6, 12)}"  # any step will do; the failure message names it
    train(tmp_path, engine=engine, fault=fault, code=1)
    assert not (tmp_path / "final").exists() and not (tmp_path / "report.json").exists()
    again = train(tmp_path, engine=engine)
    assert "continuing from" in again.stdout
    if "step" not in fault:
        assert "skipped" in again.stdout and f"checkpoint-{4 * int(fault[-1])}: " in again.stdout, (
            again.stdout
        )
    whole = uninterrupted(engine)
    assert history(tmp_path) == history(whole), fault
    assert weights_sha(tmp_path / "final") == weights_sha(whole / "final"), fault
    assert report(tmp_path)["tokens"] == report(whole)["tokens"]
    assert report(tmp_path)["metrics"] == report(whole)["metrics"]


def test_every_checkpoint_torn_is_not_a_silent_start_from_zero(uninterrupted, tmp_path):
    train(tmp_path, fault="kill-in-optimizer@1", code=1)
    line = error_line(finish(begin(tmp_path, "--resume_from_checkpoint", "true")), 1)
    assert "no complete checkpoint" in line


@pytest.mark.parametrize("engine, number", [("ddp", signal.SIGINT)])
def test_signal_saves_and_the_same_command_continues(uninterrupted, tmp_path, engine, number):
    process = begin(tmp_path, engine=engine)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(number)
            break
    result = finish(process)
    assert result.returncode == 75, result.stderr[-2000:] + result.stdout[-2000:]
    assert "Continue with" in result.stdout and not (tmp_path / "final").exists()
    assert list(tmp_path.glob("checkpoint-*/complete.json"))
    train(tmp_path, engine=engine)
    assert weights_sha(tmp_path / "final") == weights_sha(uninterrupted(engine) / "final")


def test_another_number_of_processes(tmp_path):
    """DDP continues with a warning; that ZeRO refuses stands in test_run_folder.py."""
    train(tmp_path, nproc=2, fault="kill-in-step@6", code=1)
    again = train(tmp_path, nproc=1)
    assert "order of the data differs" in again.stdout and (tmp_path / "final").is_dir()


# ---- one folder, several runs -------------------------------------------------------------------------------


def test_finished_run_is_told_and_another_run_is_refused(uninterrupted):
    out = uninterrupted("ddp")
    before = weights_sha(out / "final")
    assert "finished at step 12" in train(out).stdout
    line = error_line(finish(begin(out, "--seed", 7)), 2)
    assert (
        "another run" in line
        and "seed 42 -> 7" in line
        and "--resume_from_checkpoint" in line
        and "OUTPUT" in line
    )
    assert weights_sha(out / "final") == before


def test_overwrite_starts_anew(tmp_path):
    flags = ["--max_steps", 4]
    train(tmp_path, *flags)
    first = weights_sha(tmp_path / "final")
    again = train(tmp_path, *flags, "--overwrite_output_dir", "true", "--seed", 7)
    assert "continuing" not in again.stdout and weights_sha(tmp_path / "final") != first


# ---- faults -------------------------------------------------------------------------------------------------


NANS = [
    ("nan-loss@6", "zero-2"),
    ("nan-grad@6", "ddp"),
    ("nan-grad@6", "zero-2"),
    ("nan-grad@6", "zero-3"),
]


@pytest.mark.parametrize("fault, engine", NANS)
def test_nan_stops_before_the_optimizer_step_and_names_the_rows(tmp_path, fault, engine):
    result = finish(begin(tmp_path, engine=engine, fault=fault))
    expect(result, 1)
    is_late = engine != "ddp"  # DeepSpeed has stepped, and saves nothing
    where = "before anything was saved" if is_late else "before the optimizer step"
    assert f"stopped {where}" in result.stderr
    assert "step 6" in result.stderr and "Traceback" not in result.stderr and "nan" in result.stderr
    rows = json.loads(next(tmp_path.glob("nan_rows_*.json")).read_text())
    assert (
        rows["step"] == 6
        and rows["rows"]
        and all(".jsonl:" in row["source"] for row in rows["rows"])
    )
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert all(t.isfinite().all() for t in weights(tmp_path / "checkpoint-4").values())


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path):
    """Gradients and loss were sound; the next loss would come after the checkpoint."""
    line = error_line(finish(begin(tmp_path, "--save_total_limit", 1, fault="nan-weights@8")), 1)
    assert "model.safetensors" in line and "embed_tokens.weight holds NaN" in line
    assert checkpoint.last_complete(tmp_path)[0] == tmp_path / "checkpoint-4"
    assert not (tmp_path / "checkpoint-8" / checkpoint.MARKER).exists()
    assert not (tmp_path / "final").exists()


DEATHS = [
    ("raise-on-rank-1@3", "rank one broke on purpose"),
    ("die-on-rank-1@3", "rank 1 was killed by SIGKILL"),
]


@pytest.mark.parametrize("fault, words", DEATHS)
def test_a_dead_rank_ends_the_run_with_its_error_last(tmp_path, fault, words):
    began = time.time()
    result = expect(finish(begin(tmp_path, fault=fault)), 1)
    assert words in result.stderr.strip().splitlines()[-1], result.stderr[-2000:]
    assert time.time() - began < 120
    assert not subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True
    ).stdout.strip()


def processes_of(output) -> list[psutil.Process]:
    """Those that have the name of the output folder among their words."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(output) in one.cmdline() and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


def stop_client_of(rank, output) -> None:
    """A test's rank is a fork behind a client, which the launcher takes for the rank."""
    for one in processes_of(output):
        if one.environ().get("RANK") == str(rank):
            one.suspend()


def test_a_rank_that_hangs_is_named_and_rank_0_may_work_longer_than_that(tmp_path):
    """Rank 0's checkpoint takes longer than the time-out; then rank 1 is stopped in step 6."""
    flags = ["--ddp_timeout", 10]
    process = begin(tmp_path, *flags, fault="stop-on-rank-1@6", SLOW_MARKER=13)
    for line in process.stdout:
        if line.startswith("step 5/"):
            stop_client_of(1, tmp_path)
            break
    began = time.time()
    line = error_line(finish(process), 1)
    assert time.time() - began < 60
    assert "rank 1 (process " in line and "no sign of life" in line and "--ddp_timeout 10" in line
    assert checkpoint.last_complete(tmp_path)[0] == tmp_path / "checkpoint-4"
    assert not processes_of(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A 60 MB file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], capture_output=True, text=True
    )
    assert not mounted.returncode, (
        f"a small tmpfs cannot be mounted; run the tests as root: {mounted.stderr.strip()}"
    )
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk_is_one_line_and_the_older_checkpoint_survives(small_disk):
    """One checkpoint fits (weights and two moments), the next does not; with room again the run continues."""
    out = small_disk / "run"
    filler = small_disk / "filler"
    process = begin(out, "--save_total_limit", 2)
    for line in process.stdout:
        if line.startswith("step 5/"):
            free = os.statvfs(small_disk)
            filler.write_bytes(b"0" * (free.f_bavail * free.f_frsize - 2_000_000))
            break
    result = finish(process)
    line = error_line(result, 1)
    assert "no space left" in line and str(out) in line and "GiB free" in line
    filler.unlink()
    again = train(out)
    assert (
        "skipped" in again.stdout and "continuing from" in again.stdout and (out / "final").is_dir()
    )


# ---- precision ----------------------------------------------------------------------------------------------


def test_bf16_training_tracks_fp32(layouts, tmp_path):
    """Masters in float32: nearly every weight moves and the loss curve stays within 2 %."""
    flags = [
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        1,
        "--save_strategy",
        "no",
        "--bf16",
        "true",
    ]
    train(tmp_path, *flags, engine="ddp")
    expected, losses = history(layouts["DDP x 2"]), history(tmp_path)
    assert max(abs(losses[s] - expected[s]) / expected[s] for s in expected) < 0.02
    # weights kept in bf16 would all be numbers that bf16 has
    after = torch.cat([t.flatten() for t in weights(tmp_path / "final").values()])
    assert after.dtype == torch.float32
    assert (after != after.bfloat16().float()).float().mean() > 0.95


def test_folder_after_a_run(uninterrupted):
    out = uninterrupted("ddp")
    names = {path.name for path in Path(out).iterdir()}
    assert {
        "final",
        "loss.png",
        "report.md",
        "report.json",
        "run.json",
        "trainer_state.json",
    } <= names
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    assert not list(out.rglob("*.part*"))
