"""Contrastive losses: gradients of 2 and 4 ranks against one process with the whole batch, what each way of sharing
negatives really gives, GradCache, a teacher, equal captions."""

import math
import sys
from functools import partial

import contrastive_ranks as one_rank
import pytest
import torch
from contrastive_ranks import (
    PAIRS,
    Model,
    batch,
    build,
    by_hand,
    chunks_of,
    forward_of,
    gradients,
    teacher_of,
)
from harness import ROOT, expect, finish, own_modules, start
from torch.nn import functional as F

contrastive, towers = own_modules("chinese_clip_ddp", "contrastive", "towers")
one_rank.contrastive = contrastive
Embeddings, Teacher = contrastive.Embeddings, contrastive.Teacher


@pytest.fixture(scope="module")
def whole():
    """(kind, masked, dtype) -> loss and gradients of one process with all pairs."""
    found = {}
    for kind in contrastive.KINDS:
        for masked in (False, True):
            for dtype in (torch.float32, torch.float64):
                model, (images, texts, ids) = build(dtype=dtype), batch(dtype)
                loss = by_hand(model(images, texts), ids if masked else None, kind)
                loss.backward()
                found[kind, masked, dtype] = loss.item(), gradients(model)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """(world, what each rank found)."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    script = ROOT / "tests/support/contrastive_ranks.py"
    words = [sys.executable, script, ROOT / "chinese_clip_ddp"]
    processes = [start([*words, r, world, folder / "store", folder / "out"]) for r in range(world)]
    for process in processes:
        expect(finish(process))
    return world, [torch.load(folder / f"out.{r}", weights_only=True) for r in range(world)]


def flattened(found, names):
    return torch.cat([found[name].flatten() for name in names])


def compared(found, expected, names):
    """-> (ratio of the norms, cosine, largest difference) of two gradients."""
    one, other = flattened(found, names).double(), flattened(expected, names).double()
    cosine = torch.cosine_similarity(one, other, 0).item() if one.norm() > 0 else 0.0
    return (one.norm() / other.norm()).item(), cosine, (one - other).abs().max().item()


TOWERS = [name for name, _ in Model().named_parameters() if "." in name]


BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
EXACT = [("softmax", "exact"), ("softmax", "gather_nn"), ("sigmoid", "exact")]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind, mode", EXACT)
def test_gradients_of_ranks_are_those_of_the_whole_batch(ranks, whole, kind, mode, masked, dtype):
    """Towers, projections, scale and bias, on every rank."""
    bound = BOUNDS[dtype]
    loss, expected = whole[kind, masked, dtype]
    for found in ranks[1]:
        mean, grads = found["modes"][kind, mode, masked, str(dtype)]
        assert abs(mean - loss) < bound * abs(loss)
        ratio, cosine, _ = compared(grads, expected, TOWERS)
        assert abs(ratio - 1) < bound and abs(cosine - 1) < bound
        for name in ("scale", "bias") if kind == "sigmoid" else ("scale",):
            assert abs(grads[name] - expected[name]) < bound * expected[name].abs()


@pytest.mark.parametrize("masked", [False, True])
def test_other_modes_have_the_factors_that_are_documented(ranks, whole, masked):
    """The 1/W complaint, row by row: `custom` gives every tower 1/W of its gradient."""
    world, every = ranks
    loss, expected = whole["softmax", masked, torch.float64]
    modes = {m: every[0]["modes"]["softmax", m, masked, "torch.float64"] for m in contrastive.MODES}
    grads = {mode: found for mode, (_, found) in modes.items()}
    for mode in ("custom", "gather"):
        assert abs(modes[mode][0] - loss) < 1e-12, "they show the loss of the whole batch"
        assert torch.allclose(grads[mode]["scale"], expected["scale"], rtol=1e-12)
    ratio, cosine, _ = compared(grads["custom"], expected, TOWERS)
    assert abs(ratio - 1 / world) < 1e-12 and abs(cosine - 1) < 1e-12
    assert compared(grads["gather"], expected, TOWERS)[0] == 0
    ratio, cosine, _ = compared(grads["base"], expected, TOWERS)
    assert modes["base"][0] < loss - 0.5 and cosine < 0.995
    assert set(contrastive.RIGHT) == {"exact", "gather_nn"}


def test_one_process_is_the_loss_by_hand(whole):
    for kind, mode, masked in one_rank.cases():
        if mode == "gather":
            continue
        model, (images, texts, ids) = build(), batch()
        found = model(images, texts)
        loss = contrastive.contrastive_loss(found, ids if masked else None, kind, mode)
        loss.backward()
        expected, grads = whole[kind, masked, torch.float64]
        assert abs(loss.item() - expected) < 1e-13
        names = [*TOWERS, "scale", *(["bias"] if kind == "sigmoid" else [])]
        assert compared(gradients(model), grads, names)[2] < 1e-14
        plain = contrastive.plain_loss(model(images, texts), ids if masked else None, kind)
        assert abs(plain.item() - expected) < 1e-13


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_change_nothing(monkeypatch, whole, masked):
    """Logits are computed in blocks of a few rows, also where they do not divide the batch."""
    for block in (1, 5 * PAIRS, 7 * PAIRS + 3):
        monkeypatch.setattr(contrastive, "BLOCK", block)
        model, (images, texts, ids) = build(), batch()
        loss = contrastive.contrastive_loss(model(images, texts), ids if masked else None)
        loss.backward()
        expected, grads = whole["softmax", masked, torch.float64]
        assert abs(loss.item() - expected) < 1e-13
        assert compared(gradients(model), grads, [*TOWERS, "scale"])[2] < 1e-14


def test_no_b_by_b_logits_are_ever_there(monkeypatch):
    """The largest tensor of forward and backward is a block, not the batch squared."""
    from live_bytes import LiveBytes

    monkeypatch.setattr(contrastive, "BLOCK", 64 * 2048)
    x = F.normalize(torch.randn(2048, 16), dim=-1).requires_grad_()
    y = F.normalize(torch.randn(2048, 16), dim=-1).requires_grad_()
    peaks = {}
    for name, loss in (("blocks", contrastive.contrastive_loss), ("whole", contrastive.plain_loss)):
        with LiveBytes() as live:
            loss(Embeddings(x, y, torch.tensor(10.0))).backward()
        peaks[name] = live.peak
    assert peaks["whole"] > 3 * 4 * 2048**2 > 8 * peaks["blocks"]


# ---- against transformers ----------------------------------------------------------------------------------------

TEXT = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16)  # fmt: skip
VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16,
              patch_size=8)  # fmt: skip


@pytest.mark.parametrize("name, kind", [("ChineseCLIP", "softmax"), ("CLIP", "softmax"), ("Siglip", "sigmoid")])  # fmt: skip
def test_loss_is_that_of_transformers(name, kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=VISION)
    model = getattr(transformers, f"{name}Model")(config).eval()
    towers.settle_scale(model, kind, is_fresh=False)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    ids, pixels = torch.randint(3, 50, (6, 9)), torch.randn(6, 3, 16, 16)
    expected = model(input_ids=ids, pixel_values=pixels, return_loss=True)
    expected.loss.backward()
    slopes = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = towers.for_training(model)(input_ids=ids, pixel_values=pixels)
    found = Embeddings(found["image_embeds"], found["text_embeds"], found["scale"], found["bias"])
    loss = contrastive.contrastive_loss(found, kind=kind)
    loss.backward()
    assert abs(loss.item() - expected.loss.item()) < 1e-6
    for name, parameter in model.named_parameters():
        if name in slopes:
            difference = (parameter.grad.reshape(slopes[name].shape) - slopes[name]).abs().max()
            assert difference < 1e-6, name


# ---- GradCache ---------------------------------------------------------------------------------------------------


def assert_equal_steps(cached, whole, kind):
    (loss, grads, drawn), (expected, expected_grads, expected_drawn) = cached, whole
    assert abs(loss - expected) < 1e-13
    assert drawn == expected_drawn, "the random numbers go on as after a plain batch"
    for name in grads:
        if name != "bias" or kind == "sigmoid":
            assert (grads[name] - expected_grads[name]).abs().max() < 1e-14, name


@pytest.mark.parametrize("kind", contrastive.KINDS)
def test_grad_cache_with_dropout_is_one_big_graph(kind):
    assert_equal_steps(*one_rank.cached_and_whole(0, 1, 5, kind), kind)


@pytest.mark.parametrize("kind", contrastive.KINDS)
def test_grad_cache_with_dropout_on_ranks_is_one_big_graph(ranks, kind):
    """Under DistributedDataParallel, whose ranks exchange gradients with the last chunk only."""
    for found in ranks[1]:
        assert_equal_steps(*found["grad_cache"][kind], kind)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_grad_cache_without_dropout_is_the_plain_batch(whole, size):
    model, (images, texts, ids) = build(), batch()
    loss_of = partial(contrastive.contrastive_loss, ids=ids)
    loss = contrastive.grad_cache(forward_of(model), chunks_of(images, texts, size), loss_of, torch.Tensor.backward)  # fmt: skip
    loss.backward()
    expected, grads = whole["softmax", True, torch.float64]
    assert abs(loss.item() - expected) < 1e-13
    assert compared(gradients(model), grads, [*TOWERS, "scale"])[2] < 1e-14


def test_grad_cache_under_autocast_keeps_its_graph():
    """Autocast keeps casts of the weights; those of the pass without a graph must not be used in the one with it."""
    model, (images, texts, _) = build(dtype=torch.float32), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive.grad_cache(forward_of(model), chunks_of(images, texts, 4), contrastive.contrastive_loss,
                                      torch.Tensor.backward)  # fmt: skip
    loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for n, p in model.named_parameters() if n != "bias")  # fmt: skip


# ---- a teacher ---------------------------------------------------------------------------------------------------


def divergence(found, teacher, ids):
    z = found.scale * found.images @ found.texts.T
    soft = teacher.scale * teacher.images @ teacher.texts.T
    others = contrastive.equal_ids(ids, ids).fill_diagonal_(False)
    z, soft = z.masked_fill(others, -1e9), soft.masked_fill(others, -1e9)
    ways = [(z, soft), (z.T, soft.T)]
    return sum(F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="batchmean", log_target=True) for a, b in ways) / 2  # fmt: skip


@pytest.fixture(scope="module")
def taught():
    """kind -> loss and gradients of one process with all pairs and a teacher."""
    found = {}
    for kind in contrastive.KINDS:
        model, (images, texts, ids) = build(), batch()
        embeddings = model(images, texts)
        loss = by_hand(embeddings, ids, kind) + 0.7 * divergence(embeddings, teacher_of(), ids)
        loss.backward()
        value = contrastive.contrastive_loss(embeddings, ids, kind, teacher=teacher_of())
        assert abs(value.item() - loss.item()) < 1e-12
        found[kind] = gradients(model)
    return found


@pytest.mark.parametrize("kind", contrastive.KINDS)
def test_a_teacher_adds_the_divergence_of_the_similarities(ranks, taught, kind):
    names = [*TOWERS, "scale", *(["bias"] if kind == "sigmoid" else [])]
    for grads in [one_rank.with_teacher(0, 1, kind), *(f["teacher"][kind] for f in ranks[1])]:
        assert compared(grads, taught[kind], names)[2] < 1e-13


def test_a_teacher_that_agrees_adds_nothing():
    model, (images, texts, ids) = build(), batch()
    found = model(images, texts)
    same = Teacher(found.images.detach(), found.texts.detach(), found.scale.item(), 3.0)
    plain = contrastive.contrastive_loss(found, ids)
    assert abs(contrastive.contrastive_loss(found, ids, teacher=same) - plain) < 1e-12


# ---- equal captions ----------------------------------------------------------------------------------------------


def best_loss(kinds: int, masked: bool) -> float:
    """Embeddings that know everything, of 16 pairs with `kinds` different captions -> their loss at a scale of 100."""
    captions = torch.arange(PAIRS) % kinds
    known = F.one_hot(captions, PAIRS).double()
    ids = captions[:, None]
    found = Embeddings(known, known, torch.tensor(100.0).double())
    return contrastive.contrastive_loss(found, ids if masked else None).item()


@pytest.mark.parametrize("kinds", [1, 2, 4])
def test_few_captions_keep_the_loss_up_unless_they_are_masked(kinds):
    """The complaint "my loss does not fall": copies as negatives leave log(copies), whatever the model knows."""
    floor = math.log(PAIRS / kinds)
    assert abs(best_loss(kinds, masked=False) - floor) < 1e-6
    assert best_loss(kinds, masked=True) < 1e-6
    distinct, floors, size = contrastive.batch_facts(torch.arange(PAIRS) % kinds).tolist()
    assert abs(distinct - kinds) < 1e-4 and abs(floors / size - floor) < 1e-5


def test_copies_are_counted_over_ranks(ranks):
    alone = contrastive.batch_facts(torch.arange(PAIRS) // 3)
    assert all(torch.allclose(found["facts"], alone) for found in ranks[1])


def test_the_floor_of_a_sigmoid_loss():
    """k copies of a caption: one logit is right once and wrong k - 1 times; the least of that, by search."""
    captions = torch.tensor([0, 0, 0, 0])
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    least = (-F.logsigmoid(z) - 3 * F.logsigmoid(-z)).min().item()
    _, floors, size = contrastive.batch_facts(captions, "sigmoid").tolist()
    assert abs(floors / size - least) < 1e-5
