"""What tower, projector and pictures add to the memory that a training takes: for the estimate
before the first step (common/runs/memory_plan.py).

P pictures of a micro-batch, N features of each, H their width, D that of the language model.
"""

from __future__ import annotations

import copy
import re
from math import prod

import torch
from last_layer import is_mixture
from model import TOWERS, features_per_picture, whole_weights
from parts import TRAINED, part_of
from sight import layers_of
from transformers import LlavaForConditionalGeneration

from common import cli, device
from common.runs import memory_plan
from common.runs.engine import engine

LAYER = re.compile(r"\blayers?\.(\d+)\.")  # in the name of a tower's parameter


def memory_facts(args, training, config, image_processor, data) -> dict:
    """Of memory_plan.Setup: what of the language model moves, and what stands beside it.

    data: has most_pictures(size) of a batch.
    """
    trained = TRAINED[args.train_type]
    half = device.train_dtype(training) is not torch.float32
    size = 2 if half else 4
    is_zero = engine(training).startswith("zero")
    stored = size if is_zero else config.dtype.itemsize  # as train.load_model loads them
    looked_through = "vision tower" in trained or args.lora_vision

    with whole_weights(training):
        elements = elements_beside(config, cut=not looked_through)
    moving = sum(count for name, count in elements.items() if part_of(name) in trained)
    frozen = sum(elements.values()) - moving

    pictures = data.most_pictures(training.per_device_train_batch_size)
    features = pictures * features_per_picture(config, image_processor)
    tokens = features + pictures * TOWERS[config.vision_config.model_type].has_cls
    layers = max(layers_of(config))
    width = config.vision_config.hidden_size
    kept = features * projector_bytes(config, size)
    before = 0.0
    if looked_through:
        setup = memory_plan.Setup(tokens=tokens, half=half, recompute=cli.recompute(training))
        each = memory_plan.layer_bytes(vision_facts(config), setup)
        if setup.recompute:
            each = memory_plan.stream(setup) * width
        kept += tokens * layers * each
    else:  # all its hidden states, until those that are looked at are chosen
        before = tokens * (layers + 2) * width * size
    llm_moves = "language model" in trained or args.train_type == "lora"
    beside = memory_plan.Beside(stored * frozen, moving, kept, before)
    return {
        "passes_through": not llm_moves,
        "stored": stored,
        "beside": beside,
        "fast_norms": True,
        "last_at_labels": not is_mixture(config.text_config),
    }


def elements_beside(config, cut: bool) -> dict[str, int]:
    """Name of a parameter that is not the language model's -> its elements. cut: without the
    tower's layers that nobody looks at."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(copy.deepcopy(config))
    needed = max(layers_of(config))
    cut = cut and TOWERS[config.vision_config.model_type].can_be_cut
    sizes = {}
    for name, parameter in model.named_parameters():
        layer = LAYER.search(name)
        if part_of(name) == "language model" or (cut and layer and int(layer[1]) >= needed):
            continue
        sizes[name] = prod(parameter.shape)
    return sizes


def projector_bytes(config, size: int) -> int:
    """What the projector keeps of a feature: its input, what goes into the activation, and what
    comes out of it."""
    width = config.vision_config.hidden_size * len(layers_of(config))
    return size * (width + 2 * config.text_config.hidden_size)


def vision_facts(config) -> dict:
    """memory_plan.config_facts of a tower, whose layers are those of a plain transformer."""
    vision = config.vision_config
    heads = vision.num_attention_heads
    return {
        "num_hidden_layers": max(layers_of(config)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": vision.hidden_size // heads,
        "hidden_size": vision.hidden_size,
        "intermediate_size": getattr(vision, "intermediate_size", None),
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_experts_per_tok": None,
        "gated": False,
        "normed_queries": False,
        "fused_queries": False,
        "layer_norm": True,
    }
