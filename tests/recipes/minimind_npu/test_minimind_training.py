"""minimind_npu/train.py as a user runs it: equal on all engines, exact after kills, refusals, what it leaves."""

import json
import os
import signal
import time

import pytest
from harness import (
    ROOT,
    error_line,
    expect,
    finish,
    history,
    largest_difference,
    report,
    shell,
    start,
    weights,
    weights_sha,
)

RECIPE = ROOT / "minimind_npu"
SHORT = [
    "--max_steps", 8, "--save_steps", 4, "--logging_steps", 1, "--eval_generate", 0, "--report_to", "none",
    "--eval_ratio", 0.01, "--bf16", "false", "--model_max_length", 128, "--hidden_size", 32, "--num_hidden_layers", 2,
    "--optimizer", "adamw",
]  # fmt: skip
ENGINES = {"ddp": [], "zero-2": [RECIPE / "ds_zero2.json"], "zero-3": [RECIPE / "ds_zero3.json"]}
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"}


def begin(output, *flags, nproc=1, engine="ddp"):
    more = ["--deepspeed", *ENGINES[engine]] if ENGINES[engine] else []
    script = ["python", ROOT / "common/launch.py", nproc] if nproc > 1 or more else ["python"]
    return start(
        [*script, RECIPE / "train.py", *more, *SHORT, "--output_dir", output, *flags], **QUIET
    )


def train(output, *flags, code=0, **settings):
    return expect(finish(begin(output, *flags, **settings)), code)


