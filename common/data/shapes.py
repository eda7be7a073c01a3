"""Row shapes: what one record of a data set file means, brought to one canonical form per kind.

chat        {"messages": [{"role", "content", "reasoning_content"?, "tool_calls"?, "name"?}],
             "tools"?}
            role: system, user, assistant or tool; name: of whoever speaks, or of the tool
            a call: {"type": "function", "function": {"name", "arguments": {}}}
            "train": False on a turn of the assistant that is read and not learned
reward      as chat, the last answer is what a reward compares with; verl's rows have also
            "reward": {"ground_truth", "data_source"?, "extra_info"?}
preference  {"prompt": [messages], "chosen": [messages], "rejected": [messages], "tools"?}
text        {"text": str}

A shape is a name, the columns it needs, a test on one record and a conversion; a new shape is a
line in a table.
"""

import json
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from common.data.records import DIALOGUES, check_row, tidy
from common.data.turns import (
    SWITCHES,
    BadRow,
    as_list,
    check_dialogue,
    check_prompt,
    filled_in,
    is_absent,
    is_number,
    is_transcript,
    message_of,
    messages_of,
    parsed,
    question_turns,
    said,
    speaking,
    text_in,
    tools_of,
    transcript_turns,
    with_system,
    words_in,
)


class Shape(NamedTuple):
    name: str
    columns: str
    matches: Callable[[dict], bool]
    convert: Callable[[dict], dict]


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
    return "output" in row and is_transcript(str(row.get("instruction")))


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
    for pair in as_list(parsed(row.get("history"), "history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("wrong history", "not pairs of question and answer")
        turns += [said("user", pair[0]), said("assistant", pair[1])]
    return turns


def _instruction(row: dict, suffix: str = "") -> list[dict]:
    """instruction and input joined by a newline, as turns; either may be absent."""
    given = text_in(row, "input" + suffix, "")
    default = "" if given.strip() else None
    parts = (words_in(row, "instruction" + suffix, default), given)
    text = "\n".join(part for part in parts if part.strip())
    return _history(row) + question_turns(text)


def _dialogue(row: dict, turns) -> dict:
    messages, tools = messages_of(turns, row)
    check_dialogue(messages)
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
    return _dialogue(row, [*asked, said("assistant", filled_in(row, answer, "empty answer"))])


def _alpaca(row: dict) -> dict:
    return _answered(row, _instruction(row), "output")


def _alpaca_zh(row: dict) -> dict:
    return _answered(row, _instruction(row, "_zh"), "output_zh")


def _ask_answer(row: dict) -> dict:
    return _answered(row, question_turns(_ask(row)), "answer")


def _ask(row: dict) -> str:
    """Medical forum rows: `title` is a headline of `ask`; it is kept only where it says more."""
    title = text_in(row, "title", "").strip()
    ask = text_in(row, "ask")
    if ask.strip() in ("", "无"):
        return title
    if title in ask or title in ("", "无"):
        return ask
    return f"{title}\n{ask}"


def _human_assistant(row: dict) -> dict:
    turns = []
    for pair in as_list(row.get("conversation") or []):
        if not isinstance(pair, dict):
            raise BadRow("a turn is not an object", type(pair).__name__)
        turns += [said(role, pair.get(role)) for role in ("human", "assistant")]
    return _dialogue(row, turns)


def _completion(row: dict, prompt: str, answer: str) -> dict:
    """A question in the column `prompt`, its answer in the column `answer`."""
    if isinstance(row.get(prompt), list):  # trl: lists of messages
        return _dialogue(row, row[prompt] + _reply(row.get(answer), answer))
    return _answered(row, _history(row) + question_turns(words_in(row, prompt)), answer)


def _context(row: dict) -> dict:
    question = question_turns(_framed(text_in(row, "context")))
    return _answered(row, _history(row) + question, "target")


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


# ---- reward --------------------------------------------------------------------------------------


def _has_ground_truth(row: dict) -> bool:
    rule = row.get("reward_model")
    has_rule = isinstance(rule, dict) and "ground_truth" in rule
    return has_rule and _has_turns(row.get("prompt"), "role")


def _rewarded(row: dict) -> dict:
    """verl: a prompt, and what the function that rewards its answers is given."""
    truth = row["reward_model"]["ground_truth"]
    if is_absent(truth) or truth == "":
        raise BadRow("no ground truth", "in reward_model")
    extra = row.get("extra_info")
    reward = {"ground_truth": truth, "extra_info": extra if isinstance(extra, dict) else {}}
    if row.get("data_source"):
        reward["data_source"] = text_in(row, "data_source")
    try:
        answer = truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)
    except TypeError as error:
        raise BadRow("a ground truth that JSON has not", str(error)) from None
    return _dialogue(row, [*row["prompt"], said("assistant", answer)]) | {"reward": reward}


REWARD = [
    Shape(
        "verl",
        "prompt: role, content; reward_model: ground_truth; (data_source), (extra_info)",
        _has_ground_truth,
        _rewarded,
    ),
    *CHAT,
]


# ---- preference ----------------------------------------------------------------------------------


def _reply(value, name: str) -> list[dict]:
    """An answer given as text, as one turn or as a list of turns (then maybe all the dialogue)."""
    if isinstance(value, str) or value is None or is_number(value):
        return [said("assistant", filled_in({name: value}, name, "empty answer"))]
    if not isinstance(value, dict | list) or not value:
        raise BadRow(f"{name} is not text", type(value).__name__)
    return as_list(value)


def _pair(row: dict, prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> dict:
    if not isinstance(prompt, list):
        raise BadRow("no turns")
    tools = tools_of(row, [*prompt, *chosen, *rejected])
    chosen = [message_of(turn, tools) for turn in speaking(chosen)]
    rejected = [message_of(turn, tools) for turn in speaking(rejected)]
    if not chosen or not rejected:
        raise BadRow("empty answer")
    if chosen[0]["role"] != "assistant":  # whole dialogues: the prompt is the beginning they share
        prompt = _shared_prompt(chosen, rejected)
        chosen = chosen[len(prompt) :]
        rejected = rejected[len(prompt) :]
    else:
        prompt = [message_of(turn, tools) for turn in speaking(prompt)]
    if not prompt:
        raise BadRow("chosen and rejected answer different prompts")
    prompt, tools = with_system(prompt, row, tools)
    check_prompt(prompt)
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
    check_dialogue([*prompt, *answer])


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
    return _ranked(row, parsed(row.get(turns), "turns"))


def _ranked_instruction(row: dict) -> dict:
    return _ranked(row, _instruction(row))


def _triple(row: dict, name: str) -> dict:
    """The prompt is text or a list of turns in the column `name`."""
    if isinstance(row.get(name), list):
        return _ranked(row, row[name])
    return _ranked(row, _history(row) + question_turns(words_in(row, name)))


def _hh(row: dict) -> dict:
    return _pair(
        row,
        [],
        transcript_turns(text_in(row, "chosen")),
        transcript_turns(text_in(row, "rejected")),
    )


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
    prompt = _history(row) + question_turns(words_in(row, "question"))
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
    text = words_in(row, name)
    if not text.strip():
        raise BadRow("empty text", f"in {name}")
    title = text_in(row, "title", "").strip()
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


# ---- all shapes ----------------------------------------------------------------------------------


def _for_files(kind: str, shape: Shape) -> Shape:
    """The shape, for records as files have them."""

    def matches(record: dict) -> bool:
        return shape.matches(tidy(record)[0])

    def convert(record: dict, notes: list[str] | None = None) -> dict:
        """notes: a list to which is added what was left out of the record."""
        row, left_out = tidy(record)
        if notes is not None:
            notes += left_out
        check_row(row, kind)
        return shape.convert(row)

    return shape._replace(matches=matches, convert=convert)


KINDS = {"chat": CHAT, "reward": REWARD, "preference": PREFERENCE, "text": TEXT}
SHAPES = {kind: [_for_files(kind, shape) for shape in table] for kind, table in KINDS.items()}


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
