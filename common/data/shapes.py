"""Row shapes: what one record of a data set file means, brought to one canonical form per kind.

chat        {"messages": [{"role", "content", "reasoning_content"?, "tool_calls"?}], "tools"?}
            role: system, user, assistant or tool
            a call: {"type": "function", "function": {"name", "arguments": {}}}
            "train": False on a turn of the assistant that is read and not learned
preference  {"prompt": [messages], "chosen": [messages], "rejected": [messages], "tools"?}
text        {"text": str}

A shape is a name, the columns it needs, a test on one record and a conversion; a new shape is a
line in a table.
"""

import ast
import json
import math
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import NamedTuple


class BadRow(ValueError):
    """A record that cannot be used.

    reason: what it is counted under; detail: shown with the one example of that reason.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class Shape(NamedTuple):
    name: str
    columns: str
    matches: Callable[[dict], bool]
    convert: Callable[[dict], dict]


# ---- fields --------------------------------------------------------------------------------------


def _is_absent(value) -> bool:
    """None, or the NaN that tables have in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _text(row: dict, name: str, default: str | None = None) -> str:
    """A text, or a number as one writes it."""
    value = row.get(name)
    if default is not None and _is_absent(value):
        return default
    if value is None:
        raise BadRow(f"missing {name}")
    if _is_number(value):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text", type(value).__name__)
    return value.replace("\0", "")


def _filled(row: dict, name: str, reason: str) -> str:
    value = _text(row, name)
    if not value.strip():
        raise BadRow(reason, f"in {name}")
    return value


def _parsed(value, name: str):
    """A list or dict that some data sets keep as a JSON string; None, "" and [] are None."""
    if _is_absent(value):
        return None
    if isinstance(value, str) and value.strip():
        try:
            value = _from_text(value)
        except ValueError:
            raise BadRow(f"wrong {name}", "not JSON") from None
    return value or None


def _from_text(text: str):
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


def _as_list(value) -> list:
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


def _said(role: str, content) -> dict:
    return {"role": role, "content": content}


def _role(turn) -> str | None:
    """The canonical role of a turn; None where it names none that is known."""
    if not isinstance(turn, dict):
        raise BadRow("a turn is not an object", type(turn).__name__)
    speaker = turn.get("role") or turn.get("from")
    return ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None


def _words(turn: dict, column: str, default: str | None) -> str:
    """What a turn says: a text, or a list of typed parts that are all texts."""
    parts = turn.get(column)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return _text(turn, column, default)
    for part in parts:
        if part.get("type") not in TEXT_PARTS:
            raise BadRow("a part of a turn is not text", str(part.get("type"))[:40])
    return "".join(_text(part, "text") for part in parts)


def _is_trained(turn: dict, role: str) -> bool:
    """Whether a turn is to be learned, as its own keys say. BadRow where they say what is not done
    here."""
    for name in SWITCHES:
        value = turn.get(name)
        if _is_absent(value):
            continue
        if value not in (0, 1):
            raise BadRow(f"{name} of a turn is neither 0 nor 1", str(value)[:20])
        if not value:
            return False
        if role != "assistant":
            raise BadRow(f"{name} on a turn of the {role}", "only answers are learned")
    return True


def _message(turn, tools: list | None = None) -> dict:
    """One turn spelled role/content, from/value or role/text -> a canonical message."""
    role = _role(turn)
    speaker = turn.get("role") or turn.get("from")
    if role is None:
        raise BadRow("unknown role", str(speaker)[:40])
    if not _is_absent(turn.get("train_detail")):
        raise BadRow("train_detail of a turn", "parts of a turn cannot be left out of training")

    column = next((name for name in CONTENTS if name in turn), "content")
    if speaker.strip().lower() in CALLERS:
        calls = _calls(_filled(turn, column, "empty answer"), tools)
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

    message = _said(role, content)
    if role == "assistant":
        thought = _text(turn, "reasoning_content", "")
        if thought.strip():
            message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    if not _is_trained(turn, role) and role == "assistant":
        message["train"] = False
    return message


def _messages(turns, row: dict) -> tuple[list[dict], dict]:
    """Turns and the row around them -> (messages, {"tools": [...]} or {}).

    The row's own `system` column is a system turn; a blank one is none.
    """
    turns = _parsed(turns, "turns")
    if not isinstance(turns, list):
        raise BadRow("no turns")
    tools = _tools(row, turns)
    return _with_system([_message(turn, tools) for turn in _speaking(turns)], row, tools)


