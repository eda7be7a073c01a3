"""The flags of train.py.

What they are when nobody gives them: defaults.py; which are refused: refusals.py; models by name:
named.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import defaults
import refusals
import weights
from model import SIZES
from named import STAGES, arch_of, own_model, start_from
from transformers import TrainingArguments

from common import cli
from common.runs import flags

NAMES = (
    f"random weights of a size: {', '.join(list(SIZES)[:-1])}; to go on from: a folder, or a stage "
    "whose output is there; unset: the stage before, else tiny"
)


@dataclass
class Args(cli.RunArgs, cli.DataArgs, cli.LoraArgs):
    stage: str = field(default="pretrain", metadata={"help": ", ".join(STAGES)})
    model_name_or_path: str = field(
        default="tiny", metadata={"aliases": ["--size", "--from_weight"], "help": NAMES}
    )
    hidden_size: int = field(
        default=0, metadata={"help": "changes the size: width; 0: the size's own"}
    )
    num_hidden_layers: int = field(default=0, metadata={"help": "changes the size: layers"})
    use_moe: bool | None = field(
        default=None, metadata={"help": "changes the size: experts instead of one SwiGLU"}
    )
    depth: int = field(
        default=0,
        metadata={"help": "pretrain: layers, and all other sizes, steps and rates with them"},
    )
    arch: str = field(
        default="minimind",
        metadata={"help": f"network of random weights: {', '.join(weights.ARCHITECTURES)}"},
    )
    tokens_per_parameter: float = field(
        default=12.0, metadata={"help": "depth: tokens for each of the matrices and the head"}
    )
    tokenizer: str = field(
        default="", metadata={"help": "folder; unset: the model's, for random weights the shipped"}
    )
    model_max_length: int = field(
        default=512, metadata={"aliases": ["--max_seq_len"], "help": "tokens of a window"}
    )
    optimizer: str = field(
        default="adamw", metadata={"help": "adamw, or muon for the matrices of the blocks"}
    )
    muon_lr: float = field(default=0.02, metadata={"help": "peak learning rate of Muon's matrices"})
    head_lr: float = field(
        default=0.0, metadata={"help": "that of a head with weights of its own; 0: as the table's"}
    )
    min_lr_ratio: float = field(
        default=0.1, metadata={"help": "share of its peak that the learning rate ends at"}
    )
    max_minutes: float = field(
        default=0.0, metadata={"help": "end after so long, the schedule with it; 0: by epochs"}
    )
    lora_alpha: float = field(
        default=32, metadata={"help": "the adapter is scaled by lora_alpha / lora_r"}
    )
    beta: float = field(default=0.15, metadata={"help": "dpo: strength of the reference"})
    reference: str = field(
        default="cached", metadata={"help": "dpo: cached (once), or adapter (switched off)"}
    )
    teacher: str = field(default="", metadata={"help": "distill: folder of the teacher"})
    alpha: float = field(
        default=0.5, metadata={"help": "distill: share of the labels; the rest is the teacher's"}
    )
    temperature: float = field(default=1.5, metadata={"help": "distill: of both distributions"})
    think_weight: float = field(
        default=10.0, metadata={"help": "reason: weight of the tags' tokens in the loss"}
    )
    max_new_tokens: int = field(default=96, metadata={"help": "length limit of those answers"})

    # no flags here: windows are always packed, an adapter stands on every layer of the blocks
    packing: bool = field(default=True, init=False)
    target_modules: str = field(default="all-linear", init=False)


RANGES = {
    "model_max_length": (16, flags.NEVER),
    "hidden_size": flags.FROM_0,
    "num_hidden_layers": flags.FROM_0,
    "muon_lr": flags.FROM_0,
    "head_lr": flags.FROM_0,
    "depth": flags.FROM_0,
    "tokens_per_parameter": flags.ABOVE_0,
    "max_minutes": flags.FROM_0,
    "beta": flags.ABOVE_0,
    "temperature": flags.ABOVE_0,
    "think_weight": flags.FROM_0,
}
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
    "gradient_accumulation_steps",
)


def parse_args() -> tuple[Args, TrainingArguments, str]:
    """The command line -> (args, training, where the weights come from: see start_from)."""
    args, training = cli.parse_args(
        (Args, TrainingArguments), defaults.DEFAULTS, {}, by_trainer=False
    )
    flags.refuse_values(vars(args), RANGES)
    base = start_from(args)
    refusals.refuse_sizes(base, args)
    if args.teacher:
        args.teacher = own_model(args.teacher, "--teacher")
    resolve(args, training, base)
    return args, training, base


def resolve(args: Args, training: TrainingArguments, base: str) -> None:
    """Defaults that depend on the stage and the model; flags that do not go together."""
    refusals.refuse_unknown_to_the_loop()
    args.arch = arch_of(base, args)
    defaults.fill_in(args, training, base)
    refusals.refuse_contradictions(args, training)
    refusals.say_unused(args, training)
