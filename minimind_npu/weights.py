"""Where a run's model comes from, and how it is written: random weights, a folder, an adapter."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import model as minimind
import nanochat
import torch
from loop import compiled, parallel, state
from loop.precision import fast_float32, product_shapes
from stages import lora
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from common import cli, device
from common.convert import adapter, models
from common.convert.older_readers import save_tokenizer
from common.fast import attention, losses
from common.runs import memory_check, run_folder
from common.runs.engine import load_dtype
from common.runs.generate import remember_ends

ARCHITECTURES = ("minimind", nanochat.MODEL_TYPE)
WIDTH_OF_LAYER = 64  # of --depth
HEAD_DIM = 128
SIZES_OF_NANOCHAT = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def width_of_depth(depth: int) -> int:
    """64 a layer, up to a multiple of a head."""
    return HEAD_DIM * math.ceil(depth * WIDTH_OF_LAYER / HEAD_DIM)


def changes_of_size(args) -> dict:
    """What the flags change of a size."""
    given = ("hidden_size", "num_hidden_layers")
    changes = {one: getattr(args, one) for one in given if getattr(args, one)}
    if args.depth:
        heads = args.hidden_size // HEAD_DIM
        changes |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    if args.use_moe is not None:
        changes["use_moe"] = args.use_moe
    return changes


def config_of(name: str, args, vocab_size: int) -> PretrainedConfig:
    """Of random weights of a size (of model.SIZES), as the flags change it."""
    sizes = minimind.SIZES[name] | changes_of_size(args)
    return config_of_sizes(args.arch, vocab_size, sizes, args.model_max_length)


def config_of_sizes(arch: str, vocab_size: int, sizes: dict, window: int) -> PretrainedConfig:
    """sizes: width, layers, heads as configs name them; window: tokens of a row."""
    if arch == nanochat.MODEL_TYPE:
        known = {name: sizes[name] for name in SIZES_OF_NANOCHAT if name in sizes}
        return nanochat.config_of(vocab_size, window=window, **known)
    return minimind.config_of("depth", vocab_size, **sizes)


def kind_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the model that a config belongs to."""
    if config.model_type == nanochat.MODEL_TYPE:
        return nanochat.NanoChatForCausalLM
    return minimind.MiniMindForCausalLM


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """float32 weights from torch's global generator."""
    if config.model_type == nanochat.MODEL_TYPE:
        return nanochat.build(config)
    return minimind.MiniMindForCausalLM(config)


def memory_facts(args, training) -> dict:
    """Of memory_plan.Setup: how this loop trains. Compiled layers cast their weights themselves, in
    every micro-batch."""
    casts_once = not training.torch_compile
    return {"references": int(args.stage == "distill"), "casts_once": casts_once}


def fit_batch(name: str, args, training, tokenizer) -> None:
    """On an accelerator, where nobody has chosen the batch: the windows of a step in micro-batches
    that its memory has room for, so that a step is the same on any card. A run that goes on keeps
    what it began with. All ranks call it."""
    flags = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if device.kind() == "cpu" or any(map(cli.given_by_user, flags)):
        return
    windows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    past = run_folder.past_settings(training.output_dir)
    batch, steps = (past.get(flag) for flag in flags)
    same = ("stage", "hidden_size", "num_hidden_layers", "use_moe", "model_max_length", "use_lora")
    goes_on = past.get("base") == name and all(past.get(one) == getattr(args, one) for one in same)
    if not goes_on or not batch or batch * steps != windows:
        if name in minimind.SIZES:
            config = config_of(name, args, len(tokenizer))
        else:
            config = models.model_config(name)
        facts = memory_facts(args, training)
        batch = memory_check.largest_batch(args, training, config, windows, **facts)
    batch = -int(parallel.largest(-batch, training.device))  # the smallest of all ranks
    training.per_device_train_batch_size = batch
    training.gradient_accumulation_steps = windows // batch


