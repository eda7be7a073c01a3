"""Values that no run can have, flags that change nothing, windows longer than a model's positions:
told in one line before anything is loaded."""

from __future__ import annotations

import importlib.util
import math
import sys

from common import voice

NEVER = math.inf
ABOVE_0 = (sys.float_info.min, NEVER)
FROM_0 = (0, NEVER)
FROM_1 = (1, NEVER)
SHARE = (0, 1)
# name -> what it may be, the second number excluded; None, words and switches are never wrong here
RANGES = {
    "per_device_train_batch_size": FROM_1,
    "per_device_eval_batch_size": FROM_1,
    "gradient_accumulation_steps": FROM_1,
    "learning_rate": FROM_0,
    "weight_decay": FROM_0,
    "max_grad_norm": FROM_0,
    "warmup_steps": FROM_0,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": FROM_0,
    "label_smoothing_factor": SHARE,
    "logging_steps": ABOVE_0,
    "save_steps": ABOVE_0,
    "eval_steps": FROM_0,
    "save_total_limit": FROM_1,
    "seed": (0, 2**32),
    "data_seed": (0, 2**32),
    "dataloader_num_workers": FROM_0,
    "ddp_timeout": FROM_1,
    "model_max_length": (8, NEVER),
    "max_new_tokens": FROM_1,
    "eval_generate": FROM_0,
    "eval_ratio": SHARE,
    "max_eval_samples": FROM_0,
    "lora_r": FROM_1,
    "lora_alpha": ABOVE_0,
    "lora_dropout": SHARE,
}
OF_THE_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_dora",
    "use_rslora",
)
OVERRULED = {  # flags of TrainingArguments that common/trainer.py does not follow
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "remove_unused_columns": "a batch has only what the model takes",
    "do_train": "a run trains and measures",
    "do_eval": "a run trains and measures",
    "do_predict": "a run trains and measures",
}


# ---- values --------------------------------------------------------------------------------------


def refuse_values(values: dict, ranges: dict[str, tuple] | None = None) -> None:
    """A usage error, all of them in one line, for numbers that are not in `ranges` (else RANGES).

    values: name of a flag -> its value, as vars() of parsed arguments gives them.
    """
    wrong = []
    for name, (low, high) in (RANGES if ranges is None else ranges).items():
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not (low <= value < high and math.isfinite(value)):
            wrong.append(f"--{name} {value}: {range_in_words(low, high)}")
    if wrong:
        raise voice.usage_error("; ".join(wrong))


def range_in_words(low: float, high: float) -> str:
    if (low, high) == ABOVE_0:
        return "above 0"
    return f"{low} or more" if high == NEVER else f"from {low} to below {high}"


def refuse_runs_without_a_step(training) -> None:
    """--max_steps 0 and --num_train_epochs 0; -1 steps, the default, means: by epochs."""
    steps = training.max_steps
    if steps != -1 and not steps > 0:
        raise voice.usage_error(f"--max_steps {steps}: 1 or more; leave it away to train by epochs")
    epochs = training.num_train_epochs
    if steps < 0 and not (epochs > 0 and math.isfinite(epochs)):
        raise voice.usage_error(f"--num_train_epochs {epochs:g}: above 0")


def refuse_optimizer(training) -> None:
    """A usage error where transformers cannot make the optimizer or the schedule: a package that is
    not installed, settings that are missing."""
    import torch
    from transformers import Trainer, get_scheduler

    steps = {"num_warmup_steps": 1, "num_training_steps": 10}
    kind = training.lr_scheduler_type
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        if voice.given_by_user("optim"):
            Trainer.get_optimizer_cls_and_kwargs(training)
    except (ValueError, ImportError, RuntimeError) as error:
        optim = getattr(training.optim, "value", training.optim)
        raise voice.usage_error(f"--optim {optim}: {in_one_line(error)}") from None
    try:
        more = training.lr_scheduler_kwargs or {}
        optimizer = torch.optim.SGD([weight], lr=1.0)
        get_scheduler(kind, optimizer, **steps, scheduler_specific_kwargs=dict(more))
    except (ValueError, TypeError, KeyError) as error:
        kind = getattr(kind, "value", kind)
        raise voice.usage_error(
            f"--lr_scheduler_type {kind}: {in_one_line(error)}; --lr_scheduler_kwargs gives more"
        ) from None


