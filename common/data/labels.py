"""Messages -> input_ids and labels through the tokenizer's own chat template; no format and no
token id stands here.

How the trained text is found: the conversation is rendered twice, plainly and with invisible
private-use characters (marks) around every text. Without the marks both renderings must be equal,
so they tell, in the plain one, what the template wrote and what the data wrote, whatever the
template strips, moves or drops (earlier thinking). Nothing less works for every template: few of
them say what is generated ({% generation %}), and a text may occur in a prompt too.
"""

import hashlib
import json
import re
from bisect import bisect_left
from copy import deepcopy
from functools import lru_cache
from itertools import groupby, pairwise
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

IGNORE = -100  # the label of a token that is not trained; the one place where the number stands
TEXT_KEYS = ("content", "reasoning_content")
_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")  # planes 15 and 16: no assigned characters

# what a template leaves out of a row that is trained all the same: `notes` of encode_chat
THOUGHTS_LEFT_OUT = (
    "the chat template leaves out thoughts of earlier answers; those answers are not trained, the "
    "last one is"
)
_CLOSES_THOUGHT = re.compile(r"\s*</\w*(?:think|thought|reason)\w*>")
LEADS = ("\n", "。", "a", "0")
SHOWN_AS = {"system": "the system turn", "user": "a user turn", "tool": "a tool's result"}
THOUGHT = "reasoning_content"


# ---- for recipes ---------------------------------------------------------------------------------


def set_template(tokenizer, path_or_text):
    """Give `tokenizer` the chat template in a file, or the Jinja text itself. Raises SystemExit
    when it is neither.

    Where the tokenizer's own call begins a text with its beginning-of-text token and the template
    writes none, the template gets it too, so that chats begin as all other texts do.
    """
    import jinja2

    is_text = "{%" in path_or_text or "{{" in path_or_text
    name = "chat template" if is_text else path_or_text
    try:
        template = path_or_text if is_text else Path(path_or_text).read_text(encoding="utf-8-sig")
        tokenizer.chat_template = _with_bos(tokenizer, template)
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{name}: not a readable chat template file: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        where = f"{name}:{error.lineno}"
        raise SystemExit(f"{where}: not a Jinja chat template: {error.message}") from None
    except jinja2.TemplateError:
        pass  # the template may refuse our probe; rows are checked when they come


def _with_bos(tokenizer, template):
    bos = tokenizer.bos_token
    has_one = "bos_token" in template or (bos and bos in template)
    if has_one or not bos or text_start(tokenizer) != [tokenizer.bos_token_id]:
        return template
    return "{{ bos_token }}" + template


