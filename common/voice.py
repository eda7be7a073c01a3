"""What a run says to people: once, on rank 0, in one line; and how it is continued."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time

INTERRUPTED = 75
given: set[str] = set()  # flags of the command line that cli.parse_args has read


def given_by_user(name: str) -> bool:
    """Whether this flag stood on the command line (old spellings count as the new ones)."""
    return name in given


def is_main() -> bool:
    """Whether this process is rank 0, the one that speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str) -> None:
    """Print on rank 0 only."""
    if is_main():
        print(text, flush=True)


def say_in_handler(text: str) -> None:
    """Print on rank 0 from a handler of signals, which may have come in the middle of a print."""
    if is_main():
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(1, f"{text}\n".encode(errors="replace"))


def how_to_go_on() -> str:
    return f"The same command goes on from what is saved, or begins again:\n  {resume_command()}"


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


def resume_command() -> str:
    """The command line that continues this run, for people to paste: the shell's own, variables
    included, where one started it."""
    shell = os.environ.get("DANPU_RERUN")
    if shell:
        return shell
    words = []
    is_value = False
    for word in sys.argv[1:]:
        name, equals, _ = word.partition("=")
        if name.replace("-", "_") == "__overwrite_output_dir":  # it would begin anew
            is_value = not equals
        elif not is_value or word.startswith("--"):
            is_value = False
            words.append(word)
        else:
            is_value = False
    return shlex.join(["python", sys.argv[0], *words])
