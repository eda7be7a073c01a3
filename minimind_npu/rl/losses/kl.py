"""How far a policy has moved, from the log-probs of tokens that were sampled."""

from torch import Tensor


def k3(log_probs: Tensor, others: Tensor) -> Tensor:
    """[N], [N] -> an estimate of KL(policy || other) per token that is never negative, and whose
    gradient pulls the policy back (Schulman 2020)."""
    difference = others - log_probs
    return difference.exp() - difference - 1
