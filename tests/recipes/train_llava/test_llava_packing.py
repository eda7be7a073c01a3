"""Batches of train_llava against transformers' own forward on single rows: packed, shared pictures,
kept features, cut tower, head only at labels."""

import copy
import fcntl
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import own_modules
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_llava_build import LLMS, make_llm, make_tower
from transformers import LlavaForConditionalGeneration, Qwen3Config

from common.fast import attention_cpu, losses, norms, rotary, shared_start

build_model, llava, batches, features, sight, parts, last_layer = own_modules(
    "train_llava", "build_model", "model", "batches", "features", "sight", "parts", "last_layer"
)

IMAGE = 7  # tokens per picture in tests of the layout alone


def picture(seed: int, size=(40, 31)) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))


PICTURES = [picture(seed) for seed in range(3)]


class Made:
    """A small LLaVA and rows for it."""

    def __init__(self, folder, llm="qwen3", tied=True, tower="clip", **more):
        own_llm = make_llm(folder, llm, tied)
        own_tower, self.count = make_tower(folder, tower)
        path = build_model.build(own_llm, own_tower, folder / f"{llm}-{tied}-{tower}", **more)
        self.path = str(path)
        self.config, self.processor = llava.check_model(self.path)
        self.image = self.config.image_token_id
        self.source = features.PictureSource(PICTURES, self.processor.image_processor)

    def open(self, **settings):
        return llava.open_model(self.path, dtype=torch.float32, **settings).eval()

    def row(self, *parts, learned=2) -> dict:
        """parts: ints are numbers of pictures, lists are token ids; the last `learned` are labels."""
        ids = []
        shown = []
        for part in parts:
            if isinstance(part, int):
                ids += [self.image] * self.count
                shown.append(part)
            else:
                ids += part
        labels = [-100] * (len(ids) - learned) + ids[-learned:]
        return {"input_ids": ids, "labels": labels, "pictures": shown}

    def rows(self) -> list[dict]:
        """Three questions on one picture, two pictures, none, one picture twice behind other words."""
        return [
            self.row([5, 6], 0, [8, 9, 10, 11]),
            self.row([5, 6], 0, [8, 12, 10, 13, 14], learned=3),
            self.row([5, 6], 0, [15, 16], 1, [17, 9]),
            self.row([9, 6, 5, 11, 12, 8, 10]),
            self.row([5, 6], 1, [8, 9, 10, 11]),
            self.row([7], 2, 0, [9, 10], 2, [8, 14]),
        ]


def with_stock_rotary(model) -> None:
    """Undo what rotary.use_fast_rotary did in this process."""
    for owner in {sys.modules[type(module).__module__] for module in model.modules()}:
        function = getattr(owner, rotary.NAME, None)
        if hasattr(function, "__wrapped__"):
            setattr(owner, rotary.NAME, function.__wrapped__)


def by_transformers(made: Made, rows: list[dict]) -> tuple[float, dict]:
    """Loss sum / number of labels and all gradients, one row after another, the stock way."""
    model = made.open(attn_implementation="eager")
    with_stock_rotary(model)
    count = sum(label != -100 for row in rows for label in row["labels"])
    total = 0.0
    for row in rows:
        shown = [PICTURES[number] for number in row["pictures"]]
        pixels = {}
        if shown:
            pixels = made.processor.image_processor(images=shown, return_tensors="pt")
        ids = torch.tensor(row["input_ids"])[None]
        logits = model(input_ids=ids, **pixels).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def ours(made: Made, rows, trains: str = "full", keep=False, folder=None, packed=True, share=True):
    """The same with the recipe's batches; trains: a --train_type."""
    model = made.open(attn_implementation=shared_start.register())
    parts.choose_trained(model, trains)
    sight.for_training(model, sight.Normaliser(made.processor.image_processor))
    losses.use_chunked_loss(model)
    norms.use_fast_norms(model)
    rotary.use_fast_rotary(model)
    assert last_layer.only_at_labels(model)
    source = features.PictureSource(PICTURES, made.processor.image_processor)
    if keep:
        assert features.keep_features(source, model, torch.float32, torch.device("cpu"), 1.0)
    if packed:
        shared = made.image if share else None
        data = batches.PictureWindows(rows, 400, 40, 0, shared, made.count)
        collate = batches.LlavaCollator(source, made.image, made.count)
    else:
        data = batches.PictureRows(rows)
        collate = batches.PaddedLlavaCollator(source, 0)
    count = sum(label != -100 for row in rows for label in row["labels"])
    batch = collate([data[i] for i in range(len(data))])
    batch = {k: v for k, v in batch.items() if k not in ("row_ids", "faults")}
    output = model(**batch, num_items_in_batch=torch.tensor(count))
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(output.loss.detach()), gradients, batch, model


