"""chinese_bloom: its attention against stock Bloom, packed rows, windows of text, templates, and whole runs."""

import copy
import functools
import importlib.util
import json
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from harness import (
    ROOT,
    error_line,
    expect,
    finish,
    history,
    largest_difference,
    make_rows,
    pack,
    report,
    shell,
    start,
    weights,
    weights_sha,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from common import collators, tiny
from common.data.labels import encode_chat, encode_prompt, set_template
from common.data.load import load_rows
from common.fast import alibi, losses

RECIPE = ROOT / "chinese_bloom"
sys.path.insert(0, str(RECIPE))
import bloom_attention
from token_windows import TokenWindows

VOCAB = 97


def build(heads=4, layers=2, **more):
    """(stock eager model, the same with our attention)."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=8 * heads, n_layer=layers, n_head=heads, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2, pad_token_id=3, **more,
    )  # fmt: skip
    config._attn_implementation = "eager"
    stock = BloomForCausalLM(config)
    for module in stock.modules():
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias, std=0.1)
    return stock, bloom_attention.use(copy.deepcopy(stock))


def pad(rows, side="right"):
    batch = collators.PaddedCollator(3)(rows)
    batch.pop("row_ids")
    if side == "left":
        for name, tensor in batch.items():
            for i, row in enumerate(rows):
                batch[name][i] = tensor[i].roll(tensor.shape[1] - len(row["input_ids"]))
    return batch


def gradients(model, batch, **settings):
    model.zero_grad()
    model(**batch, use_cache=False, **settings).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, atol=1e-5, rtol=1e-4):
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- stock Bloom ------------------------------------------------------------------------------------------------

HEADS = [1, 4, 6, 14]  # 6 and 14 are no powers of two


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("heads", HEADS)
def test_logits_equal_stock(heads, padding):
    stock, ours = (model.eval() for model in build(heads))
    batch = (
        pad(make_rows([9, 40, 23]), padding)
        if padding
        else {"input_ids": pad(make_rows([40, 40]))["input_ids"]}
    )
    batch.pop("labels", None)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    expected, logits = stock(**batch).logits, ours(**batch).logits
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)
    assert logits.isfinite().all() and expected[real].std() > 0.1
    changed = ours(**batch | {"input_ids": batch["input_ids"].roll(1, 1)}).logits
    assert (changed - logits)[real].abs().max() > 0.1, "the comparison must be able to fail"


def test_the_slopes_are_those_of_stock():
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    for heads in (1, 2, 3, 12, 16, 20, 25, 32, 71, 112, 128):
        torch.testing.assert_close(
            alibi.alibi_slopes(heads), _get_alibi_slopes(heads, torch.device("cpu"))
        )


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}]
)
@pytest.mark.parametrize("heads", [4, 6])
def test_generation_equals_stock(heads, how):
    stock, ours = (model.eval() for model in build(heads, tie_word_embeddings=False))
    prompt = {k: v for k, v in pad(make_rows([5, 30, 12]), "left").items() if k != "labels"}
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | how
    expected = stock.generate(**prompt, **how)
    assert torch.equal(ours.generate(**prompt, **how), expected)
    assert torch.equal(
        ours.generate(prompt["input_ids"][1:2], **how),
        stock.generate(prompt["input_ids"][1:2], **how),
    )
    assert len(set(expected[:, 30:].flatten().tolist())) > 5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_equal_stock(side, checkpointing):
    stock, ours = build(6)
    batch = pad(make_rows([9, 60, 33]), side)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    found = gradients(ours.train(), batch)
    assert_close(found, gradients(stock.train(), batch))
    assert len(found) == len(list(stock.parameters()))


def test_attention_dropout_is_not_dropped():
    _, ours = build(attention_dropout=0.5)
    for batch in (pack(make_rows([40, 30])), pad(make_rows([40, 30]))):
        still = ours.eval()(**batch).loss
        torch.manual_seed(1)
        assert abs(ours.train()(**batch).loss - still) > 1e-3


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_bf16_is_closer_to_the_truth_than_stock_far_from_the_start(half):
    """Stock adds slope * position in bfloat16, which has 8 bits: from position 256 on neighbours become equal."""
    stock, ours = (model.eval() for model in build(8, layers=2))
    rows = make_rows([1500], prompt=0)
    ids = torch.tensor([rows[0]["input_ids"]])
    truth, error = stock.bfloat16().float()(ids).logits[0, 512:], {}
    ours.bfloat16().float()
    if half == "weights":
        stock.bfloat16(), ours.bfloat16()
    packed = {k: v for k, v in pack(rows).items() if k != "labels"}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        for name, model, batch in (
            ("stock", stock, {}),
            ("ours", ours, {}),
            ("packed", ours, packed),
        ):
            logits = model(**({"input_ids": ids} | batch), use_cache=False).logits[0, 512:]
            error[name] = (logits.float() - truth).norm() / truth.norm()
    assert error["ours"] < 0.5 * error["stock"] and error["packed"] < 0.5 * error["stock"], error


@pytest.mark.parametrize("side", ["left", "right"])
def test_fp16_rows_of_padding_are_no_nan(side):
    """What is wholly masked must stay finite in a dtype that is narrower than bfloat16."""
    stock, ours = (model.eval() for model in build(4))
    batch = {k: v for k, v in pad(make_rows([3, 40]), side).items() if k != "labels"}
    with torch.no_grad():
        truth, logits = stock(**batch).logits, ours.half()(**batch).logits.float()
    real = batch["attention_mask"].bool()
    assert logits.isfinite().all() and (logits - truth)[real].norm() < 0.01 * truth[real].norm()
    distance = ours.transformer.h[0].self_attention
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    bias = distance._bias(mask, alibi.alibi_slopes(4), 4, 4, torch.float16)
    assert bias.dtype == torch.float16 and bias.isfinite().all()


# ---- packed rows ------------------------------------------------------------------------------------------------

LENGTHS = [
    33,
    150,
    5,
    12,
    1,
    280,
    9,
    1100,
]  # joined ones, several blocks, one beyond the first bank of masks


def alone(model, rows, **settings):
    """Gradients of the members one by one, each in a batch without padding or packing."""
    total = sum(sum(x != -100 for x in row["labels"][1:]) for row in rows)
    model.zero_grad()
    loss = 0
    for row in rows:
        one = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        part = model(**one, use_cache=False, num_items_in_batch=total, **settings).loss
        part.backward()
        loss += part.item()
    return (
        loss,
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        total,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("heads", [4, 6])
def test_packed_equals_members_alone(heads, checkpointing):
    stock, ours = build(heads)
    rows = make_rows(LENGTHS)
    loss, expected, total = alone(stock, rows)
    losses.use_chunked_loss(ours)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    batch = pack(rows)
    out = ours.train()(**batch, num_items_in_batch=total, use_cache=False)
    assert abs(out.loss.item() - loss) < 1e-4 * loss
    out.loss.backward()
    assert_close({n: p.grad for n, p in ours.named_parameters()}, expected)


def test_a_packed_row_builds_no_mask_and_leaves_nothing_behind(monkeypatch):
    _, ours = build()
    monkeypatch.setattr(
        bloom_attention, "sdpa_mask", lambda **_: pytest.fail("a dense mask was built")
    )
    ours(**pack(make_rows(LENGTHS)), use_cache=False)
    monkeypatch.undo()
    padded = pad(make_rows([9, 40]))
    before = ours(**padded).loss
    assert bloom_attention._row is None
    with pytest.raises(ValueError):
        ours(**pack(make_rows([5, 5])), inputs_embeds=1)
    assert bloom_attention._row is None and torch.equal(ours(**padded).loss, before)


def test_the_route_with_dropout_keeps_documents_apart_too():
    """Dropout of attention weights goes over a bias; with a probability of (nearly) nothing it must give the same."""
    _, ours = build(6)
    batch = pack(make_rows([20, 7, 130]))
    expected = gradients(ours.train(), batch)
    for module in ours.modules():
        if isinstance(module, bloom_attention.FastBloomAttention):
            module.attention_dropout.p = 1e-12
    assert_close(gradients(ours, batch), expected)


def test_packed_tracks_fp32_under_bf16_autocast():
    stock, ours = build(6)
    rows = make_rows(LENGTHS)
    loss, expected, total = alone(stock, rows)
    with torch.autocast("cpu", torch.bfloat16):
        packed = ours(**pack(rows), num_items_in_batch=total, use_cache=False).loss
        packed.backward()
        again, members, _ = alone(ours, rows)
    assert abs(packed.item() - loss) < 5e-3 * loss and abs(packed.item() - again) < 2e-3 * loss
    for name, p in ours.named_parameters():
        grad = expected[name]
        assert p.grad.dtype == torch.float32 and members[name].isfinite().all()
        assert (members[name] - grad).norm() < 0.05 * grad.norm() + 1e-4, name
    packed_grads = gradients_under_autocast(ours, pack(rows), total)
    for name, grad in expected.items():
        assert (packed_grads[name] - grad).norm() < 0.05 * grad.norm() + 1e-4, name


def gradients_under_autocast(model, batch, total):
    with torch.autocast("cpu", torch.bfloat16):
        return gradients(model, batch, num_items_in_batch=total)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_members_alone_under_lora(checkpointing):
    from peft import LoraConfig, get_peft_model

    rows, models = make_rows(LENGTHS[:-1]), []
    stock, ours = build(6)
    losses.use_chunked_loss(ours)
    for model in (stock, ours):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
        how = LoraConfig(
            r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        models.append(get_peft_model(model, how).train())
    loss, expected, total = alone(models[0], rows)
    found = gradients(models[1], pack(rows), num_items_in_batch=total)
    assert_close(found, expected)
    assert found and all("lora_" in name for name in found)


def test_saved_files_are_stock(tmp_path):
    from transformers import AutoModelForCausalLM

    stock, ours = build(6)
    stock.save_pretrained(tmp_path / "stock")
    losses.use_chunked_loss(ours).save_pretrained(tmp_path / "ours")
    assert weights_sha(tmp_path / "stock") == weights_sha(tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config == json.loads(
        (tmp_path / "stock/config.json").read_text()
    ) and "alibi" not in str(config)
    batch = pad(make_rows([30, 8]))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    expected = plain(**batch).loss
    again = bloom_attention.use(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(**batch).loss, expected)
    twin = copy.deepcopy(
        bloom_attention.use(again)
    )  # a second `use` changes nothing, and a copy stands alone
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    torch.testing.assert_close(twin(**batch).loss, expected)
    torch.testing.assert_close(twin(**pack(make_rows([30, 8])), use_cache=False).loss, expected)


# ---- ALiBi ------------------------------------------------------------------------------------------------------


def reference(query, key, value, starts, scale, slopes):
    """float64, one document after the other, the whole matrix of scores."""
    edges, parts = starts.tolist(), []
    for a, b in zip(edges, edges[1:], strict=False):
        q, k, v = (x[:, a:b].double() for x in (query, key, value))
        place = torch.arange(b - a)
        distance = (place[:, None] - place).double()
        scores = q @ k.transpose(1, 2) * scale - slopes.double()[:, None, None] * distance
        parts.append((scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def drawn(heads, lengths, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(heads, sum(lengths), size, generator=generator).to(dtype) for _ in range(3)
    ]
    return *tensors, torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("heads", [4, 6])
def test_alibi_attention_equals_the_whole_matrix(heads):
    lengths = [700, 1, 300, 130, 128, 60, 40, 30, 20, 5, 2, 1500]
    q, k, v, starts = drawn(heads, lengths, 16)
    slopes = alibi.alibi_slopes(heads)
    for x in (q, k, v):
        x.requires_grad_()
    expected = reference(q, k, v, starts, 0.3, slopes).float()
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    truth = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for route in (
        lambda: alibi.alibi_attention(q, k, v, starts, max(lengths), 0.3, slopes),
        lambda: alibi.document_by_document(q, k, v, starts, 0.3, slopes),
    ):
        out = route()
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        for found, grad in zip(
            torch.autograd.grad((out * weight).sum(), (q, k, v)), truth, strict=True
        ):
            torch.testing.assert_close(found, grad, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [4, 20])
def test_alibi_as_columns_of_a_fused_kernel(heads, dtype):
    """A kernel that takes products of half-precision numbers and sums them in fp32, at positions up to 8,000."""
    lengths, size = [3, 8000, 500], 16
    q, k, v, starts = drawn(heads, lengths, size, dtype)
    slopes, scale = alibi.alibi_slopes(heads), size**-0.5
    wide_q, wide_k = alibi.add_columns(q, k, starts, scale, slopes)
    assert (
        wide_q.dtype == wide_k.dtype == dtype
        and wide_q.shape[-1] == size + 8
        and wide_q.isfinite().all()
    )
    for at in (2, 3, 4, 300, 4101, 8002, 8003, 8400):
        first = max(s for s in starts.tolist() if s <= at)
        fused = (
            wide_q[:, at : at + 1].float() @ wide_k[:, first : at + 1].float().transpose(1, 2)
        )[:, 0] * scale
        distance = torch.arange(at - first, -1, -1).double()
        exact = (q[:, at : at + 1].double() @ k[:, first : at + 1].double().transpose(1, 2))[
            :, 0
        ] * scale
        exact = exact - slopes.double()[:, None] * distance
        assert (fused.softmax(-1) - exact.softmax(-1)).abs().max() < 1e-3, at
        apart = fused - exact  # what all keys share, a softmax does not see
        assert (apart - apart[:, -1:]).abs().max() < 5e-3, (at, "the slope has lost digits")


def test_documents_one_by_one_in_fp16_stay_finite():
    q, k, v, starts = drawn(8, [1, 900, 30], 16, torch.float16)
    out = alibi.document_by_document(q, k, v, starts, 0.25, alibi.alibi_slopes(8))
    expected = reference(q, k, v, starts, 0.25, alibi.alibi_slopes(8))
    assert out.dtype == torch.float16 and (out.double() - expected).norm() < 5e-3 * expected.norm()


# ---- windows of documents ---------------------------------------------------------------------------------------


def documents(lengths):
    """Every token its own number, so that each one can be found again."""
    edges = np.cumsum([0, *lengths])
    return [{"input_ids": list(range(a, b))} for a, b in zip(edges, edges[1:], strict=False)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 3))
def test_windows_hold_every_token_once(lengths, window, seed):
    rows = documents(lengths)
    windows = TokenWindows(rows, window, seed)
    sizes, seen = [], []
    for i in range(len(windows)):
        pieces = windows[i]
        sizes.append(sum(len(piece["input_ids"]) for piece in pieces))
        for piece in pieces:
            assert len(piece["input_ids"]) and np.array_equal(piece["labels"], piece["input_ids"])
            assert piece["input_ids"][0] in rows[piece["row_id"]]["input_ids"]
            seen += piece["input_ids"].tolist()
    assert sorted(seen) == list(range(sum(lengths)))
    assert all(size == window for size in sizes[:-1]) and 0 < sizes[-1] <= window
    place = {row_id: [] for row_id in range(len(rows))}
    for i in range(len(windows)):
        for piece in windows[i]:
            place[piece["row_id"]] += piece["input_ids"].tolist()
    assert all(place[i] == row["input_ids"] for i, row in enumerate(rows)), (
        "a document's pieces are out of order"
    )
    same = TokenWindows(rows, window, seed)
    assert [p["row_id"] for i in range(len(same)) for p in same[i]] == [
        p["row_id"] for i in range(len(windows)) for p in windows[i]
    ]


def test_windows_of_another_seed_have_another_order():
    rows = documents([7] * 30)
    orders = [
        [p["row_id"] for i in range(10) for p in TokenWindows(rows, 20, s)[i]] for s in (0, 1)
    ]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_windows_read_arrow_and_lists_alike_and_train_all_but_first_tokens():
    from datasets import Dataset

    rows = documents([5, 90, 30, 2, 14])
    table = Dataset.from_list([row | {"source": "x"} for row in rows])
    collate = collators.PackedCollator()
    for a, b in zip(*(TokenWindows(x, 32, 1) for x in (rows, table)), strict=True):
        a, b = collate([a]), collate([b])
        assert a.keys() == b.keys() and a["row_ids"] == b["row_ids"]
        assert all(
            torch.equal(a[k], b[k])
            for k in ("input_ids", "labels", "position_ids", "cu_seq_lens_q")
        )
        trained = a["labels"][0] != -100
        assert torch.equal(a["labels"][0][trained], a["input_ids"][0][trained])
        assert torch.equal(~trained, a["position_ids"][0] == 0)


def test_windows_keep_the_text_on_disk(tmp_path):
    import pyarrow as pa
    from datasets import Dataset

    count, size = 4000, 1000
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(0, count * size + 1, size, dtype=np.int32)),
        pa.array(np.zeros(count * size, np.int32)),
    )
    Dataset(pa.table({"input_ids": lists})).save_to_disk(tmp_path)
    table = Dataset.load_from_disk(tmp_path)
    tracemalloc.start()
    windows = TokenWindows(table, 1024)
    for i in range(0, len(windows), 97):
        windows[i]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(windows) == -(-count * size // 1024) and peak < count * size / 4, (
        f"{peak:,} bytes for {count * size:,}"
    )


# ---- templates --------------------------------------------------------------------------------------------------


@functools.cache
def recipe():
    """chinese_bloom/train.py as a module, for its functions."""
    spec = importlib.util.spec_from_file_location("chinese_bloom_train", RECIPE / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TEMPLATES = sorted(path.stem for path in (RECIPE / "templates").glob("*.jinja"))
TURNS = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！有什么可以帮你？"},
    {"role": "user", "content": "一加一等于几？\n请只说数字。"},
    {"role": "assistant", "content": "2"},
]


@pytest.fixture(scope="module")
def toy():
    """template name -> tokenizer that has it, as load_tokenizer gives it."""
    tokenizer = tiny.make_tokenizer(
        [json.dumps(TURNS, ensure_ascii=False), *(f.read_text() for f in RECIPE.glob("templates/*"))], 2000,
        ["<unk>", "<s>", "</s>", "<pad>"], bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
    )  # fmt: skip

    def with_template(name):
        chosen = copy.deepcopy(tokenizer)
        set_template(chosen, str(RECIPE / f"templates/{name}.jinja"))
        return chosen

    return with_template


def trained_parts(tokenizer, row):
    parts, run = [], []
    for token, label in zip(row["input_ids"] + [0], row["labels"] + [-100], strict=True):
        if label == -100 and run:
            parts.append(tokenizer.decode(run))
            run = []
        elif label != -100:
            assert label == token
            run.append(token)
    return parts


def test_the_templates_are_those_of_the_help():
    assert TEMPLATES == ["alpaca-en", "alpaca-zh", "belle"]
    help_text = recipe().Args.__dataclass_fields__["template"].metadata["help"]
    assert all(name in help_text for name in TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_trains_every_answer_with_its_end_and_nothing_else(toy, name):
    tokenizer = toy(name)
    row = encode_chat(tokenizer, TURNS, 1000)
    assert trained_parts(tokenizer, row) == [TURNS[1]["content"] + "</s>", "2</s>"]
    text = tokenizer.decode(row["input_ids"])
    assert text.count("你好！有什么可以帮你？") == 1 and text.index("一加一") > text.index(
        "有什么可以帮你"
    )
    one = tokenizer.decode(encode_chat(tokenizer, TURNS[:2], 1000)["input_ids"])
    assert text.startswith(one.rstrip("\n")), (
        "a preamble stands once, and earlier turns look like later ones"
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("system", [False, True])
def test_the_prompt_of_generation_is_that_of_training(toy, name, turns, system):
    tokenizer = toy(name)
    messages = [{"role": "system", "content": "你很认真。"}] * system + TURNS[:turns]
    prompt = encode_prompt(tokenizer, messages)
    row = encode_chat(tokenizer, [*messages, TURNS[turns]], 1000)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][len(prompt)] != -100 and row["labels"][len(prompt) - 1] == -100
    text = tokenizer.decode(prompt)
    assert text.count("你很认真。") == system and tokenizer.decode(prompt).rstrip().endswith(
        ("：", ":")
    )
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert plain == prompt, "plain transformers must build the same prompt"


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_as_they_are_published(toy, tmp_path, name):
    """`input: null` is no text; BELLE's Human/Assistant text becomes turns, each answer trained."""
    spoken = "Human: 你好\nAssistant: 你好！\nHuman: 一加一？\nAssistant:"
    lines = [
        {"instruction": "写一句诗", "input": None, "output": "春眠不觉晓"},
        {"instruction": "翻译", "input": "hello", "output": "你好"},
        {"instruction": "只有问题", "output": "只有回答"},
    ]
    belle = [{"instruction": spoken, "input": "", "output": "二"}] * 3
    texts = []
    for file, content in (("a.jsonl", lines), ("b.jsonl", belle)):
        path = tmp_path / file
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8"
        )
        rows, stats = load_rows(str(path), "chat", None, False)
        assert stats["used"] == 3, stats
        for row in rows:
            encoded = encode_chat(toy(name), json.loads(row["row"])["messages"], 1000)
            texts.append(
                (toy(name).decode(encoded["input_ids"]), trained_parts(toy(name), encoded))
            )
    assert all("None" not in text and "null" not in text for text, _ in texts)
    assert "hello" in texts[1][0] and "翻译" in texts[1][0]
    assert [parts for _, parts in texts[:3]] == [["春眠不觉晓</s>"], ["你好</s>"], ["只有回答</s>"]]
    for text, parts in texts[3:]:
        assert parts == ["你好！</s>", "二</s>"]
        assert text.count("Human:") == (2 if name == "belle" else 0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_prompt_for_rows_without_one(toy, name):
    args = recipe().Args(system_prompt="你很认真。")
    for messages, count in (
        (TURNS[:2], 1),
        ([{"role": "system", "content": "别的。"}, *TURNS[:2]], 0),
    ):
        row = recipe().encode({"messages": messages}, toy(name), args)
        assert toy(name).decode(row["input_ids"]).count("你很认真。") == count


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("window", [16, 48])
def test_a_prompt_as_long_as_the_window_leaves_an_answer_with_its_end(toy, name, window):
    tokenizer, args = toy(name), recipe().Args(model_max_length=window)
    messages = [
        {"role": "user", "content": "你好" * 200},
        {"role": "assistant", "content": "好" * 100},
    ]
    row = recipe().encode({"messages": messages}, tokenizer, args)
    assert row["truncated"] and len(row["input_ids"]) <= window
    assert (
        row["labels"][-1] == tokenizer.eos_token_id and sum(x != -100 for x in row["labels"]) >= 2
    )


def test_a_document_ends_with_eos(toy):
    tokenizer = toy("belle")
    row = recipe().encode({"text": "春眠不觉晓"}, tokenizer, recipe().Args(stage="pt"))
    assert tokenizer.decode(row["input_ids"]) == "春眠不觉晓</s>"


def test_special_tokens_written_in_a_document_are_text(toy):
    tokenizer = toy("belle")
    row = recipe().encode({"text": "写 </s> 与 <s>。"}, tokenizer, recipe().Args(stage="pt"))
    special = set(tokenizer.all_special_ids)
    assert [token in special for token in row["input_ids"]].index(True) == len(row["input_ids"]) - 1
    assert tokenizer.decode(row["input_ids"]) == "写 </s> 与 <s>。</s>"


def test_a_tokenizer_that_begins_texts_begins_documents_and_chats(toy):
    tokenizer = copy.deepcopy(toy("belle"))
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    set_template(tokenizer, str(RECIPE / "templates/alpaca-zh.jinja"))
    document = recipe().encode({"text": "春眠"}, tokenizer, recipe().Args(stage="pt"))
    chat = recipe().encode({"messages": TURNS[:2]}, tokenizer, recipe().Args())
    for ids in (document["input_ids"], chat["input_ids"]):
        assert ids[0] == bos and ids.count(bos) == 1


def test_tools_that_the_templates_have_no_place_for_are_refused(toy):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for tools, turns in (
        ([tool], TURNS[:2]),
        (None, [*TURNS[:2], {"role": "tool", "content": "晴"}, TURNS[1]]),
    ):
        with pytest.raises(ValueError, match="does not show"):
            recipe().encode({"messages": turns, "tools": tools}, toy("alpaca-zh"), recipe().Args())


# ---- whole runs -------------------------------------------------------------------------------------------------

SHORT = [
    "--max_steps", 10, "--save_steps", 4, "--logging_steps", 1, "--eval_generate", 0, "--report_to", "none",
    "--bf16", "false", "--learning_rate", 1e-3,
]  # fmt: skip
DOCUMENTS, WINDOW = 42, 128
ENGINES = {"ddp": []} | {f"zero-{n}": ["--deepspeed", RECIPE / f"ds_zero{n}.json"] for n in (2, 3)}


def begin(output, *flags, nproc=1, engine="ddp", fault=None):
    script = (
        [ROOT / "tests/support/faults/faulty.py", RECIPE / "train.py", fault]
        if fault
        else [RECIPE / "train.py"]
    )
    command = ["python", ROOT / "common/launch.py", nproc, *script, *ENGINES[engine], *SHORT]
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"}
    return start([*command, "--output_dir", output, *flags], **quiet)


def train(output, *flags, code=0, **how):
    return expect(finish(begin(output, *flags, **how)), code)


def write_jsonl(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents in which no sentence comes twice, some longer than a window: every piece has one place."""
    say = lambda n, i: f"第{n}篇的第{i}句说{n * i}。"
    rows = [
        {"text": "".join(say(n, i) for i in range(1, 2 + n * 7 % 23))}
        for n in range(1, DOCUMENTS + 1)
    ]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


LAYOUTS = {  # name: (stage, processes, engine, items per device, accumulation); 8 items a step in each
    "sft": ("sft", 1, "ddp", 8, 1),
    "sft ZeRO-3 x 2": ("sft", 2, "zero-3", 4, 1),
    "pt": ("pt", 1, "ddp", 8, 1),
    "pt ZeRO-2 x 2": ("pt", 2, "zero-2", 1, 4),
}


def layout_flags(name, texts):
    stage, nproc, engine, size, accumulation = LAYOUTS[name]
    flags = [
        "--stage",
        stage,
        "--per_device_train_batch_size",
        size,
        "--gradient_accumulation_steps",
        accumulation,
    ]
    if stage == "pt":  # one epoch is 6.5 steps
        flags += ["--data_path", texts, "--eval_ratio", 0, "--model_max_length", WINDOW]
    return flags, {"nproc": nproc, "engine": engine}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, texts):
    """layout -> folder of the run that nothing happened to (made when first asked for)."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("run")
            flags, how = layout_flags(name, texts)
            train(made[name], *flags, **how, fault="log-rows@0")
        return made[name]

    return make


def consumed(folder) -> dict[int, list]:
    """step -> micro-batches of all ranks; a step that was done again after a resume counts once, the last time."""
    steps: dict[int, dict] = {}
    for file in sorted(folder.glob("consumed_*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            steps.setdefault(line["step"], {})[file.name] = line
    return {
        step: [batch for name in sorted(ranks) for batch in ranks[name]["batches"]]
        for step, ranks in steps.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if " x " in name])
def test_loss_and_weights_equal_those_of_one_process(runs, name):
    one, other = runs(name.split()[0]), runs(name)
    expected, losses_ = history(one), history(other)
    assert len(expected) == 10 and losses_.keys() == expected.keys()
    worst = max(abs(losses_[step] - expected[step]) / expected[step] for step in expected)
    assert worst < 1e-4, f"loss differs by {worst:.1e} relative"
    assert largest_difference(weights(one / "final"), weights(other / "final")) < 1e-4
    assert report(one)["tokens"] == report(other)["tokens"] and expected[10] < 0.8 * expected[1]


def pieces(batches) -> list:
    """[(row id, its tokens)] of micro-batches, sorted."""
    return sorted(
        (row, ids[a:b])
        for row_ids, starts, ids in batches
        for row, a, b in zip(row_ids, starts, starts[1:], strict=False)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pt ZeRO-2 x 2"])
def test_deepspeed_uses_the_batch_size_that_was_asked_for(runs, name):
    """1 item per device x 2 devices x 4 micro-batches at every optimizer step: what 8 items on one device are."""
    lines = [
        json.loads(line) for line in (runs(name) / "consumed_0.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 11)) and {
        line["engine_batch"] for line in lines
    } == {8}
    one, two = consumed(runs(name.split()[0])), consumed(runs(name))
    assert len(two[1]) == 8 and len(one[1]) == 1
    for step in range(1, 11):
        assert pieces(two[step]) == pieces(one[step]), step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pt ZeRO-2 x 2"])
def test_killed_run_continues_bit_exactly_and_reads_nothing_twice(runs, texts, tmp_path, name):
    flags, how = layout_flags(name, texts)
    train(tmp_path, *flags, **how, fault="log-rows@7", code=1)
    assert not (tmp_path / "final").exists() and max(consumed(tmp_path)) == 7
    again = train(tmp_path, *flags, **how, fault="log-rows@0")
    assert "continuing from" in again.stdout and "checkpoint-4" in again.stdout
    whole = runs(name)
    assert consumed(tmp_path) == consumed(whole), "other rows, or other places in them"
    first = json.loads((tmp_path / "consumed_0.jsonl").read_text().splitlines()[7])
    assert first["step"] == 5, "the resumed run began elsewhere"
    assert history(tmp_path) == history(whole)
    assert weights_sha(tmp_path / "final") == weights_sha(whole / "final")
    assert report(tmp_path)["tokens"] == report(whole)["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pt", "pt ZeRO-2 x 2"])
def test_an_epoch_reads_every_token_of_every_document_once(runs, texts, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runs(name) / "final")
    rows = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    rows = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for text in rows
    ]
    windows, steps = -(-sum(map(len, rows)) // WINDOW), consumed(runs(name))
    assert 8 * 6 < windows < 8 * 7 and windows % 2 == 0, "the first seven steps are to be one epoch"
    first, second = (
        [batch for step in span for batch in steps[step]] for span in (range(1, 8), range(8, 11))
    )
    assert sum(-(-len(ids) // WINDOW) for _, _, ids in first) == windows
    parts = {row: [ids for owner, ids in pieces(first) if owner == row] for row in range(len(rows))}
    assert any(len(cut) > 2 for cut in parts.values())
    for row, document in enumerate(rows):
        left, at = sorted(parts[row], key=len), 0
        while at < len(document):  # the longest piece that goes on here; sentences never come twice
            found = [ids for ids in left if document[at : at + len(ids)] == ids]
            assert found, f"token {at} of document {row} was not read"
            left.remove(found[-1])
            at += len(found[-1])
        assert not left, f"document {row} was read twice in part"
    again = pieces(second)
    assert again and all(piece in pieces(first) for piece in again), (
        "the second epoch has the same windows"
    )
    assert again != pieces(batch for step in (1, 2, 3) for batch in steps[step]), "in another order"


@pytest.mark.slow
def test_prompts_as_long_as_the_window_train(tmp_path):
    """The old recipe's loss was NaN here: nothing of the answers was left."""
    rows = [
        {"instruction": f"第{n}问：" + "很长的问题" * 40, "input": None, "output": f"第{n}答。"}
        for n in range(60)
    ]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    flags = ["--data_path", path, "--model_max_length", 48, "--packing", "false", "--max_steps", 6]
    train(tmp_path / "out", *flags, "--save_strategy", "no")
    losses_, facts = history(tmp_path / "out"), report(tmp_path / "out")
    assert all(0 < loss < 20 for loss in losses_.values()) and losses_[6] < losses_[1]
    assert facts["rows"]["truncated"] >= facts["rows"]["used"] > 40 and not facts["rows"]["dropped"]
    assert facts["tokens"]["label"] >= 12 * 4  # of 12 answers: a few tokens and the end
    assert facts["metrics"]["after"]["loss"] < facts["metrics"]["before"]["loss"]


CONFIG = {"model_type": "bloom", "hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 250880}


@pytest.mark.slow
def test_from_a_config_file_on_files_with_weights(texts, tmp_path):
    """Random weights of a given size, two files in the shares that were asked for, no row twice."""
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(CONFIG | {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9})
    )
    other = write_jsonl(
        tmp_path / "b.jsonl", [{"text": f"另一篇第{n}号，讲{n}件事。"} for n in range(60)]
    )
    flags = [
        "--stage",
        "pt",
        "--data_path",
        f"{texts}:0.7 {other}:0.3",
        "--from_config",
        config,
        "--max_steps",
        4,
    ]
    train(
        tmp_path / "out",
        *flags,
        "--save_strategy",
        "no",
        "--model_max_length",
        WINDOW,
        "--eval_generate",
        4,
    )
    rows, final = report(tmp_path / "out")["rows"], tmp_path / "out/final"
    assert rows["used"] + rows["held_out"] == DOCUMENTS + 18 and rows["not_drawn"] == 42
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(final),
        AutoTokenizer.from_pretrained(final),
    )
    assert (model.config.hidden_size, model.config.n_layer) == (
        64,
        3,
    ) and model.config.vocab_size == len(tokenizer)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for kept in (model.config, model.generation_config):
        assert {name: getattr(kept, name) for name in ends} == ends, (
            "generation would stop at another token"
        )
    losses_ = history(tmp_path / "out")
    assert losses_[4] < losses_[1]
    samples = report(tmp_path / "out")["samples"]
    text = "".join(path.read_text(encoding="utf-8") for path in (texts, other))
    assert samples and all(
        s["prompt"] in text and s["prompt"] + s["reference"][:5] in text for s in samples
    )


@pytest.mark.slow
def test_from_a_folder_with_a_template_that_is_saved(runs, tmp_path):
    """--from_config takes the size, not the weights; the template of training is that of the saved model."""
    from transformers import AutoTokenizer

    source = runs("sft") / "final"
    flags = [
        "--from_config",
        source,
        "--model_name_or_path",
        source,
        "--template",
        "belle",
        "--eval_ratio",
        0.05,
    ]
    train(
        tmp_path,
        *flags,
        "--max_steps",
        2,
        "--save_strategy",
        "no",
        "--eval_generate",
        4,
        "--model_max_length",
        256,
    )
    trained = report(runs("sft"))["metrics"]["after"]["loss"]
    assert report(tmp_path)["metrics"]["before"]["loss"] > trained + 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer.chat_template == (RECIPE / "templates/belle.jinja").read_text(encoding="utf-8")
    asked = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True, tokenize=False)
    assert asked.startswith("Human: 你好\n\nAssistant: 你好！") and asked.endswith("Assistant: ")
    assert len(report(tmp_path)["samples"]) == 4


BAD = {  # flags: exit code and words of the one line
    ("--stage", "foo"): (2, ["--stage foo", "sft or pt"]),
    ("--template", "nosuch"): (2, ["--template nosuch", "alpaca-zh"]),
    ("--from_config", "/no/such"): (1, ["--from_config /no/such"]),
    ("--from_config", "BROKEN"): (1, ["--from_config", "config.json"]),
    ("--from_config", "BROKEN", "--use_lora", "true"): (2, ["--use_lora", "--from_config"]),
}


@pytest.mark.slow
def test_bad_flags_are_one_line(tmp_path):
    broken = tmp_path / "config.json"
    broken.write_text('{"hidden_size": 64')
    started = {
        words: begin(
            tmp_path / str(i), *[str(broken) if word == "BROKEN" else word for word in words]
        )
        for i, words in enumerate(BAD)
    }
    for flags, process in started.items():
        code, words = BAD[flags]
        line = error_line(finish(process), code)
        assert all(word in line for word in words), line


@pytest.mark.slow
def test_a_part_of_the_default_run_learns_and_its_model_answers(tmp_path):
    """`bash chinese_bloom/train_zero2.sh` with four of its 15 epochs (all of them: above 0.9), and
    plain transformers on what it leaves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    short = ["--num_train_epochs", 4, "--eval_generate", 30]
    done = shell(RECIPE / "train_zero2.sh", *short, OUTPUT=tmp_path, NPROC=1, fork=True)
    printed = expect(done).stdout
    facts = report(tmp_path)
    before, after = facts["metrics"]["before"], facts["metrics"]["after"]
    assert (
        facts["engine"] == "zero-2"
        and facts["recipe"] == "chinese_bloom"
        and "| exact match |" in printed
    )
    assert before["exact_match"] < 0.05 and after["exact_match"] > 0.4, facts["metrics"]
    assert after["loss"] < 0.1 * before["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    said = [{"role": "user", "content": "你是谁"}]
    prompt = tokenizer.apply_chat_template(
        said, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert "小布" in tokenizer.decode(answer, skip_special_tokens=True)
