"""Rows with pictures -> tokens, without opening a picture: how many tokens one takes depends on the
processor alone.

The chat template writes one image token for each picture; here it becomes as many as the tower
gives features, none of them with a label. What is trained, and where an answer ends, is found by
common.data.labels in the template's own rendering.
"""

from __future__ import annotations

import json
from functools import lru_cache

from common.data import shorten
from common.data.labels import encode_chat
from common.data.labels import encode_prompt as encode_text_prompt
from common.data.spelling import IGNORE

NO_LIMIT = 1 << 40
LEAST_TEXT = 16  # tokens beside the pictures, below which no question and answer fit
CARRIED = "the pictures of turns that were cut off stand in the first turn that is left"
MOVED = "the chat template puts pictures before the words of their turn"


def check_window(image_tokens: int, max_length: int) -> None:
    """SystemExit where no row with a picture fits the window."""
    if image_tokens + LEAST_TEXT > max_length:
        raise SystemExit(
            f"--model_max_length {max_length}: a picture alone takes {image_tokens} tokens; "
            f"{image_tokens + LEAST_TEXT} are the least, {image_tokens + 512} leave room for words"
        )


def encode(
    row: dict, tokenizer, image_token_id: int, image_tokens: int, max_length: int, **template
) -> dict | None:
    """A row of load_rows_with_pictures -> {"input_ids": [T], "labels": [T], "pictures": [numbers],
    "truncated": bool, "notes": [str]?} with T <= max_length; None where nothing is to be trained.

    Each picture is a block of image_tokens times image_token_id, its numbers stand in the order of
    the blocks. Every answer is trained with its end token, nothing else is.
    Too long a row loses whole turns from its beginning; their pictures go with them, unless none
    would be left: then those shown last move to the first turn that stays. What is still too long
    loses the middles of its words, then the tails of its answers before their end token; never a
    part of a picture. ValueError for a row whose pictures leave no room, and for what encode_chat
    refuses; SystemExit for a template that shows no pictures.
    """
    tools = row.get("tools")
    blocks = {image_token_id: image_tokens}
    check_template(tokenizer, image_token_id)
    messages = row["messages"]
    pictures = list(row["pictures"])

    def encoded(turns: list[dict], shown: list) -> dict | None:
        turns = as_template_wants(tokenizer, turns)
        found = encode_chat(tokenizer, turns, NO_LIMIT, tools, **template)
        if found is not None:
            _check_count(found["input_ids"], image_token_id, len(shown))
        return found

    found = encoded(messages, pictures)
    if found is None:
        return None
    notes = found.get("notes", [])
    truncated = shorten.size(found["input_ids"], blocks) > max_length
    if truncated:
        shorter = _newest_turns(messages, pictures, encoded, blocks, max_length)
        if shorter is not None:
            found, pictures, carried = shorter
            notes = [*found.get("notes", []), *([CARRIED] if carried else [])]
        _check_room(len(pictures), image_tokens, max_length)
    ids, labels = shorten.shrink(tokenizer, found["input_ids"], found["labels"], max_length, blocks)
    ids, labels = expand(ids, labels, image_token_id, image_tokens)
    if pictures and _moves_pictures(tokenizer, tokenizer.chat_template):
        notes = [*notes, *([MOVED] if _are_within(messages) else [])]
    tokens = {"input_ids": ids, "labels": labels, "pictures": pictures, "truncated": truncated}
    return tokens | {"notes": notes} if notes else tokens


def encode_prompt(row: dict, tokenizer, image_token_id: int, image_tokens: int, **template) -> dict:
    """A row -> {"input_ids": [T], "pictures": [...]} that generation starts from; an answer at its
    end is left out. The same tokens as before that answer in training."""
    check_template(tokenizer, image_token_id)
    messages = row["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    turns = as_template_wants(tokenizer, messages)
    ids = encode_text_prompt(tokenizer, turns, row.get("tools"), **template)
    pictures = list(row["pictures"])[: count_pictures(messages)]
    _check_count(ids, image_token_id, len(pictures))
    ids, _ = expand(ids, ids, image_token_id, image_tokens)
    return {"input_ids": ids, "pictures": pictures}


def encode_newest(
    row: dict, tokenizer, image_token_id: int, image_tokens: int, max_length: int, **template
) -> tuple[dict, int]:
    """(encode_prompt of the newest exchanges that fit max_length tokens, how many older ones are
    left out). Pictures of those go as in encode. ValueError where the last question is too long."""
    messages = row["messages"]
    head, begins = shorten.exchanges(messages)
    taken = 0
    for left_out, begin in enumerate(begins):
        newest = row
        if left_out:
            turns, shown, _ = _cut(messages, list(row["pictures"]), head, begin)
            newest = row | {"messages": turns, "pictures": shown}
        prompt = encode_prompt(newest, tokenizer, image_token_id, image_tokens, **template)
        taken = len(prompt["input_ids"])
        if taken <= max_length:
            return prompt, left_out
    raise ValueError(f"the question takes {taken:,} tokens, the window has {max_length:,}")


def expand(ids, labels, image_token_id: int, image_tokens: int) -> tuple[list[int], list[int]]:
    """Every image token -> as many as its picture has features, without labels."""
    expanded: list[int] = []
    wanted: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        if token == image_token_id:
            expanded += [token] * image_tokens
            wanted += [IGNORE] * image_tokens
        else:
            expanded.append(token)
            wanted.append(label)
    return expanded, wanted


def collapsed(ids, labels, image_token_id: int) -> tuple[list[int], list[int]]:
    """Blocks of a picture as one token each, to be shown; pictures side by side become one too."""
    kept = [
        i
        for i, token in enumerate(ids)
        if token != image_token_id or i == 0 or ids[i - 1] != image_token_id
    ]
    return [int(ids[i]) for i in kept], [int(labels[i]) for i in kept]


def count_pictures(messages: list[dict]) -> int:
    return sum(len(_pictures_in(message)) for message in messages)


def without_pictures(row: dict) -> dict:
    """The same questions asked blindly."""
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, list):
            words = "".join(part["text"] for part in content if part["type"] == "text")
            message = message | {"content": words.strip() or "？"}
        messages.append(message)
    return row | {"messages": messages, "pictures": []}


