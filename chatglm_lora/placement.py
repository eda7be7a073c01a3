"""Load a trained model and put it where there is room: on one device, its blocks on many, or a
share of each block.

load("output/chatglm_lora")                                         # this machine's device
load("THUDM/chatglm-6b", device_map="auto")                         # blocks spread evenly over all visible devices
load(..., device_map="auto", max_memory="0:10GiB,cpu:30GiB", offload_folder="offload")    # small cards
load(..., tensor_parallel=2)                                        # in each of 2 processes (infer_deepspeed.sh)
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the model beside this file
from common import cli, device  # noqa: I001  (device before torch and transformers)
from common.convert import adapter
from common.demo.chat_model import find_model

import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import modeling_chatglm  # noqa: F401  (registers ChatGLM)
from common.data.labels import encode_prompt

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
FREE = 0.9  # share of a device's free memory that weights may take; the rest is for caches
GIB = 2**30


class Loaded(NamedTuple):
    """A model ready to answer. window: tokens of prompt and answer; device: where token ids go;
    count: of ranks that share every block."""

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
    say=cli.say,
) -> Loaded:
    """Load a run's output folder, an adapter, a model folder or a hub id; `say` is told what lies
    where.

    dtype: default the half one of accelerators, float32 on a CPU. SystemExit with one line for what
        cannot be.
    """
    path = find_model(model)
    lora = path if (Path(path) / "adapter_config.json").is_file() else None
    base = adapter.check_base(path) if lora else path
    tokenizer = cli.load(AutoTokenizer, path, "--model")
    config = cli.load(AutoConfig, base, "--model")
    dtype = dtype or (torch.float32 if device.kind() == "cpu" else device.half_dtype())
    home = device.device()
    if device_map:
        made, home = _spread(base, lora, config, dtype, device_map, max_memory, offload_folder, say)
    else:
        made = cli.load(AutoModelForCausalLM, base, "--model", dtype=dtype)
        made = _adapted(made, lora) if lora else made
        made = made.eval().requires_grad_(False)
        if tensor_parallel > 1:
            made = _shard(
                made.merge_and_unload(safe_merge=True) if lora else made, tokenizer, tensor_parallel
            )
            say(
                f"every block is shared by {tensor_parallel} {home.type} ranks, checked against the whole weights"
            )
        else:
            say(f"{_name(home)}: the whole model, {made.get_memory_footprint() / GIB:.2f} GiB")
            made.to(home)
    window = getattr(made.config, "max_position_embeddings", None) or 2048
    return Loaded(made, tokenizer, window, home, tensor_parallel)


def _adapted(model, lora: str):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, lora)


def _name(where) -> str:
    return f"{device.kind()}:{where}" if isinstance(where, int) else str(where)


# ---- blocks over many devices -----------------------------------------------------------------------------------


def _spread(
    base: str, lora: str | None, config, dtype, wanted: str, max_memory, offload_folder, say
):
    """-> (dispatched model, the device that its first block computes on)."""
    places, sizes = plan(config, dtype, wanted, limits(max_memory))
    for line in describe(places, sizes):
        say(line)
    if "disk" in places.values() and not offload_folder:
        raise SystemExit(
            "the model is too large for the devices and the memory: give --offload_folder FOLDER for the rest"
        )
    settings = {"device_map": places, "offload_folder": offload_folder, "dtype": dtype}
    model = cli.load(AutoModelForCausalLM, base, "--model", **settings).eval().requires_grad_(False)
    first = next((place for place in places.values() if isinstance(place, int)), None)
    home = torch.device("cpu") if first is None else torch.device(device.kind(), first)
    return (_adapted_in_place(model, lora, home) if lora else model).eval().requires_grad_(
        False
    ), home


def limits(max_memory: str | None) -> dict:
    """ "0:20GiB,cpu:60GiB" -> {0: bytes, "cpu": bytes}; unset: what is free on every visible device
    and here."""
    from accelerate.utils import convert_file_size_to_int

    count = device.device_count()
    if max_memory is None:
        free = {i: int(FREE * device.module().mem_get_info(i)[0]) for i in range(count)}
        return free | {"cpu": int(FREE * psutil.virtual_memory().available)}
    found = {}
    for part in filter(None, (part.strip() for part in max_memory.split(","))):
        place, _, size = part.partition(":")
        if not re.fullmatch(r"\d+|cpu", place) or not re.fullmatch(r"\d+(\.\d+)?[KMGT]i?B", size):
            raise SystemExit(
                f'--max_memory {max_memory!r}: write it like "0:20GiB,1:20GiB,cpu:60GiB"'
            )
        if place != "cpu" and int(place) >= count:
            raise SystemExit(f"--max_memory {part}: {count} device(s) are visible, counted from 0")
        found[place if place == "cpu" else int(place)] = convert_file_size_to_int(size)
    return dict(sorted(found.items(), key=lambda item: (item[0] == "cpu", item[0])))


def plan(config, dtype: torch.dtype, wanted: str, free: dict) -> tuple[dict, dict]:
    """({module: device number, "cpu" or "disk"}, {module: bytes}); no block is ever cut."""
    from accelerate import infer_auto_device_map, init_empty_weights
    from accelerate.utils import compute_module_sizes, get_balanced_memory

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    empty.tie_weights()
    whole = sorted(empty._no_split_modules or [])
    if wanted != "sequential":
        low = wanted == "balanced_low_0"
        free = get_balanced_memory(
            empty, free, no_split_module_classes=whole, dtype=dtype, low_zero=low
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
    """The adapter on a dispatched base. peft leaves the weights of an adapter on an offloaded layer
    empty, or moves the base's files: it is not told of the dispatch, and its weights then go where
    each layer computes."""
    from accelerate.utils import set_module_tensor_to_device
    from peft import load_peft_weights

    places = model.__dict__.pop("hf_device_map")
    made = _adapted(model, lora)
    model.hf_device_map = places
    values = load_peft_weights(lora, device="cpu")
    for name, parameter in list(made.named_parameters()):
        value = values.pop(name.replace(".default", ""), None)
        if value is None:
            continue
        layer = made.get_submodule(re.sub(r"\.(lora_|modules_to_save).*", "", name))
        hook = getattr(getattr(layer, "base_layer", layer), "_hf_hook", None)
        where = getattr(hook, "execution_device", None)
        where = (home if parameter.is_meta else parameter.device) if where is None else where
        set_module_tensor_to_device(made, name, where, value=value, dtype=parameter.dtype)
    if values:
        raise SystemExit(
            f"{lora}: {next(iter(values))} cannot be spread; merge the adapter first (merge.py)"
        )
    return made


# ---- a share of every block on each rank ------------------------------------------------------------------------

SHARES = {  # transformers' words for how a linear layer is shared -> DeepSpeed's
    "colwise": {"partition_type": "column"},
    "rowwise": {"partition_type": "row"},
    "colwise_gather_output": {
        "partition_type": "column",
        "shape": [2, -1],
    },  # gate and up projection in one
    "rowwise_split_input": {"partition_type": "row"},
}


def refusal(config, count: int) -> str | None:
    """Why a model cannot be shared by `count` ranks, else None."""
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    if heads % count or keys % count:
        told = f"{heads} heads" if heads % count else f"{keys} key and value heads"
        return (
            f"--tensor_parallel {count}: the {told} of this model cannot be shared by {count} ranks"
        )
    if not any(
        style == "rowwise" for style in (getattr(config, "base_model_tp_plan", None) or {}).values()
    ):
        return f"--tensor_parallel: no layout is known for {type(config).__name__}; --device_map auto spreads blocks"
    return None


def _shard(model, tokenizer, count: int):
    """This rank's share of a whole model, by DeepSpeed's inference engine, on this rank's device.

    DeepSpeed guesses layouts from names, and takes ChatGLM's dense_h_to_4h for two halves: every
    layer is named here.
    """
    if problem := refusal(model.config, count):
        raise SystemExit(problem)
    cli.prepare_deepspeed()
    from deepspeed import InferenceEngine
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.module_inject.autotp_config import AutoTPConfig

    shares = {
        n.split("*.", 1)[1]: SHARES[s]
        for n, s in model.config.base_model_tp_plan.items()
        if s in SHARES
    }
    specs = [
        {"patterns": [rf"(.*\.)?{re.escape(n)}\.weight"]} | share for n, share in shares.items()
    ]
    specs.append(
        {"patterns": [r"lm_head\.weight"], "partition_type": "column", "gather_output": True}
    )

    class Config(DeepSpeedInferenceConfig):
        def get_partition_config_object(self):
            return AutoTPConfig.from_dict(
                {"tp_size": count, "layer_specs": specs, "use_default_specs": False}
            )

    rows = tuple(n for n, share in shares.items() if share["partition_type"] == "row")
    block = type(model.base_model.layers[0])
    expected = probe(model, tokenizer)
    settings = {
        "dtype": model.dtype,
        "tensor_parallel": {"tp_size": count},
        "injection_policy": {block: rows},
    }
    model = InferenceEngine(model, config=Config(**settings)).module
    check(expected, probe(model, tokenizer), 1e-3 if model.dtype is torch.float32 else 0.05)
    return model


@torch.no_grad()
def probe(model, tokenizer) -> Tensor:
    """Logits [T, V] of a short prompt after the first and the last block alone: cheap, and any
    wrong share shows."""
    ids = torch.tensor(
        [encode_prompt(tokenizer, [{"role": "user", "content": "你好，请介绍一下你自己。"}])]
    )
    base, blocks, count = model.base_model, model.base_model.layers, model.config.num_hidden_layers
    base.layers = torch.nn.ModuleList([blocks[0], blocks[-1]])
    model.config.num_hidden_layers = len(base.layers)
    try:
        return (
            model(input_ids=ids.to(model.lm_head.weight.device), use_cache=False)
            .logits[0]
            .float()
            .cpu()
        )
    finally:
        base.layers, model.config.num_hidden_layers = blocks, count


def check(expected: Tensor, found: Tensor, tolerance: float) -> None:
    """SystemExit when the shares together do not compute what the whole weights do (rounding
    aside)."""
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < tolerance:
        raise SystemExit(
            f"--tensor_parallel: the shared model differs from the whole one by {error:.0%}; nothing was answered"
        )
