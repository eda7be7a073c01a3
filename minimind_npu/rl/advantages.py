"""How much better than expected each answer was, by algorithm.

P prompts of this process, G answers to each; answers are in the order of their prompts.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from loop import parallel
from rl.losses import grpo, ppo, spo
from rl.policy import Experience
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

GROUPED = ("grpo", "cispo", "reinforce")  # compare the answers to one prompt


def set_advantages(args, training, experiences: list[Experience], rewards: Tensor, tracker) -> None:
    """Each trained token's: that of its answer, or with ppo its own."""
    if args.algorithm in GROUPED:
        by_deviation = args.algorithm != "reinforce" and not args.no_std
        found = grpo.advantages(rewards.view(-1, args.group_size), by_deviation).flatten()
    elif args.algorithm == "spo":
        found = tracked_advantages(args, training, experiences, rewards, tracker)
    else:
        estimate_by_values(args, training, experiences, rewards)
        return
    for one, advantage in zip(experiences, found.tolist(), strict=True):
        one.advantages = torch.full_like(one.log_probs, advantage)


def estimate_by_values(args, training, experiences: list[Experience], rewards: Tensor) -> None:
    """ppo: by the value head, then of mean 0 and deviation 1 over the tokens of all processes."""
    lengths = torch.tensor([len(one) for one in experiences])
    values = pad_sequence([one.values for one in experiences], True)
    found, returns = ppo.estimate_advantages(
        values, rewards.nan_to_num(0), lengths, args.gamma, args.gae_lambda
    )
    sums = {"sum": found.sum(), "squares": found.square().sum(), "count": lengths.sum()}
    sums = parallel.summed(sums, training.device)
    mean = sums["sum"] / max(1, sums["count"])
    deviation = math.sqrt(max(0, sums["squares"] / max(1, sums["count"]) - mean**2))
    for i, one in enumerate(experiences):
        one.advantages = (found[i, : len(one)] - mean) / (deviation + 1e-8)
        one.returns = returns[i, : len(one)]


def tracked_advantages(
    args, training, experiences: list[Experience], rewards: Tensor, tracker
) -> Tensor:
    """spo: of the answers of all processes, so that each keeps the same tracker; -> of this one's,
    [P]."""
    world = training.world_size
    mine = slice(training.process_index, None, world)
    of_all = torch.zeros(args.prompts_per_step, 3)
    of_all[mine, 0] = torch.tensor([float(one.answer.prompt.row) for one in experiences])
    of_all[mine, 1] = rewards
    of_all[mine, 2] = torch.stack([one.log_probs.mean() for one in experiences])
    if world > 1:
        shared = of_all.to(training.device)
        dist.all_reduce(shared)
        of_all = shared.cpu()
    rows, rewards, log_probs = of_all.unbind(1)
    found = spo.advantages(rewards, tracker.baselines(rows.long(), rewards))
    tracker.update(rows.long(), rewards, log_probs)
    return found[mine]
