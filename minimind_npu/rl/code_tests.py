"""Code in an answer, run against the tests of its row in the sandbox (toolcall/sandbox.py).

Tests are the answer of the row or, in verl's rows, the ground truth: Python with asserts, which
runs behind the code, or {"inputs": [text, ...], "outputs": [text, ...]}, what the program reads and
what it has to print. 1 where all of them pass, else 0.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from toolcall import sandbox

from common import cli

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
# the code cannot know what is printed behind the tests, so it cannot end early and look right
PROGRAM = """\
space = {{"__name__": "__main__"}}
exec({code!r}, space)
exec({tests!r}, space)
print({mark!r})
"""


class CodeTests:
    """seconds: of one run; missed(reason, example): counts an answer without a reward and returns
    NaN."""

    def __init__(self, seconds: float, missed: Callable[[str, str], float]):
        self.seconds = seconds
        self.missed = missed
        missing = sandbox.missing()
        if missing:
            cli.say(
                f"note: --rewards code: the sandbox has no {', '.join(missing)} of its own here"
            )

    def __call__(self, answers: list) -> list[float]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(self.passes, answers))
        return [
            self.missed(value, where_of(answer)) if isinstance(value, str) else float(value)
            for answer, value in zip(answers, found, strict=True)
        ]

    def passes(self, answer) -> bool | str:
        """Whether the code of an answer passes, or why nobody can say."""
        code = code_of(answer.text)
        tests = tests_of(answer.prompt.reference)
        try:
            if isinstance(tests, str):
                return self.asserts(code, tests)
            return all(self.prints(code, given, wanted) for given, wanted in tests)
        except ValueError as error:  # code that is too long
            return f"code: {error}"
        except RuntimeError as error:
            return f"the sandbox did not start: {error}"

    def asserts(self, code: str, tests: str) -> bool:
        mark = secrets.token_hex(8)
        result = self.run(PROGRAM.format(code=code, tests=tests, mark=mark))
        return result.outcome == "done" and result.stdout.endswith(f"{mark}\n")

    def prints(self, code: str, given: str, wanted: str) -> bool:
        result = self.run(code, given)
        return result.outcome == "done" and lines_of(result.stdout) == lines_of(wanted)

    def run(self, code: str, stdin: str = "") -> sandbox.Result:
        result = sandbox.run(code, stdin, seconds=self.seconds)
        if result.outcome == "not started":
            raise RuntimeError(" ".join(result.stderr.split())[-120:])
        return result


def where_of(answer) -> str:
    return f"{answer.prompt.data_source}:{answer.prompt.extra.get('line', answer.prompt.row)}"


def code_of(text: str) -> str:
    """The last fenced block behind the thought, else all of it."""
    said = text.split("</think>")[-1]
    blocks = FENCED.findall(said)
    return blocks[-1] if blocks else said


def tests_of(reference: str) -> str | list[tuple[str, str]]:
    """Python, or pairs of what is read and what has to be printed."""
    try:
        found = json.loads(reference)
    except ValueError:
        return reference
    if isinstance(found, dict) and {"inputs", "outputs"} <= found.keys():
        return list(zip(map(str, found["inputs"]), map(str, found["outputs"]), strict=True))
    return reference


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
