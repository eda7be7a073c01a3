"""The flags of a training script, from its own parser, as JSON on the last line.

    python tools/manager/describe.py SCRIPT

The script runs up to the point where it reads its command line. That ends this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import runpy
import sys
from enum import Enum
from pathlib import Path

MARK = "danpu-flags "
TITLES = {"RunArgs": "run", "DataArgs": "data", "LoraArgs": "adapter"}
TRAINING = "training"
OWN = "recipe"


def owners(parser: argparse.ArgumentParser) -> dict[str, str]:
    """flag -> title of its group: the class of common/cli.py that has it, the recipe's own, or
    transformers'."""
    found = {}
    for kind in getattr(parser, "dataclass_types", ()):
        for one in reversed(kind.__mro__):
            title = TITLES.get(one.__name__, OWN)
            if one.__module__.startswith("transformers."):
                title = TRAINING
            for name in getattr(one, "__annotations__", {}):
                found.setdefault(name, title)
    return found


def kind_of(action: argparse.Action) -> str:
    if action.choices:
        return "choice"
    name = getattr(action.type, "__name__", "str")
    if action.nargs == 0 or name == "string_to_bool":
        return "bool"
    return name if name in ("int", "float") else "str"


def plain(value):
    """A default as JSON has it."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def flag(action: argparse.Action, tiny: dict) -> dict:
    """tiny: defaults for the built-in model that differ."""
    choices = [plain(one) for one in action.choices] if action.choices else None
    names = [name for name in action.option_strings if name.startswith("--")]
    nargs = action.nargs if action.nargs in ("*", "+", "?") else None
    kind = kind_of(action)
    return {
        "name": names[0],
        "aliases": names[1:],
        "type": kind,
        "default": plain(action.default),
        "tiny_default": plain(tiny.get(action.dest, action.default)),
        "choices": choices,
        "help": (action.help or "") % {} if "%(" not in (action.help or "") else "",
        "nargs": None if kind == "bool" else nargs,
        "switch": action.nargs == 0,
        "required": bool(action.required),
    }


def tell(parser: argparse.ArgumentParser, tiny: dict) -> None:
    titles = owners(parser)
    groups: dict[str, list] = {}
    for action in parser._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        is_complement = isinstance(action, argparse._StoreFalseAction)  # --no_x beside --x
        if not names or action.dest == "help" or is_complement:
            continue
        groups.setdefault(titles.get(action.dest, OWN), []).append(flag(action, tiny))
    order = [OWN, "run", "data", "adapter", TRAINING]
    known = [{"title": title, "flags": groups[title]} for title in order if title in groups]
    print(f"\n{MARK}{json.dumps(known)}", flush=True)
    os._exit(0)


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script)]
    sys.path[0] = str(script.parent)  # as if the script had been started
    sys.path.insert(1, str(script.parent.parent))
    tiny = {}
    with contextlib.suppress(ImportError):  # a script without common/
        from common import cli

        whole = cli.parse_args

        def parse_args(classes, defaults, tiny_defaults, *args, **kwargs):
            tiny.update(tiny_defaults)
            return whole(classes, defaults, tiny_defaults, *args, **kwargs)

        cli.parse_args = parse_args
    # every parser comes through here
    argparse.ArgumentParser.parse_known_args = lambda self, *args, **kwargs: tell(self, tiny)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
