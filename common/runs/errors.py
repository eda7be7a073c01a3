"""Errors that are no bug of ours, in one line with the remedy."""

from __future__ import annotations

import errno
import os
import shutil
import sys

import torch

from common import voice
from common.runs import heartbeat, memory
from common.runs.trust import holds_code

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# how a full disk reads where torch writes
FULL_DISK = ("No space left", "PytorchStreamWriter", "unexpected pos", "file write failed")
# how a collective reads that reached its time-out
NO_ANSWER = ("Timed out waiting", "caused pair closure", "collective operation timeout")


def explain(error: Exception) -> str | None:
    """One line with the remedy for an error that is not a bug of ours, else None."""
    if any(_is_full_disk(link) for link in _chain(error)):
        return _full_disk(error)
    if holds_code(error):
        return (
            "a file of the checkpoint holds code, not only tensors: no run wrote it, and nothing "
            "of it was run. Choose a new folder (OUTPUT=... or --output_dir ...)"
        )
    if isinstance(error, OSError) and error.errno in FORBIDDEN and error.filename:
        return (
            f"{error.filename} cannot be written or read by this user: {error.strerror}. Change "
            "its owner or mode, or choose another folder"
        )
    if isinstance(error, ValueError) and "arget modules" in str(error):
        first_line = str(error).splitlines()[0][:200]
        return f"--target_modules: {first_line} Give names of linear layers, or all-linear"
    patience = heartbeat.seconds()
    if patience and any(sign in str(error) for sign in NO_ANSWER):
        return (
            "timed out waiting for another rank, which lives but takes no part: it hangs, or is "
            f"more than --ddp_timeout {patience:.0f} seconds behind"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of memory at {memory.peak_mb() / 1024:.1f} GiB. Cheapest changes first: "
            "--gradient_checkpointing true; --per_device_train_batch_size 1 with more "
            "--gradient_accumulation_steps; a smaller --model_max_length; --use_lora true; "
            "--eval_generate 0; train_zero3.sh"
        )
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and what caused it."""
    links = []
    while error is not None:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def _is_full_disk(error: BaseException) -> bool:
    if getattr(error, "errno", None) == errno.ENOSPC:
        return True
    return any(sign in str(error) for sign in FULL_DISK)


def _full_disk(error: Exception) -> str:
    place = getattr(error, "filename", None) or _output_dir()
    while place and not os.path.exists(place):
        place = os.path.dirname(place) or "."
    free = shutil.disk_usage(place).free / 2**30
    return (
        f"no space left on device while writing under {place} ({free:.2f} GiB free). Older "
        "checkpoints are complete. Free some space (or lower --save_total_limit), then: "
        f"{voice.resume_command()}"
    )


def _output_dir() -> str:
    """--output_dir of the command line."""
    words = sys.argv
    for flag, value in zip(words, words[1:], strict=False):
        if flag == "--output_dir":
            return value
    return "."
