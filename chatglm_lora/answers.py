"""Questions in any common shape -> answers, in batches. An answer depends on its question and the
settings alone.

    loaded = load("output/chatglm_lora")
    answer(loaded, ["你是谁？", {"instruction": "换成数字", "input": "十二"}], max_new_tokens=64)

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

import torch
from placement import Loaded
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common import device
from common.data import files, shapes
from common.data.labels import encode_prompt
from common.data.shapes import BadRow

ANSWERS = ("output", "answer", "summary", "target", "response", "completion", "output_zh")
DIALOGUES = shapes.DIALOGUES
WINDOW = 32  # batches that are sorted by length together


@dataclass
class Settings:
    batch_size: int = field(
        default=8, metadata={"help": "rows at once; halved by itself where memory is short"}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "length limit of an answer"})
    temperature: float = field(default=0.0, metadata={"help": "0: always the likeliest token"})
    top_p: float = field(
        default=1.0, metadata={"help": "draw among the likeliest tokens of this total probability"}
    )
    top_k: int = field(default=0, metadata={"help": "draw among so many likeliest tokens; 0: all"})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1: tokens seen before are less likely"}
    )
    seed: int = field(default=0, metadata={"help": "of the drawing; every row has its own numbers"})
    system_prompt: str = field(
        default="", metadata={"help": "put before rows without a system text"}
    )


def check(settings: Settings, window: int) -> None:
    """SystemExit for settings that make no sense with a model of `window` tokens."""
    s = settings
    ranges = {
        "batch_size": s.batch_size >= 1,
        "max_new_tokens": s.max_new_tokens >= 1,
        "temperature": s.temperature == 0 or 0.01 <= s.temperature <= 100,
        "top_p": 0 < s.top_p <= 1,
        "top_k": s.top_k >= 0,
        "repetition_penalty": s.repetition_penalty > 0,
    }
    for name, good in ranges.items():
        if not good:
            raise SystemExit(f"--{name} {getattr(s, name)} makes no sense")
    if s.max_new_tokens > window // 2:
        raise SystemExit(
            f"--max_new_tokens {s.max_new_tokens}: the model's window is {window} tokens for question and answer; "
            f"at most {window // 2}"
        )


# ---- questions --------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """row: its number, from 0; source: file:line. Either messages, or an error that says why there
    are none."""

    row: int
    source: str
    messages: list[dict] = field(default_factory=list)
    tools: list | None = None
    reference: str | None = None
    error: str | None = None

    @property
    def length(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


def read(paths, column_map: str = "", limit: int | None = None) -> Iterator[Question]:
    """Questions of files and folders (see common/data/files.py for kinds and encodings), bad rows
    among them."""
    from common.data.load import _columns

    renames = _columns(column_map)
    number = 0
    for path, weight in files.entries(paths):
        if weight is not None:
            raise SystemExit(
                f"{path}:{weight}: questions have no weights; every one is answered once"
            )
        for file in files.data_files(path)[0]:
            encoding = files.encoding_of(file)
            for line, record in files.records(file, encoding):
                if number == limit:
                    return
                yield question(record, number, f"{file}:{line}", renames, encoding)
                number += 1


def question(
    record, row: int, source: str, renames: dict | None = None, encoding: str = "utf-8"
) -> Question:
    """One record, text or list of messages -> Question."""
    from common.data.load import _renamed, _spelled

    try:
        if isinstance(record, BadRow):
            raise record
        record = {"prompt": record} if isinstance(record, str) else record
        record = {"messages": record} if isinstance(record, list) else record
        if not isinstance(record, dict):
            raise BadRow("not an object", type(record).__name__)
        renames = (
            renames if renames and not renames.keys().isdisjoint(record) else {}
        )  # files may differ
        asked, reference = _asked(_renamed(record, renames))
        _spelled(asked, encoding)
    except BadRow as bad:
        return Question(row, source, error=bad.reason + (f" ({bad.detail})" if bad.detail else ""))
    return Question(row, source, asked["messages"], asked.get("tools"), reference)


def _asked(record: dict) -> tuple[dict, str | None]:
    """A record -> (canonical chat row without its last answer, that answer or None).

    The shapes of common/data/shapes.py have an answer; where it is missing, one is put in for the
    conversion.
    """
    given = {k: v for k, v in record.items() if not (k in ANSWERS and _blank(v))}
    given = {"prompt": given["text"]} if set(given) == {"text"} else given
    shape = shapes.detect("chat", [given])
    if shape and not any(isinstance(given.get(name), list) for name in DIALOGUES):
        messages = shape.convert(given)
        return messages | {"messages": messages["messages"][:-1]}, messages["messages"][-1][
            "content"
        ]
    for name in DIALOGUES:
        if isinstance(given.get(name), list) and given[name]:
            turns, reference = _open(given[name])
            given[name] = turns
            break
    else:
        given, reference = given | {name: "?" for name in ANSWERS if name not in given}, None
    shape = shapes.detect("chat", [given])
    if shape is None:
        seen = ", ".join(str(name)[:40] for name in list(record)[:8])
        raise BadRow(
            "no question found", f"columns: {seen}; name yours with --column_map instruction=YOURS"
        )
    messages = shape.convert(given)
    return messages | {"messages": messages["messages"][:-1]}, reference


def _open(turns: list) -> tuple[list, str | None]:
    """Turns of a dialogue -> (turns with an answer at the end, the answer that stood there or
    None)."""
    last = turns[-1]
    if not isinstance(last, dict):
        raise BadRow("a turn is not an object", type(last).__name__)
    if "human" in last:
        answer = last.get("assistant")
        return (
            (turns, answer)
            if not _blank(answer)
            else ([*turns[:-1], last | {"assistant": "?"}], None)
        )
    who = str(last.get("role") or last.get("from")).lower()
    if shapes.ROLES.get(who) != "assistant":
        return [*turns, {"role": "assistant", "content": "?"}], None
    said = next((last[name] for name in ("content", "value", "text") if name in last), None)
    return (
        ([*turns[:-1], {"role": "assistant", "content": "?"}], None)
        if _blank(said)
        else (turns, said)
    )


def _blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Fixed batches of `size` good questions of like length, longest first within windows of 32
    batches."""
    good = [q for q in questions if q.error is None]
    for start in range(0, len(good), WINDOW * size):
        window = sorted(good[start : start + WINDOW * size], key=lambda q: (-q.length, q.row))
        yield from (window[i : i + size] for i in range(0, len(window), size))