def _speaking(turns: list) -> list:
    """Without system turns that say nothing: null, or blank and there for the tools they carry. An
    empty one says that the template's own is not wanted."""
    kept = []
    for turn in turns:
        if _role(turn) == "system":
            column = next((name for name in CONTENTS if name in turn), "content")
            carries = turn.get("tools") or turn.get("functions")
            if not _words(turn, column, "").strip() and (carries or _is_absent(turn.get(column))):
                continue
        kept.append(turn)
    return kept


def _with_system(messages: list[dict], row: dict, tools: list | None) -> tuple[list[dict], dict]:
    system = _text(row, "system", "")
    has_system = bool(messages) and messages[0]["role"] == "system"
    if system.strip() and not has_system:
        messages.insert(0, _said("system", system))
    return messages, {"tools": tools} if tools else {}


# ---- tools and calls -----------------------------------------------------------------------------
#
# Arrow gives all structs of a column the same keys and fills them with null. A null that was meant
# has a place in a schema: a property of the tool, a default, an item of a list. What is kept as
# JSON text was never filled.

VALUES = ("default", "const", "enum", "example", "examples")  # of a schema: they may hold null
NAMES = ("properties", "patternProperties", "$defs", "definitions")  # their keys are no keywords


def _tools(row: dict, turns: list) -> list | None:
    """The tools of a row or of one of its turns; `functions` is their older name."""
    found = None
    for holder in (row, *turns):
        for name in ("tools", "functions"):
            given = holder.get(name) if isinstance(holder, dict) else None
            tools = _tool_list(given, name)
            if tools and found and tools != found:
                raise BadRow("tools of several turns", "all calls of a row know the same tools")
            found = tools or found
    return found


