"""Answers that a policy samples, with the log-probs that they were drawn with.

They come from engine/groups.py (with tools in the loop from engine/generation.py): the prompt of a
group is computed once, rows are refilled as answers end, and each token has its log-prob under
exactly the distribution that it was drawn from. These are the pi_old of the losses, so no second
pass is needed; `refuse_disagreement` checks at the start of a run that the policy computes the same
ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from engine.generation import Engine, Request, Sampling
from engine.groups import Groups
from engine.weight_first import weight_first
from rl.prompts import Prompt
from toolcall.play import play
from toolcall.registry import Registry

from common import cli
from common.runs.generate import answer_text, end_token_ids

# largest mean difference of two log-probs of a token: rounding, not another distribution
AGREE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass
class Answer:
    """tokens: the end token is among them; log_probs: of each; trained: whether each counts in the
    loss (not what a tool said); finished: "stop", or why it was cut; text: without special tokens;
    calls: of tools."""

    prompt: Prompt
    tokens: list[int]
    log_probs: list[float]
    finished: str
    text: str
    trained: list[bool] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self):
        self.trained = self.trained or [True] * len(self.tokens)

    @property
    def is_cut(self) -> bool:
        return self.finished != "stop"


class Sampler:
    """Samples from `model`; in half precision from a copy of its weights, renewed for each
    rollout, which is when the cache is there. registry: tools that it may call, None without."""

    def __init__(
        self,
        model,
        tokenizer,
        args,
        dtype: torch.dtype,
        seed: int,
        registry: Registry | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.args = args
        self.seed = seed
        self.registry = registry
        self.ends = frozenset(end_token_ids(model, tokenizer))
        self.copy = model
        self.is_half = dtype is not torch.float32
        if self.is_half:
            self.copy = copy.deepcopy(model).requires_grad_(False).to(dtype)
        if model.device.type == "cpu":
            self.copy = weight_first(self.copy)

    @torch.no_grad()
    def renew(self) -> None:
        if self.is_half:
            pairs = zip(self.copy.parameters(), self.model.parameters(), strict=True)
            for ours, theirs in pairs:
                ours.copy_(theirs)

    def play(self, prompts: dict[int, Prompt], step: int) -> list[Answer]:
        """group_size answers to each prompt, in order. prompts: by their place in the step, which
        with the step's number is the seed: an answer is the same on any process."""
        asked = [
            (prompt, f"{self.seed}:{step}:{place}:{i}")
            for place, prompt in prompts.items()
            for i in range(self.args.group_size)
        ]
        return self.answers(asked, self.args.temperature)

    def greedy(self, prompts: list[Prompt]) -> list[Answer]:
        return self.answers([(prompt, "") for prompt in prompts], 0.0)

    def answers(self, asked: list[tuple[Prompt, str]], temperature: float) -> list[Answer]:
        """asked: prompts, and the seeds of their answers."""
        how = Sampling(self.args.max_new_tokens, temperature, ends=self.ends, log_probs=True)
        self.renew()
        if self.registry is not None:
            return self.with_tools(asked, how)
        requests = [Request(prompt.ids, replace(how, seed=seed)) for prompt, seed in asked]
        of_prompt: dict[int, list[Request]] = {}
        for (prompt, _), request in zip(asked, requests, strict=True):
            of_prompt.setdefault(id(prompt), []).append(request)
        groups = Groups(self.copy, self.args.slots, self.args.model_max_length)
        groups.answer([*of_prompt.values()])
        return [
            Answer(
                prompt,
                request.tokens,
                request.log_probs,
                request.finished,
                answer_text(self.tokenizer, request.tokens),
            )
            for (prompt, _), request in zip(asked, requests, strict=True)
        ]

    def with_tools(self, asked: list, how: Sampling) -> list[Answer]:
        """Conversations as one batch, turn by turn; what a tool says, and the template's own tokens
        around it, are not trained. The text is that of the last answer."""
        conversations = [
            {"messages": prompt.extra["messages"], "tools": prompt.extra["tools"], "seed": seed}
            for prompt, seed in asked
        ]
        args = self.args
        engine = Engine(self.copy, args.slots, args.model_max_length, share_beginnings=False)
        played = play(engine, self.tokenizer, conversations, self.registry, args.max_turns, how)
        for episode in played:
            if episode.problem:
                raise SystemExit(f"conversations with tools cannot be played: {episode.problem}")
        return [
            Answer(
                prompt,
                episode.tokens,
                episode.log_probs,
                episode.finished,
                episode.answer,
                episode.written,
                len(episode.calls),
            )
            for (prompt, _), episode in zip(asked, played, strict=True)
        ]


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
