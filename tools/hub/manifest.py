"""manifest.json of a model folder: files with hashes, what the model is, and what training it will
need.

Memory per card, in bytes. P parameters, A more in a LoRA adapter, N cards, n = rows * window tokens
per card; layers of width h, query width q, key and value width k each, feed-forward width f;
vocabulary V. All in bf16 or under bf16 autocast, with the label-only head of common.losses and an
attention that never builds its matrix.

  full    P * (4 weights + 4 gradients + 8 Adam), + 4 P for DDP's buckets if N > 1, + 2 per weight that autocast copies
  LoRA    P * 2 frozen weights + A * (16, + 4 if N > 1)
  ZeRO-2  P * (2 weights + (2 gradients + 4 masters + 8 Adam) / N), + its two buckets of 2e8 elements
  ZeRO-3  P * (2 + 2 + 4 + 8) / N, + the weights that are gathered at a time: 2 * min(P, 1e9)
  ZeRO's step: float32 gradients 4 P / N; they come when the activations are gone, so the larger of the two counts
  activations of a layer, per token: a h + 4 q + 4 k + 8 f, a = 26 (full), 20 (LoRA), 16 (ZeRO), + 6 q + 6 k with
      norms on queries and keys; with gradient checkpointing one such layer, and 4 h (full) or 2 h
      per layer
  head    6 bytes for each of min(n V, 2^27) logits, 4 n h, and where input and output share their table its gradient
  1 GiB for the driver's context, communication and fragmentation
The coefficients of the activations are those counted on a CPU (saved tensors of three families);
none was measured on a card, so leave a margin.
"""

from __future__ import annotations

import json
import threading
from importlib import import_module
from math import prod
from pathlib import Path

from tools.hub import fetch, model_folder, weights
from tools.hub.fetch import Entry, size_text
from tools.hub.model_folder import MANIFEST, say

CARDS = (1, 2, 4, 8, 16)
METHODS = ("full", "LoRA", "ZeRO-2", "ZeRO-3")
GIB = 2**30
BUCKETS = 2 * 2e8 * 2  # two, elements, bytes each
LIVE = 1e9  # parameters that ZeRO-3 keeps gathered at most
OVERHEAD = GIB
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "intermediate": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
    "window": ("max_position_embeddings", "n_positions", "seq_length"),
    "tied": ("tie_word_embeddings",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_topk"),
    "expert_intermediate": ("moe_intermediate_size",),
}


# ---- what the model is --------------------------------------------------------------------------------------


def config_facts(folder: Path) -> dict:
    """type, architectures and the numbers of NAMES, None where config.json does not say. No code of
    the model runs."""
    try:
        raw = json.loads((folder / "config.json").read_bytes())
        inner = [
            raw[k]
            for k in ("text_config", "llm_config", "language_config")
            if isinstance(raw.get(k), dict)
        ]
    except (OSError, ValueError, AttributeError):
        raise SystemExit(f"{folder} has no config.json that can be read") from None
    said = raw | (inner[0] if inner else {})
    try:
        import_module("common.device")  # before transformers
        from transformers import AutoConfig

        known = (
            AutoConfig.from_pretrained(folder).get_text_config().to_dict()
        )  # with the defaults of its type
    except Exception:  # a type that this transformers does not know: the plain numbers will do
        known = {}
    facts = {"type": raw.get("model_type"), "architectures": raw.get("architectures") or []}
    for fact, names in NAMES.items():
        found = [
            source[n] for source in (known, said) for n in names if isinstance(source.get(n), int)
        ]
        facts[fact] = found[0] if found else None
    facts["kv_heads"] = facts["kv_heads"] or facts["heads"]
    if not facts["head_dim"] and facts["heads"] and facts["hidden"]:
        facts["head_dim"] = facts["hidden"] // facts["heads"]
    facts["quantised"] = (raw.get("quantization_config") or {}).get("quant_method")
    return facts


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those of the index if there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [
            folder / name
            for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        ]
    return sorted(folder.glob("*.safetensors"))


def tensor_facts(folder: Path, tied: bool) -> dict:
    """Counts from the headers: parameters, those of 2-D weights outside the embedding, inputs +
    outputs of them."""
    shapes, dtypes = {}, {}
    for file in weight_files(folder):
        for name, (dtype, shape) in weights.tensors(file).items():
            shapes[name] = shape
            dtypes[dtype] = dtypes.get(dtype, 0) + prod(shape)
    tables = {
        n: s
        for n, s in shapes.items()
        if len(s) == 2 and ("embed" in n or "wte" in n or "lm_head" in n)
    }
    head = [n for n in tables if "lm_head" in n]
    twice = sum(prod(shapes[n]) for n in head) if tied and len(tables) > len(head) else 0
    matrices = {n: s for n, s in shapes.items() if len(s) >= 2 and n not in tables}
    return {
        "parameters": sum(map(prod, shapes.values())) - twice,
        "tensors": len(shapes),
        "dtypes": dtypes,
        "matrices": sum(map(prod, matrices.values())),
        "sides": sum(prod(s[:-2]) * (s[-1] + s[-2]) for s in matrices.values()),
        "normed_queries": any("q_norm" in n for n in shapes),
    }


