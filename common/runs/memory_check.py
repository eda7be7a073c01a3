"""Whether the memory will do, told before anything of the model is loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from common import cli, device
from common.runs import memory
from common.runs.engine import deepspeed_config, engine
from common.runs.memory_plan import (
    Need,
    Setup,
    adapted,
    config_facts,
    estimate,
    gib,
    has_shapes,
    sides,
    weight_facts,
)

LARGE = 3e9  # parameters from which activations are computed again unless asked otherwise
ROOM = 0.8  # of the free memory, that a batch nobody has chosen may take by the estimate


# ---- the model -----------------------------------------------------------------------------------


def shapes_of(config) -> dict[str, list[int]] | None:
    """Names and shapes of a causal language model's weights, tied ones once, without any memory;
    None for a config that no such model belongs to."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = kind(copy.deepcopy(config))
    return {name: list(weight.shape) for name, weight in model.named_parameters()}


def parameters(config) -> int:
    """Of the model that belongs to a config; 0 where none is known."""
    shapes = shapes_of(config)
    return sum(map(prod, shapes.values())) if shapes else 0


# ---- before the first step -----------------------------------------------------------------------


def recompute_large(args, training, config) -> None:
    """On an accelerator activations of large models, and of those in 4 bit, are computed again in
    the backward pass, unless a flag says what to do."""
    flags = ("gradient_checkpointing", "activation_checkpointing")
    if device.kind() == "cpu" or any(map(cli.given_by_user, flags)):
        return
    if getattr(args, "load_in_4bit", False) or parameters(config) >= LARGE:
        training.gradient_checkpointing = True
        cli.say(
            "note: --gradient_checkpointing true, as for every model of 3 billion parameters or "
            "in 4 bit (less memory, about a third more time); false keeps the activations"
        )


def check(args, training, config, data, **more) -> None:
    """check_tokens for the largest micro-batch of `data`, which has most_tokens(size)."""
    tokens = data.most_tokens(training.per_device_train_batch_size)
    check_tokens(args, training, config, tokens, **more)


def check_tokens(args, training, config, tokens: int, targets: str = "", **more) -> None:
    """Say what memory the training will take. SystemExit with what to change where that is more
    than is free, unless --no_memory_check. Call before the model is loaded.

    args: flags of the recipe; tokens: of the largest micro-batch; targets: names of the layers that
    get an adapter, unless they are as --target_modules says; more: of Setup.
    """
    shapes = shapes_of(config)
    if shapes is None or hasattr(config, "quantization_config"):
        cli.say(f"memory: no estimate for this kind of model ({config.model_type})")
        return
    facts = config_facts(config) | weight_facts(shapes, tied=False)
    adapter = adapter_of(args.lora_r, adapted(shapes, targets or args.target_modules))
    how = setup_of(args, training, tokens, **more)
    if args.use_lora:
        how = replace(how, **adapter, frozen_layers=0)

    need = estimate(facts, how)
    lacks = shortage(need, how)
    cli.say(f"memory: {in_words(need, how)}" + ("" if has_shapes(facts) else " (no activations)"))
    if not lacks:
        return
    told = f"the run would not fit: {lacks}"
    if args.no_memory_check:
        cli.say(f"warning: {told}; going on")
        return
    changes = remedies(args, training, facts, how, adapter)
    raise SystemExit(
        f"{told}. Cheapest changes: {'; '.join(changes) or 'a smaller model'}. "
        "--no_memory_check true goes on all the same"
    )


def largest_batch(args, training, config, windows: int, **more) -> int:
    """Windows of a micro-batch: the largest of those that `windows`, a step's on this card, divide
    into, whose training takes no more than ROOM of what is free by the estimate; 1 where none does.

    args, more: see check_tokens.
    """
    shapes = shapes_of(config)
    facts = config_facts(config) | weight_facts(shapes, tied=False)
    free = ROOM * memory.free_bytes()
    for batch in range(windows, 1, -1):
        if windows % batch:
            continue
        how = setup_of(args, training, batch * args.model_max_length, **more)
        how = replace(how, accumulates=batch < windows)
        if args.use_lora:
            adapter = adapter_of(args.lora_r, adapted(shapes, args.target_modules))
            how = replace(how, **adapter)
        if estimate(facts, how).peak <= free:
            return batch
    return 1


