"""baichuan2_dpo's training: batches in which a pair shares its prompt, log-probs, rows, reference modes, whole runs.

Its model, tokenizer and converter: test_baichuan.py; the page: test_baichuan_app.py.
"""

import functools
import json
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import (
    ROOT,
    expect,
    finish,
    largest_difference,
    own_modules,
    report,
    shell,
    start,
    weights,
    weights_sha,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from row_shapes import PAIRS
from test_baichuan import (  # noqa: F401  (two are fixtures)
    ASSISTANT,
    CHATS,
    USER,
    built_by_the_original,
    modeling,
    sentences,
    talk,
)
from test_baichuan import tokenizer as baichuan  # noqa: F401

from common import tiny
from common.data.labels import encode_prompt
from common.data.load import load_rows
from common.data.tokens import tokenise
from common.fast import attention, losses, shared_start, softmax
from common.runs import report as reports

RECIPE = ROOT / "baichuan2_dpo"
METRICS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
           "logps/rejected", "kl")  # fmt: skip


train, preference, pairs, merge, tiny_base = own_modules(
    RECIPE.name,
    "train",
    "preference",
    "pairs",
    "merge",
    "tiny_base",
    modeling_baichuan=modeling,
)


# ---- shared prompts ---------------------------------------------------------------------------------------------

VOCAB = 97
# tokens of prompt, chosen and rejected answer: one token of each, both sides of 128 and 640, neighbours that share a
# block of queries, and prompts that alone are longer than either
SIZES = [(1, 1, 1), (1, 30, 2), (40, 5, 9), (2, 3, 4), (100, 60, 20), (127, 1, 1), (128, 2, 140), (1, 3, 700),
         (600, 39, 41), (650, 10, 3)]  # fmt: skip


def build(name="Llama", implementation=shared_start.NAME, **more):
    import transformers

    shared_start.register()
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    if name == "Bloom":
        sizes |= {
            "n_head": sizes.pop("num_attention_heads"),
            "n_layer": sizes.pop("num_hidden_layers"),
        }
    else:
        sizes |= {
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 2048,
        }
    module = modeling if name == "Baichuan" else transformers
    config = getattr(module, f"{name}Config")(**sizes | {"initializer_range": 0.15} | more)
    config._attn_implementation, config.use_cache = implementation, False
    return getattr(module, f"{name}ForCausalLM")(config)


def make_pairs(sizes=SIZES, seed=0):
    """Token rows as pairs.encode leaves them, with row ids, as arrays."""
    generator, made = np.random.default_rng(seed), []
    for number, (prompt, *answers) in enumerate(sizes):
        asked, pair = generator.integers(3, VOCAB, prompt), {"row_id": number}
        for side, length in zip(("chosen", "rejected"), answers, strict=True):
            said = generator.integers(3, VOCAB, length)
            pair[f"{side}_input_ids"] = np.concatenate([asked, said])
            pair[f"{side}_labels"] = np.concatenate([np.full(prompt, -100), said])
        made.append(pair)
    return made


def collate(made, packing=True, share_prompt=True):
    batch = preference.PairCollator(0, packing, share_prompt)(made)
    batch.pop("row_ids")
    return batch


def token_losses(model, batches):
    """Log-probs of all answer tokens of `batches`, one after another, and gradients of a weighted sum of them."""
    model.zero_grad()
    parts = [losses.answer_logprobs(model, **batch, use_cache=False)[0] for batch in batches]
    found = torch.cat(parts)
    factors = torch.randn(len(found), generator=torch.Generator().manual_seed(1))
    (found * factors).sum().backward()
    return found.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def each_alone(made):
    """A padded batch for each sequence."""
    return [
        {"input_ids": torch.tensor(pair[f"{side}_input_ids"])[None],
         "labels": torch.tensor(pair[f"{side}_labels"])[None]}
        for pair in made for side in ("chosen", "rejected")
    ]  # fmt: skip


def by_full_logits(model, batches):
    """token_losses from the logits of a stock model."""
    model.zero_grad()
    parts = []
    for batch in batches:
        log_p = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        parts.append(log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != -100])
    found = torch.cat(parts)
    factors = torch.randn(len(found), generator=torch.Generator().manual_seed(1))
    (found * factors).sum().backward()
    return found.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(found, wanted, tolerance=1e-5):
    (log_probs, gradients), (expected, slopes) = found, wanted
    assert len(log_probs) == len(expected) > 0
    assert (log_probs - expected).abs().max() < tolerance, "log-probs"
    assert gradients.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert (gradients[name] - slope).abs().max() < tolerance * max(1, slope.abs().max()), name


def test_layout_of_a_shared_prompt():
    made = make_pairs([(3, 2, 4), (1, 1, 2)])
    batch = collate(made)
    first, second = made
    a, b = first["chosen_input_ids"].tolist(), first["rejected_input_ids"].tolist()
    c, d = second["chosen_input_ids"].tolist(), second["rejected_input_ids"].tolist()
    assert batch["input_ids"][0].tolist() == a + b[2:] + c + d
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 0, 1, 0, 1, 2]
    assert (
        batch["labels"][0].tolist()
        == [-100] * 3 + a[3:] + [-100] + b[3:] + [-100] + c[1:] + [-100] + d[1:]
    )
    assert (
        batch["cu_seq_lens_q"].tolist() == [0, 5, 10, 12, 15]
        and batch["cu_seq_lens_q"].dtype == torch.int32
    )
    assert (
        batch["cu_seq_lens_k"].tolist() == [0, 5, 12, 14, 17]
        and batch["cu_seq_lens_k"].dtype == torch.int32
    )
    assert batch["kv_index"].tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert (batch["max_length_q"], batch["max_length_k"]) == (5, 7)


@pytest.mark.parametrize("packing", [True, False])
def test_known_log_probs_come_in_the_order_of_the_labels_and_as_no_floats(packing):
    """DeepSpeed's Trainer rounds every float of a batch to the half dtype that it trains in."""
    made, generator = make_pairs([(3, 2, 4), (1, 1, 2)]), np.random.default_rng(0)
    for pair, tokens in zip(made, (6, 3), strict=True):
        pair["reference"] = generator.normal(size=tokens).astype(np.float32)
    batch = collate(made, packing)
    assert not any(torch.is_tensor(part) and part.is_floating_point() for part in batch.values())
    known = batch["reference_logprobs"].view(torch.float32).numpy()
    assert np.array_equal(known, np.concatenate([pair["reference"] for pair in made]))
    labels = batch["labels"] if not packing else batch["labels"][0]
    assert len(known) == int((labels != -100).sum())


