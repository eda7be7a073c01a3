"""minimind_npu/train.py as a user runs it: equal on all engines, exact after kills, refusals, what it leaves."""

import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
from harness import (
    ROOT,
    error_line,
    expect,
    finish,
    history,
    largest_difference,
    own_modules,
    report,
    shell,
    start,
    weights,
    weights_sha,
)

RECIPE = ROOT / "minimind_npu"
NAMES = ("settings", "named", "defaults", "loop.tracking", "loop.parallel")
settings, named, defaults, tracking, parallel = own_modules("minimind_npu", *NAMES)
SHORT = [
    "--max_steps", 8, "--save_steps", 4, "--logging_steps", 1, "--eval_generate", 0, "--report_to", "none",
    "--eval_ratio", 0.01, "--bf16", "false", "--model_max_length", 128, "--hidden_size", 32, "--num_hidden_layers", 2,
    "--optimizer", "adamw",
]  # fmt: skip
ENGINES = {"ddp": [], "zero-2": [RECIPE / "ds_zero2.json"], "zero-3": [RECIPE / "ds_zero3.json"]}
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"}


def begin(output, *flags, nproc=1, engine="ddp", fault=""):
    more = ["--deepspeed", *ENGINES[engine]] if ENGINES[engine] else []
    command = ["python", ROOT / "common/launch.py", nproc] if nproc > 1 or more else ["python"]
    faulty = ROOT / "tests/support/faults/faulty_loop.py"
    command += [faulty, RECIPE / "train.py", fault] if fault else [RECIPE / "train.py"]
    return start([*command, *more, *SHORT, "--output_dir", output, *flags], **QUIET)


def train(output, *flags, code=0, **settings):
    return expect(finish(begin(output, *flags, **settings)), code)


LAYOUTS = {  # name: (processes, engine, windows per device, accumulation); 8 windows a step in each
    "DDP x 2": (2, "ddp", 2, 2),
    "ZeRO-2 x 2": (2, "zero-2", 2, 2),
    "ZeRO-3 x 2": (2, "zero-3", 4, 1),
}