LAYOUTS = {  # name: (processes, engine, windows per device, accumulation); 8 windows a step in each
    "accumulation": (1, "ddp", 2, 4), "DDP x 2": (2, "ddp", 4, 1), "ZeRO-2 x 2": (2, "zero-2", 2, 2),
    "ZeRO-3 x 2": (2, "zero-3", 4, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Eight steps of one process, the reference of everything below."""
    out = tmp_path_factory.mktemp("single")
    train(out, "--per_device_train_batch_size", 8)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_engine_gives_the_same_losses_and_weights(single, tmp_path, layout):
    nproc, engine, size, steps = LAYOUTS[layout]
    flags = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps]
    train(tmp_path, *flags, nproc=nproc, engine=engine)
    expected, found = history(single), history(tmp_path)
    assert found.keys() == expected.keys() == set(range(1, 9))
    assert max(abs(found[step] - expected[step]) for step in expected) < 5e-5
    assert largest_difference(weights(tmp_path / "final"), weights(single / "final")) < 2e-4
    facts = report(tmp_path)
    assert facts["engine"] == (engine if engine != "ddp" else "ddp" if nproc > 1 else "single")
    assert facts["metrics"]["after"]["bits_per_byte"] == pytest.approx(
        report(single)["metrics"]["after"]["bits_per_byte"], abs=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["experts, muon", "zero-2", "adapter with dropout"])
def test_killed_and_continued_is_the_same_run(single, tmp_path, case):
    """kill -9 after the checkpoint of step 4; the same command again ends with the same bits."""
    flags, engine, nproc = ["--per_device_train_batch_size", 4], "ddp", 1
    if case == "experts, muon":
        flags += ["--use_moe", "true", "--optimizer", "muon"]
    elif case == "zero-2":
        engine, nproc = "zero-2", 2
    else:
        flags = ["--per_device_train_batch_size", 1, "--stage", "lora", "--from_weight", single / "final",
                 "--lora_dropout", 0.2]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, *flags, engine=engine, nproc=nproc)
    process = begin(cut, *flags, engine=engine, nproc=nproc)
    while not (cut / "checkpoint-4/complete.json").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = train(cut, *flags, engine=engine, nproc=nproc)
    assert "continuing from" in done.stdout or "holds this very run" in done.stdout
    assert history(cut) == history(whole)
    assert weights_sha(cut / "final") == weights_sha(whole / "final")
    assert report(cut)["metrics"]["before"] == report(whole)["metrics"]["before"]


@pytest.mark.slow
def test_another_number_of_processes_goes_on_at_the_same_row(single, tmp_path):
    """Two processes are interrupted; one goes on, with the losses of a run that never was."""
    process = begin(tmp_path, "--per_device_train_batch_size", 4, "--save_steps", 100, nproc=2)
    for line in process.stdout:
        if line.startswith("step 2/"):
            os.killpg(process.pid, signal.SIGTERM)
            break
    stopped = expect(finish(process), 75)
    assert "interrupted at step" in stopped.stdout and "saved" in stopped.stdout
    done = train(tmp_path, "--per_device_train_batch_size", 8, "--resume_from_checkpoint", "true")
    assert "continuing at the same row" in done.stdout
    expected, found = history(single), history(tmp_path)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in expected) < 5e-5
    assert report(tmp_path)["tokens"] == report(single)["tokens"]


@pytest.mark.slow
def test_what_a_run_leaves(single):
    import transformers

    names = {path.name for path in single.iterdir()}
    assert names >= {
        "final",
        "pretrain_32.safetensors",
        "loss.png",
        "report.md",
        "report.json",
        "checkpoint-8",
    }
    assert weights_sha(single / "final") == weights_sha_of(single / "pretrain_32.safetensors")
    facts = report(single)
    assert (
        facts["stage"] == "pretrain"
        and facts["mfu"] > 0
        and facts["metrics"]["before"]["bits_per_byte"] > 2
    )
    assert facts["tokens"]["total"] > facts["tokens"]["label"] > 1000
    assert transformers.AutoTokenizer.from_pretrained(single / "final").eos_token_id == 2
    again = expect(finish(begin(single, "--per_device_train_batch_size", 8)))
    assert "holds this very run" in again.stdout


def weights_sha_of(file):
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, folder)
        return weights_sha(folder)


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    line = error_line(finish(begin(tmp_path, "--learning_rate", 1e20, "--max_grad_norm", 0)), 1)
    assert "the loss is" in line and "--learning_rate" in line and not (tmp_path / "final").exists()


@pytest.mark.slow
def test_by_the_clock(tmp_path):
    """--max_minutes ends the run and its schedule, whatever is left of the data."""
    flags = [
        "--max_minutes",
        0.03,
        "--max_steps",
        -1,
        "--eval_steps",
        5,
        "--num_train_epochs",
        1000,
    ]
    done = train(tmp_path, "--per_device_train_batch_size", 4, *flags)
    facts = report(tmp_path)
    assert (
        1.5 < facts["seconds"] < 60
        and facts["steps"] > 3
        and "held out at step 5" in done.stdout + done.stderr
    )
    state = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in state if "loss" in entry]
    assert rates[-1] < 0.2 * max(rates)


@pytest.mark.parametrize("flags, words", [
    (["--stage", "rlhf"], "--stage rlhf"), (["--optimiser", "x"], "unknown flag --optimiser; did you mean --optimizer"),
    (["--neftune_noise_alpha", 5], "does not know it"), (["--stage", "distill"], "--teacher"),
    (["--reference", "adapter"], "no adapter to switch off"), (["--warmup_steps", 20], "a part of the run"),
    (["--lr_scheduler_type", "polynomial"], "cosine, linear"),
])  # fmt: skip
def test_usage_mistakes(tmp_path, flags, words):
    assert words in error_line(finish(begin(tmp_path, *flags)), 2)


@pytest.mark.parametrize("flags, words", [
    (["--size", "27m"], "neither a folder nor a size (26m"), (["--from_weight", "no/such/folder"], "no trained model"),
    (["--stage", "distill", "--teacher", "sft2"], "--teacher sft2: neither"),
])  # fmt: skip
def test_weights_that_are_not_there(tmp_path, flags, words):
    assert words in error_line(finish(begin(tmp_path, *flags)), 1)


def test_weights_of_other_classes_are_refused(tmp_path):
    """An exported model would load in part, and train with random weights for the rest."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    line = error_line(finish(begin(tmp_path / "out", "--from_weight", tmp_path)), 1)
    assert "is a llama model" in line and "export.py --import" in line
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in error_line(
        finish(begin(tmp_path / "out", "--from_weight", tmp_path)), 1
    )


def test_a_stage_that_was_not_trained(tmp_path):
    assert "is not there" in error_line(
        finish(begin(tmp_path, "--stage", "sft", "--from_weight", "distill")), 1
    )


@pytest.mark.slow
def test_run_all_goes_from_nothing_to_a_chat(tmp_path):
    """Every stage through run_all.sh, a few steps each."""
    flags = [
        "--max_steps",
        3,
        "--eval_generate",
        2,
        "--max_new_tokens",
        8,
        "--report_to",
        "none",
        "--bf16",
        "false",
    ]
    stages = "tokenizer pretrain sft lora dpo distill reason eval chat"
    done = expect(
        shell(RECIPE / "run_all.sh", *flags, OUTPUT=tmp_path, NPROC=1, STAGES=stages, fork=True)
    )
    for stage in ("pretrain", "sft", "lora", "dpo", "distill", "reason"):
        facts = report(tmp_path / stage)
        assert (
            facts["steps"] == 3
            and facts["stage"] == stage
            and facts["metrics"]["after"]["loss"] > 0
        )
        assert f"| {stage} |" in done.stdout and (tmp_path / stage / "loss.png").is_file()
    assert report(tmp_path / "dpo")["metrics"]["before"]["accuracy"] == 0.5
    assert (
        report(tmp_path / "lora")["parameters"]["trained"]
        < report(tmp_path / "lora")["parameters"]["total"] / 5
    )
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").count(
        "|"
    ) > 60 and "你" in done.stdout
    assert (tmp_path / "dpo/dpo_128.safetensors").is_file()
