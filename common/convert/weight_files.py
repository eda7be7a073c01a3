"""Weights of checkpoint folders: read one tensor at a time, written shard by shard; nothing is ever
run as code."""

import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.convert import model_folder
from common.runs.trust import holds_code

SHARD_GB = 4.0
LAYOUTS = (  # (index, weight files)
    ("model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)


# ---- reading -------------------------------------------------------------------------------------


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch.save file, mapped from disk where it allows that. SystemExit for
    anything but tensors."""
    if model_folder.is_pointer(path):
        raise SystemExit(
            f"{path} is only a Git LFS pointer: the download of the weights is missing"
        )
    try:
        content = _load(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        words = " ".join(str(error).split())
        if holds_code(error):
            raise SystemExit(
                f"{path} holds code, not only tensors; refused, nothing of it was run"
            ) from None
        raise SystemExit(f"{path} cannot be read ({words[:120]}); fetch it again") from None
    if not _only_tensors(content):
        raise SystemExit(f"{path} is not a dictionary of tensors")
    return content


def _load(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)


def _only_tensors(content) -> bool:
    if not isinstance(content, dict):
        return False
    return all(isinstance(value, torch.Tensor) for value in content.values())


class Weights(Mapping):
    """The tensors of a checkpoint folder by name, each read from disk when it is asked for.

    SystemExit for missing, broken or doubtful files.
    """

    def __init__(self, folder: Path):
        model_folder.check(folder, weights=False)  # its index is read below
        self.sources = {}  # name -> an open safetensors file, or the dictionary of a .bin file
        for path in _weight_files(folder):
            source = _opened(path)
            for name in list(source.keys()):
                if name in self.sources:
                    raise SystemExit(
                        f"{folder}: {name} stands in two files; take the old ones away"
                    )
                self.sources[name] = source

    def __getitem__(self, name: str) -> torch.Tensor:
        source = self.sources[name]
        return source[name] if isinstance(source, dict) else source.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        source = self.sources[name]
        if isinstance(source, dict):
            return list(source[name].shape)
        return source.get_slice(name).get_shape()

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or all where there is none; safetensors before .bin."""
    for index, pattern in LAYOUTS:
        found = sorted(folder.glob(pattern))
        if not found:
            continue
        if (folder / index).is_file():
            return _indexed(folder / index, found)
        return found
    raise SystemExit(f"{folder} has no *.safetensors and no pytorch_model*.bin")


def _indexed(index: Path, found: list[Path]) -> list[Path]:
    content = json.loads(index.read_text(encoding="utf-8"))
    named = sorted(set(content["weight_map"].values()))
    present = {path.name for path in found}
    missing = [name for name in named if name not in present]
    if missing:
        raise SystemExit(
            f"{index.parent}: {len(missing)} weight files are missing: {', '.join(missing[:3])}"
        )
    return [index.parent / name for name in named]


def _opened(path: Path):
    if path.suffix == ".bin":
        return read_pickle(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise SystemExit(f"{path} cannot be read ({error}); fetch it again") from None


def check_shape(name: str, found, expected) -> None:
    """SystemExit where a tensor has not the shape that its config gives it."""
    if list(found) != list(expected):
        raise SystemExit(f"{name} has the shape {list(found)}; config.json says {list(expected)}")


# ---- writing -------------------------------------------------------------------------------------


def save_sharded(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_gb: float = SHARD_GB
) -> int:
    """Write (name, tensor) pairs as model*.safetensors, several with an index; memory holds one.
    -> bytes in all."""
    shards = []  # the names of the tensors in each
    total = 0
    for shard in _shards(tensors, shard_gb * 1e9):
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(map(_bytes_of, shard.values()))
    if len(shards) == 1:
        os.replace(folder / "0.part", folder / "model.safetensors")
        return total

    places = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"{i}.part", folder / file)
        places |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(content, indent=1), encoding="utf-8"
    )
    return total


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], limit: float
) -> Iterator[dict[str, torch.Tensor]]:
    """Dictionaries of at most `limit` bytes: one and the same, emptied each time, so that memory
    holds one shard."""
    shard = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + _bytes_of(tensor) > limit:
            yield shard
            shard.clear()
            size = 0
        shard[name] = tensor.contiguous()
        size += _bytes_of(tensor)
    yield shard


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
