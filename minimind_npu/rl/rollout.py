"""Answers that a policy samples, with the log-probs that they were drawn with.

They come from the engine (engine/generation.py): slots that are refilled as rows end, the prompt of
a group computed once, and for each token its log-prob under exactly the distribution that it was
drawn from. These are the pi_old of the losses, so no second pass is needed; `refuse_disagreement`
checks at the start of a run that the policy computes the same ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from engine.generation import Engine, Sampling
from rl.prompts import Prompt

from common import cli
from common.runs.generate import answer_text, end_token_ids

# largest mean difference of two log-probs of a token: rounding, not another distribution
AGREE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass
class Answer:
    """tokens: the end token is among them; log_probs: of each; trained: whether each counts in the
    loss (not what a tool said); finished: "stop", or "length" where it was cut; text: without
    special tokens."""

    prompt: Prompt
    tokens: list[int]
    log_probs: list[float]
    finished: str
    text: str
    trained: list[bool] = field(default_factory=list)

    def __post_init__(self):
        self.trained = self.trained or [True] * len(self.tokens)

    @property
    def is_cut(self) -> bool:
        return self.finished != "stop"


class Sampler:
    """Samples from `model`; in half precision from a copy of its weights, renewed for each
    rollout."""

    def __init__(self, model, tokenizer, args, dtype: torch.dtype, seed: int):
        self.model = model
        self.tokenizer = tokenizer
        self.args = args
        self.seed = seed
        self.ends = frozenset(end_token_ids(model, tokenizer))
        self.copy = model
        if dtype is not torch.float32:
            self.copy = copy.deepcopy(model).requires_grad_(False).to(dtype)

    @torch.no_grad()
    def renew(self) -> None:
        if self.copy is not self.model:
            pairs = zip(self.copy.parameters(), self.model.parameters(), strict=True)
            for ours, theirs in pairs:
                ours.copy_(theirs)

    def engine(self) -> Engine:
        """A new one: its cache is only there during a rollout."""
        self.renew()
        return Engine(self.copy, self.args.slots, self.args.model_max_length)

    def play(self, prompts: dict[int, Prompt], step: int) -> list[Answer]:
        """group_size answers to each prompt, in order. prompts: by their place in the step, which
        with the step's number is the seed: an answer is the same on any process."""
        engine = self.engine()
        asked = []
        for place, prompt in prompts.items():
            for i in range(self.args.group_size):
                how = self.sampling(f"{self.seed}:{step}:{place}:{i}")
                asked.append((prompt, engine.submit(prompt.ids, how)))
        while engine.step():
            pass
        return [self.answer(prompt, request) for prompt, request in asked]

    def greedy(self, prompts: list[Prompt]) -> list[Answer]:
        engine = self.engine()
        how = Sampling(self.args.max_new_tokens, ends=self.ends)
        asked = [(prompt, engine.submit(prompt.ids, how)) for prompt in prompts]
        while engine.step():
            pass
        return [self.answer(prompt, request) for prompt, request in asked]

    def sampling(self, seed: str) -> Sampling:
        return Sampling(
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature,
            seed=seed,
            ends=self.ends,
            log_probs=True,
        )

    def answer(self, prompt: Prompt, request) -> Answer:
        text = answer_text(self.tokenizer, request.tokens)
        return Answer(prompt, request.tokens, request.log_probs, request.finished, text)


def refuse_disagreement(sampled: torch.Tensor, computed: torch.Tensor, dtype: torch.dtype) -> None:
    """End a run whose sampler draws from another distribution than the policy is trained in: its
    ratios would be wrong from the first update on.

    sampled, computed: log-probs of the same tokens, [N].
    """
    difference = (sampled - computed).abs()
    mean = difference.mean().item()
    cli.say(
        f"log-probs of {len(sampled):,} sampled tokens: sampler and policy differ by {mean:.1e} on "
        f"average, by {difference.max():.1e} at most"
    )
    if not mean <= AGREE[dtype]:
        raise SystemExit(
            f"the sampler's log-probs differ from the policy's by {mean:.3f} a token on average "
            f"(allowed in {str(dtype).removeprefix('torch.')}: {AGREE[dtype]}); stopped. "
            "--bf16 false computes both in float32"
        )
