"""Reinforcement learning: a model answers, its answers are rewarded, and it answers better. PPO,
GRPO, SPO, CISPO, REINFORCE.

    bash minimind_npu/train_rl.sh                        # built-in model and sums, some minutes
    DATA=gsm8k.jsonl bash minimind_npu/train_rl.sh --from_weight sft --rewards "exact:1 format:0.2"
    DATA=my.jsonl bash minimind_npu/train_rl.sh --algorithm ppo --rewards "my_reward.py:1"

Losses, a file each: rl/losses/; sampling: rl/rollout.py; rewards: rl/rewards.py; flags:
rl/flags.py. Order of the story: prompts -> answers and their rewards -> updates -> what held-out
prompts say -> the run. A step is one rollout with its updates. P prompts of this process, G answers
to each, N tokens of answers.
"""

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this one
from common import cli, device  # before torch and transformers
from common.convert import models

import torch
from transformers import AutoTokenizer

import weights
from evaluation.answers import same
from loop import optim, parallel, state, tracking
from named import tokenizer_of
from rl import figures
from rl import policy as policies
from rl import prompts as asking
from rl.advantages import GROUPED, set_advantages
from rl.flags import DEFINING, Args, parse_args
from rl.losses import cispo, grpo, kl, ppo, reinforce, spo
from rl.learner import Learner, look_at, make_experiences, make_learner
from rl.policy import Experience
from rl.rewards import Rewards
from rl.rollout import Sampler, refuse_disagreement
from stages.pretrain import balance
from toolcall.own_tools import registry_of
from common.callbacks import SafeStop
from common.data.load import load_rows, summary
from common.runs import run_folder

CHECKED = 4  # prompts whose answers are computed twice before a run
LOSSES = {"grpo": grpo, "ppo": ppo, "spo": spo, "cispo": cispo, "reinforce": reinforce}


# 1. Prompts
def read(args: Args, training, base: str, tokenizer, tools: list | None) -> tuple:
    """-> (prompts to train on, held-out ones, counts, the checkpoint to continue from or None).
    tools: those that the policy may call, None where it answers at once."""
    rows, stats = load_rows(
        args.data_path, "reward", args.column_map or None, args.strict_data, seed=training.seed
    )
    cli.say(summary(stats))
    dtype = device.train_dtype(training)
    settings = asdict(args) | {"base": base, "data": stats["sha256"], "dtype": str(dtype)}
    settings |= {name: getattr(training, name) for name in DEFINING}
    start = run_folder.open_output(training, settings, args.overwrite_output_dir, True, tokenizer)
    prompts, held_out = asking.read(args, rows, stats, tokenizer, training.seed, tools)
    return prompts, held_out, stats, start


# 2. Answers and their rewards
def roll_out(args: Args, training, sampler: Sampler, rewards: Rewards, prompts, step: int) -> tuple:
    """prompts: of this process, by their place in the step -> (answers, their rewards [P * G] with
    NaN where there is none, sums over all processes). An answer without a reward is not trained."""
    answers = sampler.play(prompts, step)
    own_tokens = sum(sum(answer.trained) for answer in answers)
    total, parts = rewards(answers)
    given = ~total.isnan()
    for answer, has_reward in zip(answers, given.tolist(), strict=True):
        if not has_reward or (args.mask_cut and answer.is_cut):
            answer.trained = [False] * len(answer.tokens)
    sums = {
        "answers": len(answers),
        "rewarded": given.sum(),
        "reward": total.nan_to_num(0).sum(),
        "tokens": own_tokens,
        "cut": sum(answer.is_cut for answer in answers),
        "calls": sum(answer.calls for answer in answers),
        "surprise": -sum(sum(answer.log_probs) for answer in answers),
    }
    for name, values in parts.items():
        sums[f"reward_{name}"] = values[given].sum()
    if args.algorithm in GROUPED:
        groups = total.view(-1, args.group_size)
        sums["no_signal"] = grpo.without_signal(groups).sum() * args.group_size
    sums = parallel.summed(sums, training.device)
    rewards.tell_problems()
    if not sums["rewarded"]:
        raise SystemExit(f"step {step}: no answer has a reward; stopped, nothing of it is saved")
    return answers, total, sums


