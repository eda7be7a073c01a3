"""Preference losses, one pair at a time: read them beside the papers.

Of each pair four numbers are known: log p(answer | prompt) of the chosen and of the rejected
answer, by the policy that is trained and by the frozen reference. An implicit reward is beta * (log
p_policy - log p_reference).

    sigmoid   -log s(beta * d)
              DPO, Rafailov et al. 2023, eq. 7; with label_smoothing e cDPO (Mitchell 2023):
              (1 - e) * -log s(beta * d) + e * -log s(-beta * d)
    robust    unbiased where a share e of the pairs is swapped
              rDPO, Chowdhury et al. 2024, eq. 12
    ipo       (d / tokens - 1 / (2 * beta))^2, on averages over tokens
              Azar et al. 2023, eq. 17
    hinge     max(0, 1 - beta * d)
              SLiC-HF, Zhao et al. 2023, without its cross entropy
    simpo     -log s(beta * a - gamma); a of averages over tokens, no reference
              Meng et al. 2024, eq. 6
    orpo      nll + beta * -log s(log odds ratio); on averages over tokens, no reference
              Hong et al. 2024, eq. 6

d = (chosen - rejected of the policy) - (chosen - rejected of the reference); a = chosen - rejected
of the policy; s is the logistic function.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

REFERENCE_FREE = ("simpo", "orpo")
KINDS = ("sigmoid", "robust", "ipo", "hinge", *REFERENCE_FREE)
BETA = {"simpo": 2.0}  # of the others 0.1


class Answers(NamedTuple):
    """[n] each: one entry per pair."""

    chosen: Tensor  # log p(chosen | prompt), summed over its tokens
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def averaged(self) -> "Answers":
        return self._replace(
            chosen=self.chosen / self.chosen_tokens,
            rejected=self.rejected / self.rejected_tokens,
        )


def rewards(
    kind: str, policy: Answers, reference: Answers | None, beta: float, averaged: bool = False
) -> tuple[Tensor, Tensor]:
    """-> implicit rewards of the chosen and of the rejected answers, [n] each, without gradient.

    averaged: per token, which simpo and orpo (whose odds are of averages) always are. Without a
    reference the reward is beta * log p.
    """
    if averaged or kind in REFERENCE_FREE:
        policy = policy.averaged()
        reference = reference.averaged() if reference is not None else None
    chosen = beta * policy.chosen.detach()
    rejected = beta * policy.rejected.detach()
    if reference is not None:
        chosen = chosen - beta * reference.chosen
        rejected = rejected - beta * reference.rejected
    return chosen, rejected


def preference_loss(
    kind: str,
    policy: Answers,
    reference: Answers | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 1.0,
    averaged: bool = False,
    rpo_alpha: float = 0.0,
) -> Tensor:
    """Loss of each pair, [n].

    Args:
        kind: see the head of this file
        reference: None for simpo and orpo
        label_smoothing: share of pairs whose preference is taken to be swapped; sigmoid, robust and
            simpo
        gamma: target margin of simpo
        averaged: d of averages over tokens instead of sums (length normalisation)
        rpo_alpha: weight of -log p(chosen) per token that is added (Pang et al. 2024, eq. 2)
    """
    mean = policy.averaged()
    if kind == "orpo":
        odds = log_odds(mean.chosen) - log_odds(mean.rejected)
        loss = -mean.chosen - beta * F.logsigmoid(odds)
    elif kind == "simpo":
        loss = smoothed(beta * (mean.chosen - mean.rejected) - gamma, label_smoothing)
    else:
        if averaged or kind == "ipo":
            policy = mean
            reference = reference.averaged()
        ours = policy.chosen - policy.rejected
        difference = ours - (reference.chosen - reference.rejected)
        loss = of_difference(kind, difference, beta, label_smoothing)
    return loss - rpo_alpha * mean.chosen if rpo_alpha else loss


def of_difference(kind: str, difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The losses that depend on d alone."""
    if kind == "sigmoid":
        return smoothed(beta * difference, label_smoothing)
    if kind == "robust":
        kept = -F.logsigmoid(beta * difference)
        swapped = -F.logsigmoid(-beta * difference)
        expected = (1 - label_smoothing) * kept - label_smoothing * swapped
        return expected / (1 - 2 * label_smoothing)
    if kind == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return torch.relu(1 - beta * difference)
    raise ValueError(f"no loss is called {kind}")


def smoothed(margin: Tensor, share: float) -> Tensor:
    """-log s(margin), where a share of the preferences counts the other way round."""
    return -(1 - share) * F.logsigmoid(margin) - share * F.logsigmoid(-margin)


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)); p close to 1 stays finite."""
    return log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))
