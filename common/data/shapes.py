"""Row shapes: what one record of a data set file means, brought to one canonical form per kind.

chat        {"messages": [{"role", "content", "reasoning_content"?, "tool_calls"?}], "tools"?}
            role: system, user, assistant or tool
            a call: {"type": "function", "function": {"name", "arguments": {}}}
preference  {"prompt": [messages], "chosen": [messages], "rejected": [messages], "tools"?}
text        {"text": str}

A shape is a name, the columns it needs, a test on one record and a conversion; a new shape is a
line in a table.
"""

import json
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


def _text(row: dict, name: str, default: str | None = None) -> str:
    value = row.get(name)
    if value is None:
        if default is None:
            raise BadRow(f"missing {name}")
        return default
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
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"wrong {name}", "not JSON") from None
    return value or None


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


# ---- messages ------------------------------------------------------------------------------------

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
CONTENTS = ("content", "value", "text")  # the columns in which sets keep the words of a turn


def _said(role: str, content) -> dict:
    return {"role": role, "content": content}


def _calls(value) -> list[dict]:
    """Tool calls in OpenAI's or the bare {"name", "arguments"} form, arguments a dict or JSON."""
    return [_call(call) for call in _as_list(_parsed(value, "tool_calls") or [])]


def _call(call) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("wrong tool_calls", "a call needs a name")
    arguments = _parsed(function.get("arguments"), "tool_calls") or {}
    if not isinstance(arguments, dict):
        raise BadRow("wrong tool_calls", "arguments are not an object")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _message(turn) -> dict:
    """One turn spelled role/content, from/value or role/text -> a canonical message."""
    if not isinstance(turn, dict):
        raise BadRow("a turn is not an object", type(turn).__name__)
    speaker = turn.get("role") or turn.get("from")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow("unknown role", str(speaker)[:40])

    column = next((name for name in CONTENTS if name in turn), "content")
    calls = _calls(turn.get("tool_calls"))
    if speaker.lower() == "function_call":
        calls = _calls(_filled(turn, column, "empty answer"))
        return {"role": role, "content": "", "tool_calls": calls}

    may_be_missing = bool(calls) or role == "system"
    content = _text(turn, column, default="" if may_be_missing else None)
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
    return message


def _messages(turns, row: dict) -> tuple[list[dict], dict]:
    """Turns and the row around them -> (messages, {"tools": [...]} or {}).

    Blank system turns vanish; the row's own `system` column is a system turn.
    """
    turns = _parsed(turns, "turns")
    if not isinstance(turns, list):
        raise BadRow("no turns")
    messages = [_message(turn) for turn in turns]

    first = turns[0]  # some sets keep the tools on the system turn
    tools = _parsed(row.get("tools") or first.get("tools") or first.get("functions"), "tools")
    if tools is not None and not isinstance(tools, list):
        raise BadRow("wrong tools", "not a list")

    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    system = _text(row, "system", "")
    has_system = bool(messages) and messages[0]["role"] == "system"
    if system.strip() and not has_system:
        messages.insert(0, _said("system", system))
    return messages, {"tools": tools} if tools else {}


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


def _asked(text: str) -> list[dict]:
    """A prompt given as text: one user turn, or the turns of a `Human: … Assistant:` transcript."""
    if TURN.match(text.lstrip()):
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
    return "output" in row and bool(TURN.match(str(row.get("instruction")).lstrip()))


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
    """instruction and input joined by a newline, as turns."""
    parts = (_text(row, "instruction" + suffix), _text(row, "input" + suffix, ""))
    text = "\n".join(part for part in parts if part.strip())
    return _history(row) + _asked(text)


def _dialogue(row: dict, turns) -> dict:
    messages, tools = _messages(turns, row)
    _check_dialogue(messages)
    return {"messages": messages} | tools


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
    if isinstance(value, str) or value is None:
        return [_said("assistant", _filled({name: value}, name, "empty answer"))]
    if not isinstance(value, dict | list) or not value:
        raise BadRow(f"{name} is not text", type(value).__name__)
    return _as_list(value)


def _pair(row: dict, prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> dict:
    chosen = [_message(turn) for turn in chosen]
    rejected = [_message(turn) for turn in rejected]
    if chosen[0]["role"] != "assistant":  # whole dialogues: the prompt is the beginning they share
        prompt = _shared_prompt(chosen, rejected)
        chosen = chosen[len(prompt) :]
        rejected = rejected[len(prompt) :]
    if not prompt:
        raise BadRow("chosen and rejected answer different prompts")
    prompt, tools = _messages(prompt, row)
    _check_prompt(prompt)
    _check_answer(prompt, chosen)
    _check_answer(prompt, rejected)
    if [_spelled(turn) for turn in chosen] == [_spelled(turn) for turn in rejected]:
        raise BadRow("chosen and rejected are the same")
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
    return _ranked(row, row.get(turns))


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
SHAPES = {"chat": CHAT, "preference": PREFERENCE, "text": TEXT}


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
    the last answer but the system's."""
    if "text" in row:
        return normalise(row["text"])
    turns = row["prompt"] if "prompt" in row else row["messages"][:-1]
    return normalise("\n".join(turn["content"] for turn in turns if turn["role"] != "system"))
