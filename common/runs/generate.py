"""Answer prompts with a model that is being trained: batched, spread over the ranks, the same under
every engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from common import cli, device
from common.data.labels import turn_end_ids, written_answer
from common.data.progress import Progress
from common.data.spelling import encode_text, text_start
from common.runs import memory
from common.runs.engine import engine
from common.runs.flags import learned_positions
from common.runs.metrics import answer_match, with_plain_calls
from common.runs.report import parameters

SHARE_FOR_WEIGHTS = 0.8  # of the free memory; the rest is for caches
BROKEN = "\ufffd"  # what decode() makes of bytes that are no character


def answer_text(tokenizer, ids) -> str:
    """Token ids of an answer -> its text; a character of which only the first bytes are there is
    left out."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip(BROKEN)


def end_token_ids(model, tokenizer) -> list[int]:
    """Ids that end an answer: the tokenizer's eos, those of the model's generation config, and the
    token with which the chat template ends a turn, which may be another one."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *own, *turn_end_ids(tokenizer)} - {None})


def remember_ends(model, tokenizer) -> None:
    """All of `end_token_ids` into the generation config that is saved with the model, so that other
    programs stop there too. tokenizer: or a processor that has one."""
    if not hasattr(tokenizer, "eos_token_id"):
        tokenizer = tokenizer.tokenizer
    ends = end_token_ids(model, tokenizer)
    if ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


# ---- ZeRO-3 --------------------------------------------------------------------------------------


def weights_fit(model) -> bool:
    """Whether every rank has room for all weights of a model that ZeRO-3 has spread. All ranks call
    it."""
    sharing = memory.local_ranks() if device.kind() == "cpu" else 1
    room = SHARE_FOR_WEIGHTS * memory.free_bytes() / sharing
    fit = torch.tensor(int(weight_bytes(model) < room), device=device.device())
    dist.all_reduce(fit, dist.ReduceOp.MIN)
    return bool(fit)


def weight_bytes(model) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())


def with_whole_weights(deepspeed):
    """A context in which each rank has all weights, and no forward gathers them. All ranks enter
    it.

    deepspeed: its engine, under ZeRO-3.
    """
    from deepspeed.runtime.zero import unwrap_model_for_generation

    return unwrap_model_for_generation(deepspeed)


class Asking:
    """A recipe's own measure of a trainer's model, which generates. Under ZeRO-3 each new token
    gathers all weights; here they are gathered once, or, where they do not fit, nothing is asked.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.has_room: bool | None = None  # under ZeRO-3; found out with the first question

    def ask(self, measure: Callable[[], tuple[dict, list]]) -> tuple[dict, list]:
        """What `measure` gives, or nothing of both. All ranks call it."""
        if engine(self.trainer.args) != "zero-3":
            return measure()
        model = self.trainer.model
        fit = weights_fit(model)
        if self.has_room is None:
            self.has_room = fit or cli.given_by_user("eval_generate")
            if not self.has_room:
                cli.say(
                    f"no question is asked before and after: all weights "
                    f"({weight_bytes(model) / 2**30:.1f} GiB) do not fit the free memory of one "
                    "device, and would be gathered for each new token. --eval_generate 8 asks all "
                    "the same"
                )
        if not self.has_room:
            return {}, []
        with with_whole_weights(self.trainer.deepspeed) if fit else nullcontext():
            return measure()


# ---- answers -------------------------------------------------------------------------------------


