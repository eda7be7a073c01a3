"""The flags of train_rl.py."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from defaults import CPU_TOKENS, TOY_WIDTH
from loop import optim
from model import SIZES
from named import HERE, OUTPUT, any_given, arch_of, own_model, width_of
from refusals import refuse_sizes, refuse_unknown_to_the_loop
from rl.advantages import GROUPED
from rl.rewards import PARTS, RULES, weights_of
from transformers import TrainingArguments

from common import cli, device
from common.runs import flags

ALGORITHMS = ("grpo", "ppo", "spo", "cispo", "reinforce")
GOES_ON_FROM = ("sft", "reason", "dpo")  # the first whose output is there
NAMED = (*GOES_ON_FROM, "toolcall")  # stages that may be named


@dataclass
class Args(cli.RunArgs, cli.DataArgs):
    algorithm: str = field(default="grpo", metadata={"help": ", ".join(ALGORITHMS)})
    model_name_or_path: str = field(
        default="",
        metadata={
            "aliases": ["--from_weight", "--size"],
            "help": "folder, stage or size to go on from; unset: the output of sft, reason or dpo",
        },
    )
    tokenizer: str = field(default="", metadata={"help": "folder; unset: the model's"})
    hidden_size: int = field(default=0, metadata={"help": "changes a size: width"})
    num_hidden_layers: int = field(default=0, metadata={"help": "changes a size: layers"})
    use_moe: bool | None = field(default=None, metadata={"help": "changes a size: experts"})
    model_max_length: int = field(
        default=1024,
        metadata={"aliases": ["--max_seq_len"], "help": "tokens of prompt and answer together"},
    )
    max_new_tokens: int = field(default=512, metadata={"help": "length limit of an answer"})

    # rollouts
    prompts_per_step: int = field(default=32, metadata={"help": "of all processes together"})
    group_size: int = field(
        default=8, metadata={"aliases": ["--num_generations"], "help": "answers to a prompt"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of sampling, and of the log-probs"})
    max_turns: int = field(
        default=1, metadata={"help": "answers of a conversation; 2 or more: with tools in the loop"}
    )
    tools: list[str] = field(
        default_factory=list,
        metadata={"help": "tools beside the built-in ones: files with add_tools(registry), python"},
    )
    slots: int = field(default=128, metadata={"help": "answers generated at once on a device"})

    # updates
    mini_batches: int = field(default=2, metadata={"help": "updates that a rollout is cut into"})
    num_iterations: int = field(default=1, metadata={"help": "passes over each rollout"})
    clip_low: float = field(default=0.2, metadata={"help": "ratios below 1 - this are clipped"})
    clip_high: float = field(default=0.2, metadata={"help": "ratios above 1 + this are clipped"})
    ratio_cap: float = field(default=5.0, metadata={"help": "cispo: largest weight of a token"})
    kl_coef: float = field(
        default=0.01, metadata={"help": "weight of the distance to the model at the start; 0: none"}
    )
    target_kl: float = field(
        default=0.25, metadata={"help": "no more updates of a rollout beyond this; 0: never stop"}
    )
    no_std: bool = field(
        default=False, metadata={"help": "grpo, cispo: do not divide by the group's deviation"}
    )
    mask_cut: bool = field(
        default=False, metadata={"help": "answers that reach the length limit are not trained on"}
    )
    gamma: float = field(default=1.0, metadata={"help": "ppo: discount of later rewards"})
    gae_lambda: float = field(default=0.95, metadata={"help": "ppo: of the advantages"})
    vf_coef: float = field(default=0.1, metadata={"help": "ppo: weight of the value head's loss"})
    value_clip: float = field(default=0.2, metadata={"help": "ppo: of the value head's steps"})
    min_lr_ratio: float = field(default=0.1, metadata={"help": "share of the rate at the end"})

    # rewards
    rewards: str = field(
        default="exact:1",
        metadata={
            "help": f"what counts, with weights: {', '.join((*RULES, *PARTS))}, a file with "
            "compute_score: 'exact:1 repetition:0.2 my_reward.py:0.5'"
        },
    )
    length_range: str = field(default="1,256", metadata={"help": "length: tokens that get it all"})
    reward_model: str = field(default="", metadata={"help": "model: folder or hub id"})
    judge_url: str = field(
        default="", metadata={"help": "judge: an OpenAI-like endpoint, http://host:8000/v1"}
    )
    judge_model: str = field(default="", metadata={"help": "judge: its name there"})
    reward_timeout: float = field(
        default=10.0,
        metadata={
            "help": "seconds that a reward of yours, the code of an answer, the judge may take"
        },
    )
    check_flags: bool = field(
        default=False, metadata={"help": "look at the flags, say what is wrong with them, and end"}
    )

    # no flags here: all weights are trained, all held-out prompts are asked
    eval_generate: int = field(default=64, init=False)
    packing: bool = field(default=True, init=False)
    use_lora: bool = field(default=False, init=False)
    lora_r: int = field(default=16, init=False)
    target_modules: str = field(default="all-linear", init=False)
    stage: str = field(default="rl", init=False)
    arch: str = field(default="minimind", init=False)
    depth: int = field(default=0, init=False)
    teacher: str = field(default="", init=False)


RANGES = {
    "model_max_length": (16, flags.NEVER),
    "max_new_tokens": flags.FROM_1,
    "prompts_per_step": flags.FROM_1,
    "group_size": flags.FROM_1,
    "temperature": flags.ABOVE_0,
    "slots": flags.FROM_1,
    "max_turns": flags.FROM_1,
    "mini_batches": flags.FROM_1,
    "num_iterations": flags.FROM_1,
    "clip_low": flags.ABOVE_0,
    "clip_high": flags.ABOVE_0,
    "ratio_cap": flags.ABOVE_0,
    "kl_coef": flags.FROM_0,
    "target_kl": flags.FROM_0,
    "vf_coef": flags.FROM_0,
    "value_clip": flags.ABOVE_0,
    "reward_timeout": flags.ABOVE_0,
}
OF_ALGORITHM = {  # flags that only these use
    "clip_low": ("grpo", "ppo", "spo"),
    "clip_high": ("grpo", "ppo", "spo"),
    "ratio_cap": ("cispo",),
    "no_std": ("grpo", "cispo"),
    "gamma": ("ppo",),
    "gae_lambda": ("ppo",),
    "vf_coef": ("ppo",),
    "value_clip": ("ppo",),
}
OF_REWARD = {  # flags that only this part of the reward uses
    "length_range": "length",
    "reward_model": "model",
    "judge_url": "judge",
    "judge_model": "judge",
}
NOT_HERE = ("gradient_accumulation_steps", "deepspeed", "torch_compile")
DEFINING = (  # of TrainingArguments: what makes a run another one
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "lr_scheduler_type",
    "per_device_train_batch_size",
)
DEFAULTS = dict(
    output_dir="",
    learning_rate=1e-6,
    per_device_train_batch_size=16,
    num_train_epochs=1,
    warmup_steps=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    lr_scheduler_type="linear",
    logging_steps=1,
    save_steps=50,
    save_total_limit=2,
    report_to=["tensorboard"],
)
TOY = dict(
    learning_rate=3e-4,
    model_max_length=128,
    max_new_tokens=48,
    max_steps=30,
    prompts_per_step=16,
    group_size=16,
    temperature=1.5,  # tuned on few rows, it is too sure of itself to try anything else
    kl_coef=0.001,
    eval_ratio=0.15,
    save_steps=20,
)


def parse_args() -> tuple[Args, TrainingArguments, str]:
    """The command line -> (args, training, the folder or size that the weights come from)."""
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, {}, by_trainer=False)
    flags.refuse_values(vars(args), RANGES)
    refuse_unknown_to_the_loop()
    if args.algorithm not in ALGORITHMS:
        raise cli.usage_error(f"--algorithm {args.algorithm}: {', '.join(ALGORITHMS)}")
    base = start_from(args)
    refuse_sizes(base, args)
    args.arch = arch_of(base, args)
    set_defaults(args, training, base)
    args.data_path = args.data_path or str(HERE / "data" / "rl")
    training.output_dir = training.output_dir or str(OUTPUT / args.algorithm)
    refuse_contradictions(args, training)
    say_unused(args, training)
    return args, training, base


def start_from(args: Args) -> str:
    name = args.model_name_or_path
    if name in SIZES:
        return name
    for stage in [name] if name in NAMED else GOES_ON_FROM:
        asked = not name or name == stage
        if asked and (OUTPUT / stage / "final").is_dir():
            return own_model(str(OUTPUT / stage), "--from_weight")
    if not name or name in NAMED:
        raise SystemExit(
            f"nothing to go on from: {OUTPUT / (name or 'sft') / 'final'} is not there; "
            f"bash {HERE.name}/train_rl.sh trains it first, or name a folder with --from_weight"
        )
    return own_model(name, "--from_weight")


def set_defaults(args: Args, training: TrainingArguments, base: str) -> None:
    """Of toys, of the algorithm, of a CPU, where nobody has chosen."""
    defaults = dict(TOY) if width_of(base, args) < TOY_WIDTH else {}
    if args.algorithm in ("ppo", "spo"):
        # as many answers, each to a prompt of its own
        group = defaults.get("group_size", args.group_size)
        size = defaults.get("prompts_per_step", args.prompts_per_step) * group
        defaults |= {"group_size": 1}
        if not any_given("prompts_per_step"):
            defaults["prompts_per_step"] = size
    if args.algorithm == "reinforce":
        defaults |= {"mini_batches": 1}
    if width_of(base, args) < TOY_WIDTH and device.kind() == "cpu":
        defaults |= {"bf16": False}  # as quick there, and exact
    if any_given("max_seq_len"):  # the other name of a flag
        defaults.pop("model_max_length", None)
    if any_given("num_generations"):
        defaults.pop("group_size", None)
    own = {one.name for one in fields(Args)}
    for name, value in defaults.items():
        if not any_given(name):
            setattr(args if name in own else training, name, value)
    if device.kind() == "cpu" and not any_given("per_device_train_batch_size"):
        training.per_device_train_batch_size = max(1, CPU_TOKENS // args.model_max_length)


def refuse_contradictions(args: Args, training: TrainingArguments) -> None:
    world = training.world_size
    share = world * args.mini_batches
    updates = args.mini_batches * args.num_iterations
    optimizer = getattr(training.optim, "value", training.optim)
    problems = {  # message -> whether that is so
        f"--prompts_per_step {args.prompts_per_step}: a multiple of {share}, {world} process(es) "
        f"times --mini_batches {args.mini_batches}": args.prompts_per_step % share != 0,
        f"--max_new_tokens {args.max_new_tokens}: below --model_max_length "
        f"{args.model_max_length}, which holds the prompt too": (
            args.max_new_tokens >= args.model_max_length
        ),
        f"--group_size {args.group_size}: {args.algorithm} compares the answers to one prompt, "
        "so 2 or more": args.algorithm in GROUPED and args.group_size < 2,
        "--group_size: spo tracks each prompt instead of asking it several times, so 1": (
            args.algorithm == "spo" and args.group_size != 1
        ),
        "--algorithm reinforce: one update for a rollout, since it has no ratio that tells how old "
        "an answer is; --mini_batches 1 --num_iterations 1": (
            args.algorithm == "reinforce" and updates > 1
        ),
        f"--gae_lambda {args.gae_lambda}, --gamma {args.gamma}: from 0 to 1": not (
            0 <= args.gae_lambda <= 1 and 0 <= args.gamma <= 1
        ),
        f"--clip_low {args.clip_low}: below 1": args.clip_low >= 1,
        f"--warmup_steps {training.warmup_steps}: a part of the run, below 1": (
            not 0 <= training.warmup_steps < 1
        ),
        f"--lr_scheduler_type: {', '.join(optim.SCHEDULES)}": (
            training.lr_scheduler_type not in optim.SCHEDULES
        ),
        f"--min_lr_ratio {args.min_lr_ratio}: from 0 to 1": not 0 <= args.min_lr_ratio <= 1,
        f"--optim {optimizer}: the loop has adamw_torch, fused or not": (
            any_given("optim") and training.optim not in ("adamw_torch", "adamw_torch_fused")
        ),
    }
    for name in NOT_HERE:
        problems[f"--{name}: not for reinforcement learning; train_rl.py uses plain processes"] = (
            any_given(name)
        )
    for message, wrong in problems.items():
        if wrong:
            raise cli.usage_error(message)


def say_unused(args: Args, training: TrainingArguments) -> None:
    for name, users in OF_ALGORITHM.items():
        if args.algorithm not in users:
            flags.say_unused([name], f"--algorithm {args.algorithm} has none")
    parts = weights_of(args.rewards)
    for name, part in OF_REWARD.items():
        if part not in parts:
            flags.say_unused([name], f"--rewards has no {part}")
    if parts.keys() <= {*RULES, "model"}:
        flags.say_unused(["reward_timeout"], "--rewards has neither code, a judge nor a file")
    if args.max_turns == 1:
        flags.say_unused(["tools"], "--max_turns 1 leaves no turn after a call")
    if training.max_steps > 0:
        flags.say_unused(["num_train_epochs"], "--max_steps says how long the run is")
