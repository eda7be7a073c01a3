"""REINFORCE (Williams 1992) with the mean of the group as its baseline, as nanochat has it.

Loss per token: -A log pi(token), A = reward - mean of the group. There is no ratio, so a rollout
serves one update only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_losses(log_probs: Tensor, old: Tensor, advantages: Tensor, args) -> tuple[Tensor, Tensor]:
    """log_probs, advantages [N] -> losses [N], and nothing that is clipped [N]."""
    return -advantages * log_probs, torch.zeros_like(log_probs, dtype=torch.bool)
