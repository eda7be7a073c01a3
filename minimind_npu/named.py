"""Models, stages and tokenizers by the names that people give them: where a run's weights come
from, and what is known of them before they are loaded.

A base is a name of model.SIZES, which stands for random weights, or the folder of a model.
"""

from __future__ import annotations

from pathlib import Path

import weights
from model import SIZES

from common import cli
from common.convert import models
from common.demo.chat_model import find_model

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "output" / HERE.name
STAGES = ("pretrain", "mid", "sft", "lora", "dpo", "distill", "reason")
FROM = {  # what a stage goes on from
    "mid": ("pretrain",),
    "sft": ("mid", "pretrain"),
    "lora": ("sft",),
    "dpo": ("sft",),
    "reason": ("dpo", "sft"),
}


def any_given(*flags: str) -> bool:
    """Whether somebody has typed one of them."""
    return any(cli.given_by_user(flag) for flag in flags)


# ---- what a run starts from ----------------------------------------------------------------------


def start_from(args) -> str:
    """Where the weights come from: a name of SIZES (random ones), or a folder."""
    if args.stage not in STAGES:
        raise cli.usage_error(f"--stage {args.stage}: {', '.join(STAGES)}")
    name = args.model_name_or_path
    if args.depth:
        return start_from_depth(args)
    if name == "depth":
        raise cli.usage_error("--size depth: --depth 12, for example, says which")
    stages = FROM.get(args.stage, ())
    if name in STAGES:
        stages = (name,)
    elif any_given("model_name_or_path", "size", "from_weight"):
        stages = ()
    for stage in stages:
        if (OUTPUT / stage / "final").is_dir():
            return own_model(str(OUTPUT / stage), "--from_weight")
    if name in STAGES:
        final = OUTPUT / name / "final"
        raise SystemExit(f"--from_weight {name}: {final} is not there; train that stage first")
    if stages:
        cli.say(
            f"note: no output of {' or '.join(stages)} to go on from; starting from random weights"
        )
    return name if name in SIZES else own_model(name, "--from_weight")


def start_from_depth(args) -> str:
    """The name of random weights whose sizes --depth says; sets those that were not typed."""
    if args.stage != "pretrain":
        raise cli.usage_error(
            f"--depth: for new models; --stage {args.stage} has the sizes of what it goes on from"
        )
    if any_given("model_name_or_path", "size", "from_weight"):
        raise cli.usage_error(
            f"--depth {args.depth} and --size {args.model_name_or_path}: one of them says how "
            "large the model is"
        )
    args.num_hidden_layers = args.num_hidden_layers or args.depth
    args.hidden_size = args.hidden_size or weights.width_of_depth(args.depth)
    if args.hidden_size % weights.HEAD_DIM:
        raise cli.usage_error(
            f"--hidden_size {args.hidden_size}: with --depth a multiple of {weights.HEAD_DIM}, the "
            "numbers of a head"
        )
    return "depth"


def own_model(name: str, flag: str) -> str:
    """A run's folder -> its final/; a model folder and a hub id stay. SystemExit for what this
    model class cannot go on from: a folder of transformers' own classes would load in part, with
    random weights for the rest."""
    if "/" not in name and not Path(name).is_dir():
        sizes = ", ".join(SIZES)
        raise SystemExit(f"{flag} {name}: neither a folder nor a size ({sizes}) nor a stage")
    folder = find_model(name)
    if Path(folder, "adapter_config.json").is_file():
        raise SystemExit(
            f"{flag} {name} is an adapter; make a model of it: export.py --adapter, then --import"
        )
    kind = models.model_config(folder, flag).model_type
    if kind not in weights.ARCHITECTURES:
        raise SystemExit(
            f"{flag} {name} is a {kind} model; bring it over first: export.py --import "
            f"--model {name}"
        )
    return folder


# ---- what is known of it -------------------------------------------------------------------------


def width_of(base: str, args) -> int:
    """Of the model that starts from `base`."""
    if base in SIZES:
        return args.hidden_size or SIZES[base]["hidden_size"]
    return models.model_config(base).hidden_size


def arch_of(base: str, args) -> str:
    """One of weights.ARCHITECTURES."""
    return args.arch if base in SIZES else models.model_config(base).model_type


def has_experts(base: str, args) -> bool:
    if args.use_moe is not None:
        return args.use_moe
    if base in SIZES:
        return SIZES[base].get("use_moe", False)
    return getattr(models.model_config(base), "use_moe", False)


def tokenizer_of(args, base: str) -> str:
    """The folder of the tokenizer: the one named, the model's, the teacher's, or for random weights
    the shipped one."""
    if args.tokenizer:
        return args.tokenizer
    if base not in SIZES:
        return base
    if args.teacher:
        return args.teacher
    if not base.startswith("tiny"):
        cli.say(
            "warning: the shipped tokenizer knows the characters of the sample data and spells "
            f"other text byte by byte; for --size {base} train one on your texts "
            "(train_tokenizer.py) and give it with --tokenizer"
        )
    return str(HERE / "tokenizer")
