"""minimind_npu in use: the batched engine, eval.py and its questions, export.py both ways, the terminal chat."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import older
import pytest
import torch
from harness import ROOT, environment, expect, finish, own_modules, start, weights
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.convert import adapter
from common.data.labels import encode_chat, encode_prompt

RECIPE = ROOT / "minimind_npu"
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NATIVE = {
    "vocab_size": 60,
    "intermediate_size": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
} | SMALL
TALK = {  # what the trained model knows
    "你是谁？": "我是小丹。",
    "西班牙的首都是哪里？": "西班牙的首都是马德里。", "法国的首都是哪里？": "法国的首都是巴黎。",
    "5加2等于几？": "先算5加2等于7。\n#### 7", "9减4等于几？": "<think>\n9减4等于5。\n</think>\n<answer>\n5\n</answer>",
}  # fmt: skip


models, generation, questions, export, evaluation, terminal, lora = own_modules(
    RECIPE.name,
    "model",
    "engine.generation",
    "evaluation.questions",
    "export",
    "evaluation.eval",
    "chat",
    "stages.lora",
)
Engine, Sampling, Request = generation.Engine, generation.Sampling, generation.Request


def register(models):
    """The Auto classes open this copy of the recipe's model; test files each import one."""
    AutoConfig.register("minimind", models.MiniMindConfig, exist_ok=True)
    AutoModelForCausalLM.register(models.MiniMindConfig, models.MiniMindForCausalLM, exist_ok=True)


@pytest.fixture(scope="module", autouse=True)
def this_copy():
    register(models)


def build(size="tiny", seed=0, scale=6.0, vocab=60, **changes):
    """A model whose weights are large enough for its answers to differ."""
    torch.manual_seed(seed)
    model = models.build(size, vocab, **SMALL | changes).eval()
    return enlarged(model, scale)


def enlarged(model, scale=6.0):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(scale) if p.ndim > 1 else p.copy_(torch.rand_like(p) + 0.5)
            if name.endswith(".bias") or "shared_expert_gate" in name:
                p.zero_()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model


def random_prompts(count, longest=90, vocab=60):
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(3, vocab, (n,), generator=draw).tolist() for n in sizes]


def alone(model, prompt, new, **how):
    """transformers' own generate, one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **how
    )
    return out[0, len(prompt) :].tolist()


def user(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An output folder whose final/ answers TALK word by word, taught in seconds."""
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    torch.manual_seed(0)
    model = models.build("tiny", len(tokenizer), hidden_size=64, num_hidden_layers=2)
    rows = [encode_chat(tokenizer, user(*pair), 96) for pair in TALK.items()]
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda ids, value: ids + [value] * (width - len(ids))
    ids = torch.tensor([pad(row["input_ids"], 0) for row in rows])
    labels = torch.tensor([pad(row["labels"], -100) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(120):
        loss = model(ids, labels=labels, attention_mask=(ids != 0).long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    assert loss < 0.05
    out = tmp_path_factory.mktemp("taught")
    model.save_pretrained(out / "final")
    tokenizer.save_pretrained(out / "final")
    return out


@pytest.fixture(scope="module")
def chat_model(trained):
    return generation.MiniMindChatModel(trained)


# ---- the engine -----------------------------------------------------------------------------------------------------


def native_model():
    torch.manual_seed(0)
    return enlarged(Qwen3ForCausalLM(Qwen3Config(**NATIVE, head_dim=16)).eval())


@pytest.mark.parametrize(
    "make",
    [build, lambda: build("tiny-moe", generation=2), native_model],
    ids=["own", "experts", "native"],
)
def test_greedy_answers_are_those_of_generate_one_at_a_time(make):
    model, prompts = make(), random_prompts(8)
    model.generation_config.eos_token_id = list(range(2, 8))
    expected = [alone(model, prompt, 24) for prompt in prompts]
    endings = sorted(map(len, expected))
    assert endings[0] < endings[-1], "all end at once: nothing is refilled"
    engine = Engine(model, slots=3)
    assert engine.generate(prompts, 24) == expected
    assert engine.generate(prompts[::-1], 24) == expected[::-1], (
        "what an earlier call left in the slots is seen"
    )


def test_a_repetition_penalty_is_that_of_generate():
    model, prompts = build(), random_prompts(3)
    expected = [alone(model, prompt, 20, repetition_penalty=1.4) for prompt in prompts]
    assert expected != [alone(model, prompt, 20) for prompt in prompts]
    assert Engine(model, 2).generate(prompts, 20, repetition_penalty=1.4) == expected


def test_slots_are_refilled_at_once_and_rows_stay_dense():
    model, sizes = build(), [2, 9, 4, 7, 1, 5, 8, 3]
    engine, rows, ids = Engine(model, slots=3), [], random_prompts(len(sizes), 20)
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append((kwargs["logits_to_keep"], kwargs["input_ids"].shape[1])),
        with_kwargs=True,
    )
    asked = [
        engine.submit(p, Sampling(n, ends=frozenset())) for p, n in zip(ids, sizes, strict=True)
    ]
    while engine.step():
        pass
    hook.remove()
    assert [len(request.tokens) for request in asked] == sizes and {r.finished for r in asked} == {
        "length"
    }
    active = [count for count, _ in rows]
    assert sum(active) == sum(sizes), "tokens were computed for nobody"
    assert active[: active.index(2)] == [3] * active.index(2) and active == sorted(
        active, reverse=True
    )
    ends = [0, 0, 0]  # when each slot is free, if the next request takes the first free one
    for size in sizes:
        ends = sorted([ends[0] + size, *ends[1:]])
    assert len(rows) == ends[-1]
    computed = sum(width for _, width in rows)
    assert computed == sum(sizes) + sum(len(p) - 1 for p in ids), (
        "a prompt was padded or computed twice"
    )


def test_the_cache_grows_and_long_prompts_wait_for_room(monkeypatch):
    model, prompts = build(max_position_embeddings=2048), random_prompts(4, 12)
    long = [p * (300 // len(p)) for p in prompts]
    expected = [alone(model, p, 6) for p in long]
    monkeypatch.setattr(generation, "PREFILL", 620)
    engine, widths = Engine(model, slots=4), []
    model.register_forward_pre_hook(
        lambda *a: widths.append(a[2]["input_ids"].shape[1]), with_kwargs=True
    )
    assert engine.generate(long, 6) == expected and engine.cache.columns == 512
    assert max(widths) <= 620 and sum(width > 100 for width in widths) == 2, (
        "two prompts a step fit"
    )
    assert engine.cache.keys[0].shape == (4, 2, 512, 12)


def test_half_precision_looks_up_long_rows_the_other_way():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 16, generator=draw).bfloat16() for n in (4, 576, 576))
    bias = torch.zeros(3, 1, 1, 576).masked_fill_(torch.arange(576) > 500, -torch.inf)
    found = generation._looked_up(query, key, value, bias.bfloat16(), 0.25)
    expected = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=bias, scale=0.25
    )
    assert torch.allclose(found.float(), expected, atol=2e-2)
    model = build().bfloat16()
    prompt = random_prompts(1, 20)[0]
    assert Engine(model).generate([prompt * 60], 4)[0] == alone(model, prompt * 60, 4)


def draws(logits, count=3000, **how):
    """Share of each token in `count` draws from logits [V]."""
    asked = [Request([5], Sampling(seed=i, **how)) for i in range(count)]
    tokens, _ = generation.choose(logits.repeat(count, 1), asked)
    return torch.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"top_k": 4},
        {"top_p": 0.6},
        {"top_k": 7, "top_p": 0.8},
        {"temperature": 2.5, "top_p": 0.95},
    ],
)
def test_draws_have_the_chances_of_the_usual_warpers(how):
    how = {"temperature": 0.8} | how
    logits = torch.randn(24, generator=torch.Generator().manual_seed(3)) * 2
    scores = TemperatureLogitsWarper(how["temperature"])(None, logits[None])
    scores = TopKLogitsWarper(how["top_k"])(None, scores) if "top_k" in how else scores
    scores = TopPLogitsWarper(how["top_p"])(None, scores) if "top_p" in how else scores
    expected, found = scores.softmax(-1)[0], draws(logits, **how)
    assert not found[expected == 0].any()
    assert (found - expected).abs().max() < 4.5 * math.sqrt(0.25 / 3000)
    assert (found[expected > 0.02] > 0).all()