def assert_same(found: tuple[float, dict], wanted: tuple[float, dict]):
    assert abs(found[0] - wanted[0]) < 1e-6 * max(1, abs(wanted[0]))
    for name, gradient in found[1].items():
        expected = wanted[1][name]
        assert (gradient - expected).abs().max() < 1e-5 * max(1, expected.abs().max()), name


@pytest.fixture(
    scope="module",
    params=product(("qwen3", "qwen2", "llama"), (True, False), ("clip", "siglip")),
    ids=lambda one: f"{one[0]}-{'tied' if one[1] else 'untied'}-{one[2]}",
)
def made(request, tmp_path_factory):
    return Made(tmp_path_factory.mktemp("llava"), *request.param)


def test_every_batch_equals_single_rows(made, tmp_path, monkeypatch):
    monkeypatch.setenv("DANPU_CACHE", str(tmp_path))
    rows = made.rows()
    wanted = by_transformers(made, rows)
    shared = ours(made, rows)
    assert_same(shared, wanted)
    # no label depends on what this leaves out
    left_out = wanted[1].keys() - shared[1].keys()
    assert all("vision_tower" in name for name in left_out)
    assert all(float(wanted[1][name].abs().max()) == 0 for name in left_out)
    plain = ours(made, rows, share=False)
    assert_same(plain, wanted)
    saved = plain[2]["input_ids"].numel() - shared[2]["input_ids"].numel()
    assert saved >= 2 * made.count and len(shared[2]["pictures"]) == len(plain[2]["pictures"]) - 2
    assert_same(ours(made, rows, packed=False), wanted)
    for keep in (False, True):
        frozen = ours(made, rows, "freeze_vision", keep)
        assert_same(frozen, wanted)
        assert not any("vision_tower" in name for name in frozen[1])
        kept = frozen[2]["pictures"].dtype == torch.float32
        assert kept == keep
    only = ours(made, rows, "projector", keep=True)
    assert_same(only, wanted)
    assert all("multi_modal_projector" in name for name in only[1]) and len(only[1]) == 4


@pytest.mark.parametrize("recompute", [False, True])
def test_the_last_layer_is_computed_where_labels_are(tmp_path, monkeypatch, recompute):
    """With an adapter in it, with checkpointing, and not in a call without labels."""
    monkeypatch.setattr(attention_cpu, "STEP", 2)  # these rows are short
    asked = []
    attend = shared_start._attend
    monkeypatch.setattr(
        shared_start, "_attend", lambda q, *rest: asked.append(q.shape[1]) or attend(q, *rest)
    )
    one = Made(tmp_path)
    data = batches.PictureWindows(one.rows(), 400, 40, 0, one.image, one.count)
    collate = batches.LlavaCollator(one.source, one.image, one.count)
    batch = collate([data[i] for i in range(len(data))])
    batch = {k: v for k, v in batch.items() if k not in ("row_ids", "faults")}

    def step(only: bool) -> tuple[dict, set, torch.Tensor]:
        """-> gradients, positions that the last layer saw, an answer."""
        model = with_adapter(one, recompute)
        assert not only or last_layer.only_at_labels(model)
        seen = set()
        asked.clear()
        last = losses.without_adapter(model).model.language_model.layers[-1]
        last.mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[1]))
        model(**batch).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        positions = set(seen)
        assert (min(asked) < max(asked) // 2) == only
        prompt = torch.tensor([[9, 6, 5, 11, 12]])
        said = model.eval().generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
        return gradients, positions, said

    wanted, every, plain = step(only=False)
    gradients, chosen, said = step(only=True)
    assert every == {batch["input_ids"].numel()}
    assert chosen == {int((batch["labels"] != -100).sum())}
    assert gradients.keys() == wanted.keys() and torch.equal(said, plain)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).abs().max() < 1e-6, name