def divisors(limit: int, *numbers: int | None) -> list[int]:
    given = [n for n in numbers if n]
    return [t for t in range(1, limit + 1) if all(n % t == 0 for n in given)] if given else []


def parallel_sizes(facts: dict) -> dict:
    """Sizes of tensor, pipeline and expert parallelism that cut the model evenly, and why."""
    heads, kv, layers, vocabulary = (
        facts[k] for k in ("heads", "kv_heads", "layers", "vocabulary")
    )
    tensor = divisors(64, heads, kv, facts["intermediate"])
    even = [t for t in tensor if vocabulary and vocabulary % t == 0]
    why = f"divide {heads} heads, {kv} key/value heads and the feed-forward width {facts['intermediate']}"
    if vocabulary:
        pad = "" if even == tensor else ", the others pad it"
        why += f"; the vocabulary of {vocabulary:,} divides by {', '.join(map(str, even))}{pad}"
    more = [t for t in divisors(64, heads) if t not in tensor]
    why += (
        f"; {', '.join(map(str, more))} would need copies of key/value heads"
        if more and kv != heads
        else ""
    )
    pipeline = [t for t in divisors(64, layers) if t <= 16]
    sizes = {
        "tensor": tensor,
        "tensor_why": why,
        "pipeline": pipeline,
        "pipeline_why": f"divide {layers} layers",
    }
    if facts["experts"]:
        sizes |= {
            "expert": divisors(64, facts["experts"]),
            "expert_why": f"divide {facts['experts']} experts",
        }
    return sizes


# ---- memory -------------------------------------------------------------------------------------------------


def states(method: str, facts: dict, cards: int, lora_r: int) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer, buffers and of the moment of the step, as in the
    module's docstring."""
    p, adapter = facts["parameters"], lora_r * facts["sides"]
    table = (facts["vocabulary"] or 0) * (facts["hidden"] or 0)
    if method == "full":
        copies = 2 * (facts["matrices"] + table)
        return {
            "weights": 4 * p,
            "gradients": 4 * p,
            "optimizer": 8 * p,
            "buffers": copies + 4 * p * (cards > 1),
            "step": 0,
        }
    if method == "LoRA":
        return {
            "weights": 2 * p + 4 * adapter,
            "gradients": 4 * adapter,
            "optimizer": 8 * adapter,
            "buffers": 4 * adapter * (cards > 1) + 2 * adapter,
            "step": 0,
        }
    sharded = {"gradients": 2 * p / cards, "optimizer": 12 * p / cards}
    if method == "ZeRO-2":
        return {"weights": 2 * p, **sharded, "buffers": BUCKETS, "step": 4 * p / cards}
    live = 2 * min(p, LIVE) if cards > 1 else 0
    return {"weights": 2 * p / cards, **sharded, "buffers": live, "step": 4 * min(p / cards, LIVE)}


def activations(method: str, facts: dict, tokens: int, recompute: bool) -> float | None:
    """Bytes kept for backward, head included; None when config.json does not tell the shapes."""
    shape = [facts[k] for k in ("layers", "hidden", "heads", "head_dim")]
    if None in shape or not (facts["intermediate"] or facts["expert_intermediate"]):
        return None
    layers, h, heads, width = shape
    q, k, f = heads * width, 2 * facts["kv_heads"] * width, facts["intermediate"] or 0
    per_token = {"full": 26, "LoRA": 20}.get(method, 16) * h + 4 * q + 2 * k
    per_token += 6 * q + 3 * k if facts["normed_queries"] else 0
    if facts["experts"] and facts["experts_per_token"]:
        f = (facts["expert_intermediate"] or f) * facts["experts_per_token"]
        per_token += 4 * h * facts["experts_per_token"]
    layer = tokens * (per_token + 8 * f)
    body = (
        layer + layers * tokens * h * (4 if method == "full" else 2)
        if recompute
        else layers * layer
    )
    from common.fast.losses import ACCELERATOR_LOGITS

    vocabulary = facts["vocabulary"] or 0
    shared = {"full": 4, "LoRA": 0}.get(method, 2) * vocabulary * h if facts["tied"] else 0
    return body + 6 * min(tokens * vocabulary, ACCELERATOR_LOGITS) + 4 * tokens * h + shared


