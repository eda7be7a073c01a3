"""The quick start: its default command, N processes as one, its flags, what it leaves. Kills, signals
and full disks: ../test_faults.py."""

import re
import sys

import pytest
import torch
from harness import ROOT, expect, finish, report, shell, start

FOLDER = ROOT / "minimind_npu"
sys.path.insert(0, str(FOLDER))
from quickstart import quickstart
from quickstart import text as quickstart_text

SMALL = [
    "--num_samples",
    300,
    "--epochs",
    2,
    "--warmup_steps",
    5,
    "--dtype",
    "fp32",
]  # 14 steps an epoch, 8 windows


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, flags)])
    return quickstart.parse()


def here(monkeypatch, tmp_path, *flags) -> dict:
    """The whole run in this process; the report it leaves."""
    quickstart.run(parsed(monkeypatch, "--output_dir", tmp_path, *flags))
    return report(tmp_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of the small run in this process."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as monkeypatch:
        here(monkeypatch, out, *SMALL)
    return out


# ---- what a user sees ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_default_command_learns_and_its_model_reopens(tmp_path):
    printed = expect(shell(FOLDER / "quickstart.sh", OUTPUT=tmp_path, fork=True)).stdout
    facts = report(tmp_path)
    before, after = facts["metrics"]["before"], facts["metrics"]["after"]
    assert before["loss"] > 5.5 and after["loss"] < 0.7, facts["metrics"]
    assert before["sentences_ended_right"] == 0 and after["sentences_ended_right"] > 0.4
    assert facts["model"] == "tiny" and facts["world_size"] == 2 and facts["tokens_per_second"] > 0
    steps = facts["steps"]
    assert f"step {steps}/{steps} 100%" in printed and "tok/s" in printed and "| left" in printed
    assert printed.count("held out at step") == 5 and f"held out at step {steps}: loss" in printed
    assert (
        "the model goes on after the bar:" in printed and "| held out | before | after |" in printed
    )
    assert (tmp_path / "loss.png").stat().st_size > 10_000

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    for sample in facts["samples"][:3]:
        ids = tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False)
        text = tokenizer.decode(
            model.generate(**ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True
        )
        assert text.startswith(sample["prompt"] + sample["after"])


@pytest.mark.slow
def test_one_process_and_two_give_the_same_numbers(alone, tmp_path):
    script = ["python", ROOT / "common/launch.py", 2, FOLDER / "quickstart/quickstart.py"]
    flags = [*SMALL, "--batch_size", 4, "--output_dir", tmp_path]
    expect(finish(start([*script, *flags], HF_HUB_DISABLE_PROGRESS_BARS=1)))
    one, two = report(alone)["metrics"], report(tmp_path)["metrics"]
    for moment in ("before", "after"):
        assert one[moment]["loss"] == pytest.approx(two[moment]["loss"], rel=1e-4), moment
    assert two["after"]["loss"] < 0.5 * two["before"]["loss"], (
        "the runs must have learned something"
    )


def test_a_nan_loss_stops_the_run_and_saves_nothing_of_it(monkeypatch, tmp_path):
    stock = quickstart.train_step
    calls = []

    def step(*args):
        calls.append(1)
        loss, norm = stock(*args)
        return loss * (float("nan") if len(calls) == 9 else 1), norm

    monkeypatch.setattr(quickstart, "train_step", step)
    with pytest.raises(SystemExit, match="step 9: the loss is nan; stopped"):
        here(monkeypatch, tmp_path, *SMALL[:4])
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "final").exists()


def test_going_on_from_a_folder_with_own_text(monkeypatch, tmp_path, capsys):
    """MODEL=... DATA=...: what launch.sh makes of them; and a warm-up longer than the run."""
    first = ["--num_samples", 120, "--epochs", 1, "--warmup_steps", 100]
    learned = here(monkeypatch, tmp_path / "a", *first)["metrics"]["after"]
    assert "warm-up shortened from 100 to 1 steps: the run has 5" in capsys.readouterr().out
    (tmp_path / "my.txt").write_text(
        "\n".join(quickstart_text.documents(200, seed=7)), encoding="utf-8"
    )
    own = [
        "--model_name_or_path",
        tmp_path / "a/final",
        "--data_path",
        tmp_path / "my.txt",
        "--max_length",
        64,
    ]
    facts = here(monkeypatch, tmp_path / "b", *own, "--learning_rate", 1e-3, "--warmup_steps", 2)
    assert facts["metrics"]["before"]["loss"] == pytest.approx(learned["loss"], abs=0.6), (
        "it starts where the other ended"
    )
    assert facts["metrics"]["after"]["loss"] < facts["metrics"]["before"]["loss"]
    assert facts["rows"]["read"] == 200 and facts["rows"]["held_out"] == 10


