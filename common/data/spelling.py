"""Texts -> tokens: special tokens that stand in a text are spelt out like any other text, and the
edges of what is trained are edges of tokens."""

import re
from bisect import bisect_left
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

IGNORE = -100  # the label of a token that is not trained; the one place where the number stands
LEADS = ("\n", "。", "a", "0")


# ---- texts that are no chat ----------------------------------------------------------------------


def encode_text(tokenizer, text, start=None):
    """Token ids [T] of a text that is no chat, as documents are trained and continued.

    start: the ids it begins with, default those of the tokenizer's own call (a beginning-of-text
    token, or nothing). Special tokens written inside the text are encoded as plain text.
    """
    start = text_start(tokenizer) if start is None else start
    spelling = spelling_of(tokenizer, len(tokenizer))
    if not spelling.special.search(text):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        data = [m.span() for m in spelling.special.finditer(text)]
        spell = by_offset if spelling.by_offset else by_piece
        ids, _ = spell(tokenizer, text, [], data, spelling)
    return [*start, *ids]


def encode_document(tokenizer, text, start=None):
    """encode_text with the end-of-text token behind it; SystemExit where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise SystemExit("the tokenizer has no end token to close documents; set its eos_token")
    return [*encode_text(tokenizer, text, start), tokenizer.eos_token_id]


def text_start(tokenizer):
    """The ids that the tokenizer's own call writes before a text: [bos] or [], as a rule."""
    return list(spelling_of(tokenizer, len(tokenizer)).start)


# ---- what a tokenizer does -----------------------------------------------------------------------


class Spelling(NamedTuple):
    """What a tokenizer does with texts and special tokens."""

    # any special token
    special: re.Pattern
    special_ids: frozenset
    # the ids that the tokenizer's own call writes before a text
    start: tuple
    # the tokenizer puts a space before every text it is given, so texts must not be split
    by_offset: bool


@lru_cache(maxsize=64)
def spelling_of(tokenizer, _size):
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[:1]
    return Spelling(
        special=any_of(name for name in names if name.strip()),
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


def any_of(names):
    longest_first = sorted(names, key=len, reverse=True)
    nothing = "(?!)"
    return re.compile("|".join(map(re.escape, longest_first)) or nothing)


# ---- tokens and labels ---------------------------------------------------------------------------


def any_trained(labels):
    return any(label != IGNORE for label in labels)


def runs_of(ids, labels):
    """-> (whether they are trained, token ids) of neighbours that are alike."""

    def is_trained(pair):
        return pair[1] != IGNORE

    for trained, pairs in groupby(zip(ids, labels, strict=True), key=is_trained):
        yield trained, [token for token, _ in pairs]


def by_piece(tokenizer, text, turns, data, spelling):
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


def by_offset(tokenizer, text, turns, data, spelling):
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
