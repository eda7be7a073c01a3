"""Flags that depend on one another: what --train_type decides, and what does not go together."""

from __future__ import annotations

from parts import ALIASES, TRAINED

from common import cli
from common.runs import flags

SAMPLES = {"projector": "captions"}  # --train_type -> folder of the samples; else questions
# LLaVA-1.5's
STAGE_1_RATE = 1e-3
RATE = 2e-5
LORA_RATE = 2e-4
VISION_RATE = 2e-6
HIGHEST_RATE = 5e-5  # of a full training; at 4e-4 models were seen to forget how to speak


def spelled_out(argv: list[str]) -> list[str]:
    """The command line with --train_type and --use_lora saying the same, and older names of
    --train_type as today's."""
    words = list(argv)
    kind = _value(words, "train_type")
    if kind in ALIASES:
        cli.say(f"note: --train_type {kind} is --train_type {ALIASES[kind]} now")
        words += ["--train_type", ALIASES[kind]]
        kind = ALIASES[kind]
    lora = _value(words, "use_lora")
    if kind == "lora" and lora is None:
        words += ["--use_lora", "true"]
    if kind is None and lora is not None and lora.lower() in ("true", "1", "yes", ""):
        words += ["--train_type", "lora"]
    return words


def _value(words: list[str], name: str) -> str | None:
    """What stands last on the command line for a flag; "" for a switch without a value."""
    found = None
    # without a word there is none that follows either
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag[2:].replace("-", "_") != name:
            continue
        if not equals:
            value = "" if following.startswith("--") else following
        found = value
    return found


def resolve(args, training) -> None:
    """Refuse flags that do not go together; defaults that depend on others."""
    kind = args.train_type
    is_tiny = args.model_name_or_path == "tiny"
    if (kind == "lora") != args.use_lora:
        raise cli.usage_error(f"--use_lora {args.use_lora} with --train_type {kind}: lora or not?")
    if args.lora_vision and kind != "lora":
        raise cli.usage_error("--lora_vision: adapters in the tower go with --train_type lora")
    if args.stage_1 and not is_tiny:
        raise cli.usage_error(
            "--stage_1: of the built-in model; name others' by --model_name_or_path"
        )
    if args.leak_check:
        raise cli.usage_error(
            "--leak_check compares texts; rows with pictures it cannot tell apart"
        )
    if args.packing and training.train_sampling_strategy == "group_by_length":
        raise cli.usage_error(
            "--group_by_length: packing already fills the windows; "
            "add --packing false to group rows"
        )
    flags.refuse_values(
        vars(args),
        {"max_images_per_bin": flags.FROM_1, "feature_cache_gb": flags.FROM_0}
        | {"projector_learning_rate": flags.FROM_0, "vision_learning_rate": flags.FROM_0},
    )
    if not 0 <= args.bad_picture_limit <= 1:
        raise cli.usage_error(f"--bad_picture_limit {args.bad_picture_limit:g}: from 0 to 1")
    if not args.packing:
        flags.say_unused(["share_images", "max_images_per_bin"], "rows are not packed")
    if "vision tower" not in TRAINED[kind] and not args.lora_vision:
        flags.say_unused(["vision_learning_rate"], "the vision tower does not train")
    else:
        flags.say_unused(["feature_cache_gb"], "a tower that trains runs in every step")
    settle_rates(args, training, is_tiny)


def settle_rates(args, training, is_tiny: bool) -> None:
    """LLaVA-1.5's, where no flag says otherwise."""
    kind = args.train_type
    if not is_tiny and not cli.given_by_user("learning_rate"):
        training.learning_rate = {"projector": STAGE_1_RATE, "lora": LORA_RATE}.get(kind, RATE)
    rate = training.learning_rate
    if args.projector_learning_rate is None:
        args.projector_learning_rate = RATE if kind == "lora" and not is_tiny else rate
    if args.vision_learning_rate is None:
        has_own = kind != "lora" and not is_tiny  # adapters have the adapters' rate
        args.vision_learning_rate = VISION_RATE if has_own else rate
    if kind in ("full", "freeze_vision") and not is_tiny and rate > HIGHEST_RATE:
        cli.say(
            f"warning: --learning_rate {rate:g} is {rate / RATE:.0f} times what LLaVA-1.5 trains a "
            "whole language model with; above 5e-5 it forgets what it knew"
        )
