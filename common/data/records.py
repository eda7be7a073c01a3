"""Records as files have them, before a shape is looked for: turns that are kept as text, lists of
turns, and what a row says of itself."""

import re

from common.data.turns import (
    CONTENTS,
    SWITCHES,
    BadRow,
    as_list,
    from_text,
    is_number,
    role_of,
)

DIALOGUES = ("messages", "conversations", "conversation")
TURN_COLUMNS = {*DIALOGUES, "context", "prompt", "chosen", "rejected"}
KTO_COLUMNS = {*DIALOGUES, "prompt", "completion", "response", "system", "tools", "id", "label"}
LABELS = ("label", "kto_tag")
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
MARKS = {*SWITCHES, *LABELS, *PICTURES}  # columns that check_row reads
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
    if TURN_COLUMNS.isdisjoint(record):
        return record, []
    notes = []
    found = {
        column: opened(value) if column in TURN_COLUMNS else value
        for column, value in record.items()
    }
    if "completion" in found and is_turns(found.get("prompt")):
        found["completion"] = opened(found["completion"])
    for column in DIALOGUES:
        turns = found.get(column)
        first = turns[:1] if isinstance(turns, list) else []
        if is_turns(first) and "from" in first[0] and is_turns(turns):
            found[column] = _from_human(turns)
            if len(found[column]) < len(turns):
                notes.append("the assistant's words before the first question left out")
    return found, notes


def opened(value):
    """Turns that are kept as JSON, or as Python's way to write a list; all else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        opened = from_text(value)
    except ValueError:
        return value
    return opened if is_turns(as_list(opened)) else value


def is_broken_text(value) -> bool:
    """Whether a text looks like turns and cannot be read, like numpy's way to print them."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{\s*['\"](role|from)['\"]", value):
        return False
    return opened(value) is value


def _from_human(turns: list[dict]) -> list[dict]:
    """Turns without those of the assistant before the first of the user."""
    head = next((i for i, turn in enumerate(turns) if role_of(turn) != "system"), len(turns))
    start = head
    while start < len(turns) and role_of(turns[start]) == "assistant":
        start += 1
    return turns[:head] + turns[start:]


def without_switches(value):
    """Turns without what they say about being learned, for who only asks; all else as it is."""
    if not is_turns(value):
        return value
    return [{key: turn[key] for key in turn if key not in SWITCHES} for turn in value]


def check_row(row: dict, kind: str) -> None:
    """BadRow for a row that says in a column of its own that it is not to be learned, or only in
    part."""
    if MARKS.isdisjoint(row):
        return
    weight = _number(row.get("weight"))
    if weight is not None and weight not in (0, 1):
        raise BadRow("weight of a row is neither 0 nor 1", str(row["weight"])[:20])
    for name in ("weight", "train"):
        if _number(row.get(name)) == 0:
            raise BadRow(f"{name} is 0")
    for name in SWITCHES:
        if _as_bool(row.get(name)) is False:
            raise BadRow(f"{name} is false")
    if kind not in ("chat", "reward"):
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
    if is_number(value):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return float(value)
    return None
