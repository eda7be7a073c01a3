"""Turns of a conversation as sets spell them -> canonical messages, calls and tools, and the order
they may stand in."""

import ast
import json
import math
import re


class BadRow(ValueError):
    """A record that cannot be used.

    reason: what it is counted under; detail: shown with the one example of that reason.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


# ---- fields --------------------------------------------------------------------------------------


def is_absent(value) -> bool:
    """None, or the NaN that tables have in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_number(value) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def text_in(row: dict, name: str, default: str | None = None) -> str:
    """A text, or a number as one writes it."""
    value = row.get(name)
    if default is not None and is_absent(value):
        return default
    if value is None:
        raise BadRow(f"missing {name}")
    if is_number(value):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text", type(value).__name__)
    return value.replace("\0", "")


def words_in(row: dict, name: str, default: str | None = None) -> str:
    """A text of its own, a question or a document: no number."""
    if is_number(row.get(name)):
        raise BadRow(f"{name} is not text", "a number")
    return text_in(row, name, default)


def filled_in(row: dict, name: str, reason: str) -> str:
    value = text_in(row, name)
    if not value.strip():
        raise BadRow(reason, f"in {name}")
    return value


def parsed(value, name: str):
    """A list or dict that some data sets keep as a JSON string; None, "" and [] are None."""
    if is_absent(value):
        return None
    if isinstance(value, str) and value.strip():
        try:
            value = from_text(value)
        except ValueError:
            raise BadRow(f"wrong {name}", "not JSON") from None
    return value or None


def from_text(text: str):
    """The value of a JSON text, or of a Python one, which pandas writes into csv. ValueError where
    it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError("neither JSON nor Python") from None


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


# ---- messages ------------------------------------------------------------------------------------

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "environment": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLERS = ("function_call", "tool_call")  # roles whose words are a call
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
CONTENTS = ("content", "value", "text")  # the columns in which sets keep the words of a turn
TEXT_PARTS = ("text", "input_text", "output_text", None)
SWITCHES = ("weight", "loss", "train")  # 0 or false on a turn: it is read and not learned


def said(role: str, content) -> dict:
    return {"role": role, "content": content}


def role_of(turn) -> str | None:
    """The canonical role of a turn; None where it names none that is known."""
    if not isinstance(turn, dict):
        raise BadRow("a turn is not an object", type(turn).__name__)
    speaker = turn.get("role") or turn.get("from")
    return ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None


def _words(turn: dict, column: str, default: str | None) -> str:
    """What a turn says: a text, or a list of typed parts that are all texts."""
    parts = turn.get(column)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return text_in(turn, column, default)
    for part in parts:
        if part.get("type") not in TEXT_PARTS:
            raise BadRow("a part of a turn is not text", str(part.get("type"))[:40])
    return "".join(text_in(part, "text") for part in parts)


def _is_trained(turn: dict, role: str) -> bool:
    """Whether a turn is to be learned, as its own keys say. BadRow where they say what is not done
    here."""
    if turn.keys().isdisjoint(SWITCHES):
        return True
    for name in SWITCHES:
        value = turn.get(name)
        if is_absent(value):
            continue
        if value not in (0, 1):
            raise BadRow(f"{name} of a turn is neither 0 nor 1", str(value)[:20])
        if not value:
            return False
        if role != "assistant":
            raise BadRow(f"{name} on a turn of the {role}", "only answers are learned")
    return True


def message_of(turn, tools: list | None = None) -> dict:
    """One turn spelled role/content, from/value or role/text -> a canonical message."""
    role = role_of(turn)
    speaker = turn.get("role") or turn.get("from")
    if role is None:
        raise BadRow("unknown role", str(speaker)[:40])
    if not is_absent(turn.get("train_detail")):
        raise BadRow("train_detail of a turn", "parts of a turn cannot be left out of training")

    column = next((name for name in CONTENTS if name in turn), "content")
    if speaker.strip().lower() in CALLERS:
        calls = _calls(filled_in(turn, column, "empty answer"), tools)
        message = {"role": role, "content": "", "tool_calls": calls}
        return message if _is_trained(turn, role) else message | {"train": False}

    calls = _calls(turn.get("tool_calls") or turn.get("function_call"), tools)
    may_be_missing = bool(calls) or role == "system"
    content = _words(turn, column, default="" if may_be_missing else None)
    if not content.strip() and not calls:
        if role == "user":
            raise BadRow("empty prompt")
        if role == "assistant":
            raise BadRow("empty answer")

    message = said(role, content)
    if role == "assistant":
        thought = text_in(turn, "reasoning_content", "")
        if thought.strip():
            message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    name = text_in(turn, "name", "").strip()
    if name:
        message["name"] = name
    if not _is_trained(turn, role) and role == "assistant":
        message["train"] = False
    return message


def messages_of(turns, row: dict) -> tuple[list[dict], dict]:
    """Turns and the row around them -> (messages, {"tools": [...]} or {}).

    The row's own `system` column is a system turn; a blank one is none.
    """
    turns = parsed(turns, "turns")
    if not isinstance(turns, list):
        raise BadRow("no turns")
    tools = tools_of(row, turns)
    return with_system([message_of(turn, tools) for turn in speaking(turns)], row, tools)


def speaking(turns: list) -> list:
    """Without system turns that say nothing: null, or blank and there for the tools they carry. An
    empty one says that the template's own is not wanted."""
    kept = []
    for turn in turns:
        if role_of(turn) == "system":
            column = next((name for name in CONTENTS if name in turn), "content")
            carries = turn.get("tools") or turn.get("functions")
            if not _words(turn, column, "").strip() and (carries or is_absent(turn.get(column))):
                continue
        kept.append(turn)
    return kept