def test_attention_that_is_asked_in_few_columns():
    """Documents with many, few, no and all of their columns wanted, long and short ones, with a
    shared beginning and without: those columns, and their gradients, as if all were computed."""
    torch.manual_seed(0)
    edges = torch.tensor([0, 200, 230, 240, 400, 404], dtype=torch.int32)
    for kv_index in (
        None,
        torch.cat([torch.arange(200), torch.arange(100), torch.arange(200, 404)]),
    ):
        key_edges = edges if kv_index is None else edges + 100 * (torch.arange(6) > 1)
        wanted = torch.tensor([150, 170, 231, 232, 233, 400, 401])
        asked = shared_start.asked_columns(wanted, edges)
        assert asked.cu_seqlens.diff().tolist() == [64, 0, 10, 0, 4]
        inputs = [torch.randn(1, heads, 404, 16, requires_grad=True) for heads in (4, 2, 2)]
        at = {"cu_seq_lens_q": edges, "max_length_q": 200}
        at |= {"cu_seq_lens_k": key_edges.to(torch.int32), "max_length_k": 200}
        module = SimpleNamespace(is_causal=True)
        results = []
        for more in ({}, {"asked": asked}):
            said, _ = shared_start.forward(module, *inputs, None, kv_index=kv_index, **at, **more)
            said[0, wanted].pow(2).sum().backward()
            results.append([said[0, wanted].detach(), *(x.grad for x in inputs)])
            for x in inputs:
                x.grad = None
        for expected, found in zip(*results, strict=True):
            assert (found - expected).abs().max() < 1e-5
    assert shared_start.asked_columns(torch.tensor([5, 390]), edges) is None  # nearly all
    assert shared_start.asked_columns(torch.tensor([], dtype=torch.int64), edges) is None


def with_adapter(one: Made, recompute: bool):
    torch.manual_seed(0)
    model = one.open(attn_implementation=shared_start.register())
    parts.choose_trained(model, "lora")
    sight.for_training(model, sight.Normaliser(one.processor.image_processor))
    losses.use_chunked_loss(model)
    flags = SimpleNamespace(lora_r=2, lora_alpha=4, lora_dropout=0.0, target_modules="all-linear")
    flags.lora_vision = False
    model = parts.add_lora(model, flags, recompute)
    if recompute:
        model.gradient_checkpointing_enable()
    return model.train()


@pytest.mark.parametrize("tower, layers", [("clip", [-2, -3]), ("siglip", -3), ("dinov2", -2)])
def test_other_layers_of_the_tower(tmp_path, monkeypatch, tower, layers):
    monkeypatch.setenv("DANPU_CACHE", str(tmp_path / "cache"))
    one = Made(tmp_path, tower=tower, vision_feature_layer=layers)
    rows = one.rows()
    wanted = by_transformers(one, rows)
    assert_same(ours(one, rows, "freeze_vision"), wanted)
    assert_same(ours(one, rows, "freeze_vision", keep=True), wanted)
    assert_same(ours(one, rows), wanted)


def test_a_cut_tower_is_whole_again_where_it_is_saved(tmp_path):
    one = Made(tmp_path)
    model = one.open()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sight.cut_tower(model) == 1
    assert model.config.vision_config.num_hidden_layers == 2
    assert len(model.state_dict()) < len(before)
    with sight.whole_tower(model):
        assert model.config.vision_config.num_hidden_layers == 3
        assert model.config.vision_feature_layer == -2
        model.save_pretrained(tmp_path / "saved")
    assert len(model.model.vision_tower.encoder.layers) == 2
    again = llava.open_model(str(tmp_path / "saved"), dtype=torch.float32).state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_batch_without_pictures_gives_gradients_of_zero(tmp_path):
    """Else a rank that has none would wait for the others for ever."""
    one = Made(tmp_path)
    rows = [one.row([9, 6, 5, 11, 12, 8, 10]), one.row([9, 6, 11, 12])]
    wanted = by_transformers(one, rows)
    loss, gradients, batch, model = ours(one, rows)
    assert len(batch["pictures"]) == 0 and abs(loss - wanted[0]) < 1e-6
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if "vision_tower" in name or "projector" in name:
            assert parameter.grad is None or not parameter.grad.any(), name