def fingerprint(tokenizer):
    """A short hash of all that decides how rows become tokens: vocabulary, special tokens, chat
    template, this file."""
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = sorted(tokenizer.get_vocab().items())
    parts = [
        vocabulary,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        Path(__file__).read_text("utf-8"),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def encode_chat(tokenizer, messages, max_length, tools=None, **template_kwargs):
    """One conversation -> {"input_ids": [T], "labels": [T], "truncated": bool} with T <=
    max_length, or None.

    Every assistant turn is trained, from where generation would start to its end token, and nothing
    else; one with "train": False is read only. eos is added where the template leaves the last
    answer open. None only when there is
    nothing to train. Special tokens written inside the texts are encoded as plain text. `tools` and
    `template_kwargs` go to the template. Too long a row loses its oldest exchanges, then the middle
    of what is left of its prompt (never below a quarter of the window), then the tail of its answer
    before the end token. Raises ValueError for a row that the template refuses, shows only in part
    (a turn, a thought of the last answer, a tool), or rewrites so that its answers cannot be found;
    SystemExit when there is no template.

    An earlier answer without its thought, which templates leave out of a history, is not trained.
    That, and an answer that stands behind other tokens than generation will start from, is told in
    "notes" [str], which is there only then.
    """
    notes = []
    ids, labels = _encode(tokenizer, messages, tools, False, template_kwargs, notes)
    if not _any_trained(labels):
        return None
    truncated = len(ids) > max_length
    if truncated:
        newest = _drop_oldest(tokenizer, messages, max_length, tools, template_kwargs)
        if newest is not None:
            ids, labels = newest
        ids, labels = _shrink(tokenizer, ids, labels, max_length)
    found = {"input_ids": ids, "labels": labels, "truncated": truncated}
    return found | {"notes": notes} if notes else found


def encode_prompt(tokenizer, messages, tools=None, **template_kwargs):
    """Messages -> token ids [T] that generation starts from: the same tokens as before the answer
    in training. Raises ValueError where the template refuses the messages or leaves out more of
    them than the thoughts of earlier answers."""
    ids, _ = _encode(tokenizer, messages, tools, True, template_kwargs)
    return ids


def written_answer(tokenizer, messages, tools=None, **template_kwargs):
    """The last answer of a conversation as the template writes it (tool calls too), without its
    special tokens: what generation should give. Raises ValueError like encode_chat."""
    ids, labels = _encode(tokenizer, messages, tools, False, template_kwargs)
    runs = [tokens for trained, tokens in _runs(ids, labels) if trained]
    return tokenizer.decode(runs[-1], skip_special_tokens=True) if runs else ""


def encode_text(tokenizer, text, start=None):
    """Token ids [T] of a text that is no chat, as documents are trained and continued.

    start: the ids it begins with, default those of the tokenizer's own call (a beginning-of-text
    token, or nothing). Special tokens written inside the text are encoded as plain text.
    """
    start = text_start(tokenizer) if start is None else start
    spelling = _spelling(tokenizer, len(tokenizer))
    if not spelling.special.search(text):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        data = [m.span() for m in spelling.special.finditer(text)]
        spell = _by_offset if spelling.by_offset else _by_piece
        ids, _ = spell(tokenizer, text, [], data, spelling)
    return [*start, *ids]


def encode_document(tokenizer, text, start=None):
    """encode_text with the end-of-text token behind it; SystemExit where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise SystemExit("the tokenizer has no end token to close documents; set its eos_token")
    return [*encode_text(tokenizer, text, start), tokenizer.eos_token_id]


def text_start(tokenizer):
    """The ids that the tokenizer's own call writes before a text: [bos] or [], as a rule."""
    return list(_spelling(tokenizer, len(tokenizer)).start)


def turn_end_ids(tokenizer):
    """Ids of the special tokens with which the chat template ends an answer, the last one and
    earlier ones; [] without a template."""
    if not tokenizer.chat_template:
        return []
    return tokenizer.convert_tokens_to_ids(list(_facts(tokenizer, None, {}).ends))


def preview(tokenizer, input_ids, labels, color=True):
    """The row as text, what is trained in green and the rest in grey; without colour what is
    trained in [[ ]].

    Runs of equal mask are decoded whole: a single token may be a third of a Chinese character.
    """
    if color:
        frames = {True: ("\033[32m", "\033[0m"), False: ("\033[90m", "\033[0m")}
    else:
        frames = {True: ("[[", "]]"), False: ("", "")}
    out = []
    for trained, tokens in _runs(input_ids, labels):
        before, after = frames[trained]
        text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        out.append(before + text + after)
    return "".join(out)


def _any_trained(labels):
    return any(label != IGNORE for label in labels)


def _runs(ids, labels):
    """-> (whether they are trained, token ids) of neighbours that are alike."""

    def is_trained(pair):
        return pair[1] != IGNORE

    for trained, pairs in groupby(zip(ids, labels, strict=True), key=is_trained):
        yield trained, [token for token, _ in pairs]


# ---- what a template does ------------------------------------------------------------------------


class _Spelling(NamedTuple):
    """What a tokenizer does with texts and special tokens."""

    # any special token
    special: re.Pattern
    special_ids: frozenset
    # the ids that the tokenizer's own call writes before a text
    start: tuple
    # the tokenizer puts a space before every text it is given, so texts must not be split
    by_offset: bool


class _Facts(NamedTuple):
    """What a template and its tokenizer do, learned once from two tiny conversations."""

    template: str
    spelling: _Spelling
    # any special token
    special: re.Pattern
    # tags the template itself may look for inside texts, like </think>
    tags: re.Pattern
    # what announces an answer, longest first: the generation prompt, and what earlier turns have of
    # it
    headers: tuple
    # the special tokens after a plain answer, or nothing
    end: str
    # the first special token after a last answer and after an earlier one, where there is one
    ends: tuple
    # the template says itself what is generated: {% generation %}
    tracks: bool


def _facts(tokenizer, tools, kwargs):
    if tokenizer.chat_template is None:
        raise SystemExit(
            f"{tokenizer.name_or_path or 'tokenizer'}: no chat template; "
            "pass the model's one with --chat_template FILE"
        )
    template = tokenizer.get_chat_template(tools=tools or None)
    return _probe(tokenizer, template, json.dumps(kwargs, sort_keys=True), len(tokenizer))


@lru_cache(maxsize=64)
def _probe(tokenizer, template, kwargs, _size):
    """kwargs: as JSON, and _size: tokens may be added later; both are here for the cache."""
    kwargs = json.loads(kwargs)
    spelling = _spelling(tokenizer, len(tokenizer))
    headers, end, ends = _headers_and_ends(tokenizer, template, spelling.special, kwargs)
    tags = set(re.findall(r"</?[\w:]+>", template))
    return _Facts(
        template=template,
        spelling=spelling,
        special=spelling.special,
        tags=_any_of(tag for tag in tags if not spelling.special.fullmatch(tag)),
        headers=headers,
        end=end,
        ends=ends,
        tracks=bool(re.search(r"\{%-?\s*generation\s*-?%\}", template)),
    )


@lru_cache(maxsize=64)
def _spelling(tokenizer, _size):
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[:1]
    return _Spelling(
        special=_any_of(name for name in names if name.strip()),
        special_ids=frozenset(tokenizer.convert_tokens_to_ids(sorted(names))),
        start=_start_of_texts(tokenizer),
        by_offset=tokenizer.is_fast and first != ["a"],
    )


def _start_of_texts(tokenizer):
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    own = tokenizer("a")["input_ids"]
    for start in range(len(own) - len(bare) + 1):
        if own[start : start + len(bare)] == bare:
            return tuple(own[:start])
    return ()


def _any_of(names):
    longest_first = sorted(names, key=len, reverse=True)
    nothing = "(?!)"
    return re.compile("|".join(map(re.escape, longest_first)) or nothing)


def _headers_and_ends(tokenizer, template, special, kwargs):
    question = "\U000f0000"
    answer = "\U000f0001"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def render(messages, prompt=False):
        return _render(tokenizer, template, messages, None, prompt, kwargs)[0]

    try:
        asked = render(turns[:1])
        prompt = render(turns[:1], prompt=True)
        once = render(turns)
        twice = render(turns * 2)
    except ValueError:
        # it wants more than one question: texts are then trained from their own start
        return (), "", ()

    after_question = asked.partition(question)[2]
    if prompt == asked:
        # "[INST] .. [/INST]": the answer follows what the template writes after a question, with
        # its blanks if they stay
        header = after_question.lstrip()
        short = after_question.strip()
    else:
        header = prompt.partition(question)[2].removeprefix(after_question)
        earlier = twice.partition(question)[2].partition(answer)[0].removeprefix(after_question)
        short = _common_start(header, earlier, special)
    headers = [text for text in dict.fromkeys([header, short]) if text.strip()]
    behind = once.find(answer) + 1
    end = re.compile(f"({special.pattern})+").search(once, behind)
    earlier_answer = twice.find(answer) + 1
    next_question = twice.find(question, earlier_answer)
    firsts = (
        special.search(once, behind),
        special.search(twice, earlier_answer, max(earlier_answer, next_question)),
    )
    ends = tuple(dict.fromkeys(found.group() for found in firsts if found))
    return tuple(headers), end.group() if end else "", ends


def _common_start(header, other, special):
    """What both begin with, without a piece of a special token."""
    common = commonprefix([header, other])
    for token in special.finditer(header):
        if token.start() < len(common) < token.end():
            return header[: token.start()]
    return common


def _render(tokenizer, template, messages, tools, prompt, kwargs, tracks=False):
    """-> (text, spans in it that {% generation %} marks). Raises ValueError when the template
    refuses the messages."""
    import jinja2
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
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    return texts[0], spans[0] if tracks else []


# ---- marks: which text of the rendered chat is data ----------------------------------------------


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
            is_thought = field == "content" and _CLOSES_THOUGHT.match(text, end)
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
    for match in _PRIVATE.finditer(marked):
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


def _texts_in(tokenizer, facts, text, messages, tools, prompt, kwargs, level):
    """-> ([(start, end, message index)] of the data's texts in the rendered `text`, {(message
    index, field)} of those that are not in it); None when the template renders marked messages
    otherwise."""
    marker = _Marker(facts, level, taken=set(_PRIVATE.findall(text)))
    marked = marker.messages(messages)
    marked_tools = marker.walk(tools)
    if not marker.owner:
        return [], set()
    rendered, _ = _render(
        tokenizer, facts.template, marked, marked_tools, prompt, kwargs, facts.tracks
    )
    unmarked, spans = _unmark(rendered, marker.owner)
    return (spans, marker.lost(rendered)) if unmarked == text else None


def _unnoticed(tokenizer, facts, text, messages, tools, prompt, kwargs, level):
    """{(message index, field)} of the texts that `level` does not mark and the rendered `text` does
    not depend on: more words at their end change nothing."""
    mark = next(chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in text)
    found = set()
    for index, message in enumerate(messages):
        for field, changed in _lengthened(message, mark, facts.tags, level):
            turns = [*messages[:index], changed, *messages[index + 1 :]]
            try:
                other, _ = _render(
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
            is_thought = key == "content" and _CLOSES_THOUGHT.match(value, end)
            changed = {**message, key: value[:end] + mark + value[end:]}
            yield THOUGHT if is_thought else key, changed
    for number, call in enumerate(message.get("tool_calls") or []):
        if level < 2 and call.get("function", call)["arguments"]:
            changed = deepcopy(message)
            call = changed["tool_calls"][number]
            call.get("function", call)["arguments"][mark] = mark
            yield "arguments", changed


# ---- turns: which text of the rendered chat is trained -------------------------------------------


def _locate(tokenizer, facts, messages, tools, prompt, kwargs):
    """-> (text, turns [(start, end, whether it is trained)], spans of special tokens that are data,
    whether the last answer lacks its end)."""
    asked = (tokenizer, facts, messages, tools, prompt, kwargs)
    text, tracked = _render(
        tokenizer, facts.template, messages, tools, prompt, kwargs, facts.tracks
    )
    _check_tools(text, *asked)
    # a template that cuts texts up or parses arguments bears fewer marks
    for level in (2, 1, 0):
        found = _texts_in(tokenizer, facts, text, *asked[2:], level)
        if found is not None:
            break
    else:
        raise ValueError(
            "the chat template rewrites special tokens in the texts; take them out of this row"
        )
    spans, lost = found
    if level < 2:
        lost |= _unnoticed(tokenizer, facts, text, *asked[2:], level)
    untrained = _without_their_thoughts(messages, lost, prompt)
    data = [m.span() for start, end, _ in spans for m in facts.special.finditer(text, start, end)]
    if facts.tracks:
        turns, still_open = _tracked_turns(_blank(text, data), tracked, facts)
        turns = _of_messages(turns, messages, untrained)
        still_open = still_open and turns[-1][2]
    else:
        spans = spans if level else None
        turns, still_open = _turns(text, messages, spans, data, prompt, facts, untrained)
    if still_open and not prompt:
        text = text[: turns[-1][1]]
    return text, turns, data, still_open


def _not_shown(what):
    return ValueError(
        f"the chat template does not show {what}; take a template that does, or leave it out of "
        "the rows"
    )


def _check_tools(text, tokenizer, facts, messages, tools, prompt, kwargs):
    """ValueError where the definition of a tool is not in `text`."""
    if not tools:
        return
    try:
        bare, _ = _render(tokenizer, facts.template, messages, None, prompt, kwargs, facts.tracks)
    except ValueError:  # it wants tools
        bare = ""
    for words in _words_of_tools(tools):
        spellings = {words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]}
        if not any(text.count(words) > bare.count(words) for words in spellings):
            raise _not_shown("the definitions of tools")
    if text == bare:
        raise _not_shown("the definitions of tools")


def _words_of_tools(tools):
    """Names, descriptions and parameters' names of tool definitions."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if not isinstance(function, dict):
            continue
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        yield from (properties if isinstance(properties, dict) else ())
        for key in ("name", "description"):
            if isinstance(function.get(key), str) and function[key].strip():
                yield function[key].strip()


def _without_their_thoughts(messages, lost, prompt):
    """{index} of the earlier answers whose thought the template leaves out of a history. ValueError
    for whatever else is `lost`."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    found = set()
    for index, field in sorted(lost):
        role = messages[index]["role"]
        if field == THOUGHT and not messages[index].get("train", True):
            continue
        if role != "assistant":
            raise _not_shown(SHOWN_AS.get(role, f"a {role} turn"))
        if field == "arguments":
            raise _not_shown("the arguments of tool calls")
        if field != THOUGHT:
            raise _not_shown("the text of an answer")
        if index == answers[-1] and not prompt:
            raise _not_shown("the thought of an answer")
        if not prompt:
            found.add(index)
    return found


def _of_messages(turns, messages, untrained):
    """The turns (start, end) that a template marks itself, with whether they are trained."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    read_only = {index for index in answers if not messages[index].get("train", True)}
    if len(turns) == 1:  # the last answer, all that a prefix model learns
        answers = answers[-1:]
    if not turns or not untrained | read_only:
        return [(start, end, True) for start, end in turns]
    if len(answers) != len(turns):
        raise ValueError("the chat template does not mark one span for each answer of this row")
    return [
        (start, end, index not in untrained | read_only)
        for index, (start, end) in zip(answers, turns, strict=True)
    ]


def _blank(text, spans):
    """`text` with the given spans overwritten, same length."""
    out = []
    at = 0
    for start, end in sorted(spans):
        if start >= at:
            out += [text[at:start], "\0" * (end - start)]
            at = end
    return "".join(out) + text[at:]


def _tracked_turns(literal, tracked, facts):
    """The template's own spans, made to end with the end token (masks leave it out, or go on to the
    newline)."""
    turns = []
    ended = True
    for start, end in tracked:
        if start == end:
            continue
        # special tokens with nothing but blanks behind them
        inside = [
            m.end()
            for m in facts.special.finditer(literal, start, end)
            if not literal[m.end() : end].strip()
        ]
        follows = facts.special.match(literal, end)
        ended = bool(inside or follows)
        if inside:
            end = inside[-1]
        elif follows:
            end = follows.end()
        turns.append((start, end))
    return turns, not ended and not literal[turns[-1][1] :].strip()


def _turns(text, messages, spans, data, prompt, facts, untrained):
    """-> ([(start, end, whether it is trained)] of the assistant turns, whether the template left
    the last one without an end token).

    A turn starts after its header, or else at its text, and ends after the end token, or else after
    the first special token that the template wrote, or else with its text. `spans` None: only the
    headers tell.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    # literal: what the template wrote, with the data blanked out
    if spans is None:
        literal = _blank(text, data)
        _check_headers(literal, facts.headers, len(answers) + prompt)
    else:
        literal = _blank(text, [(start, end) for start, end, _ in spans])
    texts = _text_of_each_message(spans or [])
    starts = sorted(start for start, _, _ in spans or [])
    turns = []
    cursor = 0  # the end of the messages so far
    still_open = False
    for index, message in enumerate(messages):
        own = texts.get(index)
        if message["role"] != "assistant":
            cursor = max(cursor, own[1] if own else 0)
            continue
        start, text_end, limit = _start(literal, own, starts, cursor, facts.headers)
        end = _end(literal, text_end, limit, facts)
        if end is None:
            end = text_end
            if index == len(messages) - 1 and not prompt:
                end = max(text_end, len(literal.rstrip()))
                still_open = start < end and message.get("train", True)
        _check_calls(message, text[start:end])
        if start < end:
            is_trained = index not in untrained and message.get("train", True)
            turns.append((start, end, is_trained))
            cursor = end
    return turns, still_open