# ---- rows that are too long ----------------------------------------------------------------------


def _newest_turns(messages, pictures, encoded, blocks, max_length: int):
    """(tokens, pictures, whether they moved) of the most turns that fit, else of the last question
    and answer; None where the row has only one."""
    head, begins = shorten.exchanges(messages)
    best = None
    for begin in begins[1:]:
        turns, shown, carried = _cut(messages, pictures, head, begin)
        found = encoded(turns, shown)
        if found is None:
            continue
        best = found, shown, carried
        if shorten.size(found["input_ids"], blocks) <= max_length:
            break
    return best


def _cut(messages: list[dict], pictures: list, head: int, begin: int):
    """The turns before `head` and from `begin` on -> (messages, their pictures, whether some moved
    there)."""
    before = count_pictures(messages[:head])
    dropped = count_pictures(messages[:begin])
    kept = [*messages[:head], *messages[begin:]]
    if before or dropped < len(pictures) or not pictures:
        return kept, [*pictures[:before], *pictures[dropped:]], False
    last = next(m for m in reversed(messages[head:begin]) if _pictures_in(m))
    shown = pictures[-len(_pictures_in(last)) :]
    question = messages[begin]
    words = question["content"]
    parts = words if isinstance(words, list) else [{"type": "text", "text": f"\n{words}"}]
    kept[head] = question | {"content": [*_pictures_in(last), *parts]}
    return kept, shown, True


def _pictures_in(message: dict) -> list[dict]:
    content = message["content"]
    return [part for part in content if part["type"] == "image"] if _is_parts(content) else []


def _is_parts(content) -> bool:
    return isinstance(content, list)


def _check_room(pictures: int, image_tokens: int, max_length: int) -> None:
    taken = pictures * image_tokens
    if taken + LEAST_TEXT > max_length:
        raise ValueError(
            f"{pictures} pictures take {taken:,} tokens, the window has {max_length:,}: raise "
            "--model_max_length"
        )


def _check_count(ids, image_token_id: int, pictures: int) -> None:
    found = sum(token == image_token_id for token in ids)
    if found != pictures:
        raise ValueError(
            f"{found} image tokens for {pictures} pictures: the chat template drops pictures, or "
            "the image token stands in a text"
        )


# ---- what a template makes of pictures -----------------------------------------------------------


def check_template(tokenizer, image_token_id: int) -> None:
    """SystemExit where the chat template shows no pictures."""
    shown = _shown_pictures(tokenizer, tokenizer.chat_template, image_token_id)
    if shown != 1:
        raise SystemExit(
            f"{tokenizer.name_or_path or 'tokenizer'}: the chat template writes {shown} image "
            "tokens for a picture; build_model.py writes one that fits, --chat_template FILE gives "
            "another"
        )


@lru_cache(maxsize=16)
def _shown_pictures(tokenizer, template, image_token_id: int) -> int:
    """Image tokens that a template writes for one picture."""
    text = _rendered(tokenizer, [{"type": "image"}, {"type": "text", "text": "?"}])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return sum(token == image_token_id for token in ids)


@lru_cache(maxsize=16)
def _moves_pictures(tokenizer, template) -> bool:
    """Whether a template puts pictures before words that stand before them."""
    first, second = "\U000f0000", "\U000f0001"
    words = [{"type": "text", "text": first}, {"type": "image"}, {"type": "text", "text": second}]
    text = _rendered(tokenizer, words)
    between = text.partition(first)[2].partition(second)[0]
    return not between.strip()


@lru_cache(maxsize=16)
def _takes_texts(tokenizer, template) -> bool:
    """Whether a template shows contents that are plain text; the llava-hf ones want parts."""
    return "\U000f0000" in _rendered(tokenizer, "\U000f0000")


def _rendered(tokenizer, content) -> str:
    """One question; "" where the template refuses it."""
    try:
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program: errors of many kinds
        return ""


def as_template_wants(tokenizer, messages: list[dict]) -> list[dict]:
    """Messages whose contents are all parts, where the template takes nothing else."""
    if _takes_texts(tokenizer, tokenizer.chat_template):
        return messages
    return [
        message
        if _is_parts(message["content"])
        else message | {"content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def _are_within(messages: list[dict]) -> bool:
    """Whether a picture stands behind words of its turn."""
    for message in messages:
        if _is_parts(message["content"]):
            kinds = [part["type"] for part in message["content"]]
            if "image" in kinds[kinds.index("text") :] if "text" in kinds else False:
                return True
    return False


def row_of(record) -> dict:
    """The JSON of a row, or the row itself."""
    return json.loads(record) if isinstance(record, str) else record
