"""minimind_npu's stages and batches: each loss against its formula, rows exactly once, adapters in PEFT's layout."""

import copy
import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, List, Value
from harness import ROOT, expect, finish, make_rows, own_modules, pack, start
from torch.nn import functional as F
from transformers import AutoTokenizer

from common.data.load import load_rows
from common.fast import attention, losses

NAMES = """
model train loop.batches loop.optim loop.precision loop.tracking
stages.pretrain stages.sft stages.dpo stages.distill stages.reason stages.lora
"""
modules = own_modules("minimind_npu", *NAMES.split())
models, train, batches, optim, precision, tracking = modules[:6]
pretrain, sft, dpo, distill, reason, lora = modules[6:]
RECIPE = ROOT / "minimind_npu"


def token_rows(rows, columns=("input_ids", "labels")):
    features = Features({name: List(Value("int32")) for name in columns})
    return Dataset.from_list(
        [{name: row[name] for name in columns} for row in rows], features=features
    )


def small(seed=0, vocab=97, packed=True, **changes):
    torch.manual_seed(seed)
    sizes = (
        dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        | changes
    )
    model = models.build("tiny", vocab, **sizes)
    model.config.initializer_range = 0.2
    model.apply(model._init_weights)
    model.config._attn_implementation = attention.register() if packed else "sdpa"
    return losses.use_chunked_loss(model) if packed else model


# ---- batches ------------------------------------------------------------------------------------------------


def test_rows_are_views_with_their_lengths_and_labels(tmp_path):
    rows = make_rows([5, 1, 9, 3, 30])
    made = token_rows(rows)
    made.save_to_disk(tmp_path / "rows")
    found = batches.TokenRows(Dataset.load_from_disk(tmp_path / "rows"), ("input_ids", "labels"))
    assert len(found) == 5 and found.lengths.tolist() == [5, 1, 9, 3, 30]
    assert found.labels.tolist() == [2, 0, 6, 0, 27]
    for i, row in enumerate(rows):
        ((ids, labels),) = found.row(i)
        assert (
            ids.tolist() == row["input_ids"]
            and labels.tolist() == row["labels"]
            and not ids.flags.owndata
        )


def test_a_batch_is_a_packed_row_filled_up():
    rows = make_rows([5, 9, 30, 7])
    found = batches.TokenRows(token_rows(rows), ("input_ids", "labels"))
    batch = batches.collate(found, [[2, 0], [3, 1]], windows=2, max_length=128, pad_token_id=0)
    expected = pack([rows[i] for i in (2, 0, 3, 1)])
    assert (
        batch["input_ids"].shape == (1, 256)
        and batch["token_mask"].sum() == 51
        and batch["documents"] == 4
    )
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[name][:, :51], expected[name])
    assert torch.equal(batch["cu_seq_lens_q"][:5], expected["cu_seq_lens_q"])
    assert (batch["labels"][:, 51:] == -100).all() and batch["cu_seq_lens_q"][-1] == 256
    assert batch["cu_seq_lens_q"].diff()[4:].max() <= batches.PAD_DOCUMENT and batch["row_ids"] == [
        2,
        0,
        3,
        1,
    ]
    model = small()
    out = [
        model(**{n: b[n] for n in pretrain.INPUTS if n in b}, labels=b["labels"]).loss
        for b in (batch, expected)
    ]
    assert out[0].item() == pytest.approx(out[1].item(), abs=1e-5)
    empty = batches.collate(found, [], 1, 128, 0)
    assert (empty["labels"] == -100).all() and empty["input_ids"].shape == (1, 128)


