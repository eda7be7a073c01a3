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

SECONDS = 180  # for all of torch_facts; a cold start from a network disk takes a minute
TOOL_SECONDS = 10


def ask(command, seconds, env=None):
    """(exit code, stdout, stderr) of a command; code None: no answer in time, 127: it cannot be
    started."""
    files = [
        os.memfd_create(name) for name in ("stdout", "stderr")
    ]  # in memory: the disk may be full
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=files[0],
            stderr=files[1],
            env=env,
            start_new_session=True,
            cwd=Path(__file__).resolve().parents[1],
        )
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
        os.killpg(
            process.pid, signal.SIGKILL
        )  # and no wait for its end: a driver may hold it for ever
    except OSError as error:
        return 127, "", str(error)
    texts = [os.pread(file, 1 << 20, 0).decode(errors="replace") for file in files]
    for file in files:
        os.close(file)
    return (code, *texts)


def in_background(call, *args):
    """Start call(*args) beside the rest. Returns a function: seconds to wait -> its result, None
    without one."""
    box = []

    def work():
        with contextlib.suppress(Exception):
            box.append(call(*args))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result(seconds):
        thread.join(max(0, seconds))
        return box[0] if box else None

    return result


def tool(*command):
    """None where a driver's tool is not installed, else (whether it works, its first line or what
    is wrong)."""
    code, out, err = ask(command, TOOL_SECONDS)
    if code == 127:
        return None
    if code is None:
        return False, f"{command[0]} gives no answer within {TOOL_SECONDS} s: the driver hangs"
    words = one_line((out.strip() or err.strip() or f"exit code {code}").splitlines()[0])
    return code == 0, words if code == 0 else f"{command[0]} fails: {words}"


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


def ascending(ids):
    """ "3,0" -> "0,3": Ascend's driver stops reading at the first id that does not ascend."""
    return ",".join(sorted(ids.split(","), key=lambda i: (len(i), i)))


def torch_facts():
    """{"torch": {...}, "device": {...}, ...} as another process found them; "errors": why a step
    has no answer."""
    env = dict(os.environ)
    if env.get("DEVICES"):  # as launch.sh does
        env["CUDA_VISIBLE_DEVICES"] = env["DEVICES"]
        env["ASCEND_RT_VISIBLE_DEVICES"] = ascending(env["DEVICES"])
    code, out, err = ask([sys.executable, "-m", "tools.probe"], SECONDS, env)
    found, step = {"errors": {}}, "torch"
    for line in out.splitlines():
        if line.startswith("danpu-probe "):
            answer = json.loads(line.partition(" ")[2])
            step = answer.pop("step", step)
            found["errors"].update(answer.pop("errors", {}))
            found.update(answer)
    if step not in found and step not in found["errors"]:
        last = one_line((err.strip().splitlines() or ["no message"])[-1])
        crash = signal.Signals(-code).name if code and code < 0 else None
        hangs = f"no answer within {SECONDS} s: a driver or a disk hangs"
        found["errors"][step] = hangs if code is None else f"crashes ({crash})" if crash else last
    return found


# ---- the other process --------------------------------------------------------------------------------------


def _torch():
    from common import (
        device,
    )  # before torch: a torch_npu that cannot be used must not break its import

    import torch

    nccl = (
        ".".join(map(str, torch.cuda.nccl.version()))
        if torch.distributed.is_nccl_available()
        else None
    )
    error = device.NPU_ERROR and one_line(device.NPU_ERROR, 500)
    about = {"version": torch.__version__, "built_for": torch.version.cuda, "nccl": nccl}
    return {**about, "npu_error": error, "cann": device.cann_home()}


def _device():
    from common import device

    with warnings.catch_warnings(record=True) as notes:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        defaults = device.prepare(set())
    dtype = "bf16" if defaults["bf16"] else "fp16" if defaults["fp16"] else "fp32"
    notes = " ".join(one_line(note.message) for note in notes)
    return {
        "backend": device.dist_backend(),
        "count": device.device_count(),
        "dtype": dtype,
        "notes": notes,
    }


def _cards():
    """Name and memory of each card, after a product on it: a driver that answers may still be
    unable to compute."""
    from common import device

    import torch

    cards = []
    for i in range(device.device_count()):
        try:
            ones = torch.ones(
                16, 16, device=torch.device(device.kind(), i), dtype=device.half_dtype()
            )
            (ones @ ones).sum().item()
            free, total = device.module().mem_get_info(i)
            cards.append({"name": device.module().get_device_name(i), "free": free, "total": total})
        except Exception as error:
            cards.append({"error": one_line(error)})
    return cards


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
