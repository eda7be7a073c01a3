"""What is trained: the policy, its reference, optimizer and trackers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from loop import optim, parallel
from rl import policy as policies
from rl.losses import spo
from rl.policy import Experience, Policy
from rl.rollout import Answer
from torch import Tensor, nn

from common import device


@dataclass
class Learner:
    """net: the policy, perhaps within DistributedDataParallel; reference: the policy at the start,
    None where the distance to it costs nothing; tracker: spo's, else None."""

    args: object
    training: object
    policy: Policy
    net: nn.Module
    reference: Policy | None
    optimizer: torch.optim.Optimizer
    scaler: object
    gradients: parallel.Gradients
    tracker: spo.Tracker | None
    pad_token_id: int

    @property
    def row_tokens(self) -> int:
        """Of a micro-batch."""
        return self.training.per_device_train_batch_size * self.args.model_max_length

    def kept(self) -> dict:
        """What a checkpoint holds beside the model."""
        parts = {
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "value_head": self.policy.value_head,
            "tracker": self.tracker,
        }
        return {name: part for name, part in parts.items() if part is not None}


def make_learner(args, training, model, tracker, pad_token_id: int) -> Learner:
    dtype = device.train_dtype(training)
    policy = Policy(model, args.temperature, has_values=args.algorithm == "ppo")
    reference = policies.frozen_copy(policy) if args.kl_coef else None
    fused = "fused" in training.optim
    rate = training.learning_rate
    optimizer = optim.make(policy, "adamw", rate, training.weight_decay, 0.0, fused)
    net, _ = parallel.wrap(policy, optimizer, training, dtype)
    scaler = device.grad_scaler(dtype)
    gradients = parallel.Gradients(dtype)
    return Learner(
        args, training, policy, net, reference, optimizer, scaler, gradients, tracker, pad_token_id
    )


def look_at(
    learner: Learner, policy: Policy, experiences: list[Experience]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """-> log-probs and values of the answers' tokens, see policy.look_at."""
    training = learner.training
    with device.autocast(device.train_dtype(training)):
        return policies.look_at(
            policy, experiences, learner.row_tokens, learner.pad_token_id, training.device
        )


def make_experiences(learner: Learner, answers: list[Answer]) -> list[Experience]:
    """What is known of the answers before the first update."""
    experiences = [Experience.of(answer) for answer in answers]
    if learner.reference is not None:
        log_probs, _ = look_at(learner, learner.reference, experiences)
        for one, found in zip(experiences, log_probs, strict=True):
            one.reference = found
    if learner.policy.value_head is not None:
        _, values = look_at(learner, learner.policy, experiences)
        for one, found in zip(experiences, values, strict=True):
            one.values = found
    return experiences