def test_a_torn_picture_teaches_nothing(tmp_path):
    one = Made(tmp_path)
    rows = [one.row([5], 0, [8, 9, 10]), one.row([5], 1, [8, 9, 10]), one.row([5], 0, [8, 9, 11])]
    torn = tmp_path / "torn.png"
    PICTURES[0].save(torn)
    torn.write_bytes(torn.read_bytes()[:300])
    source = features.PictureSource([torn, PICTURES[1]], one.processor.image_processor)
    data = batches.PictureWindows(rows, 400, 40, 0, one.image, one.count)
    collate = batches.LlavaCollator(source, one.image, one.count)
    batch = collate([data[i] for i in range(len(data))])
    ((reason, where),) = batch["faults"]
    assert reason == "torn" and "torn.png" in where
    assert int((batch["labels"] != -100).sum()) == 2  # of the row with the other picture
    assert len(batch["pictures"]) == 2 and not batch["pictures"].float().sum((1, 2, 3)).all()


def test_pixels_are_the_processors(made):
    """uint8 that the device normalises = what the processor gives."""
    normaliser = sight.Normaliser(made.processor.image_processor)
    wanted = made.processor.image_processor(images=PICTURES, return_tensors="pt")["pixel_values"]
    pixels, faults = made.source([0, 1, 2])
    assert pixels.dtype == torch.uint8 and not faults
    assert (normaliser(pixels, torch.float32) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", [*parts.TRAINED, "lora with the tower"])
def test_a_base_stored_in_half_precision_trains(tmp_path, kind, half):
    """What trains gets float32 masters, the rest stays bf16: they meet in every kind of run."""
    one = Made(tmp_path, dtype=torch.bfloat16)
    in_tower = kind == "lora with the tower"
    kind = kind.partition(" ")[0]
    model = llava.open_model(one.path, dtype="auto", attn_implementation=shared_start.register())
    parts.choose_trained(model, kind, in_tower)
    sight.for_training(model, sight.Normaliser(one.processor.image_processor))
    losses.use_chunked_loss(model)
    if kind == "lora":
        flags = SimpleNamespace(lora_r=4, lora_alpha=None, lora_dropout=0.0, lora_vision=in_tower)
        flags.target_modules = "all-linear"
        model = parts.add_lora(model, flags, recompute=False)
    parts.as_masters(model)
    data = batches.PictureWindows(one.rows(), 400, 40, 0, one.image, one.count)
    collate = batches.LlavaCollator(one.source, one.image, one.count)
    batch = collate([data[i] for i in range(len(data))])
    batch = {k: v for k, v in batch.items() if k not in ("row_ids", "faults")}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        loss = model(**batch, num_items_in_batch=torch.tensor(10)).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and parameter.grad is not None, name


# ---- kept features --------------------------------------------------------------------------------


def kept_source(made, folder, monkeypatch, places=PICTURES, most_gb=1.0, **more):
    monkeypatch.setenv("DANPU_CACHE", str(folder))
    model = made.open()
    parts.choose_trained(model, "projector")
    source = features.PictureSource(places, made.processor.image_processor)
    device = torch.device("cpu")
    took = features.keep_features(source, model, torch.float32, device, most_gb, **more)
    return source, took, model


def test_features_are_kept_for_later_runs_and_new_pictures_are_added(tmp_path, monkeypatch):
    one = Made(tmp_path)
    files = []
    for number, image in enumerate(PICTURES):
        files.append(tmp_path / f"{number}.png")
        image.save(files[-1])
    first, _, model = kept_source(one, tmp_path / "cache", monkeypatch, files[:2])
    values, _ = first([1, 0])
    computed = []
    stock = features.run_tower
    monkeypatch.setattr(features, "run_tower", lambda *a: computed.append(len(a[1])) or stock(*a))
    same = tmp_path / "copy.png"
    same.write_bytes(files[0].read_bytes())
    second, _, _ = kept_source(one, tmp_path / "cache", monkeypatch, [*files, same], workers=3)
    assert computed == [1]  # the third picture; a copy of the first is known by its bytes
    again, _ = second([1, 0, 3, 2])
    assert torch.equal(again[:2], values) and torch.equal(again[2], values[1])
    normaliser = sight.Normaliser(one.processor.image_processor)
    pixels = features.pixels_of(files[2], one.processor.image_processor)[None]
    assert torch.equal(again[3], sight.features_of(model, pixels, normaliser)[0])
    # other weights are another tower
    with torch.no_grad():
        model.model.vision_tower.embeddings.class_embedding += 1
    other = features.PictureSource(files, one.processor.image_processor)
    features.keep_features(other, model, torch.float32, torch.device("cpu"), 1.0)
    assert computed == [1, 3] and not torch.equal(other([0])[0], second([0])[0])


def test_more_than_the_room_for_it_is_not_kept(tmp_path, monkeypatch, capsys):
    one = Made(tmp_path)
    source, took, _ = kept_source(one, tmp_path / "cache", monkeypatch, most_gb=1e-9)
    assert not took and source([0])[0].dtype == torch.uint8
    assert "--feature_cache_gb" in capsys.readouterr().out


def test_torn_pictures_are_told_with_kept_features_too(tmp_path, monkeypatch):
    one = Made(tmp_path)
    torn = tmp_path / "torn.png"
    PICTURES[0].save(torn)
    torn.write_bytes(torn.read_bytes()[:300])
    gone = tmp_path / "gone.png"
    for _ in range(2):  # computed, and from an earlier run
        source, _, _ = kept_source(
            one, tmp_path / "cache", monkeypatch, [torn, a_file(tmp_path), gone]
        )
        found, faults = source([2, 1, 0])
        assert found.dtype == torch.float32 and found[1].any() and not found[0].any()
        assert faults[0][0] == "missing" and faults[2][0] == "torn"


def a_file(folder):
    file = folder / "fine.png"
    PICTURES[1].save(file)
    return file


def test_features_that_do_not_fit_the_disk_are_not_kept(tmp_path, monkeypatch, capsys):
    one = Made(tmp_path)
    disk = SimpleNamespace(free=1000)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: disk)
    source, took, _ = kept_source(one, tmp_path / "cache", monkeypatch)
    assert not took and source([0])[0].dtype == torch.uint8
    assert "do not fit there: the tower runs in every step" in capsys.readouterr().out


