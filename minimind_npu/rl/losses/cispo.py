"""Clipped importance sampling policy optimisation (MiniMax 2025): the weight of a token is cut, its
gradient never.

Loss per token: -min(r, cap) A log pi(token), r = pi / pi_old without a gradient. PPO's clip
silences the rare tokens at which an answer changes its mind; here they only weigh less. Advantages
are GRPO's.
"""

from __future__ import annotations

from torch import Tensor


def token_losses(log_probs: Tensor, old: Tensor, advantages: Tensor, args) -> tuple[Tensor, Tensor]:
    """log_probs, old, advantages [N] -> losses [N], and where the weight was cut [N]."""
    ratio = (log_probs.detach() - old).exp()
    weight = ratio.clamp(max=args.ratio_cap)
    return -weight * advantages * log_probs, ratio > args.ratio_cap
