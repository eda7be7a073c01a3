"""What a stage trains on, from a small YAML file: DATA=mid.yaml, or anything else that --data_path
takes.

    - file: ../data/sft              # all of its rows once an epoch
    - file: spelling.jsonl
      epochs: 2                      # each of its rows twice; 0.5: half of them
    - file: talks.jsonl
      weight: 0.2                    # as many that they are a fifth of all rows
    - file: ../data/pretrain
      kind: text                     # documents among conversations; --stage mid takes them

Files and folders lie beside the YAML file, or have whole paths. Which rows are taken in part
follows from the seed. Rows are read as everywhere (common/data/load.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from common import cli
from common.data.load import load_rows, merged

FIELDS = {"file", "weight", "epochs", "kind"}


@dataclass(frozen=True)
class Part:
    """path: of a file or folder; how often each of its rows comes in an epoch, or the share of all
    rows that are its own (weight, else None); kind of its rows, "" for that of the stage."""

    path: Path
    epochs: float = 1.0
    weight: float | None = None
    kind: str = ""


# ---- the file ------------------------------------------------------------------------------------


def is_mixture(data_path: str) -> bool:
    return Path(data_path).suffix.lower() in (".yaml", ".yml")


def read(file: Path) -> list[Part]:
    """SystemExit with file and entry for what the user has to repair."""
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise SystemExit(f"{file}: cannot be read as YAML: {reason}") from None
    if not isinstance(listed, list) or not listed:
        raise SystemExit(f"{file}: a list of entries, each with `file:`; see road/mixture.py")
    parts = [part_of(entry, f"{file}, entry {i}", file.parent) for i, entry in enumerate(listed, 1)]
    shares = sum(part.weight or 0.0 for part in parts)
    others = [part for part in parts if part.weight is None]
    if shares >= 1 and others:
        raise SystemExit(
            f"{file}: the weights are {shares:g} together, which leaves nothing for "
            f"{others[0].path}; below 1"
        )
    return parts


def part_of(entry, where: str, folder: Path) -> Part:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise SystemExit(f"{where}: `file:` names no file or folder")
    unknown = sorted(map(str, entry.keys() - FIELDS))
    if unknown:
        raise SystemExit(f"{where}: {', '.join(unknown)}: only {', '.join(sorted(FIELDS))}")
    if "weight" in entry and "epochs" in entry:
        raise SystemExit(f"{where}: weight or epochs, not both")
    for name in ("weight", "epochs"):
        value = entry.get(name, 1)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            raise SystemExit(f"{where}: {name}: {value}: a number above 0")
    kind = entry.get("kind", "")
    if kind not in ("", "text"):
        raise SystemExit(f"{where}: kind: {kind}: only text, or nothing for the rows of the stage")
    path = Path(entry["file"]).expanduser()
    if not path.is_absolute():
        path = folder / path
    return Part(path, float(entry.get("epochs", 1)), entry.get("weight"), kind)


# ---- rows ----------------------------------------------------------------------------------------


def load(data_path: str, kind: str, columns, strict: bool, seed: int, texts: bool = False) -> tuple:
    """(rows, counts) as load_rows gives them; a YAML file is a mixture of such.

    texts: whether the stage takes rows of kind text beside its own.
    """
    if not is_mixture(data_path):
        return load_rows(data_path, kind, columns, strict, seed=seed)
    from datasets import concatenate_datasets

    parts = read(Path(data_path).expanduser())
    loaded = []
    for part in parts:
        if part.kind and not texts:
            raise SystemExit(
                f"{data_path}: {part.path}: kind: {part.kind}: --stage mid takes texts among "
                "conversations, this stage does not"
            )
        loaded.append(load_rows([part.path], part.kind or kind, columns, strict, seed=seed))
    sizes = [len(rows) for rows, _ in loaded]
    counts = counts_of(parts, sizes)
    drawn = []
    for i, ((rows, _), count) in enumerate(zip(loaded, counts, strict=True)):
        drawn.append(rows.select(chosen(len(rows), count, [seed, i])))
    stats = merged([one for _, one in loaded])
    told = json.dumps([stats["sha256"], counts])
    stats["sha256"] = hashlib.sha256(told.encode()).hexdigest()
    stats["mixture"] = []
    for part, size, count in zip(parts, sizes, counts, strict=True):
        stats["mixture"].append({"file": str(part.path), "rows": size, "drawn": count})
        share = count / sum(counts)
        cli.say(f"  {part.path.name}: {count:,} of its {size:,} rows an epoch, {share:.1%} of all")
    stats["used"] = sum(counts)
    return concatenate_datasets(drawn), stats


def counts_of(parts: list[Part], sizes: list[int]) -> list[int]:
    """Rows of each part in an epoch. Where all have weights, as many as keep them without a row
    coming twice."""
    by_epochs = 0.0
    for part, size in zip(parts, sizes, strict=True):
        if part.weight is None:
            by_epochs += part.epochs * size
    shares = sum(part.weight or 0.0 for part in parts)
    if by_epochs:
        total = by_epochs / (1 - shares)
    else:
        total = min(size * shares / part.weight for part, size in zip(parts, sizes, strict=True))
    counts = []
    for part, size in zip(parts, sizes, strict=True):
        wanted = part.epochs * size
        if part.weight is not None:
            wanted = total * part.weight / (1 if by_epochs else shares)
        counts.append(max(1, round(wanted)))
    return counts


def chosen(size: int, count: int, seed: list[int]) -> np.ndarray:
    """Numbers of `count` of `size` rows, in their order: each equally often, the rest drawn."""
    whole, more = divmod(count, size)
    drawn = np.random.default_rng(seed).permutation(size)[:more]
    return np.sort(np.concatenate([np.tile(np.arange(size), whole), drawn]))
