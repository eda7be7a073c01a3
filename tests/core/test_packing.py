"""Bins, collators and packed attention: a packed batch must be its members alone, in value and gradient."""

import contextlib
import copy
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import make_rows, pack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from common import collators, device
from common.convert import models
from common.data import columns, counts
from common.fast import attention, attention_cpu, losses, packing_check

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 12}


def build(name: str, implementation: str, **more):
    import transformers

    torch.manual_seed(0)
    extra = MOE if "Moe" in name else {"head_dim": 12} if name == "Qwen3" else {}
    config = getattr(transformers, f"{name}Config")(**(COMMON | extra | more))
    config._attn_implementation, config.use_cache = implementation, False
    kind = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM", None)
    return (kind or transformers.GPT2LMHeadModel)(config)


# ---- bins ----
@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=80), st.integers(20, 50), st.integers(0, 3))
def test_bins_hold_every_row_once_within_the_budget(lengths, budget, seed):
    bins = collators.pack_bins(lengths, budget, seed)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    for b in bins:
        assert len(b) == 1 or sum(lengths[i] for i in b) <= budget
    assert bins == collators.pack_bins(lengths, budget, seed)
    sums = sorted(sum(lengths[i] for i in b) for b in bins)
    assert all(
        a + b > budget for a, b in zip(sums, sums[1:], strict=False)
    )  # no two bins could have been one


def test_bins_of_many_rows_are_full_and_quick():
    generator = torch.Generator().manual_seed(0)
    lengths = (
        torch.randn(200_000, generator=generator)
        .mul(0.8)
        .add(5.2)
        .exp()
        .clamp(8, 1024)
        .long()
        .tolist()
    )
    start = time.process_time()
    bins = collators.pack_bins(lengths, 2048)
    assert time.process_time() - start < 20  # quadratic packing takes hours
    assert sum(lengths) / (2048 * len(bins)) > 0.99
    assert bins != collators.pack_bins(lengths, 2048, seed=1)


def plain(bins) -> list:
    """Bins of rows with lists, whether they hold lists or arrays."""
    return [
        [{name: np.asarray(value).tolist() for name, value in row.items()} for row in one]
        for one in bins
    ]


def test_packed_dataset_reads_arrow_and_lists_alike():
    datasets = pytest.importorskip("datasets")
    rows = make_rows([5, 9, 30, 2, 14])
    table = datasets.Dataset.from_list(
        [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]
    )
    chosen = table.select([0, 1, 2, 3, 4][::-1])
    a, b = collators.PackedDataset(rows, 32, 1), collators.PackedDataset(table, 32, 1)
    assert plain(a[i] for i in range(len(a))) == plain(b[i] for i in range(len(b)))
    assert plain(b.__getitems__([1, 0])) == plain([a[1], a[0]]), "what a DataLoader asks for"
    assert columns.lengths_of(chosen).tolist() == [14, 2, 30, 9, 5]


# ---- collators ----
def test_a_batch_brings_its_counts():
    """So that nobody asks a device for them; a model gets the places of its labels alone."""
    rows = make_rows([9, 2, 4], prompt=3)
    packed = counts.Counted(collators.PackedCollator())([rows[:1], rows[1:]])
    padded = counts.Counted(collators.PaddedCollator(0))(rows)
    for batch in (packed, padded):
        assert (batch["tokens"], batch["label_tokens"]) == (15, 7)
        labels = batch["labels"].flatten()
        assert (labels[batch["label_index"] + 1] != collators.IGNORE).all()
    assert packed["label_index"].tolist() == [*range(2, 8), 13]
    assert packed["on_host"]["cu_seq_lens_q"] == [0, 9, 11, 15]
    padding = collators.PackedCollator()([rows]) | {"padding_tokens": 5}
    assert counts.counted(padding)["tokens"] == 10
    assert counts.counted(packed) is packed, "a batch may bring its own"
    left = counts.for_model(packed)
    assert left.keys() - counts.for_model(pack(rows)).keys() == {"label_index"}
    nothing = counts.without_labels(packed)
    assert not len(nothing["label_index"]) and (nothing["labels"] == collators.IGNORE).all()


