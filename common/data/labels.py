"""Messages -> input_ids and labels through the tokenizer's own chat template; no format and no
token id stands here.

How the trained text is found: the conversation is rendered twice, plainly and with invisible
private-use characters around every text. Without those characters both renderings must be equal, so
they tell, in the plain one, what the template wrote and what the data wrote, whatever the template
strips, moves or drops (earlier thinking).
"""

import hashlib
import json
import re
from bisect import bisect_left
from functools import lru_cache
from itertools import groupby, pairwise
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

IGNORE = -100
TEXT_KEYS = ("content", "reasoning_content")
_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")  # planes 15 and 16: no assigned characters


class _Facts(NamedTuple):
    """What a template and its tokenizer do, learned once from two tiny conversations."""

    template: str
    special: re.Pattern  # any special token
    special_ids: frozenset
    tags: re.Pattern  # tags the template itself may look for inside texts, like </think>
    # what announces an answer, longest first: the generation prompt, and what earlier turns have of
    # it
    headers: tuple
    end: str  # the special tokens after a plain answer, or nothing
    tracks: bool  # the template says itself what is generated: {% generation %}
    by_offset: (
        bool  # the tokenizer puts a space before every text it is given, so texts must not be split
    )


def set_template(tokenizer, path_or_text):
    """Give `tokenizer` the chat template in a file, or the Jinja text itself. Raises SystemExit
    when it is neither."""
    import jinja2

    is_text = "{%" in path_or_text or "{{" in path_or_text
    name = "chat template" if is_text else path_or_text
    try:
        tokenizer.chat_template = (
            path_or_text if is_text else Path(path_or_text).read_text(encoding="utf-8-sig")
        )
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{name}: not a readable chat template file: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise SystemExit(
            f"{name}:{error.lineno}: not a Jinja chat template: {error.message}"
        ) from None
    except jinja2.TemplateError:
        pass  # the template may refuse our probe; rows are checked when they come


def fingerprint(tokenizer):
    """A short hash of all that decides how rows become tokens: vocabulary, special tokens, chat
    template, this file."""
    vocabulary = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else sorted(tokenizer.get_vocab().items())
    )
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
    else; eos is added where the template leaves the last answer open. None only when there is
    nothing to train. Special tokens written inside the texts are encoded as plain text. `tools` and
    `template_kwargs` go to the template. Too long a row loses its oldest exchanges, then the middle
    of what is left of its prompt (never below a quarter of the window), then the tail of its answer
    before the end token. Raises ValueError for a row that the template refuses, shows only in part,
    or rewrites so that its answers cannot be found; SystemExit when there is no template.
    """
    ids, labels = _encode(tokenizer, messages, tools, False, template_kwargs)
    if all(label == IGNORE for label in labels):
        return None
    truncated = len(ids) > max_length
    if truncated:
        ids, labels = _drop_oldest(tokenizer, messages, max_length, tools, template_kwargs) or (
            ids,
            labels,
        )
        ids, labels = _shrink(tokenizer, ids, labels, max_length)
    return {"input_ids": ids, "labels": labels, "truncated": truncated}


def encode_prompt(tokenizer, messages, tools=None, **template_kwargs):
    """Messages -> token ids [T] that generation starts from: the same tokens as before the answer
    in training."""
    return _encode(tokenizer, messages, tools, True, template_kwargs)[0]


def preview(tokenizer, input_ids, labels, color=True):
    """The row as text, what is trained in green and the rest in grey; without colour what is
    trained in [[ ]].

    Runs of equal mask are decoded whole: a single token may be a third of a Chinese character.
    """
    on, off, plain, reset = (
        ("\033[32m", "\033[0m", "\033[90m", "\033[0m") if color else ("[[", "]]", "", "")
    )
    out = []
    for trained, run in groupby(
        zip(input_ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE
    ):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        out.append(f"{on}{text}{off}" if trained else f"{plain}{text}{reset}")
    return "".join(out)


def _render(tokenizer, template, messages, tools, prompt, kwargs, tracks=False):
    """-> (text, spans in it that {% generation %} marks). Raises ValueError when the template
    refuses the messages."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {key: value for key, value in message.items() if value is not None} for message in messages
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