def memory_table(facts: dict, window: int, batch: int, lora_r: int) -> list[dict]:
    """One row per method, number of cards and gradient checkpointing: GiB of each part and
    `total`."""
    rows = []
    for method in METHODS:
        for cards in CARDS:
            for recompute in (False, True):
                parts = states(method, facts, cards, lora_r)
                step, kept = (
                    parts.pop("step"),
                    activations(method, facts, window * batch, recompute),
                )
                parts |= {"activations": max(kept or 0, step), "overhead": OVERHEAD}
                gib = {name: round(value / GIB, 2) for name, value in parts.items()}
                row = {
                    "method": method,
                    "cards": cards,
                    "gradient_checkpointing": recompute,
                    "GiB": gib,
                }
                rows.append(row | {"total_GiB": round(sum(parts.values()) / GIB, 1)})
    return rows


def memory_lines(rows: list[dict]) -> list[str]:
    """The totals as text: methods down, cards across, with gradient checkpointing in brackets."""
    total = {(r["method"], r["cards"], r["gradient_checkpointing"]): r["total_GiB"] for r in rows}
    lines = ["  " + " " * 8 + "".join(f"{n:>10} card{'s' * (n > 1):<1}" for n in CARDS)]
    for method in METHODS:
        cells = [f"{total[method, n, False]:,.1f} ({total[method, n, True]:,.1f})" for n in CARDS]
        lines.append(f"  {method:<8}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


# ---- the file -----------------------------------------------------------------------------------------------


def file_rows(folder: Path, record: dict) -> list[dict]:
    """path, size and sha256 of every file, hashed only where the record does not know it."""
    unfinished = sorted(set(record.get("wanted", [])) - record.get("files", {}).keys())
    if unfinished:
        raise SystemExit(
            f"{folder} is not whole yet ({unfinished[0]} is missing); the same download continues"
        )
    rows = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or name == "manifest.json":
            continue
        if name.endswith((".part", ".part.aria2")):
            continue
        known = model_folder.untouched(folder, record, name)
        sha = (
            known["sha256"]
            if known
            else fetch.examine(path, Entry(name, "", sha256=None), threading.Event())[0]
        )
        rows.append({"path": name, "size": path.stat().st_size, "sha256": sha})
    return rows


def write(folder: Path, record: dict, window: int, batch: int, lora_r: int) -> dict:
    """Write FOLDER/manifest.json and show what it says; returns it."""
    target = folder / "manifest.json"
    if target.exists() and MANIFEST not in target.read_text(encoding="utf-8", errors="replace"):
        raise SystemExit(f"{target} belongs to the model and is not overwritten")
    files = file_rows(folder, record)
    facts = config_facts(folder)
    try:
        facts |= tensor_facts(folder, bool(facts["tied"]))
    except (ValueError, OSError, KeyError) as error:
        raise SystemExit(
            f"{folder}: {error}; python -m tools.download {folder} --verify names what is broken"
        ) from None
    found = {MANIFEST: 1} | {k: record.get(k, "") for k in ("repo", "source", "revision", "commit")}
    found |= {"bytes": sum(f["size"] for f in files), "files": files, "model": facts}
    found["parallel"] = parallel_sizes(facts)
    if facts["parameters"] and not facts["quantised"]:
        assumed = {
            "window": window,
            "rows_per_card": batch,
            "lora_r": lora_r,
            "how": __doc__.split("\n\n", 1)[1],
        }
        found["memory"] = {
            "assumptions": assumed,
            "rows": memory_table(facts, window, batch, lora_r),
        }
    draft = folder / ".danpu.manifest.new"
    draft.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    fetch.settle(draft, target)
    show(target, found)
    return found


def show(target: Path, found: dict) -> None:
    facts, sizes = found["model"], found["parallel"]
    dtypes = ", ".join(
        f"{name} {n / facts['parameters']:.0%}" for name, n in facts["dtypes"].items()
    )
    say(
        f"{target}: {facts['type']}, {facts['parameters']:,} parameters ({dtypes}), {size_text(found['bytes'])}"
    )
    shape = "{layers} layers, {heads} heads, {kv_heads} key/value heads, width {hidden}, vocabulary {vocabulary}"
    if facts["layers"]:
        say("  " + shape.format(**facts))
    for kind in ("tensor", "pipeline", "expert"):
        if sizes.get(kind):
            say(f"  {kind} parallel: {', '.join(map(str, sizes[kind]))} ({sizes[f'{kind}_why']})")
    if "memory" not in found:
        reason = (
            f"quantised by {facts['quantised']}"
            if facts["quantised"]
            else "there are no safetensors"
        )
        return say(f"  no memory table: {reason}")
    known = found["memory"]["assumptions"]
    rows = f"{known['rows_per_card']} rows of {known['window']:,} tokens per card, LoRA rank {known['lora_r']}"
    without = (
        ""
        if activations("full", facts, 1, False)
        else "; activations not included, config.json has no shapes"
    )
    say(f"  training, GiB per card (with gradient checkpointing): estimated for {rows}{without}")
    for line in memory_lines(found["memory"]["rows"]):
        say(line)