@torch.no_grad()
def generate_answers(
    model,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int = 64,
    batch_size: int | None = None,
) -> list[str]:
    """Greedy answers in the order of `prompts` (token ids of any lengths). All ranks call it and
    get all answers.

    batch_size: default 32, of models above a billion parameters 8: their caches take gigabytes.
    Rows are padded on the left; generation stops at `end_token_ids`.
    """
    if batch_size is None:
        batch_size = 32 if parameters(model)["total"] < 1e9 else 8
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    mine = list(range(rank, len(prompts), world))
    per_rank = -(-len(prompts) // world)
    # equal work: ZeRO-3 needs all ranks in every forward
    mine += [len(prompts) - 1] * (per_rank - len(mine))
    mine.sort(key=lambda i: len(prompts[i]))

    was_training = model.training
    used_cache = model.config.use_cache
    model.eval()
    model.config.use_cache = True
    answers: dict[int, str] = {}
    with Progress("generate", total=len(mine), unit="answers") as progress:
        for start in range(0, len(mine), batch_size):
            chosen = mine[start : start + batch_size]
            ids = _generate(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens)
            texts = [answer_text(tokenizer, row) for row in ids]
            answers |= dict(zip(chosen, texts, strict=True))
            progress.update(len(chosen))
    model.train(was_training)
    model.config.use_cache = used_cache

    if world > 1:
        cli.wait_for_all("it generates answers")
        shares: list = [None] * world
        dist.all_gather_object(shares, answers)
        for share in shares:
            answers |= share
    return [answers[i] for i in range(len(prompts))]


def _generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> torch.Tensor:
    """B prompts -> new token ids [B, N]."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    positions = learned_positions(model.config)
    if positions:  # there are no more
        max_new_tokens = min(max_new_tokens, max(1, positions - width))
    where = model.device if model.device.type != "meta" else torch.device("cpu")
    out = model.generate(
        input_ids=ids.to(where),
        attention_mask=mask.to(where),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=end_token_ids(model, tokenizer),
        synced_gpus=is_deepspeed_zero3_enabled(),
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return out[:, width:]


def pick_eval_rows(held_out, encoded, count: int) -> list[str]:
    """At most `count` held-out rows (canonical JSON), evenly spread, of those that were encoded
    whole.

    Args:
        held_out: rows as read, columns row and source.
        encoded: their token rows, columns source and truncated; some may be missing.
    """
    # of several rows of one source none may be cut
    cut = {row["source"] for row in encoded if row["truncated"]}
    whole = {row["source"] for row in encoded} - cut
    rows = [row["row"] for row in held_out if row["source"] in whole]
    every = max(1, len(rows) // max(1, count))
    return rows[::every][:count]


def answer_eval_rows(
    model, tokenizer, rows: list[str], encode: Callable, max_new_tokens: int
) -> tuple[dict, list[dict]]:
    """Greedy answers to the last turn of chat rows against what stands there. Every rank calls it.

    Args:
        rows: canonical chat rows (JSON).
        encode: (messages, tools) -> token ids that generation starts from.
    Returns:
        {"exact_match", "rouge_l"} and [{"messages", "tools", "prompt", "reference", "answer"}]; a
        thought before the answer is left out. Tool calls are compared as calls: the order of keys,
        blanks and escapes do not count.
    """
    loaded = [json.loads(row) for row in rows]
    if not loaded:
        return {}, []
    prompts = [encode(row["messages"][:-1], row.get("tools")) for row in loaded]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens)
    samples = [
        {
            "messages": row["messages"][:-1],
            "tools": row.get("tools"),
            "prompt": row["messages"][-2]["content"],
            "reference": expected_answer(tokenizer, row),
            "answer": answer.split("</think>")[-1].strip(),
        }
        for row, answer in zip(loaded, answers, strict=True)
    ]
    found = [with_plain_calls(sample["answer"]) for sample in samples]
    wanted = [with_plain_calls(sample["reference"]) for sample in samples]
    return answer_match(found, wanted), samples


def expected_answer(tokenizer, row: dict) -> str:
    """The last answer of a canonical chat row without its thought; a tool call is written as the
    chat template writes it."""
    last = row["messages"][-1]
    text = last["content"]
    if last.get("tool_calls"):
        text = written_answer(tokenizer, row["messages"], row.get("tools"))
    return text.split("</think>")[-1].strip()


def continue_eval_rows(
    model,
    tokenizer,
    rows: list[str],
    max_new_tokens: int,
    share: float = 0.3,
    start: list[int] | None = None,
) -> tuple[dict, list]:
    """Greedy continuations of the beginning of held-out documents, to look at. Every rank calls it.

    Args:
        rows: canonical text rows (JSON); share: part of a document's tokens (at most 64) that is
            given.
        start: the ids that documents begin with in training, default as in encode_text.
    Returns:
        {} (the loss on held-out text is the measure) and samples as in `answer_eval_rows`.
    """
    samples = []
    prompts = []
    start = text_start(tokenizer) if start is None else start
    for row in rows:
        ids = encode_text(tokenizer, json.loads(row)["text"], start=[])
        cut = min(64, max(1, round(share * len(ids))))
        given = tokenizer.decode(ids[:cut])
        sample = {
            "messages": [{"role": "user", "content": given}],
            "tools": None,
            "prompt": given,
            "reference": tokenizer.decode(ids[cut : cut + max_new_tokens]),
        }
        samples.append(sample)
        prompts.append([*start, *ids[:cut]])
    if prompts:
        answers = generate_answers(model, tokenizer, prompts, max_new_tokens)
        for sample, answer in zip(samples, answers, strict=True):
            sample["answer"] = answer
    return {}, samples