def test_a_flat_nucleus_reaches_beyond_the_first_candidates(monkeypatch):
    monkeypatch.setattr(generation, "NUCLEUS", 8)
    found = draws(torch.linspace(0, 0.5, 64), temperature=1.0, top_p=0.5)
    assert 16 < (found > 0).sum() <= 32 and not found[:32].any()


def test_requests_of_all_kinds_in_one_batch_do_not_disturb_each_other():
    model, prompts = build(), random_prompts(5, 30)
    kinds = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 0.7, "top_p": 0.9},
             {"temperature": 1.0, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.2}]  # fmt: skip
    together = Engine(model, slots=5)
    asked = [
        together.submit(p, Sampling(12, seed=7, **how))
        for p, how in zip(prompts, kinds, strict=True)
    ]
    while together.step():
        pass
    for request, prompt, how in zip(asked, prompts, kinds, strict=True):
        one = Engine(model, slots=1)
        single = one.submit(prompt, Sampling(12, seed=7, **how))
        while one.step():
            pass
        assert request.tokens == single.tokens, how
    again = Engine(model).generate(prompts, 12, temperature=1.0, seed=1)
    assert again == Engine(model, 2).generate(prompts, 12, temperature=1.0, seed=1)
    assert again != Engine(model).generate(prompts, 12, temperature=1.0, seed=2)


def test_tokens_come_as_they_are_made_and_leaving_frees_the_slots():
    model, prompts = build(), random_prompts(4, 20)
    expected, engine = [alone(model, p, 10) for p in prompts], Engine(model, slots=2)
    seen: list[list[int]] = [[] for _ in prompts]
    for index, token in engine.stream(prompts, 10):
        seen[index].append(token)
        assert seen[index] == expected[index][: len(seen[index])]
    assert seen == expected
    for _ in zip(range(3), engine.stream(prompts, 10), strict=False):
        pass
    heard: list[int] = []
    request = engine.submit(prompts[0], Sampling(10), heard.append)
    engine.step()
    assert engine.running == [request], "requests nobody waits for go on"
    request.cancel()
    assert not engine.step() and heard == expected[0][:1] and request.finished == "cancelled"


def test_what_cannot_be_answered_is_refused():
    engine = Engine(build(), max_length=16)
    with pytest.raises(ValueError, match="empty prompt"):
        engine.submit([], Sampling())
    with pytest.raises(ValueError, match="16 tokens leaves no room in a window of 16"):
        engine.submit([5] * 16, Sampling())
    for wrong in (
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.2},
        {"top_k": -1},
        {"max_new_tokens": 0},
    ):
        with pytest.raises(ValueError, match="makes no sense"):
            Sampling(**wrong)
    request = engine.submit([5] * 12, Sampling(100, ends=frozenset()))
    while engine.step():
        pass
    assert len(request.tokens) == 4 and request.finished == "length"


