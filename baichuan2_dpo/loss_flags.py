"""Flags of the loss and of the reference that do not go together, or change nothing."""

from __future__ import annotations

import dpo_losses

from common import cli
from common.runs import flags

RANGES = {
    "beta": flags.ABOVE_0,
    "label_smoothing": (0, 0.5),
    "simpo_gamma": flags.FROM_0,
    "rpo_alpha": flags.FROM_0,
}
SMOOTHED = ("sigmoid", "robust", "simpo")


def check(args) -> None:
    """args: of train.py. Usage errors, and a line for what has no effect."""
    flags.refuse_values(vars(args), RANGES)
    check_loss(args)
    check_reference(args)
    say_unused(args)


def check_loss(args) -> None:
    kind = args.loss_type
    if kind not in dpo_losses.KINDS:
        raise cli.usage_error(f"--loss_type {kind}: {', '.join(dpo_losses.KINDS)}")
    if args.label_smoothing and kind not in SMOOTHED:
        raise cli.usage_error(f"--label_smoothing: --loss_type {kind} has none")


def check_reference(args) -> None:
    if args.reference not in ("precomputed", "adapter", "model"):
        raise cli.usage_error(f"--reference {args.reference}: precomputed, adapter or model")
    if args.reference == "adapter" and not args.use_lora:
        raise cli.usage_error(
            "--reference adapter: there is no adapter to switch off; precomputed or model"
        )
    if args.reference_model and args.loss_type in dpo_losses.REFERENCE_FREE:
        raise cli.usage_error(f"--reference_model: --loss_type {args.loss_type} has no reference")
    if args.reference_model and args.reference == "adapter":
        raise cli.usage_error("--reference_model: --reference adapter takes the base itself")


def needs_second_model(args) -> bool:
    """Whether the reference is a model of its own, in memory all the time."""
    return args.reference == "model" and args.loss_type not in dpo_losses.REFERENCE_FREE


def say_unused(args) -> None:
    kind = args.loss_type
    if kind != "simpo":
        flags.say_unused(["simpo_gamma"], f"--loss_type {kind} has no target margin")
    if kind in dpo_losses.REFERENCE_FREE:
        flags.say_unused(["reference"], f"--loss_type {kind} has no reference")
    if not args.packing:
        flags.say_unused(["share_prompt"], "without packing each answer has its own row")
