"""Run a training script, whatever its loop, with a fault injected from outside.

    python common/launch.py 1 tests/support/faults/faulty_loop.py SCRIPT.py FAULT [flags of the script]

FAULT: name@WHEN. WHEN of most is a place, NAME or NAME:N: the N-th time (once, where it is not given)
that a file or folder is opened for writing, made, or begun to be evaluated whose path ends with NAME;
"evaluate" stands for the held-out rows.
    kill@PLACE              SIGKILL there
    kill-in-save@N          SIGKILL with half of the N-th training.pt written
    kill-in-file@NAME:N     SIGKILL with half of the N-th file of that name that torch or safetensors
                            write
    kill-in-rotation@N      SIGKILL in the N-th removal of an older checkpoint, one file of it gone
    kill-call@MODULE:NAME:N     SIGKILL of the last rank in the N-th call of a function of the script's, or
                            of a class's method (NAME: Class.method)
    kill-all@SECONDS        SIGKILL of all ranks, so long after the first checkpoint of this start began
    full-disk@PLACE         the output's file system is full from there on: "filler" beside OUTPUT
    signal@PLACE            SIGTERM there
    two-signals@PLACE       ... and again, ten seconds later by this process's clock
    nan-grad@N              the N-th backward pass gives NaN, its loss is sound
    other-template@         a comment more in every chat template
"""

import importlib
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path

script, fault = sys.argv[1:3]
sys.argv = [script, *sys.argv[3:]]
sys.path[:0] = [str(folder) for folder in Path(script).resolve().parents[:3]]

from common import device  # noqa: F401, I001  (before torch)
import torch
import safetensors.torch
import transformers
from transformers import modeling_utils

from common.data import labels, progress

EDIT = "{# edited #}"
kind, _, when = fault.partition("@")
OUTPUT = Path(sys.argv[sys.argv.index("--output_dir") + 1])
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- places --------------------------------------------------------------------------------------


def at_place(action) -> None:
    """Call `action` once, when the place comes."""
    name, _, number = when.partition(":")
    left = int(number or 1)

    def come(path) -> None:
        nonlocal left
        if str(path).rstrip("/").endswith(name) and RANK == 0:
            left -= 1
            if left == 0:
                action()

    def hook(event: str, args: tuple) -> None:
        if event == "os.mkdir" or (event == "open" and is_writing(args)):
            come(args[0])

    stock = progress.Progress.__init__

    def begin(self, what, *args, **settings):
        come(what)
        stock(self, what, *args, **settings)

    progress.Progress.__init__ = begin
    sys.addaudithook(hook)


def is_writing(args: tuple) -> bool:
    _, mode, flags = args
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or "w" in (mode or "")


def fill_disk() -> None:
    """To the last block, or to 100 KB where a folder is to come: something of it is written then."""
    free = os.statvfs(OUTPUT.parent)
    size = free.f_bavail * free.f_frsize
    if not re.search(r"\.(png|json)", when):
        size -= 100_000
    with open(OUTPUT.parent / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ask_twice() -> None:
    ask_to_stop()
    stock = time.time
    time.time = lambda: stock() + 10
    ask_to_stop()


# ---- kills ---------------------------------------------------------------------------------------


def kill_in_file(name: str, number: int) -> None:
    """Where torch or safetensors write a file, which no event of Python tells."""
    left = number

    def torn(write):
        def patched(content, path, *args, **settings):
            nonlocal left
            write(content, path, *args, **settings)
            if Path(path).name == name:
                left -= 1
                if left == 0:
                    os.truncate(path, os.path.getsize(path) // 2)
                    die()

        return patched

    torch.save = torn(torch.save)
    safetensors.torch.save_file = torn(safetensors.torch.save_file)
    modeling_utils.safe_save_file = torn(modeling_utils.safe_save_file)


def kill_in_rotation(number: int) -> None:
    left = number
    files = 0
    rotates = False

    def hook(event: str, args: tuple) -> None:
        nonlocal left, files, rotates
        if event == "shutil.rmtree":
            # the folder of a new checkpoint is cleared by the same call, and is not there
            rotates = bool(re.search(r"checkpoint-\d+$", str(args[0]))) and os.path.isdir(args[0])
            files = 0
            left -= rotates
        elif event == "os.remove" and rotates and left == 0:
            files += 1
            if files == 2:
                die()

    sys.addaudithook(hook)


def kill_in_call(place: str) -> None:
    module, name, number = place.split(":")
    owner = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    stock = getattr(owner, name)
    left = int(number)

    def patched(*args, **settings):
        nonlocal left
        left -= 1
        if left == 0 and RANK == WORLD - 1:
            die()
        return stock(*args, **settings)

    setattr(owner, name, patched)


def kill_all(seconds: float) -> None:
    """By a process of its own, which no rank can hold up."""
    pids = OUTPUT.parent / f"{OUTPUT.name}.pids"
    pids.mkdir(exist_ok=True)
    (pids / str(RANK)).write_text(str(os.getpid()))
    begun = False

    def hook(event: str, args: tuple) -> None:
        nonlocal begun
        if begun or event != "os.mkdir" or "checkpoint-" not in str(args[0]):
            return
        begun = True
        if os.fork():
            return
        time.sleep(seconds)
        for file in pids.iterdir():
            os.kill(int(file.read_text()), signal.SIGKILL)
        os._exit(0)

    if RANK == 0:
        sys.addaudithook(hook)


# ---- numbers -------------------------------------------------------------------------------------


class Poison(torch.autograd.Function):
    """A loss as it is, whose gradient is NaN."""

    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def poison(number: int) -> None:
    stock = torch.Tensor.backward
    left = number

    def backward(self, *args, **settings):
        nonlocal left
        left -= 1
        return stock(Poison.apply(self) if left == 0 else self, *args, **settings)

    torch.Tensor.backward = backward


def edit_templates() -> None:
    stock = transformers.AutoTokenizer.from_pretrained

    def load(*args, **settings):
        tokenizer = stock(*args, **settings)
        tokenizer.chat_template = (tokenizer.chat_template or "") + EDIT
        return tokenizer

    stock_set = labels.set_template

    def set_template(tokenizer, *args):
        stock_set(tokenizer, *args)
        tokenizer.chat_template += EDIT

    transformers.AutoTokenizer.from_pretrained = load
    labels.set_template = set_template


if kind == "kill":
    at_place(die)
elif kind == "kill-in-save":
    kill_in_file("training.pt", int(when))
elif kind == "kill-in-file":
    kill_in_file(when.partition(":")[0], int(when.partition(":")[2] or 1))
elif kind == "kill-in-rotation":
    kill_in_rotation(int(when))
elif kind == "kill-call":
    kill_in_call(when)
elif kind == "kill-all":
    kill_all(float(when))
elif kind == "full-disk":
    at_place(fill_disk)
elif kind == "signal":
    at_place(ask_to_stop)
elif kind == "two-signals":
    at_place(ask_twice)
elif kind == "nan-grad":
    poison(int(when))
elif kind == "other-template":
    edit_templates()
else:
    raise SystemExit(f"no such fault: {fault}")
runpy.run_path(script, run_name="__main__")