def _check_headers(literal, headers, expected):
    if not headers or literal.count(headers[-1]) != expected:
        raise ValueError(
            "answers cannot be found in the rendered chat; "
            "put {% generation %} into the chat template"
        )


def _text_of_each_message(spans):
    """{message index: (start of its first text, end of its last)}."""
    texts = {}
    for start, end, index in spans:
        low, high = texts.get(index, (start, end))
        texts[index] = (min(low, start), max(high, end))
    return texts


def _check_calls(message, turn):
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        if function["name"] not in turn or any(key not in turn for key in function["arguments"]):
            raise _not_shown("tool calls")


def _start(literal, own, starts, cursor, headers):
    """-> (start of the turn, end of its text, where the next text starts); empty if the template
    left it out."""

    def next_text(at):
        after = bisect_left(starts, at)
        return starts[after] if after < len(starts) else len(literal)

    def after_header(at, limit):
        return at + max(len(header) for header in headers if literal.startswith(header, at, limit))

    if own:
        text_start, text_end = own
        at = literal.rfind(headers[-1], cursor, text_start) if headers else -1
        start = after_header(at, text_start) if at >= 0 else text_start
        return start, text_end, next_text(text_end)

    # no text of its own: a bare tool call, or an empty answer
    limit = next_text(cursor)
    at = literal.find(headers[-1], cursor, limit) if headers else -1
    if at < 0:
        return cursor, cursor, cursor
    start = after_header(at, limit)
    next_header = literal.find(headers[-1], start, limit)
    return start, start, next_header if next_header >= 0 else limit