def with_system(messages: list[dict], row: dict, tools: list | None) -> tuple[list[dict], dict]:
    system = text_in(row, "system", "")
    has_system = bool(messages) and messages[0]["role"] == "system"
    if system.strip() and not has_system:
        messages.insert(0, said("system", system))
    return messages, {"tools": tools} if tools else {}


# ---- tools and calls -----------------------------------------------------------------------------
#
# Arrow gives all structs of a column the same keys and fills them with null. A null that was meant
# has a place in a schema: a property of the tool, a default, an item of a list. What is kept as
# JSON text was never filled.

VALUES = ("default", "const", "enum", "example", "examples")  # of a schema: they may hold null
NAMES = ("properties", "patternProperties", "$defs", "definitions")  # their keys are no keywords


def tools_of(row: dict, turns: list) -> list | None:
    """The tools of a row or of one of its turns; `functions` is their older name."""
    found = None
    holders = [holder for holder in (row, *turns) if isinstance(holder, dict)]
    for holder in holders:
        for name in ("tools", "functions"):
            if not holder.get(name):
                continue
            tools = _tool_list(holder[name], name)
            if tools and found and tools != found:
                raise BadRow("tools of several turns", "all calls of a row know the same tools")
            found = tools or found
    return found


def _tool_list(given, name: str) -> list | None:
    tools = parsed(given, "tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise BadRow("wrong tools", "not a list")
    found = []
    for item in tools:
        tool = parsed(item, "tools")
        if not isinstance(tool, dict):
            raise BadRow("wrong tools", "a tool is not an object")
        if not isinstance(given, str) and not isinstance(item, str):
            tool = _schema_without_nulls(tool)
        is_bare = name == "functions" and "function" not in tool
        found.append({"type": "function", "function": tool} if is_bare else tool)
    return found


def _schema_without_nulls(schema: dict) -> dict:
    kept = {}
    for key, value in schema.items():
        if key in VALUES and not (key != "default" and value is None):
            kept[key] = value
        elif key in NAMES and isinstance(value, dict):
            kept[key] = _named_schemas(value)
        elif isinstance(value, dict):
            inner = _schema_without_nulls(value)
            if inner or not value:
                kept[key] = inner
        elif isinstance(value, list):
            kept[key] = [_schema_without_nulls(v) if isinstance(v, dict) else v for v in value]
        elif value is not None:
            kept[key] = value
    return kept


def _named_schemas(named: dict) -> dict:
    """{name: schema}; one that holds nothing but nulls is another tool's."""
    kept = {}
    for name, schema in named.items():
        if isinstance(schema, dict):
            inner = _schema_without_nulls(schema)
            if inner or not schema:
                kept[name] = inner
        elif schema is not None:
            kept[name] = schema
    return kept


def _calls(value, tools: list | None) -> list[dict]:
    """Tool calls in OpenAI's or the bare {"name", "arguments"} form, arguments a dict or JSON."""
    is_text = isinstance(value, str)
    return [_call(call, tools, is_text) for call in as_list(parsed(value, "tool_calls") or [])]


def _call(call, tools: list | None, is_text: bool) -> dict:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong tool_calls", "a call needs a name")
    given = function.get("arguments")
    arguments = parsed(given, "tool_calls") or {}
    if not isinstance(arguments, dict):
        raise BadRow("wrong tool_calls", "arguments are not an object")
    if not is_text and not isinstance(given, str):
        arguments = _arguments_without_nulls(arguments, _parameters(tools, function["name"]))
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _parameters(tools: list | None, name: str) -> dict:
    """The schema of a tool's arguments, {} where there is none."""
    for tool in tools or []:
        function = tool.get("function", tool)
        if isinstance(function, dict) and function.get("name") == name:
            return function.get("parameters") or {}
    return {}


def _arguments_without_nulls(arguments: dict, schema) -> dict:
    properties = _inside(schema, "properties")
    kept = {}
    for name, value in arguments.items():
        known = name in properties
        inner = _inside(properties, name)
        if isinstance(value, dict):
            filtered = _arguments_without_nulls(value, inner)
            if known or filtered or not value:
                kept[name] = filtered
        elif isinstance(value, list):
            items = _inside(inner, "items")
            kept[name] = [
                _arguments_without_nulls(item, items) if isinstance(item, dict) else item
                for item in value
            ]
        elif known or value is not None:
            kept[name] = value
    return kept


def _inside(schema, key: str) -> dict:
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, dict) else {}


