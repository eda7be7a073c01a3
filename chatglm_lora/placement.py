"""Load a trained model and put it where there is room: on one device, its blocks on many, or a
share of each block.

    load("output/chatglm_lora")                     # this machine's device
    load("THUDM/chatglm-6b", device_map="auto")     # blocks spread evenly over all visible devices
    load(..., device_map="auto", max_memory="0:10GiB,cpu:30GiB", offload_folder="offload")
    load(..., tensor_parallel=2)                    # in each of 2 processes (infer_deepspeed.sh)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the model beside this file
from common import cli, device  # noqa: I001  (device before torch and transformers)

import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import modeling_chatglm  # noqa: F401  (registers ChatGLM)
from common.convert import adapter, models
from common.data.labels import encode_prompt
from common.demo.chat_model import find_model
from common.runs import engine

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
FREE = 0.9  # share of a device's free memory that weights may take; the rest is for caches
GIB = 2**30


class Loaded(NamedTuple):
    """A model ready to answer.

    window: tokens of prompt and answer; device: where token ids go; count: of ranks that share
        every block.
    """

    model: torch.nn.Module
    tokenizer: object
    window: int
    device: torch.device
    count: int = 1


def load(
    model: str | Path,
    device_map: str | None = None,
    max_memory: str | None = None,
    offload_folder: str | None = None,
    tensor_parallel: int = 1,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = cli.say,
) -> Loaded:
    """Load a run's output folder, an adapter, a model folder or a hub id; `say` gets a line about
    what lies where.

    dtype: default the half one of accelerators, float32 on a CPU. SystemExit with one line for what
        cannot be.
    """
    path = find_model(model)
    lora = path if (Path(path) / "adapter_config.json").is_file() else None
    base = adapter.check_base(path) if lora else path
    tokenizer = models.load(AutoTokenizer, path, "--model")
    config = models.load(AutoConfig, base, "--model")
    models.check_vocabulary(tokenizer, config, path)
    if dtype is None:
        dtype = torch.float32 if device.kind() == "cpu" else device.half_dtype()
    home = device.device()
    if device_map:
        places, sizes = plan(config, dtype, device_map, limits(max_memory))
        for line in describe(places, sizes):
            say(line)
        home = first_device(places)
        loaded = _spread(base, lora, dtype, places, offload_folder, home)
    elif tensor_parallel > 1:
        loaded = _shard(_whole(base, lora, dtype), tokenizer, tensor_parallel)
        say(
            f"every block is shared by {tensor_parallel} {home.type} ranks, checked against the "
            "whole weights"
        )
    else:
        loaded = _whole(base, lora, dtype)
        say(f"{_name(home)}: the whole model, {loaded.get_memory_footprint() / GIB:.2f} GiB")
        loaded.to(home)
    window = getattr(loaded.config, "max_position_embeddings", None) or 2048
    return Loaded(loaded, tokenizer, window, home, tensor_parallel)


def _whole(base: str, lora: str | None, dtype: torch.dtype):
    """The whole model in host memory."""
    model = models.load(AutoModelForCausalLM, base, "--model", dtype=dtype)
    if lora:
        model = adapter.put_on(model, lora)
    return model.eval().requires_grad_(False)


def _name(where) -> str:
    return f"{device.kind()}:{where}" if isinstance(where, int) else str(where)


# ---- blocks over many devices --------------------------------------------------------------------


def _spread(base: str, lora: str | None, dtype: torch.dtype, places: dict, offload_folder, home):
    """The model with its blocks at `places`; `home`: where the first of them computes."""
    if "disk" in places.values() and not offload_folder:
        raise SystemExit(
            "the model is too large for the devices and the memory: give --offload_folder FOLDER "
            "for the rest"
        )
    settings = {"device_map": places, "offload_folder": offload_folder, "dtype": dtype}
    model = (
        models.load(AutoModelForCausalLM, base, "--model", **settings).eval().requires_grad_(False)
    )
    if lora:
        model = _adapted_in_place(model, lora, home)
    return model.eval().requires_grad_(False)


def first_device(places: dict) -> torch.device:
    """The device that the first block computes on, where token ids go."""
    numbers = [place for place in places.values() if isinstance(place, int)]
    if not numbers:
        return torch.device("cpu")
    return torch.device(device.kind(), numbers[0])


def limits(max_memory: str | None) -> dict:
    """ "0:20GiB,cpu:60GiB" -> {0: bytes, "cpu": bytes}; unset: what is free on every visible device
    and here."""
    from accelerate.utils import convert_file_size_to_int

    count = device.device_count()
    if max_memory is None:
        free = {i: int(FREE * device.module().mem_get_info(i)[0]) for i in range(count)}
        return free | {"cpu": int(FREE * psutil.virtual_memory().available)}
    devices = {}
    host = {}
    for part in max_memory.split(","):
        part = part.strip()
        if not part:
            continue
        place, _, size = part.partition(":")
        if not re.fullmatch(r"\d+|cpu", place) or not re.fullmatch(r"\d+(\.\d+)?[KMGT]i?B", size):
            raise SystemExit(
                f'--max_memory {max_memory!r}: write it like "0:20GiB,1:20GiB,cpu:60GiB"'
            )
        if place == "cpu":
            host["cpu"] = convert_file_size_to_int(size)
            continue
        if int(place) >= count:
            raise SystemExit(f"--max_memory {part}: {count} device(s) are visible, counted from 0")
        devices[int(place)] = convert_file_size_to_int(size)
    return dict(sorted(devices.items())) | host  # in the order in which they are filled


def plan(config, dtype: torch.dtype, wanted: str, free: dict) -> tuple[dict, dict]:
    """({module: device number, "cpu" or "disk"}, {module: bytes}); no block is ever cut."""
    from accelerate import infer_auto_device_map, init_empty_weights
    from accelerate.utils import compute_module_sizes, get_balanced_memory

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    empty.tie_weights()
    whole = sorted(empty._no_split_modules or [])
    if wanted != "sequential":
        free = get_balanced_memory(
            empty,
            free,
            no_split_module_classes=whole,
            dtype=dtype,
            low_zero=wanted == "balanced_low_0",
        )
    places = infer_auto_device_map(empty, free, no_split_module_classes=whole, dtype=dtype)
    return dict(places), compute_module_sizes(empty, dtype=dtype)


def describe(places: dict, sizes: dict) -> list[str]:
    """One line for each device: its modules (runs of blocks as one) and GiB."""
    lines = []
    for where in sorted(set(places.values()), key=str):
        names = [name for name, place in places.items() if place == where]
        shown = []
        for stem, run in groupby(names, key=lambda name: re.sub(r"\.\d+$", "", name)):
            numbers = [name.removeprefix(stem).removeprefix(".") for name in run]
            ends = "-".join(dict.fromkeys([numbers[0], numbers[-1]]))  # "0-13", "5", or nothing
            shown.append(f"{stem.rsplit('.', 1)[-1]} {ends}".strip())
        total = sum(sizes[name] for name in names) / GIB
        lines.append(f"{_name(where)}: {total:.2f} GiB: {', '.join(shown)}")
    return lines


def _adapted_in_place(model, lora: str, home: torch.device):
    """The adapter on a dispatched base.

    peft leaves the weights of an adapter on an offloaded layer empty, or moves the base's files: so
    it does not see the dispatch, and its weights then go where each layer computes.
    """
    from accelerate.utils import set_module_tensor_to_device
    from peft import load_peft_weights

    places = model.__dict__.pop("hf_device_map")
    made = adapter.put_on(model, lora)
    model.hf_device_map = places
    values = load_peft_weights(lora, device="cpu")
    for name, parameter in list(made.named_parameters()):
        value = values.pop(name.replace(".default", ""), None)
        if value is None:
            continue
        layer = made.get_submodule(re.sub(r"\.(lora_|modules_to_save).*", "", name))
        where = _computes_on(layer)
        if where is None:
            where = home if parameter.is_meta else parameter.device
        set_module_tensor_to_device(made, name, where, value=value, dtype=parameter.dtype)
    if values:
        raise SystemExit(
            f"{lora}: {next(iter(values))} cannot be spread; merge the adapter first (merge.py)"
        )
    return made


def _computes_on(layer):
    """Where accelerate brings an offloaded layer's weights; None for one that stays in place."""
    base = getattr(layer, "base_layer", layer)
    return getattr(getattr(base, "_hf_hook", None), "execution_device", None)


