"""danpu_manifest.json of a model folder: hashes, what the model is, what memory training it takes.

Bytes per card: weights, gradients, Adam's moments and float32 masters (of LoRA only the adapter's),
buckets of DDP or DeepSpeed, what ZeRO-3 gathers at a time, activations (or ZeRO's gradients at its
step, where these are more), 1 GiB for driver and fragmentation; in bf16, with the loss and
attention of common.fast. Activations were counted on a CPU, none on a card: leave a margin.
"""

import json
from math import gcd, prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

CARDS = (1, 2, 4, 8, 16)
METHODS = ("full", "LoRA", "ZeRO-2", "ZeRO-3")
GIB = 2**30
BUCKETS = 2 * 2e8 * 2  # two, elements, bytes each
LIVE = 1e9  # parameters that ZeRO-3 keeps gathered at most
LOGITS = 2**27  # as common.fast.losses.ACCELERATOR_LOGITS
# transformers' names; the configs of older types map theirs to these
NAMES = ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
NAMES += ["hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"]
NAMES += ["tie_word_embeddings", "num_experts", "num_experts_per_tok", "moe_intermediate_size"]
PARALLEL = {  # what the number of cards must divide
    "tensor": ("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    "pipeline": ("num_hidden_layers",),
    "expert": ("num_experts",),
}


def tensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype as stored, e.g. "BF16", shape). ValueError when the header is no JSON,
    or its offsets overlap, leave gaps, do not fit shapes and dtypes or do not end with the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            return {name: (p.get_dtype(), list(p.get_shape())) for name, p in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"broken safetensors file ({' '.join(str(error).split())})") from None


def facts_of(folder: Path) -> dict:
    """type, quantised, NAMES (None where config.json has none; no code of the model runs), and what
    the weights' headers say. matrices: elements of weights with 2 dimensions or more that are no
    table of tokens; sides: their inputs + outputs, which LoRA multiplies by its rank."""
    from common import device  # noqa: F401, I001 (before transformers)
    from transformers import AutoConfig, PretrainedConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError:  # a type that this transformers does not know
        config = PretrainedConfig.from_pretrained(folder)
    text = config.get_text_config()
    facts = {name: getattr(text, name, None) for name in NAMES}
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or facts["num_attention_heads"]
    facts["num_experts"] = facts["num_experts"] or getattr(text, "n_routed_experts", None)
    if not facts["head_dim"] and facts["num_attention_heads"] and facts["hidden_size"]:
        facts["head_dim"] = facts["hidden_size"] // facts["num_attention_heads"]
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= tensors(file)
    shapes = {name: shape for name, (_, shape) in found.items()}
    tables = [n for n in shapes if len(shapes[n]) == 2 and ("embed" in n or "wte" in n)]
    heads = [n for n in shapes if "lm_head" in n]
    tied = facts["tie_word_embeddings"] and tables
    stored_twice = sum(prod(shapes[n]) for n in heads) if tied else 0
    matrices = [s for n, s in shapes.items() if len(s) >= 2 and n not in tables + heads]
    return facts | {
        "type": config.model_type,
        "quantised": hasattr(config, "quantization_config"),
        "parameters": sum(map(prod, shapes.values())) - stored_twice,
        "dtypes": sorted({dtype for dtype, _ in found.values()}),
        "matrices": sum(map(prod, matrices)),
        "sides": sum(prod(s[:-2]) * (s[-1] + s[-2]) for s in matrices),
        "normed_queries": any("q_norm" in n for n in shapes),
    }