@pytest.mark.parametrize("seed", range(3))
def test_no_row_twice_and_none_left_out_whatever_the_processes(seed):
    """Each step by another number of processes, batch size and accumulation, as after resumes."""
    rng = random.Random(seed)
    found = batches.TokenRows(
        token_rows(make_rows([rng.randint(4, 60) for _ in range(150)])), ("input_ids", "labels")
    )
    order, epoch, at = batches.Order(found, 64, seed), 0, 0
    seen: list[list[int]] = [[], []]
    while epoch < 2:
        world, windows, micros = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 4]), rng.choice([1, 2])
        bins, items = order.take(epoch, at, world * windows * micros), []
        for rank in range(world):
            loader = batches.Loader(found, order, windows, 64, 0, torch.device("cpu"), rank, world)
            for micro in range(micros):
                batch = loader.batch(bins, micro)
                seen[epoch] += batch["row_ids"]
                items.append((batch["labels"] != -100).sum().item())
        assert sum(items) == loader.loss_denominator(bins)
        at += len(bins)
        if at >= len(order):
            epoch, at = epoch + 1, 0
    assert all(sorted(rows) == list(range(150)) for rows in seen) and seen[0] != seen[1]
    held = batches.Loader(found, order, 2, 64, 0, torch.device("cpu"), 1, 3)
    assert len(list(held.all())) == math.ceil(len(order) / 6)


def test_documents_are_cut_into_equal_pieces():
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    text = "小狗在河边跑。" * 40
    pieces = pretrain.encode({"text": text}, tokenizer, 64)
    ids = [i for piece in pieces for i in piece["input_ids"]]
    assert ids[0] == 1 and ids[-1] == 2 and tokenizer.decode(ids[1:-1]) == text
    sizes = [len(piece["input_ids"]) for piece in pieces]
    assert len(sizes) > 2 and max(sizes) <= 64 and min(sizes) > 40


# ---- losses -------------------------------------------------------------------------------------------------


def batch_of(rows, columns=("input_ids", "labels"), length=128):
    found = batches.TokenRows(token_rows(rows, columns), columns)
    return batches.collate(found, [list(range(len(rows)))], 1, length, 0)


@pytest.mark.parametrize("sizes", [{}, {"use_moe": True}], ids=["dense", "experts"])
def test_accumulation_changes_neither_loss_nor_gradient(sizes):
    rows = make_rows([20, 31, 9, 44, 12, 27, 30, 8], seed=1)
    found = batches.TokenRows(token_rows(rows), ("input_ids", "labels"))
    order, results = batches.Order(found, 48, 0), []
    for windows, steps in ((len(order), 1), (1, len(order)), (2, math.ceil(len(order) / 2))):
        model = small(router_aux_loss_coef=0.0, **sizes)
        net = train.Objective(model, pretrain.loss)
        loader = batches.Loader(found, order, windows, 48, 0, torch.device("cpu"))
        training = SimpleNamespace(
            gradient_accumulation_steps=steps,
            world_size=1,
            max_grad_norm=0,
            device="cpu",
            bf16=False,
            fp16=False,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in model.parameters()]
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        gradients = train.parallel.Gradients(torch.float32)
        state = (optimizer, scaler, training, gradients)
        loss = train.train_step(net, None, loader, order.bins, *state, step=1)
        results.append(
            (loss, [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)])
        )
    for loss, moved in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert max((a - b).abs().max() for a, b in zip(moved, results[0][1], strict=True)) < 1e-4


def full(model, row):
    """Log-probs of a row's label tokens, from full logits of the row alone."""
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    where = labels[0, 1:] != -100
    return logits[where], labels[0, 1:][where]


def test_reason_weighs_the_tags():
    rows, tags = make_rows([20, 31, 9]), torch.tensor([5, 50, 60])
    total, count = 0.0, 0
    plain = small(packed=False)
    for row in rows:
        log_probs, targets = full(plain, row)
        each = -log_probs.gather(1, targets[:, None])[:, 0]
        total, count = (
            total + (each * torch.where(torch.isin(targets, tags), 10.0, 1.0)).sum(),
            count + len(targets),
        )
    loss, sums = reason.loss(small(), batch_of(rows), float(count), tags, 10.0)
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5) and sums["count"] == count
    assert total / count > sums["nll"] / count


def test_tags_are_tokens_of_their_own():
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    assert len(set(reason.tag_ids(tokenizer))) == 4
    row = next(
        r for r in load_rows(str(RECIPE / "data/reason.jsonl"), "chat")[0]["row"] if "<answer>" in r
    )
    found = sft.encode(json.loads(row), tokenizer, 256)
    trained = {label for label in found["labels"] if label != -100}
    assert set(reason.tag_ids(tokenizer)) <= trained


