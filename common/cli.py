"""The frame around every train.py: flags in, exit codes out.

Exit codes: 0 done, 1 failed, 2 usage, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import errno
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from common import device

INTERRUPTED = 75

# Spellings of older transformers and of the old recipe collections -> today's flag. None: accepted,
# no effect today.
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


@dataclass
class RunArgs:
    """Flags of every run. A recipe's `Args` inherits them and redeclares those that differ."""

    model_name_or_path: str = field(
        default="tiny", metadata={"help": "folder or hub id; 'tiny' builds a small one"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace what an earlier run left in --output_dir"}
    )
    eval_generate: int = field(
        default=64, metadata={"help": "held-out rows answered before and after; 0: none"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "length limit of those answers"})


@dataclass
class DataArgs:
    """Flags of reading, splitting and cutting rows (common/data)."""

    data_path: str = field(
        default="", metadata={"help": "files, folders, 'a.jsonl:0.7 b.csv:0.3'; unset: the samples"}
    )
    column_map: str = field(
        default="", metadata={"help": "rename columns: 'instruction=question,output=reply'"}
    )
    strict_data: bool = field(
        default=False, metadata={"help": "a bad row is an error, not counted and left out"}
    )
    eval_ratio: float = field(
        default=0.05, metadata={"help": "share held out; equal prompts stay on one side"}
    )
    max_eval_samples: int = field(default=500, metadata={"help": "upper bound of held-out rows"})
    leak_check: str = field(
        default="", metadata={"help": "a test file; training rows with its prompts are left out"}
    )
    model_max_length: int = field(
        default=1024, metadata={"help": "window in tokens; longer rows are shortened and counted"}
    )
    packing: bool = field(
        default=True, metadata={"help": "several rows a window, each blind to the others"}
    )


@dataclass
class LoraArgs:
    """Flags of a low-rank adapter (Hu et al. 2021), see peft.LoraConfig."""

    use_lora: bool = field(
        default=False, metadata={"help": "train an adapter instead of all weights"}
    )
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale; unset: 2 * lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: str = field(
        default="all-linear", metadata={"help": "all-linear or names of layers with commas"}
    )


def recompute(training) -> bool:
    """Whether activations are computed again in the backward pass (two names of one flag)."""
    asked = getattr(training, "activation_checkpointing", None) or training.gradient_checkpointing
    return bool(asked)


def is_main() -> bool:
    """Whether this process is rank 0, the one that speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str) -> None:
    """Print on rank 0 only."""
    if is_main():
        print(text, flush=True)


def given_by_user(name: str) -> bool:
    """Whether the user gave this flag on the command line."""
    return any(word.partition("=")[0].replace("-", "_") == f"__{name}" for word in sys.argv[1:])


def modern_flags(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """Translate old spellings to `known` ones, with one warning that names them all."""
    out, told, skip_value = [], [], False
    for word, after in zip(argv, [*argv[1:], "--"], strict=False):
        if skip_value and not word.startswith("--"):
            skip_value = False
            continue
        skip_value = False
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in OLD_FLAGS:
            new = OLD_FLAGS[name]
            told.append(f"--{name} -> {'(no effect)' if new is None else '--' + new}")
            if new is None:
                skip_value = not equals
                continue
            name = new
        elif name == "group_by_length":
            skip_value, value = not equals, value if equals else after
            strategy = "random" if value.lower() in ("false", "0", "no") else "group_by_length"
            told.append(f"--group_by_length -> --train_sampling_strategy {strategy}")
            out += ["--train_sampling_strategy", strategy]
            continue
        new = RENAMED_QUIETLY.get(name, name)
        out.append(f"--{new if new in known else name}{equals}{value}")
    if told:
        say("warning: old flags translated: " + ", ".join(told))
    return out


def parse_args(
    classes: Sequence[type], defaults: dict, tiny_defaults: dict, argv: Sequence[str] | None = None
) -> tuple:
    """Command line -> one instance per dataclass in `classes` (the last one TrainingArguments or a
    subclass).

    Args:
        defaults: the recipe's defaults for the real model.
        tiny_defaults: laid over them when `--model_name_or_path` is "tiny" (or not given); sizes
            and steps only.
    Errors: an unknown flag, or one without its value, ends the process with code 2 and names the
    nearest flag.
    """
    from transformers import HfArgumentParser
    from transformers.integrations import get_reporting_integration_callbacks

    quiet_libraries()
    parser = HfArgumentParser(classes, allow_abbrev=False)
    known = [option for action in parser._actions for option in action.option_strings]
    argv = modern_flags(
        sys.argv[1:] if argv is None else argv, {option.lstrip("-") for option in known}
    )
    given = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    for name in sorted(given):
        if f"--{name}" not in known:
            near = difflib.get_close_matches(f"--{name}", known, n=1, cutoff=0.5)
            raise usage_error(
                f"unknown flag --{name}"
                + (f"; did you mean {near[0]}?" if near else "; see --help")
            )
    parser.error = lambda message: sys.exit(usage_error(message).code)
    parser.set_defaults(**defaults | device.training_defaults(given))
    flags = parser.parse_known_args(argv)[0]
    if flags.model_name_or_path == "tiny":
        parser.set_defaults(**tiny_defaults)
    by_accelerate = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    flags.deepspeed = flags.deepspeed or by_accelerate
    problem = device.unsupported_flags(flags)
    if problem:
        raise usage_error(problem)
    if by_accelerate or any(
        word == "--deepspeed" or word.startswith("--deepspeed=") for word in argv
    ):
        prepare_deepspeed()
    try:
        parsed = parser.parse_args_into_dataclasses(args=argv)
        for tracker in parsed[-1].report_to:
            get_reporting_integration_callbacks([tracker])[0]()
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise usage_error(" ".join(str(error).split())) from None
    return parsed


def quiet_libraries() -> None:
    """Progress bars of libraries only on a terminal, and not those of single files."""
    import datasets
    import transformers

    if os.environ.get("DANPU_VERBOSE") != "1":
        warnings.filterwarnings("ignore", category=FutureWarning)  # what libraries tell one another
        transformers.utils.logging.disable_progress_bar()
        if not (is_main() and sys.stderr.isatty()):
            datasets.disable_progress_bars()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are one line with exit code 2; an unknown flag is answered
    with the nearest."""

    def __init__(self, description: str):
        """description: shown by --help as it stands."""
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown.startswith("--") and "unrecognized" in message:
            near = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.5)
            message = f"unknown flag {unknown}" + (
                f"; did you mean {near[0]}?" if near else "; see --help"
            )
        raise usage_error(message)