def adapter_of(rank: int, matrices: dict[str, Sequence[int]]) -> dict:
    """Of Setup: what an adapter on these matrices makes of it."""
    return {
        "adapter": rank * sides(matrices),
        "adapter_ranks": rank * len(matrices),
        "adapts_mlp": any("mlp" in name for name in matrices),
    }


def setup_of(args, training, tokens: int, **more) -> Setup:
    """Of a full training; check adds the adapter."""
    on_cpu = device.kind() == "cpu"
    optimizer = str(getattr(training.optim, "value", training.optim))
    return Setup(
        tokens=tokens,
        engine=engine(training),
        cards=training.world_size,
        half=device.train_dtype(training) is not torch.float32,
        recompute=cli.recompute(training),
        accumulates=training.gradient_accumulation_steps > 1,
        on_cpu=on_cpu,
        compiles=device.compile_pays(),
        four_bit=getattr(args, "load_in_4bit", False),
        offload=offloaded(training),
        # its loop over many tensors at once
        step_copies=int(optimizer == "adamw_torch" and not on_cpu),
        **more,
    )


def offloaded(training) -> frozenset[str]:
    """What DeepSpeed's config keeps in host memory: Setup.offload."""
    if not engine(training).startswith("zero"):
        return frozenset()
    zero = deepspeed_config(training).get("zero_optimization", {})
    places = {"offload_optimizer": "optimizer", "offload_param": "weights"}
    away = [key for key in places if (zero.get(key) or {}).get("device", "none") != "none"]
    return frozenset(places[key] for key in away)


def shortage(need: Need, how: Setup) -> str:
    """What is more than there is, for people; "" where it fits."""
    ranks = memory.local_ranks()
    free = memory.free_bytes()
    wanted = need.peak * (ranks if how.on_cpu else 1)
    if wanted > free:
        by = f" for {ranks} processes" if how.on_cpu and ranks > 1 else ""
        return f"about {gib(wanted)} needed{by}, {gib(free)} free on {device.name()}"
    host = need.host / how.cards * ranks
    free = memory.host_bytes()
    if host > free:
        return f"about {gib(host)} of host memory needed for what is offloaded, {gib(free)} free"
    return ""


def in_words(need: Need, how: Setup) -> str:
    each = "process" if how.on_cpu else "card"
    many = "processes" if how.on_cpu else "cards"
    free = memory.free_bytes()
    words = f"about {gib(need.peak)} in each {each} ({need}, of {how.tokens:,} tokens), "
    words += f"{gib(free)} free"
    if need.host:
        words += f"; about {gib(need.host)} of host memory for all {many}"
    return words


def remedies(args, training, facts: dict, how: Setup, adapter: dict) -> list[str]:
    """Up to three changes, each with what the run then takes: those that suffice, cheapest first,
    before those that only help, most first."""
    batch = training.per_device_train_batch_size
    steps = training.gradient_accumulation_steps * batch
    window = args.model_max_length
    changes: dict[str, Setup] = {}
    if not how.recompute:
        changes["--gradient_checkpointing true"] = replace(how, recompute=True)
    if batch > 1:
        words = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {steps}"
        changes[words] = replace(how, tokens=-(-how.tokens // batch), accumulates=True)
    if window > 256:
        changes[f"--model_max_length {window // 2}"] = replace(how, tokens=how.tokens // 2)
    if how.cards > 1 and not how.spreads_weights:
        changes["train_zero3.sh"] = replace(how, engine="zero-3")
    if not how.stands_still and not getattr(args, "from_config", ""):
        changes["--use_lora true"] = replace(how, **adapter, frozen_layers=0)
    if how.adapter and not how.four_bit and hasattr(args, "load_in_4bit"):
        changes["--load_in_4bit true"] = replace(how, four_bit=True, recompute=True)
    if how.is_zero and not how.offload and not how.on_cpu:
        both = frozenset({"optimizer", "weights"})
        changes["--deepspeed with ds_zero3_offload.json"] = replace(
            how, engine="zero-3", offload=both
        )
    now = estimate(facts, how).peak
    after = {words: estimate(facts, other) for words, other in changes.items()}
    helpful = [words for words in changes if after[words].peak < 0.97 * now]

    def what_is_left(words: str) -> float:
        return after[words].peak if shortage(after[words], changes[words]) else 0

    helpful.sort(key=what_is_left)
    return [f"{words} ({gib(after[words].peak)})" for words in helpful[:3]]