def _end(literal, at, limit, facts):
    """Where the end token of an answer ends, or None."""
    if facts.end:
        found = literal.find(facts.end, at, limit)
        if found >= 0:
            return found + len(facts.end)
    other = facts.special.search(literal, at, limit)
    return other.end() if other else None


# ---- text -> tokens ------------------------------------------------------------------------------


def _encode(tokenizer, messages, tools, prompt, kwargs, notes=None):
    """-> (ids [T], labels [T]); notes: a list to which is added what should be told of the row."""
    facts = _facts(tokenizer, tools, kwargs)
    text, turns, data, still_open = _locate(tokenizer, facts, messages, tools, prompt, kwargs)
    if notes is not None:
        notes += _notes(tokenizer, facts, text, turns, messages, tools, kwargs)
    spell = _by_offset if facts.spelling.by_offset else _by_piece
    ids, labels = spell(tokenizer, text, turns, data, facts.spelling)
    if still_open and not prompt:
        if tokenizer.eos_token_id is None:
            raise SystemExit(
                "neither the chat template nor the tokenizer has an end token; "
                "set tokenizer.eos_token"
            )
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids, labels


def _notes(tokenizer, facts, text, turns, messages, tools, kwargs):
    """What the row does not teach, or teaches otherwise than it will be asked for."""
    notes = []
    read_only = sum(not message.get("train", True) for message in messages)
    if sum(not trained for _, _, trained in turns) > read_only:
        notes.append(THOUGHTS_LEFT_OUT)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or not turns[-1][2]:
        return notes
    before = text[: turns[-1][0]]
    try:
        asked, _ = _render(
            tokenizer, facts.template, messages[: answers[-1]], tools, True, kwargs, facts.tracks
        )
    except ValueError:  # there is no prompt to compare with
        return notes
    if before != asked:
        notes.append(_asked_otherwise(before, asked))
    return notes


