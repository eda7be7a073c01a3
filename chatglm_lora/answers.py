"""Questions in any common shape -> answers, in batches. An answer depends on its question and the
settings alone.

    loaded = load("output/chatglm_lora")
    answer(loaded, ["你是谁？", {"instruction": "换成数字", "input": "十二"}], max_new_tokens=64)

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from placement import Loaded
from questions import Question, batches, question
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common import device
from common.data.labels import encode_prompt
from common.runs.generate import answer_text, end_token_ids


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
    makes_sense = {
        "batch_size": s.batch_size >= 1,
        "max_new_tokens": s.max_new_tokens >= 1,
        "temperature": s.temperature == 0 or 0.01 <= s.temperature <= 100,
        "top_p": 0 < s.top_p <= 1,
        "top_k": s.top_k >= 0,
        "repetition_penalty": s.repetition_penalty > 0,
    }
    for name, good in makes_sense.items():
        if not good:
            raise SystemExit(f"--{name} {getattr(s, name)} makes no sense")
    if s.max_new_tokens > window // 2:
        raise SystemExit(
            f"--max_new_tokens {s.max_new_tokens}: the model's window is {window} tokens for "
            f"question and answer; at most {window // 2}"
        )


# ---- questions -> records ------------------------------------------------------------------------


def answer(loaded: Loaded, questions: list, **settings) -> list[dict]:
    """Answers in the order of `questions`: texts, lists of messages, or rows of any shape that
    `infer.py` reads.

    settings: the fields of Settings. Each result has answer, tokens and finish_reason, or error;
        see `answer_batch`.
    """
    wanted = Settings(**settings)
    check(wanted, loaded.window)
    asked = [question(one, row, f"question {row}") for row, one in enumerate(questions)]
    records = {q.row: record(q, {"error": q.error}) for q in asked if q.error}
    for batch in batches(asked, wanted.batch_size):
        for done in answer_batch(loaded, batch, wanted):
            records[done["row"]] = done
    return [records[row] for row in range(len(asked))]


def record(q: Question, outcome: dict) -> dict:
    """What is written for a question: row, source, messages, then `outcome`, then the reference it
    came with."""
    written = {"row": q.row, "source": q.source}
    if q.messages:
        written["messages"] = q.messages
    written |= outcome
    if q.reference:
        written["reference"] = q.reference
    return written


def answer_batch(
    loaded: Loaded, batch: list[Question], settings: Settings, too_large: set | None = None
) -> list[dict]:
    """B questions -> B records with answer, tokens (of the answer), finish_reason ("stop" or
    "length"), or an error.

    shortened: true where the question did not fit: its oldest rounds, then the middle of what is
        left, are cut out.
    too_large: a set to keep over calls, in which sizes that ran out of memory are remembered.
    """
    if too_large is None:
        too_large = set()
    outcomes: dict[int, dict] = {}
    prompts: dict[int, list[int]] = {}
    shortened = set()
    for q in batch:
        try:
            ids, is_cut = fit(loaded, q, settings)
        except ValueError as error:  # the chat template refuses it
            outcomes[q.row] = {"error": " ".join(str(error).split())[:300]}
            continue
        prompts[q.row] = ids
        if is_cut:
            shortened.add(q.row)
    for row, ids, ended in _halving(loaded, list(prompts), prompts, settings, too_large):
        if ids is None:
            outcomes[row] = {"error": f"out of memory ({len(prompts[row])} tokens asked)"}
            continue
        outcomes[row] = {
            "answer": answer_text(loaded.tokenizer, ids).strip(),
            "tokens": len(ids),
            "finish_reason": "stop" if ended else "length",
        }
        if row in shortened:
            outcomes[row]["shortened"] = True
    return [record(q, outcomes[q.row]) for q in batch]


def fit(loaded: Loaded, q: Question, settings: Settings) -> tuple[list[int], bool]:
    """-> (token ids that generation starts from, whether anything was left out). ValueError from
    the template."""
    room = loaded.window - settings.max_new_tokens
    messages = q.messages
    if settings.system_prompt.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": settings.system_prompt}, *messages]
    head = 1 if messages[0]["role"] == "system" else 0
    ids = encode_prompt(loaded.tokenizer, messages, q.tools)
    if len(ids) <= room:
        return ids, False
    while len(ids) > room:
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        later = [i for i in users if i > head]
        if not later:  # a single round: its middle is cut out
            front = room // 2
            back = len(ids) - (room - front)
            return ids[:front] + ids[back:], True
        messages = messages[:head] + messages[later[0] :]
        ids = encode_prompt(loaded.tokenizer, messages, q.tools)
    return ids, True


# ---- memory --------------------------------------------------------------------------------------


def _halving(
    loaded: Loaded,
    rows: list[int],
    prompts: dict[int, list[int]],
    settings: Settings,
    too_large: set,
) -> Iterator[tuple]:
    """Yield (row, ids or None, ended); a batch that memory does not hold is answered in halves.

    What is known not to fit is not tried again; so the halves are the same after a resumed start.
    """
    if not rows:
        return
    width = max(len(prompts[row]) for row in rows)
    fits = not any(len(rows) >= count and width >= tokens for count, tokens in too_large)
    answers = _generate_if_it_fits(loaded, rows, prompts, settings) if fits else None
    if answers is not None:
        yield from answers
        return
    too_large.add((len(rows), width))
    if len(rows) == 1:
        yield rows[0], None, False
        return
    half = -(-len(rows) // 2)
    yield from _halving(loaded, rows[:half], prompts, settings, too_large)
    yield from _halving(loaded, rows[half:], prompts, settings, too_large)


def _generate_if_it_fits(
    loaded: Loaded, rows: list[int], prompts: dict[int, list[int]], settings: Settings
) -> list[tuple] | None:
    """`_generate`, or None where memory does not hold the batch."""
    try:
        return _generate(loaded, rows, [prompts[row] for row in rows], settings)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if loaded.count > 1:  # the other ranks wait inside a collective
        raise SystemExit(f"out of memory with {len(rows)} rows: a smaller --batch_size")
    if device.kind() != "cpu":
        device.module().empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


# ---- generation ----------------------------------------------------------------------------------


@torch.inference_mode()
def _generate(
    loaded: Loaded, rows: list[int], prompts: list[list[int]], settings: Settings
) -> list[tuple]:
    """B prompts -> [(row, new ids without the end token, whether it ended)]; padded on the left."""
    ends = end_token_ids(loaded.model, loaded.tokenizer)
    pad = loaded.tokenizer.pad_token_id
    if pad is None:
        pad = ends[0]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    ids = ids.to(loaded.device)
    mask = mask.to(loaded.device)
    processors = LogitsProcessorList()
    if settings.temperature or settings.repetition_penalty != 1:
        processors.append(Choose(mask, rows, settings))
    out = loaded.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=settings.max_new_tokens,
        # greedy: what is drawn, `Choose` has drawn before
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=pad,
        logits_processor=processors,
        synced_gpus=loaded.count > 1,
    )
    answers = []
    for row, new in zip(rows, out[:, width:].tolist(), strict=True):
        end = next((i for i, token in enumerate(new) if token in ends), None)
        answers.append((row, new[:end], end is not None))
    return answers


class Choose(LogitsProcessor):
    """Penalty and drawing for each row by itself.

    Those of generate() count padding as seen, and all rows share one generator, so that an answer
    would depend on its neighbours.
    """

    def __init__(self, mask: Tensor, rows: list[int], settings: Settings):
        """mask: [B, T], 0 on the padding of the prompts; rows: their numbers, which seed them."""
        self.mask = mask
        self.settings = settings
        self.generators = [random.Random(f"{settings.seed}:{row}") for row in rows]
        self.narrow = LogitsProcessorList()
        if settings.temperature:
            self.narrow.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            self.narrow.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.narrow.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, T so far], logits [B, V] -> [B, V]; when drawing, all but the drawn token are
        -inf."""
        if self.settings.repetition_penalty != 1:
            scores = self.penalised(input_ids, scores)
        if self.settings.temperature:
            scores = self.drawn(input_ids, scores)
        return scores

    def penalised(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits of tokens that prompt or answer have: divided by the penalty, multiplied where
        they are negative."""
        new = torch.ones_like(input_ids[:, self.mask.shape[1] :])
        real = torch.cat([self.mask, new], 1).to(scores)
        seen = torch.zeros_like(scores).scatter_add(1, input_ids, real) > 0
        penalty = self.settings.repetition_penalty
        factor = torch.where(scores > 0, 1 / penalty, penalty)
        return torch.where(seen, scores * factor, scores)

    def drawn(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One token of each row, the first at which the sum of chances passes the row's number."""
        chances = self.narrow(input_ids, scores).float().softmax(-1)
        sums = chances.cumsum(-1)
        numbers = [[generator.getrandbits(24) / 2**24] for generator in self.generators]
        threshold = torch.tensor(numbers, device=scores.device) * sums[:, -1:]
        passed = (sums > threshold) & (chances > 0)
        likeliest = chances.argmax(-1)  # where rounding leaves none
        token = torch.where(passed.any(-1), passed.int().argmax(-1), likeliest)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
