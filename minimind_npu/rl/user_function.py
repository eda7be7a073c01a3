"""A reward function of the user's own, in a process of its own: what it prints, breaks or never
ends does not reach the training.

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):      # as for verl
        return 1.0                                                        # or {"score": 1.0, ...}

Run as a script this file is that process: a line of JSON for each answer comes in, one goes out.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

STARTS = 60.0  # seconds for the imports of the user's file
IN_A_ROW = 5  # answers that take too long, one after another, before the run ends


class UserFunction:
    """Scores answers with FILE.py, or FILE.py::NAME where the function is called otherwise.

    timeout: seconds for one answer. missed(reason, example): counts an answer without a score and
        returns NaN. SystemExit where the file has no such function or does not import.
    """

    def __init__(self, name: str, timeout: float, missed: Callable[[str, str], float]):
        self.file, _, function = name.partition("::")
        self.function = function or "compute_score"
        self.timeout = timeout
        self.missed = missed
        self.late = 0  # in a row
        if not Path(self.file).is_file():
            raise SystemExit(f"--rewards {name}: no such file")
        self.start()

    def start(self) -> None:
        command = [sys.executable, __file__, self.file, self.function]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
        self.unread = b""
        said = self.read(STARTS)
        if said is None or "ready" not in said:
            why = (said or {}).get("error", f"its imports took more than {STARTS:.0f} s")
            self.close()
            raise SystemExit(f"--rewards {self.file}: {why}")

    def restart(self) -> None:
        self.close()
        self.start()

    def __call__(self, answers: list) -> list[float]:
        return [self.score(answer) for answer in answers]

    def score(self, answer) -> float:
        prompt = answer.prompt
        asked = {
            "data_source": prompt.data_source,
            "solution_str": answer.text,
            "ground_truth": prompt.ground_truth,
            "extra_info": prompt.extra | {"question": prompt.question} | prompt.extra_info,
        }
        where = f"{prompt.data_source}:{prompt.extra.get('line', prompt.row)}"
        try:
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            self.process.stdin.flush()
            said = self.read(self.timeout)
        except BrokenPipeError:
            said = {"error": "its process ended"}
        if said is None:
            return self.too_late(where)
        self.late = 0
        if "error" in said:
            if self.process.poll() is not None:
                self.restart()
            return self.missed(f"{self.file}: {said['error'][:120]}", where)
        if not math.isfinite(said["score"]):
            return self.missed(f"{self.file}: returned {said['score']}", where)
        return said["score"]

    def too_late(self, where: str) -> float:
        self.late += 1
        if self.late == IN_A_ROW:
            self.close()
            raise SystemExit(
                f"--rewards {self.file}: {IN_A_ROW} answers in a row took longer than "
                f"--reward_timeout {self.timeout:g} s, the last of them {where}"
            )
        self.restart()
        return self.missed(f"{self.file}: took longer than {self.timeout:g} s", where)

    def read(self, seconds: float) -> dict | None:
        """The next line of the process; None where it does not come in time."""
        out = self.process.stdout.fileno()
        end = time.monotonic() + seconds
        while b"\n" not in self.unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                return None
            new = os.read(out, 1 << 16)
            if not new:
                code = self.process.wait()
                return {"error": f"its process ended with code {code}"}
            self.unread += new
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# ---- the process ---------------------------------------------------------------------------------


def load(file: str, name: str) -> Callable:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise SystemExit(f"has no function {name}")
    return function


def number(value) -> float:
    """A score, or the "score" of a dict; TypeError for a text and whatever else is no number."""
    if isinstance(value, dict):
        value = value["score"]
    if value is None or isinstance(value, (str, bytes)):
        raise TypeError(f"returned {value!r:.60}, which is no number")
    return float(value)


def in_words(error: BaseException) -> str:
    """One line; where in the user's file an error was raised."""
    trace = error.__traceback__
    line = 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == sys.argv[1]:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f" (line {line})" if line else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"


def main() -> None:
    if sys.platform == "linux":  # also where the training is killed outright
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the training
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints goes beside the training's own lines

    def reply(content: dict) -> None:
        print(json.dumps(content), file=replies, flush=True)

    try:
        score = load(*sys.argv[1:3])
    except (Exception, SystemExit) as error:
        reply({"error": str(error) if isinstance(error, SystemExit) else in_words(error)})
        return
    reply({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            reply({"score": number(score(**asked))})
        except (Exception, SystemExit) as error:
            reply({"error": in_words(error)})


if __name__ == "__main__":
    main()