def _asked_otherwise(before, asked):
    """before: what stands before an answer in training; asked: what generation starts from."""
    common = len(commonprefix([before, asked]))
    trained = before[common:]
    wanted = asked[common:]
    note = "answers are trained behind another prompt than the one they will be asked with"
    if max(len(trained), len(wanted)) > 60:
        return note
    return f"{note}: it ends with {trained!r} in these rows, with {wanted!r} when asked"


def _by_piece(tokenizer, text, turns, data, spelling):
    """Every piece on its own, so that no token reaches over the edge of a turn."""
    ids = []
    labels = []
    for piece, trained, plain in _pieces(text, turns, data):
        tokens = _tokens(tokenizer, piece, plain, spelling)
        ids += tokens
        labels += tokens if trained else [IGNORE] * len(tokens)
    return ids, labels


def _pieces(text, turns, data):
    """(piece, trained, data): the text cut at the ends of turns and of the special tokens that are
    data."""
    starts = {start: trained for start, _, trained in turns}
    ends = {end for _, end, _ in turns}
    plain = dict(data)
    cuts = sorted({0, len(text), *starts, *ends, *plain, *plain.values()})
    trained = False
    for start, end in pairwise(cuts):
        trained = starts.get(start, trained and start not in ends)
        yield text[start:end], trained, plain.get(start) == end


