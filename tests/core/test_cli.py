"""Flags in, exit codes out."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import transformers
from transformers import Qwen2Config, TrainingArguments

from common import cli, tiny
from common.convert import models
from common.runs import flags, old_flags, plan


@dataclass
class EveryArgs(cli.RunArgs, cli.DataArgs, cli.LoraArgs):
    pass


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


@pytest.mark.parametrize(
    "words, told",
    [
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: 1 or more"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: 1 or more"),
        ("--learning_rate=-1e-4", "--learning_rate -0.0001: 0 or more"),
        ("--learning_rate nan", "--learning_rate nan: 0 or more"),
        ("--learning_rate inf", "--learning_rate inf: 0 or more"),
        ("--weight_decay -1 --seed -1", "--weight_decay -1.0: 0 or more; --seed -1: from 0"),
        ("--adam_beta2 1", "--adam_beta2 1.0: from 0 to below 1"),
        ("--model_max_length 0", "--model_max_length 0: 8 or more"),
        ("--model_max_length -5", "--model_max_length -5: 8 or more"),
        ("--lora_r 0", "--lora_r 0: 1 or more"),
        ("--lora_alpha 0", "--lora_alpha 0: above 0"),
        ("--lora_dropout 1", "--lora_dropout 1.0: from 0 to below 1"),
        ("--eval_ratio 1", "--eval_ratio 1.0: from 0 to below 1"),
        ("--max_new_tokens 0", "--max_new_tokens 0: 1 or more"),
        ("--save_steps 0", "--save_steps 0.0: above 0"),
        ("--max_steps 0", "--max_steps 0: 1 or more; leave it away"),
        ("--num_train_epochs 0", "--num_train_epochs 0: above 0"),
        ("--num_train_epochs -1", "--num_train_epochs -1: above 0"),
        ("--warmup_ratio 1.0", "--warmup_ratio 1.0: a share of the run"),
        ("--warmup_ratio=-0.1", "--warmup_ratio -0.1: a share of the run"),
        ("--optim lomo", "--optim lomo: You need to install"),
        ("--optim nonsense", "argument --optim: invalid choice"),
        ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_kwargs gives more"),
    ],
)
def test_values_that_no_run_can_have_are_told_before_anything_is_loaded(
    tmp_path, capsys, words, told
):
    given = (EveryArgs, TrainingArguments), {"output_dir": str(tmp_path)}, {}
    with pytest.raises(SystemExit) as stop:
        cli.parse_args(*given, words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and told in err and len(err.splitlines()) == 1


def test_flags_without_effect_are_told(tmp_path, capsys):
    given = (EveryArgs, TrainingArguments), {"output_dir": str(tmp_path)}, {}
    words = "--lora_r 4 --target_modules q_proj --max_steps 3 --num_train_epochs 2 --do_train true"
    cli.parse_args(*given, words.split())
    told = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert [line.split(":")[1].strip() for line in told] == [
        "--lora_r, --target_modules",
        "--num_train_epochs",
        "--do_train",
    ]
    cli.parse_args(*given, ["--lora_r", "4", "--use_lora", "true", "--max_steps", "3"])
    assert "no effect" not in capsys.readouterr().out


LEARNED = {"OPT": {"max_position_embeddings": 64}, "GPT2": {"n_positions": 64}}
COMPUTED = {
    "Qwen2": {"max_position_embeddings": 64},
    "GPTJ": {"n_positions": 64},
    "Falcon": {"max_position_embeddings": 64},
}


@pytest.mark.parametrize("name, sizes", {**LEARNED, **COMPUTED}.items())
def test_windows_beyond_the_positions_of_a_model(capsys, name, sizes):
    """An error where there are no more, a warning where they are computed."""
    config = getattr(transformers, f"{name}Config")(**sizes)
    flags.check_window(Args(model_max_length=64), config)
    assert capsys.readouterr() == ("", "")
    if name in LEARNED:
        with pytest.raises(SystemExit) as stop:
            flags.check_window(Args(model_max_length=65), config)
        assert stop.value.code == 2 and "64 or less" in capsys.readouterr().err
    else:
        flags.check_window(Args(model_max_length=65), config)
        assert "above the 64 positions" in capsys.readouterr().out
    flags.check_window(Args(model_max_length=9999), transformers.BloomConfig())
    assert capsys.readouterr() == ("", "")


def test_a_window_that_the_template_alone_fills(capsys):
    from common import tiny

    template = "{% for m in messages %}<m>you are an assistant {{ m.content }}<e>{% endfor %}"
    tokenizer = tiny.make_tokenizer(["ab"], 300, ["<e>", "<m>"], template, eos_token="<e>")
    config = transformers.BloomConfig()
    flags.check_window(Args(model_max_length=30), config, tokenizer)
    with pytest.raises(SystemExit) as stop:
        flags.check_window(Args(model_max_length=20), config, tokenizer)
    assert stop.value.code == 2 and "the chat template alone takes" in capsys.readouterr().err


def test_generation_stops_at_the_last_learned_position():
    from common import tiny
    from common.runs.generate import generate_answers

    tokenizer = tiny.make_tokenizer(["ab"], 300, ["<e>"], eos_token="<e>")
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=24, eos_token_id=299
    )
    model = transformers.GPT2LMHeadModel(config)
    prompts = [list(range(100, 120)), [100]]
    assert len(generate_answers(model, tokenizer, prompts, max_new_tokens=50)) == 2


@pytest.mark.parametrize(
    "items, drop, fails", [(3, True, True), (4, True, False), (3, False, False), (0, False, True)]
)
def test_a_run_without_a_step_is_refused(items, drop, fails):
    args = SimpleNamespace(train_batch_size=2, world_size=2, dataloader_drop_last=drop)
    if fails:
        with pytest.raises(SystemExit, match=f"not one step can be taken: {items} items"):
            plan.refuse_no_steps(args, items)
    else:
        plan.refuse_no_steps(args, items)


@pytest.mark.parametrize(
    "step, by_callback, ends",
    [(7, False, True), (0, True, True), (7, True, False), (10, True, False)],
)
def test_a_run_that_ends_before_its_announced_steps_is_an_error(step, by_callback, ends):
    """Unless a callback asked for it; without a single step it always is."""
    from common.trainer import RecipeTrainer

    run = SimpleNamespace(
        safe_stop=SimpleNamespace(stopped=False),
        state=SimpleNamespace(global_step=step, max_steps=10),
        control=SimpleNamespace(should_training_stop=by_callback),
        first_step=0,
    )
    if ends:
        with pytest.raises(SystemExit, match=f"ended at step {step} of the 10"):
            RecipeTrainer.exit_if_stopped(run)
    else:
        RecipeTrainer.exit_if_stopped(run)


def test_precision_of_the_device_unless_given(tmp_path):
    from common import device

    _, training = parse(tmp_path)
    assert training.bf16 == (str(device.half_dtype()) == "torch.bfloat16")
    _, training = parse(tmp_path, "--bf16", "false")
    assert not training.bf16 and not training.fp16


def test_a_tokenizer_beyond_the_embedding_is_one_line(tmp_path):
    tokenizer = tiny.make_tokenizer(["abc"], 300, ["<end>"], eos_token="<end>")
    size = len(tokenizer)
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    folder = tiny.save_tiny(config, tokenizer, tmp_path)
    assert models.check_model(folder).vocab_size == size
    tokenizer.add_tokens(["<dose>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        SystemExit, match=rf"{size} rows.*1 tokens.*<dose>.*resize_token_embeddings"
    ):
        models.check_model(folder)
    # nothing becomes an unknown token of bytes
    tokenizer = tiny.make_tokenizer(["abc"], 300, ["<end>"], eos_token="<end>")
    tokenizer.add_special_tokens({"unk_token": "<unknown>"})
    models.check_vocabulary(tokenizer, config, folder)


def test_compiling_a_whole_model_is_asked_for_with_a_warning(capsys):
    for asked in (False, True):
        training = SimpleNamespace(max_steps=-1, torch_compile=asked)
        flags.say_unused_everywhere(SimpleNamespace(), training)
        assert ("break the graph" in capsys.readouterr().out) is asked


def test_liger_keeps_its_hands_off_the_head(monkeypatch, capsys):
    """Its fused loss would replace ours, and evaluation take real logits for counts."""
    training = SimpleNamespace(use_liger_kernel=True, liger_kernel_config={"swiglu": False})
    with pytest.raises(SystemExit):
        flags.settle_liger(training)
    assert "pip install liger-kernel" in capsys.readouterr().err
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: name)
    flags.settle_liger(training)
    assert training.liger_kernel_config == {"swiglu": False} | flags.LIGER_HEAD
    assert not any(flags.LIGER_HEAD.values())
    training.liger_kernel_config = {"fused_linear_cross_entropy": True}
    with pytest.raises(SystemExit):
        flags.settle_liger(training)
    assert "fused_linear_cross_entropy would replace" in capsys.readouterr().err
