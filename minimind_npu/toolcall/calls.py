"""What a model writes when it calls tools: <tool_call>{"name": …, "arguments": {…}}</tool_call>.

    parse_calls(text) -> [Call, …]        # [] where nothing is called

Nothing here raises for what a model may say: a call that cannot be made says why in `problem`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

OPENED = "<tool_call>"
CLOSED = "</tool_call>"
LONGEST = 20_000  # characters of one call
MOST = 64  # calls of one answer
BLANKS = re.compile(r"\s*")


@dataclass(frozen=True)
class Call:
    """text: as it was written, between the tags; problem: "" or why it is no call that can be
    made (then name is "" or what was found of it)."""

    name: str
    arguments: dict = field(default_factory=dict)
    problem: str = ""
    text: str = ""


def parse_calls(text: str) -> list[Call]:
    """The calls in an answer, in order; what stands in its thought is none."""
    said = text.split("</think>")[-1].split("<think>")[0]
    found = []
    start = said.find(OPENED)
    while start >= 0:
        if len(found) == MOST:
            found.append(Call("", problem=f"more than {MOST} calls in one answer"))
            break
        start += len(OPENED)
        end = end_of_call(said, start)
        written = said[start:end]
        is_closed = said.startswith(CLOSED, end)
        found.append(read_call(written.strip(), is_closed))
        start = said.find(OPENED, end)
    return found


def end_of_call(said: str, start: int) -> int:
    """Where the call ends that begins at `start`: behind its JSON (a tag may stand in a string of
    it), else at the next tag, else at the end."""
    try:
        _, end = json.JSONDecoder().raw_decode(said, after_blanks(said, start))
    except (ValueError, RecursionError):
        end = start
    if not said.startswith(CLOSED, after_blanks(said, end)):
        end = start
    tags = [said.find(tag, end) for tag in (OPENED, CLOSED)]
    return min((at for at in tags if at >= 0), default=len(said))


def after_blanks(said: str, start: int) -> int:
    return BLANKS.match(said, start).end()


def read_call(written: str, is_closed: bool = True) -> Call:
    """The JSON of one call."""
    if not is_closed:
        return Call("", problem=f"{CLOSED} is missing", text=written)
    if len(written) > LONGEST:
        return Call("", problem=f"more than {LONGEST:,} characters", text=written[:200])
    try:
        value = from_json(written)
    except (ValueError, RecursionError) as error:
        return Call("", problem=f"not JSON: {' '.join(str(error).split())}", text=written)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", problem='a call needs a "name"', text=written)
    name = value["name"]
    more = sorted(value.keys() - {"name", "arguments", "id", "type"})
    if more:
        return Call(
            name, problem=f"keys beside name and arguments: {', '.join(more)}", text=written
        )
    return with_arguments(name, value.get("arguments", {}), written)


def with_arguments(name: str, arguments, written: str) -> Call:
    """arguments: an object, or the JSON text of one, as OpenAI's interface has it."""
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments)
        except (ValueError, RecursionError):
            return Call(name, problem="arguments are text that is not JSON", text=written)
    if not isinstance(arguments, dict):
        return Call(name, problem="arguments are not an object", text=written)
    return Call(name, arguments, text=written)


def from_json(text: str):
    """Strict JSON: neither NaN and Infinity nor a key twice. Raises ValueError."""
    return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)


def refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def unique(pairs: list[tuple]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands there twice")
    return made