LIGER_HEAD = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def settle_liger(training) -> None:
    """--use_liger_kernel keeps its kernels for norms, rotations and activations; the head and its
    loss stay those of common/fast/losses.py, which it would replace silently."""
    if not training.use_liger_kernel:
        return
    if importlib.util.find_spec("liger_kernel") is None:
        raise voice.usage_error("--use_liger_kernel: pip install liger-kernel (it needs Triton)")
    asked = dict(training.liger_kernel_config or {})
    taken = sorted(name for name in LIGER_HEAD if asked.get(name))
    if taken:
        raise voice.usage_error(
            f"--liger_kernel_config: {', '.join(taken)} would replace the head of this project, "
            "which never builds the logits either; leave it away"
        )
    training.liger_kernel_config = asked | LIGER_HEAD


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# ---- flags without effect ------------------------------------------------------------------------


def say_unused(names, why: str) -> None:
    """One line for those of these flags that stand on the command line."""
    given = [f"--{name}" for name in names if voice.given_by_user(name)]
    if given:
        voice.say(f"warning: {', '.join(given)}: no effect; {why}")


def say_unused_everywhere(args, training) -> None:
    """Those of the flags that all recipes on transformers' Trainer have."""
    if getattr(args, "use_lora", True) is False:
        say_unused(OF_THE_ADAPTER, "there is no adapter (--use_lora true trains one)")
    if training.max_steps > 0:
        say_unused(["num_train_epochs"], "--max_steps says how long the run is")
    if getattr(args, "eval_generate", 1) == 0:
        say_unused(["max_new_tokens"], "--eval_generate 0 generates nothing")
    for name, why in OVERRULED.items():
        say_unused([name], why)
    if training.torch_compile:
        voice.say(
            "warning: --torch_compile true compiles for minutes here, and nobody has seen it pay: "
            "packed attention and the loss in chunks break the graph"
        )


# ---- positions -----------------------------------------------------------------------------------


def learned_positions(config) -> int | None:
    """How many positions a model has an embedding for; None where they are computed (rotated,
    ALiBi, none)."""
    config = config.get_text_config()
    fields = config.to_dict()
    computed = ("rope", "rotary", "alibi", "position_encoding")
    if any(name.startswith(computed) and fields[name] is not None for name in fields):
        return None
    return getattr(config, "max_position_embeddings", None)


def check_window(args, config, tokenizer=None) -> None:
    """A usage error where --model_max_length is above the positions that a model has learned, one
    line where rotated ones go on beyond those it has seen.

    tokenizer: where chats are trained: an error too where its template leaves no room for a word.
    """
    length = args.model_max_length
    if tokenizer is not None and tokenizer.chat_template:
        refuse_no_room(length, tokenizer)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not positions or length <= positions:
        return
    if learned_positions(config):
        raise voice.usage_error(
            f"--model_max_length {length}: the model has {positions} positions and no others; "
            f"give {positions} or less"
        )
    voice.say(
        f"warning: --model_max_length {length} is above the {positions} positions that the model "
        "has learned"
    )


def refuse_no_room(length: int, tokenizer) -> None:
    """A usage error for a window that holds no question and answer of one character."""
    shortest = [{"role": "user", "content": "a"}]
    try:
        text = tokenizer.apply_chat_template(shortest, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template that wants other turns: many kinds
        return
    least = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2
    if length < least:
        raise voice.usage_error(
            f"--model_max_length {length}: the chat template alone takes {least - 3} tokens; "
            f"give {least} or more, better as many as your rows have"
        )