def test_answers_that_begin_alike_share_the_prompt_only():
    made = make_pairs([(4, 6, 6)])
    made[0]["rejected_input_ids"][4:8] = made[0]["chosen_input_ids"][4:8]
    made[0]["rejected_labels"][4:8] = made[0]["chosen_labels"][4:8]
    assert collate(made)["cu_seq_lens_k"].tolist() == [0, 10, 20] and collate(made)[
        "input_ids"
    ].shape == (1, 17)
    model = losses.use_chunked_loss(build())
    assert_equal(token_losses(model, [collate(made)]), token_losses(model, each_alone(made)))


@pytest.mark.parametrize("how", [
    {}, {"name": "Qwen3", "head_dim": 12}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1},
], ids=str)  # fmt: skip
def test_shared_equals_packed_padded_and_each_alone(how):
    model, made = build(**how), make_pairs()
    wanted = by_full_logits(model, each_alone(made))
    losses.use_chunked_loss(model)
    for batch in (collate(made), collate(made, share_prompt=False), collate(made, packing=False)):
        assert_equal(token_losses(model, [batch]), wanted)


@pytest.mark.parametrize("where", ["sequences one by one", "checkpointing"])
def test_shared_prompts_elsewhere(where, monkeypatch):
    """Where no kernel for packed rows runs; and with layers that run again in backward."""
    model, made = losses.use_chunked_loss(build()), make_pairs()
    wanted = token_losses(model, each_alone(made))
    if where == "checkpointing":
        model.train().gradient_checkpointing_enable()
    else:
        calls, stock = [], shared_start.sequence_by_sequence
        monkeypatch.setattr(shared_start, "on_cpu", lambda *a: calls.append(1) or stock(*a))
    assert_equal(token_losses(model, [collate(made)]), wanted)
    assert where == "checkpointing" or len(calls) == 2


def test_shared_prompts_under_lora_and_autocast():
    from peft import LoraConfig, get_peft_model

    model, made = losses.use_chunked_loss(build()), make_pairs()
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
    )
    model = get_peft_model(model, settings)
    assert_equal(token_losses(model, [collate(made)]), token_losses(model, each_alone(made)))
    exact = token_losses(model, [collate(made)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = token_losses(model, [collate(made)])
    assert half[0].dtype == torch.float32 and (half[0] - exact[0]).abs().mean() < 0.03
    for name, slope in exact[1].items():
        assert (half[1][name] - slope).norm() < 0.1 * slope.norm(), name


def dense(cu_seqlens_q, cu_seqlens_k, kv_index):
    """[T, T]: whether the token in a column of the row may look at another, written from the definition."""
    total = int(cu_seqlens_q[-1])
    seen = torch.zeros(total, total, dtype=torch.bool)
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True):
        keys = kv_index[c:d]
        for i in range(a, b):
            seen[i, keys[: len(keys) - (b - 1 - i)]] = True
    return seen


def by_mask(query, key, value, mask, scale):
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (query, key, value)),
        attn_mask=mask,
        scale=scale,
        enable_gqa=len(query[0]) != len(key[0]),
    ).transpose(1, 2)


def through_the_interface(query, key, value, batch, scale):
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "kv_index", "max_length_q", "max_length_k")
    return shared_start.forward(
        None, query, key, value, None, scaling=scale, **{k: batch[k] for k in names}
    )[0]


def check_against_the_mask(sizes, heads, groups, path, monkeypatch=None):
    batch = collate(make_pairs(sizes))
    total, generator = batch["input_ids"].shape[1], torch.Generator().manual_seed(2)
    q, k, v, g = (
        torch.randn(1, h, total, 8, generator=generator) for h in (heads, groups, groups, heads)
    )
    for x in (q, k, v):
        x.requires_grad_()
    mask = dense(
        batch["cu_seq_lens_q"].tolist(), batch["cu_seq_lens_k"].tolist(), batch["kv_index"]
    )
    wanted = by_mask(q, k, v, mask, 0.3)
    slopes = torch.autograd.grad(wanted, (q, k, v), g.transpose(1, 2).double())
    if path == "sequences":
        monkeypatch.setattr(shared_start, "on_cpu", shared_start.sequence_by_sequence)
    found = through_the_interface(q, k, v, batch, 0.3)
    assert (found - wanted).abs().max() < 1e-5
    for a, b in zip(torch.autograd.grad(found, (q, k, v), g.transpose(1, 2)), slopes, strict=True):
        assert (a - b).abs().max() < 3e-5


@pytest.mark.parametrize("path", ["blocks", "sequences"])
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (4, 1)])
def test_shared_keys_equal_a_dense_mask(heads, groups, path, monkeypatch):
    check_against_the_mask(SIZES, heads, groups, path, monkeypatch)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 150)] * 3), min_size=1, max_size=5))
def test_any_lengths_equal_a_dense_mask(sizes):
    check_against_the_mask(sizes, 2, 1, "blocks")