@pytest.mark.parametrize("text, answer, kept", [
    ("<think>二加三</think>\n<answer>5</answer>", "5", True), ("<think>二加三</think>\n\n5", "5", True),
    ("<think>二加三\n<answer>5</answer>", "5", False), ("5", "5", False), ("<think>a</think><answer>5", "5", False),
])  # fmt: skip
def test_a_reasoned_answer_is_split(text, answer, kept):
    assert reason.split_answer(text) == (answer, kept)


def pairs(lengths, seed=0):
    rows = make_rows(lengths, seed)
    chosen, rejected = rows[::2], rows[1::2]
    return [
        {f"{side}_{n}": row[n] for side, row in (("chosen", a), ("rejected", b)) for n in ("input_ids", "labels")}
        for a, b in zip(chosen, rejected, strict=True)
    ]  # fmt: skip


def test_what_is_to_be_told_of_either_answer_is_told_of_the_pair(monkeypatch):
    told = {"好": ["of the chosen one"], "坏": []}

    def encoded(tokenizer, turns, *_):
        notes = told[turns[-1]["content"]]
        return {"input_ids": [1, 2], "labels": [-100, 2], "truncated": False, "notes": notes}

    monkeypatch.setattr(dpo, "encode_chat", encoded)
    row = {
        "prompt": [{"role": "user", "content": "问"}],
        "chosen": [{"role": "assistant", "content": "好"}],
        "rejected": [{"role": "assistant", "content": "坏"}],
    }
    assert dpo.encode(row, None, 16)["notes"] == ["of the chosen one"]


def test_dpo_equals_its_formula(tmp_path):
    made, policy, reference = pairs([20, 31, 9, 12, 40, 8]), small(1), small(2)
    found = batches.TokenRows(token_rows(made, dpo.COLUMNS), dpo.COLUMNS)
    assert found.labels.sum() == sum(
        len(r[f"{s}_labels"]) - 3 for r in made for s in ("chosen", "rejected")
    )
    order = batches.Order(found, 64, 0)
    loader = batches.Loader(found, order, 2, 64, 0, torch.device("cpu"), pairs=True)
    kept = dpo.reference(reference, loader, torch.float32, tmp_path / "r.safetensors", "x")
    assert torch.equal(
        kept, dpo.reference(policy, loader, torch.float32, tmp_path / "r.safetensors", "x")
    ), "kept"
    assert not torch.equal(
        kept, dpo.reference(policy, loader, torch.float32, tmp_path / "r.safetensors", "other")
    )
    (tmp_path / "r.safetensors").write_bytes(b"torn")
    loader.extra["reference"] = dpo.reference(
        reference, loader, torch.float32, tmp_path / "r.safetensors", "x"
    )
    assert torch.equal(kept, loader.extra["reference"])
    total = 0.0
    for row in made:
        gain = []
        for side in ("chosen", "rejected"):
            one = {name: row[f"{side}_{name}"] for name in ("input_ids", "labels")}
            logp = [full(small(seed, packed=False), one) for seed in (1, 2)]
            gain.append([x.gather(1, t[:, None]).sum() for x, t in logp])
        total -= F.logsigmoid(0.15 * ((gain[0][0] - gain[0][1]) - (gain[1][0] - gain[1][1])))
    loss = sum(dpo.loss(policy, batch, len(made), 0.15)[0] for batch in loader.all())
    assert loss.item() == pytest.approx((total / len(made)).item(), rel=1e-5)


def test_dpo_with_the_adapter_switched_off_equals_the_cached_reference(tmp_path):
    base = small(1)
    made = batches.TokenRows(token_rows(pairs([20, 31, 9, 12]), dpo.COLUMNS), dpo.COLUMNS)
    loader = batches.Loader(
        made, batches.Order(made, 64, 0), 4, 64, 0, torch.device("cpu"), pairs=True
    )
    kept = dpo.reference(base, loader, torch.float32, tmp_path / "r.safetensors", "x")
    model = adapted(base)
    batch = next(loader.all())
    live, _ = dpo.loss(model, batch, 2.0, 0.15)
    cached, _ = dpo.loss(model, batch | {"reference": kept[batch["row_ids"]]}, 2.0, 0.15)
    assert (
        live.item() == pytest.approx(cached.item(), abs=1e-5)
        and abs(live.item() - math.log(2)) > 1e-3
    )


