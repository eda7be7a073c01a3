"""An index of pictures: their vectors in float16, where each one lies, and exact search.

A folder holds shards (NUMBER.npy and NUMBER.jsonl) and manifest.json, which names only shards that
are whole, with their sizes and checksums: a build that is killed leaves its whole shards and goes
on with the next. Whoever writes holds a lock; whoever searches does not wait for it.

Shapes: R rows (pictures), E width, Q queries, P principal dimensions.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import device
from common.data.files import atomic_file
from common.data.pictures import PictureError, Place, open_picture, target_size
from common.runs.digests import digest

FORMAT = 1
SHARD_ROWS = 2048
READ_ROWS = 256  # decoded pictures in memory at once
READERS = 4  # threads that decode
READ_BLOCK = 1 << 14  # vectors
MANIFEST = "manifest.json"
PRINCIPAL = 128  # dimensions of the first of two stages
RESCORED = 200  # rows that the second stage looks at
PCA_ROWS = 50_000  # at most so many give the principal axes
ASKED = 64  # rows that two stages are tried on
LEAST_RECALL = 0.99  # of the ten nearest of those; with less every search is exact
# The largest error of a dot product of normalised vectors in a half dtype: both are rounded (2u),
# and the result is (u). u: 2^-9 in bfloat16, 2^-11 in float16; float32 for its sums.
ERROR = {torch.bfloat16: 3.2 * 2**-9, torch.float16: 3.2 * 2**-11, torch.float32: 1e-5}
FIRST_LOOK = 256  # rows that are scored exactly, unless that cannot prove the result


class IndexProblem(SystemExit):
    """What is wrong with an index, in one line."""


# ---- on disk -------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A picture as it was when it was embedded. stamp: size and time of its file; problem: why it
    could not be used (its vector is then not there)."""

    place: Place
    stamp: tuple[int, int]
    problem: str = ""

    @property
    def key(self) -> str:
        return key_of(self.place)

    def line(self) -> str:
        place = {f.name: getattr(self.place, f.name) for f in fields(Place)}
        kept = {name: value for name, value in place.items() if value or name == "path"}
        row = {"place": kept, "stamp": list(self.stamp)}
        if self.problem:
            row["problem"] = self.problem
        return json.dumps(row, ensure_ascii=False)


def entry_of(line: bytes | str) -> Entry:
    row = json.loads(line)
    return Entry(Place(**row["place"]), tuple(row["stamp"]), row.get("problem", ""))


def key_of(place: Place) -> str:
    """What makes two places the same picture."""
    return f"{place.path}\0{place.offset}" if place.form != "file" else place.path


def stamp_of(place: Place) -> tuple[int, int]:
    """(bytes, nanoseconds) of the file, (0, 0) where there is none."""
    try:
        found = os.stat(place.path)
    except (OSError, ValueError):
        return 0, 0
    return found.st_size, found.st_mtime_ns


