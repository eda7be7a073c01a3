"""Proximal policy optimisation (Schulman et al. 2017): a clipped ratio, and advantages from a value
head (generalised advantage estimation, Schulman et al. 2016).

Loss per token: -min(r A, clip(r, 1 - low, 1 + high) A), r = pi(token) / pi_old(token), plus
vf_coef * 0.5 * max((V - R)^2, (V_clipped - R)^2) of the value head. A reward comes after the last
token of an answer.

n answers of at most T tokens, N tokens in all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_losses(log_probs: Tensor, old: Tensor, advantages: Tensor, args) -> tuple[Tensor, Tensor]:
    """log_probs, old, advantages [N] -> losses [N], and where the clip took the gradient away [N].

    old: log-probs of the distribution that the tokens were sampled from.
    """
    ratio = (log_probs - old).exp()
    held = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    gain = ratio * advantages
    held_gain = held * advantages
    return -torch.minimum(gain, held_gain), held_gain < gain


def estimate_advantages(
    values: Tensor, rewards: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """values [n, T] before each token (anything beyond an answer's end), rewards [n], lengths [n]
    -> advantages [n, T] (0 beyond the end), returns [n, T].

    A_t = sum over k of (gamma lam)^k delta_(t+k), delta_t = reward_t + gamma V_(t+1) - V_t.
    """
    width = values.shape[1]
    place = torch.arange(width, device=values.device)
    inside = place < lengths[:, None]
    values = values.masked_fill(~inside, 0.0)
    next_values = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
    is_last = place == lengths[:, None] - 1
    deltas = torch.where(is_last, rewards[:, None], 0.0) + gamma * next_values - values
    advantages = discounted_sums(deltas.masked_fill(~inside, 0.0), gamma * lam)
    return advantages, advantages + values


def discounted_sums(x: Tensor, factor: float) -> Tensor:
    """x [n, T] -> sum over k of factor^k x_(t+k), [n, T].

    Each round doubles how far the sums reach, so there are log2(T) of them instead of T steps.
    """
    sums = x.clone()
    reach = 1
    while reach < x.shape[1]:
        further = sums[:, reach:] * factor**reach
        sums = torch.cat([sums[:, :-reach] + further, sums[:, -reach:]], 1)
        reach *= 2
    return sums


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """All [N] -> losses [N], and where the clip took the gradient away [N]."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    error = (values - returns).square()
    held_error = (held - returns).square()
    return 0.5 * torch.maximum(error, held_error), held_error > error