def _facts(tokenizer, tools, kwargs):
    if tokenizer.chat_template is None:
        raise SystemExit(
            f"{tokenizer.name_or_path or 'tokenizer'}: no chat template; pass the model's one with --chat_template FILE"
        )
    template = tokenizer.get_chat_template(tools=tools or None)
    return _probe(tokenizer, template, json.dumps(kwargs, sort_keys=True), len(tokenizer))


@lru_cache(maxsize=64)
def _probe(tokenizer, template, kwargs, _size):
    kwargs = json.loads(kwargs)
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    special = _any_of(name for name in names if name.strip())
    headers, end = _headers_and_end(tokenizer, template, special, kwargs)
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[:1]
    return _Facts(
        template=template,
        special=special,
        special_ids=frozenset(tokenizer.convert_tokens_to_ids(sorted(names))),
        tags=_any_of(set(re.findall(r"</?[\w:]+>", template)) - names),
        headers=headers,
        end=end,
        tracks=bool(re.search(r"\{%-?\s*generation\s*-?%\}", template)),
        by_offset=tokenizer.is_fast and first != ["a"],
    )


def _headers_and_end(tokenizer, template, special, kwargs):
    question, answer = "\U000f0000", "\U000f0001"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        asked, _ = _render(tokenizer, template, turns[:1], None, False, kwargs)
        prompt, _ = _render(tokenizer, template, turns[:1], None, True, kwargs)
        once, _ = _render(tokenizer, template, turns, None, False, kwargs)
        twice, _ = _render(tokenizer, template, turns * 2, None, False, kwargs)
    except ValueError:
        return (
            (),
            "",
        )  # it wants more than one question: texts are then trained from their own start
    found = re.compile(f"({special.pattern})+").search(once, once.find(answer) + 1)
    tail = asked.partition(question)[2]
    # "[INST] .. [/INST]": the answer follows what the template writes after a question, with its
    # blanks if they stay
    header, short = tail.lstrip(), tail.strip()
    if prompt != asked:
        header = prompt.partition(question)[2].removeprefix(tail)
        earlier = twice.partition(question)[2].partition(answer)[0].removeprefix(tail)
        short = commonprefix([header, earlier])
        cut = [m.start() for m in special.finditer(header) if m.start() < len(short) < m.end()]
        short = header[: cut[0]] if cut else short
    return tuple(
        h for h in dict.fromkeys([header, short]) if h.strip()
    ), found.group() if found else ""


def _any_of(names):
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _mark(messages, tools, facts, level, taken):
    """Copies of messages and tools whose texts stand between two marks, and {mark: (message index,
    opening mark)}.

    Marks stand inside the outer blanks of a text and beside the tags the template looks for, so
    that the template strips and splits as before. Level 2 marks contents and arguments of tool
    calls, 1 contents, 0 neither; special tokens are marked in all strings but roles.
    """
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in taken)
    owner = {}

    def wrap(text, spans, index):
        out, at = [], 0
        for start, end in spans:
            opening, closing = next(free), next(free)
            owner[opening], owner[closing] = (index, None), (index, opening)
            out += [text[at:start], opening, text[start:end], closing]
            at = end
        return "".join(out) + text[at:]

    def walk(value, index, whole):
        if isinstance(value, str):
            spans = (
                _parts(value, facts.tags)
                if whole
                else [m.span() for m in facts.special.finditer(value)]
            )
            return wrap(value, spans, index) if spans else value
        if isinstance(value, dict):
            return {
                k: walk(
                    v,
                    index,
                    whole or (k in TEXT_KEYS and level > 0) or (k == "arguments" and level > 1),
                )
                for k, v in value.items()
            }
        return (
            [walk(item, index, whole) for item in value]
            if isinstance(value, (list, tuple))
            else value
        )

    marked = [{**walk(m, i, False), "role": m["role"]} for i, m in enumerate(messages)]
    return marked, walk(tools, None, False), owner


