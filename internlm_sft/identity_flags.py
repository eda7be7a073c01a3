"""Flags that depend on one another, and what does not go together."""

from __future__ import annotations

import identity_trainer
import mixing

from common import cli
from common.runs import flags

FULL_LEARNING_RATE = 1e-5  # all weights want a tenth of an adapter's rate
RANGES = {
    "identity_ratio": (0.01, 1.0),
    "kl_weight": flags.FROM_0,
    "max_forgetting": flags.FROM_0,
}


def resolve_args(args, training) -> None:
    """Refuse flags that do not go together; defaults that depend on others."""
    flags.refuse_values(vars(args), RANGES)
    if args.packing and training.train_sampling_strategy == "group_by_length":
        raise cli.usage_error(
            "--group_by_length: packing already fills the windows; "
            "add --packing false to group rows"
        )
    if args.early_stop not in identity_trainer.STOPS:
        raise cli.usage_error(
            f"--early_stop {args.early_stop}: {', '.join(identity_trainer.STOPS)}"
        )
    if args.early_stop != "no" and not args.eval_generate:
        raise cli.usage_error("--early_stop asks the model; give an --eval_generate above 0")
    if args.kl_weight and not (args.use_lora and args.packing):
        raise cli.usage_error(
            "--kl_weight needs --use_lora true (the adapter switched off is the base) and "
            "--packing true"
        )
    if args.early_stop == "guard":
        check_guard(args)
    else:
        flags.say_unused(["max_forgetting"], "only --early_stop guard looks at it")
    mixing.say_unused(args)
    is_tiny = args.model_name_or_path == "tiny"
    if not args.use_lora and not is_tiny and not cli.given_by_user("learning_rate"):
        training.learning_rate = FULL_LEARNING_RATE


def check_guard(args) -> None:
    """A usage error where the guard of --early_stop would see no general rows."""
    _, files = mixing.words_of(args.data_path)
    if not (files and args.eval_ratio and args.max_eval_samples):
        raise cli.usage_error(
            "--early_stop guard watches the loss of held-out general rows: name files in "
            "--data_path, with an --eval_ratio and --max_eval_samples above 0"
        )