# ---- order ---------------------------------------------------------------------------------------


def _check_order(messages: list[dict]) -> str | None:
    """BadRow unless every role may follow the one before it -> the last role."""
    before = None
    for message in messages:
        role = message["role"]
        if role not in FOLLOWS[before]:
            raise BadRow("roles out of order", f"{role} after {before or 'nothing'}")
        before = role
    return before


def check_dialogue(messages: list[dict]) -> None:
    if _check_order(messages) != "assistant":
        raise BadRow("last turn not from assistant")


def check_prompt(messages: list[dict]) -> None:
    if _check_order(messages) not in ("user", "tool"):
        raise BadRow("prompt does not end with the user")


TURN = re.compile(r"(?:\A|\n)[ \t]*(Human|Assistant)[ \t]*[:：]")


def transcript_turns(text: str) -> list[dict]:
    """`Human: … Assistant: …` -> turns; a last `Assistant:` with nothing behind it is no turn."""
    before, *parts = TURN.split(text.replace("\0", ""))
    if before.strip() or not parts:
        raise BadRow("no Human:/Assistant: turns")
    speakers = parts[::2]
    texts = parts[1::2]
    turns = [said(who.lower(), text.strip()) for who, text in zip(speakers, texts, strict=True)]
    if turns[-1] == said("assistant", ""):
        turns.pop()
    return turns


def is_transcript(text: str) -> bool:
    """Whether a prompt is `Human: … Assistant:` and not a question about these words: Human begins,
    both take turns, and the next one is the assistant's."""
    if not TURN.match(text.lstrip()):
        return False
    speakers = TURN.findall(text)
    said_last = TURN.split(text)[-1].strip()
    if speakers[-1] == "Assistant" and said_last:
        return False
    in_turn = [("Human", "Assistant")[i % 2] for i in range(len(speakers))]
    return len(speakers) > 1 and speakers == in_turn


def question_turns(text: str) -> list[dict]:
    """A prompt given as text: one user turn, or the turns of a `Human: … Assistant:` transcript."""
    if is_transcript(text):
        return transcript_turns(text)
    return [said("user", text)]