def _tokens(tokenizer, text, plain, spelling):
    """Token ids of one piece; with `plain` its special tokens are spelt out like any text."""
    ids = tokenizer.encode(
        text, add_special_tokens=False, split_special_tokens=plain, verbose=False
    )
    if plain and not spelling.special_ids.isdisjoint(ids):
        # a vocabulary that has them as ordinary pieces too
        ids = [i for char in text for i in tokenizer.encode(char, add_special_tokens=False)]
    return ids


def _by_offset(tokenizer, text, turns, data, spelling):
    """Like the whole text at once, but for a cut where a turn begins, since generation begins
    there; a token is trained when its last character lies in a turn."""
    # behind a special token the tokenizer cuts by itself, and may begin the text with a space
    parted = {match.end() for match in spelling.special.finditer(text)} if turns else set()
    ids = []
    labels = []
    plain = dict(data)
    ends = [end for _, end, _ in turns]
    starts = [start for start, _, _ in turns if start not in parted]
    for start, end in pairwise(sorted({0, len(text), *starts, *plain, *plain.values()})):
        as_text = plain.get(start) == end
        for token, at in _offsets(tokenizer, text[start:end], start, as_text, spelling):
            turn = bisect_left(ends, at + 1)
            trained = turn < len(turns) and turns[turn][0] <= at and turns[turn][2]
            ids.append(token)
            labels.append(token if trained else IGNORE)
    return ids, labels


