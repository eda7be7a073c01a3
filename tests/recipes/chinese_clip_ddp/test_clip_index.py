"""The index: shards that survive kills, deletions, changed and torn files, exact and two-stage search."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from harness import ROOT, expect, finish, own_modules, start

from common.data.pictures import Place

index, build_index = own_modules("chinese_clip_ddp", "index", "build_index")
WIDTH = 64
MODEL = "a model"


def vector_of(data: bytes, width: int = WIDTH) -> torch.Tensor:
    """Normalised, and the same for the same bytes."""
    seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    found = torch.from_numpy(np.random.default_rng(seed).standard_normal(width)).float()
    return found / found.norm()


def embed(places):
    """A model that looks at bytes; what begins with "bad" is no picture."""
    vectors = [torch.empty(0, WIDTH)]
    problems = {}
    for i, place in enumerate(places):
        data = place.read()
        if data.startswith(b"bad"):
            problems[i] = "torn"
        else:
            vectors.append(vector_of(data)[None])
    return torch.cat(vectors), problems


def write_pictures(folder, count: int, first: int = 0) -> list:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:05d}.bin" for i in range(first, first + count)]
    for i, path in enumerate(paths, first):
        path.write_bytes(b"bad %d" % i if i % 50 == 49 else b"picture %d" % i)
    return [Place(str(path)) for path in paths]


def build(folder, places, **options) -> dict:
    store = index.Store(folder, MODEL, WIDTH)
    return index.build(store, places, embed, **{"shard_rows": 16} | options)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def found_names(opened, query: bytes, k: int = 3) -> list[str]:
    rows = opened.search(vector_of(query)[None], k)[1][0]
    return [os.path.basename(opened.entries[row].place.path) for row in rows]


@pytest.fixture
def made(tmp_path):
    """-> (folder of the index, places) of 120 pictures, of which two are torn."""
    places = write_pictures(tmp_path / "pictures", 120)
    counts = build(tmp_path / "index", places)
    assert counts == {"added": 118, "unusable": 2, "known": 0, "repaired": 0}
    return tmp_path / "index", places


# ---- building ------------------------------------------------------------------------------------


def test_every_picture_finds_itself(made):
    folder, places = made
    opened = index.Index(folder, MODEL)
    assert len(opened) == 118 and len(opened.segments) == 1
    for i in (0, 17, 48, 119):
        assert found_names(opened, b"picture %d" % i)[0] == f"{i:05d}.bin"
    assert [shard["rows"] for shard in opened.store.shards] == [16, 16, 16, 15, 16, 16, 15, 8]


def test_appending_and_what_has_changed(made):
    folder, places = made
    opened = index.Index(folder, MODEL)
    assert build(folder, places)["known"] == 120, "nothing was new"
    more = write_pictures(folder.parent / "pictures", 40, first=120)
    changed = folder.parent / "pictures/00003.bin"
    changed.write_bytes(b"another picture")
    assert build(folder, [*places, *more])["added"] == 40  # one is torn, one is the changed one
    assert len(opened) == 118, "a snapshot"
    assert opened.refresh() and not opened.refresh()
    assert len(opened) == 118 + 39
    assert found_names(opened, b"another picture")[0] == "00003.bin"
    assert "00003.bin" not in found_names(opened, b"picture 3", k=157)[:1]
    everything = found_names(opened, b"picture 3", k=500)
    assert len(everything) == len(set(everything)) == 157, "the old row of a changed file is gone"
    again = index.Index(folder, MODEL)
    assert found_names(again, b"picture 3", k=500) == everything
    changed.write_bytes(b"bad now")
    build(folder, places)
    assert opened.refresh() and len(opened) == 156
    assert "00003.bin" not in found_names(opened, b"another picture", k=500)


def test_deleting_and_bringing_back(made):
    folder, places = made
    opened = index.Index(folder, MODEL)
    unwanted = {places[i].path for i in (5, 6, 7)}
    assert index.delete(index.Store(folder), lambda place: place.path in unwanted) == 3
    assert index.delete(index.Store(folder), lambda place: place.path in unwanted) == 0
    assert opened.refresh() and len(opened) == 115
    assert found_names(opened, b"picture 5", k=1) != ["00005.bin"]
    assert len(found_names(opened, b"picture 5", k=500)) == 115
    assert build(folder, places)["added"] == 0, "a build does not bring back what was deleted"
    assert len(index.Index(folder, MODEL)) == 115
    assert index.restore(index.Store(folder), lambda place: place.path == places[5].path) == 1
    assert opened.refresh() and found_names(opened, b"picture 5", k=1) == ["00005.bin"]
    assert found_names(opened, b"picture 6", k=1) != ["00006.bin"]


def test_nothing_is_found_in_an_empty_index(tmp_path):
    opened = index.Index(tmp_path / "none", MODEL)
    scores, rows = opened.search(torch.randn(2, WIDTH))
    assert len(opened) == 0 and scores.shape == rows.shape == (2, 0)
    (tmp_path / "one.bin").write_bytes(b"bad")
    assert build(tmp_path / "none", [Place(str(tmp_path / "one.bin"))])["unusable"] == 1
    assert opened.refresh() and len(opened) == 0
    assert opened.search(torch.randn(1, WIDTH))[1].shape == (1, 0)


def test_another_model_or_a_foreign_folder_is_refused(made):
    folder, places = made
    with pytest.raises(SystemExit, match="holds vectors of another model"):
        index.Index(folder, "another model")
    with pytest.raises(SystemExit, match="holds vectors of another model"):
        index.Store(folder, "another model", WIDTH)
    for text in ("", "[]", '{"format": 99, "shards": [], "deleted": []}'):
        (folder / index.MANIFEST).write_text(text)
        with pytest.raises(SystemExit, match=r"manifest.json cannot be read; delete [^\n]+$"):
            index.Index(folder, MODEL)


def test_two_writers_do_not_meet(made):
    folder, places = made
    with index.Store(folder).writing(), pytest.raises(SystemExit, match="another process"):
        build(folder, places)


def test_a_stopped_build_goes_on(made, tmp_path):
    folder, places = made
    other = tmp_path / "other"
    seen = []
    counts = build(other, places, begin=seen.append, after=lambda entries: False)
    assert counts["added"] == 16 and seen == [120]
    assert build(other, places)["added"] == 102
    assert contents(other) == contents(folder)


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    places = write_pictures(tmp_path / "pictures", 3)
    store = index.Store(tmp_path / "index")
    with pytest.raises(SystemExit, match="not finite"):
        index.build(store, places, lambda some: (torch.full((3, WIDTH), torch.nan), {}))
    assert len(index.Index(tmp_path / "index")) == 0


# ---- torn and killed -----------------------------------------------------------------------------

DAMAGE = {
    "shorter": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_torn_shard_is_found_and_made_again(made, kind):
    folder, places = made
    whole = contents(folder)
    opened = index.Index(folder, MODEL)
    index.delete(index.Store(folder), lambda place: place.path == places[20].path)
    DAMAGE[kind](folder / "000001.npy")
    with pytest.raises(SystemExit, match="shard 000001 is torn or missing .1 in all.; run"):
        index.Index(folder, MODEL)
    assert build(folder, places) == {"added": 0, "unusable": 0, "known": 120, "repaired": 1}
    after = contents(folder)
    assert {name: after[name] for name in after if name != index.MANIFEST} == {
        name: whole[name] for name in whole if name != index.MANIFEST
    }
    assert len(index.Index(folder, MODEL)) == 117, "what was deleted stays so"
    assert opened.refresh() and len(opened) == 117


@pytest.mark.parametrize("kind", DAMAGE)
def test_torn_entries_make_their_pictures_new(made, kind):
    folder, places = made
    DAMAGE[kind](folder / "000001.jsonl")
    with pytest.raises(SystemExit, match="shard 000001 is torn or missing"):
        index.Index(folder, MODEL)
    counts = build(folder, places)
    assert counts["repaired"] == 1 and counts["added"] == 16
    opened = index.Index(folder, MODEL)
    assert len(opened) == 118
    assert found_names(opened, b"picture 20")[0] == "00020.bin"


BUILDER = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "chinese_clip_ddp"), str(ROOT / "tests/support")]}
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_clip_index as test
from pathlib import Path
root = Path(sys.argv[1])
places = [test.Place(str(path)) for path in sorted((root / "pictures").iterdir())]
print("begin", flush=True)
test.build(root / sys.argv[2], places, shard_rows=2)
"""
KILLS = int(os.environ.get("DANPU_TEST_KILLS", 20))