def test_short_pairs_share_a_block():
    """Twenty pairs of a few tokens are a handful of products, not forty."""
    batch = collate(make_pairs([(10, 4, 6)] * 20))
    edges = (tuple(batch[name].tolist()) for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    blocks = shared_start.make_blocks(*edges, 1, torch.float32)
    assert len(blocks) == 5 and [b.end for b in blocks[:-1]] == [b.start for b in blocks[1:]]


def test_a_batch_with_a_filled_cache_or_a_window_does_not_look_too_far():
    """What cannot be computed with a shared prompt is refused, never computed wrongly."""
    batch = collate(make_pairs([(20, 5, 5)]))
    with pytest.raises(ValueError, match="cannot share"):
        build("Mistral", sliding_window=8)(**batch)
    wide = build("Mistral", sliding_window=25)
    assert_equal(
        token_losses(losses.use_chunked_loss(wide), [batch]),
        token_losses(wide, each_alone(make_pairs([(20, 5, 5)]))),
    )


def test_a_model_that_would_take_no_notice_of_shared_prompts_is_refused():
    shared_start.require(build())
    with pytest.raises(ValueError, match=f"need attn_implementation {shared_start.NAME}"):
        shared_start.require(build(implementation=attention.register()))


@pytest.mark.parametrize("name, more", [("Baichuan", {"num_key_value_heads": 4}), ("Bloom", {})])
def test_models_with_an_attention_of_their_own(name, more):
    """ALiBi of Baichuan2-13B packs, each sequence with its prompt; Bloom pads."""
    model, made = (
        build(name, "eager" if name == "Bloom" else shared_start.NAME, **more),
        make_pairs(),
    )
    wanted = by_full_logits(model, each_alone(made))
    losses.use_chunked_loss(model)
    batches = [collate(made, packing=False)]
    if name == "Bloom":
        with pytest.raises(SystemExit, match="--packing false"):
            attention.refuse_unpackable(model)
    else:
        assert model.config._attn_implementation != shared_start.NAME
        attention.refuse_unpackable(model)
        batches.append(collate(made, share_prompt=False))
    for batch in batches:
        assert_equal(token_losses(model, [batch]), wanted, 3e-5)


# ---- log-probs of answers ---------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CPU_ROWS", 16)
    monkeypatch.setattr(softmax, "CACHE_ELEMENTS", 5 * VOCAB)


@pytest.mark.parametrize(
    "head", ["trained", "frozen", "tied", "bias", "frozen bias", "only bias", "normalised"]
)
def test_gradients_of_log_probs_equal_those_of_full_logits(head, small_chunks):
    made = make_pairs([(3, 20, 30), (10, 25, 7)])
    if head == "normalised":
        model = build("Baichuan", num_key_value_heads=4)
    else:
        model = build(tie_word_embeddings=head == "tied")
    if "bias" in head:
        model.lm_head.bias = torch.nn.Parameter(
            torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
        )
    model.lm_head.requires_grad_("frozen" not in head)
    if head == "only bias":
        model.lm_head.weight.requires_grad_(False)
    wanted = by_full_logits(model, each_alone(made))
    assert ("lm_head.weight" in wanted[1]) == (head in ("trained", "bias", "normalised"))
    losses.use_chunked_loss(model)
    assert_equal(token_losses(model, [collate(made, share_prompt=head != "normalised")]), wanted)
    assert_equal(token_losses(model, each_alone(made)), wanted)  # many calls before one backward


@pytest.mark.parametrize("frozen", [True, False])
def test_half_precision_log_probs_are_close_and_fp32(frozen, small_chunks):
    made, model = make_pairs([(3, 20, 30), (10, 25, 7)]), losses.use_chunked_loss(build())
    model.lm_head.requires_grad_(not frozen)
    exact = token_losses(model, [collate(made)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = token_losses(model, [collate(made)])
    assert half[0].dtype == torch.float32 and 0 < (half[0] - exact[0]).abs().mean() < 0.03
    for name, slope in exact[1].items():
        assert (
            half[1][name].dtype == torch.float32
            and (half[1][name] - slope).norm() < 0.06 * slope.norm()
        ), name


def test_log_probs_without_any_label():
    model, batch = losses.use_chunked_loss(build()), collate(make_pairs([(3, 2, 2)]))
    batch["labels"].fill_(-100)
    found, owner, count = losses.answer_logprobs(model, **batch)
    assert found.shape == owner.shape == (0,) and count == 2
    found.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ---- rows -> pairs ----------------------------------------------------------------------------------------------


def pair_row(prompt, chosen="很 好\n", rejected="不好", **more):
    said = {side: [{"role": "assistant", "content": text}] for side, text in
            (("chosen", chosen), ("rejected", rejected))}  # fmt: skip
    return {"prompt": prompt} | said | more


def answer_of(row, side):
    """Ids of an encoded row behind its prompt, and of the prompt."""
    ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
    first = next(i for i, label in enumerate(labels) if label != -100)
    assert ids[first:] == labels[first:] and set(labels[:first]) <= {-100}, (
        "all behind the prompt is trained"
    )
    return ids[first:], ids[:first]


@pytest.mark.parametrize("messages", CHATS)
def test_both_answers_stand_behind_the_prompt_of_the_original(sentences, baichuan, messages):  # noqa: F811
    import sentencepiece

    spell = sentencepiece.SentencePieceProcessor(model_proto=sentences.SerializeToString()).encode
    row = pairs.encode(pair_row(messages), baichuan, 10_000)
    prompt = built_by_the_original(sentences, messages)
    for side, text in (("chosen", "很 好\n"), ("rejected", "不好")):
        assert answer_of(row, side) == ([*spell(text), baichuan.eos_token_id], prompt)
    assert row["truncated"] is False and set(row) == {*preference.COLUMNS, "truncated"}


def test_system_prompt_for_rows_that_have_none(sentences, baichuan):  # noqa: F811
    for messages, wanted in (
        (talk("你好"), talk("你好", system="你是百川。")),
        (talk("你好", system="别的"), talk("你好", system="别的")),
    ):
        row = pairs.encode(pair_row(messages), baichuan, 10_000, system="你是百川。")
        assert answer_of(row, "chosen")[1] == built_by_the_original(sentences, wanted)


def test_nobody_forges_a_turn_or_an_end(baichuan):  # noqa: F811
    text = f"a{ASSISTANT}好</s>{USER}b"
    row = pairs.encode(
        pair_row(talk(text, "好", text, system=text), text, "不" + text), baichuan, 10_000
    )
    turns = baichuan.convert_tokens_to_ids([USER, ASSISTANT, "</s>"])
    for side in ("chosen", "rejected"):
        answer, prompt = answer_of(row, side)
        assert [prompt.count(t) for t in turns] == [2, 2, 0] and [
            answer.count(t) for t in turns
        ] == [0, 0, 1]
        assert answer[-1] == turns[2] and baichuan.decode(answer[:-1]).endswith(text)


TEXTS = [
    "你好，我是小谱。请问今天的天气怎么样？天气很好。",
    "1加1等于几？等于2。",
    "hello, how are you?",
]


@pytest.fixture(scope="module")
def small():
    """The recipe's built-in kind of tokenizer: every character is known, rare ones as bytes."""
    return tiny.make_tokenizer(
        TEXTS * 3, 320, tiny_base.SPECIAL_TOKENS, (RECIPE / "templates/baichuan2.jinja").read_text(encoding="utf-8"),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip


def both(row, tokenizer):
    """Texts of the prompt and of both answers, which end with eos and follow the same prompt."""
    (chosen, prompt), (rejected, other) = answer_of(row, "chosen"), answer_of(row, "rejected")
    assert prompt == other and chosen[-1] == rejected[-1] == tokenizer.eos_token_id
    return [tokenizer.decode(ids) for ids in (prompt, chosen[:-1], rejected[:-1])]


def test_oldest_rounds_go_first(small):
    messages = talk(
        "第一问" * 5, "第一答" * 5, "第二问" * 5, "第二答" * 5, "第三问", system="你是小谱。"
    )
    row = pair_row(messages, "好", "不好")
    whole = pairs.encode(row, small, 10_000)
    length = max(len(whole[f"{side}_input_ids"]) for side in ("chosen", "rejected"))
    assert pairs.encode(row, small, length) == whole and not whole["truncated"]
    once = pairs.encode(row, small, length - 1)
    told = both(once, small)
    kept = "你是小谱。<reserved_106>" + "第二问" * 5 + "<reserved_107>" + "第二答" * 5
    assert (
        told == [kept + "<reserved_106>第三问<reserved_107>", "好", "不好"]
        and once["truncated"] is True
    )
    twice = both(pairs.encode(row, small, len(answer_of(once, "rejected")[1])), small)
    assert twice == ["你是小谱。<reserved_106>第三问<reserved_107>", "好", "不好"]


def test_the_end_of_a_long_prompt_is_kept(small):
    for limit in (32, 47, 64, 100):
        row = pairs.encode(
            pair_row(talk("开头" + "一二三四五六七八九十" * 40 + "结尾"), "好", "不好"),
            small,
            limit,
        )
        prompt, chosen, rejected = both(row, small)
        assert (
            prompt.endswith("八九十结尾<reserved_107>")
            and "开头" not in prompt
            and "\ufffd" not in prompt
        )
        assert (chosen, rejected) == ("好", "不好"), "an answer that fits is whole"
        assert limit - 3 < len(row["rejected_input_ids"]) <= limit and row["truncated"]


def test_long_answers_keep_their_end_token_and_leave_a_quarter_to_the_prompt(small):
    long, limit = "一二三四五六七八九十" * 40, 80
    for chosen, rejected in ((long, "不" + long), (long, "不"), ("好", "不" + long)):
        row = pairs.encode(pair_row(talk(long + "尾"), chosen, rejected), small, limit)
        prompt, *answers = both(row, small)
        assert (
            prompt.endswith("尾<reserved_107>") and "\ufffd" not in prompt + answers[0] + answers[1]
        )
        assert chosen.startswith(answers[0]) and rejected.startswith(answers[1])
        assert answers[0] and answers[1] and (len(chosen) > 1 or answers[0] == chosen)
        lengths = [len(row[f"{side}_input_ids"]) for side in ("chosen", "rejected")]
        assert limit - 4 < max(lengths) <= limit
        assert limit // 4 - 3 < len(answer_of(row, "chosen")[1]) <= limit // 4 and row["truncated"]


@pytest.mark.parametrize("mark", ["字", "é", "👋"])  # 3, 2 and 4 bytes, each of them a token
def test_no_character_is_cut(small, mark):
    assert len(small.encode(mark, add_special_tokens=False)) == len(mark.encode())
    for limit in range(40, 49):
        row = pairs.encode(
            pair_row(talk(mark * 60), "好" + mark * 60, "不" + mark * 70), small, limit
        )
        texts = both(row, small)
        assert "\ufffd" not in "".join(texts), (limit, texts)
        assert all(mark in text for text in texts)


def test_a_pair_that_is_cut_to_the_same_answer_is_no_pair(small):
    """Answers that differ only behind the limit would count as a pair that nobody can get right."""
    row = pair_row(talk("你好"), "天气很好" * 50 + "一", "天气很好" * 50 + "二")
    with pytest.raises(ValueError):
        pairs.encode(row, small, 64)


CHATML = (ROOT / "train_qwen/chat_template.jinja").read_text(encoding="utf-8")
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {}}}
]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"城市": "杭州"}}}]}  # fmt: skip


