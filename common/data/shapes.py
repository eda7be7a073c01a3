"""Row shapes: what one record of a data set file means, brought to one canonical form per kind.

chat        {"messages": [{"role", "content", "reasoning_content"?, "tool_calls"?}], "tools"?}
            role: system, user, assistant or tool; a call: {"type": "function", "function": {"name", "arguments": {}}}
preference  {"prompt": [messages], "chosen": [messages], "rejected": [messages], "tools"?}
text        {"text": str}

A shape is a name, the columns it needs, a test on one record and a conversion; a new shape is a
line in a table.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from itertools import takewhile
from typing import NamedTuple


class BadRow(ValueError):
    """A record that cannot be used: `reason` is what it is counted under, `detail` is shown with
    the one example."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Shape(NamedTuple):
    name: str
    columns: str
    matches: Callable[[dict], bool]
    convert: Callable[[dict], dict]


# ---- fields -------------------------------------------------------------------------------------------------


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
    try:
        return (json.loads(value) if isinstance(value, str) and value.strip() else value) or None
    except (ValueError, RecursionError):
        raise BadRow(f"wrong {name}", "not JSON") from None


# ---- messages -----------------------------------------------------------------------------------------------

ROLES = dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"
)
ROLES |= dict.fromkeys(("tool", "observation", "function", "function_response"), "tool")
ROLES |= {"system": "system"}
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def _calls(value) -> list[dict]:
    """Tool calls in OpenAI's or the bare {"name", "arguments"} form, arguments a dict or a JSON
    string."""
    calls = []
    value = _parsed(value, "tool_calls") or []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("wrong tool_calls", "a call needs a name")
        arguments = _parsed(function.get("arguments"), "tool_calls") or {}
        if not isinstance(arguments, dict):
            raise BadRow("wrong tool_calls", "arguments are not an object")
        calls.append(
            {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return calls


def _message(turn) -> dict:
    """One turn spelled role/content, from/value or role/text -> a canonical message."""
    if not isinstance(turn, dict):
        raise BadRow("a turn is not an object", type(turn).__name__)
    speaker = turn.get("role") or turn.get("from")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow("unknown role", str(speaker)[:40])
    name = next((n for n in ("content", "value", "text") if n in turn), "content")
    calls = _calls(turn.get("tool_calls"))
    if speaker.lower() == "function_call":
        return {
            "role": role,
            "content": "",
            "tool_calls": _calls(_filled(turn, name, "empty answer")),
        }
    content = _text(turn, name, default="" if calls or role == "system" else None)
    if not content.strip() and not calls and role in ("user", "assistant"):
        raise BadRow("empty prompt" if role == "user" else "empty answer")
    message = {"role": role, "content": content}
    thought = _text(turn, "reasoning_content", "") if role == "assistant" else ""
    if thought.strip():
        message["reasoning_content"] = thought
    return message | ({"tool_calls": calls} if calls else {})


def _messages(turns, row: dict) -> tuple[list[dict], dict]:
    """Turns and the row around them -> (messages, {"tools": [...]} or {}); blank system turns
    vanish."""
    turns = _parsed(turns, "turns")
    if not isinstance(turns, list):
        raise BadRow("no turns")
    messages = [_message(t) for t in turns]
    first = turns[0]  # some sets keep the tools on the system turn
    tools = _parsed(row.get("tools") or first.get("tools") or first.get("functions"), "tools")
    if tools is not None and not isinstance(tools, list):
        raise BadRow("wrong tools", "not a list")
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    system = _text(row, "system", "")
    if system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return messages, {"tools": tools} if tools else {}


def _in_order(messages: list[dict], end: tuple[str, ...]) -> None:
    before = None
    for message in messages:
        if message["role"] not in FOLLOWS[before]:
            raise BadRow("roles out of order", f"{message['role']} after {before or 'nothing'}")
        before = message["role"]
    if before not in end:
        raise BadRow(
            "last turn not from assistant"
            if "assistant" in end
            else "prompt does not end with the user"
        )


TURN = re.compile(r"(?:\A|\n)[ \t]*(Human|Assistant)[ \t]*[:：]")


def _spoken(text: str) -> list[dict]:
    """`Human: … Assistant: …` text -> turns; a last `Assistant:` with nothing behind it is where
    the answer goes."""
    before, *parts = TURN.split(text.replace("\0", ""))
    if before.strip() or not parts:
        raise BadRow("no Human:/Assistant: turns")
    turns = [
        {"role": r.lower(), "content": t.strip()}
        for r, t in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def _asked(text: str) -> list[dict]:
    """A prompt given as text: one user turn, or the turns of a `Human: … Assistant:` transcript."""
    return _spoken(text) if TURN.match(text.lstrip()) else [{"role": "user", "content": text}]


# ---- chat ---------------------------------------------------------------------------------------------------


def _history(row: dict) -> list[dict]:
    turns, pairs = [], _parsed(row.get("history"), "history") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("wrong history", "not pairs of question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _instruction(row: dict, suffix: str = "") -> list[dict]:
    """instruction and input joined by a newline, as turns."""
    parts = (_text(row, "instruction" + suffix), _text(row, "input" + suffix, ""))
    text = "\n".join(p for p in parts if p.strip())
    return _history(row) + _asked(text)


def _dialogue(row: dict, turns) -> dict:
    messages, tools = _messages(turns, row)
    _in_order(messages, end=("assistant",))
    return {"messages": messages} | tools


def _answered(row: dict, asked: list[dict], answer: str) -> dict:
    return _dialogue(
        row, asked + [{"role": "assistant", "content": _filled(row, answer, "empty answer")}]
    )


def _ask(row: dict) -> str:
    """Medical forum rows: `title` is a headline of `ask`; it is kept only where it says more."""
    title, ask = _text(row, "title", "").strip(), _text(row, "ask")
    if ask.strip() in ("", "无"):
        return title
    return ask if title in ask or title in ("", "无") else f"{title}\n{ask}"


def _human_assistant(row: dict) -> dict:
    turns, pairs = [], row.get("conversation") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, dict):
            raise BadRow("a turn is not an object", type(pair).__name__)
        turns += [{"role": role, "content": pair.get(role)} for role in ("human", "assistant")]
    return _dialogue(row, turns)


def _completion(row: dict, prompt: str, answer: str) -> dict:
    if isinstance(row.get(prompt), list):  # trl: lists of messages
        return _dialogue(row, row[prompt] + _reply(row.get(answer), answer))
    return _answered(row, _history(row) + _asked(_text(row, prompt)), answer)


def _framed(text: str) -> str:
    """`Instruction: … Input: … Answer:` -> instruction and input joined by a newline; other texts
    stay as they are."""
    inner, head, tail = text.strip(), "Instruction:", "\nAnswer:"
    if not (inner.startswith(head) and inner.endswith(tail)):
        return text
    instruction, _, given = inner[len(head) : -len(tail)].partition("\nInput:")
    return "\n".join(part.strip() for part in (instruction, given) if part.strip())


def _context(row: dict) -> dict:
    return _answered(row, _history(row) + _asked(_framed(_text(row, "context"))), "target")


def _by_columns(
    name: str, needs: str, convert: Callable[[dict], dict], optional: str = ""
) -> Shape:
    """A shape known by having all the columns of `needs`."""
    shown = needs.split() + [f"({column})" for column in optional.split()]
    return Shape(name, ", ".join(shown), lambda row: all(n in row for n in needs.split()), convert)


def _turns_in(key: str, *columns: str) -> Callable[[dict], bool]:
    """Whether one of the columns holds turns whose speaker stands under `key`."""

    def matches(row):
        return any(
            isinstance(row.get(c), list)
            and row[c]
            and isinstance(row[c][0], dict)
            and key in row[c][0]
            for c in columns
        )

    return matches


def _turns(row: dict):
    return row.get("messages") or row.get("conversations") or row.get("conversation")


def _belle(row: dict) -> bool:
    return "output" in row and bool(TURN.match(str(row.get("instruction")).lstrip()))


def _alpaca(row: dict) -> dict:
    return _answered(row, _instruction(row), "output")


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
    Shape(
        "messages",
        "messages: role, content",
        _turns_in("role", *DIALOGUES),
        lambda r: _dialogue(r, _turns(r)),
    ),
    Shape(
        "sharegpt",
        "conversations: from, value",
        _turns_in("from", *DIALOGUES),
        lambda r: _dialogue(r, _turns(r)),
    ),
    Shape(
        "human/assistant",
        "conversation: human, assistant",
        _turns_in("human", "conversation"),
        _human_assistant,
    ),
    _by_columns(
        "alpaca zh",
        "instruction_zh output_zh",
        lambda r: _answered(r, _instruction(r, "_zh"), "output_zh"),
    ),
    Shape("belle multi-turn", "instruction: Human:…Assistant:, output", _belle, _alpaca),
    _by_columns("alpaca", "instruction output", _alpaca, "input history system"),
    _by_columns(
        "ask/answer", "ask answer", lambda r: _answered(r, _asked(_ask(r)), "answer"), "title"
    ),
    *(
        _by_columns(name, f"{p} {a}", lambda r, p=p, a=a: _completion(r, p, a))
        for name, p, a in QUESTIONS
    ),
    _by_columns("context/target", "context target", _context, "history"),
]


# ---- preference ---------------------------------------------------------------------------------------------


def _reply(value, name: str) -> list[dict]:
    """An answer given as text, as one turn or as a list of turns (then maybe the whole
    dialogue)."""
    if isinstance(value, str) or value is None:
        return [{"role": "assistant", "content": _filled({name: value}, name, "empty answer")}]
    if not isinstance(value, dict | list) or not value:
        raise BadRow(f"{name} is not text", type(value).__name__)
    return value if isinstance(value, list) else [value]


def _pair(row: dict, prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> dict:
    chosen, rejected = [_message(t) for t in chosen], [_message(t) for t in rejected]
    if chosen[0]["role"] != "assistant":  # whole dialogues: the prompt is the beginning they share
        prompt = [
            a
            for a, b in takewhile(
                lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)
            )
        ]
        while prompt and prompt[-1]["role"] == "assistant":
            prompt.pop()
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise BadRow("chosen and rejected answer different prompts")
    prompt, tools = _messages(prompt, row)
    _in_order(prompt, end=("user", "tool"))
    for answer in (chosen, rejected):
        if not answer or any(m["role"] in ("user", "system") for m in answer):
            raise BadRow("chosen and rejected answer different prompts")
        _in_order(
            [prompt[-1], *answer] if prompt[-1]["role"] == "user" else [*prompt, *answer],
            end=("assistant",),
        )
    if [_spelt(m) for m in chosen] == [_spelt(m) for m in rejected]:
        raise BadRow("chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | tools


def _spelt(message: dict) -> str:
    return normalise(
        json.dumps(
            message | {"content": message["content"].strip()}, ensure_ascii=False, sort_keys=True
        )
    )


def _ranked(
    row: dict, prompt: list[dict], chosen: str = "chosen", rejected: str = "rejected"
) -> dict:
    return _pair(row, prompt, _reply(row.get(chosen), chosen), _reply(row.get(rejected), rejected))


def _triple(row: dict, name: str) -> dict:
    asked = (
        row[name] if isinstance(row.get(name), list) else _history(row) + _asked(_text(row, name))
    )
    return _ranked(row, asked)


def _output_pair(row: dict) -> dict:
    pair = row.get("output")
    if not isinstance(pair, list) or len(pair) != 2:
        raise BadRow("output is not a pair")
    return _pair(row, _instruction(row), *(_reply(answer, "output") for answer in pair))


def _reward(row: dict) -> dict:
    return _ranked(
        row, _history(row) + _asked(_text(row, "question")), "response_chosen", "response_rejected"
    )


def _both(kind: type) -> Callable[[dict], bool]:
    return lambda row: isinstance(row.get("chosen"), kind) and isinstance(row.get("rejected"), kind)


def _hh(row: dict) -> dict:
    return _pair(row, [], _spoken(_text(row, "chosen")), _spoken(_text(row, "rejected")))


def _output_is_pair(row: dict) -> bool:
    return "instruction" in row and isinstance(row.get("output"), list)


PREFERENCE = [
    _by_columns("hh_rlhf_cn", "context chosen rejected", lambda r: _ranked(r, r.get("context"))),
    _by_columns(
        "llama-factory pairs",
        "conversations chosen rejected",
        lambda r: _ranked(r, r.get("conversations")),
    ),
    _by_columns(
        "instruction pairs",
        "instruction chosen rejected",
        lambda r: _ranked(r, _instruction(r)),
        "input",
    ),
    _by_columns(
        "prompt pairs", "prompt chosen rejected", lambda r: _triple(r, "prompt"), "history system"
    ),
    _by_columns(
        "question pairs",
        "question chosen rejected",
        lambda r: _triple(r, "question"),
        "history system",
    ),
    Shape("hh strings", "chosen, rejected: Human:…Assistant:…", _both(str), _hh),
    Shape(
        "implicit prompt",
        "chosen, rejected: lists of role, content",
        _both(list),
        lambda r: _ranked(r, []),
    ),
    Shape("output pair", "instruction, output: [chosen, rejected]", _output_is_pair, _output_pair),
    _by_columns("reward", "question response_chosen response_rejected", _reward, "history system"),
]


# ---- text ---------------------------------------------------------------------------------------------------


def _document(row: dict, name: str) -> dict:
    text, title = _filled(row, name, "empty text"), _text(row, "title", "").strip()
    return {"text": text if text.lstrip().startswith(title) else f"{title}\n{text}"}


TEXT = [
    _by_columns("text", "text", lambda r: _document(r, "text"), "title"),
    _by_columns("content", "content", lambda r: _document(r, "content"), "title"),
    Shape(
        "completion",
        "completion",
        lambda r: "completion" in r and "prompt" not in r,
        lambda r: _document(r, "completion"),
    ),
]
SHAPES = {"chat": CHAT, "preference": PREFERENCE, "text": TEXT}


# ---- for readers of rows ------------------------------------------------------------------------------------


def detect(kind: str, head: list[dict]) -> Shape | None:
    """The shape of `kind` that most of the first records have (the earlier line of the table wins a
    tie), or None."""
    votes = [sum(map(shape.matches, head)) for shape in SHAPES[kind]]
    return SHAPES[kind][votes.index(max(votes))] if any(votes) else None


def normalise(text: str) -> str:
    """The form in which prompts are compared: NFKC, runs of whitespace as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def prompt_of(row: dict) -> str:
    """What a canonical row asks, normalised: all turns before the last answer but the system's, or
    the whole text."""
    if "text" in row:
        return normalise(row["text"])
    turns = row["prompt"] if "prompt" in row else row["messages"][:-1]
    return normalise("\n".join(m["content"] for m in turns if m["role"] != "system"))