@pytest.mark.slow
def test_an_index_killed_twenty_times_equals_an_undisturbed_one(tmp_path):
    """Shards of two pictures: most of the time goes into writing, where a kill hurts."""
    places = write_pictures(tmp_path / "pictures", 200)
    began = time.monotonic()
    build(tmp_path / "undisturbed", places, shard_rows=2)
    whole = time.monotonic() - began
    random_time = random.Random(0)
    stages = []
    for _ in range(KILLS):
        process = start([sys.executable, "-c", BUILDER, tmp_path, "killed"])
        assert process.stdout.readline() == "begin\n", process.communicate()
        time.sleep(random_time.uniform(0, 1.6 * whole / KILLS))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        stages.append(len(index.Store(tmp_path / "killed").shards))
    assert stages == sorted(stages)
    assert len(set(stages)) > 3, stages
    expect(finish(start([sys.executable, "-c", BUILDER, tmp_path, "killed"])))
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


# ---- searching -----------------------------------------------------------------------------------


def write_vectors(folder, vectors: torch.Tensor, shard_rows: int, first: int = 0) -> None:
    store = index.Store(folder, MODEL, vectors.shape[1])
    with store.writing():
        for start_row in range(0, len(vectors), shard_rows):
            some = vectors[start_row : start_row + shard_rows]
            numbers = range(first + start_row, first + start_row + len(some))
            entries = [index.Entry(Place(str(number)), (0, 0)) for number in numbers]
            store.append(entries, some)


