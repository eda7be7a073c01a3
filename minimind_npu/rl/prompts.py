"""What a policy is asked: rows -> prompts, and which of them come next."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from evaluation.answers import final_answer
from toolcall.registry import are_known

from common.data.labels import encode_prompt, fingerprint
from common.data.prepare import prepare

COLUMNS = ("input_ids",)


@dataclass(frozen=True)
class Prompt:
    """row: its number among those of its kind; ids: token ids; question: its last turn; reference:
    the answer in the data; ground_truth: what of it counts, in verl's rows whatever stands there;
    data_source: what the row says, else the file; extra_info: of verl's rows."""

    row: int
    ids: list[int]
    question: str
    reference: str
    ground_truth: object
    data_source: str
    extra: dict = field(default_factory=dict)
    extra_info: dict = field(default_factory=dict)

    @property
    def expected(self) -> str:
        """The ground truth in words."""
        return self.ground_truth if isinstance(self.ground_truth, str) else self.reference


def asked_of(row: dict, tools: list[dict] | None) -> tuple[list[dict], list[dict] | None]:
    """A canonical chat row -> (the messages that are asked, the tools that may be called).

    tools: None, or those of a row that names none; then what the row itself did with tools after
        its last question is left out, since the policy is to do that.
    """
    asked = row["messages"][:-1]
    if tools is not None:
        while asked and asked[-1]["role"] != "user":
            asked = asked[:-1]
    return asked, row.get("tools") or tools


def encode(row: dict, tokenizer, room: int, tools: list[dict] | None) -> dict:
    """A canonical chat row -> {"input_ids": of its prompt}; ValueError with the reason for one that
    cannot be asked."""
    if tools is not None and not are_known(row.get("tools") or [], tools):
        raise ValueError("tools that are not there (--tools), so nobody would run them")
    asked, tools = asked_of(row, tools)
    last = row["messages"][-1]
    if last["role"] != "assistant" or not asked:
        raise ValueError("no answer at the end of the conversation")
    if not (last.get("content") or "").strip():
        raise ValueError("an answer without words, so there is nothing to compare with")
    ids = encode_prompt(tokenizer, asked, tools)
    if len(ids) > room:
        raise ValueError("the prompt leaves no room for --max_new_tokens")
    return {"input_ids": ids}


def read(
    args, rows, stats: dict, tokenizer, seed: int, tools: list[dict] | None = None
) -> tuple[Prompts, Prompts]:
    """Rows of load_rows -> (prompts to train on, held-out ones); completes the counts. tools: see
    asked_of."""
    room = args.model_max_length - args.max_new_tokens
    to_tokens = partial(encode, tokenizer=tokenizer, room=room, tools=tools)
    depends_on = [fingerprint(tokenizer), room, tools]
    data = prepare(rows, stats, to_tokens, args, "reward", seed, depends_on, COLUMNS)
    prompts = Prompts(data.train_ids, rows, tools)
    if len(prompts) < args.prompts_per_step:
        raise SystemExit(
            f"{args.data_path}: {len(prompts)} prompts to train on are fewer than the "
            f"--prompts_per_step {args.prompts_per_step} of one step"
        )
    return prompts, Prompts(data.eval_ids, rows, tools)


class Prompts:
    """Made when they are asked for; their tokens stay memory-mapped."""

    def __init__(self, token_rows, rows, tools: list[dict] | None):
        self.token_rows = token_rows
        self.rows = rows
        self.tools = tools
        self.place = {source: i for i, source in enumerate(rows["source"])}

    def __len__(self) -> int:
        return len(self.token_rows)

    def __getitem__(self, number: int) -> Prompt:
        found = self.token_rows[number]
        row = json.loads(self.rows[self.place[found["source"]]]["row"])
        asked, tools = asked_of(row, self.tools)
        reference = row["messages"][-1].get("content") or ""
        file, _, line = found["source"].rpartition(":")
        given = row.get("reward", {})
        return Prompt(
            row=number,
            ids=list(found["input_ids"]),
            question=asked[-1]["content"],
            reference=reference,
            ground_truth=given.get("ground_truth", final_answer(reference)),
            data_source=given.get("data_source", Path(file).stem),
            extra={"line": line, "messages": asked, "tools": tools},
            extra_info=given.get("extra_info", {}),
        )

    def take(self, numbers) -> list[Prompt]:
        return [self[number] for number in numbers]


class Plan:
    """Which prompts the next step asks, and how much of the run is done.

    progress: {"step", "epoch", "at": prompts of this epoch asked by all processes}, which a
        checkpoint keeps.
    """

    def __init__(self, prompts: Prompts, args, training, progress: dict):
        self.prompts = prompts
        self.args = args
        self.progress = progress
        self.seed = training.seed
        self.world = training.world_size
        self.rank = training.process_index
        steps_of_epoch = len(prompts) // args.prompts_per_step
        by_epochs = max(1, int(training.num_train_epochs * steps_of_epoch))
        self.steps = training.max_steps if training.max_steps > 0 else by_epochs

    def describe(self) -> str:
        args = self.args
        updates = args.mini_batches * args.num_iterations
        return (
            f"{args.algorithm}: {len(self.prompts):,} prompts, {args.prompts_per_step} a step with "
            f"{args.group_size} answer(s) each, {updates} update(s) for them, {self.steps:,} steps"
        )

    def total_steps(self) -> int:
        return self.steps

    @property
    def step(self) -> int:
        return self.progress["step"]

    def fraction_done(self) -> float:
        return self.progress["step"] / self.steps

    def next_prompts(self) -> dict[int, Prompt]:
        """Begin the next step: this process's prompts by their place in the step. Prompts of one
        mini-batch follow each other, whatever the number of processes; what is left of an epoch and
        fills no step is left out, other prompts in each epoch."""
        now = self.progress
        size = self.args.prompts_per_step
        if now["at"] + size > len(self.prompts):
            now["epoch"] += 1
            now["at"] = 0
        order = np.random.default_rng([self.seed, now["epoch"]]).permutation(len(self.prompts))
        chosen = order[now["at"] : now["at"] + size].tolist()
        now["at"] += size
        now["step"] += 1
        mine = range(self.rank, size, self.world)
        return {place: self.prompts[chosen[place]] for place in mine}