def _offsets(tokenizer, piece, start, plain, spelling):
    """[(token, position of its last character)] of a piece that stands at `start`."""
    # what stands before a later piece keeps the tokenizer from putting a space there; it must not
    # become one token with the beginning of the piece
    for lead in LEADS if start else ("",):
        out = tokenizer(
            lead + piece,
            add_special_tokens=False,
            split_special_tokens=plain,
            return_offsets_mapping=True,
            verbose=False,
        )
        tokens = list(zip(out["input_ids"], out["offset_mapping"], strict=True))
        if not any(begin < len(lead) < end for _, (begin, end) in tokens):
            break
    found = []
    for token, (begin, end) in tokens:
        if end > len(lead) or not lead:
            found.append((token, start - len(lead) + max(begin, end - 1)))
    if plain and len(piece) > 1 and any(token in spelling.special_ids for token, _ in found):
        found = []
        for i, char in enumerate(piece):
            found += _offsets(tokenizer, char, start + i, True, spelling)
    return found


# ---- rows that are too long ----------------------------------------------------------------------


def _drop_oldest(tokenizer, messages, max_length, tools, kwargs):
    """(ids, labels) of the most exchanges (system, then the newest ones) that fit, or of the newest
    alone, or None."""
    messages = _up_to_last_answer(messages)
    head, begins = _exchanges(messages)
    best = None
    low = 0
    high = len(begins) - 1
    while low <= high:  # the row gets shorter with every exchange dropped
        middle = (low + high) // 2
        kept = [*messages[:head], *messages[begins[middle] :]]
        ids, labels = _encode(tokenizer, kept, tools, False, kwargs)
        fits = len(ids) <= max_length
        newest_alone = middle == len(begins) - 1
        if (fits or newest_alone) and _any_trained(labels):
            best = (ids, labels)
        if fits:
            high = middle - 1
        else:
            low = middle + 1
    return best


