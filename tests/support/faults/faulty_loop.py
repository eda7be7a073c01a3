"""Run a plain PyTorch loop with a fault injected from outside.

    python common/launch.py 1 tests/support/faults/faulty_loop.py SCRIPT.py FAULT [flags of the script]

FAULT: name@N:
    kill-in-save@N      SIGKILL with half of the N-th training.pt written
"""

import os
import runpy
import signal
import sys
from pathlib import Path

script, fault = sys.argv[1:3]
sys.argv = [script, *sys.argv[3:]]
sys.path[:0] = [str(folder) for folder in Path(script).resolve().parents[:3]]

from common import device  # noqa: F401, I001  (before torch)
import torch

kind, _, at = fault.partition("@")
if kind != "kill-in-save":
    raise SystemExit(f"no such fault: {fault}")
stock = torch.save
calls = []


def save(content, path, **settings):
    stock(content, path, **settings)
    if Path(path).name == "training.pt":
        calls.append(path)
        if len(calls) == int(at):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


torch.save = save
runpy.run_path(script, run_name="__main__")
