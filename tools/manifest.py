"""danpu_manifest.json of a model folder: hashes, what the model is, what memory training it takes.
Of a data set's folder: hashes, rows and columns.

Memory is what common/runs/memory_plan.py estimates, in bf16, and 1 GiB for driver and
fragmentation. It was held to a CPU and a simulated NPU, to no card: leave a margin.
"""

import json
from math import gcd
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.runs import memory_plan
from common.runs.memory_plan import Setup

CARDS = (1, 2, 4, 8, 16)
METHODS = ("full", "LoRA", "ZeRO-2", "ZeRO-3")
GIB = 2**30
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


def parquet(path: Path) -> tuple[int, dict[str, str]]:
    """Rows and {column: type, e.g. "string"} that the end of a parquet file tells. ValueError when
    it is none."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            return file.metadata.num_rows, columns
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"broken parquet file ({' '.join(str(error).split())})") from None


def facts_of(folder: Path) -> dict:
    """type, quantised, dtypes, and what config.json (no code of the model runs) and the weights'
    headers tell: memory_plan.config_facts and weight_facts."""
    from transformers import AutoConfig, PretrainedConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError:  # a type that this transformers does not know
        config = PretrainedConfig.from_pretrained(folder)
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= tensors(file)
    shapes = {name: shape for name, (_, shape) in found.items()}
    facts = memory_plan.config_facts(config)
    facts |= memory_plan.weight_facts(shapes, tied=bool(facts["tie_word_embeddings"]))
    return facts | {
        "type": config.model_type,
        "quantised": hasattr(config, "quantization_config"),
        "dtypes": sorted({dtype for dtype, _ in found.values()}),
    }


def setup(method: str, cards: int, recompute: bool, facts: dict, args) -> Setup:
    """What `method` means for the memory of one of the cards."""
    engines = {"ZeRO-2": "zero-2", "ZeRO-3": "zero-3"}
    alone = "ddp" if cards > 1 else "single"
    return Setup(
        tokens=args.batch * args.window,
        engine=engines.get(method, alone),
        cards=cards,
        adapter=args.lora_r * facts["sides"] if method == "LoRA" else 0,
        recompute=recompute,
    )


def memory(method: str, facts: dict, cards: int, recompute: bool, args) -> float:
    """GiB per card, with one for the driver and fragmentation."""
    need = memory_plan.estimate(facts, setup(method, cards, recompute, facts, args))
    return round(need.peak / GIB + 1, 1)


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
    if not memory_plan.has_shapes(facts):
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


def describe_data(folder: Path, record: dict) -> None:
    """Write FOLDER/danpu_manifest.json, the record with the rows that parquet files tell, and show
    what the files are, by their endings and columns."""
    files = {}
    groups = {}  # (ending, columns as text) -> [(bytes, rows or None)]
    for name, known in record["files"].items():
        files[name] = dict(known)
        shown = ""
        path = folder / name
        if path.suffix == ".parquet":
            try:
                rows, columns = parquet(path)
            except ValueError as error:
                raise SystemExit(f"{path}: {error}; --repair fetches it again") from None
            files[name] |= {"rows": rows, "columns": columns}
            shown = ", ".join(f"{column}: {kind}" for column, kind in columns.items())
        group = groups.setdefault((path.suffix, shown), [])
        group.append((known["size"], files[name].get("rows", 0)))
    total = sum(known["size"] for known in files.values())
    print(f"{folder}: data set, {len(files)} files, {total / 2**20:,.1f} MiB")
    for (suffix, shown), members in sorted(groups.items()):
        size = sum(size for size, _ in members)
        line = f"  {len(members)} {suffix or 'other'}, {size / 2**20:,.1f} MiB"
        if shown:
            rows = sum(rows for _, rows in members)
            line += f", {rows:,} rows of {shown}"
        print(line)
    found = record | {"files": files}
    (folder / "danpu_manifest.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