def _up_to_last_answer(messages):
    """Without what follows the last assistant turn that says anything."""
    for index in reversed(range(len(messages))):
        message = messages[index]
        if message["role"] == "assistant" and any(message[key] for key in message if key != "role"):
            return messages[: index + 1]
    return messages


def _exchanges(messages):
    """-> (how many messages stand before the first exchange, where the exchanges begin)."""
    roles = [message["role"] for message in messages]
    speaks = ("user", "assistant", "tool")
    head = next((i for i, role in enumerate(roles) if role in speaks), 0)
    begins = []
    for i in range(head, len(roles)):
        after_user = i > head and roles[i - 1] == "user"
        if roles[i] == "user" and not after_user:
            begins.append(i)
    return head, begins


def _shrink(tokenizer, ids, labels, room):
    """Cut one exchange to `room` tokens: middles of what is not trained, then tails of what is,
    never an end token."""
    if len(ids) <= room:
        return ids, labels
    last = max(i for i, label in enumerate(labels) if label != IGNORE) + 1
    runs = list(_runs(ids[:last], labels[:last]))
    if 16 * len(runs) > room:  # too little room for every turn: the last one alone is trained
        _, answer = runs[-1]
        runs = [(False, ids[: last - len(answer)]), (True, answer)]
    prompts = [len(run) for trained, run in runs if not trained]
    answers = [len(run) for trained, run in runs if trained]
    kept = min(sum(prompts), max(room - sum(answers), room // 4))
    prompt_cap = _cap(prompts, kept)
    answer_cap = _cap(answers, room - kept)
    ids = []
    labels = []
    for trained, run in runs:
        if trained:
            run = _cut_tail(tokenizer, run, answer_cap)
            labels += run
        else:
            run = _cut_middle(tokenizer, run, prompt_cap)
            labels += [IGNORE] * len(run)
        ids += run
    return ids, labels


def _cap(lengths, room):
    """The largest c with sum(min(length, c)) <= room."""
    rest = sorted(lengths)
    while rest and rest[0] <= room // len(rest):
        room -= rest.pop(0)
    return room // len(rest) if rest else max(lengths, default=0)


def _cut_tail(tokenizer, run, size):
    """The last token, which ends the answer, stays."""
    if len(run) <= size:
        return run
    return _clean_end(tokenizer, run[: size - 1]) + run[-1:]


def _cut_middle(tokenizer, run, size):
    if len(run) <= size:
        return run
    head = size // 2
    tail = size - head
    start = _clean_end(tokenizer, run[:head])
    return start + _clean_start(tokenizer, run[len(run) - tail :])


def _clean_end(tokenizer, ids):
    """Without the first bytes of a character that was cut (at most three)."""
    for _ in range(3):
        if not ids or not tokenizer.decode(ids[-8:]).endswith("\ufffd"):
            break
        ids = ids[:-1]
    return ids


def _clean_start(tokenizer, ids):
    """Without the last bytes of a character that was cut (at most three)."""
    for _ in range(3):
        if not ids or not tokenizer.decode(ids[:8]).startswith("\ufffd"):
            break
        ids = ids[1:]
    return ids