def _parts(text, tags):
    """Spans of `text` between tags, without outer blanks; blank ones are left out (templates test
    for empty texts)."""
    spans, at = [], 0
    for start, end in [*(m.span() for m in tags.finditer(text)), (len(text), 0)]:
        piece = text[at:start]
        if piece.strip():
            spans.append((at + len(piece) - len(piece.lstrip()), at + len(piece.rstrip())))
        at = end
    return spans


def _unmark(marked, owner):
    """-> (text without marks, [(start, end, message index)] in it), or (None, []) when a mark lost
    its other half."""
    parts, spans, opened, at, size = [], [], {}, 0, 0
    for match in _PRIVATE.finditer(marked):
        mark = match.group()
        if mark not in owner:
            continue
        parts.append(marked[at : match.start()])
        size, at = size + match.start() - at, match.end()
        index, opening = owner[mark]
        if opening is None:
            opened[mark] = size
        elif opening in opened:
            spans.append((opened.pop(opening), size, index))
        else:
            return None, []
    return (None, []) if opened else ("".join(parts) + marked[at:], spans)


def _locate(tokenizer, facts, messages, tools, prompt, kwargs):
    """-> (text, turns [(start, end)], spans of special tokens that are data, whether the last
    answer lacks its end)."""
    text, tracked = _render(
        tokenizer, facts.template, messages, tools, prompt, kwargs, facts.tracks
    )
    taken = set(_PRIVATE.findall(text))
    for level in (0,) if facts.tracks else (2, 1, 0):
        marked, marked_tools, owner = _mark(messages, tools, facts, level, taken)
        same, spans = text, []
        if owner:
            render = _render(
                tokenizer, facts.template, marked, marked_tools, prompt, kwargs, facts.tracks
            )
            same, spans = _unmark(render[0], owner)
        if same == text:
            break
    else:
        raise ValueError(
            "the chat template rewrites special tokens in the texts; take them out of this row"
        )
    data = [m.span() for start, end, _ in spans for m in facts.special.finditer(text, start, end)]
    if facts.tracks:
        turns, still_open = _tracked_turns(_blank(text, data), tracked, facts)
    else:
        turns, still_open = _turns(text, messages, spans if level else None, data, prompt, facts)
    if still_open and not prompt:
        text = text[: turns[-1][1]]
    return text, turns, data, still_open


def _tracked_turns(literal, tracked, facts):
    """The template's own spans, made to end with the end token (masks leave it out, or go on to the
    newline)."""
    turns, ended = [], True
    for start, end in tracked:
        if start == end:
            continue
        inside = [
            m.end()
            for m in facts.special.finditer(literal, start, end)
            if not literal[m.end() : end].strip()
        ]
        follows = facts.special.match(literal, end)
        ended = bool(inside or follows)
        turns.append((start, inside[-1] if inside else follows.end() if follows else end))
    return turns, not ended and not literal[turns[-1][1] :].strip()


def _turns(text, messages, spans, data, prompt, facts):
    """-> ([(start, end)] of the assistant turns, whether the template left the last one without an
    end token).

    A turn starts after its header, or else at its text, and ends after the end token, or else after
    the first special token that the template wrote, or else with its text. `spans` None: only the
    headers tell.
    """
    literal = _blank(
        text, data if spans is None else [span[:2] for span in spans]
    )  # what the template wrote
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if spans is None and (
        not facts.headers or literal.count(facts.headers[-1]) != len(answers) + prompt
    ):
        raise ValueError(
            "answers cannot be found in the rendered chat; put {% generation %} into the chat template"
        )
    texts = {}
    for start, end, index in spans or []:
        low, high = texts.get(index, (start, end))
        texts[index] = min(low, start), max(high, end)
    starts, turns, cursor, still_open = sorted(span[0] for span in spans or []), [], 0, False
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            cursor = max(cursor, texts.get(index, (0, 0))[1])
            continue
        start, text_end, limit = _start(literal, texts.get(index), starts, cursor, facts.headers)
        end = _end(literal, text_end, limit, facts)
        if end is None and index == len(messages) - 1 and not prompt:
            end = max(text_end, len(literal.rstrip()))
            still_open = start < end
        end = text_end if end is None else end
        _check(
            message,
            text[start:end],
            spans is not None and index == answers[-1] and index not in texts,
        )
        if start < end:
            turns.append((start, end))
            cursor = end
    return turns, still_open


