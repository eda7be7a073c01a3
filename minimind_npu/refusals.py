"""Flags of train.py that cannot be obeyed, or not together: usage errors of one line; and those
that change nothing, which are told."""

from __future__ import annotations

from dataclasses import fields

import weights
from defaults import muon_runs_here
from loop import optim
from model import SIZES, MiniMindConfig
from named import any_given
from transformers import TrainingArguments

from common import cli, device
from common.convert import models
from common.runs import flags

SIZE_FLAGS = ("hidden_size", "num_hidden_layers", "use_moe")
DEPTH_FLAGS = ("tokens_per_parameter",)
OF_STAGE = {
    "dpo": ("beta", "reference"),
    "distill": ("alpha", "temperature"),
    "reason": ("think_weight",),
}
# fields of TrainingArguments that the loop obeys; any other one given is refused, not ignored
HONOURED = {
    "output_dir",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "logging_steps",
    "save_steps",
    "save_strategy",
    "eval_steps",
    "save_total_limit",
    "report_to",
    "seed",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "activation_checkpointing",
    "torch_compile",
    "deepspeed",
    "resume_from_checkpoint",
    "ddp_timeout",
    "optim",
    "use_cpu",
    "local_rank",
}


def refuse_unknown_to_the_loop() -> None:
    for one in fields(TrainingArguments):
        if any_given(one.name) and one.name not in HONOURED:
            raise cli.usage_error(
                f"--{one.name}: the loop of this recipe does not know it; see --help and "
                "refusals.py"
            )


def refuse_contradictions(args, training) -> None:
    muon = args.optimizer == "muon"
    is_minimind = args.arch == MiniMindConfig.model_type
    distills = args.stage == "distill"
    optimizer = getattr(training.optim, "value", training.optim)
    problems = {  # message -> whether that is so
        f"--optimizer {args.optimizer}: adamw or muon": args.optimizer not in ("adamw", "muon"),
        f"--lr_scheduler_type: {', '.join(optim.SCHEDULES)}": (
            training.lr_scheduler_type not in optim.SCHEDULES
        ),
        "--optimizer muon: DeepSpeed cuts the matrices that it needs whole; train without "
        "--deepspeed": muon and bool(training.deepspeed),
        "--optimizer muon: for the matrices of the blocks, not for those of an adapter": (
            muon and args.use_lora
        ),
        f"--optimizer muon computes in bfloat16, which {device.name()} lacks": (
            muon and not muon_runs_here()
        ),
        "--teacher: --stage distill needs the folder of one": distills and not args.teacher,
        f"--teacher: --stage {args.stage} has none": not distills and bool(args.teacher),
        f"--warmup_steps {training.warmup_steps}: a part of the run, below 1": (
            not 0 <= training.warmup_steps < 1
        ),
        f"--reference {args.reference}: cached or adapter": (
            args.reference not in ("cached", "adapter")
        ),
        "--reference adapter: there is no adapter to switch off; add --use_lora true": (
            args.reference == "adapter" and not args.use_lora
        ),
        "--stage distill: between networks of MiniMind's kind only": distills and not is_minimind,
        "--use_moe: --arch nanochat has no experts": bool(args.use_moe) and not is_minimind,
        f"--alpha {args.alpha}: from 0 to 1": not 0 <= args.alpha <= 1,
        f"--min_lr_ratio {args.min_lr_ratio}: from 0 to 1": not 0 <= args.min_lr_ratio <= 1,
        f"--optim {optimizer}: the loop has adamw_torch, fused or not, and --optimizer muon": (
            any_given("optim") and training.optim not in ("adamw_torch", "adamw_torch_fused")
        ),
    }
    for message, wrong in problems.items():
        if wrong:
            raise cli.usage_error(message)


def refuse_sizes(base: str, args) -> None:
    """Flags that change a size, beside weights that have another; sizes that no model has."""
    if base not in SIZES:
        config = models.model_config(base)
        flags.check_window(args, config)
        for name in SIZE_FLAGS:
            asked = getattr(args, name)
            own = getattr(config, name, None)
            if any_given(name) and asked != own:
                raise cli.usage_error(
                    f"--{name} {asked}: the weights of {base} have their own, {own}; random ones "
                    f"have what --size says: {', '.join(SIZES)}"
                )
        if any_given("arch") and args.arch != config.model_type:
            raise cli.usage_error(f"--arch {args.arch}: the weights of {base} are of another one")
        return
    if args.arch not in weights.ARCHITECTURES:
        raise cli.usage_error(f"--arch {args.arch}: {', '.join(weights.ARCHITECTURES)}")
    if args.depth:
        return
    heads = SIZES[base].get("num_attention_heads", MiniMindConfig().num_attention_heads)
    if args.hidden_size % (2 * heads):
        raise cli.usage_error(
            f"--hidden_size {args.hidden_size}: a multiple of {2 * heads}, since {heads} heads of "
            "an even size share it"
        )


def say_unused(args, training) -> None:
    """Flags of another stage, or of what is not used: run_all.sh gives them to every stage."""
    for stage, names in OF_STAGE.items():
        if args.stage != stage:
            flags.say_unused(names, f"--stage {args.stage} has none")
    if not args.depth:
        flags.say_unused(DEPTH_FLAGS, "without --depth the other flags say how long the run is")
    if args.optimizer != "muon":
        flags.say_unused(["muon_lr"], "--optimizer adamw has no matrices of Muon")
    if not args.use_lora:
        flags.say_unused(
            ["lora_r", "lora_alpha", "lora_dropout"],
            "there is no adapter (--stage lora or --use_lora true)",
        )
    if training.max_steps > 0:
        flags.say_unused(["num_train_epochs"], "--max_steps says how long the run is")