@pytest.mark.parametrize(
    "teacher_sizes", [{"hidden_size": 64}, {"use_moe": True}], ids=["dense", "experts"]
)
def test_distillation_equals_full_logits(teacher_sizes, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 16)
    rows = make_rows([20, 31, 9])
    teacher, student = small(3, **teacher_sizes).eval(), small(1)
    total, count = 0.0, 0
    plain, taught = small(1, packed=False), small(3, packed=False, **teacher_sizes).eval()
    for row in rows:
        mine, targets = full(plain, row)
        hints = taught(torch.tensor([row["input_ids"]])).logits[0, :-1][
            torch.tensor(row["labels"][1:]) != -100
        ]
        ce = -mine.gather(1, targets[:, None]).sum()
        ids = torch.tensor([row["input_ids"]])
        logits = plain(ids).logits[0, :-1][torch.tensor(row["labels"][1:]) != -100]
        p = (hints / 1.5).softmax(-1)
        kl = (p * (p.log() - (logits / 1.5).log_softmax(-1))).sum()
        total, count = total + 0.5 * ce + 0.5 * 1.5**2 * kl, count + len(targets)
    (total / count).backward()
    loss, sums = distill.loss(student, batch_of(rows), float(count), teacher, 0.5, 1.5)
    loss.backward()
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5) and sums["count"] == count
    expected = dict(plain.named_parameters())
    assert all(
        torch.allclose(p.grad, expected[n].grad, atol=1e-4) for n, p in student.named_parameters()
    )
    nothing, _ = distill.loss(student, batches.collate(None, [], 1, 128, 0), 5.0, teacher, 0.5, 1.5)
    assert nothing == 0 and nothing.requires_grad


# ---- adapters -----------------------------------------------------------------------------------------------


def adapted(model, seed=4):
    """With adapters that change something."""
    lora.add(model, r=4, alpha=8)
    torch.manual_seed(seed)
    for _, layer in lora.layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model


@pytest.mark.parametrize(
    "sizes", [{}, {"generation": 2, "use_moe": True}], ids=["dense", "experts"]
)
def test_an_adapter_opens_with_peft_and_merges(tmp_path, sizes):
    from peft import PeftModel

    ids, base = torch.randint(97, (2, 9)), small(packed=False, **sizes).eval()
    before = base(ids).logits
    model = adapted(small(packed=False, **sizes)).eval()
    assert (
        all(name[-8:] != "mlp.gate" for name, _ in lora.layers(model))
        and not model.lm_head.weight.requires_grad
    )
    expected = model(ids).logits
    assert (expected - before).abs().max() > 0.1
    with lora.switched_off(model):
        assert torch.equal(model(ids).logits, before)
    lora.save(model, tmp_path, "base")
    theirs = PeftModel.from_pretrained(small(packed=False, **sizes), tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)
    again = lora.load(small(packed=False, **sizes), tmp_path).eval()
    assert torch.equal(again(ids).logits, expected)
    merged = lora.merge(again)
    assert torch.allclose(merged(ids).logits, expected, atol=1e-4) and not list(lora.layers(merged))
    assert set(merged.state_dict()) == set(base.state_dict())
    with pytest.raises(SystemExit, match="another model"):
        lora.load(small(packed=False, num_hidden_layers=3, **sizes), tmp_path)


# ---- optimizer ----------------------------------------------------------------------------------------------