def _check(message, turn, text_lost):
    """Refuse rows of which the template shows less than there is to learn."""
    if text_lost and (message.get("content") or "").strip():
        raise ValueError("the chat template does not show the text of the last answer")
    for call in message.get("tool_calls") or []:
        if call.get("function", call)["name"] not in turn:
            raise ValueError("the chat template does not show tool calls")


def _start(literal, own, starts, cursor, headers):
    """-> (start of the turn, end of its text, where the next text starts); empty if the template
    left it out."""

    def next_text(at):
        after = bisect_left(starts, at)
        return starts[after] if after < len(starts) else len(literal)

    def after_header(at, limit):
        return at + max(len(h) for h in headers if literal.startswith(h, at, limit))

    if own:
        at = literal.rfind(headers[-1], cursor, own[0]) if headers else -1
        return after_header(at, own[0]) if at >= 0 else own[0], own[1], next_text(own[1])
    # no text of its own: a bare tool call, or an empty answer
    limit = next_text(cursor)
    at = literal.find(headers[-1], cursor, limit) if headers else -1
    if at < 0:
        return cursor, cursor, cursor
    start = after_header(at, limit)
    other = literal.find(headers[-1], start, limit)
    return start, start, other if other >= 0 else limit


def _end(literal, at, limit, facts):
    """Where the end token of an answer ends, or None."""
    found = literal.find(facts.end, at, limit) if facts.end else -1
    if found >= 0:
        return found + len(facts.end)
    found = facts.special.search(literal, at, limit)
    return found and found.end()


def _blank(text, spans):
    """`text` with the given spans overwritten, same length."""
    out, at = [], 0
    for start, end in sorted(spans):
        if start >= at:
            out += [text[at:start], "\0" * (end - start)]
            at = end
    return "".join(out) + text[at:]


def _encode(tokenizer, messages, tools, prompt, kwargs):
    """-> (ids [T], labels [T])."""
    facts = _facts(tokenizer, tools, kwargs)
    text, turns, data, still_open = _locate(tokenizer, facts, messages, tools, prompt, kwargs)
    if facts.by_offset:
        ids, labels = _by_offset(tokenizer, text, turns, data, facts)
    else:
        ids, labels = [], []
        for piece, trained, plain in _pieces(text, turns, data):
            tokens = _tokens(tokenizer, piece, plain, facts)
            ids += tokens
            labels += tokens if trained else [IGNORE] * len(tokens)
    if still_open and not prompt:
        if tokenizer.eos_token_id is None:
            raise SystemExit(
                "neither the chat template nor the tokenizer has an end token; set tokenizer.eos_token"
            )
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids, labels


def _pieces(text, turns, data):
    """[(piece, trained, data)]: the text cut at the ends of turns and of the special tokens that
    are data."""
    starts, ends = {start for start, _ in turns}, {end for _, end in turns}
    plain = dict(data)
    cuts = sorted({0, len(text), *starts, *ends, *plain, *plain.values()})
    trained = False
    for start, end in pairwise(cuts):
        trained = start in starts or (trained and start not in ends)
        yield text[start:end], trained, plain.get(start) == end


