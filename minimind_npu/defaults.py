"""What the flags of train.py are for each stage, model and device when nobody gives them."""

from __future__ import annotations

from dataclasses import fields

import torch
from model import MiniMindConfig
from named import HERE, OUTPUT, any_given, has_experts, width_of

from common import device

SAMPLES = {
    "pretrain": "pretrain",
    "mid": "sft",
    "sft": "sft",
    "lora": "lora_identity.jsonl",
    "dpo": "dpo.jsonl",
    "distill": "sft",
    "reason": "reason.jsonl",
}
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


def fill_in(args, training, base: str) -> None:
    """Whatever somebody has typed stays. args, training: of settings.parse_args, changed in
    place."""
    set_defaults(args, training, base)
    fit_batches_to_cpu(args, training)
    args.data_path = args.data_path or str(HERE / "data" / SAMPLES[args.stage])
    args.use_lora = args.use_lora or args.stage == "lora"
    training.output_dir = training.output_dir or str(OUTPUT / args.stage)


def set_defaults(args, training, base: str) -> None:
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
    own = {one.name for one in fields(args)}
    for name, value in defaults.items():
        if not any_given(name):
            owner = args if name in own else training
            setattr(owner, name, value)


def defaults_of_depth(args, training) -> dict:
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


def fit_batches_to_cpu(args, training) -> None:
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
