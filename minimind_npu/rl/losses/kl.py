"""How far a policy has moved, from the log-probs of tokens that were sampled."""

from torch import Tensor


def k3(log_probs: Tensor, others: Tensor) -> Tensor:
    """[N], [N] -> an estimate of KL(policy || other) per token that is never negative, and whose
    gradient pulls the policy back (Schulman 2020)."""
    difference = others - log_probs
    return difference.exp() - difference - 1


def penalty(log_probs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """[N] each -> k3 to the reference, weighted by the ratio to the policy that sampled (`old`):
    only so is the mean gradient that of the KL (DeepSeek-V3.2 2025), also where the ratio is 1."""
    return (log_probs - old).exp() * k3(log_probs, reference)