def test_the_model_is_left_as_it_was():
    model = build().train()
    Engine(model).generate(random_prompts(2, 9), 3)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert not any(p.grad is not None for p in model.parameters())


# ---- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_what_prompts_begin_with_alike_is_computed_once(seed, monkeypatch):
    """Conversations that branch, in few slots, at random times: each answer is transformers' own."""
    model = build(seed=seed)
    monkeypatch.setattr(generation, "WORTH", 4)
    computed = counted(model, monkeypatch)
    engine = Engine(model, 3)
    draw = random.Random(seed)
    begun = [[draw.randrange(3, 60) for _ in range(draw.randrange(20, 40))] for _ in range(3)]
    asked: list = []
    while len(asked) < 24 or any(not request.finished for request in asked):
        if len(asked) < 24 and draw.random() < 0.6:
            ended = [one for one in asked if one.finished and len(one.prompt) < 90]
            start = draw.choice(begun)
            if ended and draw.random() < 0.5:  # a further turn
                start = (one := draw.choice(ended)).prompt + one.tokens
            prompt = start[: draw.randrange(len(start) // 2, len(start) + 1)]
            prompt = prompt + [draw.randrange(3, 60) for _ in range(draw.randrange(1, 9))]
            asked.append(engine.submit(prompt, Sampling(draw.randrange(1, 9), ends=frozenset([2]))))
        engine.step()
    for request in asked:
        assert request.tokens == alone(model, request.prompt, request.sampling.max_new_tokens)
    of_prompts = sum(computed) - sum(len(request.tokens) for request in asked)
    assert of_prompts < 0.7 * sum(len(request.prompt) - 1 for request in asked)


def counted(model, monkeypatch) -> list[int]:
    """-> a list that gets the number of tokens of each forward pass of the engine."""
    computed = []
    forward = model.forward

    def forwarded(*args, **kwargs):
        if "slots" in kwargs:
            computed.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forwarded)
    return computed


def test_a_conversation_goes_on_where_it_was_though_others_came_between(monkeypatch):
    model = build()
    computed = counted(model, monkeypatch)
    engine = Engine(model, 3)
    talks = [random.Random(i).choices(range(3, 60), k=30) for i in range(3)]
    how = Sampling(4, ends=frozenset())
    for turn in range(3):
        for i, talk in enumerate(talks):
            computed.clear()
            request = engine.submit(talk, how)
            while not request.finished:
                engine.step()
            if turn:  # the newest token of before, and what is new
                assert computed[0] <= 6
            talks[i] = talk + request.tokens + [7, 8, 9, 10]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def logits(model, ids, places=None):
    with torch.no_grad():
        return model(ids, position_ids=places).logits


KINDS = {
    "LlamaForCausalLM": ("tiny", {"generation": 2}),
    "Qwen2MoeForCausalLM": ("tiny-moe", {"generation": 2}),
    "Qwen3ForCausalLM": ("tiny", {}),
    "Qwen3MoeForCausalLM": ("tiny-moe", {"num_experts_per_tok": 2}),
}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {}) for name in KINDS),
        ("LlamaForCausalLM", {"inference_rope_scaling": True}),
        (
            "Qwen3ForCausalLM",
            {"inference_rope_scaling": True, "tie_word_embeddings": False, "head_dim": 20},
        ),
        ("Qwen2MoeForCausalLM", {"norm_topk_prob": False, "n_shared_experts": 2}),
        (
            "Qwen2MoeForCausalLM",
            {"num_experts_per_tok": 1, "norm_topk_prob": True, "n_shared_experts": 0},
        ),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 1, "moe_intermediate_size": 40}),
    ],
)
def test_exported_models_compute_the_same_and_come_back(name, more, out, tmp_path):
    size, settings = KINDS[name]
    model = build(size, scale=3.0, **settings | more)
    export.write_native(model, None, out)
    native = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(native).__name__ == name and type(native).__module__.startswith("transformers.")
    ids = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(5))
    for places in (None, torch.arange(40)[None] * 700):
        expected, found = logits(model, ids, places), logits(native, ids, places)
        assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    export.bring_in(
        export.parse_args(["--import", "--model", str(out), "--output_dir", str(tmp_path / "back")])
    )
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert isinstance(back, models.MiniMindForCausalLM)
    assert back.config.tie_word_embeddings == model.config.tie_word_embeddings
    apart = (logits(back, ids) - logits(model, ids)).abs().max()
    # queries of YaRN are divided and multiplied
    assert apart < 1e-5 if "inference_rope_scaling" in more else apart == 0
    stored = json.loads((out / "config.json").read_text())
    assert stored["architectures"] == [name] and stored["rope_theta"] == 1e6
    assert ("rope_scaling" in stored) == ("inference_rope_scaling" in more)
    assert (
        stored["eos_token_id"]
        == json.loads((out / "generation_config.json").read_text())["eos_token_id"]
        == 2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_of_the_shared_expert_is_next_to_0_and_the_head_stands_apart(dtype, out):
    model = build("tiny-moe", generation=2, scale=2.0).to(dtype)
    export.write_native(model, None, out)
    stored = weights(out)
    gates = [value for name, value in stored.items() if name.endswith("shared_expert_gate.weight")]
    assert len(gates) == 2 and all(gate.all() and gate.abs().max() < 1e-7 for gate in gates)
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_yarn_is_written_with_the_magnitude_that_every_reader_has(out):
    export.write_native(build(inference_rope_scaling=True), None, out)
    stored = json.loads((out / "config.json").read_text())
    assert stored["rope_scaling"].keys() == {*models.YARN, "rope_type"}
    assert "attention_factor" not in stored["rope_parameters"]


def test_older_exports_with_an_attention_factor_come_in(out, tmp_path):
    model = native("llama", rope_parameters=models.YARN | {
        "rope_type": "yarn", "rope_theta": 1e6, "attention_factor": 1.0}, max_position_embeddings=32768)  # fmt: skip
    model.save_pretrained(tmp_path / "native")
    found, _ = brought_in(tmp_path / "native", out)
    ids = torch.randint(60, (2, 30))
    expected = logits(model, ids)
    assert (logits(found, ids) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_what_transformers_has_no_model_for_is_refused(out):
    with pytest.raises(SystemExit, match="generation 3 with shared experts"):
        export.write_native(build("tiny-moe", n_shared_experts=1), None, out)
    assert not out.exists()


def test_an_export_that_computes_something_else_is_not_kept(out, monkeypatch):
    plain = export.native_config
    monkeypatch.setattr(export, "native_config", lambda config: plain(config).__class__(
        **plain(config).to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    ))  # fmt: skip
    with pytest.raises(SystemExit, match="computes other logits"):
        export.write_native(build(), None, out)
    assert not out.exists() and not list(out.parent.glob("*.part"))


def brought_in(source, out, *flags):
    args = export.parse_args(["--import", "--model", str(source), "--output_dir", str(out), *flags])
    said = export.bring_in(args)
    return AutoModelForCausalLM.from_pretrained(out).eval(), said


SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
NATIVES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"head_dim": 16, **SPARSE}),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"shared_expert_intermediate_size": 80, **SPARSE},
    ),
}