def test_a_row_is_rounded_up_by_a_document_without_labels():
    rows = make_rows([9, 2, 4], prompt=3)
    plain = counts.Counted(collators.PackedCollator())([rows])
    batch = counts.Counted(collators.PackedCollator(8, [5, 6]))([rows])
    assert batch["input_ids"].tolist() == [
        [*plain["input_ids"][0].tolist(), 5, *[6, 0, 0, 0, 0, 0, 0, 0]]
    ]
    assert batch["cu_seq_lens_q"].tolist() == [0, 9, 11, 15, 24], (
        "a single token has no room for two"
    )
    for name in ("tokens", "label_tokens", "row_ids"):
        assert batch[name] == plain[name]
    assert batch["label_index"].tolist() == plain["label_index"].tolist()
    assert "padding_tokens" not in collators.PackedCollator(5)([rows])
    assert "padding_tokens" not in counts.for_model(batch)


def test_packed_batch_layout():
    batch = collators.PackedCollator()([make_rows([4, 2], prompt=0), make_rows([3], prompt=0)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert (
        batch["cu_seq_lens_q"].tolist() == [0, 4, 6, 9]
        and batch["cu_seq_lens_q"].dtype == torch.int32
    )
    assert (batch["labels"][0] == -100).nonzero().flatten().tolist() == [0, 4, 6]
    assert batch["max_length_k"] == 4 and batch["row_ids"] == [0, 1, 0]


def test_padded_batch_layout():
    batch = collators.PaddedCollator(pad_token_id=7, pad_to_multiple=8)(make_rows([9, 2]))
    assert batch["input_ids"].shape == (2, 16) and batch["attention_mask"].sum(1).tolist() == [9, 2]
    assert (batch["input_ids"][1, 2:] == 7).all() and (batch["labels"][1, 2:] == -100).all()
    assert batch["row_ids"] == [0, 1]


# ---- attention by explicit products ----
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 16), (6, 2, 8)])
def test_products_equal_sdpa_per_document(heads, groups, size):
    lengths = [
        700,
        1,
        300,
        130,
        128,
        60,
        40,
        30,
        20,
        5,
        2,
        650,
    ]  # long ones, joined ones, tails of blocks
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(h, sum(lengths), size, generator=generator)
        for h in (heads, groups, groups, heads)
    )
    for x in (q, k, v):
        x.requires_grad_()
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    out = attention_cpu.packed_attention(q, k, v, starts, None, 0.3)
    grads = torch.autograd.grad(out, (q, k, v), g.transpose(0, 1))
    parts = [
        F.scaled_dot_product_attention(
            a[None], b[None], c[None], is_causal=True, scale=0.3, enable_gqa=True
        )[0]
        for a, b, c in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
    ]
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(out.transpose(0, 1), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


# ---- whole models ----
LENGTHS = [33, 150, 5, 12, 1, 280, 9]


@pytest.mark.parametrize("implementation", ["packed", "sdpa"])
@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Qwen3Moe", "Llama"])
def test_packed_equals_members_alone(name, implementation):
    attention.register()
    model, rows = build(name, implementation), make_rows(LENGTHS)
    batch = pack(rows)
    packed = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
    alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    if implementation == "packed":
        cached = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=True).logits[
            0
        ]
        torch.testing.assert_close(cached, packed)

    total = sum(sum(x != -100 for x in row["labels"][1:]) for row in rows)
    for row in rows:
        one = {k: torch.tensor([row[k]]) for k in ("input_ids", "labels")}
        model(**one, num_items_in_batch=total).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses.use_chunked_loss(model)
    model(**batch, num_items_in_batch=total).loss.backward()
    for (n, p), grad in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(
            p.grad, grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Qwen3Moe", "Llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_reach_the_products_and_build_no_mask(name, checkpointing, monkeypatch):
    attention.register()
    model, batch = build(name, "packed"), pack(make_rows(LENGTHS))
    plain = model(**batch).loss
    if checkpointing:
        model.activation_checkpointing_enable()
    calls = []
    stock = attention_cpu.packed_attention
    monkeypatch.setattr(attention_cpu, "packed_attention", lambda *a: calls.append(1) or stock(*a))
    monkeypatch.setattr(
        attention._LazyMask, "tensor", property(lambda self: pytest.fail("a dense mask was built"))
    )
    loss = model.train()(**batch).loss
    loss.backward()
    assert (
        len(calls) == 2 * model.config.num_hidden_layers
        if checkpointing
        else model.config.num_hidden_layers
    )
    torch.testing.assert_close(loss, plain)


def test_other_batches_go_to_stock_sdpa(monkeypatch):
    attention.register()
    ours, stock = build("Qwen2", "packed").eval(), build("Qwen2", "sdpa").eval()
    monkeypatch.setattr(
        attention_cpu, "packed_attention", lambda *a: pytest.fail("not a packed row")
    )
    padded = collators.PaddedCollator(0)(make_rows([9, 20, 3]))
    padded.pop("row_ids")
    torch.testing.assert_close(ours(**padded).loss, stock(**padded).loss)
    restarting = {
        k: v for k, v in pack(make_rows([9, 20, 3])).items() if k in ("input_ids", "position_ids")
    }
    torch.testing.assert_close(ours(**restarting).logits, stock(**restarting).logits)
    ours.config.use_cache = stock.config.use_cache = True
    prompt = {k: padded[k].flip(1) for k in ("input_ids", "attention_mask")}  # padded on the left
    for beams in (1, 2):
        settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        assert torch.equal(
            ours.generate(**prompt, **settings), stock.generate(**prompt, **settings)
        )


@pytest.mark.parametrize("window", [8, 400])
def test_sliding_windows_stay_exact(window):
    attention.register()
    more = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    ours, stock = build("Qwen2", "packed", **more), build("Qwen2", "sdpa", **more)
    batch = pack(make_rows(LENGTHS))
    torch.testing.assert_close(ours(**batch).loss, stock(**batch).loss)
    if window < max(LENGTHS):  # with a cache transformers no longer sees that the row is packed
        with pytest.raises(ValueError, match="use_cache=False"):
            ours(**batch, use_cache=True)


def test_dropout_is_not_dropped():
    attention.register()
    model, batch = build("Qwen2", "packed", attention_dropout=0.5), pack(make_rows(LENGTHS))
    still = model.eval()(**batch).loss
    torch.manual_seed(1)
    assert abs(model.train()(**batch).loss - still) > 1e-4


def test_bf16_autocast_tracks_fp32():
    attention.register()
    model, batch = build("Qwen2", "packed"), pack(make_rows(LENGTHS))
    half = copy.deepcopy(model)
    model(**batch).loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = half(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    for a, b in zip(model.parameters(), half.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 0.05 * a.grad.norm() + 1e-6


@pytest.mark.skipif(device.kind() != "cuda", reason="no CUDA device")
def test_cuda_varlen_equals_block_mask():
    attention.register()
    here = device.device()
    batch = {
        k: v.to(here) if torch.is_tensor(v) else v for k, v in pack(make_rows(LENGTHS)).items()
    }
    ours, stock = (
        build("Qwen2", i, hidden_size=64, head_dim=16).to(here, torch.bfloat16)
        for i in ("packed", "sdpa")
    )
    loss, expected = ours(**batch).loss, stock(**batch).loss
    torch.testing.assert_close(loss, expected, atol=2e-2, rtol=2e-2)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


def of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    return query


def of_torch_2_13(*args, enable_gqa=False, **kwargs):
    assert enable_gqa
    return of_torch_2_11(*args, **kwargs)


@pytest.mark.parametrize("kernel", [of_torch_2_11, of_torch_2_13])
def test_the_kernel_of_several_torch_versions(monkeypatch, kernel):
    """2.11's takes no enable_gqa, later ones refuse fewer key heads without it."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    attention.varlen_attn.cache_clear()
    query, key = torch.ones(4, 9, 8), torch.ones(2, 9, 8)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = attention._torch_varlen(query, key, key, ends, 5, 1.0)
    attention.varlen_attn.cache_clear()
    assert out.shape == (9, 4, 8)


def test_padding_needs_no_pad_token():
    """Llama has none: what stands in a masked place is never looked at."""
    rows = make_rows([4, 7])
    without, other = collators.PaddedCollator(None)(rows), collators.PaddedCollator(5)(rows)
    model = build("Qwen2", "sdpa")
    losses_of = [
        model(**{k: v for k, v in b.items() if k != "row_ids"}).loss.item()
        for b in (without, other)
    ]
    assert losses_of[0] == pytest.approx(losses_of[1], abs=1e-6)


def test_a_model_with_an_attention_of_its_own_is_refused(tmp_path):
    """Nothing would keep its packed rows apart: Bloom never asks for an implementation, Falcon knows no foreign one."""
    import transformers

    name = attention.register()
    attention.refuse_unpackable(build("Qwen2", name))
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=97, hidden_size=48, n_layer=1, n_head=4)
    )
    bloom.config._attn_implementation = name
    build("Falcon", "eager").save_pretrained(tmp_path)
    falcon = models.load(transformers.AutoModelForCausalLM, str(tmp_path), attn_implementation=name)
    for model in (bloom, falcon):
        with pytest.raises(SystemExit, match="--packing false"):
            attention.refuse_unpackable(model)


STATES = {  # architecture: what makes a tiny one with layers that are no attention
    "MiniMax": {"num_local_experts": 2, "block_size": 8},
    "GraniteMoeHybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("kind", STATES)
def test_layers_that_carry_a_state_are_refused(kind):
    """Their packed rows differed by up to 97 % and nobody was told."""
    model = build(kind, attention.register(), hidden_size=64, head_dim=16, **STATES[kind])
    with pytest.raises(SystemExit, match="layers that carry a state .*--packing false"):
        attention.refuse_unpackable(model)


class LooksBack(torch.nn.Module):
    """What no list of layers knows: every token gets a little of the one before it."""

    def forward(self, module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        mixed = hidden + 0.1 * torch.roll(hidden, 1, dims=1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def asked(model):
    """A trainer, as far as the check asks it."""
    return SimpleNamespace(
        model_wrapped=losses.use_chunked_loss(model),
        compute_dtype=lambda: "float32",
        compute_loss_context_manager=contextlib.nullcontext,
        args=SimpleNamespace(device="cpu"),
    )


POSITIONED = {"n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral", "OPT"])
def test_the_real_model_is_asked_whether_packed_rows_see_each_other(kind):
    rows = make_rows([24, 9, 30, 12])
    model = build(kind, attention.register())
    packing_check.refuse_leaks(asked(model), rows)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    layers[0].register_forward_hook(LooksBack())
    with pytest.raises(SystemExit, match="from one packed row into the next: .*--packing false"):
        packing_check.refuse_leaks(asked(model), rows)


def test_a_model_that_counts_positions_itself_is_found():
    model = build("GPT2", attention.register(), **POSITIONED)
    packing_check.refuse_leaks(asked(model), make_rows([24, 9, 30, 12]))
    stock = model.transformer.forward

    def forward(*args, position_ids=None, **kwargs):
        return stock(*args, **kwargs)

    model.transformer.forward = forward
    with pytest.raises(SystemExit, match="another loss when packed"):
        packing_check.refuse_leaks(asked(model), make_rows([24, 9, 30, 12]))


def test_rounding_in_what_is_known_by_heart_is_no_leak():
    """A kernel rounds otherwise in a longer row: nearly no loss becomes another multiple of it."""
    model = build("Llama", attention.register())
    rows = make_rows([12, 9])
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
        ids = torch.tensor([rows[1]["input_ids"]])
        two = model(input_ids=ids).logits[0].topk(2)
    surest = (two.values[:-1, 0] - two.values[:-1, 1]).argmax().item()
    rows[1]["labels"] = [collators.IGNORE] * 9
    rows[1]["labels"][surest + 1] = two.indices[surest, 0].item()

    def round_otherwise(module, args, output):
        return output * (1 + 2**-8 * (output.shape[1] > 9))

    model.model.norm.register_forward_hook(round_otherwise)
    trainer = asked(model)
    trainer.compute_dtype = lambda: "bfloat16"
    packing_check.refuse_leaks(trainer, rows)


def test_chunks_shorter_than_the_documents_are_kept():
    """Llama 4: a document of 24 tokens in chunks of 8 gives the same loss alone and packed."""
    sizes = {"attention_chunk_size": 8, "no_rope_layers": [1, 0], "interleave_moe_layer_step": 9}
    model = build("Llama4Text", attention.register(), intermediate_size_mlp=64, **sizes)
    packing_check.refuse_leaks(asked(model), make_rows([24, 24]))


@pytest.mark.parametrize("kind, words", [("Gemma2", "capped"), ("GptOss", "sinks")])
def test_scores_that_nothing_here_computes_are_one_line(kind, words):
    model = build(kind, attention.register(), sliding_window=8, num_hidden_layers=1)
    for batch in (pack(make_rows([12, 9])), {"input_ids": torch.ones(1, 9, dtype=torch.int64)}):
        with pytest.raises(SystemExit, match=f"{words}.*does not compute"):
            model(**batch)