def load_model(name: str, args, training, tokenizer) -> PreTrainedModel:
    """Random weights of a size: float32; those of a folder: too, but in the dtype they run in where
    DeepSpeed makes float32 masters of its own, or an adapter stands on them."""
    packed = attention.register()
    with parallel.whole_weights():
        if name in minimind.SIZES:
            model = random_model(config_of(name, args, len(tokenizer)))
            model.config._attn_implementation = packed
        else:
            dtype = load_dtype(training, trains_all=not args.use_lora)
            kind = kind_of(models.model_config(name))
            model = models.load(kind, name, dtype=dtype, attn_implementation=packed)
    if isinstance(model, nanochat.NanoChatForCausalLM):
        nanochat.quicken(nanochat.cap_in_head(model))
    tokens = training.per_device_train_batch_size * args.model_max_length
    memory_check.check_tokens(args, training, model.config, tokens, **memory_facts(args, training))
    # rollouts have other shapes in each step, and oneDNN would keep kernels for all of them
    same_shapes = args.stage != "rl"
    if same_shapes and device.train_dtype(training) is torch.float32:
        fast_float32(product_shapes(model, tokens))
    losses.use_chunked_loss(model)  # its logits are counts from here on: losses.loss_counts
    model.config.use_cache = False
    if cli.recompute(training):
        model.gradient_checkpointing_enable()
    if training.torch_compile:
        # experts ask how many tokens each of them has, which cannot be compiled
        has_experts = getattr(model.config, "use_moe", False)
        names = ["before"] if has_experts else ["before", "after"]
        compiled.compile_methods(model.model.layers, names)
    return model.to(training.device)


def load_teacher(name: str, training, tokenizer) -> minimind.MiniMindForCausalLM:
    """A model to learn from, in the dtype it runs in; SystemExit when it has another tokenizer."""
    with parallel.whole_weights():
        teacher = models.load(
            minimind.MiniMindForCausalLM,
            name,
            "--teacher",
            dtype=device.train_dtype(training),
            use_cache=False,
            attn_implementation=attention.register(),
        )
    if models.load(AutoTokenizer, name, "--teacher").get_vocab() != tokenizer.get_vocab():
        raise SystemExit(f"--teacher {name} has another tokenizer than the student")
    models.check_vocabulary(tokenizer, teacher.config, f"--teacher {name}")
    return teacher.to(training.device).requires_grad_(False).eval()


def fingerprint(name: str) -> str:
    """Of the weights that a run starts from; random ones follow from its seed."""
    return "random" if name in minimind.SIZES else adapter.base_fingerprint(name)


def add_adapter(model, name: str, args, training, tokenizer) -> str:
    """Adapters on the model of `name`; -> the folder of their base. Random weights are saved as
    OUTPUT/base."""
    if name in minimind.SIZES:
        name = str(Path(training.output_dir) / "base")
        write_model(model, tokenizer, None, "", Path(name))
    lora.add(model, args.lora_r, args.lora_alpha, args.lora_dropout)
    return name


def write_model(model, tokenizer, engine, adapter_of: str, folder: Path) -> None:
    """Model and tokenizer, ready to be loaded. All ranks call it.

    engine: DeepSpeed's or None; adapter_of: where the model has adapters, their base (then only
        they are written), else "".
    """
    weights = state.full_weights(model, engine)
    if cli.is_main():
        if adapter_of:
            lora.save(model, folder, adapter_of, weights)
        else:
            remember_ends(model, tokenizer)
            model.config.use_cache = True
            with nanochat.as_published(model):
                model.save_pretrained(folder, state_dict=weights)
            model.config.use_cache = False
        save_tokenizer(tokenizer, folder)
    parallel.barrier()


def complete_final(final: Path, stage: str, config, adapter_of: str) -> None:
    """Rank 0: beside the finished model its weights under the name that MiniMind gives them; in the
    folder of an adapter what its base is."""
    if not cli.is_main():
        return
    if adapter_of:
        adapter.remember_base(final, adapter_of)
    experts = "_moe" if getattr(config, "use_moe", False) else ""
    name = f"{stage}_{config.hidden_size}{experts}.safetensors"
    named = final.parent / name
    named.unlink(missing_ok=True)
    weights = next(final.glob("*model.safetensors"))
    try:
        os.link(weights, named)
    except OSError:  # a file system without links
        shutil.copy2(weights, named)
