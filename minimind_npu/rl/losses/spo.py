"""Single-stream policy optimisation (Xu and Ding 2025): one answer to a prompt, whose baseline is
what earlier answers to the same prompt got.

Loss per token: PPO's clipped ratio, A = reward - tracked mean of the prompt, divided by its
deviation over the answers of the step. No group has to be waited for, and none is without a signal.
The tracker forgets by how far the policy has moved since it last answered the prompt:
    weight <- rho weight + 1,   mean <- mean + (reward - mean) / weight,
    rho = 2^(-|change of the mean log-prob| / HALF), from LOWEST to HIGHEST.
With rewards of 0 and 1 that is a Beta distribution whose counts fade.
"""

from __future__ import annotations

import torch
from rl.losses.ppo import token_losses  # noqa: F401
from torch import Tensor

HALF = 0.06  # change of the mean log-prob that halves what is remembered
LOWEST = 0.5
HIGHEST = 0.96
FIRST_WEIGHT = 2.0  # of the mean that a prompt begins with, that of all answers so far


class Tracker:
    """Mean reward of each of so many prompts. All ranks hold the same one.

    mean, weight, log_prob: [prompts], log_prob NaN before the first answer.
    """

    def __init__(self, prompts: int):
        self.mean = torch.zeros(prompts)
        self.weight = torch.zeros(prompts)
        self.log_prob = torch.full((prompts,), float("nan"))
        self.total = torch.zeros(2)  # sum and number of all rewards

    def baselines(self, prompts: Tensor, rewards: Tensor) -> Tensor:
        """What is expected of these prompts [n] before their rewards [n] count."""
        known = self.total if self.total[1] else sum_and_number(rewards)
        of_all = known[0] / known[1].clamp(min=1)
        return torch.where(self.weight[prompts] > 0, self.mean[prompts], of_all)

    def update(self, prompts: Tensor, rewards: Tensor, log_probs: Tensor) -> None:
        """prompts [n], each once; their rewards [n] (NaN: none), mean log-probs of the answers
        [n] (NaN: none of its tokens is trained, so what was known of the policy stays)."""
        baselines = self.baselines(prompts, rewards)
        given = ~rewards.isnan()
        prompts = prompts[given]
        rewards = rewards[given]
        log_probs = log_probs[given]
        moved = (log_probs - self.log_prob[prompts]).abs().nan_to_num(0.0)
        rho = (2 ** (-moved / HALF)).clamp(LOWEST, HIGHEST)
        is_new = self.weight[prompts] == 0
        weight = torch.where(is_new, FIRST_WEIGHT, rho * self.weight[prompts]) + 1
        mean = baselines[given]
        self.mean[prompts] = mean + (rewards - mean) / weight
        self.weight[prompts] = weight
        self.log_prob[prompts] = torch.where(log_probs.isnan(), self.log_prob[prompts], log_probs)
        self.total += sum_and_number(rewards)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean,
            "weight": self.weight,
            "log_prob": self.log_prob,
            "total": self.total,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean = state["mean"]
        self.weight = state["weight"]
        self.log_prob = state["log_prob"]
        self.total = state["total"]


def sum_and_number(rewards: Tensor) -> Tensor:
    """Of the rewards that there are, [2]."""
    given = rewards[~rewards.isnan()]
    return torch.stack([given.sum(), torch.tensor(float(len(given)))])


def advantages(rewards: Tensor, baselines: Tensor) -> Tensor:
    """Of all answers of a step, [n]: differences of deviation 1; 0 where there is no reward."""
    given = ~rewards.isnan()
    difference = torch.where(given, rewards - baselines, 0.0)
    mean_square = difference.square().sum() / given.sum().clamp(min=1)
    return difference / (mean_square.sqrt() + 1e-4)
