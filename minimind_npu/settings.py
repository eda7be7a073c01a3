"""The flags of train.py, and what they are for each stage when nobody gives them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import weights
from loop import optim
from model import SIZES, MiniMindConfig
from transformers import TrainingArguments

from common import cli, device
from common.convert import models
from common.demo.chat_model import find_model
from common.runs import flags

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
SAMPLES = {
    "pretrain": "pretrain",
    "mid": "sft",
    "sft": "sft",
    "lora": "lora_identity.jsonl",
    "dpo": "dpo.jsonl",
    "distill": "sft",
    "reason": "reason.jsonl",
}
NAMES = (
    f"random weights of a size: {', '.join(list(SIZES)[:-1])}; to go on from: a folder, or a stage "
    "whose output is there; unset: the stage before, else tiny"
)


# ---- flags ---------------------------------------------------------------------------------------


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


# ---- defaults ------------------------------------------------------------------------------------

DEFAULTS = dict(
    output_dir="",
    per_device_train_batch_size=16,
    gradient_accumulation_steps=1,
    num_train_epochs=2,
    warmup_steps=0.03,
    weight_decay=0.1,
    max_grad_norm=1.0,
    lr_scheduler_type="cosine",
    logging_steps=20,
    save_steps=1000,
    save_total_limit=2,
    report_to=["tensorboard"],
)
STAGE = {  # learning rates, windows and epochs of real models; windows as for an accelerator
    "pretrain": dict(learning_rate=1e-3, model_max_length=512, per_device_train_batch_size=32),
    "mid": dict(
        learning_rate=5e-4,
        model_max_length=1024,
        per_device_train_batch_size=16,
        num_train_epochs=1,
    ),
    "sft": dict(learning_rate=1e-4, model_max_length=1024, per_device_train_batch_size=16),
    "lora": dict(
        learning_rate=3e-4, model_max_length=512, per_device_train_batch_size=16, num_train_epochs=5
    ),
    "dpo": dict(
        learning_rate=1e-6, model_max_length=2048, per_device_train_batch_size=8, num_train_epochs=1
    ),
    "distill": dict(learning_rate=2e-4, model_max_length=1024, per_device_train_batch_size=16),
    "reason": dict(learning_rate=2e-5, model_max_length=1024, per_device_train_batch_size=16),
}
CPU_TOKENS = 2048  # of a batch: larger ones need more memory and are not faster

# models narrower than this learn the samples from nothing: small steps, many of them
TOY_WIDTH = 256
TOY = {
    "pretrain": dict(
        learning_rate=4e-3,
        model_max_length=256,
        per_device_train_batch_size=1,
        num_train_epochs=1.5,
    ),
    "mid": dict(
        learning_rate=3e-3,
        muon_lr=0.01,
        model_max_length=256,
        per_device_train_batch_size=1,
        num_train_epochs=1,
    ),
    "sft": dict(
        learning_rate=3e-3,
        muon_lr=0.01,
        model_max_length=256,
        per_device_train_batch_size=1,
        num_train_epochs=3,
    ),
    "lora": dict(
        learning_rate=1e-2, model_max_length=256, per_device_train_batch_size=1, num_train_epochs=30
    ),
    "dpo": dict(
        learning_rate=2e-4, model_max_length=512, per_device_train_batch_size=4, num_train_epochs=2
    ),
    "distill": dict(
        learning_rate=3e-3, model_max_length=256, per_device_train_batch_size=1, num_train_epochs=3
    ),
    "reason": dict(
        learning_rate=1e-3, model_max_length=256, per_device_train_batch_size=1, num_train_epochs=4
    ),
}
TOY_SAVE_STEPS = 300
COMPILED_WIDTH = 256
TOY_MUON = ("pretrain", "mid", "sft", "distill")  # stages of toys that take Muon where it can work


def parse_args() -> tuple[Args, TrainingArguments, str]:
    """The command line -> (args, training, where the weights come from: see start_from)."""
    args, training = cli.parse_args((Args, TrainingArguments), DEFAULTS, {}, by_trainer=False)
    flags.refuse_values(vars(args), RANGES)
    base = start_from(args)
    refuse_sizes(base, args)
    if args.teacher:
        args.teacher = own_model(args.teacher, "--teacher")
    resolve(args, training, base)
    return args, training, base


def resolve(args: Args, training: TrainingArguments, base: str) -> None:
    """Defaults that depend on the stage and the model; flags that do not go together."""
    refuse_unknown_to_the_loop()
    args.arch = arch_of(base, args)
    set_defaults(args, training, base)
    fit_batches_to_cpu(args, training)
    args.data_path = args.data_path or str(HERE / "data" / SAMPLES[args.stage])
    args.use_lora = args.use_lora or args.stage == "lora"
    training.output_dir = training.output_dir or str(OUTPUT / args.stage)
    refuse_contradictions(args, training)
    say_unused(args, training)


def any_given(*flags: str) -> bool:
    return any(cli.given_by_user(flag) for flag in flags)


def set_defaults(args: Args, training: TrainingArguments, base: str) -> None:
    width = width_of(base, args)
    if width >= TOY_WIDTH:
        defaults = dict(STAGE[args.stage])
    else:
        defaults = TOY[args.stage] | {"save_steps": TOY_SAVE_STEPS}
        whole_matrices = not (training.deepspeed or args.use_lora)
        if args.stage in TOY_MUON and whole_matrices and muon_runs_here():
            defaults["optimizer"] = "muon"
    if args.depth:
        defaults |= defaults_of_depth(args, training)
    # a toy is trained before it is compiled, of experts little can be, under ZeRO nothing was tried
    is_plain = width >= COMPILED_WIDTH and not has_experts(base, args) and not training.deepspeed
    is_plain = is_plain and args.arch == MiniMindConfig.model_type
    defaults["torch_compile"] = is_plain and device.compile_pays()
    if any_given("max_seq_len"):  # the other name of the flag
        defaults = {name: v for name, v in defaults.items() if name != "model_max_length"}
    own = {one.name for one in fields(Args)}
    for name, value in defaults.items():
        if not any_given(name):
            owner = args if name in own else training
            setattr(owner, name, value)


def defaults_of_depth(args: Args, training: TrainingArguments) -> dict:
    """What needs no tokenizer; lengths and rates: road/dial.py."""
    with_muon = muon_runs_here() and not training.deepspeed
    return {
        "model_max_length": 2048 if args.depth >= 8 else 512,
        "optimizer": "muon" if with_muon else "adamw",
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": 0.02,
        "min_lr_ratio": 0.05,
    }


def muon_runs_here() -> bool:
    """It computes in bfloat16, which a CPU can at least do slowly."""
    return device.kind() == "cpu" or device.half_dtype() is torch.bfloat16


def fit_batches_to_cpu(args: Args, training: TrainingArguments) -> None:
    """On a CPU the same step in smaller batches, where nobody has chosen them."""
    if any_given("per_device_train_batch_size", "gradient_accumulation_steps"):
        return
    if device.kind() != "cpu":
        return
    windows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    most = max(1, CPU_TOKENS // args.model_max_length)
    # the largest that the windows of a step divide into, so that the step stays the same
    batch = max(size for size in range(1, most + 1) if windows % size == 0)
    if batch < training.per_device_train_batch_size:
        training.per_device_train_batch_size = batch
        training.gradient_accumulation_steps = windows // batch


# ---- refusals ------------------------------------------------------------------------------------


def refuse_unknown_to_the_loop() -> None:
    for one in fields(TrainingArguments):
        if any_given(one.name) and one.name not in HONOURED:
            raise cli.usage_error(
                f"--{one.name}: the loop of this recipe does not know it; see --help and "
                "settings.py"
            )


def refuse_contradictions(args: Args, training: TrainingArguments) -> None:
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
        "--torch_compile: the blocks of MiniMind's network only": (
            training.torch_compile and not is_minimind
        ),
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


def refuse_sizes(base: str, args: Args) -> None:
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


def say_unused(args: Args, training: TrainingArguments) -> None:
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


# ---- models and tokenizers by name ---------------------------------------------------------------


def start_from(args: Args) -> str:
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


def start_from_depth(args: Args) -> str:
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


def width_of(base: str, args: Args) -> int:
    """Of the model that starts from `base`."""
    if base in SIZES:
        return args.hidden_size or SIZES[base]["hidden_size"]
    return models.model_config(base).hidden_size


def arch_of(base: str, args: Args) -> str:
    """One of weights.ARCHITECTURES."""
    return args.arch if base in SIZES else models.model_config(base).model_type


def has_experts(base: str, args: Args) -> bool:
    if args.use_moe is not None:
        return args.use_moe
    if base in SIZES:
        return SIZES[base].get("use_moe", False)
    return getattr(models.model_config(base), "use_moe", False)


def tokenizer_of(args: Args, base: str) -> str:
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