def test_a_segment_has_its_room_before_it_is_written(tmp_path):
    """Else a disk that fills up kills the run with SIGBUS."""
    with features.Segment(tmp_path, ["a", "b"], (300, 1000), torch.bfloat16) as segment:
        held = segment.part.stat().st_blocks * 512
        assert held >= 2 * 300 * 1000 * 2
        segment.add(["a"], torch.ones(1, 300, 1000))
    assert features.digests_in(tmp_path) == {"a": (segment.file.stem, 0)}


def test_no_room_for_a_segment_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, "posix_fallocate", full)
    with (
        pytest.raises(OSError, match="No space left"),
        features.Segment(tmp_path, ["a"], (3, 10), torch.float32),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_what_killed_runs_left_is_taken_away_and_others_wait(tmp_path, monkeypatch):
    one = Made(tmp_path)
    cache = tmp_path / "cache"
    source, _, model = kept_source(one, cache, monkeypatch, PICTURES[:1])
    (folder,) = (path for path in (cache / "pictures").iterdir() if path.is_dir())
    left = folder / f"abc.{features.HOST}.77.part"
    of_others = folder / "abc.elsewhere.77.part"
    for file in (left, of_others):
        file.write_bytes(b"half")
    monkeypatch.setattr(features, "SILENT_WAIT", 0.05)
    said = []
    with open(f"{folder}.{features.HOST}.lock", "w") as other_run:
        fcntl.flock(other_run, fcntl.LOCK_EX)

        def ends(words: str) -> None:
            said.append(words)
            if "waiting" in words:
                fcntl.flock(other_run, fcntl.LOCK_UN)

        monkeypatch.setattr(features.cli, "say", ends)
        kept_source(one, cache, monkeypatch, PICTURES)
    assert any("waiting for another run" in words for words in said)
    assert not left.exists() and of_others.exists()


# ---- layout ---------------------------------------------------------------------------------------


def random_rows(seed: int) -> list[dict]:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(generator.integers(1, 30)):
        ids = list(generator.integers(10, 13, generator.integers(0, 3)))
        shown = []
        for _ in range(generator.integers(0, 3)):
            shown.append(int(generator.integers(0, 3)))
            ids += [1] * IMAGE + list(generator.integers(10, 13, generator.integers(0, 3)))
        answer = list(generator.integers(10, 13, generator.integers(1, 6)))
        first = len(ids) + 1
        ids = [9, *ids, *answer]
        labels = [-100] * first + ids[first:]
        rows.append({"input_ids": ids, "labels": labels, "pictures": shown})
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(30, 90), st.integers(2, 6))
def test_any_rows_are_laid_out_whole(seed, window, most):
    """Every row once, windows within both limits, every picture before its tokens, and of each row
    the tokens, positions and labels that it has alone, seen through its own keys."""
    rows = random_rows(seed)
    data = batches.PictureWindows(rows, window, most, seed, 1, IMAGE)
    seen = []
    for index in range(len(data)):
        items = data[index]
        seen += [row["row_id"] for row in items]
        batch = batches.LlavaCollator(numbers, 1, IMAGE)([items])
        assert batch["input_ids"].numel() == data.filled[index] <= window
        assert (batch["input_ids"] == 1).sum() == IMAGE * len(batch["pictures"])
        assert len(batch["pictures"]) <= most
        check_rows(batch, items)
    assert sorted(seen) == list(range(len(rows)))


