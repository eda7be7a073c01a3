"""Run a plain PyTorch loop (minimind_npu/quickstart/quickstart.py) with a fault injected from
outside.

    python common/launch.py 2 tests/support/faults/faulty_loop.py minimind_npu/quickstart/quickstart.py FAULT [flags]

FAULT: name@N:
    kill-in-step@N      SIGKILL of this rank instead of optimizer step N
    kill-in-save@N      SIGKILL with half of the N-th training.pt written
    kill-in-marker@N    SIGKILL with everything of the N-th checkpoint written but its completion marker
    nan-loss@N          the N-th training loss is NaN
"""

import os
import runpy
import signal
import sys
from pathlib import Path

script, fault = sys.argv[1:3]
sys.argv = [script, *sys.argv[3:]]
sys.path[:0] = [str(folder) for folder in Path(script).resolve().parents[:3]]

from common import device  # noqa: F401, I001
from common.runs import checkpoint
import torch
from transformers import GPT2LMHeadModel

kind, at = fault.split("@")
calls = []


def at_call(owner, name, action, counts=lambda *args: True):
    """Replace owner.name so that its `at`-th call that `counts` goes to action(stock, *args,
    **kwargs)."""
    stock = getattr(owner, name)

    def patched(*args, **kwargs):
        calls.extend([1] if counts(*args) else [])
        now = counts(*args) and len(calls) == int(at)
        return action(stock, *args, **kwargs) if now else stock(*args, **kwargs)

    setattr(owner, name, patched)


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(stock, state, path, **kwargs):
    stock(state, path, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def nan(stock, *args, **kwargs):
    out = stock(*args, **kwargs)
    out.loss = out.loss * float("nan")
    return out


if kind == "kill-in-step":
    at_call(torch.optim.AdamW, "step", die)
elif kind == "kill-in-save":
    at_call(
        torch,
        "save",
        half_a_file,
        counts=lambda state, path, *rest: Path(path).name == "training.pt",
    )
elif kind == "kill-in-marker":
    at_call(checkpoint, "mark_complete", die)
elif kind == "nan-loss":
    at_call(GPT2LMHeadModel, "forward", nan, counts=lambda model, *rest: model.training)
else:
    raise SystemExit(f"no such fault: {fault}")

runpy.run_path(script, run_name="__main__")