def of_layout(layout):
    """-> (flags, how to start it)."""
    nproc, engine, size, steps = LAYOUTS[layout]
    flags = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps]
    return flags, {"nproc": nproc, "engine": engine}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Eight steps of one process, the reference of everything below."""
    out = tmp_path_factory.mktemp("single")
    train(out, "--per_device_train_batch_size", 8)
    return out


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """layout -> folder of its eight steps, run when first asked for."""
    folders = {}

    def run(layout):
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("spread")
            flags, how = of_layout(layout)
            train(folders[layout], *flags, **how)
        return folders[layout]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_engine_gives_the_same_losses_and_weights(single, spread, layout):
    out = spread(layout)
    expected, found = history(single), history(out)
    assert found.keys() == expected.keys() == set(range(1, 9))
    assert max(abs(found[step] - expected[step]) for step in expected) < 5e-5
    assert largest_difference(weights(out / "final"), weights(single / "final")) < 2e-4
    facts = report(out)
    assert facts["engine"] == LAYOUTS[layout][1] and report(single)["engine"] == "single"
    assert facts["metrics"]["after"]["bits_per_byte"] == pytest.approx(
        report(single)["metrics"]["after"]["bits_per_byte"], abs=1e-4
    )


DROPOUT = [
    "--use_moe", "true", "--use_lora", "true", "--lora_dropout", 0.2, "--per_device_train_batch_size", 4,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", ["experts, adapters with dropout", "ZeRO-2 x 2"])
def test_killed_and_continued_is_the_same_run(spread, tmp_path, case):
    """kill -9 at the beginning of the second save; the same command again ends with the same bits.
    One process and DDP, kills at random: ../test_faults.py."""
    cut = tmp_path / "cut"
    if case in LAYOUTS:
        flags, how = of_layout(case)
        whole = spread(case)
    else:
        flags, how = DROPOUT, {}
        whole = tmp_path / "whole"
        train(whole, *flags)
    killed = finish(begin(cut, *flags, **how, fault="kill@checkpoint-8"))
    expect(killed, 1 if case in LAYOUTS else -signal.SIGKILL)
    done = train(cut, *flags, **how)
    assert f"continuing from {cut}/checkpoint-4" in done.stdout
    assert history(cut) == history(whole)
    assert weights_sha(cut / "final") == weights_sha(whole / "final")
    assert report(cut)["metrics"] == report(whole)["metrics"]


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


def test_a_loss_that_is_no_number_ends_the_run(capsys):
    """A gradient that is none: ../test_faults.py."""
    for loss in (float("nan"), float("inf")):
        with pytest.raises(SystemExit) as stop:
            parallel.refuse_nan(loss, 3)
        said = capsys.readouterr().err
        assert stop.value.code == 1 and f"step 3: the loss is {loss}; stopped before" in said
    parallel.refuse_nan(2.0, 3)


@pytest.mark.slow
def test_a_rate_that_is_far_too_high_ends_the_run(tmp_path):
    line = error_line(finish(begin(tmp_path, "--learning_rate", 1e20, "--max_grad_norm", 0)), 1)
    assert "stopped" in line and "--learning_rate" in line and not (tmp_path / "final").exists()


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


def held_out_points(output):
    state = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in state if "eval_loss" in entry]


@pytest.mark.slow
def test_held_out_rows_are_measured_along_a_run(single):
    """As often as is cheap: 8 steps of 8 windows pay for one batch of held-out ones at the end."""
    assert held_out_points(single) == [0, 8]


@pytest.mark.parametrize(
    "windows, every, expected",
    [
        (4000, None, [0, *range(100, 1001, 100)]),  # ten points
        (400, None, [0, 143, 286, 429, 572, 715, 858, 1000]),  # seven are 5 % of the work
        (20, None, []),
        (4000, 300, [300, 600, 900]),
        (4000, 0, []),
    ],
)
def test_when_held_out_rows_are_measured(windows, every, expected):
    """1,000 steps that compute `windows` windows; 8 held-out ones are measured at once."""
    progress = {"step": 0}
    plan = SimpleNamespace(fraction_done=lambda: progress["step"] / 1000)
    found = []
    measured = []
    run = SimpleNamespace(
        plan=plan,
        progress=progress,
        note=lambda metrics: found.append(progress["step"]),
        is_due=lambda every: bool(every) and progress["step"] % every == 0,
    )
    loader = SimpleNamespace(windows=4, world=2, some=lambda count: list(range(count)))
    curve = tracking.Curve(every, run, loader, windows, measured.append)
    for step in range(1, 1001):
        progress["step"] = step
        curve.step()
    assert found == expected
    computed = sum(len(bins) for bins in measured if bins is not None)
    assert computed / 3 <= 0.06 * windows, "a forward is a third of a step"
    assert (None in measured) == (every == 300), "all rows where the user says when"


# ---- mistakes: before anything is loaded ----------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--stage", "rlhf"], "--stage rlhf"), (["--optimiser", "x"], "unknown flag --optimiser; did you mean --optimizer"),
    (["--neftune_noise_alpha", 5], "does not know it"), (["--stage", "distill"], "--teacher"),
    (["--reference", "adapter"], "no adapter to switch off"), (["--warmup_steps", 20], "a part of the run"),
    (["--lr_scheduler_type", "polynomial"], "cosine, linear"), (["--packing", "false"], "unknown flag --packing"),
    (["--optimizer", "muon", "--use_lora", "true"], "not for those of an adapter"),
    (["--optim", "adafactor"], "--optim adafactor: the loop has"), (["--max_minutes", -1], "--max_minutes -1.0: 0 or more"),
    (["--hidden_size", 100], "a multiple of 8"), (["--model_max_length", 12], "16 or more"),
    (["--min_lr_ratio", 2], "from 0 to 1"), (["--num_train_epochs", 0, "--max_steps", -1], "above 0"),
])  # fmt: skip
def test_usage_mistakes(monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and words in lines[0]


def test_sizes_beside_weights_are_refused(monkeypatch, capsys, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    defaults.MiniMindConfig(**sizes).save_pretrained(tmp_path)
    for flags in (["--hidden_size", 64], ["--num_hidden_layers", 3], ["--use_moe", "true"]):
        with pytest.raises(SystemExit) as stop:
            parsed(monkeypatch, "--from_weight", tmp_path, "--model_max_length", 64, *flags)
        assert stop.value.code == 2 and "have their own" in capsys.readouterr().err
    parsed(monkeypatch, "--from_weight", tmp_path, "--model_max_length", 65)
    assert "above the 64 positions" in capsys.readouterr().out


def test_flags_of_another_stage_are_told(monkeypatch, capsys):
    """Not refused: run_all.sh gives its flags to every stage."""
    parsed(monkeypatch, "--beta", 0.2, "--think_weight", 3, "--lora_r", 4, "--muon_lr", 0.1)
    said = capsys.readouterr().out
    assert said.count("no effect") == 4 and "--beta: no effect; --stage pretrain has none" in said


@pytest.mark.parametrize("length", [16, 100, 300, 384, 500, 1000, 1500, 2048, 3000, 4096, 9000])
@pytest.mark.parametrize("windows", [1, 12, 16, 32])
def test_a_cpu_takes_smaller_batches_of_the_same_step(monkeypatch, length, windows):
    monkeypatch.setattr(named.cli, "given_by_user", lambda name: False)
    args = SimpleNamespace(model_max_length=length)
    training = SimpleNamespace(per_device_train_batch_size=windows, gradient_accumulation_steps=1)
    defaults.fit_batches_to_cpu(args, training)
    batch = training.per_device_train_batch_size
    assert batch * training.gradient_accumulation_steps == windows
    assert batch == 1 or batch * length <= defaults.CPU_TOKENS


def test_a_usage_mistake_ends_the_process_with_2(tmp_path):
    assert "--stage rlhf" in error_line(finish(begin(tmp_path, "--stage", "rlhf")), 2)


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*SHORT, *flags])])
    return settings.parse_args()


@pytest.mark.parametrize("flags, words", [
    (["--size", "27m"], r"neither a folder nor a size \(26m"), (["--from_weight", "no/such/folder"], "no trained model"),
    (["--stage", "distill", "--teacher", "sft2"], "--teacher sft2: neither"),
    (["--stage", "sft", "--from_weight", "distill"], "is not there"),
])  # fmt: skip
def test_weights_that_are_not_there(monkeypatch, tmp_path, flags, words):
    monkeypatch.setattr(named, "OUTPUT", tmp_path)
    with pytest.raises(SystemExit, match=words):
        parsed(monkeypatch, *flags)


def test_weights_of_other_classes_are_refused(monkeypatch, tmp_path):
    """An exported model would load in part, and train with random weights for the rest."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    with pytest.raises(SystemExit, match="is a llama model; .*export.py --import"):
        parsed(monkeypatch, "--from_weight", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="is an adapter"):
        parsed(monkeypatch, "--from_weight", tmp_path)