def test_learning_rates():
    curve = {
        kind: [optim.lr_scale(i / 100, kind, 0.1, 0.1) for i in range(101)]
        for kind in optim.SCHEDULES
    }
    for values in curve.values():
        assert (
            values[0] == 0
            and values[5] == pytest.approx(0.5)
            and values[10] == pytest.approx(1)
            and max(values) <= 1
        )
    assert [round(curve[kind][-1], 6) for kind in optim.SCHEDULES] == [0.1, 0.1, 1.0, 0.1]
    assert curve["cosine"][55] == pytest.approx(0.55) and curve["warmup_stable_decay"][60] == 1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_and_state_of_the_optimizer(kind):
    def steps(model, optimizer, number):
        for i in range(number):
            torch.manual_seed(i)
            ids = torch.randint(97, (2, 12))
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    made = lambda: (lambda m: (m, optim.make(m, kind, 1e-3, 0.1, 0.02, True)))(
        small(packed=False, use_moe=True)
    )
    model, optimizer = made()
    by_id = {id(p): name for name, p in model.named_parameters()}
    groups = {by_id[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
    assert groups.keys() == set(by_id.values())
    assert (
        groups["model.norm.weight"]["weight_decay"] == 0
        and groups["model.embed_tokens.weight"]["weight_decay"] == 0.1
    )
    assert groups["model.layers.0.mlp.experts.1.up_proj.weight"]["lr"] == (
        0.02 if kind == "muon" else 1e-3
    )
    assert (
        groups["model.layers.0.mlp.gate.weight"]["lr"]
        == groups["model.embed_tokens.weight"]["lr"]
        == 1e-3
    )
    optim.set_lr(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == ({0.01, 5e-4} if kind == "muon" else {5e-4})
    steps(model, optimizer, 2)
    other, second = made()
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file does
    steps(model, optimizer, 1)
    torch.manual_seed(0)
    steps(other, second, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_muon_steps_as_torch_does(monkeypatch, half, stacked):
    """In float32 and bfloat16; one by one, and matrices of one shape at once, in two parts."""
    monkeypatch.setattr(optim.device, "half_dtype", lambda: half)
    if stacked:
        monkeypatch.setattr(optim, "orthogonal_of_one_shape", as_on_an_accelerator)
    moved = []
    for kind in (torch.optim.Muon, optim.StackedMuon):
        draw = torch.Generator().manual_seed(0)
        shapes = [(48, 20), (20, 48), (48, 20), (48, 20)]
        matrices = [torch.randn(shape, generator=draw) for shape in shapes]
        matrices = [torch.nn.Parameter(matrix) for matrix in matrices]
        start = [matrix.detach().clone() for matrix in matrices]
        optimizer = kind(matrices, lr=0.02, momentum=0.95, weight_decay=0.1)
        for _ in range(2):
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=draw)
            optimizer.step()
        moved.append([b.detach() - a for a, b in zip(start, matrices, strict=True)])
    for theirs, ours in zip(*moved, strict=True):
        assert (theirs - ours).norm() < 0.02 * theirs.norm()
        assert theirs.abs().max() > 1e-3


def as_on_an_accelerator(matrices, iteration):
    stacks = [torch.stack(part) for part in (matrices[:2], matrices[2:]) if part]
    return torch.cat([optim.orthogonal(stack, iteration) for stack in stacks])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, least, most", [("newton_schulz", 0.68, 1.21), ("polar_express", 0.85, 1.15)]
)
def test_what_muon_steps_along_is_nearly_orthogonal(name, least, most, dtype):
    """Singular values from 5e-3 of the norm on, of matrices of all forms and sizes, of a gradient of zeros too."""
    iteration = optim.ITERATIONS[name]
    draw = torch.Generator().manual_seed(0)
    for shape in ((48, 48), (20, 90), (90, 20)):
        left, right = (
            torch.linalg.qr(torch.randn(n, min(shape), generator=draw))[0] for n in shape
        )
        values = torch.logspace(0, -2, min(shape))
        for scale in (1e-4, 1e3):
            matrix = scale * left * values @ right.T
            small = values < 6e-3 * values.norm()
            found = torch.linalg.svdvals(optim.orthogonal(matrix.to(dtype), iteration).float())
            assert found[: int((~small).sum())].min() > least and found.max() < most
    assert not optim.orthogonal(torch.zeros(4, 9, dtype=dtype), iteration).any()


def test_a_run_goes_on_from_the_state_of_the_other_iteration():
    model = small(packed=False)
    used = lambda made: made.optimizers[0].iteration
    usual = optim.make(model, "muon", 1e-3, 0.1, 0.02, True)
    made = optim.make(model, "muon", 1e-3, 0.1, 0.02, True, iteration="polar_express")
    assert used(usual) is optim.ITERATIONS["newton_schulz"]
    made.load_state_dict(copy.deepcopy(usual.state_dict()))
    assert used(made) is optim.ITERATIONS["polar_express"]


SHARED_MUON = """
import sys
sys.path[:0] = ["minimind_npu", "."]
from common import device
import torch, torch.distributed as dist
from loop import optim
draw = torch.Generator().manual_seed(0)
matrices = [torch.randn(12, 20, generator=draw) for _ in range(5)]
iteration = optim.ITERATIONS["polar_express"]
alone = optim.orthogonal_by_ranks(matrices, iteration)
dist.init_process_group("gloo")
computed = []
stock = optim.orthogonal
optim.orthogonal = lambda *args: (computed.append(1), stock(*args))[1]
shared = optim.orthogonal_by_ranks(matrices, iteration)
assert len(computed) == 3 and len(shared) == 5
assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.slow
def test_ranks_share_the_work_of_muon(tmp_path):
    script = tmp_path / "muon.py"
    script.write_text(SHARED_MUON)
    done = expect(finish(start(["python", ROOT / "common/launch.py", 2, script])))
    assert done.stdout.split() == ["equal"]


# ---- precision ---------------------------------------------------------------------------------------------


def test_fast_float32_never_rounds(monkeypatch):
    """oneDNN may compute float32 products only while they are exact; where it rounds, the setting goes back."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    try:
        taken = precision.fast_float32()
        a = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
        assert ((a @ a.T).double() - a.double() @ a.double().T).abs().max() < 1e-3
        assert taken == (settings.fp32_precision == "bf16")
        settings.fp32_precision = before
        real = torch.Tensor.__matmul__
        monkeypatch.setattr(
            torch.Tensor,
            "__matmul__",
            lambda x, y: real(x.bfloat16().float() if x.dtype == torch.float32 else x, y),
        )
        assert not precision.fast_float32() and settings.fp32_precision == before
        shapes = precision.product_shapes(small(), tokens=96)
        assert {(96, 48, 48), (48, 96, 48), (96, 48, 97)} <= shapes
        monkeypatch.setattr(precision, "rounds", lambda *shape: shape == max(shapes))
        assert not precision.fast_float32(shapes), "one shape that rounds is enough"
    finally:
        settings.fp32_precision = before


# ---- trackers -----------------------------------------------------------------------------------------------


def test_a_continued_run_goes_on_in_its_trackers(tmp_path, monkeypatch):
    """The run ids are in the checkpoint; tensorboard drops what came after it."""
    started, sent, ended = [], [], []
    fake = SimpleNamespace(init=lambda **settings: started.append(settings) or SimpleNamespace(
        id=settings["id"] or "abc", log=lambda values, step: sent.append((step, values)),
        finish=lambda: ended.append(1)))  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", fake)
    ids: dict = {}
    for step in (0, 4):
        trackers = tracking.Trackers(
            ["tensorboard", "wandb"], tmp_path, {"size": "tiny"}, ids, step
        )
        for at in range(step + 1, 7):
            trackers.log(at, {"loss": float(at + 10 * step)})
        trackers.close()
    assert (
        ids["wandb"] == "abc"
        and [one["id"] for one in started] == [None, "abc"]
        and sent[0] == (1, {"loss": 1.0})
        and len(ended) == 2
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(ids["tensorboard"]).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 45), (6, 46)]
    monkeypatch.setitem(sys.modules, "swanlab", None)
    for name, words in (("mlflow", "--report_to mlflow"), ("swanlab", "pip install swanlab")):
        with pytest.raises(SystemExit, match=words):
            tracking.Trackers([name], tmp_path, {}, {}, 0)