# ---- flags --------------------------------------------------------------------------------------------------


def test_defaults_of_the_real_model_and_its_size(monkeypatch):
    args = parsed(monkeypatch, "--model_name", "gpt2")
    sizes = (args.batch_size, args.max_length, args.epochs, args.learning_rate, args.warmup_steps)
    assert sizes == (8, 256, 3, 5e-5, 100)
    with torch.device("meta"):
        model, tokenizer = quickstart.load(args, quickstart_text.documents(50, 0), None)
    assert model.num_parameters() == 124_439_808 and len(tokenizer) <= model.config.vocab_size


def test_flags_beat_the_defaults_of_tiny(monkeypatch):
    args = parsed(monkeypatch, "--epochs", 2, "--batch-size", 3, "--max_length", 1500)
    assert (args.model_name, args.epochs, args.batch_size, args.learning_rate) == (
        "tiny",
        2,
        3,
        6e-3,
    )
    model, _ = quickstart.load(args, quickstart_text.documents(50, 0), None)
    assert model.config.n_positions == 1500 and model.config.n_embd == 96


MISTAKES = {
    ("--max_lenght", 3): "unknown flag --max_lenght; did you mean --max_length?",
    ("--epochs", "three"): "invalid int value: 'three'",
    ("--epochs", 0): "--epochs 0: must be above 0",
    ("--dtype", "int8"): "--dtype int8: one of auto, bf16, fp16, fp32",
    ("--dtype", "fp16"): "fp16 needs an accelerator",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_wrong_flag_is_one_line_and_exit_2(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        stop.value.code == 2
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and MISTAKES[flags] in lines[0]
    )


def test_too_little_text_and_a_length_beyond_the_model_are_one_line(monkeypatch, tmp_path):
    with pytest.raises(
        SystemExit, match="less than one window of 128: give more text, or a smaller --max_length"
    ):
        here(monkeypatch, tmp_path, "--num_samples", 20)
    with pytest.raises(SystemExit, match="not one step of --batch_size 512"):
        here(monkeypatch, tmp_path, "--num_samples", 120, "--batch_size", 512)


# ---- pieces -------------------------------------------------------------------------------------------------


def test_synthetic_text_is_the_same_for_a_seed_and_its_sums_are_right():
    texts = quickstart_text.documents(300, seed=1)
    assert texts == quickstart_text.documents(300, seed=1) != quickstart_text.documents(300, seed=2)
    assert len(set(texts)) == 300
    sums = re.findall(r"有(\d+)个.{1,2}，又买了(\d+)个，一共有(\d+)个", "".join(texts))
    assert len(sums) > 30 and all(int(a) + int(b) == int(c) for a, b, c in sums)


def test_windows_hold_every_token_once_and_close_each_document():
    from common import tiny

    tokenizer = tiny.make_tokenizer(["一二三四五"], 300, ["<end>"], eos_token="<end>")
    ids = quickstart_text.windows(tokenizer, ["一二", "三四五", "一"], 3)
    assert tokenizer.decode(ids.flatten()) == "一二<end>三四五<end>一<end>"


def test_questions_are_cut_at_the_last_comma():
    asked = quickstart_text.questions(
        ["小红有3个苹果，又买了4个，一共有7个苹果。今天是星期一。", "没有逗号"], 5
    )
    assert asked == [("小红有3个苹果，又买了4个，", "一共有7个苹果。"), ("没有", "逗号。")]


def test_learning_rate_rises_falls_and_never_is_zero():
    rates = [quickstart.learning_rate(step, total=10, warmup=4, peak=1.0) for step in range(1, 11)]
    assert (
        rates[:4] == [0.25, 0.5, 0.75, 1.0]
        and rates[3:] == sorted(rates[3:], reverse=True)
        and rates[-1] > 0
    )
