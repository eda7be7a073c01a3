"""Layouts in which sets keep conversations with tools -> {"messages", "tools"}.

hermes     {"conversations": [{"from", "value"}], "tools"?}: tools in <tools> of the system turn,
           calls in <tool_call>, JSON or Python; results in <tool_response>
           (NousResearch/hermes-function-calling-v1)
glaive     {"system", "chat"}: one text with USER:, ASSISTANT:, FUNCTION RESPONSE:, <functioncall>
           and <|endoftext|> (glaiveai/glaive-function-calling-v2)
xlam       {"query", "tools", "answers"}: arguments described without a schema; ends with the calls
           (Salesforce/xlam-function-calling-60k)
chatglm3   {"tools", "conversations"}: a turn of role tool has name, parameters and observation
messages   all that common/data/shapes.py reads: OpenAI's messages with tool_calls or function_call,
           ShareGPT's function_call and observation, MiniMind's tools in the system turn

A row comes out as `messages` would have it; what it lacks or says wrongly is a BadRow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from common.data import shapes
from common.data.turns import BadRow, as_list, from_text, parsed, said, text_in

TAGGED_TOOLS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
TAGGED_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
TAGGED_RESULT = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)


class Layout(NamedTuple):
    name: str
    matches: Callable[[dict], bool]
    convert: Callable[[dict], dict]


def calling(content: str, calls: list[dict]) -> dict:
    """calls: [{"name", "arguments"}]."""
    made = [{"type": "function", "function": call} for call in calls]
    return said("assistant", content) | {"tool_calls": made}


def value_in(text: str, what: str):
    try:
        return from_text(text)
    except ValueError:
        raise BadRow(f"{what} that is neither JSON nor Python", text[:60]) from None


# ---- hermes --------------------------------------------------------------------------------------


def is_hermes(row: dict) -> bool:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return False
    values = [turn.get("value") for turn in turns]
    return any(isinstance(v, str) and ("<tool_call>" in v or "<tools>" in v) for v in values)


def from_hermes(row: dict) -> dict:
    messages = []
    tools = parsed(row.get("tools"), "tools") or []
    for turn in row["conversations"]:
        speaker = turn.get("from")
        text = text_in(turn, "value")
        if speaker == "system":
            tools = tools or tools_in(text)
            if not TAGGED_TOOLS.search(text):  # else it explains a format that is another one here
                messages.append(said("system", text))
        elif speaker == "gpt" and "<tool_call>" in text:
            messages.append(hermes_call(text))
        elif speaker == "tool":
            results = TAGGED_RESULT.findall(text) or [text]
            messages += [said("tool", result.strip()) for result in results]
        else:
            messages.append({"role": speaker, "content": text})
    return {"messages": messages, "tools": tools}


def tools_in(text: str) -> list:
    """The tools that a system turn lists: one list, or objects one after another."""
    tools: list = []
    for written in TAGGED_TOOLS.findall(text):
        if not written.strip():
            continue
        try:
            tools += as_list(from_text(written))
        except ValueError:
            tools += objects_in(written)
    return tools


def hermes_call(text: str) -> dict:
    written = TAGGED_CALL.findall(text)
    if len(written) != text.count("<tool_call>"):
        raise BadRow("a call without its end tag", text[:60])
    content = text.partition("<tool_call>")[0].strip()
    if TAGGED_CALL.sub("", text).strip() != content:
        raise BadRow("words behind a call", text[-60:])
    calls = [as_call(value_in(call.strip(), "a call")) for call in written]
    return calling(content, calls)


def as_call(value) -> dict:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise BadRow("wrong tool_calls", "a call needs a name")
    return {"name": value["name"], "arguments": value.get("arguments") or {}}


# ---- glaive --------------------------------------------------------------------------------------

SPEAKER = re.compile(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
# {"name": "f", "arguments": '{"x": 1}'}
QUOTED = re.compile(r"(.*\"arguments\":\s*)'(.*)'\s*\}\s*", re.DOTALL)


def is_glaive(row: dict) -> bool:
    return isinstance(row.get("chat"), str) and bool(SPEAKER.search(row["chat"]))


def from_glaive(row: dict) -> dict:
    before, *parts = SPEAKER.split(row["chat"])
    if before.strip():
        raise BadRow("words before the first speaker", before.strip()[:60])
    messages = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        text = text.replace("<|endoftext|>", "").strip()
        content, called, written = text.partition("<functioncall>")
        if called and speaker == "ASSISTANT":
            messages.append(calling(content.strip(), [glaive_call(written.strip())]))
        else:
            messages.append(said(ROLES[speaker], text))
    return {"messages": messages, "tools": objects_in(text_in(row, "system", ""))}


def glaive_call(written: str) -> dict:
    quoted = QUOTED.fullmatch(written)
    if quoted:
        head = value_in(quoted[1] + "{}}", "a call")
        return as_call(head | {"arguments": value_in(quoted[2], "a call")})
    return as_call(value_in(written, "a call"))


def objects_in(text: str) -> list[dict]:
    """The JSON objects in a text, one after another, with words between them."""
    found = []
    start = text.find("{")
    while start >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            raise BadRow("tools that are not JSON", text[start : start + 60]) from None
        found.append(value)
        start = text.find("{", end)
    return found


# ---- xlam ----------------------------------------------------------------------------------------

TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}


def is_xlam(row: dict) -> bool:
    return all(name in row for name in ("query", "tools", "answers"))


def from_xlam(row: dict) -> dict:
    calls = [as_call(one) for one in as_list(parsed(row["answers"], "answers") or [])]
    if not calls:
        raise BadRow("empty answer", "in answers")
    tools = as_list(parsed(row["tools"], "tools") or [])
    messages = [said("user", text_in(row, "query")), calling("", calls)]
    return {"messages": messages, "tools": [with_schema(tool) for tool in tools]}


def with_schema(tool) -> dict:
    """A tool whose parameters are {name: {"type": "str, optional", "description", "default"}}."""
    parameters = tool.get("parameters") if isinstance(tool, dict) else None
    if not isinstance(parameters, dict) or not isinstance(tool.get("name"), str):
        raise BadRow("wrong tools", "a tool needs a name and parameters")
    if parameters.get("type") == "object":
        return as_tool(tool)
    properties = {}
    required = []
    for name, told in parameters.items():
        if not isinstance(told, dict):
            raise BadRow("wrong tools", f"parameter {name}"[:60])
        properties[name], is_required = property_of(told)
        if is_required:
            required.append(name)
    schema = {"type": "object", "properties": properties, "required": required}
    return as_tool(tool | {"parameters": schema})


def property_of(told: dict) -> tuple[dict, bool]:
    """-> (its schema, whether it has to be given)."""
    kind, _, more = str(told.get("type", "")).partition(",")
    plain = re.match(r"\w*", kind.strip())[0].lower()
    schema = {
        name: told[name] for name in ("description", "default") if told.get(name) not in (None, "")
    }
    if plain in TYPES or plain in TYPES.values():
        schema = {"type": TYPES.get(plain, plain)} | schema
    return schema, "optional" not in more and "default" not in told


def as_tool(function: dict) -> dict:
    return {"type": "function", "function": function}


# ---- chatglm3 ------------------------------------------------------------------------------------


def is_chatglm3(row: dict) -> bool:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return False
    return any("observation" in turn for turn in turns)


def from_chatglm3(row: dict) -> dict:
    messages = []
    for turn in row["conversations"]:
        if turn.get("role") != "tool" or "observation" not in turn:
            messages.append(turn)
            continue
        arguments = parsed(turn.get("parameters"), "parameters") or {}
        call = as_call({"name": turn.get("name"), "arguments": arguments})
        thought = ""
        if (
            messages
            and messages[-1].get("role") == "assistant"
            and "tool_calls" not in messages[-1]
        ):
            thought = text_in(messages.pop(), "content", "")
        messages += [calling(thought, [call]), said("tool", result_of(turn["observation"]))]
    tools = [glm_tool(tool) for tool in as_list(parsed(row.get("tools"), "tools") or [])]
    return {"messages": messages, "tools": tools}


def result_of(observation) -> str:
    if isinstance(observation, str):
        return observation
    return json.dumps(observation, ensure_ascii=False)


def glm_tool(tool) -> dict:
    is_bare = isinstance(tool, dict) and "function" not in tool
    return as_tool(tool) if is_bare else tool


# ---- all of them ---------------------------------------------------------------------------------


def is_messages(row: dict) -> bool:
    return shapes.detect("chat", [row]) is not None


def unchanged(row: dict) -> dict:
    return row


LAYOUTS = [
    Layout("hermes", is_hermes, from_hermes),
    Layout("glaive", is_glaive, from_glaive),
    Layout("xlam", is_xlam, from_xlam),
    Layout("chatglm3", is_chatglm3, from_chatglm3),
    Layout("messages", is_messages, unchanged),
]


def layout_of(row: dict) -> Layout:
    """The layout of one record; BadRow where it has none."""
    for layout in LAYOUTS:
        if layout.matches(row):
            return layout
    seen = ", ".join(list(row)[:8])
    raise BadRow("no layout of conversations with tools", f"columns seen: {seen}"[:120])


def canonical(row: dict, layout: Layout, notes: list[str]) -> dict:
    """A record as a row of ours, checked: {"messages", "tools"}. notes: gets what was left out."""
    made = layout.convert(row)
    shape = shapes.detect("chat", [made])
    if shape is None:
        raise BadRow("no turns")
    found = shape.convert(made, notes)
    check_calls(found)
    return found


def check_calls(row: dict) -> None:
    """BadRow for a call that the row's own tools do not allow."""
    calls = [call for message in row["messages"] for call in message.get("tool_calls", [])]
    if not row.get("tools"):
        raise BadRow("calls without tools" if calls else "no tools")
    known = {}
    for tool in row["tools"]:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("wrong tools", "a tool needs a name")
        known[function["name"]] = function.get("parameters")
    for call in calls:
        check_call(call["function"], known)


def check_call(call: dict, known: dict) -> None:
    name = call["name"]
    if name not in known:
        raise BadRow("a call of a tool that the row has not", name[:60])
    schema = known[name] if isinstance(known[name], dict) else {}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    missing = [one for one in required if isinstance(one, str) and one not in call["arguments"]]
    if missing:
        raise BadRow("a call without a required argument", f"{name}: {missing[0]}"[:60])
    properties = schema.get("properties")
    if isinstance(properties, dict) and schema.get("additionalProperties") in (None, False):
        unknown = [one for one in call["arguments"] if one not in properties]
        if unknown:
            raise BadRow(
                "a call with an argument that the tool has not", f"{name}: {unknown[0]}"[:60]
            )
