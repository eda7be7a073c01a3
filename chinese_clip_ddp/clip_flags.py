"""Flags of a training that do not go together: told in one line before anything is loaded."""

from __future__ import annotations

import towers
from contrastive import MODES, RIGHT

from common import cli
from common.runs import flags

TWO = "two towers"
OF_TWO = ("pooling", "image_pooling", "projection", "projection_dim")
ALIKE_ALONE = ("gather_nn", "custom", "base")  # modes without a difference in one process
RANGES = {
    "grad_cache_chunk": flags.FROM_0,
    "image_mask_ratio": flags.SHARE,
    "teacher_weight": flags.FROM_0,
    "projection_dim": flags.FROM_1,
    "bad_picture_limit": (0, 1.000001),
    "text_learning_rate": flags.FROM_0,
    "image_learning_rate": flags.FROM_0,
    "projection_learning_rate": flags.FROM_0,
}


def complete(argv: list[str]) -> list[str]:
    """What some flags mean for others: two towers of the user's choice are no built-in model, and
    adapters in some towers are adapters."""
    given = {word.partition("=")[0].replace("-", "_") for word in argv}
    more = []
    if "__image_model_name_or_path" in given and "__model_name_or_path" not in given:
        more += ["--model_name_or_path", TWO]
    if "__lora_towers" in given and "__use_lora" not in given:
        more += ["--use_lora", "true"]
    return [*more, *argv]


def resolve(args, training) -> None:
    """Refuse flags that do not go together; defaults that depend on others."""
    if training.gradient_accumulation_steps > 1:
        raise cli.usage_error(
            "--gradient_accumulation_steps: pairs of other steps are no negatives, so it makes no "
            "larger batch; raise --per_device_train_batch_size and give --grad_cache_chunk, which "
            "computes a large batch in parts"
        )
    if bool(args.text_model_name_or_path) != bool(args.image_model_name_or_path):
        raise cli.usage_error(
            "--text_model_name_or_path and --image_model_name_or_path: one names half a model"
        )
    if args.text_model_name_or_path and args.model_name_or_path != TWO:
        raise cli.usage_error(
            f"--model_name_or_path {args.model_name_or_path} (MODEL): two towers are named as "
            "well; give either one model or two towers"
        )
    if args.cross_embedding != "exact" and (args.loss == "sigmoid" or args.teacher_name_or_path):
        raise cli.usage_error(
            f"--cross_embedding {args.cross_embedding}: the sigmoid loss and a teacher have the "
            "exact exchange only"
        )
    flags.refuse_values(vars(args), RANGES)
    resolve_adapters(args)
    say_mode(args.cross_embedding, training.world_size)
    say_unused(args)


def say_mode(mode: str, world: int) -> None:
    """What the gradient of a mode is, where it is not the one of the whole batch."""
    if world == 1 and mode in ALIKE_ALONE:
        cli.say(f"note: --cross_embedding {mode}: one process has the whole batch, as with exact")
    elif mode not in RIGHT:
        cli.say(f"warning: --cross_embedding {mode}: {MODES[mode]}")


def resolve_adapters(args) -> None:
    moving = [part for part, name in towers.TOWERS.items() if name in towers.TRAINED[args.train]]
    if args.use_lora and not args.lora_towers:
        args.lora_towers = ",".join(moving)
    asked = list(dict.fromkeys(filter(None, map(str.strip, args.lora_towers.split(",")))))
    if asked and not args.use_lora:
        raise cli.usage_error(
            f"--lora_towers {args.lora_towers} --use_lora false: adapters are asked for and "
            "refused; leave one of the two away"
        )
    wrong = [part for part in asked if part not in moving]
    if wrong:
        raise cli.usage_error(
            f"--lora_towers {args.lora_towers}: --train {args.train} moves "
            f"{' and '.join(moving) or 'no tower'}, not {', '.join(wrong)}"
        )
    if args.use_lora and not asked:
        raise cli.usage_error(f"--use_lora: --train {args.train} moves no tower")
    args.lora_towers = ",".join(asked)
    args.use_lora = bool(asked)


def say_unused(args) -> None:
    """One line for flags that change nothing beside the others."""
    if not args.text_model_name_or_path:
        flags.say_unused(OF_TWO, "only towers of your choice are put together")
    elif args.projection == "none":
        flags.say_unused(["projection_dim"], "--projection none keeps the width of the towers")
    if not args.teacher_name_or_path:
        flags.say_unused(["teacher_weight"], "there is no --teacher_name_or_path")
    for part, tower in towers.TOWERS.items():
        if tower not in towers.TRAINED[args.train]:
            names = [f"{part}_learning_rate", *(["image_mask_ratio"] if part == "image" else [])]
            flags.say_unused(names, f"--train {args.train} leaves that tower as it is")


def name_of(args) -> str:
    """What is trained, for people."""
    if args.text_model_name_or_path:
        return f"{args.text_model_name_or_path} + {args.image_model_name_or_path}"
    return args.model_name_or_path


def check_projections(args, config) -> None:
    """SystemExit where projections are to be trained that a model does not have; one line for their
    rate."""
    if towers.has_projections(config):
        return
    if args.train == "projection":
        raise SystemExit(f"--train projection: {name_of(args)} has no projections")
    flags.say_unused(["projection_learning_rate"], f"{name_of(args)} has no projections")


def check_window(args, config) -> None:
    """A usage error where captions would be longer than the positions of the text tower."""
    if config.model_type == "siglip":
        flags.say_unused(["model_max_length"], "SigLIP takes captions of its own fixed length")
    elif args.model_max_length is not None:
        flags.check_window(args, config)
