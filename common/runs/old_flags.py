"""Spellings of older transformers and of the old recipe collections -> today's flags."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from common import voice

# None: accepted, no effect today
OLD_FLAGS = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a ratio today
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "max_seq_length": "model_max_length",
    "max_length": "model_max_length",
    "data": "data_path",
    "train_data": "data_path",
    "lora_rank": "lora_r",
    "save_safetensors": None,
    "use_deepspeed": None,
    "logging_dir": None,
    "fp16_opt_level": None,
}
# still the names that everybody types; transformers for Python 3.10 has only these
RENAMED_QUIETLY = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
GROUP_BY_LENGTH = "group_by_length"


def translate(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """Old spellings on a command line -> `known` ones, with one warning that names them all."""
    translated = []
    told = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            translated.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name == GROUP_BY_LENGTH:
            value = value if equals else _take_value(words)
            chosen = "random" if value.lower() in ("false", "0", "no") else GROUP_BY_LENGTH
            told.append(f"--{name} -> --train_sampling_strategy {chosen}")
            translated += ["--train_sampling_strategy", chosen]
            continue
        if name in OLD_FLAGS:
            new = OLD_FLAGS[name]
            if new is None:
                told.append(f"--{name} -> (no effect)")
                if not equals:
                    _take_value(words)
                continue
            told.append(f"--{name} -> --{new}")
            if name == "warmup_ratio":
                ratio = value if equals else "".join(words[:1])
                refuse_no_share(ratio)
            name = new
        today = RENAMED_QUIETLY.get(name, name)
        translated.append(f"--{today if today in known else name}{equals}{value}")
    if told:
        voice.say("warning: old flags translated: " + ", ".join(told))
    return translated


def refuse_no_share(value: str) -> None:
    """--warmup_ratio becomes --warmup_steps, where a number from 1 on counts steps."""
    try:
        is_share = 0 <= float(value) < 1
    except ValueError:  # the parser says so
        return
    if not is_share:
        raise voice.usage_error(f"--warmup_ratio {value}: a share of the run, from 0 to below 1")


def _take_value(words: list[str]) -> str:
    """The value that follows a flag, taken from the words to come; "" where there is none."""
    return words.pop(0) if words and not words[0].startswith("--") else ""