def spread(count: int, width: int, decay: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Normalised vectors whose dimension d has a standard deviation of d ** -decay."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1) ** -decay
    found = torch.randn(count, width, generator=generator) * scale
    return torch.nn.functional.normalize(found, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("data", ["spread", "crowded"])
def test_exact_search_is_exact_in_every_dtype(tmp_path, monkeypatch, dtype, data):
    """Against all products of the stored vectors in float64; "crowded" ones lie so close together
    that a half dtype cannot tell them apart."""
    vectors = spread(5000, WIDTH)
    if data == "crowded":
        vectors = torch.nn.functional.normalize(vectors[:1] + 0.02 * vectors, dim=-1)
    queries = torch.cat([vectors[:6] + 0.02 * spread(6, WIDTH, seed=1), vectors[7:8]])
    write_vectors(tmp_path / "index", vectors, shard_rows=1111)
    monkeypatch.setattr(index.device, "half_dtype", lambda: dtype)
    opened = index.Index(tmp_path / "index", MODEL)
    assert opened.dtype is dtype and opened.segments[0].matrix.dtype is dtype
    index.delete(opened.store, lambda place: place.path in ("0", "3", "4999"))
    assert opened.refresh()
    scores, rows = opened.search(queries, k=10)
    stored = vectors.half().double()
    stored[[0, 3, 4999]] = torch.nan
    products = (queries.double() @ stored.T).nan_to_num(-9)
    expected = products.topk(10).values
    assert torch.allclose(scores.double(), expected, atol=3e-7)
    assert torch.allclose(products.gather(1, rows), expected, atol=3e-7)
    assert all(len(set(row)) == 10 for row in rows.tolist())


class ExactFaiss:
    """What index.py uses of faiss, in its place where it is not installed."""

    METRIC_INNER_PRODUCT = 0

    class ScalarQuantizer:
        QT_fp16 = 4

    class IndexScalarQuantizer:
        def __init__(self, width, kind, metric):
            assert (kind, metric) == (4, 0)
            self.rows = np.empty((0, width), np.float16)

        def train(self, rows):
            pass

        def add(self, rows):
            self.rows = np.concatenate([self.rows, rows.astype(np.float16)])

        def search(self, queries, k):
            scores = torch.from_numpy(queries @ self.rows.astype(np.float32).T)
            return tuple(found.numpy() for found in scores.topk(k))


@pytest.mark.parametrize("two_stage", [False, True])
def test_faiss_gives_the_same_where_it_is_installed(tmp_path, monkeypatch, two_stage):
    try:
        import faiss
    except ImportError:
        faiss = ExactFaiss
    vectors = spread(3000, 256, decay=0.6)
    queries = spread(20, 256, decay=0.6, seed=1)
    write_vectors(tmp_path / "index", vectors, shard_rows=1000)
    monkeypatch.setattr(index.device, "half_dtype", lambda: None)
    monkeypatch.setattr(index.device, "kind", lambda: "cpu")
    monkeypatch.setitem(sys.modules, "faiss", None)
    plain = index.Index(tmp_path / "index", MODEL, two_stage)
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    used = index.Index(tmp_path / "index", MODEL, two_stage)
    assert plain.segments[0].faiss is None and used.segments[0].matrix is None
    for _ in range(2):
        expected, found = plain.search(queries), used.search(queries)
        assert torch.allclose(found[0], expected[0], atol=1e-6)
        assert torch.equal(found[1], expected[1])
        gone = {str(int(row)) for row in expected[1][:, 0]}
        index.delete(used.store, lambda place, gone=gone: place.path in gone)
        assert used.refresh() and plain.refresh()


def test_a_crowded_index_is_looked_at_more_than_once(tmp_path, monkeypatch):
    """The proof is what makes it exact: without it the same search fails."""
    vectors = spread(5000, WIDTH)
    vectors = torch.nn.functional.normalize(vectors[:1] + 0.02 * vectors, dim=-1)
    write_vectors(tmp_path / "index", vectors, shard_rows=5000)
    monkeypatch.setattr(index.device, "half_dtype", lambda: torch.bfloat16)
    opened = index.Index(tmp_path / "index", MODEL)
    right = opened.search(vectors[:20], k=10)[0]
    monkeypatch.setitem(index.ERROR, torch.bfloat16, -1.0)  # nothing is left to prove
    careless = opened.search(vectors[:20], k=10)[0]
    assert (right - careless).max() > 1e-6 and (right - careless).min() > -1e-6


def test_segments_stay_few_while_an_index_grows(tmp_path):
    """And nothing that was found before is lost."""
    vectors = spread(640, WIDTH)
    store = index.Store(tmp_path / "index", MODEL, WIDTH)
    opened = index.Index(tmp_path / "index", MODEL)
    for i in range(40):
        with store.writing():
            entries = [index.Entry(Place(f"{i} {j}"), (0, 0)) for j in range(16)]
            store.append(entries, vectors[16 * i : 16 * i + 16])
        assert opened.refresh() and len(opened.segments) <= 6
    scores, rows = opened.search(vectors[::50], k=1)
    assert rows[:, 0].tolist() == list(range(0, 640, 50))
    assert torch.allclose(scores, torch.ones(13, 1), atol=1e-3)


def test_two_stages_find_what_the_exact_search_finds(tmp_path):
    """Where the variance falls off as it does in embeddings; the scores are exact ones."""
    vectors = spread(4000, 256, decay=0.8)
    queries = torch.nn.functional.normalize(vectors[:64] + 0.05 * spread(64, 256, 0.8, 1), dim=-1)
    write_vectors(tmp_path / "index", vectors, shard_rows=1500)
    exact = index.Index(tmp_path / "index", MODEL)
    quick = index.Index(tmp_path / "index", MODEL, two_stage=True)
    assert exact.axes is None and quick.axes.shape == (256, 128)
    assert quick.note.startswith("two stages find ") and quick.note.endswith("of the ten nearest")
    right, found = exact.search(queries)[1], quick.search(queries)
    kept = [len(set(a) & set(b)) for a, b in zip(right.tolist(), found[1].tolist(), strict=True)]
    assert sum(kept) / (10 * len(kept)) >= 0.99
    stored = vectors.half().float()
    expected = (queries[:, None] * stored[found[1]]).sum(-1)
    assert torch.allclose(found[0], expected, atol=1e-6)
    index.delete(quick.store, lambda place: place.path == str(int(right[0, 0])))
    assert quick.refresh() and int(right[0, 0]) not in quick.search(queries)[1][0]
    more = spread(600, 256, decay=0.8, seed=5)
    write_vectors(tmp_path / "index", more, shard_rows=600, first=4000)
    assert quick.refresh()
    assert quick.search(more[:9], 1)[0].min() > 0.99, "rows of later shards are found too"


def test_two_stages_that_lose_what_is_near_are_not_used(tmp_path):
    """All dimensions alike: the first half of them says little."""
    vectors = spread(4000, 512)
    write_vectors(tmp_path / "index", vectors, shard_rows=4000)
    opened = index.Index(tmp_path / "index", MODEL, two_stage=True)
    assert opened.axes is None and "every search is exact instead" in opened.note
    exact = index.Index(tmp_path / "index", MODEL)
    queries = spread(9, 512, seed=1)
    assert torch.equal(opened.search(queries)[1], exact.search(queries)[1])


def test_two_stages_of_a_small_index_are_one(tmp_path):
    write_vectors(tmp_path / "index", spread(300, WIDTH), shard_rows=300)
    opened = index.Index(tmp_path / "index", MODEL, two_stage=True)
    assert opened.axes is None and "every search is exact" in opened.note


def test_searching_goes_on_while_the_index_grows(tmp_path):
    places = write_pictures(tmp_path / "pictures", 200)
    build(tmp_path / "index", places[:20])
    opened = index.Index(tmp_path / "index", MODEL)
    failures = []
    ended = threading.Event()

    def search():
        while not ended.is_set():
            opened.refresh()
            if found_names(opened, b"picture 7", k=5)[0] != "00007.bin":
                failures.append(len(opened))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    build(tmp_path / "index", places, shard_rows=4)
    ended.set()
    for thread in threads:
        thread.join()
    assert not failures
    opened.refresh()
    assert len(opened) == 196 and len(opened.segments) <= 6


@pytest.mark.parametrize("two_stage", [False, True])
def test_a_search_in_the_middle_of_taking_up_a_shard_sees_what_was_there(
    tmp_path, monkeypatch, two_stage
):
    """With more asked for than was there, when rows have numbers already and no vectors yet; two
    stages begin with the second part."""
    folder = tmp_path / "index"
    sizes = (500, 900) if two_stage else (5, 30)
    write_vectors(folder, spread(sizes[0], 256, decay=1.0), 2048)
    opened = index.Index(folder, MODEL, two_stage)
    write_vectors(folder, spread(sizes[1], 256, decay=1.0, seed=1), 2048, first=sizes[0])
    assert opened.axes is None
    inside = []
    names = ("_merged", "principal_axes") if two_stage else ("_merged",)
    for name in names:
        call = getattr(index, name)

        def between(*args, call=call):
            found = call(*args)
            scores, rows = opened.search(torch.ones(1, 256), k=sum(sizes))
            inside.append(tuple(rows.shape))
            assert len(opened) == rows.shape[1] and rows.max() < sizes[0]
            assert len(opened.nearest(torch.ones(256), k=sum(sizes))) == sizes[0]
            return found

        monkeypatch.setattr(index, name, between)
    assert opened.refresh() and inside == [(1, sizes[0])] * len(names)
    assert len(opened) == sum(sizes) and (opened.axes is not None) == two_stage


def test_an_index_may_be_moved(made):
    folder, places = made
    moved = shutil.move(folder, folder.with_name("moved"))
    assert found_names(index.Index(moved, MODEL), b"picture 8")[0] == "00008.bin"


# ---- the command ----------------------------------------------------------------------------------


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["build_index.py", *map(str, words)])
    return build_index.parse()


def test_flags_that_change_nothing_are_named(made, monkeypatch, capsys):
    folder = ["--index", made[0]]
    for words, said in (
        (["--delete", "x", "--shard_rows", 8], "--shard_rows: no effect; nothing is added"),
        (["--delete", "x", "--two_stage", "true"], "--two_stage: no effect; there is no --query"),
        (["--restore", "x", "--model", "m"], "--model: no effect"),
    ):
        parsed(monkeypatch, *folder, *words)
        assert said in capsys.readouterr().out
    parsed(monkeypatch, *folder, "--add", "x", "--shard_rows", 8, "--model", "m")
    parsed(monkeypatch, *folder, "--query", "x", "--two_stage", "true", "--model", "m")
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--delete", "--restore", "--query"])
def test_an_index_that_is_not_there_is_one_line_and_stays_away(tmp_path, monkeypatch, flag):
    with pytest.raises(SystemExit, match="no index there; --add makes one"):
        parsed(monkeypatch, "--index", tmp_path / "typo", flag, "x")
    assert not (tmp_path / "typo").exists()
