"""What a run of reinforcement learning tells of itself: sums over all processes -> means."""

from common.runs import report

PLOTS = report.PLOTS | {
    "exact_match": "held-out answers that are right",
    "reward": "mean reward of an answer",
    "answer_tokens": "tokens of an answer",
    "cut": "share of answers that were cut",
    "entropy": "entropy per token (estimated)",
    "kl": "KL to the model at the start, per token",
    "ratio": "mean ratio of an update",
    "clip_share": "share of tokens that are clipped",
    "no_signal": "share of groups without a signal",
}


def plots(parts) -> dict[str, str]:
    """Of a run whose reward has these parts."""
    return PLOTS | {f"reward_{name}": f"mean of {name}, before its weight" for name in parts}


def of_rollout(sums: dict) -> dict:
    """See roll_out in train_rl.py."""
    answers = sums["answers"]
    rewarded = max(1, sums["rewarded"])
    told = {
        "reward": sums["reward"] / rewarded,
        "answer_tokens": sums["tokens"] / answers,
        "cut": sums["cut"] / answers,
        "entropy": sums["surprise"] / sums["tokens"],
    }
    if sums["rewarded"] < answers:
        told["without_reward"] = 1 - sums["rewarded"] / answers
    if sums["calls"]:
        told["calls"] = sums["calls"] / answers
    if "no_signal" in sums:
        told["no_signal"] = sums["no_signal"] / answers
    for name in sums:
        if name.startswith("reward_"):
            told[name] = sums[name] / rewarded
    return told


def of_updates(sums: dict, args) -> dict:
    """See learn in train_rl.py."""
    trained = max(1, sums["trained"])
    names = ("ratio", "clip_share", "kl", "value_loss", "value_clip_share")
    told = {name: sums[name] / trained for name in names if name in sums}
    left_out = args.mini_batches * args.num_iterations - sums["updates"]
    if left_out:  # the policy had moved too far
        told["updates_left_out"] = left_out
    return told


def loss(sums: dict) -> float:
    """Mean of the updates."""
    return sums["loss"] / max(1, sums["updates"])


def tokens(sums: dict) -> tuple[int, int]:
    """(tokens of the updates' rows, those that were trained)."""
    return int(sums["row_tokens"]), int(sums["trained"])
