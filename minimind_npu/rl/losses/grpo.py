"""Group relative policy optimisation (Shao et al. 2024): what an answer got, beside the other
answers to its prompt.

Loss per token: PPO's clipped ratio with the advantage of the whole answer, (reward - mean of the
group) / (deviation of the group + 1e-4). A mean over all tokens of an update, so that long answers
count for what they are (as "dapo" in TRL).

P prompts, G answers to each.
"""

from __future__ import annotations

import torch
from rl.losses.ppo import token_losses  # noqa: F401
from torch import Tensor

EPSILON = 1e-4  # as in DeepSeekMath's code and TRL: groups that hardly differ are not blown up


def advantages(rewards: Tensor, by_deviation: bool) -> Tensor:
    """rewards [P, G], NaN where there is none -> advantages [P, G], 0 where there is no reward.

    by_deviation False: the differences as they are (Liu et al. 2025, "Dr. GRPO").
    """
    given = ~rewards.isnan()
    count = given.sum(1, keepdim=True)
    known = rewards.nan_to_num(0.0)
    mean = known.sum(1, keepdim=True) / count.clamp(min=1)
    difference = torch.where(given, known - mean, 0.0)
    if not by_deviation:
        return difference
    variance = difference.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return difference / (variance.sqrt() + EPSILON)


def without_signal(rewards: Tensor) -> Tensor:
    """rewards [P, G] -> bool [P]: groups whose rewards are all the same, which teach nothing."""
    lowest = rewards.nan_to_num(float("inf")).amin(1)
    highest = rewards.nan_to_num(float("-inf")).amax(1)
    return highest <= lowest