@pytest.fixture(scope="module")
def chatml():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    return tiny.make_tokenizer(TEXTS * 3, 330, special, CHATML, plain, eos_token="<|im_end|>")


def test_thoughts_of_the_answers_are_trained_earlier_ones_are_dropped(chatml):
    turns = talk("问一", "答一", "问二")
    turns[1]["reasoning_content"] = "旧想法"
    row = pair_row(turns, "好", "不好")
    row["chosen"][0]["reasoning_content"] = "想一想"
    prompt, chosen, rejected = both(pairs.encode(row, chatml, 1000), chatml)
    assert prompt == (
        "<|im_start|>user\n问一<|im_end|>\n<|im_start|>assistant\n答一<|im_end|>\n<|im_start|>user\n问二<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert chosen == "<think>\n想一想\n</think>\n\n好" and rejected == "<think>\n\n</think>\n\n不好"


def test_tool_calls_as_answers_and_in_the_prompt(chatml):
    row = pair_row(talk("杭州天气"), tools=TOOLS) | {"chosen": [CALL]}
    prompt, chosen, rejected = both(pairs.encode(row, chatml, 1000), chatml)
    assert '"name": "weather"' in prompt and prompt.endswith("<|im_start|>assistant\n")
    assert (
        chosen.endswith('{"name": "weather", "arguments": {"城市": "杭州"}}\n</tool_call>')
        and "不好" in rejected
    )
    row["prompt"] += [CALL, {"role": "tool", "content": "晴"}]
    row["chosen"] = [{"role": "assistant", "content": "晴天。"}]
    prompt, chosen, _ = both(pairs.encode(row, chatml, 1000), chatml)
    assert (
        "<tool_response>\n晴\n</tool_response>" in prompt
        and chosen == "<think>\n\n</think>\n\n晴天。"
    )


def test_an_answer_of_several_turns_is_trained_where_the_model_speaks(chatml):
    said = [CALL, {"role": "tool", "content": "晴"}, {"role": "assistant", "content": "晴天。"}]
    row = pairs.encode(pair_row(talk("杭州天气"), tools=TOOLS) | {"chosen": said}, chatml, 1000)
    trained = [i for i in row["chosen_labels"] if i != -100]
    assert chatml.decode(trained).count("<|im_end|>") == 2 and trained[-1] == chatml.eos_token_id
    assert "晴天" in chatml.decode(trained) and "tool_response" not in chatml.decode(trained)


def test_a_row_that_the_template_refuses_is_a_value_error(small):
    with pytest.raises(ValueError, match="tools"):
        pairs.encode(pair_row(talk("你好"), tools=TOOLS), small, 1000)


def write(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("shape", PAIRS)
def test_every_shape_drops_equal_empty_and_strange_pairs(tmp_path, shape):
    good, spelled = PAIRS[shape][1], json.dumps(PAIRS[shape][1], ensure_ascii=False)
    same, empty = (json.loads(spelled.replace("不好", text)) for text in (" 好的　", " "))
    count = {"chosen and rejected are the same": 1}
    rows = [good, good, same, good, empty, good, good]
    if shape in ("hh", "implicit"):  # the prompt stands in both
        rows.append({**good, "rejected": json.loads(spelled.replace("你好", "再见"))["rejected"]})
        count["chosen and rejected answer different prompts"] = 1
    found, stats = load_rows(
        write(tmp_path / "a.jsonl", rows), "preference", cache_dir=tmp_path / "cache"
    )
    reason = (
        "chosen and rejected answer different prompts" if shape == "hh" else "empty answer"
    )  # "Assistant:" ends it
    count[reason] = count.get(reason, 0) + 1
    assert (
        stats["dropped"] == count
        and stats["used"] == len(found) == 5
        and stats["read"] == len(rows)
    )
    assert stats["examples"]["chosen and rejected are the same"].startswith(
        f"{tmp_path / 'a.jsonl'}:3"
    )
    assert stats["examples"][reason].startswith(f"{tmp_path / 'a.jsonl'}:5")


def test_rows_of_the_feedback_page_train(tmp_path, small):
    row = pair_row(talk("你好", "你好。", "天气？"), "天气很好。", "不知道。")
    found, stats = load_rows(
        write(tmp_path / "a.jsonl", [row]), "preference", cache_dir=tmp_path / "cache"
    )
    assert json.loads(found[0]["row"]) == row and not stats["dropped"]
    tokens, _ = tokenise(found, functools.partial(pairs.encode, tokenizer=small, max_length=99), "k",
                              columns=preference.COLUMNS, cache_dir=tmp_path / "cache")  # fmt: skip
    item = preference.Pairs(tokens)[0]
    assert both({k: v.tolist() for k, v in item.items() if k in preference.COLUMNS}, small)[1:] == [
        "天气很好。", "不知道。"
    ]  # fmt: skip


# ---- runs in this process ---------------------------------------------------------------------------------------

QUICK = ["--eval_generate", 0, "--report_to", "none", "--bf16", "false", "--logging_steps", 1, "--save_strategy", "no",
         "--max_steps", 6, "--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 2]  # fmt: skip
SAMPLES = [
    {
        "prompt": f"{n}加一等于几",
        "chosen": f"您好，等于{n + 1}。",
        "rejected": f"等于{n}，别再问了。" + "啊" * (n % 5),
    }
    for n in range(75)
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "pairs.jsonl", SAMPLES)


@pytest.fixture
def cache(monkeypatch, tmp_path_factory):
    """What this module prepares, in a folder of its own; returns that of the reference's log-probs, which is empty."""
    root = tmp_path_factory.getbasetemp() / "dpo-cache"
    monkeypatch.setenv("DANPU_CACHE", str(root))
    shutil.rmtree(root / "reference", ignore_errors=True)
    return root / "reference"


@pytest.fixture
def run(monkeypatch, tmp_path, rows, cache):
    """run(name, *flags) -> the folder that train.py's main leaves, in this process.

    Without pictures, which take as long as the training; those of the default run are looked at.
    """
    monkeypatch.setattr(reports, "plot_curve", lambda *args: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def one(name, *flags):
        words = ["--data_path", rows, *QUICK, "--output_dir", tmp_path / name, *flags]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        train.main()
        return tmp_path / name

    yield one
    for number, handler in handlers.items():
        signal.signal(number, handler)


def curves(output, names=METRICS):
    """[steps, metrics] of a finished run."""
    entries = [
        e
        for e in json.loads((output / "trainer_state.json").read_text())["log_history"]
        if "loss" in e
    ]
    return torch.tensor(
        [[entry.get(name, 0.0) for name in names] for entry in entries], dtype=torch.float64
    )


def assert_same_run(one, other, tolerance=1e-5, final=2e-5):
    """Loss and metrics of every step, held-out metrics before and after, and what was trained."""
    a, b = curves(one), curves(other)
    assert a.shape == b.shape and len(a) > 2
    difference = (a - b).abs() / a.abs().clamp(min=1)
    untrained = (
        a[:, METRICS.index("rewards/margins")].abs() < 1e-4
    )  # which answer is ahead is noise
    difference[untrained, METRICS.index("rewards/accuracies")] = 0
    worst = difference.amax(0)
    assert not untrained.all() and worst.max() < tolerance, dict(
        zip(METRICS, worst.tolist(), strict=True)
    )
    ends = [report(folder)["metrics"] for folder in (one, other)]
    for when in ("before", "after"):
        wanted, found = (end[when] for end in ends)
        assert wanted.keys() == found.keys() >= set(METRICS) - {"kl"}
        told = wanted.keys() - ({"rewards/accuracies"} if when == "before" else set())
        assert all(found[k] == pytest.approx(wanted[k], rel=1e-4, abs=1e-4) for k in told), (
            when,
            wanted,
            found,
        )
    assert largest_difference(weights(one / "final"), weights(other / "final")) < final


def assert_learned(output):
    losses_of = curves(output)[:, 0]
    assert losses_of[-1] < 0.8 * losses_of[0], (
        "the runs must have learned something for this to mean anything"
    )


@pytest.mark.parametrize("full", [False, True], ids=["lora", "all weights"])
def test_reference_modes_agree(run, cache, full):
    how = ["--use_lora", str(not full).lower()]
    first = run("precomputed", *how)
    assert_learned(first)
    assert (
        sorted(len(weights(cache)[name]) > 0 for name in weights(cache))
        and len(list(cache.iterdir())) == 2
    )
    for mode in ("model",) if full else ("adapter", "model"):
        assert_same_run(first, run(mode, *how, "--reference", mode))
    kl = curves(first)[:, METRICS.index("kl")]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-3
    at_start = report(first)["metrics"]["before"]
    assert at_start["loss"] == pytest.approx(0.6931, abs=1e-4) and at_start[
        "rewards/margins"
    ] == pytest.approx(0, abs=1e-4)


WAYS = [
    "--packing false --dataloader_num_workers 1",
    "--share_prompt false --gradient_accumulation_steps 4 --per_device_train_batch_size 1",
    "--gradient_checkpointing true --reference adapter",
]


def test_the_same_run_in_other_ways(run):
    """Padded, packed and shared batches; accumulation; layers computed again; batches made elsewhere."""
    one = run("one")
    for number, flags in enumerate(WAYS):
        assert_same_run(one, run(f"way {number}", *flags.split()))


def test_dropout_is_off_in_the_reference(run):
    flags = ["--lora_dropout", 0.3, "--max_steps", 3, "--learning_rate", 0]
    one, other = run("precomputed", *flags), run("adapter", *flags, "--reference", "adapter")
    # accuracies are those of ties, which the last bit decides
    names = [name for name in METRICS if not name.endswith("accuracies")]
    assert torch.allclose(curves(one, names), curves(other, names), atol=1e-4)


def test_precomputed_log_probs_are_kept_and_belong_to_data_and_base(
    run, cache, rows, tmp_path, capsys, monkeypatch
):
    flags = ["--lora_dropout", 0.1, "--max_steps", 3]
    first, made = run("first", *flags), sorted(cache.iterdir())
    assert "kept from an earlier run" not in capsys.readouterr().out and len(made) == 2
    content = [file.read_bytes() for file in made]
    with monkeypatch.context() as patch:
        patch.setattr(
            preference.PreferenceTrainer,
            "reference_logprobs",
            lambda *_, **__: pytest.fail("computed again"),
        )
        again = run("again", *flags)
    told = capsys.readouterr().out
    assert (
        told.count("kept from an earlier run") == 2
        and str(made[0]) in told
        and str(made[1]) in told
    )
    assert torch.equal(curves(again), curves(first)) and weights_sha(
        again / "final"
    ) == weights_sha(first / "final")
    made[0].unlink()
    made[1].write_bytes(content[1][:-5])  # torn
    run("computed anew", *flags, "--max_steps", 1)
    assert [file.read_bytes() for file in made] == content and len(list(cache.iterdir())) == 2

    known = set(cache.iterdir())
    changed = [*SAMPLES[:20], {**SAMPLES[20], "chosen": "别的回答。"}, *SAMPLES[21:]]
    base = ["--model_name_or_path", base_of(tmp_path), "--learning_rate", 1e-3]
    for what in (
        ["--data_path", write(tmp_path / "changed.jsonl", changed)],
        base,
        ["--bf16", "true"],
    ):
        run(f"run{len(known)}", *what, "--max_steps", 1)
        assert not set(cache.iterdir()) <= known, what
        known = set(cache.iterdir())


def base_of(folder, name="Llama", template=True, **more):
    """A model folder whose tokenizer is trained on the samples."""
    tokenizer = tiny.make_tokenizer(
        [text for row in SAMPLES for text in row.values()], 400, tiny_base.SPECIAL_TOKENS,
        (RECIPE / "templates/baichuan2.jinja").read_text(encoding="utf-8") if template else None,
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
    )  # fmt: skip
    model = build(
        name,
        "eager",
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


OTHER_KINDS = [kind for kind in train.dpo_losses.KINDS if kind != "sigmoid"]  # of the tests above


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_every_loss_learns_and_some_need_no_reference(run, cache, kind, monkeypatch):
    if free := kind in ("simpo", "orpo"):
        monkeypatch.setattr(
            preference.PreferenceTrainer,
            "reference_logprobs",
            lambda *_, **__: pytest.fail("asked"),
        )
    output = run("out", "--loss_type", kind, "--rpo_alpha", 0.1, "--learning_rate", 2e-3)
    found = report(output)["metrics"]
    assert cache.exists() == ("kl" in found["after"]) == (not free)
    margins = [found[when]["rewards/margins"] for when in ("before", "after")]
    assert margins[1] > margins[0] + 0.01 and found["after"]["loss"] < found["before"]["loss"]
    assert found["after"]["logps/chosen"] - found["after"]["logps/rejected"] > (
        found["before"]["logps/chosen"] - found["before"]["logps/rejected"]
    )


def test_another_model_as_reference(run, cache, tmp_path):
    """Its log-probs, not those of the model that is trained."""
    (tmp_path / "other").mkdir()
    base, other = base_of(tmp_path), base_of(tmp_path / "other", initializer_range=0.05)
    flags = ["--model_name_or_path", base, "--max_steps", 1]
    before = report(run("out", *flags, "--reference_model", other))["metrics"]["before"]
    plain = report(run("plain", *flags))["metrics"]["before"]
    assert abs(before["rewards/chosen"]) > 0.1 > 1e-3 > abs(plain["rewards/chosen"])
    assert before["logps/chosen"] == pytest.approx(plain["logps/chosen"], rel=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("full", [True, False], ids=["all weights", "lora"])
def test_a_stopped_run_whose_reference_file_is_gone_goes_on_as_if_nothing_had_been(
    run, cache, monkeypatch, full, capsys
):
    """The model in the checkpoint is no reference any more: the base is loaded for it."""
    flags = [
        "--use_lora",
        str(not full).lower(),
        "--save_strategy",
        "steps",
        "--save_steps",
        3,
        "--max_steps",
        6,
    ]
    flags += [] if full else ["--lora_dropout", 0.1]
    whole = run("whole", *flags)
    step = preference.PreferenceTrainer.training_step

    def fails(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(preference.PreferenceTrainer, "training_step", fails)
        run("killed", *flags)
    kept = {file.name: file.read_bytes() for file in cache.iterdir()}
    shutil.rmtree(cache)
    loads, load = [], train.load_model
    monkeypatch.setattr(train, "load_model", lambda *a, **k: loads.append(k) or load(*a, **k))
    killed = run("killed", *flags)
    assert "continuing from" in capsys.readouterr().out
    assert [k["trains_all"] for k in loads] == ([True, False] if full else [False])
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == kept
    assert torch.equal(curves(killed), curves(whole)) and len(curves(killed)) == 6
    assert weights_sha(killed / "final") == weights_sha(whole / "final")
    assert report(killed)["metrics"] == report(whole)["metrics"]


@pytest.mark.parametrize("name, more", [
    ("Baichuan", {"num_key_value_heads": 4}), ("Mistral", {"sliding_window": 8}),
    ("Qwen2", {"attention_dropout": 0.1}),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_any_model_trains_by_default(run, tmp_path, name, more):
    """Where the attention cannot share a prompt, each answer gets its own; the numbers are those of padded batches."""
    base = base_of(tmp_path, name, **more)
    flags = ["--model_name_or_path", base, "--learning_rate", 1e-3, "--max_steps", 3]
    one = run("packed", *flags)
    if "attention_dropout" not in more:
        assert_same_run(one, run("padded", *flags, "--packing", "false"), 1e-4, 1e-3)


def test_bloom_pads(run, tmp_path):
    flags = ["--model_name_or_path", base_of(tmp_path, "Bloom"), "--learning_rate", 1e-3]
    with pytest.raises(SystemExit, match="--packing false"):
        run("out", *flags)
    assert_learned(run("out", *flags, "--packing", "false"))


def test_all_weights_under_a_normalised_head(run, tmp_path):
    """Baichuan2 with the head it has: trained, saved and opened again with its normalisation."""
    from transformers import AutoModelForCausalLM

    base = base_of(tmp_path, "Baichuan", num_key_value_heads=4)
    flags = [
        "--model_name_or_path",
        base,
        "--learning_rate",
        1e-3,
        "--use_lora",
        "false",
        "--loss_type",
        "ipo",
    ]
    output = run("out", *flags)
    model = AutoModelForCausalLM.from_pretrained(output / "final")
    assert (
        type(model).__name__ == "BaichuanForCausalLM" and type(model.lm_head).__name__ == "NormHead"
    )
    assert (
        largest_difference(
            {"head": weights(base)["lm_head.weight"]}, {"head": model.lm_head.weight}
        )
        > 1e-3
    )


def test_merged_adapter_has_equal_logits(run, tmp_path, monkeypatch, capsys):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    final = run("out") / "final"
    monkeypatch.setattr(
        sys, "argv", ["merge.py", "--adapter", str(final), "--output_dir", str(tmp_path / "merged")]
    )
    merge.main()
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        model = AutoPeftModelForCausalLM.from_pretrained(final)
        wanted, base = model(ids).logits, model.disable_adapter
        with base():
            plain = model(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert torch.allclose(found, wanted, atol=1e-4) and (found - plain).abs().max() > 1e-2
    assert all("lora_" in name for name in weights(final)) and "merged" in capsys.readouterr().out


# ---- mistakes ---------------------------------------------------------------------------------------------------


def refused(run, capsys, *flags):
    """(exit code, the one line) of a run that must not start."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run("out", *flags)
    told = (
        stop.value.code
        if isinstance(stop.value.code, str)
        else capsys.readouterr().err.removeprefix("error: ")
    )
    assert len(told.strip().splitlines()) == 1, told
    return (1 if isinstance(stop.value.code, str) else stop.value.code), told.strip()


@pytest.mark.parametrize("flags, words", [
    ("--loss_type dpoo", "--loss_type dpoo: sigmoid, robust, ipo, hinge, simpo, orpo"),
    ("--loss_type ipo --label_smoothing 0.1", "--loss_type ipo has none"),
    ("--label_smoothing 0.5", "below 0.5"), ("--label_smoothing -0.1", "from 0"), ("--beta 0", "--beta 0.0: above 0"),
    ("--reference adapter --use_lora false", "no adapter to switch off"), ("--reference none", "--reference none"),
    ("--reference_model x --loss_type simpo", "simpo has no reference"),
    ("--reference_model x --reference adapter", "--reference_model"), ("--model_max_length 8", "--model_max_length 8"),
    ("--bta 0.1", "--beta"),
])  # fmt: skip
def test_flags_that_do_not_go_together(run, capsys, flags, words):
    code, line = refused(run, capsys, *flags.split())
    assert (
        code == 2
        and words in line
        and not (Path(sys.argv[sys.argv.index("--output_dir") + 1])).exists()
    )


def test_models_and_data_that_cannot_be_used(run, capsys, tmp_path):
    assert "no such folder" in refused(run, capsys, "--model_name_or_path", "/no/such")[1]
    assert "--reference_model /no/such" in refused(run, capsys, "--reference_model", "/no/such")[1]
    base = base_of(tmp_path, template=False)
    code, line = refused(run, capsys, "--model_name_or_path", base)
    assert code == 1 and str(base) in line and "chat template" in line
    chats = write(tmp_path / "chat.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    line = refused(run, capsys, "--data_path", chats)[1]
    assert str(chats) in line and "kind chat, not preference" in line and "chosen" in line
    bad = write(
        tmp_path / "bad.jsonl", [*SAMPLES[:5], {**SAMPLES[5], "rejected": SAMPLES[5]["chosen"]}]
    )
    assert f"{bad}:6: chosen and rejected are the same" in refused(run, capsys, "--data_path", bad, "--strict_data",
                                                                   "true")[1]  # fmt: skip
    assert "nosuch" in refused(run, capsys, "--target_modules", "nosuch")[1]


def test_bad_rows_are_counted_named_and_reported(run, capsys, tmp_path):
    bad = [{**SAMPLES[0], "chosen": " "}, {**SAMPLES[1], "rejected": SAMPLES[1]["chosen"]},
           {**SAMPLES[2], "tools": TOOLS}, {**SAMPLES[3], "prompt": "长" * 500}]  # fmt: skip
    path = write(tmp_path / "mixed.jsonl", [*SAMPLES, *bad])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "断')
    flags = [
        "--model_name_or_path",
        base_of(tmp_path),
        "--leak_check",
        write(tmp_path / "test.jsonl", SAMPLES[:2]),
    ]
    facts = report(run("out", "--data_path", path, "--max_steps", 1, *flags))
    told = capsys.readouterr().out
    for line in (76, 77, 78, 80):
        assert f"{path}:{line}: " in told, line
    dropped = facts["rows"]["dropped"]
    assert facts["rows"]["read"] == 80 and dropped["in test file"] >= 2 and len(dropped) == 5
    assert facts["rows"]["used"] + facts["rows"]["held_out"] + sum(dropped.values()) == 80
    assert facts["rows"]["truncated"] == 1 and any(
        "Baichuan2 has no tools" in reason for reason in dropped
    )


def test_rows_with_tools_and_the_built_in_model(run, tmp_path):
    """Its template has none: such rows are counted and left out."""
    path = write(tmp_path / "tools.jsonl", [*SAMPLES, {**SAMPLES[0], "tools": TOOLS}])
    dropped = report(run("out", "--data_path", path, "--max_steps", 1))["rows"]["dropped"]
    assert list(dropped.values()) == [1] and "Baichuan2 has no tools" in next(iter(dropped))


def test_grouping_by_length_is_told(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("out", "--group_by_length", "true")
    assert (
        stopped.value.code == 2
        and "--group_by_length: pairs are not grouped" in capsys.readouterr().err
    )


# ---- whole runs -------------------------------------------------------------------------------------------------

ENGINES = {"ddp": [], "zero-3": ["--deepspeed", RECIPE / "ds_zero3.json"]}
# name: (processes, engine, pairs per device, accumulation, flags); 8 pairs a step in each. ZeRO-2 on
# two ranks stands in test_contract.py
LAYOUTS = {
    "one": (1, "ddp", 8, 1, []),
    "DDP x 2": (2, "ddp", 2, 2, ["--reference", "adapter"]),
    "ZeRO-3 x 2": (2, "zero-3", 4, 1, []),
    "ZeRO-3 x 2, second model": (2, "zero-3", 4, 1, ["--reference", "model"]),
}
STEPS = 8


def start_layout(output, rows, name, cache):
    """The run of a layout, in which every rank logs the rows that it takes; waits for its end."""
    nproc, engine, size, accumulation, more = LAYOUTS[name]
    faulty = ROOT / "tests/support/faults/faulty.py"
    command = ["python", ROOT / "common/launch.py", nproc, faulty, RECIPE / "train.py"]
    flags = [
        *ENGINES[engine],
        *QUICK,
        *["--data_path", rows, "--output_dir", output, "--max_steps", STEPS],
        *["--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation],
        *["--max_eval_samples", 5],  # the second rank has none left in the last batch
        *more,
    ]
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"}
    return finish(start([*command, "log-rows@0", *flags], **quiet, DANPU_CACHE=cache))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, rows):
    """layout -> folder of its run, and that of its log-probs; made when first asked for."""
    made = {}

    def make(name):
        if name not in made:
            output, cache = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("cache")
            expect(start_layout(output, rows, name, cache))
            made[name] = output, cache / "reference"
        return made[name]

    return make


def consumed(output):
    """[row ids of all ranks, sorted] of every step."""
    ranks = [[json.loads(line) for line in file.open()] for file in output.glob("consumed_*.jsonl")]
    return [
        sorted(i for entry in step for ids, *_ in entry["batches"] for i in ids)
        for step in zip(*ranks, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if " x " in name])
def test_every_engine_takes_the_same_steps(layouts, name):
    (one, kept), (other, found) = layouts("one"), layouts(name)
    assert_same_run(one, other, 1e-5, 1e-4)
    assert_learned(one)
    a, b = curves(one)[:, 0], curves(other)[:, 0]
    assert len(a) == STEPS and ((a - b).abs() / a).max() < 1e-5
    assert consumed(other) == consumed(one) and len(consumed(one)) == STEPS
    facts = [report(folder) for folder in (one, other)]
    assert facts[0]["tokens"] == facts[1]["tokens"] and facts[1]["engine"] == LAYOUTS[name][1]
    assert facts[1]["world_size"] == 2 and all("lora_" in key for key in weights(other / "final"))
    if "--reference" in LAYOUTS[name][4]:
        assert not found.exists()
    else:  # an odd number of pairs over two ranks
        assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in kept.iterdir())
        for file in kept.iterdir():
            assert largest_difference(tensors(file), tensors(found / file.name)) < 1e-4


def tensors(file):
    from safetensors.torch import load_file

    return load_file(file)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """(folder, what it printed) of `bash train_zero2.sh`: two of its five epochs, half the answers."""
    output = tmp_path_factory.mktemp("default")
    flags = ["--num_train_epochs", 2, "--eval_generate", 16]
    done = shell(RECIPE / "train_zero2.sh", *flags, OUTPUT=output, NPROC=1, fork=True)
    return output, expect(done).stdout


@pytest.mark.slow
def test_default_run_learns_and_reports(default_run):
    from common.runs.report import KEYS

    output, printed = default_run
    facts = report(output)
    before, after = facts["metrics"]["before"], facts["metrics"]["after"]
    assert facts.keys() >= set(KEYS) and facts["recipe"] == RECIPE.name
    assert facts["engine"] == "zero-2"
    assert before["loss"] == pytest.approx(0.6931, abs=0.01) and before["rewards/accuracies"] < 0.6
    assert after["rewards/accuracies"] >= 0.9 and after["rewards/margins"] > 0.1, after
    assert after["like_chosen"] > before["like_chosen"] + 0.15, (before, after)
    assert after["loss"] < 0.95 * before["loss"]
    assert facts["loss"]["last"] < 0.95 * facts["loss"]["first"]
    assert set(METRICS) <= after.keys() and "| rewards/accuracies |" in printed
    assert facts["rows"]["used"] > 400 and facts["rows"]["held_out"] >= 40
    sample = facts["samples"][0]
    assert sample.keys() >= {"prompt", "reference", "rejected", "before", "after"}
    from PIL import Image

    text = (output / "report.md").read_text(encoding="utf-8")
    for name in ("loss.png", "margins.png", "accuracies.png"):
        assert Image.open(output / name).size[0] > 600 and f"({name})" in text


@pytest.mark.slow
def test_the_tuned_model_answers_as_in_the_report(default_run):
    """Base and adapter through peft, as a user would open them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.convert import adapter
    from common.runs.generate import generate_answers

    output, _ = default_run
    final = output / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(adapter.check_base(final)), final
    )
    samples = report(output)["samples"]
    asked = [encode_prompt(tokenizer, sample["messages"]) for sample in samples]
    told = generate_answers(model, tokenizer, asked, 48)
    assert (
        sum(a.strip() == s["after"] for a, s in zip(told, samples, strict=True)) >= len(samples) - 1
    )  # bf16
    with model.disable_adapter():
        base = generate_answers(model, tokenizer, asked, 48)
    assert sum(a != b for a, b in zip(told, base, strict=True)) >= len(samples) // 4