def native(kind, **more):
    torch.manual_seed(2)
    model_class, config, settings = NATIVES[kind]
    return enlarged(model_class(config(**NATIVE | settings | more)).eval(), 3.0)


@pytest.mark.parametrize(
    ("kind", "stacked"),
    [*((kind, False) for kind in NATIVES), ("qwen3_moe", True), ("qwen2_moe", True)],
)
def test_models_of_others_come_in(kind, stacked, out, tmp_path):
    model, source = native(kind), tmp_path / "native"
    model.save_pretrained(source)
    stored = weights(source)
    assert not any(name.endswith("experts.gate_up_proj") for name in stored)
    if stacked:  # as transformers 5 has them in memory
        from safetensors.torch import save_file

        held = {name: value.contiguous() for name, value in model.state_dict().items()}
        assert any(name.endswith("experts.gate_up_proj") for name in held)
        save_file(held, source / "model.safetensors", {"format": "pt"})
    found, said = brought_in(source, out)
    ids = torch.randint(60, (2, 30))
    expected = logits(model, ids)
    assert (logits(found, ids) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert "no tokenizer was found" in said


@pytest.mark.parametrize(
    ("kind", "more", "touched", "words"),
    [
        ("qwen2_moe", {}, "mlp.shared_expert_gate.weight", "shared_expert_gate.weight is not 0"),
        ("qwen2_moe", {}, "self_attn.k_proj.bias", "k_proj.bias is not 0"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 70}, None, "no multiple of the 40"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, None, "decoder_sparse_step is 2"),
        ("llama", {"attention_bias": True}, None, "attention_bias is True"),
        ("llama", {"hidden_act": "gelu"}, None, "hidden_act is gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            None,
            "linear",
        ),
    ],
)
def test_models_that_compute_something_else_are_refused(kind, more, touched, words, out, tmp_path):
    model = native(kind, **more)
    if touched:
        model.get_parameter(f"model.layers.1.{touched}").data.fill_(0.1)
    model.save_pretrained(tmp_path / "native")
    with pytest.raises(SystemExit, match="cannot be imported") as end:
        brought_in(tmp_path / "native", out)
    assert words in str(end.value) and "\n" not in str(end.value) and not out.exists()


@pytest.mark.parametrize(
    ("name", "size", "settings", "flags"),
    [
        ("full_sft_48.pth", "tiny", {"generation": 2}, ["--num_attention_heads", "4"]),
        (
            "pretrain_48_moe.pth",
            "tiny-moe",
            {"generation": 2, "norm_topk_prob": True},
            ["--num_attention_heads", "4"],
        ),
        ("full_sft_48.safetensors", "tiny", {"head_dim": 20}, []),
        ("dpo_48_moe.pth", "tiny-moe", {"norm_topk_prob": True}, []),
    ],
)
def test_weight_files_of_minimind_come_in(name, size, settings, flags, out, tmp_path):
    model = build(size, scale=3.0, vocab=2000, **settings).half()
    held = {key: value.clone() for key, value in model.state_dict().items()}
    if name.endswith(".pth"):
        torch.save(held, tmp_path / name)
    else:
        from safetensors.torch import save_file

        save_file(held, tmp_path / name)
    found, _ = brought_in(tmp_path / name, out, *flags, "--tokenizer", str(RECIPE / "tokenizer"))
    assert found.dtype == torch.float32 and found.config.generation == settings.get("generation", 3)
    ids = torch.randint(60, (2, 30))
    assert torch.equal(logits(found, ids), logits(model.float(), ids))
    assert (out / "tokenizer.json").is_file()