def usage_error(message: str) -> SystemExit:
    """Say the mistake once (rank 0) and give the exit with code 2 to raise."""
    fail(message, code=2, stop=False)
    return SystemExit(2)


def fail(message: str, code: int = 1, stop: bool = True) -> None:
    """End with one clear line. Ranks beside the first wait a moment, so that a mistake common to
    all is told once."""
    if not is_main():
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if stop:
        raise SystemExit(code)


def prepare_deepspeed() -> None:
    """Import DeepSpeed so that no start hangs or compiles for minutes on CPU."""
    lock_age = 60  # seconds; a builder that lives touches its folder more often
    for root in filter(
        os.path.isdir,
        [os.environ.get("TORCH_EXTENSIONS_DIR", os.path.expanduser("~/.cache/torch_extensions"))],
    ):
        for folder, _, files in os.walk(root):
            path = os.path.join(folder, "lock")
            if "lock" in files and time.time() - os.path.getmtime(path) > lock_age:
                os.remove(path)
                say(f"removed {path}, left by a killed build; DeepSpeed would wait for it for ever")
    import logging

    import deepspeed

    if os.environ.get("DANPU_VERBOSE") != "1":
        deepspeed.utils.logger.setLevel(logging.ERROR)
    if device.kind() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # an optional op that takes minutes to compile
        )
        if int(os.environ.get("WORLD_SIZE", 1)) >= 1 and "RANK" in os.environ:
            deepspeed.init_distributed(dist_backend="gloo")


def model_config(name: str, flag: str = "--model_name_or_path"):
    """AutoConfig of a model folder or hub id; SystemExit with one line when it is neither."""
    from transformers import AutoConfig

    return load(AutoConfig, name, flag)