def states(method: str, facts: dict, cards: int, lora_r: int) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer, buffers and of the moment of the step."""
    p = facts["parameters"]
    adapter = lora_r * facts["sides"]
    table = (facts["vocab_size"] or 0) * (facts["hidden_size"] or 0)
    several = cards > 1
    shard = p / cards
    live = 2 * min(p, LIVE) * several
    sizes = {
        "full": (4 * p, 4 * p, 8 * p, 2 * (facts["matrices"] + table) + 4 * p * several, 0),
        "LoRA": (2 * p + 4 * adapter, 4 * adapter, 8 * adapter, adapter * (4 * several + 2), 0),
        "ZeRO-2": (2 * p, 2 * shard, 12 * shard, BUCKETS, 4 * shard),
        "ZeRO-3": (2 * shard, 2 * shard, 12 * shard, live, 4 * min(shard, LIVE)),
    }
    names = ("weights", "gradients", "optimizer", "buffers", "step")
    return dict(zip(names, sizes[method], strict=True))


def activations(method: str, facts: dict, tokens: int, recompute: bool) -> float:
    """Bytes kept for backward, head included; 0 when config.json has no shapes."""
    layers = facts["num_hidden_layers"]
    heads = facts["num_attention_heads"]
    h = facts["hidden_size"]
    if None in (layers, heads, h):
        return 0
    f = facts["intermediate_size"] or facts["moe_intermediate_size"] or 4 * h
    q = heads * facts["head_dim"]
    k = facts["num_key_value_heads"] * facts["head_dim"]
    per_token = {"full": 26, "LoRA": 20}.get(method, 16) * h + 4 * q + 4 * k
    if facts["normed_queries"]:
        per_token += 6 * q + 6 * k
    if facts["num_experts"] and facts["num_experts_per_tok"]:
        f = (facts["moe_intermediate_size"] or f) * facts["num_experts_per_tok"]
        per_token += 4 * h * facts["num_experts_per_tok"]
    layer = tokens * (per_token + 8 * f)
    body = layers * layer
    if recompute:
        body = layer + layers * tokens * h * (4 if method == "full" else 2)
    vocabulary = facts["vocab_size"] or 0
    head = 6 * min(tokens * vocabulary, LOGITS) + 4 * tokens * h
    if facts["tie_word_embeddings"]:  # the gradient of the shared table
        head += {"full": 4, "LoRA": 0}.get(method, 2) * vocabulary * h
    return body + head


def memory(method: str, facts: dict, cards: int, recompute: bool, args) -> float:
    """GiB per card."""
    parts = states(method, facts, cards, args.lora_r)
    step = parts.pop("step")
    kept = activations(method, facts, args.batch * args.window, recompute)
    return round((sum(parts.values()) + max(kept, step) + GIB) / GIB, 1)


def describe(folder: Path, record: dict, args) -> None:
    """Write FOLDER/danpu_manifest.json, the record with what is known of the model, and show it."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise SystemExit(f"{folder} has no config.json, or no safetensors: no model to describe")
    facts = facts_of(folder)
    parallel = {}
    print(f"{folder}: {facts['type']}, {facts['parameters']:,} parameters, {facts['dtypes']}")
    for kind, names in PARALLEL.items():
        cut = gcd(*(facts[name] or 0 for name in names))  # 0: config.json says none of them
        parallel[kind] = [cards for cards in range(1, 65) if cut and cut % cards == 0]
        print(f"  {kind} parallel: {', '.join(map(str, parallel[kind])) or 'no'}")
    asked = f"{args.batch} rows of {args.window} tokens, LoRA rank {args.lora_r}"
    if not activations("full", facts, 1, False):
        asked += ", without activations: config.json has no shapes"
    print(f"  GiB per card (with gradient checkpointing), estimated for {asked}")
    print("  cards   " + "".join(f"{cards:>18}" for cards in CARDS))
    rows = []
    for method in [] if facts["quantised"] else METHODS:
        line = f"  {method:<8}"
        for cards in CARDS:
            plain, saving = (memory(method, facts, cards, saves, args) for saves in (False, True))
            rows.append({"method": method, "cards": cards, "GiB": plain, "checkpointing": saving})
            line += f"{f'{plain:,.1f} ({saving:,.1f})':>18}"
        print(line)
    found = record | {"model": facts, "parallel": parallel, "memory_for": asked, "memory": rows}
    (folder / "danpu_manifest.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