# ---- answers ----------------------------------------------------------------------------------------------------


def answer(loaded: Loaded, questions: list, **settings) -> list[dict]:
    """Answers in the order of `questions`: texts, lists of messages, or rows of any shape that
    `infer.py` reads.

    settings: the fields of Settings. Each result has answer, tokens and finish_reason, or error;
        see `answer_batch`.
    """
    wanted = Settings(**settings)
    check(wanted, loaded.window)
    asked = [question(q, i, f"question {i}") for i, q in enumerate(questions)]
    found = {q.row: record(q, {"error": q.error}) for q in asked if q.error}
    for batch in batches(asked, wanted.batch_size):
        found |= {done["row"]: done for done in answer_batch(loaded, batch, wanted)}
    return [found[row] for row in range(len(asked))]


def record(q: Question, outcome: dict) -> dict:
    """What is written for a question: row, source, messages, then `outcome`, then the reference it
    came with."""
    asked = {"messages": q.messages} if q.messages else {}
    return (
        {"row": q.row, "source": q.source}
        | asked
        | outcome
        | ({"reference": q.reference} if q.reference else {})
    )


def answer_batch(
    loaded: Loaded, batch: list[Question], settings: Settings, costs: set | None = None
) -> list[dict]:
    """B questions -> B records with answer, tokens (of the answer), finish_reason ("stop" or
    "length"), or an error.

    shortened: true where the question did not fit: its oldest rounds, then the middle of what is
        left, are cut out.
    costs: a set to keep over calls, in which sizes that ran out of memory are remembered.
    """
    prompts, found = {}, {}
    for q in batch:
        try:
            prompts[q.row] = fit(loaded, q, settings)
        except ValueError as error:
            found[q.row] = {"error": " ".join(str(error).split())[:300]}
    rows_left = [q.row for q in batch if q.row in prompts]
    for row, ids, ended in _halving(
        loaded, rows_left, prompts, settings, set() if costs is None else costs
    ):
        if ids is None:
            found[row] = {"error": f"out of memory ({len(prompts[row][0])} tokens asked)"}
            continue
        text = loaded.tokenizer.decode(ids, skip_special_tokens=True).strip()
        found[row] = {
            "answer": text,
            "tokens": len(ids),
            "finish_reason": "stop" if ended else "length",
        }
        found[row] |= {"shortened": True} if prompts[row][1] else {}
    return [record(q, found[q.row]) for q in batch]