def _tokens(tokenizer, text, plain, facts):
    """Token ids of one piece; with `plain` its special tokens are spelt out like any text."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
    if plain and not facts.special_ids.isdisjoint(
        ids
    ):  # a vocabulary that has them as ordinary pieces too
        ids = [i for char in text for i in tokenizer.encode(char, add_special_tokens=False)]
    return ids


def _by_offset(tokenizer, text, turns, data, facts):
    """Like the whole text at once; a token is trained when its last character lies in a turn."""
    ids, labels, plain, ends = [], [], dict(data), [end for _, end in turns]
    for start, end in pairwise(sorted({0, len(text), *plain, *plain.values()})):
        as_text = plain.get(start) == end
        for token, at in _offsets(tokenizer, text[start:end], start, as_text, facts):
            turn = bisect_left(ends, at + 1)
            ids.append(token)
            labels.append(token if turn < len(turns) and turns[turn][0] <= at else IGNORE)
    return ids, labels


def _offsets(tokenizer, piece, start, plain, facts):
    """[(token, position of its last character)] of a piece that stands at `start`."""
    lead = "\n" if start else ""  # keeps the tokenizer from putting a space before a later piece
    out = tokenizer(
        lead + piece,
        add_special_tokens=False,
        split_special_tokens=plain,
        return_offsets_mapping=True,
    )
    found = [
        (token, start - len(lead) + max(a, b - 1))
        for token, (a, b) in zip(out["input_ids"], out["offset_mapping"], strict=True)
        if b > len(lead) or not lead
    ]
    if plain and len(piece) > 1 and any(token in facts.special_ids for token, _ in found):
        found = [
            x
            for i, char in enumerate(piece)
            for x in _offsets(tokenizer, char, start + i, True, facts)
        ]
    return found


def _drop_oldest(tokenizer, messages, max_length, tools, kwargs):
    """(ids, labels) of the most exchanges (system, then the newest ones) that fit, or of the newest
    alone, or None."""
    said = [
        i
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and any(m.get(k) for k in m if k != "role")
    ]
    messages = messages[: said[-1] + 1] if said else messages
    roles = [message["role"] for message in messages]
    head = next((i for i, role in enumerate(roles) if role in ("user", "assistant", "tool")), 0)
    begins = [
        i
        for i in range(head, len(roles))
        if roles[i] == "user" and (i == head or roles[i - 1] != "user")
    ]
    best, low, high = None, 0, len(begins) - 1
    while low <= high:  # the row gets shorter with every exchange dropped
        middle = (low + high) // 2
        row = _encode(
            tokenizer, [*messages[:head], *messages[begins[middle] :]], tools, False, kwargs
        )
        fits = len(row[0]) <= max_length
        if (fits or middle == len(begins) - 1) and any(label != IGNORE for label in row[1]):
            best = row
        low, high = (low, middle - 1) if fits else (middle + 1, high)
    return best


def _shrink(tokenizer, ids, labels, room):
    """Cut one exchange to `room` tokens: middles of what is not trained, then tails of what is,
    never an end token."""
    if len(ids) <= room:
        return ids, labels
    last = max(i for i, label in enumerate(labels) if label != IGNORE) + 1
    ids, labels = ids[:last], labels[:last]
    runs = [
        (on, [i for i, _ in run])
        for on, run in groupby(zip(ids, labels, strict=True), lambda p: p[1] != IGNORE)
    ]
    if 16 * len(runs) > room:  # too little room for every turn: the last one alone is trained
        runs = [(False, ids[: last - len(runs[-1][1])]), runs[-1]]
    prompts, answers = ([len(run) for on, run in runs if on is kind] for kind in (False, True))
    kept = min(sum(prompts), max(room - sum(answers), room // 4))
    prompt_cap, answer_cap = _cap(prompts, kept), _cap(answers, room - kept)
    ids, labels = [], []
    for on, run in runs:
        if on and len(run) > answer_cap:
            run = _clean_end(tokenizer, run[: answer_cap - 1]) + run[-1:]
        elif not on and len(run) > prompt_cap:
            tail = prompt_cap - prompt_cap // 2
            run = _clean_end(tokenizer, run[: prompt_cap // 2]) + _clean_start(
                tokenizer, run[len(run) - tail :]
            )
        ids += run
        labels += run if on else [IGNORE] * len(run)
    return ids, labels


def _cap(lengths, room):
    """The largest c with sum(min(length, c)) <= room."""
    rest = sorted(lengths)
    while rest and rest[0] <= room // len(rest):
        room -= rest.pop(0)
    return room // len(rest) if rest else max(lengths, default=0)


def _clean_end(tokenizer, ids):
    """Without the first bytes of a character that was cut (at most three)."""
    for _ in range(3):
        if not ids or not tokenizer.decode(ids[-8:]).endswith("\ufffd"):
            break
        ids = ids[:-1]
    return ids


def _clean_start(tokenizer, ids):
    for _ in range(3):
        if not ids or not tokenizer.decode(ids[:8]).startswith("\ufffd"):
            break
        ids = ids[1:]
    return ids
