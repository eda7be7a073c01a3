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
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from common.data import marks, shorten, spelling
from common.data.marks import THOUGHT, blank, render
from common.data.spelling import (
    Spelling,
    any_of,
    any_trained,
    runs_of,
    spelling_of,
    text_start,
)

# what a template leaves out of a row that is trained all the same: `notes` of encode_chat
THOUGHTS_LEFT_OUT = (
    "the chat template leaves out thoughts of earlier answers; those answers are not trained, the "
    "last one is"
)
NAMES_LEFT_OUT = "the chat template leaves out the names (`name`) of turns"
SHOWN_AS = {"system": "the system turn", "user": "a user turn", "tool": "a tool's result"}


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
    except Exception:  # of many kinds, as from any program
        pass  # the template may refuse our probe; rows are checked when they come


def _with_bos(tokenizer, template):
    bos = tokenizer.bos_token
    has_one = "bos_token" in template or (bos and bos in template)
    if has_one or not bos or text_start(tokenizer) != [tokenizer.bos_token_id]:
        return template
    return "{{ bos_token }}" + template


def tokenizer_settings(tokenizer) -> dict[str, str]:
    """What a tokenizer decides of a run, as short hashes: a run does not go on with others."""
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "tokenizer_sha": _short_hash([vocabulary, tokenizer.special_tokens_map]),
        "chat_template_sha": _short_hash(tokenizer.chat_template),
    }


def fingerprint(tokenizer) -> str:
    """A short hash of all that decides how rows become tokens: vocabulary, special tokens, chat
    template, the files that make tokens of rows."""
    parts = [
        tokenizer_settings(tokenizer),
        *(Path(module.__file__).read_text("utf-8") for module in (marks, shorten, spelling)),
        Path(__file__).read_text("utf-8"),
    ]
    return _short_hash(parts)


def _short_hash(content) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    if not any_trained(labels):
        return None
    truncated = len(ids) > max_length
    if truncated:
        newest = _drop_oldest(tokenizer, messages, max_length, tools, template_kwargs)
        if newest is not None:
            ids, labels = newest
        ids, labels = shorten.shrink(tokenizer, ids, labels, max_length)
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
    runs = [tokens for trained, tokens in runs_of(ids, labels) if trained]
    return tokenizer.decode(runs[-1], skip_special_tokens=True) if runs else ""


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
    for trained, tokens in runs_of(input_ids, labels):
        before, after = frames[trained]
        text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        out.append(before + text + after)
    return "".join(out)


# ---- what a template does ------------------------------------------------------------------------


class _Facts(NamedTuple):
    """What a template and its tokenizer do, learned once from two tiny conversations."""

    template: str
    spelling: Spelling
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
    own = spelling_of(tokenizer, len(tokenizer))
    headers, end, ends = _headers_and_ends(tokenizer, template, own.special, kwargs)
    tags = set(re.findall(r"</?[\w:]+>", template))
    return _Facts(
        template=template,
        spelling=own,
        special=own.special,
        tags=any_of(tag for tag in tags if not own.special.fullmatch(tag)),
        headers=headers,
        end=end,
        ends=ends,
        tracks=bool(re.search(r"\{%-?\s*generation\s*-?%\}", template)),
    )


def _headers_and_ends(tokenizer, template, special, kwargs):
    question = "\U000f0000"
    answer = "\U000f0001"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def rendered(messages, prompt=False):
        return render(tokenizer, template, messages, None, prompt, kwargs)[0]

    try:
        asked = rendered(turns[:1])
        prompt = rendered(turns[:1], prompt=True)
        once = rendered(turns)
        twice = rendered(turns * 2)
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


# ---- turns: which text of the rendered chat is trained -------------------------------------------


def _locate(tokenizer, facts, messages, tools, prompt, kwargs):
    """-> (text, turns [(start, end, whether it is trained)], spans of special tokens that are data,
    whether the last answer lacks its end)."""
    asked = (tokenizer, facts, messages, tools, prompt, kwargs)
    text, tracked = render(tokenizer, facts.template, messages, tools, prompt, kwargs, facts.tracks)
    _check_tools(text, *asked)
    # a template that cuts texts up or parses arguments bears fewer marks
    for level in (2, 1, 0):
        found = marks.texts_in(tokenizer, facts, text, *asked[2:], level)
        if found is not None:
            break
    else:
        raise ValueError(
            "the chat template rewrites special tokens in the texts; take them out of this row"
        )
    spans, lost = found
    if level < 2:
        lost |= marks.unnoticed(tokenizer, facts, text, *asked[2:], level)
    untrained = _without_their_thoughts(messages, lost, prompt)
    data = [m.span() for start, end, _ in spans for m in facts.special.finditer(text, start, end)]
    if facts.tracks:
        turns, still_open = _tracked_turns(blank(text, data), tracked, facts)
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
        bare, _ = render(tokenizer, facts.template, messages, None, prompt, kwargs, facts.tracks)
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
        literal = blank(text, data)
        _check_headers(literal, facts.headers, len(answers) + prompt)
    else:
        literal = blank(text, [(start, end) for start, end, _ in spans])
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
    spell = spelling.by_offset if facts.spelling.by_offset else spelling.by_piece
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
    if _names_are_left_out(tokenizer, facts, text, messages, tools, kwargs):
        notes.append(NAMES_LEFT_OUT)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or not turns[-1][2]:
        return notes
    before = text[: turns[-1][0]]
    try:
        asked, _ = render(
            tokenizer, facts.template, messages[: answers[-1]], tools, True, kwargs, facts.tracks
        )
    except ValueError:  # there is no prompt to compare with
        return notes
    if before != asked:
        notes.append(_asked_otherwise(before, asked))
    return notes


def _names_are_left_out(tokenizer, facts, text, messages, tools, kwargs):
    """Whether messages have names, and `text`, which is rendered of them, is the same without."""
    nameless = [{key: message[key] for key in message if key != "name"} for message in messages]
    if nameless == messages:
        return False
    try:
        other, _ = render(tokenizer, facts.template, nameless, tools, False, kwargs)
        return other.startswith(text)  # which ends with the last answer
    except ValueError:  # it wants the names
        return False


def _asked_otherwise(before, asked):
    """before: what stands before an answer in training; asked: what generation starts from."""
    common = len(commonprefix([before, asked]))
    trained = before[common:]
    wanted = asked[common:]
    note = "answers are trained behind another prompt than the one they will be asked with"
    if max(len(trained), len(wanted)) > 60:
        return note
    return f"{note}: it ends with {trained!r} in these rows, with {wanted!r} when asked"


def _drop_oldest(tokenizer, messages, max_length, tools, kwargs):
    """(ids, labels) of the most exchanges (system, then the newest ones) that fit, or of the newest
    alone, or None."""
    messages = shorten.up_to_last_answer(messages)
    head, begins = shorten.exchanges(messages)
    best = None
    low = 0
    high = len(begins) - 1
    while low <= high:  # the row gets shorter with every exchange dropped
        middle = (low + high) // 2
        kept = [*messages[:head], *messages[begins[middle] :]]
        ids, labels = _encode(tokenizer, kept, tools, False, kwargs)
        fits = len(ids) <= max_length
        newest_alone = middle == len(begins) - 1
        if (fits or newest_alone) and any_trained(labels):
            best = (ids, labels)
        if fits:
            high = middle - 1
        else:
            low = middle + 1
    return best