def numbers(asked):
    """A source whose pictures are their numbers."""
    return torch.tensor(asked, dtype=torch.float32).reshape(-1, 1, 1), {}


def check_rows(batch, items):
    keys = batch.get("kv_index", torch.arange(batch["input_ids"].numel()))
    ids, labels, positions = (batch[k][0] for k in ("input_ids", "labels", "position_ids"))
    shown = batch["pictures"].flatten()
    blocks = (ids == 1).long().cumsum(0)
    for place, row in enumerate(items):
        of_keys = keys[batch["cu_seq_lens_k"][place] : batch["cu_seq_lens_k"][place + 1]]
        assert ids[of_keys].tolist() == row["input_ids"]
        assert positions[of_keys].tolist() == list(range(len(row["input_ids"])))
        looked_at = blocks[of_keys[ids[of_keys] == 1]][IMAGE - 1 :: IMAGE]
        assert [int(shown[int(n) // IMAGE - 1]) for n in looked_at] == row["pictures"]
        a, b = batch["cu_seq_lens_q"][place], batch["cu_seq_lens_q"][place + 1]
        own = labels[a:b].tolist()
        assert own == row["labels"][len(row["labels"]) - len(own) :]  # and nothing before it
        assert all(label == -100 for label in row["labels"][: len(row["labels"]) - len(own)])


def test_sharing_saves_what_it_says():
    """Four questions of 10 tokens behind 300 tokens of a picture."""
    rows = []
    for number in range(4):
        ids = [9] + [1] * 300 + [20 + number] * 8 + [30, 31]
        rows.append({"input_ids": ids, "labels": [-100] * 309 + [30, 31], "pictures": [5]})
    data = batches.PictureWindows(rows, 2000, 8, 0, 1, 300)
    assert data.filled == [311 + 3 * 10]
    assert "4 of 4 rows share a picture, 903 of 1,244 tokens" in data.describe()
    deep = copy.deepcopy(rows)
    deep[2]["pictures"] = [6]  # another picture with equal words
    assert batches.PictureWindows(deep, 2000, 8, 0, 1, 300).filled == [311 + 2 * 10 + 311]


@pytest.mark.parametrize("settings, why", [
    ({}, ""),
    ({"attention_dropout": 0.1}, "drops out 0.1"),
    ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "slides over 32"),
    ({"use_sliding_window": True, "sliding_window": 400, "max_window_layers": 1}, ""),
    ({"use_sliding_window": False, "sliding_window": 32}, ""),
])  # fmt: skip
def test_attention_that_cannot_share_is_known_by_its_config(tmp_path, settings, why):
    """And where it can, it does: the forward refuses what it cannot compute."""
    one = Made(tmp_path)
    text = one.config.text_config.to_dict()
    for made_anew in ("layer_types", "model_type"):
        text.pop(made_anew)
    told = batches.why_not_shared(Qwen3Config(**text | settings), 200)
    assert (why in told) if why else not told
    one.config.text_config = Qwen3Config(**text | settings)
    model = LlavaForConditionalGeneration._from_config(
        one.config, attn_implementation=shared_start.register()
    ).train()
    sight.for_training(model, sight.Normaliser(one.processor.image_processor))
    losses.use_chunked_loss(model)
    shared = None if told else one.image
    data = batches.PictureWindows(one.rows(), 200, 40, 0, shared, one.count)
    collate = batches.LlavaCollator(one.source, one.image, one.count)
    for i in range(len(data)):
        batch = collate([data[i]])
        assert "kv_index" not in batch or not told
        batch = {k: v for k, v in batch.items() if k not in ("row_ids", "faults")}
        assert torch.isfinite(model(**batch, use_cache=False).loss)


def test_the_kinds_of_models_are_those_of_the_recipe():
    assert set(LLMS) == {"qwen3", "qwen2", "llama"}