# 3. Sampler and policy agree
def check_sampler(learner: Learner, sampler: Sampler, prompts) -> None:
    """At the start of a run and where it goes on: see refuse_disagreement."""
    some = prompts.take(range(min(CHECKED, len(prompts))))
    answers = sampler.play(dict(enumerate(some)), step=0)
    experiences = [Experience.of(answer) for answer in answers]
    computed, _ = look_at(learner, learner.policy, experiences)
    sampled = torch.cat([one.log_probs for one in experiences])
    refuse_disagreement(sampled, torch.cat(computed), device.train_dtype(learner.training))


# 4. Updates
def loss_of(learner: Learner, batch: dict, denominator: float) -> tuple:
    """-> (this micro-batch's share of the loss of an update with so many trained tokens, sums)."""
    args = learner.args
    log_probs, values, aux = learner.net(batch)
    old = batch["log_probs"]
    each, clipped = LOSSES[args.algorithm].token_losses(log_probs, old, batch["advantages"], args)
    sums = {
        "clip_share": clipped.sum(),
        "ratio": (log_probs.detach() - old).exp().sum(),
        "moved": kl.k3(old, log_probs.detach()).sum(),
        "trained": len(old),
        "row_tokens": batch["used"],
    }
    if "reference" in batch:
        each = each + args.kl_coef * kl.penalty(log_probs, old, batch["reference"])
        sums["kl"] = kl.k3(log_probs.detach(), batch["reference"]).sum()
    if values is not None:
        errors, held = ppo.value_losses(values, batch["values"], batch["returns"], args.value_clip)
        each = each + args.vf_coef * errors
        sums["value_loss"] = errors.detach().sum()
        sums["value_clip_share"] = held.sum()
    loss = each.sum() / denominator + balance(aux, len(old), denominator)
    return loss, sums | {"loss": loss.detach()}


def update(learner: Learner, experiences: list, step: int) -> dict | None:
    """One update on a mini-batch; returns sums over all processes, or None where the policy has
    moved too far from the one that answered (--target_kl) and nothing is changed."""
    training = learner.training
    world = training.world_size
    dtype = device.train_dtype(training)
    count = {"trained": sum(len(one) for one in experiences)}
    denominator = max(1.0, parallel.summed(count, training.device)["trained"])
    parts = policies.micro_batches(experiences, learner.row_tokens)
    totals: dict = {}
    for i, part in enumerate(parts):
        batch = policies.pack(part, learner.pad_token_id, training.device)
        with parallel.sync_in_last(learner.net, i, len(parts)), device.autocast(dtype):
            loss, sums = loss_of(learner, batch, denominator)
            with device.autocast(torch.float32):  # off
                # the gradients of the ranks are averaged
                parallel.backward(None, learner.scaler, loss * world, i, len(parts))
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    totals = parallel.summed(totals, training.device)
    parallel.refuse_nan(totals["loss"], step)
    limit = learner.args.target_kl
    if limit and totals["moved"] > limit * denominator:
        learner.optimizer.zero_grad(set_to_none=True)
        return None
    refuse = partial(learner.gradients.refuse, step=step)
    trained = [p for p in learner.policy.parameters() if p.requires_grad]
    parallel.update(
        None, learner.optimizer, learner.scaler, trained, training.max_grad_norm, refuse
    )
    return totals


def learn(learner: Learner, experiences: list, step: int) -> dict:
    """All updates of a rollout; returns sums of them."""
    args = learner.args
    size = len(experiences) // args.mini_batches
    starts = range(0, len(experiences), size)
    totals = {"updates": 0, "loss": 0.0, "trained": 0, "row_tokens": 0}
    for start in [*starts] * args.num_iterations:
        sums = update(learner, experiences[start : start + size], step)
        if sums is None:
            break
        sums["updates"] = 1
        totals |= {name: totals.get(name, 0) + value for name, value in sums.items()}
    return totals


