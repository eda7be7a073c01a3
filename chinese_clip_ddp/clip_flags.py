"""Flags of a training that do not go together: told in one line before anything is loaded."""

from __future__ import annotations

import towers
from contrastive import MODES, RIGHT

from common import cli
from common.runs import flags


def with_towers(argv: list[str]) -> list[str]:
    """Two towers of the user's choice are no built-in model."""
    given = {word.partition("=")[0].replace("-", "_") for word in argv}
    if "__image_model_name_or_path" in given and "__model_name_or_path" not in given:
        return ["--model_name_or_path", "two towers", *argv]
    return argv


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
    if args.cross_embedding != "exact" and (args.loss == "sigmoid" or args.teacher_name_or_path):
        raise cli.usage_error(
            f"--cross_embedding {args.cross_embedding}: the sigmoid loss and a teacher have the "
            "exact exchange only"
        )
    if args.cross_embedding not in RIGHT:
        cli.say(f"warning: --cross_embedding {args.cross_embedding}: {MODES[args.cross_embedding]}")
    flags.refuse_values(
        vars(args),
        {
            "grad_cache_chunk": flags.FROM_0,
            "image_mask_ratio": flags.SHARE,
            "teacher_weight": flags.FROM_0,
            "projection_dim": flags.FROM_1,
            "bad_picture_limit": (0, 1.000001),
        },
    )
    resolve_adapters(args)


def resolve_adapters(args) -> None:
    moving = [part for part, name in towers.TOWERS.items() if name in towers.TRAINED[args.train]]
    if args.use_lora and not args.lora_towers:
        args.lora_towers = ",".join(moving)
    asked = [part.strip() for part in args.lora_towers.split(",") if part.strip()]
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