class Store:
    """The folder of an index: what its manifest says, and how it is changed."""

    def __init__(self, folder: str | Path, fingerprint: str = "", width: int = 0):
        """fingerprint, width: of the model; IndexProblem where the index is another's."""
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.width = width
        self.read()

    def read(self) -> None:
        """Know what others have written meanwhile."""
        self.manifest = _read_manifest(self.folder)
        mine = {"fingerprint": self.fingerprint, "width": self.width}
        if not self.fingerprint:
            return
        if not self.manifest["fingerprint"]:
            self.manifest |= mine
        if self.manifest["fingerprint"] != self.fingerprint:
            raise IndexProblem(
                f"{self.folder} holds vectors of another model; choose another --index, "
                "or delete that folder and build it again"
            )

    @property
    def shards(self) -> list[dict]:
        return self.manifest["shards"]

    def files(self, name: str) -> tuple[Path, Path]:
        """-> its vectors, its entries."""
        return self.folder / f"{name}.npy", self.folder / f"{name}.jsonl"

    def torn(self, shards: list[dict]) -> list[dict]:
        """Those whose files are not what was written."""
        paths = [path for shard in shards for path in self.files(shard["name"])]
        there = [path for path in paths if path.is_file()]
        found = {path: one.facts() for path, one in zip(there, digest(there), strict=True)}
        return [
            shard
            for shard in shards
            if [found.get(path) for path in self.files(shard["name"])] != shard["files"]
        ]

    def entries(self, shard: dict) -> list[Entry]:
        """All that were looked at for a shard; those without a problem have a row, in this
        order."""
        lines = self.files(shard["name"])[1].read_bytes().splitlines()
        return [entry_of(line) for line in lines]

    def vectors(self, shard: dict) -> np.ndarray:
        """[R, E] float16, mapped."""
        return np.load(self.files(shard["name"])[0], mmap_mode="r", allow_pickle=False)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock, and know what others have written."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "writer.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise IndexProblem(f"{self.folder}: another process is writing to it") from None
        try:
            self.read()
            yield
        finally:
            lock.release()

    def append(self, entries: Sequence[Entry], vectors: torch.Tensor) -> None:
        """A new shard: written, forced to disk, then named in the manifest."""
        number = 1 + max((int(shard["name"]) for shard in self.shards), default=-1)
        self.put(f"{number:06d}", entries, vectors)

    def put(self, name: str, entries: Sequence[Entry], vectors: torch.Tensor) -> None:
        """The shard of this name, new or in the place of a torn one."""
        paths = self.files(name)
        with atomic_file(paths[0]) as part, open(part, "wb") as file:
            np.save(file, vectors.to(torch.float16).numpy())
        with atomic_file(paths[1]) as part:
            text = "".join(entry.line() + "\n" for entry in entries)
            part.write_text(text, encoding="utf-8")
        found = [one.facts() for one in digest(paths, sync=True)]
        shard = {"name": name, "rows": len(vectors), "files": found}
        kept = [one for one in self.shards if one["name"] != name]
        self.manifest["shards"] = sorted([*kept, shard], key=lambda one: one["name"])
        self.save()

    def save(self) -> None:
        with atomic_file(self.folder / MANIFEST) as part, open(part, "wb") as file:
            file.write(json.dumps(self.manifest, ensure_ascii=False, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.is_file():
        return {"format": FORMAT, "fingerprint": "", "width": 0, "shards": [], "deleted": []}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and manifest.keys() >= {"shards", "deleted"}
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise IndexProblem(f"{path} cannot be read; delete {folder} and build the index again")
    return manifest


# ---- building ------------------------------------------------------------------------------------

# places -> vectors of those that can be used [R, E], {number: reason} of the others
Embed = Callable[[list[Place]], tuple[torch.Tensor, dict[int, str]]]


def embedding(embedder, tell: Callable[[int], object] = lambda count: None) -> Embed:
    """Embed of a model (model.Embedder), by the loader of training; tell: how many more are
    done."""
    size = target_size(embedder.image_processor)

    def opened(place: Place):
        try:
            return open_picture(place, size)
        except PictureError as error:
            return error

    def embed(places: list[Place]) -> tuple[torch.Tensor, dict[int, str]]:
        vectors = [torch.empty(0, embedder.size)]
        problems = {}
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(places), READ_ROWS):
                found = list(pool.map(opened, places[start : start + READ_ROWS]))
                usable = [one for one in found if not isinstance(one, PictureError)]
                for i, one in enumerate(found, start):
                    if isinstance(one, PictureError):
                        problems[i] = one.reason
                if usable:
                    vectors.append(embedder.embed_images(usable))
                tell(len(found))
        return torch.cat(vectors), problems

    return embed


def build(
    store: Store,
    places: Iterable[Place],
    embed: Embed,
    shard_rows: int = SHARD_ROWS,
    begin: Callable[[int], object] = lambda count: None,
    after: Callable[[list[Entry]], bool] = lambda entries: True,
) -> dict[str, int]:
    """Embed what is new among `places` (or has changed since), shard by shard.

    Args:
        begin: is told how many pictures are new.
        after: is told what a shard that is done looked at; False ends the build, which the next
            one continues.
    Returns: how many were {added, unusable, known, repaired}.
    """
    counts = {"added": 0, "unusable": 0, "known": 0, "repaired": 0}
    with store.writing():
        _repair(store, embed, counts)
        known = {}
        for shard in store.shards:
            known |= {entry.key: entry.stamp for entry in store.entries(shard)}
        places = {key_of(place): place for place in places}
        fresh = [place for key, place in places.items() if known.get(key) != stamp_of(place)]
        counts["known"] = len(places) - len(fresh)
        begin(len(fresh))
        for start in range(0, len(fresh), shard_rows):
            entries, vectors = _embed_entries(fresh[start : start + shard_rows], embed)
            store.append(entries, vectors)
            counts["added"] += len(vectors)
            counts["unusable"] += len(entries) - len(vectors)
            if not after(entries):
                break
    return counts


def _repair(store: Store, embed: Embed, counts: dict) -> None:
    """Make torn shards again: from their own list of pictures where that is whole, else the
    pictures count as new."""
    for shard in store.torn(store.shards):
        counts["repaired"] += 1
        lines = store.files(shard["name"])[1]
        if lines.is_file() and digest([lines])[0].facts() == shard["files"][1]:
            places = [entry.place for entry in store.entries(shard)]
            store.put(shard["name"], *_embed_entries(places, embed))
        else:
            store.shards.remove(shard)
            store.save()


def _embed_entries(places: list[Place], embed: Embed) -> tuple[list[Entry], torch.Tensor]:
    stamps = [stamp_of(place) for place in places]  # before: what changes meanwhile is seen later
    vectors, problems = embed(places)
    if not torch.isfinite(vectors).all():
        raise IndexProblem("the model gives vectors that are not finite; nothing was written")
    rows = [
        Entry(place, stamp, problems.get(i, ""))
        for i, (place, stamp) in enumerate(zip(places, stamps, strict=True))
    ]
    return rows, vectors


def delete(store: Store, is_unwanted: Callable[[Place], bool]) -> int:
    """Take pictures out of all answers; how many there were. They stay known: a build does not
    bring them back."""
    with store.writing():
        gone = set(store.manifest["deleted"])
        before = len(gone)
        for shard in store.shards:
            entries = [entry for entry in store.entries(shard) if not entry.problem]
            gone |= {entry.key for entry in entries if is_unwanted(entry.place)}
        store.manifest["deleted"] = sorted(gone)
        store.save()
    return len(gone) - before


def restore(store: Store, is_wanted: Callable[[Place], bool]) -> int:
    """The contrary of `delete`."""
    with store.writing():
        gone = set(store.manifest["deleted"])
        back = set()
        for shard in store.shards:
            entries = store.entries(shard)
            back |= {entry.key for entry in entries if entry.key in gone and is_wanted(entry.place)}
        store.manifest["deleted"] = sorted(gone - back)
        store.save()
    return len(back)


# ---- in memory -----------------------------------------------------------------------------------


class Segment:
    """Neighbouring rows, ready to be multiplied."""

    def __init__(self, exact: Sequence[np.ndarray], first: int, dtype: torch.dtype):
        """exact: float16 arrays [*, E], mapped; first: number of the first row."""
        self.exact = list(exact)
        self.first = first
        self.starts = np.cumsum([0, *map(len, self.exact)])
        self.dtype = dtype
        self.matrix: torch.Tensor | None = None
        self.reduced: torch.Tensor | None = None
        self.faiss = faiss_index(self.exact[0].shape[1], dtype)
        if self.faiss is not None:
            for part in self.blocks():
                self.faiss.add(part.numpy())
            return
        self.matrix = torch.empty(len(self), self.exact[0].shape[1], dtype=dtype)
        start = 0
        for part in self.blocks():
            self.matrix[start : start + len(part)] = part
            start += len(part)
        self.matrix = self.matrix.to(device.device())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self) -> Iterator[torch.Tensor]:
        """All vectors, float32 [*, E], some thousands at a time."""
        for part in self.exact:
            for start in range(0, len(part), READ_BLOCK):
                yield torch.from_numpy(part[start : start + READ_BLOCK].astype(np.float32))

    def reduce(self, axes: torch.Tensor) -> None:
        """Rows on these axes [E, P], in the half dtype."""
        parts = [(block @ axes).to(self.dtype) for block in self.blocks()]
        self.reduced = torch.cat(parts).to(device.device())

    def near(self, queries: torch.Tensor, count: int, dead: torch.Tensor, reduced: bool = False):
        """The `count` best rows by products in the half dtype: scores float32, rows, [Q, count].
        Those that are dead have -inf."""
        if self.faiss is not None and not reduced:
            scores, rows = self.faiss.search(queries.numpy(), min(count + len(dead), len(self)))
            scores, rows = torch.from_numpy(scores), torch.from_numpy(rows)
            return scores.masked_fill(torch.isin(rows, dead), -torch.inf), rows
        matrix = self.reduced if reduced else self.matrix
        products = queries.to(matrix) @ matrix.T
        if len(dead):
            products[:, dead.to(products.device)] = -torch.inf
        scores, rows = products.topk(min(count, len(self)))
        return scores.float().cpu(), rows.cpu()

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors as they are stored, of rows that ascend: [r, E] float32."""
        parts = []
        bounds = np.searchsorted(rows, self.starts)
        for number, part in enumerate(self.exact):
            own = rows[bounds[number] : bounds[number + 1]] - self.starts[number]
            parts.append(part[own].astype(np.float32))
        return np.concatenate(parts)


def faiss_index(width: int, dtype: torch.dtype):
    """Where faiss is installed and this machine has no fast half dtype: an exact index of it, which
    keeps float16 where a matrix would take float32. Else None."""
    if dtype is not torch.float32 or device.kind() != "cpu":
        return None
    try:
        import faiss
    except ImportError:
        return None
    half = faiss.ScalarQuantizer.QT_fp16
    found = faiss.IndexScalarQuantizer(width, half, faiss.METRIC_INNER_PRODUCT)
    found.train(np.zeros((1, width), np.float32))  # float16 has nothing to learn
    return found


class View(NamedTuple):
    """What one search sees, whatever is added meanwhile.

    dead: int64, rows that must not be found. axes: [E, P] where two stages search, all segments
    being reduced to them. entries: one for each row (more follow while a shard is taken up).
    """

    segments: list[Segment]
    dead: torch.Tensor
    axes: torch.Tensor | None
    entries: Sequence[Entry]

    def alive(self) -> int:
        """Pictures that can be found."""
        return sum(map(len, self.segments)) - len(self.dead)


class Index:
    """What is searched: a snapshot of a Store that `refresh` brings up to date."""

    def __init__(self, folder: str | Path, fingerprint: str = "", two_stage: bool = False):
        """IndexProblem where the index is torn or of a model with another fingerprint.

        two_stage: look at PRINCIPAL dimensions first, unless a trial at opening shows that this
            loses what is near; `note` says what it found.
        """
        self.store = Store(folder, fingerprint)
        self.two_stage = two_stage
        self.dtype = device.half_dtype() or torch.float32
        # replaced as a whole: others search while a shard is taken up
        self.view = View([], torch.empty(0, dtype=torch.long), None, [])
        self.rows: dict[str, int] = {}  # key -> its newest row
        self.outdated: set[int] = set()  # rows of files that have changed since
        self.note = ""  # about two stages
        self.shards: list[dict] = []
        self.seen: tuple = ()  # of the manifest
        self.lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        """Pictures that can be found."""
        return self.view.alive()

    @property
    def segments(self) -> list[Segment]:
        return self.view.segments

    @property
    def entries(self) -> Sequence[Entry]:
        return self.view.entries

    @property
    def axes(self) -> torch.Tensor | None:
        return self.view.axes

    # -- loading

    def refresh(self) -> bool:
        """Take up what was written since; whether there was anything."""
        with self.lock:
            path = self.store.folder / MANIFEST
            found = path.stat() if path.is_file() else None
            seen = (found.st_ino, found.st_mtime_ns) if found else ()
            if seen == self.seen:
                return False
            self.store.read()
            if self.store.shards[: len(self.shards)] == self.shards:
                self._append(self.store.shards[len(self.shards) :])
                self.seen = seen
            else:  # a torn shard was made again
                again = Index(self.store.folder, self.store.fingerprint, self.two_stage)
                self.__dict__.update(vars(again) | {"lock": self.lock})
            return True

    def _append(self, shards: list[dict]) -> None:
        torn = self.store.torn(shards)
        if torn:
            raise IndexProblem(
                f"{self.store.folder}: shard {torn[0]['name']} is torn or missing "
                f"({len(torn)} in all); run build_index.py with this --index once more, "
                "which makes it again"
            )
        first = len(self.entries)
        for shard in shards:
            self._number(self.store.entries(shard))
        arrays = [self.store.vectors(shard) for shard in shards if shard["rows"]]
        segments = self.segments
        if arrays:
            segments = _merged([*segments, Segment(arrays, first, self.dtype)], self.dtype)
        axes = self.reduce(segments, self.axes) if self.two_stage else None
        deleted = self.store.manifest["deleted"]
        gone = {self.rows[key] for key in deleted if key in self.rows}
        dead = torch.tensor(sorted(self.outdated | gone), dtype=torch.long)
        self.view = View(segments, dead, axes, self.entries)
        self.shards = [*self.shards, *shards]

    def _number(self, looked_at: list[Entry]) -> None:
        """Rows for the entries of a shard."""
        for entry in looked_at:
            older = self.rows.pop(entry.key, None)
            if older is not None:
                self.outdated.add(older)
            if not entry.problem:
                self.rows[entry.key] = len(self.entries)
                self.entries.append(entry)

    def reduce(self, segments: list[Segment], axes: torch.Tensor | None) -> torch.Tensor | None:
        """Bring rows to the axes of largest variance, float16's neighbour for the products; -> the
        axes, None where two stages would not pay. axes: those of before."""
        is_first = axes is None
        if is_first:
            axes = principal_axes(segments, PRINCIPAL)
        if axes is None:
            self.note = "too few pictures or dimensions for two stages: every search is exact"
            return None
        for segment in segments:
            if segment.reduced is None:
                segment.reduce(axes)
        if is_first and not self._stages_find(segments, axes):
            self.two_stage = False
            for segment in segments:
                segment.reduced = None
            return None
        return axes

    def _stages_find(self, segments: list[Segment], axes: torch.Tensor) -> bool:
        """Two stages that lose what is near are none."""
        view = View(segments, torch.empty(0, dtype=torch.long), axes, self.entries)
        largest = max(segments, key=len)
        step = max(1, len(largest) // ASKED)
        asked = torch.from_numpy(largest.take(np.arange(0, len(largest), step)[:ASKED]))
        exact = self._proven(view, asked, 10)[1]
        quick = self._staged(view, asked, 10)[1]
        pairs = zip(exact.tolist(), quick.tolist(), strict=True)
        recall = sum(len(set(a) & set(b)) for a, b in pairs) / exact.numel()
        self.note = f"two stages find {recall:.1%} of the ten nearest"
        if recall < LEAST_RECALL:
            self.note += f" in {PRINCIPAL} dimensions: every search is exact instead"
        return recall >= LEAST_RECALL

    # -- searching

    def search(self, queries: torch.Tensor, k: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
        """The best rows of each query: scores float32 [Q, k], rows int64 [Q, k], best first.

        queries: float32 [Q, E]; fewer columns where fewer pictures are there. Exact, for vectors as
        they are stored; with `two_stage` the best of RESCORED rows that lie nearest in the
        principal dimensions.
        """
        return self._search(self.view, queries, k)

    def nearest(self, query: torch.Tensor, k: int = 10) -> list[tuple[float, Entry]]:
        """(score, picture) of the best for one query [E], best first: of one view, also where the
        index is read anew meanwhile."""
        view = self.view
        scores, rows = self._search(view, query[None], k)
        found = zip(scores[0].tolist(), rows[0].tolist(), strict=True)
        return [(score, view.entries[row]) for score, row in found]

    def _search(self, view: View, queries, k: int):
        k = min(k, view.alive())
        if k <= 0 or not len(queries):
            empty = torch.empty(len(queries), 0)
            return empty, empty.long()
        if view.axes is not None:
            return self._staged(view, queries, k)
        return self._proven(view, queries, k)

    def _staged(self, view: View, queries, k: int):
        near = self._near(view, queries @ view.axes, max(RESCORED, k), reduced=True)
        return _exact(view.segments, queries, *near, k)

    def _proven(self, view: View, queries, k: int):
        """Look at more and more rows until no other row can be among the best."""
        scores = torch.empty(len(queries), k)
        rows = torch.empty(len(queries), k, dtype=torch.long)
        open_ones = torch.arange(len(queries))
        look = max(FIRST_LOOK, 4 * k)
        while len(open_ones):
            asked = queries[open_ones]
            near, near_rows = self._near(view, asked, look)
            best, best_rows = _exact(view.segments, asked, near, near_rows, k)
            scores[open_ones], rows[open_ones] = best, best_rows
            margin = ERROR[self.dtype] * asked.norm(dim=-1)
            all_seen = near.shape[1] < look
            proven = all_seen | (best[:, -1] >= near[:, -1] + margin)
            open_ones = open_ones[~proven]
            look *= 16
        return scores, rows

    def _near(self, view: View, queries, count: int, reduced: bool = False):
        """About the `count` best rows by products in the half dtype: scores float32, rows."""
        scores = []
        rows = []
        for segment in view.segments:
            dead = view.dead - segment.first
            dead = dead[(dead >= 0) & (dead < len(segment))]
            found, places = segment.near(queries, count, dead, reduced)
            scores.append(found)
            rows.append(places + segment.first)
        scores = torch.cat(scores, 1)
        rows = torch.cat(rows, 1)
        if scores.shape[1] > count:
            scores, best = scores.topk(count, 1)
            rows = rows.gather(1, best)
        return scores, rows


def _merged(segments: list[Segment], dtype: torch.dtype) -> list[Segment]:
    """Small ones put together as in a binary counter: few segments, and each row moves seldom."""
    segments = list(segments)
    while len(segments) > 1 and len(segments[-2]) <= 2 * len(segments[-1]):
        last = segments.pop()
        before = segments.pop()
        segments.append(Segment([*before.exact, *last.exact], before.first, dtype))
    return segments


def _exact(segments: list[Segment], queries, near, rows, k: int):
    """The best k of some rows [Q, n], by the vectors as they are stored. near: their scores so
    far, -inf for those that must not be found."""
    wanted, inverse = torch.unique(rows, return_inverse=True)
    vectors = []
    for segment in segments:
        own = wanted[(wanted >= segment.first) & (wanted < segment.first + len(segment))]
        vectors.append(segment.take((own - segment.first).numpy()))
    vectors = torch.from_numpy(np.concatenate(vectors))
    scores = torch.stack(
        [vectors[own] @ query for own, query in zip(inverse, queries.float(), strict=True)]
    )
    scores[near == -torch.inf] = -torch.inf
    best, order = scores.sort(dim=1, descending=True, stable=True)
    return best[:, :k], rows.gather(1, order[:, :k])


def principal_axes(segments: list[Segment], count: int) -> torch.Tensor | None:
    """[E, P]: the directions of largest variance, from rows at equal distances; None where there
    are too few rows, or too few dimensions, for two stages to pay."""
    total = sum(map(len, segments))
    if total <= 4 * RESCORED or segments[0].exact[0].shape[1] <= count:
        return None
    step = -(-total // PCA_ROWS)
    taken = [segment.take(np.arange(0, len(segment), step)) for segment in segments]
    rows = torch.from_numpy(np.concatenate(taken))
    rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors[:, -count:].contiguous()