def lr_of(args: Args, training, optimizer, fraction_done: float) -> float:
    """Set the learning rate for this point of the run; returns it."""
    kind = training.lr_scheduler_type
    scale = optim.lr_scale(fraction_done, kind, training.warmup_steps, args.min_lr_ratio)
    return optim.set_lr(optimizer, scale)


# 5. What held-out prompts say
def measure(training, sampler: Sampler, held_out) -> dict:
    """{"metrics", "samples"} of the likeliest answers; all ranks call it, each asks its share."""
    mine = range(training.process_index, len(held_out), training.world_size)
    answers = sampler.greedy(held_out.take(mine))
    sums = {
        "right": sum(same(answer.text, answer.prompt.expected) for answer in answers),
        "tokens": sum(len(answer.tokens) for answer in answers),
        "count": len(answers),
    }
    sums = parallel.summed(sums, training.device)
    if not sums["count"]:
        return {"metrics": {}, "samples": []}
    samples = [
        {
            "prompt": answer.prompt.question,
            "reference": answer.prompt.reference,
            "answer": answer.text,
        }
        for answer in answers
    ]
    metrics = {
        "exact_match": sums["right"] / sums["count"],
        "answer_tokens": sums["tokens"] / sums["count"],
    }
    return {"metrics": metrics, "samples": samples}


# 6. The run
def main() -> None:
    args, training, base = parse_args()
    device.seed_all(training.seed)
    dtype = device.train_dtype(training)
    tokenizer = models.load(AutoTokenizer, tokenizer_of(args, base), "--tokenizer")
    rewards = Rewards.of(args)
    registry = registry_of(args.tools) if args.max_turns > 1 else None
    if args.check_flags:
        rewards.close()
        return
    tools = registry.schemas if registry else None
    prompts, held_out, stats, start = read(args, training, base, tokenizer, tools)

    model = weights.load_model(base, args, training, tokenizer)
    tracker = spo.Tracker(len(prompts)) if args.algorithm == "spo" else None
    learner = make_learner(args, training, model, tracker, tokenizer.pad_token_id)
    rewards.load_models(training)
    sampler = Sampler(model, tokenizer, args, dtype, training.seed, registry)
    write_model = partial(weights.write_model, model, tokenizer, None, "")

    measured = partial(measure, training, sampler, held_out)
    if start:
        progress = state.read_progress(start)
        state.restore(start, model, learner.kept(), None, training.seed)
    else:
        progress = state.new_progress(measured())
    check_sampler(learner, sampler, prompts)

    plan = asking.Plan(prompts, args, training, progress)
    plots = figures.plots(rewards.parts)
    run = tracking.Run(training, progress, model, dtype, plan, vars(args), plots)
    every = training.eval_steps or max(1, plan.steps // 10)
    stop = SafeStop()
    stop.listen()
    learner.policy.train()
    while plan.fraction_done() < 1 and not run.stopped:
        began = time.time()
        lr = lr_of(args, training, learner.optimizer, plan.fraction_done())
        asked = plan.next_prompts()
        answers, rewarded, seen = roll_out(args, training, sampler, rewards, asked, plan.step)
        experiences = make_experiences(learner, answers)
        set_advantages(args, training, experiences, rewarded, tracker)
        done = learn(learner, experiences, plan.step)
        told = figures.of_rollout(seen) | figures.of_updates(done, args)
        run.count(figures.loss(done), lr, time.time() - began, *figures.tokens(done), **told)
        run.stop_if(stop.asked)
        if run.is_due(every):
            run.note(measured()["metrics"])
        if run.save_is_due():
            state.save(training, write_model, learner.kept(), None, progress)
    run.exit_if_stopped()
    stop.training_is_done()
    rewards.close()
    final = state.save_final(training.output_dir, write_model)
    weights.complete_final(final, args.algorithm, model.config, "")
    run.report(HERE.name, base, stats, measured(), stage=args.algorithm)


if __name__ == "__main__":
    cli.run(main)
