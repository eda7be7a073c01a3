"""The pictures of a run: opened when a batch wants them, or, where the tower is frozen, what it
says of them, computed once and kept for all ranks, runs and stages.

What is kept belongs to the bytes of a picture, the image processor, the tower's weights and the
layers that are looked at, so nothing of it is ever outdated. It lies in segments that get their
names when they are complete: a run that is killed loses the one that it was writing, and the next
run takes it away. Of several runs on one machine that want the same features one computes them.

P pictures, N features of each, H their width.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from model import features_per_picture, picture_side
from PIL import Image
from sight import Normaliser, layers_of, tower_features
from torch import Tensor, nn

from common import cli
from common.data.cache import SILENT_WAIT, cache_root
from common.data.pictures import PictureError, Place, open_picture, target_size
from common.data.progress import Progress

Fault = tuple[str, str]  # reason, "where: what"

SEGMENT_BYTES = 1 << 30
BATCH = 16  # pictures that the tower sees at a time
HASHED_AT_ONCE = 64
VERSION = 1  # of what is kept
HOST = platform.node() or "host"  # caches may be shared by machines


def pixels_of(picture, image_processor) -> Tensor:
    """A picture (whatever open_picture takes) as the processor crops or pads it, before it is
    rescaled and normalised: uint8 [3, height, width]."""
    image = open_picture(picture, target_size(image_processor))
    found = image_processor(
        images=image, do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]
    return torch.from_numpy(np.ascontiguousarray(found.round().clip(0, 255).astype(np.uint8)))


class PictureSource:
    """Numbers of pictures -> (uint8 pixels [P, 3, height, width] or features [P, N, H], faults).

    faults: place in the list -> (reason, "where: what"); such a picture is black here.
    """

    def __init__(self, places: Sequence, image_processor):
        """places: number -> Place, or whatever open_picture takes."""
        self.places = places
        self.image_processor = image_processor
        self.side = picture_side(image_processor)
        self.kept: Kept | None = None

    def __call__(self, numbers: list[int]) -> tuple[Tensor, dict[int, Fault]]:
        return self.pixels(numbers) if self.kept is None else self.kept.of(numbers)

    def pixels(self, numbers: list[int], workers: int = 0) -> tuple[Tensor, dict[int, Fault]]:
        """workers: threads that open them."""
        shown = torch.zeros(len(numbers), 3, *self.side, dtype=torch.uint8)
        faults = {}

        def show(place: int) -> None:
            number = numbers[place]
            try:
                shown[place] = self.open(number)
            except PictureError as error:
                faults[place] = (error.reason, f"{self.places[number]}: {error}")

        in_threads(show, range(len(numbers)), workers)
        return shown, faults

    def open(self, number: int) -> Tensor:
        return pixels_of(self.places[number], self.image_processor)


# ---- what is kept --------------------------------------------------------------------------------


class Kept:
    """Features on disk: segments[index[number][0]] at row index[number][1]."""

    def __init__(self, segments: list[np.ndarray], index: np.ndarray, faults: dict[int, Fault]):
        """segments: memory-mapped [n, N, H] each, bf16 as uint16; index: int64 [P, 2], -1 for a
        picture that cannot be used; faults: of these, by number."""
        self.segments = segments
        self.index = index
        self.faults = faults

    def of(self, numbers: list[int]) -> tuple[Tensor, dict[int, Fault]]:
        first = self.segments[0]
        out = np.zeros((len(numbers), *first.shape[1:]), first.dtype)
        faults = {}
        for place, number in enumerate(numbers):
            segment, row = self.index[number]
            if segment < 0:
                faults[place] = self.faults[number]
            else:
                out[place] = self.segments[segment][row]
        found = torch.from_numpy(out)
        return found.view(torch.bfloat16) if first.dtype == np.uint16 else found, faults


def numpy_dtype(dtype: torch.dtype):
    return {torch.bfloat16: np.uint16, torch.float16: np.float16, torch.float32: np.float32}[dtype]


def key_of(model, image_processor, dtype: torch.dtype) -> str:
    """Of the folder in which features of this tower lie."""
    digest = hashlib.blake2b(digest_size=16)
    told = json.loads(image_processor.to_json_string())
    strategy = model.config.vision_feature_select_strategy
    facts = [VERSION, told, layers_of(model.config), strategy, str(dtype)]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def keep_features(
    source: PictureSource,
    model,
    dtype: torch.dtype,
    device: torch.device,
    most_gb: float,
    workers: int = 0,
) -> bool:
    """Let `source` give features in place of pixels from now on; all ranks call it. False where
    they would take more than most_gb on disk: the tower then runs in every step.

    model: a LLaVA whose tower does not train, cut or not. dtype: that of the run's steps.
    workers: threads that open pictures.
    """
    count = len(source.places)
    folder = cache_root() / "pictures" / key_of(model, source.image_processor, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    shape = features_shape(source, model)
    each = shape[0] * shape[1] * dtype.itemsize
    total = count * each
    told = f"features of {count:,} pictures, {total / 1e9:,.2f} GB ({each / 1e6:.2f} MB each)"
    if total > most_gb * 1e9:
        cli.say(f"{told}: more than --feature_cache_gb {most_gb:g}; the tower runs in every step")
        return False
    digests, faults = digests_of(source, workers)
    with alone(folder):
        known = digests_in(folder)
        missing = {d: n for n, d in enumerate(digests) if d and d not in known}
        cli.say(f"{told} in {folder}: {len(missing):,} to compute")
        if not all(gathered(has_room(folder, len(missing) * each))):
            cli.say(
                f"{len(missing) * each / 1e9:,.2f} GB do not fit there: the tower runs in every "
                "step; DANPU_CACHE names another place"
            )
            return False
        if missing:
            faults |= compute(folder, missing, source, model, dtype, device, shape, workers)
    source.kept = opened(folder, digests, faults, source)
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this lasts no other run of this machine writes there; what killed ones have left is
    gone. All ranks enter it; the first of a machine holds the lock for all of them."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    with locked(folder) if is_first else nullcontext():
        if is_first:
            for left in folder.glob(f"*.{HOST}.*.part"):
                left.unlink(missing_ok=True)
        cli.wait_for_all("it looks for features")
        yield
        cli.wait_for_all("it keeps features")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    lock = FileLock(f"{folder}.{HOST}.lock")
    try:
        lock.acquire(timeout=SILENT_WAIT)
    except Timeout:
        cli.say(f"waiting for another run that keeps features in {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def has_room(folder: Path, size: int) -> bool:
    return shutil.disk_usage(folder).free > size


def features_shape(source: PictureSource, model) -> tuple[int, int]:
    """(N, H) of a picture."""
    features = features_per_picture(model.config, source.image_processor)
    width = model.config.vision_config.hidden_size * len(layers_of(model.config))
    return features, width


@torch.no_grad()
def run_tower(model, pixels: Tensor, normaliser: Normaliser, dtype, device) -> Tensor:
    """uint8 [P, 3, height, width] -> features [P, N, H] as a training step would compute them."""
    tower = model.model.vision_tower
    half = dtype in (torch.bfloat16, torch.float16)
    own = next(tower.parameters()).dtype
    with torch.autocast(torch.device(device).type, dtype=dtype if half else None, enabled=half):
        values = normaliser(pixels.to(device), own)
        return tower_features(tower, model.config, values)


# ---- digests -------------------------------------------------------------------------------------


def digests_of(source: PictureSource, workers: int) -> tuple[list[str], dict[int, Fault]]:
    """Of the bytes of every picture, "" for one that cannot be read; ranks share the reading."""
    count = len(source.places)
    rank, world = rank_and_world()
    mine = range(rank, count, world)
    found: dict[int, str] = {}
    faults: dict[int, Fault] = {}

    def look(number: int) -> None:
        place = source.places[number]
        try:
            found[number] = hashlib.blake2b(bytes_of(place), digest_size=16).hexdigest()
        except PictureError as error:
            found[number] = ""
            faults[number] = (error.reason, f"{place}: {error}")

    with Progress("look at pictures", total=count, unit="pictures") as progress:
        for some in pieces(mine, HASHED_AT_ONCE):
            in_threads(look, some, workers)
            progress.update(len(some) * world)
    shares = gathered((found, faults))
    found = {number: digest for share, _ in shares for number, digest in share.items()}
    faults = {number: fault for _, share in shares for number, fault in share.items()}
    return [found[number] for number in range(count)], faults


def bytes_of(place) -> bytes:
    if isinstance(place, Place):
        return place.read()
    if isinstance(place, Image.Image):
        return f"{place.mode} {place.size} ".encode() + place.tobytes()
    return place if isinstance(place, bytes) else Place(os.fspath(place)).read()


def digests_in(folder: Path) -> dict[str, tuple[str, int]]:
    """digest -> (segment, row) of all that is complete."""
    known = {}
    for file in sorted(folder.glob("*.json")):
        try:
            digests = json.loads(file.read_text(encoding="utf-8"))
            rows = len(np.load(file.with_suffix(".npy"), mmap_mode="r"))
        except (OSError, ValueError, EOFError):
            continue
        if rows == len(digests):
            known |= {digest: (file.stem, row) for row, digest in enumerate(digests) if digest}
    return known


def opened(folder: Path, digests: list[str], faults: dict, source: PictureSource) -> Kept:
    known = digests_in(folder)
    names = sorted({name for name, _ in (known[d] for d in digests if d in known)})
    if not names:
        first = next(iter(faults.values()), ("missing", "there are no pictures"))
        raise SystemExit(f"none of {len(digests):,} pictures can be used, e.g. {first[1]}")
    segments = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
    number_of = {name: number for number, name in enumerate(names)}
    index = np.full((len(digests), 2), -1, np.int64)
    for number, digest in enumerate(digests):
        if digest in known:
            name, row = known[digest]
            index[number] = number_of[name], row
        elif number not in faults:
            same = next(n for n, d in enumerate(digests) if d == digest and n in faults)
            faults[number] = (faults[same][0], f"{source.places[number]}: {faults[same][0]}")
    return Kept(segments, index, faults)


# ---- computing -----------------------------------------------------------------------------------


def compute(
    folder: Path,
    missing: dict[str, int],
    source: PictureSource,
    model,
    dtype: torch.dtype,
    device,
    shape: tuple[int, int],
    workers: int,
) -> dict[int, Fault]:
    """Features of these pictures (digest -> number) into segments; each process of a machine writes
    its own. -> faults of those that are torn, of all ranks."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    together = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mine = list(missing.items())[local::together]
    rows = max(1, SEGMENT_BYTES // (shape[0] * shape[1] * dtype.itemsize))
    faults: dict[int, Fault] = {}
    normaliser = Normaliser(source.image_processor)
    tower = model.model.vision_tower
    with (
        on_device(tower, device),
        Progress("tower", total=len(missing), unit="pictures") as progress,
    ):
        for part in pieces(mine, rows):
            with Segment(folder, [digest for digest, _ in part], shape, dtype) as segment:
                for some in pieces(part, BATCH):
                    pixels, torn = source.pixels([number for _, number in some], workers)
                    found = run_tower(model, pixels, normaliser, dtype, device)
                    kept = [place for place in range(len(some)) if place not in torn]
                    segment.add([some[place][0] for place in kept], found[kept])
                    faults |= {some[place][1]: fault for place, fault in torn.items()}
                    progress.update(len(some) * together)
    return {number: fault for share in gathered(faults) for number, fault in share.items()}


class Segment:
    """A file of features that gets the list of what is in it, and then its name, at its end."""

    def __init__(self, folder: Path, digests: list[str], shape: tuple[int, int], dtype):
        name = hashlib.blake2b("".join(digests).encode(), digest_size=12).hexdigest()
        self.file = folder / f"{name}.npy"
        self.part = folder / f"{name}.{HOST}.{os.getpid()}.part"
        self.dtype = dtype
        self.shape = (len(digests), *shape)
        self.digests: list[str] = []

    def __enter__(self) -> Segment:
        self.values = np.lib.format.open_memmap(
            self.part, "w+", numpy_dtype(self.dtype), self.shape
        )
        try:
            reserve(self.part)
        except OSError:
            self.__exit__(OSError)
            raise
        return self

    def add(self, digests: list[str], features: Tensor) -> None:
        values = features.to(self.dtype).cpu()
        if self.dtype == torch.bfloat16:
            values = values.view(torch.uint16)
        start = len(self.digests)
        self.values[start : start + len(digests)] = values.numpy()
        self.digests += digests

    def __exit__(self, kind, *_) -> None:
        self.values.flush()
        del self.values
        if kind is not None or not self.digests:
            self.part.unlink(missing_ok=True)
            return
        # rows of torn pictures are left empty at the end: digests pad the list to the file's rows
        listed = self.digests + [""] * (self.shape[0] - len(self.digests))
        notes = self.part.with_suffix(".json.part")
        notes.write_text(json.dumps(listed), encoding="utf-8")
        os.replace(notes, self.file.with_suffix(".json"))
        os.replace(self.part, self.file)  # last: without a name it would be found by nobody


def reserve(file: Path) -> None:
    """The room that a file needs, now: where a disk is full, writing to mapped memory kills."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as opened_file:
            os.posix_fallocate(opened_file.fileno(), 0, file.stat().st_size)


@contextmanager
def on_device(tower: nn.Module, device) -> Iterator[None]:
    """The tower there while this lasts."""
    before = next(tower.parameters()).device
    was_training = tower.training
    tower.to(device).eval()
    try:
        yield
    finally:
        tower.to(before).train(was_training)


# ---- ranks and threads ---------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(own) -> list:
    """What every rank has, in their order."""
    _, world = rank_and_world()
    if world == 1:
        return [own]
    shares: list = [None] * world
    dist.all_gather_object(shares, own)
    return shares


def pieces(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def in_threads(work: Callable, items: Sequence, workers: int) -> None:
    if workers < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, items))
