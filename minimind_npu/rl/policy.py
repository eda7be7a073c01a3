"""The policy and its batches: answers side by side in one row, the prompt of a group once.

A answers of a micro-batch, N tokens of them, T tokens of the row.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from rl.rollout import Answer
from torch import Tensor, nn

from common.data.spelling import IGNORE
from common.fast import losses, shared_start

INPUTS = (
    "input_ids",
    "position_ids",
    "token_mask",
    "kv_index",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
STEP = 128  # rows are filled up to a multiple: kernels are made for each new length


class Policy(nn.Module):
    """A model, and for ppo a head that values each state, as one module:
    DistributedDataParallel sees every forward."""

    def __init__(self, model, temperature: float, has_values: bool):
        super().__init__()
        model.config._attn_implementation = shared_start.register()
        self.model = model
        self.temperature = temperature
        self.value_head = None
        if has_values:
            where = model.device
            self.value_head = nn.Linear(model.config.hidden_size, 1, device=where)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: dict) -> tuple[Tensor, Tensor | None, Tensor]:
        """-> log-probs of the answers' tokens at the temperature of sampling, fp32 [N], values
        before each of them [N] (None without the head), the balance of the experts."""
        out = self.model.model(**{name: batch[name] for name in INPUTS})
        hidden = out.last_hidden_state.flatten(0, 1)[batch["places"]]
        head, rows = at_temperature(self.model.lm_head, hidden, self.temperature)
        log_probs = losses.head_logprobs(head, rows, batch["targets"])
        values = None
        if self.value_head is not None:
            values = self.value_head(hidden.float())[:, 0]
        return log_probs, values, getattr(out, "aux_loss", hidden.new_zeros(()))


class Cooled:
    """The logits of a head, divided by a temperature."""

    def __init__(self, head: nn.Module, temperature: float):
        self.head = head
        self.temperature = temperature

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) / self.temperature


def at_temperature(head: nn.Module, hidden: Tensor, temperature: float) -> tuple:
    """A head and hidden states whose logits are those of the head, divided by the temperature: of a
    plain product the states can be divided instead."""
    if type(head) is nn.Linear:
        return head, hidden / temperature
    return Cooled(head, temperature), hidden


def frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, without value head, never trained."""
    model = copy.deepcopy(policy.model)
    reference = Policy(model, policy.temperature, has_values=False)
    return reference.requires_grad_(False).eval()


# ---- batches -------------------------------------------------------------------------------------


@dataclass
class Experience:
    """An answer and what is known of each of its trained tokens, [t] each: log_probs as sampled,
    advantages; reference (log-probs of the model at the start), values and returns where the
    algorithm has them."""

    answer: Answer
    log_probs: Tensor
    advantages: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    @classmethod
    def of(cls, answer: Answer) -> Experience:
        sampled = torch.tensor(answer.log_probs)
        return cls(answer, sampled[torch.tensor(answer.trained, dtype=torch.bool)])

    def __len__(self) -> int:
        return len(self.log_probs)


def micro_batches(experiences: list[Experience], tokens: int) -> list[list[Experience]]:
    """In their order, each of at most `tokens` tokens of a row (or one answer); a prompt counts
    once."""
    batches: list[list[Experience]] = []
    room = 0
    last = None  # prompt of the row's end
    for one in experiences:
        prompt = one.answer.prompt
        own = len(one.answer.tokens) + 1
        need = own if prompt is last else own + len(prompt.ids)
        if not batches or need > room:
            batches.append([])
            room = tokens
            need = own + len(prompt.ids)
        batches[-1].append(one)
        room -= need
        last = prompt
    return batches


def pack(experiences: list[Experience], pad_token_id: int, where: torch.device) -> dict:
    """Experiences of the same prompt follow each other -> what Policy takes, and log_probs,
    advantages, ... [N]."""
    rows = []
    last = None
    for one in experiences:
        ids = one.answer.prompt.ids
        if one.answer.prompt is not last and len(ids) > 1:
            rows.append(row_of(ids[:-1], [], 0))
        rows.append(row_of(ids, one.answer.tokens, len(ids) - 1, one.answer.trained))
        last = one.answer.prompt
    used = sum(len(row["input_ids"]) - row["shared"] for row in rows)
    if used % STEP:
        rows.append(row_of([pad_token_id] * (STEP - used % STEP), [], 0))
    batch = shared_start.pack(rows)
    labels = batch.pop("labels")[0]
    places = (labels[1:] != IGNORE).nonzero()[:, 0]
    batch |= {
        "places": places,
        "targets": labels[places + 1],
        "token_mask": (torch.arange(len(labels)) < used).long()[None],
    }
    for name in ("log_probs", "advantages", "reference", "values", "returns"):
        parts = [getattr(one, name) for one in experiences]
        if parts[0] is not None:
            batch[name] = torch.cat(parts)
    moved = {
        name: value.to(where, non_blocking=True) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }
    return moved | {"used": used}


def row_of(prompt: list[int], tokens: list[int], shared: int, trained: list[bool] = ()) -> dict:
    labels = [token if own else IGNORE for token, own in zip(tokens, trained, strict=True)]
    return {
        "input_ids": np.array(prompt + tokens),
        "labels": np.array([IGNORE] * len(prompt) + labels),
        "shared": shared,
    }


@torch.no_grad()
def look_at(
    policy: Policy, experiences: list[Experience], tokens: int, pad_token_id: int, where
) -> tuple[list[Tensor], list[Tensor] | None]:
    """-> log-probs of each answer's trained tokens and, where there is a value head, values, on the
    CPU."""
    was_training = policy.training
    policy.eval()
    log_probs = []
    values = []
    for part in micro_batches(experiences, tokens):
        found, valued, _ = policy(pack(part, pad_token_id, where))
        sizes = [len(one) for one in part]
        log_probs += found.cpu().split(sizes)
        if valued is not None:
            values += valued.cpu().split(sizes)
    policy.train(was_training)
    return log_probs, values or None