def fit(loaded: Loaded, q: Question, settings: Settings) -> tuple[list[int], bool]:
    """-> (token ids that generation starts from, whether anything was left out). ValueError from
    the template."""
    messages, room = q.messages, loaded.window - settings.max_new_tokens
    if settings.system_prompt.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": settings.system_prompt}, *messages]
    head, shortened = int(messages[0]["role"] == "system"), False
    while True:
        ids = encode_prompt(loaded.tokenizer, messages, q.tools)
        if len(ids) <= room:
            return ids, shortened
        users = [i for i, message in enumerate(messages) if message["role"] == "user" and i > head]
        shortened = True
        if not users:
            tail = room - room // 2
            return ids[: room // 2] + ids[len(ids) - tail :], shortened
        messages = messages[:head] + messages[users[0] :]


def _halving(loaded: Loaded, chosen: list[int], prompts: dict, settings: Settings, costs: set):
    """Yield (row, ids or None, ended); a batch that memory does not hold is answered in halves.

    What is known not to fit is not tried again; so the halves are the same after a resumed start.
    """
    if not chosen:
        return
    cost = (len(chosen), max(len(prompts[row][0]) for row in chosen))
    if not any(cost[0] >= n and cost[1] >= width for n, width in costs):
        try:
            yield from _generate(loaded, chosen, [prompts[row][0] for row in chosen], settings)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if loaded.count > 1:  # the other ranks wait inside a collective
                raise SystemExit(
                    f"out of memory with {len(chosen)} rows: a smaller --batch_size"
                ) from None
        costs.add(cost)
        if device.kind() != "cpu":
            device.module().empty_cache()
    if len(chosen) == 1:
        yield chosen[0], None, False
        return
    half = -(-len(chosen) // 2)
    yield from _halving(loaded, chosen[:half], prompts, settings, costs)
    yield from _halving(loaded, chosen[half:], prompts, settings, costs)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


@torch.inference_mode()
def _generate(
    loaded: Loaded, chosen: list[int], prompts: list[list[int]], settings: Settings
) -> list[tuple]:
    """B prompts -> [(row, new ids without the end token, whether it ended)]; padded on the left."""
    tokenizer, model = loaded.tokenizer, loaded.model
    own = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop)
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    kept = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        kept[i, width - len(prompt) :] = 1
    ids, kept = ids.to(loaded.device), kept.to(loaded.device)
    choose = (
        [Choose(kept, chosen, settings)]
        if settings.temperature or settings.repetition_penalty != 1
        else []
    )
    out = model.generate(
        input_ids=ids,
        attention_mask=kept,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=sorted(stop),
        pad_token_id=pad,
        logits_processor=LogitsProcessorList(choose),
        synced_gpus=loaded.count > 1,
    )[:, width:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in stop), None) for row in out]
    return [
        (row, new[:end], end is not None) for row, new, end in zip(chosen, out, ends, strict=True)
    ]


class Choose(LogitsProcessor):
    """Penalty and drawing for each row by itself: generate()'s own count padding as seen and share
    one generator."""

    def __init__(self, kept: Tensor, chosen: list[int], settings: Settings):
        """kept: [B, T], 0 on the padding of the prompts; chosen: numbers of the rows, which seed
        them."""
        self.kept, self.settings = kept, settings
        self.numbers = [random.Random(f"{settings.seed}:{row}") for row in chosen]
        warm = [TemperatureLogitsWarper(settings.temperature)] if settings.temperature else []
        warm += [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        self.narrow = LogitsProcessorList(
            warm + ([TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else [])
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, T so far], logits [B, V] -> [B, V]; when drawing, all but the drawn token are
        -inf."""
        if self.settings.repetition_penalty != 1:
            new = torch.ones_like(input_ids[:, self.kept.shape[1] :])
            seen = (
                torch.zeros_like(scores).scatter_add(
                    1, input_ids, torch.cat([self.kept, new], 1).to(scores)
                )
                > 0
            )
            factor = torch.where(
                scores > 0, 1 / self.settings.repetition_penalty, self.settings.repetition_penalty
            )
            scores = torch.where(seen, scores * factor, scores)
        if not self.settings.temperature:
            return scores
        chances = self.narrow(input_ids, scores).float().softmax(-1)
        sums = chances.cumsum(-1)
        drawn = torch.tensor(
            [[n.getrandbits(24) / 2**24] for n in self.numbers], device=scores.device
        )
        reached = (sums > drawn * sums[:, -1:]) & (chances > 0)
        token = torch.where(reached.any(-1), reached.int().argmax(-1), chances.argmax(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def options() -> list:
    """The fields of Settings, for a command line."""
    return list(fields(Settings))
