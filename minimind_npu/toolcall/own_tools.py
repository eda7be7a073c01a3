"""What --tools names: files of the user's, and `python`, which runs code in the sandbox.

    registry = registry_of(["python", "my_tools.py"])      # beside the built-in ones

A file is run, and its `add_tools(registry)` called; see registry.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from toolcall import sandbox
from toolcall.registry import Registry
from toolcall.tools import TEXT, built_in, of

PYTHON = "python"
SECONDS = 5.0  # that the code may take; the sandbox itself takes some more


def registry_of(names: list[str]) -> Registry:
    """The built-in tools and those that are named. SystemExit with one line for a file that adds
    none."""
    registry = built_in()
    for name in names:
        if name == PYTHON:
            registry.add(python, of(["code"], code=TEXT), seconds=SECONDS + sandbox.STARTING)
        else:
            add_tools_of(name, registry)
    return registry


def python(code: str) -> dict:
    """运行Python代码"""
    result = sandbox.run(code, seconds=SECONDS)
    if result.outcome != "done":
        last = result.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"{result.outcome}: {last}" if last else result.outcome)
    return {"output": result.stdout.strip()}


def add_tools_of(file: str, registry: Registry) -> None:
    path = Path(file)
    if not path.is_file():
        raise SystemExit(f"--tools {file}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--tools {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        module.add_tools(registry)
    except Exception as error:  # the user's own code
        words = " ".join(str(error).split())
        raise SystemExit(f"--tools {file}: {type(error).__name__}: {words}") from None
