"""The frame around every train.py: flags in, exit codes out.

Exit codes: 0 done, 1 failed, 2 usage, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from common import device, voice
from common.runs import machine

# what recipes and rooms say through this module too
from common.voice import INTERRUPTED as INTERRUPTED
from common.voice import fail as fail
from common.voice import given_by_user as given_by_user
from common.voice import how_to_go_on as how_to_go_on
from common.voice import is_main as is_main
from common.voice import resume_command as resume_command
from common.voice import say as say
from common.voice import say_in_handler as say_in_handler
from common.voice import usage_error as usage_error

# ---- flags ---------------------------------------------------------------------------------------


@dataclass
class RunArgs:
    """Flags of every run. A recipe's `Args` inherits them and redeclares those that differ."""

    model_name_or_path: str = field(
        default="tiny", metadata={"help": "folder or hub id; 'tiny' builds a small one"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace what an earlier run left in --output_dir"}
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "continue from ZeRO files of others, which can run any code"},
    )
    no_memory_check: bool = field(
        default=False, metadata={"help": "train also where the memory will not do by estimate"}
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


def parse_args(
    classes: Sequence[type],
    defaults: dict,
    tiny_defaults: dict,
    argv: Sequence[str] | None = None,
    by_trainer: bool = True,
) -> tuple:
    """Command line -> one instance per dataclass in `classes` (the last one TrainingArguments or a
    subclass).

    It also imports DeepSpeed where it is asked for, and opens the process group on a CPU.

    Args:
        defaults: the recipe's defaults for the real model.
        tiny_defaults: laid over them when `--model_name_or_path` is "tiny" (or not given); sizes
            and steps only.
        by_trainer: transformers' Trainer trains, not a loop with optimizers of its own.
    Errors: an unknown flag (the nearest is named), one without its value or with a value that no
    run can have ends the process with code 2.
    """
    from transformers import HfArgumentParser
    from transformers.integrations import get_reporting_integration_callbacks

    from common.runs import engine, heartbeat, old_flags
    from common.runs import flags as checks

    quiet_libraries()
    parser = HfArgumentParser(classes, allow_abbrev=False)
    parser.error = lambda message: sys.exit(usage_error(message).code)
    known = [option for action in parser._actions for option in action.option_strings]
    argv = sys.argv[1:] if argv is None else argv
    argv = old_flags.translate(argv, {option.lstrip("-") for option in known})
    note_given(argv)
    for name in sorted(voice.given):
        if f"--{name}" not in known:
            raise usage_error(unknown_flag(f"--{name}", known))

    parser.set_defaults(**defaults | device.training_defaults(voice.given))
    flags = parser.parse_known_args(argv)[0]
    if flags.model_name_or_path == "tiny":
        parser.set_defaults(**tiny_defaults)
    by_accelerate = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    flags.deepspeed = flags.deepspeed or by_accelerate
    problem = device.unsupported_flags(flags)
    if problem:
        raise usage_error(problem)
    patience = max(1, flags.ddp_timeout)  # less is refused below
    device.limit_collectives(patience)
    if by_accelerate or given_by_user("deepspeed"):
        engine.prepare_deepspeed(patience)
    else:
        engine.open_cpu_group(patience)
    try:
        parsed = parser.parse_args_into_dataclasses(args=argv)
        for tracker in parsed[-1].report_to:
            get_reporting_integration_callbacks([tracker])[0]()
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise usage_error(" ".join(str(error).split())) from None
    checks.refuse_values({name: value for one in parsed for name, value in vars(one).items()})
    checks.refuse_runs_without_a_step(parsed[-1])
    if by_trainer:  # another loop brings its own optimizer
        engine.build_cpu_optimizer(parsed[-1])
        checks.refuse_optimizer(parsed[-1])
        checks.settle_liger(parsed[-1])
        checks.say_unused_everywhere(parsed[0], parsed[-1])
    heartbeat.start(parsed[-1].ddp_timeout)
    return parsed


def note_given(argv: Sequence[str]) -> None:
    """For given_by_user: the flags of this command line."""
    voice.given.clear()
    voice.given.update(word[2:].partition("=")[0] for word in argv if word.startswith("--"))


def unknown_flag(flag: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    return f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are one line with exit code 2; an unknown flag is answered
    with the nearest."""

    def __init__(self, description: str):
        """description: shown by --help as it stands."""
        machine.tolerate_terminals()
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None):
        note_given(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown.startswith("--") and "unrecognized" in message:
            message = unknown_flag(unknown, self._option_string_actions)
        raise usage_error(message)


def recompute(training) -> bool:
    """Whether activations are computed again in the backward pass (two names of one flag)."""
    asked = getattr(training, "activation_checkpointing", None) or training.gradient_checkpointing
    return bool(asked)


def quiet_libraries() -> None:
    """Progress bars of libraries only on a terminal, and not those of single files."""
    import datasets
    import transformers

    if os.environ.get("DANPU_VERBOSE") != "1":
        # what libraries tell one another
        warnings.filterwarnings("ignore", category=FutureWarning)
        transformers.utils.logging.disable_progress_bar()
        if not (is_main() and sys.stderr.isatty()):
            datasets.disable_progress_bars()


# ---- words ---------------------------------------------------------------------------------------


def wait_for_all(what: str) -> None:
    """Wait until all ranks are here, however long rank 0 works alone before; `what` it does, in a
    few words. All ranks call it."""
    from common.runs import heartbeat

    heartbeat.wait_for_all(what)


# ---- the frame -----------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> None:
    """Call `main` and turn what users cause (full disk, memory, signals) into one line and an exit
    code."""
    machine.tolerate_terminals()
    # before training starts there is nothing to save
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, partial(interrupt, os.getpid()))
    end_with_launcher()
    if "RANK" not in os.environ:  # the launcher has asked already
        refuse_unused_devices()
    close(exit_code_of(main))


def refuse_unused_devices() -> None:
    """Exit 1 where this machine has a device that only the installation keeps from being used: a
    model would train on the CPU for weeks."""
    message, fatal = device.install_problem()
    if fatal:
        print(message, file=sys.stderr)
        raise SystemExit(1)


def interrupt(process: int, number, frame) -> None:
    """A handler of signals for all times but those when a step is finished first.

    process: the one that it speaks for; those that it forks, which inherit the handler, end at
        once: raised in a worker of a pool, SystemExit may be taken for the fault of a row.
    """
    if os.getpid() != process:
        os._exit(INTERRUPTED)
    say_in_handler(f"\ninterrupted. {how_to_go_on()}")
    raise SystemExit(INTERRUPTED)


def end_with_launcher() -> None:
    """A launcher killed outright would leave its ranks training into the folder of the next start:
    they get SIGTERM."""
    launcher = int(os.environ.pop("DANPU_LAUNCHER", 0))  # not for what this process starts itself
    if sys.platform != "linux" or not launcher:
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
    if os.getppid() != launcher:  # it has gone already
        sys.exit(INTERRUPTED)


def exit_code_of(main: Callable[[], None]) -> int:
    """Call `main`; what users cause is one line."""
    from common.runs.errors import explain

    try:
        main()
    except SystemExit as error:
        if not isinstance(error.code, str):
            return int(error.code or 0)
        fail(error.code, stop=False)
        return 1
    except BrokenPipeError:  # the reader of a pipe has gone (| head)
        os._exit(1)
    except Exception as error:
        if is_interrupted(error):
            return INTERRUPTED
        message = explain(error)
        if message is None:
            raise
        fail(message, stop=False)
        return 1
    finally:
        sys.stdout.flush()
    return 0


def is_interrupted(error: BaseException | None) -> bool:
    """Whether an error came up while a library tidied up after `interrupt`."""
    while error is not None:
        if isinstance(error, SystemExit) and error.code == INTERRUPTED:
            return True
        error = error.__context__
    return False


def close(code: int) -> None:
    """Leave the process group (a dangling one can turn success into a crash) and exit with
    `code`."""
    import torch.distributed as dist

    from common.runs import heartbeat

    if code == 0:
        heartbeat.wait_for_all("the end of the run")
    heartbeat.stop()
    if code == 0 and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # other ranks may be inside a collective; the launcher ends them