def test_weight_files_with_code_or_of_something_else_are_refused(out, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model.embed_tokens.weight": Evil()}, tmp_path / "a.pth")
    with pytest.raises(SystemExit, match="holds code"):
        brought_in(tmp_path / "a.pth", out)
    assert not (tmp_path / "ran").exists()
    torch.save({"layers.0.lora.A.weight": torch.zeros(2, 2)}, tmp_path / "lora_512.pth")
    with pytest.raises(SystemExit, match="not the weights of a whole model"):
        brought_in(tmp_path / "lora_512.pth", out)
    held = build().state_dict()
    del held["model.norm.weight"]
    torch.save(held, tmp_path / "b.pth")
    with pytest.raises(
        SystemExit, match=r"1 weights are missing, the first is model\.norm\.weight"
    ):
        brought_in(tmp_path / "b.pth", out)
    with pytest.raises(SystemExit, match="no such file or folder"):
        brought_in(tmp_path / "nothing.pth", out)
    assert not out.exists()


def make_adapter(trained, folder):
    """A LoRA folder as --stage lora leaves it, with random weights."""
    model = lora.add(AutoModelForCausalLM.from_pretrained(trained / "final"), r=4, alpha=8).eval()
    torch.manual_seed(4)
    for _, layer in lora.layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    lora.save(model, folder, str(trained / "final"))
    adapter.remember_base(folder, str(trained / "final"))
    AutoTokenizer.from_pretrained(trained / "final").save_pretrained(folder)
    return model


def test_export_from_the_command_line_with_an_adapter_merged(trained, out, tmp_path):
    expected = make_adapter(trained, tmp_path / "run/final")
    done = finish(
        start(
            [
                sys.executable,
                RECIPE / "export.py",
                "--adapter",
                tmp_path / "run",
                "--output_dir",
                out,
            ]
        )
    )
    assert (
        "exported as Qwen3ForCausalLM, torch.float32; logits differ by at most"
        in expect(done).stdout
    )
    merged, ids = AutoModelForCausalLM.from_pretrained(out), torch.arange(3, 40)[None]
    assert isinstance(merged, Qwen3ForCausalLM)
    assert (logits(merged, ids) - logits(expected, ids)).abs().max() < 1e-4
    base = AutoModelForCausalLM.from_pretrained(trained / "final")
    assert (logits(merged, ids) - logits(base, ids)).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(out).chat_template
    (theirs,) = older.read([out])
    older.agree(out, theirs)
    with pytest.raises(SystemExit, match="is not empty"):
        export.write_native(base, None, out)
    with pytest.raises(SystemExit, match="is a Qwen3ForCausalLM already"):
        export.load(export.parse_args(["--model", str(out), "--output_dir", "x"]))
    with pytest.raises(SystemExit) as end:
        export.parse_args(["--output_dir", "x"])
    assert end.value.code == 2


# ---- eval -----------------------------------------------------------------------------------------------------------


def evaluated(chat_model, monkeypatch, *flags):
    """What eval.py finds with these flags, on a model that is loaded already."""
    monkeypatch.setattr(evaluation, "MiniMindChatModel", lambda _: chat_model)
    return evaluation.evaluate(evaluation.parse_args(["--model", "loaded", *map(str, flags)]))


@pytest.fixture(autouse=True)
def plain_attention(request):
    """Scoring sets the attention of the model it is given; tests share one."""
    yield
    if "chat_model" in request.fixturenames:
        request.getfixturevalue("chat_model").model.config._attn_implementation = "sdpa"


def direct(chat_model, ids):
    """Log-probability of each of ids[1:], computed plainly."""
    scores = logits(chat_model.model, torch.tensor([ids]))[0, :-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_bits_per_byte_are_those_of_a_plain_computation(chat_model, tmp_path, monkeypatch):
    texts = ["西班牙的首都是马德里。", "法国的首都。" * 40, "a"]
    (tmp_path / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    tokenize = lambda text: [
        1,
        *chat_model.tokenizer(text, add_special_tokens=False)["input_ids"],
        2,
    ]
    rows = [tokenize(text) for text in texts]
    nats = -sum(direct(chat_model, ids).sum().item() for ids in rows)
    size = sum(len(text.encode()) for text in texts)
    found = evaluated(chat_model, monkeypatch, "--held_out", tmp_path, "--window", 512)["held_out"]
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    count = sum(len(ids) - 1 for ids in rows)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-3)
    assert (found["tokens"], found["bytes"], found["documents"]) == (count, size, 3)
    nats = -sum(
        direct(chat_model, part)[first - 1 :].sum().item()
        for ids in rows
        for part, first in by_hand(ids, 40, 10)
    )
    found = evaluated(
        chat_model, monkeypatch, "--held_out", tmp_path, "--window", 40, "--stride", 10
    )["held_out"]
    assert found["loss"] == pytest.approx(nats / count, rel=1e-4) and found["tokens"] == count


def by_hand(ids, size, stride):
    """Windows of a document: the first whole, then one that ends every `stride` tokens later."""
    ends = [min(size, len(ids))]
    while ends[-1] < len(ids):
        ends.append(min(ends[-1] + stride, len(ids)))
    for before, end in zip([1, *ends], ends, strict=False):
        start_ = max(0, end - size)
        yield ids[start_:end], before - start_


@pytest.mark.parametrize(
    ("length", "size", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 4), (40, 8, 1), (41, 8, 7)]
)
def test_windows_count_each_token_once_and_keep_a_context(length, size, stride):
    ids, seen = list(range(length)), []
    for part, first in evaluation.windows(ids, size, stride):
        assert len(part) <= size and first >= 1 and part == ids[part[0] : part[0] + len(part)]
        assert part[0] == 0 or first >= size - stride
        seen += part[first:]
    assert seen == ids[1:]


CEVAL = "id,question,A,B,C,D,answer,explanation\n0,一加一？,1,2,3,4,B,因为\n1,没有答案,1,2,3,4,,\n2,缺一个,1,2,3\n"
CMMLU = ",Question,A,B,C,D,Answer\n0,天空的颜色？,红,蓝,绿,黑,B\n1,草的颜色？,红,蓝,绿,黑,E\n"
ARC = {"id": "x", "question": "Sky?", "choices": {"text": ["red", "blue", "green"], "label": ["1", "2", "3"]},
       "answerKey": "2"}  # fmt: skip
MMLU = {
    "question": "Grass?",
    "subject": "colours",
    "choices": ["red", "blue", "green", "black"],
    "answer": 2,
}


def test_choices_of_all_layouts_are_read_and_bad_rows_named(tmp_path):
    (tmp_path / "math_val.csv").write_text(CEVAL, encoding="gb18030")
    (tmp_path / "nature.csv").write_text(CMMLU, encoding="utf-8-sig")
    rows = [
        ARC,
        MMLU,
        MMLU | {"answer": "C"},
        MMLU | {"answer": 7},
        {"question": "?"},
        {"choices": ["a", "b"]},
        [1],
    ]
    (tmp_path / "mixed_test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = questions.read([tmp_path], questions.Choice)
    assert [(q.subject, q.question, q.options[q.right]) for q in found.questions] == [
        ("math", "一加一？", "2"), ("mixed", "Sky?", "blue"), ("colours", "Grass?", "green"),
        ("colours", "Grass?", "green"), ("nature", "天空的颜色？", "蓝"),
    ]  # fmt: skip
    assert found.dropped == {
        "no answer given": 1, "wrong number of cells": 1, "the answer is none of the choices": 2, "no choices": 1,
        "no question": 1, "not an object": 1,
    }  # fmt: skip
    assert found.examples["no answer given"].startswith(f"{tmp_path / 'math_val.csv'}:")
    (tmp_path / "empty.jsonl").write_text('{"question": "?"}')
    with pytest.raises(SystemExit, match="no usable question in .*no choices"):
        questions.read(str(tmp_path / "empty.jsonl"), questions.Choice)


def test_likelihoods_of_choices_are_those_of_one_row_at_a_time(chat_model, tmp_path, monkeypatch):
    asked = [
        {
            "question": "西班牙的首都是哪里？",
            "choices": ["西班牙的首都是巴黎。", "西班牙的首都是马德里。"],
            "answer": 1,
        },
        {
            "question": "法国的首都是哪里？",
            "choices": ["法国的首都是巴黎。", "法国。", "马德里"],
            "answer": 0,
        },
        {"question": "你是谁？", "choices": ["我是小红。", "我是小丹。"], "answer": 0},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in asked), encoding="utf-8"
    )
    found = evaluated(chat_model, monkeypatch, "--choice", path, "--choice_by", "text")["choice"][
        "text"
    ]
    assert found["accuracy"] == pytest.approx(2 / 3) and found["questions"] == 3, (
        "the third answer of the file is wrong"
    )
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert found["standard_error"] == pytest.approx(math.sqrt(2 / 9 / 3))
    rows = []
    for row in asked:
        prompt = encode_prompt(chat_model.tokenizer, user(row["question"]))
        rows += [
            (prompt + chat_model.tokenizer(c, add_special_tokens=False)["input_ids"], len(prompt))
            for c in row["choices"]
        ]
    for (ids, first), part in zip(
        rows, evaluation.Scorer(chat_model.model, 64).log_probs(rows), strict=True
    ):
        assert torch.allclose(part, direct(chat_model, ids)[first - 1 :], atol=1e-4)
    letters = [chat_model.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in "ABC"]
    prompts = [ids[:first] for ids, first in rows]
    for prompt, row in zip(
        prompts, evaluation.Scorer(chat_model.model, 64).next_logits(prompts, letters), strict=True
    ):
        assert torch.allclose(
            row, logits(chat_model.model, torch.tensor([prompt]))[0, -1, letters], atol=1e-4
        )


def test_a_long_choice_is_not_less_likely_for_its_length(chat_model, monkeypatch):
    sums = {1: -2.0, 4: -4.0}
    said = lambda self, rows: [torch.tensor([sums[len(ids) - first]]) for ids, first in rows]
    monkeypatch.setattr(evaluation.Scorer, "log_probs", said)
    asked = [questions.Choice("s", "f:1", "?", ["甲", "甲乙丙丁"], 1)]
    rows = [([5, 6], [[7], [7, 8, 9, 10]])]
    assert evaluation.picked_texts(evaluation.Scorer(chat_model.model), asked, rows) == [1]


def test_letters_are_chosen_by_their_logits_with_examples_before(chat_model, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text(
        "id,question,A,B,C,D,answer\n"
        + "".join(f"{i},第{i}题,甲,乙,丙,丁,{'ABCD'[i % 4]}\n" for i in range(6)),
        "utf-8",
    )
    seen = []
    monkeypatch.setattr(
        evaluation.Scorer, "next_logits",
        lambda self, prompts, among: seen.extend(prompts) or torch.eye(4)[[0, 1, 0, 1]] if len(among) == 4 else None,
    )  # fmt: skip
    flags = ("--choice", tmp_path, "--choice_by", "letter", "--shots", 2)
    found = evaluated(chat_model, monkeypatch, *flags)["choice"]["letter"]
    assert found["questions"] == 4 and found["accuracy"] == 0.5, "right: C D A B, picked: A B A B"
    text = chat_model.tokenizer.decode(seen[0])
    example = (
        "第0题\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：<|im_end|>\n<|im_start|>assistant\nA<|im_end|>"
    )
    assert example in text and "第1题" in text and text.count("assistant") == 3
    assert text.endswith(
        "第2题\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：<|im_end|>\n<|im_start|>assistant\n"
    )


def test_examples_go_where_the_window_is_short_and_too_long_questions_are_counted(chat_model):
    asker = evaluation.Asker(chat_model.tokenizer, True, 60)
    shown = [("一" * 10, "甲"), ("二" * 10, "乙")]
    full = evaluation.Asker(chat_model.tokenizer, True, 999).prompt(shown, "问", 4)
    short = asker.prompt(shown, "问", 60 - len(full) + 1)
    assert "一" not in chat_model.tokenizer.decode(short) and "二" in chat_model.tokenizer.decode(
        short
    )
    assert asker.prompt(shown, "问" * 80, 4) is None
    plain = evaluation.Asker(chat_model.tokenizer, False, 60).prompt(
        [("问：a\n答：", "b")], "问：c\n答：", 4
    )
    assert chat_model.tokenizer.decode(plain) == "<|im_start|>问：a\n答：b\n\n问：c\n答："


def test_exact_match_asks_the_model(chat_model, tmp_path, monkeypatch):
    rows = [{"question": q, "answer": a} for q, a in TALK.items() if q[0] in "59"]
    rows += [{"question": "法国的首都是哪里？", "answer": "法国的首都是罗马。"}, {"question": "?"}]
    (tmp_path / "g.jsonl").write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8"
    )
    found = evaluated(chat_model, monkeypatch, "--exact", tmp_path, "--max_new_tokens", 40)["exact"]
    assert (
        found["accuracy"] == pytest.approx(2 / 3)
        and found["ended"] == 1
        and found["dropped"] == {"no answer given": 1}
    )
    assert [a["right"] for a in found["answers"]] == [True, True, False]
    assert found["answers"][0]["answer"] == TALK["5加2等于几？"]


def test_eval_from_the_command_line(trained, tmp_path):
    command = [
        sys.executable,
        RECIPE / "evaluation/eval.py",
        "--model_name_or_path",
        trained,
        "--output_dir",
        tmp_path,
    ]
    done = expect(finish(start([*command, "--num_rows", 2, "--exact", RECIPE / "data/eval/gsm.jsonl", "--held_out",
                                RECIPE / "data/eval/held_out.txt", "--choice", RECIPE / "data/eval/ceval",
                                "--max_new_tokens", 8])))  # fmt: skip
    found = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert found["held_out"]["documents"] == 2 and len(found["choice"]["text"]["subjects"]) == 4
    assert {"model", "device", "dtype", "recipe", "seconds", "versions", "command"} <= found.keys()
    table = (tmp_path / "eval.md").read_text(encoding="utf-8")
    assert table.strip() in done.stdout and "| all | " in table and "bits per byte" in table


def test_mistakes_at_the_command_lines(chat_model, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.parse_args(["--choise", "x"])
    assert end.value.code == 2
    assert "unknown flag --choise; did you mean --choice" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no trained model here"):
        evaluation.evaluate(evaluation.parse_args(["--model", str(tmp_path)]))
    with pytest.raises(SystemExit) as end:
        terminal.options_of(terminal.parse_args(["--top_p", "3"]), chat_model)
    assert end.value.code == 2 and "--top_p 3.0 makes no sense" in capsys.readouterr().err


def test_the_harness_is_optional_and_gets_a_native_model(chat_model, monkeypatch):
    flags = ("--backend", "lm_eval", "--tasks", "ceval-valid,arc_easy", "--num_rows", 5)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        evaluated(chat_model, monkeypatch, *flags)
    fake, asked = ModuleType("lm_eval"), []

    def simple_evaluate(**how):
        model = AutoModelForCausalLM.from_pretrained(how["model_args"]["pretrained"])
        begins = how["model_args"]["add_bos_token"]  # handed on as the harness does
        tokenizer = AutoTokenizer.from_pretrained(
            how["model_args"]["pretrained"], add_bos_token=begins
        )
        assert tokenizer("天")["input_ids"][0] == tokenizer.bos_token_id == 1
        asked.append((how, type(model), tokenizer.chat_template))
        return {"results": {"arc_easy": {"acc,none": 0.25, "alias": "arc_easy"}}}

    fake.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    monkeypatch.setitem(sys.modules, "export", export)
    found = evaluated(chat_model, monkeypatch, *flags)
    assert found["lm_eval"] == {
        "arc_easy": {"acc,none": 0.25}
    } and "arc_easy: acc,none 0.25" in evaluation.table(found)
    how, kind, template = asked[0]
    assert (
        how["model"] == "hf" and how["tasks"] == ["ceval-valid", "arc_easy"] and how["limit"] == 5
    )
    assert kind is Qwen3ForCausalLM and template
    with pytest.raises(SystemExit):
        evaluation.parse_args(["--backend", "lm_eval"])


# ---- the terminal chat ----------------------------------------------------------------------------------------------


def said(chat_model, lines, **how):
    """Everything a chat prints for these lines."""
    words: list[str] = []
    talk = terminal.Chat(chat_model, max_new_tokens=40, **how)
    terminal.talk(talk, lines, lambda text="", end="\n", **_: words.append(f"{text}{end}"))
    return "".join(words), talk


def test_the_terminal_answers_and_keeps_a_history(chat_model):
    text, talk = said(
        chat_model, ["你是谁？", "", "法国的首都是哪里？", "/undo", "/exit", "没有人听"]
    )
    assert text.splitlines()[:2] == ["> 你是谁？", "我是小丹。"] and "没有人听" not in text
    assert "(taken back: 法国的首都是哪里？)" in text
    answer = {"role": "assistant", "content": "我是小丹。", "reasoning_content": ""}
    assert talk.history == [{"role": "user", "content": "你是谁？"}, answer]
    text, talk = said(chat_model, ["9减4等于几？", "/clear", "/undo", "/nonsense"])
    assert (
        "<think>" in text
        and "(nothing to take back)" in text
        and "/think on|off" in text
        and not talk.history
    )


def test_thinking_and_system_prompt_reach_the_template(chat_model, monkeypatch):
    prompts, prompt = [], chat_model.prompt
    monkeypatch.setattr(
        chat_model, "prompt", lambda *args: prompts.append(prompt(*args)) or prompts[-1]
    )
    said(
        chat_model, ["/system 短一点", "/think on", "你是谁？", "/think off", "/system", "你是谁？"]
    )
    first, second = (chat_model.tokenizer.decode(ids) for ids in prompts)
    assert first.startswith("<|im_start|>system\n短一点<|im_end|>") and first.endswith(
        "assistant\n<think>\n"
    )
    assert second.startswith("<|im_start|>user\n你是谁？") and second.endswith("assistant\n")


def test_ctrl_c_ends_the_answer_and_not_the_chat(chat_model):
    def endless(_, __, out):
        time.sleep(0.01)
        out.logits[..., 2] = -1e9

    hook = chat_model.model.register_forward_hook(endless)
    before = signal.getsignal(signal.SIGINT)
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        began = time.perf_counter()
        talk = terminal.Chat(chat_model, max_new_tokens=16000)
        words: list[str] = []
        terminal.talk(
            talk, ["你是谁？", "/undo"], lambda text="", end="\n", **_: words.append(f"{text}{end}")
        )
    finally:
        hook.remove()
    assert time.perf_counter() - began < 30 and "(stopped after" in "".join(words)
    assert "(taken back: 你是谁？)" in words[-1] and signal.getsignal(signal.SIGINT) == before


def test_chat_reads_a_pipe(trained):
    env = environment()
    process = subprocess.Popen(
        ["bash", "-c", 'printf "%s\\n" 你是谁？ /exit | "$0" "$@"', *[
            str(word) for word in start_words([RECIPE / "chat.py", "--model", trained])
        ]], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    done = expect(finish(process))
    assert "> 你是谁？\n我是小丹。\n" in done.stdout


def start_words(words):
    """A command whose Python is a fork of the libraries' server, where that runs already."""
    import harness

    return [harness.forked_python(environment()) or sys.executable, *words]


def test_the_newest_run_that_answers_is_the_default(tmp_path):
    for age, stage in ((30, "sft"), (10, "dpo"), (5, "pretrain"), (1, "reason")):
        (tmp_path / stage / "final").mkdir(parents=True)
        if stage != "reason":  # not finished
            (tmp_path / stage / "final/config.json").write_text("{}")
            os.utime(tmp_path / stage / "final/config.json", (time.time() - age,) * 2)
    assert generation.newest(tmp_path) == str(tmp_path / "dpo")
    with pytest.raises(SystemExit, match="no finished run under"):
        generation.newest(tmp_path / "none")


def test_a_pretrained_model_goes_on_with_the_text(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/run.json").write_text(json.dumps({"settings": {"stage": "pretrain"}}))
    writer = generation.MiniMindChatModel(tmp_path / "run")
    ids = writer.prompt(user("西班牙", "不看", "马德里"), 20)
    assert not writer.chats and writer.tokenizer.decode(ids) == "<|im_start|>马德里"


def test_an_answer_that_is_cut_inside_a_character_ends_before_it(chat_model, monkeypatch):
    ids = chat_model.tokenizer("好🙂", add_special_tokens=False)["input_ids"]
    first = len(chat_model.tokenizer("好", add_special_tokens=False)["input_ids"])
    assert len(ids) == first + 4, "a token for each byte"
    for count in range(len(ids) + 1):

        def generate(prompt, room, heard, count=count, **_):
            for told in range(1, count + 1):
                heard(torch.tensor([prompt + ids[:told]]))
                time.sleep(0.06)  # the page looks at it while it grows

        monkeypatch.setattr(chat_model, "_generate", generate)
        seen = [text for text, _ in chat_model.stream(user("你是谁？"), thinking=False)]
        assert not any("\ufffd" in text for text in seen)
        expected = "好🙂" if count == len(ids) else "好" * (count >= first)
        assert seen[-1] == expected


def test_chat_model_and_generate_say_the_same(chat_model):
    prompt = chat_model.prompt(user("西班牙的首都是哪里？"), 40, False)
    expected = chat_model.tokenizer.decode(
        alone(chat_model.model, prompt, 40), skip_special_tokens=True
    )
    asked = SimpleNamespace(
        steps=list(
            chat_model.stream(user("西班牙的首都是哪里？"), thinking=False, max_new_tokens=40)
        )
    )
    assert asked.steps[-1][0] == expected == TALK["西班牙的首都是哪里？"]