def _tool_list(given, name: str) -> list | None:
    tools = _parsed(given, "tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise BadRow("wrong tools", "not a list")
    found = []
    for item in tools:
        tool = _parsed(item, "tools")
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
    return [_call(call, tools, is_text) for call in _as_list(_parsed(value, "tool_calls") or [])]


def _call(call, tools: list | None, is_text: bool) -> dict:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong tool_calls", "a call needs a name")
    given = function.get("arguments")
    arguments = _parsed(given, "tool_calls") or {}
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


def _check_dialogue(messages: list[dict]) -> None:
    if _check_order(messages) != "assistant":
        raise BadRow("last turn not from assistant")


def _check_prompt(messages: list[dict]) -> None:
    if _check_order(messages) not in ("user", "tool"):
        raise BadRow("prompt does not end with the user")


TURN = re.compile(r"(?:\A|\n)[ \t]*(Human|Assistant)[ \t]*[:：]")


def _spoken(text: str) -> list[dict]:
    """`Human: … Assistant: …` -> turns; a last `Assistant:` with nothing behind it is no turn."""
    before, *parts = TURN.split(text.replace("\0", ""))
    if before.strip() or not parts:
        raise BadRow("no Human:/Assistant: turns")
    speakers = parts[::2]
    texts = parts[1::2]
    turns = [_said(who.lower(), said.strip()) for who, said in zip(speakers, texts, strict=True)]
    if turns[-1] == _said("assistant", ""):
        turns.pop()
    return turns


def _is_transcript(text: str) -> bool:
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


def _asked(text: str) -> list[dict]:
    """A prompt given as text: one user turn, or the turns of a `Human: … Assistant:` transcript."""
    if _is_transcript(text):
        return _spoken(text)
    return [_said("user", text)]


# ---- how a shape is recognised -------------------------------------------------------------------


def _by_columns(
    name: str, needs: str, convert: Callable[[dict], dict], optional: str = ""
) -> Shape:
    """A shape known by having all the columns of `needs`."""
    needed = needs.split()

    def matches(row: dict) -> bool:
        return all(column in row for column in needed)

    shown = needed + [f"({column})" for column in optional.split()]
    return Shape(name, ", ".join(shown), matches, convert)


def _turns_in(key: str, *columns: str) -> Callable[[dict], bool]:
    """Whether one of the columns holds turns whose speaker stands under `key`."""

    def matches(row: dict) -> bool:
        return any(_has_turns(row.get(column), key) for column in columns)

    return matches


def _has_turns(value, key: str) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return isinstance(value[0], dict) and key in value[0]


def _is_belle(row: dict) -> bool:
    return "output" in row and _is_transcript(str(row.get("instruction")))


def _both_answers(kind: type) -> Callable[[dict], bool]:
    """Whether `chosen` and `rejected` are of a type."""

    def matches(row: dict) -> bool:
        return isinstance(row.get("chosen"), kind) and isinstance(row.get("rejected"), kind)

    return matches


def _output_is_pair(row: dict) -> bool:
    return "instruction" in row and isinstance(row.get("output"), list)


def _is_completion_only(row: dict) -> bool:
    return "completion" in row and "prompt" not in row


# ---- chat ----------------------------------------------------------------------------------------


def _history(row: dict) -> list[dict]:
    turns = []
    for pair in _as_list(_parsed(row.get("history"), "history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("wrong history", "not pairs of question and answer")
        turns += [_said("user", pair[0]), _said("assistant", pair[1])]
    return turns


def _instruction(row: dict, suffix: str = "") -> list[dict]:
    """instruction and input joined by a newline, as turns; either may be absent."""
    given = _text(row, "input" + suffix, "")
    default = "" if given.strip() else None
    parts = (_text(row, "instruction" + suffix, default), given)
    text = "\n".join(part for part in parts if part.strip())
    return _history(row) + _asked(text)


def _dialogue(row: dict, turns) -> dict:
    messages, tools = _messages(turns, row)
    _check_dialogue(messages)
    return {"messages": _up_to_last_trained(messages)} | tools


def _up_to_last_trained(messages: list[dict]) -> list[dict]:
    """Without what follows the last answer that is to be learned."""
    for end in range(len(messages), 0, -1):
        last = messages[end - 1]
        if last["role"] == "assistant" and last.get("train", True):
            return messages[:end]
    raise BadRow("no answer to learn", f"{', '.join(SWITCHES)}: all are 0 or false")


def _turns(row: dict) -> dict:
    turns = row.get("messages") or row.get("conversations") or row.get("conversation")
    return _dialogue(row, turns)


def _answered(row: dict, asked: list[dict], answer: str) -> dict:
    return _dialogue(row, [*asked, _said("assistant", _filled(row, answer, "empty answer"))])


def _alpaca(row: dict) -> dict:
    return _answered(row, _instruction(row), "output")


def _alpaca_zh(row: dict) -> dict:
    return _answered(row, _instruction(row, "_zh"), "output_zh")


def _ask_answer(row: dict) -> dict:
    return _answered(row, _asked(_ask(row)), "answer")


def _ask(row: dict) -> str:
    """Medical forum rows: `title` is a headline of `ask`; it is kept only where it says more."""
    title = _text(row, "title", "").strip()
    ask = _text(row, "ask")
    if ask.strip() in ("", "无"):
        return title
    if title in ask or title in ("", "无"):
        return ask
    return f"{title}\n{ask}"


def _human_assistant(row: dict) -> dict:
    turns = []
    for pair in _as_list(row.get("conversation") or []):
        if not isinstance(pair, dict):
            raise BadRow("a turn is not an object", type(pair).__name__)
        turns += [_said(role, pair.get(role)) for role in ("human", "assistant")]
    return _dialogue(row, turns)


def _completion(row: dict, prompt: str, answer: str) -> dict:
    """A question in the column `prompt`, its answer in the column `answer`."""
    if isinstance(row.get(prompt), list):  # trl: lists of messages
        return _dialogue(row, row[prompt] + _reply(row.get(answer), answer))
    return _answered(row, _history(row) + _asked(_text(row, prompt)), answer)


def _context(row: dict) -> dict:
    return _answered(row, _history(row) + _asked(_framed(_text(row, "context"))), "target")


def _framed(text: str) -> str:
    """`Instruction: … Input: … Answer:` -> instruction and input joined by a newline.

    Other texts stay as they are.
    """
    head = "Instruction:"
    tail = "\nAnswer:"
    inner = text.strip()
    if not (inner.startswith(head) and inner.endswith(tail)):
        return text
    instruction, _, given = inner[len(head) : -len(tail)].partition("\nInput:")
    return "\n".join(part.strip() for part in (instruction, given) if part.strip())


DIALOGUES = ("messages", "conversations", "conversation")
QUESTIONS = [  # (name, prompt column, answer column)
    ("firefly", "input", "target"),
    ("content/summary", "content", "summary"),
    ("question/answer", "question", "answer"),
    ("query/response", "query", "response"),
    ("prompt/response", "prompt", "response"),
    ("prompt/completion", "prompt", "completion"),
    ("prompt/output", "prompt", "output"),
]
CHAT = [
    Shape("messages", "messages: role, content", _turns_in("role", *DIALOGUES), _turns),
    Shape("sharegpt", "conversations: from, value", _turns_in("from", *DIALOGUES), _turns),
    Shape(
        "human/assistant",
        "conversation: human, assistant",
        _turns_in("human", "conversation"),
        _human_assistant,
    ),
    _by_columns("alpaca zh", "instruction_zh output_zh", _alpaca_zh),
    Shape("belle multi-turn", "instruction: Human:…Assistant:, output", _is_belle, _alpaca),
    _by_columns("alpaca", "instruction output", _alpaca, "input history system"),
    _by_columns("ask/answer", "ask answer", _ask_answer, "title"),
    *(
        _by_columns(name, f"{asked} {answer}", partial(_completion, prompt=asked, answer=answer))
        for name, asked, answer in QUESTIONS
    ),
    _by_columns("context/target", "context target", _context, "history"),
]


# ---- preference ----------------------------------------------------------------------------------


def _reply(value, name: str) -> list[dict]:
    """An answer given as text, as one turn or as a list of turns (then maybe all the dialogue)."""
    if isinstance(value, str) or value is None or _is_number(value):
        return [_said("assistant", _filled({name: value}, name, "empty answer"))]
    if not isinstance(value, dict | list) or not value:
        raise BadRow(f"{name} is not text", type(value).__name__)
    return _as_list(value)


def _pair(row: dict, prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> dict:
    if not isinstance(prompt, list):
        raise BadRow("no turns")
    tools = _tools(row, [*prompt, *chosen, *rejected])
    chosen = [_message(turn, tools) for turn in _speaking(chosen)]
    rejected = [_message(turn, tools) for turn in _speaking(rejected)]
    if not chosen or not rejected:
        raise BadRow("empty answer")
    if chosen[0]["role"] != "assistant":  # whole dialogues: the prompt is the beginning they share
        prompt = _shared_prompt(chosen, rejected)
        chosen = chosen[len(prompt) :]
        rejected = rejected[len(prompt) :]
    else:
        prompt = [_message(turn, tools) for turn in _speaking(prompt)]
    if not prompt:
        raise BadRow("chosen and rejected answer different prompts")
    prompt, tools = _with_system(prompt, row, tools)
    _check_prompt(prompt)
    _check_answer(prompt, chosen)
    _check_answer(prompt, rejected)
    if not all(turn.get("train", True) for turn in [*chosen, *rejected]):
        raise BadRow("an answer of a pair is not to be learned", ", ".join(SWITCHES))
    if [_spelled(turn) for turn in chosen] == [_spelled(turn) for turn in rejected]:
        raise BadRow("chosen and rejected are the same")
    prompt = [{name: turn[name] for name in turn if name != "train"} for turn in prompt]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | tools


def _shared_prompt(chosen: list[dict], rejected: list[dict]) -> list[dict]:
    shared = []
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared.append(one)
    while shared and shared[-1]["role"] == "assistant":
        shared.pop()
    return shared


def _check_answer(prompt: list[dict], answer: list[dict]) -> None:
    if not answer or any(turn["role"] in ("user", "system") for turn in answer):
        raise BadRow("chosen and rejected answer different prompts")
    _check_dialogue([*prompt, *answer])


def _spelled(message: dict) -> str:
    """A message in a form in which spaces and the order of keys make no difference."""
    bare = message | {"content": message["content"].strip()}
    return normalise(json.dumps(bare, ensure_ascii=False, sort_keys=True))


def _ranked(
    row: dict, prompt: list[dict], chosen: str = "chosen", rejected: str = "rejected"
) -> dict:
    return _pair(row, prompt, _reply(row.get(chosen), chosen), _reply(row.get(rejected), rejected))


def _ranked_after(row: dict, turns: str) -> dict:
    """The prompt is a list of turns in the column `turns`."""
    return _ranked(row, _parsed(row.get(turns), "turns"))


def _ranked_instruction(row: dict) -> dict:
    return _ranked(row, _instruction(row))


def _triple(row: dict, name: str) -> dict:
    """The prompt is text or a list of turns in the column `name`."""
    if isinstance(row.get(name), list):
        return _ranked(row, row[name])
    return _ranked(row, _history(row) + _asked(_text(row, name)))


def _hh(row: dict) -> dict:
    return _pair(row, [], _spoken(_text(row, "chosen")), _spoken(_text(row, "rejected")))


def _implicit(row: dict) -> dict:
    return _ranked(row, [])


def _output_pair(row: dict) -> dict:
    pair = row.get("output")
    if not isinstance(pair, list) or len(pair) != 2:
        raise BadRow("output is not a pair")
    prompt = _instruction(row)
    chosen, rejected = (_reply(answer, "output") for answer in pair)
    return _pair(row, prompt, chosen, rejected)


def _reward(row: dict) -> dict:
    prompt = _history(row) + _asked(_text(row, "question"))
    return _ranked(row, prompt, "response_chosen", "response_rejected")


PREFERENCE = [
    _by_columns("hh_rlhf_cn", "context chosen rejected", partial(_ranked_after, turns="context")),
    _by_columns(
        "llama-factory pairs",
        "conversations chosen rejected",
        partial(_ranked_after, turns="conversations"),
    ),
    _by_columns("instruction pairs", "instruction chosen rejected", _ranked_instruction, "input"),
    _by_columns(
        "prompt pairs",
        "prompt chosen rejected",
        partial(_triple, name="prompt"),
        "history system",
    ),
    _by_columns(
        "question pairs",
        "question chosen rejected",
        partial(_triple, name="question"),
        "history system",
    ),
    Shape("hh strings", "chosen, rejected: Human:…Assistant:…", _both_answers(str), _hh),
    Shape(
        "implicit prompt",
        "chosen, rejected: lists of role, content",
        _both_answers(list),
        _implicit,
    ),
    Shape("output pair", "instruction, output: [chosen, rejected]", _output_is_pair, _output_pair),
    _by_columns("reward", "question response_chosen response_rejected", _reward, "history system"),
]


# ---- text ----------------------------------------------------------------------------------------


def _document(row: dict, name: str) -> dict:
    if _is_number(row.get(name)):
        raise BadRow(f"{name} is not text", "a number")
    text = _filled(row, name, "empty text")
    title = _text(row, "title", "").strip()
    if not text.lstrip().startswith(title):
        text = f"{title}\n{text}"
    return {"text": text}


TEXT = [
    _by_columns("text", "text", partial(_document, name="text"), "title"),
    _by_columns("content", "content", partial(_document, name="content"), "title"),
    Shape(
        "completion",
        "completion",
        _is_completion_only,
        partial(_document, name="completion"),
    ),
]


# ---- records as files have them ------------------------------------------------------------------

TURN_COLUMNS = (*DIALOGUES, "context", "prompt", "chosen", "rejected")
KTO_COLUMNS = {*DIALOGUES, "prompt", "completion", "response", "system", "tools", "id", "label"}
LABELS = ("label", "kto_tag")
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
PLACEHOLDER = re.compile("<(image|video|audio)>")


def as_record(record) -> dict:
    """What stands in a line or cell of a list as {column: value}; a list of turns is a column of
    them."""
    if isinstance(record, BadRow):
        raise record
    if is_turns(record):
        return {"conversation" if "human" in record[0] else "messages": record}
    if not isinstance(record, dict):
        raise BadRow("not an object", type(record).__name__)
    return record


def usable(records: list) -> list[dict]:
    """Those of the first records of a file that have columns."""
    found = []
    for record in records:
        try:
            found.append(as_record(record))
        except BadRow:
            continue
    return found


def is_turns(value) -> bool:
    """Whether a value is a list of turns."""
    return isinstance(value, list) and bool(value) and all(map(is_turn, value))


def is_turn(value) -> bool:
    if not isinstance(value, dict):
        return False
    if "human" in value and "assistant" in value:
        return True
    named = isinstance(value.get("role"), str) or isinstance(value.get("from"), str)
    return named and any(name in value for name in (*CONTENTS, "tool_calls", "function_call"))


def tidy(record: dict) -> tuple[dict, list[str]]:
    """A record -> (what its columns mean, what was left out of it).

    Turns kept as text become lists; a ShareGPT conversation begins where its human does.
    """
    notes = []
    found = {
        column: _opened(value) if column in TURN_COLUMNS else value
        for column, value in record.items()
    }
    if is_turns(found.get("prompt")) and "completion" in found:
        found["completion"] = _opened(found["completion"])
    for column in DIALOGUES:
        turns = found.get(column)
        if is_turns(turns) and "from" in turns[0]:
            found[column] = _from_human(turns)
            if len(found[column]) < len(turns):
                notes.append("the assistant's words before the first question left out")
    return found, notes


def _opened(value):
    """Turns that are kept as JSON, or as Python's way to write a list; all else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        opened = _from_text(value)
    except ValueError:
        return value
    return opened if is_turns(_as_list(opened)) else value


def is_broken_text(value) -> bool:
    """Whether a text looks like turns and cannot be read, like numpy's way to print them."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{\s*['\"](role|from)['\"]", value):
        return False
    return _opened(value) is value


def _from_human(turns: list[dict]) -> list[dict]:
    """Turns without those of the assistant before the first of the user."""
    head = next((i for i, turn in enumerate(turns) if _role(turn) != "system"), len(turns))
    start = head
    while start < len(turns) and _role(turns[start]) == "assistant":
        start += 1
    return turns[:head] + turns[start:]


def without_switches(value):
    """Turns without what they say about being learned, for who only asks; all else as it is."""
    if not is_turns(value):
        return value
    return [{key: turn[key] for key in turn if key not in SWITCHES} for turn in value]


def _check_row(row: dict, kind: str) -> None:
    """BadRow for a row that says in a column of its own that it is not to be learned, or only in
    part."""
    weight = _number(row.get("weight"))
    if weight is not None and weight not in (0, 1):
        raise BadRow("weight of a row is neither 0 nor 1", str(row["weight"])[:20])
    for name in ("weight", "train"):
        if _number(row.get(name)) == 0:
            raise BadRow(f"{name} is 0")
    for name in SWITCHES:
        if _as_bool(row.get(name)) is False:
            raise BadRow(f"{name} is false")
    if kind != "chat":
        return
    for name in LABELS:
        if is_good(row, name) is False:
            raise BadRow(f"{name} is false", "an answer that is not to be learned (KTO)")
    pictures = [name for name in PICTURES if row.get(name)]
    if pictures and PLACEHOLDER.search(str(row)):
        raise BadRow("a row with pictures or sound", f"column {pictures[0]}; only text is read")


def is_good(row: dict, name: str = "label") -> bool | None:
    """What the label of a KTO row says of its answer; None where it is no such label."""
    label = row.get(name)
    number = _number(label)
    only_kto = name == "kto_tag" or row.keys() <= KTO_COLUMNS
    if number in (0, 1) and only_kto:
        return bool(number)
    return _as_bool(label)


def _as_bool(value) -> bool | None:
    """A truth value, or a text that is one."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _number(value) -> float | None:
    """A number, or a text that is one."""
    if _is_number(value):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return float(value)
    return None


def _for_files(kind: str, shape: Shape) -> Shape:
    """The shape, for records as files have them."""

    def matches(record: dict) -> bool:
        return shape.matches(tidy(record)[0])

    def convert(record: dict) -> dict:
        row, _ = tidy(record)
        _check_row(row, kind)
        return shape.convert(row)

    return shape._replace(matches=matches, convert=convert)


SHAPES = {
    kind: [_for_files(kind, shape) for shape in table]
    for kind, table in (("chat", CHAT), ("preference", PREFERENCE), ("text", TEXT))
}


# ---- for readers of rows -------------------------------------------------------------------------


def detect(kind: str, head: list[dict]) -> Shape | None:
    """The shape of `kind` that most of the first records have, or None.

    The earlier line of the table wins a tie.
    """
    votes = [sum(shape.matches(record) for record in head) for shape in SHAPES[kind]]
    if not any(votes):
        return None
    return SHAPES[kind][votes.index(max(votes))]


def normalise(text: str) -> str:
    """The form in which prompts are compared: NFKC, runs of whitespace as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def prompt_of(row: dict) -> str:
    """What a canonical row asks, normalised: the whole text of a text row, else all turns before
    the last answer."""
    system, question = system_and_question(row)
    return f"{system}\n{question}" if system else question


def system_and_question(row: dict) -> tuple[str, str]:
    """The system's turn ("" where there is none) and what a canonical row asks, both normalised."""
    if "text" in row:
        return "", normalise(row["text"])
    turns = row["prompt"] if "prompt" in row else row["messages"][:-1]
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    others = [turn["content"] for turn in turns if turn["role"] != "system"]
    return normalise("\n".join(system)), normalise("\n".join(others))
