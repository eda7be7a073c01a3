"""What a frozen tower says of each caption or picture, computed once: a memory-mapped file that all
ranks of a machine read, and all later runs.

A file belongs to its contents (the captions; of pictures their paths, sizes and times) and to the
fingerprint of the model, so that nothing in it is ever outdated. Values are those before the
projection, which may still train.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import modeling_two_towers
import numpy as np
import torch
import torch.distributed as dist
from batches import PairCollator, PairDataset, blank
from contrastive import gather, rank, world
from torch import Tensor
from torch.utils.data import Dataset

from common import cli, device
from common.data import pictures
from common.data.cache import cache_root
from common.data.files import sha256
from common.data.pictures import PictureError, Place
from common.data.progress import Progress

Fault = tuple[str, str]  # reason, "where: what", as batches.py counts them
# an edited model, or another way to open pictures, has other features
VERSION = [sha256(Path(file.__file__))[:16] for file in (modeling_two_towers, pictures)]


# ---- rows with features --------------------------------------------------------------------------


@dataclass
class Features:
    """values: fp32 [U, H], memory-mapped, one of each different caption or picture; index: int64
    [rows], which of them a row has; faults: of pictures that cannot be used, by their number."""

    values: np.ndarray
    index: np.ndarray
    faults: dict[int, Fault]

    def of(self, row: int) -> Tensor:
        return torch.from_numpy(self.values[self.index[row]].copy())

    def fault(self, row: int) -> Fault | None:
        return self.faults.get(int(self.index[row]))


class Pairs(Dataset):
    """Rows of a batches.PairDataset, with features where some are known: `features` maps the name
    that they have in a batch to Features."""

    def __init__(self, pairs: PairDataset):
        self.pairs = pairs
        self.features: dict[str, Features] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        self.pairs.set_epoch(epoch)

    def use(self, name: str, features: Features) -> None:
        """Pictures are not opened any more where their features are known."""
        self.features[name] = features
        if name == "image_pooled":
            self.pairs.image_processor = None

    def fault(self, row: int) -> Fault | None:
        found = (features.fault(row) for features in self.features.values())
        return next((fault for fault in found if fault), None)

    def __getitem__(self, index: int) -> dict:
        fault = self.fault(index)
        if fault and self.pairs.replaces:
            choices = self.pairs.substitutes(index)
            index = next((row for row in choices if not self.fault(row)), None)
            if index is None:
                raise SystemExit(f"no picture can be used in place of {fault[1]}")
        item = self.pairs[index]
        item["fault"] = item["fault"] or fault
        for name, features in self.features.items():
            item[name] = features.of(item["row_id"])
        return item


class Collator:
    """Items of Pairs -> a batch: that of PairCollator, without texts where their features are
    known, and the features [B, H]. Those of a teacher travel as the bits of fp32: with DeepSpeed
    the Trainer casts whatever floats a batch has to its half dtype."""

    def __init__(self, tokens: Callable[[list[str]], dict]):
        self.with_texts = PairCollator(tokens)
        self.without_texts = PairCollator()

    def __call__(self, items: list[dict]) -> dict:
        first = items[0]
        batch = (self.without_texts if "text_pooled" in first else self.with_texts)(items)
        for name in ("text_pooled", "image_pooled"):
            if name in first:
                batch[name] = torch.stack([item[name] for item in items])
        for name in ("teacher_texts", "teacher_images"):
            if name in first:
                batch[name] = torch.stack([item[name] for item in items]).view(torch.int32)
        return batch


# ---- different captions and pictures -------------------------------------------------------------


@dataclass
class Units:
    """The different captions or pictures of rows: items (U of them), index (int64 [rows]) and key,
    a digest of their contents."""

    items: Sequence
    index: np.ndarray
    key: str


def units(rows, part: str) -> Units:
    """part: text or image; rows: of rows.load_pairs."""
    if part == "text":
        items = list(rows["text"])
        told = items
    else:
        items = [tuple(sorted(place.items())) for place in rows["place"]]
        told = [repr((item, stamp(dict(item)["path"]))) for item in items]
    digest = hashlib.sha256()
    numbers: dict = {}
    index = np.empty(len(items), np.int64)
    for i, (item, words) in enumerate(zip(items, told, strict=True)):
        if item not in numbers:
            numbers[item] = len(numbers)
            digest.update(words.encode(errors="surrogatepass") + b"\0")
        index[i] = numbers[item]
    different = list(numbers)
    if part == "image":
        different = [Place(**dict(item)) for item in different]
    return Units(different, index, digest.hexdigest())


@cache
def stamp(path: str) -> tuple[int, int]:
    """Size and time of a file; zeros for one that is not there."""
    try:
        facts = os.stat(path)
    except OSError:
        return 0, 0
    return facts.st_size, facts.st_mtime_ns


# ---- computing and keeping -----------------------------------------------------------------------


def features_of(
    rows,
    part: str,
    facts: Sequence,
    embed: Callable[[list], Tensor],
    prepare: Callable[[object], Tensor],
    size: int,
    workers: int = 0,
) -> Features:
    """Features of all rows, from an earlier run or computed by all ranks together. All ranks call
    it.

    facts: what else decides the values: fingerprint of the model, dtype, window ...
    embed: captions, or prepared pictures, of one batch -> [n, H], wherever it lies; called equally
        often on every rank.
    prepare: a Place -> what `embed` takes, a tensor; PictureError where there is no usable picture.
    size: captions or pictures of a batch; workers: threads that open pictures.
    """
    found = units(rows, part)
    told = [VERSION, part, found.key, *facts]
    key = hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()
    file = cache_root() / "features" / f"{key[:32]}.npy"
    named = {"text": "captions", "image": "pictures"}[part]
    if all_have(file, len(found.items)):
        cli.say(f"{len(found.items):,} {named}: their features are kept from an earlier run")
    else:
        loader = Loader(part, prepare, workers)
        compute(file, found.items, embed, loader, size, named)
    faults = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    values = np.load(file, mmap_mode="r")
    return Features(values, found.index, {int(n): tuple(fault) for n, fault in faults.items()})


def all_have(file: Path, count: int) -> bool:
    """Whether every rank finds the file, complete."""
    try:
        complete = len(np.load(file, mmap_mode="r")) == count
        complete = complete and file.with_suffix(".json").is_file()
    except (OSError, ValueError, EOFError):
        complete = False
    have = [complete] * world()
    if world() > 1:
        dist.all_gather_object(have, complete)
    return all(have)


class Loader:
    """Items of a batch, opened by threads; of captions there is nothing to open."""

    def __init__(self, part: str, prepare: Callable, workers: int):
        self.prepare = prepare if part == "image" else None
        self.pool = ThreadPoolExecutor(workers) if workers and self.prepare else None

    def __call__(self, items: list) -> tuple[list, list[Fault | None]]:
        if self.prepare is None:
            return items, [None] * len(items)
        each = self.pool.map(self.open, items) if self.pool else map(self.open, items)
        opened, faults = zip(*each, strict=True)
        usable = next((value for value in opened if value is not None), None)
        if usable is None:
            usable = self.prepare(blank())
        return [usable if value is None else value for value in opened], list(faults)

    def open(self, place: Place) -> tuple[Tensor | None, Fault | None]:
        try:
            return self.prepare(place), None
        except PictureError as error:
            return None, (error.reason, f"{place}: {error}")


def compute(file: Path, items: Sequence, embed, loader: Loader, size: int, named: str) -> None:
    """One rank of each machine writes, under a name of its own first: machines may share the
    cache."""
    is_writer = int(os.environ.get("LOCAL_RANK", 0)) == 0
    together = world() * size
    part = file.with_suffix(f".{rank()}.part")
    out = None
    faults: dict[int, Fault] = {}
    with Progress(f"embed {named}", total=len(items), unit=named) as progress:
        for start in range(0, len(items), together):
            first = start + rank() * size
            # every rank embeds as many: the last ones come again at the end
            numbers = [min(n, len(items) - 1) for n in range(first, first + size)]
            opened, wrong = loader([items[n] for n in numbers])
            faults |= {n: fault for n, fault in zip(numbers, wrong, strict=True) if fault}
            # nccl and hccl take nothing from a CPU, where a teacher leaves its vectors
            own = embed(opened).float().to(device.device())
            every = gather(own).cpu().numpy()[: len(items) - start]
            if is_writer and out is None:
                file.parent.mkdir(parents=True, exist_ok=True)
                shape = (len(items), every.shape[1])
                out = np.lib.format.open_memmap(part, "w+", np.float32, shape)
            if is_writer:
                out[start : start + len(every)] = every
            progress.update(len(every))
    shares = [faults]
    if world() > 1:
        shares = [None] * world()
        dist.all_gather_object(shares, faults)
    if is_writer:
        out.flush()
        told = {number: fault for share in shares for number, fault in share.items()}
        text = json.dumps(told, ensure_ascii=True)
        notes = part.with_suffix(".json.part")
        notes.write_text(text, encoding="utf-8")
        notes.replace(file.with_suffix(".json"))
        part.replace(file)
    cli.wait_for_all("it keeps features")