def load(auto_class, name: str, flag: str = "--model_name_or_path", **settings):
    """auto_class.from_pretrained(name, **settings); SystemExit with one line when that is no model
    folder or hub id.

    `flag`: where the name came from. AutoConfig takes the path of a config.json too.
    """
    import torch

    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not os.path.exists(os.path.expanduser(name)):
        raise SystemExit(f"{flag} {name}: no such folder")
    try:
        return auto_class.from_pretrained(name, **settings)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # many kinds: no config.json, no weights, unknown type, no network, no such id
        if isinstance(error, KeyError) and settings.get("attn_implementation") in error.args:
            # an architecture that knows only attention of its own
            return load(
                auto_class,
                name,
                flag,
                **{k: v for k, v in settings.items() if k != "attn_implementation"},
            )
        words = " ".join(str(error).split())[:300]
        raise SystemExit(
            f"{flag} {name} is not a model that can be loaded ({words}). "
            "Give a folder with config.json and *.safetensors, or a hub id (HF_ENDPOINT chooses a mirror)"
        ) from None


def resume_command() -> str:
    """The command line that continues this run, for people to paste."""
    shell = os.environ.get("DANPU_RERUN")
    words, skip = [], {"--overwrite_output_dir"} | ({"--deepspeed"} if shell else set())
    rest = iter(sys.argv[1:])
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in skip:
            words.append(word)
            continue
        if not equals:
            next(rest, None)
        skip.discard("--deepspeed")  # the first is the shell's own, a second one the user's
    return " ".join([shell or f"python {sys.argv[0]}", shlex.join(words)]).strip()


def run(main: Callable[[], None]) -> None:
    """Call `main` and turn what users cause (full disk, memory, signals) into one line and an exit
    code."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED)
    )  # before training starts there is nothing to save
    signal.signal(signal.SIGINT, lambda *_: sys.exit(INTERRUPTED))
    launcher = int(os.environ.pop("DANPU_LAUNCHER", 0))  # not for what this process starts itself
    if sys.platform == "linux" and launcher:
        # a launcher killed outright would leave its ranks training into the folder of the next
        # start: they get SIGTERM
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != launcher:  # it has gone already
            sys.exit(INTERRUPTED)
    code = 0
    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            fail(error.code, stop=False)
        code = 1 if isinstance(error.code, str) else int(error.code or 0)
    except BrokenPipeError:  # the reader of a pipe has gone (| head)
        os._exit(1)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        fail(message, stop=False)
        code = 1
    finally:
        sys.stdout.flush()
    close(code)


def explain(error: Exception) -> str | None:
    """One line with the remedy for an error that is not a bug of ours, else None."""
    import torch

    chain, link = [], error
    while link is not None:
        chain, link = [*chain, link], link.__cause__ or link.__context__
    signs = ("No space left", "PytorchStreamWriter", "unexpected pos", "file write failed")
    if any(
        getattr(e, "errno", None) == errno.ENOSPC or any(sign in str(e) for sign in signs)
        for e in chain
    ):
        import shutil

        place = getattr(error, "filename", None) or next(
            (sys.argv[i + 1] for i, w in enumerate(sys.argv[:-1]) if w == "--output_dir"), "."
        )
        while place and not os.path.exists(place):
            place = os.path.dirname(place) or "."
        free = shutil.disk_usage(place).free / 2**30
        return (
            f"no space left on device while writing under {place} ({free:.2f} GiB free). Older checkpoints are whole. "
            f"Free some space (or lower --save_total_limit), then: {resume_command()}"
        )
    if isinstance(error, ValueError) and "arget modules" in str(error):
        return f"--target_modules: {str(error).splitlines()[0][:200]} Give names of linear layers, or all-linear"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of memory at {device.peak_memory_mb() / 1024:.1f} GiB. Cheapest changes first: "
            "--gradient_checkpointing true; --per_device_train_batch_size 1 with more --gradient_accumulation_steps; "
            "a smaller --model_max_length; --use_lora true; --eval_generate 0; train_zero3.sh"
        )
    return None


def close(code: int) -> None:
    """Leave the process group (a dangling one can turn success into a crash) and exit with
    `code`."""
    import torch.distributed as dist

    if code == 0 and dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # other ranks may be inside a collective; the launcher ends them
