"""Conversations that are too long for the window: the oldest exchanges go, then middles of what is
not trained, then tails of what is."""

from common.data.spelling import IGNORE, runs_of


def up_to_last_answer(messages):
    """Without what follows the last assistant turn that says anything."""
    for index in reversed(range(len(messages))):
        message = messages[index]
        if message["role"] == "assistant" and any(message[key] for key in message if key != "role"):
            return messages[: index + 1]
    return messages


def exchanges(messages):
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


def size(ids, blocks=None):
    """Tokens of a row. blocks: {id: tokens that it stands for}."""
    blocks = blocks or {}
    return len(ids) + sum(blocks[token] - 1 for token in ids if token in blocks)


def shrink(tokenizer, ids, labels, room, blocks=None):
    """Cut one exchange to `room` tokens: middles of what is not trained, then tails of what is,
    never an end token.

    blocks: {id: tokens that it stands for}; such a token has no label, stays, and counts as so
    many. They have to leave room for words.
    """
    blocks = blocks or {}
    if size(ids, blocks) <= room:
        return ids, labels
    last = max(i for i, label in enumerate(labels) if label != IGNORE) + 1
    runs = list(_runs(ids[:last], labels[:last], blocks))
    room -= sum(blocks[run[0]] for kind, run in runs if kind == BLOCK)
    if 16 * len(runs) > room:  # too little room for every turn: the last one alone is trained
        answer = len(runs[-1][1])
        untrained = [IGNORE] * (last - answer) + labels[last - answer : last]
        runs = list(_runs(ids[:last], untrained, blocks))
    prompts = [len(run) for kind, run in runs if kind == READ]
    answers = [len(run) for kind, run in runs if kind == TRAINED]
    kept = min(sum(prompts), max(room - sum(answers), room // 4))
    caps = {READ: _cap(prompts, kept), TRAINED: _cap(answers, room - kept), BLOCK: 1}
    ids = []
    labels = []
    for kind, run in runs:
        cut = _cut_tail if kind == TRAINED else _cut_middle
        run = cut(tokenizer, run, caps[kind])
        labels += run if kind == TRAINED else [IGNORE] * len(run)
        ids += run
    return ids, labels


READ, TRAINED, BLOCK = range(3)


def _runs(ids, labels, blocks):
    """(READ, TRAINED or BLOCK, ids) of neighbours that are treated alike; a block stands alone."""
    for trained, run in runs_of(ids, labels):
        if trained:
            yield TRAINED, run
            continue
        start = 0
        for i, token in enumerate(run):
            if token in blocks:
                if start < i:
                    yield READ, run[start:i]
                yield BLOCK, run[i : i + 1]
                start = i + 1
        if start < len(run):
            yield READ, run[start:]


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