# ---- a share of every block on each rank ---------------------------------------------------------

SHARES = {  # transformers' words for how a linear layer is shared -> DeepSpeed's
    "colwise": {"partition_type": "column"},
    "rowwise": {"partition_type": "row"},
    # gate and up projection in one
    "colwise_gather_output": {"partition_type": "column", "shape": [2, -1]},
    "rowwise_split_input": {"partition_type": "row"},
}


def refusal(config, count: int) -> str | None:
    """Why a model cannot be shared by `count` ranks, else None."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    for number, kind in ((heads, "heads"), (key_heads, "key and value heads")):
        if number % count:
            return (
                f"--tensor_parallel {count}: the {number} {kind} of this model cannot be shared "
                f"by {count} ranks"
            )
    styles = getattr(config, "base_model_tp_plan", None) or {}
    if "rowwise" not in styles.values():
        return (
            f"--tensor_parallel: no layout is known for {type(config).__name__}; "
            "--device_map auto spreads blocks"
        )
    return None


def _shard(model, tokenizer, count: int):
    """This rank's share of a whole model, by DeepSpeed's inference engine, on this rank's device.

    DeepSpeed guesses layouts from names, and takes ChatGLM's dense_h_to_4h for two halves: every
    layer is named here.
    """
    problem = refusal(model.config, count)
    if problem:
        raise SystemExit(problem)
    if hasattr(model, "merge_and_unload"):
        model = adapter.merge_into(model)
    engine.prepare_deepspeed()
    from deepspeed import InferenceEngine
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.module_inject.autotp_config import AutoTPConfig

    shares = shares_of(model.config)
    rows = tuple(name for name, share in shares.items() if share["partition_type"] == "row")
    layout = {
        "tp_size": count,
        "layer_specs": layer_specs(shares),
        "use_default_specs": False,
    }

    class Config(DeepSpeedInferenceConfig):
        def get_partition_config_object(self):
            return AutoTPConfig.from_dict(layout)

    block = type(model.base_model.layers[0])
    settings = {
        "dtype": model.dtype,
        "tensor_parallel": {"tp_size": count},
        "injection_policy": {block: rows},
    }
    expected = probe(model, tokenizer)
    model = InferenceEngine(model, config=Config(**settings)).module
    check(expected, probe(model, tokenizer), 1e-3 if model.dtype is torch.float32 else 0.05)
    return model


def shares_of(config) -> dict[str, dict]:
    """{linear layer of a block: how DeepSpeed shares it}."""
    return {
        pattern.split("*.", 1)[1]: SHARES[style]
        for pattern, style in config.base_model_tp_plan.items()
        if style in SHARES
    }


def layer_specs(shares: dict[str, dict]) -> list[dict]:
    """The layers as DeepSpeed's settings name them; every rank gets the whole logits."""
    specs = [
        {"patterns": [rf"(.*\.)?{re.escape(name)}\.weight"]} | share
        for name, share in shares.items()
    ]
    head = {"patterns": [r"lm_head\.weight"], "partition_type": "column", "gather_output": True}
    return [*specs, head]


@torch.no_grad()
def probe(model, tokenizer) -> Tensor:
    """Logits [T, V] of a short prompt after the first and the last block alone: cheap, and any
    wrong share shows."""
    asked = [{"role": "user", "content": "你好，请介绍一下你自己。"}]
    ids = torch.tensor([encode_prompt(tokenizer, asked)]).to(model.lm_head.weight.device)
    base = model.base_model
    blocks = base.layers
    count = model.config.num_hidden_layers
    base.layers = torch.nn.ModuleList([blocks[0], blocks[-1]])
    model.config.num_hidden_layers = len(base.layers)
    try:
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    finally:
        base.layers = blocks
        model.config.num_hidden_layers = count


def check(expected: Tensor, found: Tensor, tolerance: float) -> None:
    """SystemExit when the shares together do not compute what the whole weights do (rounding
    aside)."""
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < tolerance:
        raise SystemExit(
            f"--tensor_parallel: the shared model differs from the whole one by {error:.0%}; "
            "nothing was answered"
        )
