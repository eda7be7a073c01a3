"""Which text of a rendered chat is data: the texts of messages get invisible private-use characters
(marks) around them, and are looked for in what the template makes of them."""

import re
from copy import deepcopy

TEXT_KEYS = ("content", "reasoning_content")
THOUGHT = "reasoning_content"
PRIVATE = re.compile("[\U000f0000-\U0010fffd]")  # planes 15 and 16: no assigned characters
CLOSES_THOUGHT = re.compile(r"\s*</\w*(?:think|thought|reason)\w*>")


def render(tokenizer, template, messages, tools, prompt, kwargs, tracks=False):
    """-> (text, spans in it that {% generation %} marks). Raises ValueError when the template
    refuses the messages."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {key: value for key, value in message.items() if value is not None and key != "train"}
        for message in messages
    ]
    try:
        texts, spans = render_jinja_template(
            [messages],
            tools=tools or None,
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=tracks,
            **{**tokenizer.special_tokens_map, **kwargs},
        )
    except Exception as error:  # a template is a program, in a sandbox: errors of many kinds
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    return texts[0], spans[0] if tracks else []


def blank(text, spans):
    """`text` with the given spans overwritten, same length."""
    out = []
    at = 0
    for start, end in sorted(spans):
        if start >= at:
            out += [text[at:start], "\0" * (end - start)]
            at = end
    return "".join(out) + text[at:]


class _Marker:
    """Puts the texts of messages and tools between two marks each.

    Marks stand inside the outer blanks of a text and beside the tags the template looks for, so
    that the template strips and splits as before. Level 2 marks contents and arguments of tool
    calls, 1 contents, 0 neither; special tokens are marked in all strings but roles.
    """

    def __init__(self, facts, level, taken):
        """taken: private-use characters that stand in the rendered chat already."""
        self.facts = facts
        self.level = level
        self.free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in taken)
        # mark -> (index of its message, the opening mark of its pair or None if it opens itself)
        self.owner = {}
        # opening mark -> a key of TEXT_KEYS, "arguments", or None where it marks a special token
        self.field = {}

    def messages(self, messages):
        marked = []
        for index, message in enumerate(messages):
            copy = self.walk(message, index)
            copy["role"] = message["role"]
            marked.append(copy)
        return marked

    def walk(self, value, index=None, field=None):
        """A copy of `value` with marks around the texts in it where they belong to a `field`, else
        around their special tokens only."""
        if isinstance(value, dict):
            return {
                key: self.walk(item, index, self.field_of(key, field))
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.walk(item, index, field) for item in value]
        if not isinstance(value, str):
            return value
        if field:
            return self.wrap(value, _parts(value, self.facts.tags), index, field)
        spans = [m.span() for m in self.facts.special.finditer(value)]
        return self.wrap(value, spans, index, None)

    def field_of(self, key, outer):
        """What the strings under `key` are; outer: what the object around them is."""
        if key == "type":  # of a part of a content list: templates compare it
            return None
        is_text = key in TEXT_KEYS and self.level >= 1
        is_call = key == "arguments" and self.level >= 2
        return outer or (key if is_text or is_call else None)

    def wrap(self, text, spans, index, field):
        out = []
        at = 0
        for start, end in spans:
            opening = next(self.free)
            closing = next(self.free)
            self.owner[opening] = (index, None)
            self.owner[closing] = (index, opening)
            is_thought = field == "content" and CLOSES_THOUGHT.match(text, end)
            self.field[opening] = THOUGHT if is_thought else field
            out += [text[at:start], opening, text[start:end], closing]
            at = end
        return "".join(out) + text[at:]

    def lost(self, rendered):
        """{(message index, field)} of the marked texts of messages that are not in `rendered`."""
        return {
            (index, self.field[mark])
            for mark, (index, opening) in self.owner.items()
            if opening is None and self.field[mark] and mark not in rendered and index is not None
        }


def _parts(text, tags):
    """Spans of `text` between tags, without outer blanks; blank ones are left out (templates test
    for empty texts)."""
    spans = []
    at = 0
    for start, end in [*(m.span() for m in tags.finditer(text)), (len(text), len(text))]:
        piece = text[at:start]
        if piece.strip():
            lead = len(piece) - len(piece.lstrip())
            spans.append((at + lead, at + len(piece.rstrip())))
        at = end
    return spans


def _unmark(marked, owner):
    """-> (text without marks, [(start, end, message index)] in it), or (None, []) when a mark lost
    its other half."""
    parts = []
    spans = []
    opened = {}  # opening mark -> where it stood in the text without marks
    at = 0
    size = 0  # of the text without marks
    for match in PRIVATE.finditer(marked):
        mark = match.group()
        if mark not in owner:
            continue
        parts.append(marked[at : match.start()])
        size += match.start() - at
        at = match.end()
        index, opening = owner[mark]
        if opening is None:
            opened[mark] = size
        elif opening in opened:
            spans.append((opened.pop(opening), size, index))
        else:
            return None, []
    if opened:
        return None, []
    return "".join(parts) + marked[at:], spans


def texts_in(tokenizer, facts, text, messages, tools, prompt, kwargs, level):
    """-> ([(start, end, message index)] of the data's texts in the rendered `text`, {(message
    index, field)} of those that are not in it); None when the template renders marked messages
    otherwise."""
    marker = _Marker(facts, level, taken=set(PRIVATE.findall(text)))
    marked = marker.messages(messages)
    marked_tools = marker.walk(tools)
    if not marker.owner:
        return [], set()
    rendered, _ = render(
        tokenizer, facts.template, marked, marked_tools, prompt, kwargs, facts.tracks
    )
    unmarked, spans = _unmark(rendered, marker.owner)
    return (spans, marker.lost(rendered)) if unmarked == text else None


def unnoticed(tokenizer, facts, text, messages, tools, prompt, kwargs, level):
    """{(message index, field)} of the texts that `level` does not mark and the rendered `text` does
    not depend on: more words at their end change nothing."""
    mark = next(chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in text)
    found = set()
    for index, message in enumerate(messages):
        for field, changed in _lengthened(message, mark, facts.tags, level):
            turns = [*messages[:index], changed, *messages[index + 1 :]]
            try:
                other, _ = render(
                    tokenizer, facts.template, turns, tools, prompt, kwargs, facts.tracks
                )
            except ValueError:  # the template parses it, so it is not left out
                continue
            if other == text:
                found.add((index, field))
    return found


def _lengthened(message, mark, tags, level):
    """(field, copy of `message`) with `mark` at the end of one text that `level` does not mark."""
    for key in TEXT_KEYS if level < 1 else ():
        value = message.get(key)
        for _, end in _parts(value, tags) if isinstance(value, str) else ():
            is_thought = key == "content" and CLOSES_THOUGHT.match(value, end)
            changed = {**message, key: value[:end] + mark + value[end:]}
            yield THOUGHT if is_thought else key, changed
    for number, call in enumerate(message.get("tool_calls") or []):
        if level < 2 and call.get("function", call)["arguments"]:
            changed = deepcopy(message)
            call = changed["tool_calls"][number]
            call.get("function", call)["arguments"][mark] = mark
            yield "arguments", changed
