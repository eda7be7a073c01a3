"""Ask torch, drivers and the network without being taken down by them: other processes, time
limits, no exceptions.

Used by tools.check_env; like it needs nothing but Python 3.8 on Linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

from common.runs import machine

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 180  # for all of torch_facts; a cold start from a network disk takes a minute
TOOL_SECONDS = 10


def ask(command, seconds, env=None):
    """(exit code, stdout, stderr) of a command; the code is None without an answer in time, 127
    where it cannot be started."""
    with in_memory() as out, in_memory() as err:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env,
                cwd=ROOT,
                start_new_session=True,
            )
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # its end is not awaited: a driver may hold it
        except OSError as error:
            return 127, "", str(error)
        return code, text_of(out), text_of(err)


def in_memory():
    """A file in memory, since the disk may be full."""
    return os.fdopen(os.memfd_create("output"), "w", encoding="utf-8")


def text_of(file):
    return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")


def in_background(call, *args):
    """Start call(*args) beside the rest. Returns a function: seconds to wait -> its result, None
    without one."""
    results = []

    def work():
        with contextlib.suppress(Exception):
            results.append(call(*args))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result(seconds):
        thread.join(max(0, seconds))
        return results[0] if results else None

    return result


def tool(*command):
    """(whether a driver's tool works, its first line or what is wrong); None where it is not
    installed."""
    code, out, err = ask(command, TOOL_SECONDS)
    if code == 127:
        return None
    if code is None:
        return False, f"{command[0]} gives no answer within {TOOL_SECONDS} s: the driver hangs"
    said = out.strip() or err.strip() or f"exit code {code}"
    words = one_line(said.splitlines()[0])
    if code:
        return False, f"{command[0]} fails: {words}"
    return True, words


def web_server(url, seconds):
    """(whether a web server answers there, the seconds it took or why not)."""
    began = time.monotonic()
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("not an http:// or https:// address")
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "danpu"})
        urllib.request.urlopen(request, timeout=seconds).close()
    except Exception as error:
        code = getattr(error, "code", 500)  # a server that refuses HEAD is there; 407 is the proxy
        if code == 407 or code >= 500:
            return False, one_line(getattr(error, "reason", error), 80)
    return True, f"{time.monotonic() - began:.1f} s"


def one_line(error, width=250):
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= width else words[:width] + " ..."


def torch_facts():
    """{"torch": {...}, "device": {...}, ...} as another process found them; "errors": why a step
    has no answer."""
    env = dict(os.environ)
    if env.get("DEVICES"):  # as launch.sh does
        env["CUDA_VISIBLE_DEVICES"] = env["DEVICES"]
        env["ASCEND_RT_VISIBLE_DEVICES"] = machine.ascending(env["DEVICES"])
    code, out, err = ask([sys.executable, "-m", "tools.probe"], SECONDS, env)
    found = {"errors": {}}
    step = "torch"
    for line in out.splitlines():
        if line.startswith("danpu-probe "):
            answer = json.loads(line.partition(" ")[2])
            step = answer.pop("step", step)
            found["errors"].update(answer.pop("errors", {}))
            found.update(answer)
    if step not in found and step not in found["errors"]:
        found["errors"][step] = why_it_ended(code, err)
    return found


def why_it_ended(code, err):
    """What to tell of a process that ended without its answer."""
    if code is None:
        return f"no answer within {SECONDS} s: a driver or a disk hangs"
    if code < 0:
        return f"crashes ({signal.Signals(-code).name})"
    lines = err.strip().splitlines()
    return one_line(lines[-1]) if lines else "no message"


# ---- the other process ---------------------------------------------------------------------------


def _torch():
    # before torch: a torch_npu that cannot be used must not break its import
    from common import device

    import torch

    nccl = None
    if torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "version": torch.__version__,
        "built_for": torch.version.cuda,
        "nccl": nccl,
        "npu_error": device.NPU_ERROR and one_line(device.NPU_ERROR, 500),
        "cann": device.cann_home(),
    }


def _device():
    from common import device

    with warnings.catch_warnings(record=True) as notes:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        defaults = device.training_defaults(set())
    halves = [half for half in ("bf16", "fp16") if defaults[half]]
    return {
        "backend": device.dist_backend(),
        "count": device.device_count(),
        "dtype": halves[0] if halves else "fp32",
        "notes": " ".join(one_line(note.message) for note in notes),
    }


def _cards():
    from common import device

    return [_card(i) for i in range(device.device_count())]


def _card(i):
    """Name and memory of a card, after a product on it: a driver that answers may still be unable
    to compute."""
    from common import device

    import torch

    backend = device.module()
    try:
        place = torch.device(device.kind(), i)
        ones = torch.ones(16, 16, device=place, dtype=device.half_dtype())
        (ones @ ones).sum().item()
        free, total = backend.mem_get_info(i)
        return {"name": backend.get_device_name(i), "free": free, "total": total}
    except Exception as error:
        return {"error": one_line(error)}


def _transformers():
    import peft
    from transformers import Trainer, __version__  # noqa: F401

    return {"version": f"{__version__}, peft {peft.__version__}"}


def _deepspeed():
    import deepspeed
    from torch.utils import cpp_extension

    return {"version": deepspeed.__version__, "ninja": cpp_extension.is_ninja_available()}


def main():
    """Import and try, step by step; each answer leaves at once as a line of JSON."""
    for step in (_torch, _device, _cards, _transformers, _deepspeed):
        name = step.__name__[1:]
        print("\ndanpu-probe", json.dumps({"step": name}), flush=True)
        try:
            answer = {name: step()}
        except (Exception, SystemExit) as error:
            kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
            answer = {"errors": {name: kind + one_line(error)}}
        print("\ndanpu-probe", json.dumps(answer), flush=True)
        if name == "torch" and "errors" in answer:
            return


if __name__ == "__main__":
    main()