def test_toys_take_muon_where_it_can_work(monkeypatch):
    plain = SHORT[:-2]  # SHORT ends with an optimizer
    for flags, expected in (
        ([], "muon"),
        (["--use_lora", "true"], "adamw"),
        (["--stage", "reason"], "adamw"),
        (["--hidden_size", 256], "adamw"),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*plain, *flags])])
        assert settings.parse_args()[0].optimizer == expected, flags


def test_gradient_checkpointing_is_obeyed_under_both_names(monkeypatch):
    for flag in ("--gradient_checkpointing", "--activation_checkpointing"):
        _, training, _ = parsed(monkeypatch, flag, "true")
        assert settings.cli.recompute(training)
    _, training, _ = parsed(monkeypatch)
    assert not settings.cli.recompute(training)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--hidden_size", 512], True),
        (["--size", "26m", "--hidden_size", 0], True),
        (["--hidden_size", 512, "--use_moe", "true"], False),
        (["--size", "198m-moe", "--hidden_size", 0], False),
        (["--hidden_size", 64], False),
        (["--hidden_size", 512, "--torch_compile", "false"], False),
    ],
)
def test_layers_are_compiled_where_that_pays(monkeypatch, flags, expected):
    assert not parsed(monkeypatch, *flags)[1].torch_compile, "no Triton on a CPU"
    monkeypatch.setattr(defaults.device, "compile_pays", lambda: True)
    assert parsed(monkeypatch, *flags)[1].torch_compile == expected


# ---- all stages -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_all_goes_from_nothing_to_a_chat(tmp_path):
    """Every stage through run_all.sh, a few steps each."""
    flags = [
        "--max_steps", 3, "--eval_generate", 2, "--max_new_tokens", 8, "--max_eval_samples", 20, "--report_to", "none",
        "--bf16", "false",
    ]  # fmt: skip
    settings = {
        "OUTPUT": tmp_path,
        "NPROC": 1,
        "STAGES": "tokenizer pretrain sft lora dpo distill reason toolcall eval chat",
        "EVAL_TOOLS": "--num_rows 4 --max_new_tokens 8",
        "EVAL": "--choice " + str(RECIPE / "data/eval/choice.jsonl") + " --num_rows 8",
    }
    done = expect(shell(RECIPE / "run_all.sh", *flags, **settings, fork=True))
    assert "| choice by letter | accuracy |" in done.stdout
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
    assert report(tmp_path / "toolcall")["steps"] == 3 and "| right tool | " in done.stdout
