"""Flags of a request against those that the trainer's own parser has: types, choices, bounds, and
paths only below the configured folders. What flags decide of one another the trainer itself says
as it starts."""

from __future__ import annotations

import difflib
import math
from pathlib import Path

from pydantic_core import from_json

from common.runs import flags as bounds
from tools.manager.errors import Problem
from tools.manager.files import is_below
from tools.manager.recipes import why_managed

MOST = 200  # flags of one job
LONGEST = 4000  # characters of a value
TRUE = ("true", "1", "yes", "t", "y")
FALSE = ("false", "0", "no", "f", "n")
URLS = ("http://", "https://")
PROSE = ("--system_prompt",)  # text that no trainer takes for a file


def parsed(text: str) -> dict:
    """Flags of a query: a JSON object."""
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Problem(400, 'args: a JSON object like {"--stage": "sft"}', "args")
    return found


def words_of(args: dict, groups: list[dict], places: list[Path], cwd: Path) -> list[str]:
    """args: {"--learning_rate": 1e-4, ...} -> words of a command line, one for each flag unless it
    takes a list.

    places: folders that paths may lie in; cwd: where the trainer will run.
    Problem 400 names the first flag that does not fit.
    """
    known = {}
    for group in groups:
        for flag in group["flags"]:
            for name in (flag["name"], *flag["aliases"]):
                known[name] = flag
    if len(args) > MOST:
        raise Problem(400, f"more than {MOST} flags", "args")
    words = []
    given = set()
    for asked, value in args.items():
        name = asked if asked.startswith("--") else f"--{asked}"
        if name not in known:
            raise unknown(name, known)
        flag = known[name]
        refuse_managed(name, flag, value)
        if flag["name"] in given:
            raise Problem(400, f"{shown(name)} is given twice", name)
        given.add(flag["name"])
        if value is not None:  # an empty field of a form
            words += words_of_flag(name, flag, value, places, cwd)
    return words


def unknown(name: str, known: dict) -> Problem:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return Problem(400, f"unknown flag {shown(name)}{hint}", shown(name))


def shown(text: str) -> str:
    """Words of a request within a message."""
    return text[:80].encode("utf-8", "replace").decode()


def refuse_managed(name: str, flag: dict, value) -> None:
    """Of the model flag's other names a plain word may be given: the size of a model that is made
    from nothing."""
    instead = why_managed(flag["name"], *flag["aliases"])
    if instead is None:
        return
    is_word = isinstance(value, str) and value.replace("-", "").isalnum() and value.isascii()
    if name == "--size" and is_word:
        return
    raise Problem(400, f"{name} is the manager's: {instead}", name)


def words_of_flag(name: str, flag: dict, value, places, cwd: Path) -> list[str]:
    if flag["switch"]:
        return [name] if truth(name, value) else []
    if flag["nargs"] in ("*", "+"):
        values = value if isinstance(value, list) else str(value).split()
        texts = [one_value(name, flag, one, places, cwd) for one in values]
        if any(text.startswith("-") for text in texts):
            raise Problem(400, f"{name}: a value cannot begin with -", name)
        if not texts and flag["nargs"] == "+":
            raise Problem(400, f"{name} needs a value", name)
        return [name, *texts]
    return [f"{name}={one_value(name, flag, value, places, cwd)}"]


def one_value(name: str, flag: dict, value, places, cwd: Path) -> str:
    if flag["type"] == "bool":
        return "true" if truth(name, value) else "false"
    if isinstance(value, (dict, list, bool)):
        raise Problem(400, f"{name}: expected {flag['type']}", name)
    if flag["type"] in ("int", "float"):
        return number(name, flag["type"], value)
    text = str(value)
    if flag["choices"]:
        if text not in map(str, flag["choices"]):
            told = ", ".join(map(str, flag["choices"]))
            raise Problem(400, f"{name}: one of {told}"[:1000], name)
        return text
    check_text(name, text, places, cwd)
    return text


def truth(name: str, value) -> bool:
    text = str(value).lower()
    if text not in TRUE + FALSE:
        raise Problem(400, f"{name}: true or false", name)
    return text in TRUE


def number(name: str, kind: str, value) -> str:
    convert = int if kind == "int" else float
    try:
        found = convert(value if not isinstance(value, float) else repr(value))
    except (ValueError, OverflowError):
        whole = "a whole number" if kind == "int" else "a number"
        raise Problem(400, f"{name}: {whole}", name) from None
    if not abs(found) < 1 << 63:  # nor one that is none
        raise Problem(400, f"{name}: a finite number", name)
    low, high = bounds.RANGES.get(name.removeprefix("--"), (-math.inf, math.inf))
    if not low <= found < high:
        raise Problem(400, f"{name}: {bounds.range_in_words(low, high)}", name)
    return str(found)


def check_text(name: str, text: str, places, cwd: Path) -> None:
    if len(text) > LONGEST:
        raise Problem(400, f"{name}: more than {LONGEST} characters", name)
    if not text.isprintable():
        raise Problem(400, f"{name}: line ends and control characters are not taken", name)
    if name in PROSE or (name.endswith("_url") and text.startswith(URLS)):
        return
    for word in [text, *text.split()]:
        if is_path(word, cwd) and not is_below(cwd / word, places):
            told = "only files and folders of the recipes and the configured folders"
            raise Problem(400, f"{name}: {told}", name)


def is_path(word: str, cwd: Path) -> bool:
    """Whether a trainer could take a word for a file."""
    if word.startswith("~") or "/" in word or "\\" in word or ".." in word:
        return True
    try:
        return (cwd / word).exists()
    except (OSError, ValueError):  # too long for a name
        return False
