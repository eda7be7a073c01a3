"""Weight files read without running anything: what stands in safetensors headers, and whether a
folder is sound."""

from __future__ import annotations

import json
from pathlib import Path


def tensors(path: str | Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype as stored, e.g. "BF16", shape).

    ValueError when the header is no JSON or too long, a dtype is unknown, or the offsets overlap,
    leave gaps, do not fit shape and dtype, or do not end where the file ends (all of this is what
    the library checks on opening).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return {
                name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"broken safetensors file ({error})") from None


def problem(path: Path, name: str) -> str | None:
    """What is wrong inside a .safetensors or .json file (going by `name`), None when nothing is."""
    try:
        if name.endswith(".safetensors"):
            tensors(path)
        elif name.endswith(".json"):
            json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        kind = "" if name.endswith(".safetensors") else "no JSON: "
        return f"{kind}{' '.join(str(error).split())}"
    return None


def index_problems(folder: Path, wanted: set[str] | None = None) -> list[str]:
    """What *.index.json promise and the folder does not hold.

    wanted: files that should be there (the others were left out on purpose); None: all of them.
    """
    found = []
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            places = json.loads(index.read_bytes())["weight_map"]
            shards = {
                str(file): {t for t, f in places.items() if f == file} for file in places.values()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            found.append(f"{index.name}: no weight_map inside")
            continue
        for shard, names in sorted(shards.items()):
            if not (folder / shard).is_file():
                if wanted is None or shard in wanted:
                    found.append(f"{shard}: missing, {index.name} names it")
                continue
            try:
                lacks = sorted(names - tensors(folder / shard).keys())
            except (ValueError, OSError) as error:
                found.append(f"{shard}: {error}")
                continue
            if lacks:
                found.append(
                    f"{shard}: has no tensor {lacks[0]}, {index.name} says so ({len(lacks)} such)"
                )
    return found
