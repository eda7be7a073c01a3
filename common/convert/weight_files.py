"""Weights of checkpoint folders: read one tensor at a time, written shard by shard; nothing is ever
run as code."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SHARD_GB = 4.0


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch.save file, mapped from disk where it allows that. SystemExit for
    anything but tensors."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise SystemExit(
                f"{path} is only a Git LFS pointer: the download of the weights is missing"
            )
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        words = " ".join(str(error).split())
        if re.search("GLOBAL|Unsupported (class|operand)|instruction", words):
            raise SystemExit(
                f"{path} holds code, not only tensors; refused, nothing of it was run"
            ) from None
        raise SystemExit(f"{path} cannot be read ({words[:120]}); fetch it again") from None
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise SystemExit(f"{path} is not a dictionary of tensors")
    return content


class Weights(Mapping):
    """The tensors of a checkpoint folder by name, each read from disk when it is asked for.

    SystemExit for missing, broken or doubtful files.
    """

    def __init__(self, folder: Path):
        self.place = {}  # name -> an open safetensors file, or the dictionary of a .bin file
        for path in self._files(folder):
            part = self._open(path)
            for name in list(part.keys()):
                if name in self.place:
                    raise SystemExit(
                        f"{folder}: {name} stands in two files; take the old ones away"
                    )
                self.place[name] = part

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        for index, pattern in (
            ("model.safetensors.index.json", "*.safetensors"),
            ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
        ):
            found = sorted(folder.glob(pattern))
            if (folder / index).is_file() and found:
                named = set(
                    json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
                )
                if missing := sorted(named - {path.name for path in found}):
                    raise SystemExit(
                        f"{folder}: {len(missing)} weight files are missing: {', '.join(missing[:3])}"
                    )
                return [folder / name for name in sorted(named)]
            if found:
                return found
        raise SystemExit(f"{folder} has no *.safetensors and no pytorch_model*.bin")

    @staticmethod
    def _open(path: Path):
        if path.suffix == ".bin":
            return read_pickle(path)
        try:
            return safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise SystemExit(f"{path} cannot be read ({error}); fetch it again") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        part = self.place[name]
        return part[name] if isinstance(part, dict) else part.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        part = self.place[name]
        return (
            list(part[name].shape) if isinstance(part, dict) else part.get_slice(name).get_shape()
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)


def check_shape(name: str, found, expected) -> None:
    """SystemExit where a tensor has not the shape that its config gives it."""
    if list(found) != list(expected):
        raise SystemExit(f"{name} has the shape {list(found)}; config.json says {list(expected)}")


def save_sharded(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_gb: float = SHARD_GB
) -> int:
    """Write (name, tensor) pairs as model*.safetensors, several with an index; memory holds one. ->
    bytes in all."""
    shards, batch, held, total = [], {}, 0, 0

    def flush() -> None:
        save_file(batch, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if batch and held + size > shard_gb * 1e9:
            flush()
            held = 0
        batch[name] = tensor.contiguous()
        held, total = held + size, total + size
    flush()
    if len(shards) == 1:
        os.replace(folder / "0.part", folder / "model.safetensors")
        return total
    places = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"{i}.part", folder / file)
        places |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))
    return total


class Draft:
    """`with Draft(out) as folder`: a folder beside `out` that takes its name when all has been
    written."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise SystemExit(f"{out} is not empty; choose another --output_dir")
        self.part = self.out.with_name(self.out.name + ".part")

    def __enter__(self) -> Path:
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        return self.part

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            shutil.rmtree(self.part, ignore_errors=True)
            return
        if self.out.exists():
            self.out.rmdir()
        os.replace(self.part, self.out)
