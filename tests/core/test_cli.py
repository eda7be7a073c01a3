"""Flags in, exit codes out."""

from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from common import cli
from common.runs import old_flags


@dataclass
class Args:
    model_name_or_path: str = field(default="tiny")
    data_path: str = field(default="")
    model_max_length: int = field(default=2048)


def parse(tmp_path, *words, defaults=None, tiny=None):
    return cli.parse_args(
        (Args, TrainingArguments),
        {"output_dir": str(tmp_path)} | (defaults or {}),
        tiny or {},
        list(words),
    )


def test_defaults_of_the_recipe_and_of_tiny(tmp_path):
    args, training = parse(
        tmp_path,
        defaults={"learning_rate": 1e-5},
        tiny={"learning_rate": 3e-3, "model_max_length": 64},
    )
    assert (training.learning_rate, args.model_max_length) == (3e-3, 64)
    args, training = parse(
        tmp_path,
        "--model_name_or_path",
        "x",
        defaults={"learning_rate": 1e-5},
        tiny={"learning_rate": 3e-3},
    )
    assert (training.learning_rate, args.model_max_length) == (1e-5, 2048)
    _, training = parse(tmp_path, "--learning_rate", "1", tiny={"learning_rate": 3e-3})
    assert training.learning_rate == 1


@pytest.mark.parametrize(
    "words, strategy", [("", "group_by_length"), (" true", "group_by_length"), (" false", "random")]
)
def test_grouping_can_be_switched_off(words, strategy):
    given = f"--group_by_length{words} --seed 1".split()
    assert old_flags.translate(given, ["seed"]) == [
        "--train_sampling_strategy",
        strategy,
        "--seed",
        "1",
    ]


def test_old_spellings_are_translated_with_one_warning(tmp_path, capsys):
    words = "--evaluation_strategy steps --eval_steps 5 --warmup_ratio 0.1 --save_safetensors true --group_by_length"
    words += " --logging_dir x"
    args, training = parse(
        tmp_path, *words.split(), "--gradient_checkpointing", "--max_seq_length", "77", "--no_cuda"
    )
    assert training.eval_strategy == "steps" and training.warmup_steps == 0.1
    assert training.train_sampling_strategy == "group_by_length"
    assert training.activation_checkpointing and training.use_cpu and args.model_max_length == 77
    out = capsys.readouterr().out
    assert (
        out.count("warning") == 1
        and "--evaluation_strategy -> --eval_strategy" in out
        and "--logging_dir -> (no effect)" in out
    )
    assert "gradient_checkpointing" not in out


def test_flags_with_dashes_and_equals(tmp_path):
    args, training = parse(tmp_path, "--learning-rate=0.5", "--model-max-length=9")
    assert (training.learning_rate, args.model_max_length) == (0.5, 9)


@pytest.mark.parametrize("words, hint", [
    (["--learning_rat", "1"], "did you mean --learning_rate"),
    (["--data_pth", "x"], "did you mean --data_path"),
    (["--qqqqqqqq"], "see --help"),
])  # fmt: skip
def test_unknown_flag_suggests_the_nearest(tmp_path, capsys, words, hint):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, *words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and hint in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "fast"],
        ["--learning_rate"],
        ["--bf16", "true", "--fp16", "true"],
        ["stray"],
    ],
)
def test_wrong_values_are_one_line_and_code_2(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, *words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


def test_precision_of_the_device_unless_given(tmp_path):
    from common import device

    _, training = parse(tmp_path)
    assert training.bf16 == (str(device.half_dtype()) == "torch.bfloat16")
    _, training = parse(tmp_path, "--bf16", "false")
    assert not training.bf16 and not training.fp16
