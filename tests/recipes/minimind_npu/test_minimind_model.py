"""minimind_npu/model.py: packed = apart, experts = a loop over tokens, a balance that ignores padding, the sizes."""

import pytest
import torch
from harness import make_rows, own_modules, pack
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from common.fast import attention, losses

(models,) = own_modules("minimind_npu", "model")
KINDS = {
    "generation 3": {},
    "generation 2": {"generation": 2},
    "generation 3, experts": {"use_moe": True},
    "generation 2, experts": {"generation": 2, "use_moe": True, "intermediate_size": 48},
}


def small(seed=0, **changes):
    torch.manual_seed(seed)
    settings = (
        dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        | changes
    )
    model = models.build("tiny", 97, **settings)
    model.config.initializer_range = 0.2  # far from uniform, so that differences show
    model.apply(model._init_weights)
    return model


@pytest.mark.parametrize("size, millions", [("26m", 25.83), ("104m", 104.03), ("145m-moe", 145.03), ("64m", 63.91),
                                            ("198m-moe", 198.4)])  # fmt: skip
def test_sizes_have_their_parameters(size, millions):
    with torch.device("meta"):
        model = models.build(size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_equals_its_documents(kind):
    model, rows = small(**KINDS[kind]).train(), make_rows([9, 30, 2, 17])
    apart = [{k: torch.tensor([v]) for k, v in row.items() if k != "row_id"} for row in rows]
    labels = sum(len(row["labels"]) - max(3, 1) for row in rows if len(row["labels"]) > 3)
    expected = sum(
        model(**one, num_items_in_batch=labels).loss
        for one in apart
        if (one["labels"] != -100).any()
    )
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.config._attn_implementation = attention.register()
    batch = pack(rows)
    found = model(**batch, num_items_in_batch=labels)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert max((p.grad - gradients[n]).abs().max() for n, p in model.named_parameters()) < 1e-4
    stock = found.loss.item()
    chunked = losses.use_chunked_loss(model)(**batch, num_items_in_batch=labels)
    assert chunked.loss.item() == pytest.approx(stock, abs=1e-5)
    assert torch.equal(chunked.aux_loss, found.aux_loss)


@pytest.mark.parametrize("settings", [
    {}, {"num_experts_per_tok": 2}, {"norm_topk_prob": True}, {"generation": 2},
    {"generation": 2, "n_shared_experts": 2},
    {"generation": 2, "num_experts_per_tok": 1}, {"num_experts": 7, "num_experts_per_tok": 3},
], ids=str)  # fmt: skip
def test_sorted_experts_equal_a_loop_over_tokens(settings):
    model = small(use_moe=True, intermediate_size=32, moe_intermediate_size=32, **settings)
    layer, config = model.model.layers[0].mlp, model.config
    x = torch.randn(2, 11, 48)
    found, _ = layer(x, torch.ones(22), torch.zeros(22, dtype=torch.long), 1)
    for place, token in enumerate(x.flatten(0, 1)):
        scores = F.linear(token, layer.gate.weight).softmax(-1)
        best = scores.sort(descending=True).indices[: config.num_experts_per_tok].tolist()
        total = (
            scores[best].sum()
            if config.norm_topk_prob and (len(best) > 1 or config.generation == 3)
            else 1.0
        )
        expected = sum(scores[e] / total * layer.experts[e](token) for e in best)
        expected = expected + sum(shared(token) for shared in getattr(layer, "shared_experts", []))
        assert torch.allclose(found.flatten(0, 1)[place], expected, atol=1e-4)


def test_grouped_products_equal_the_loop_over_experts():
    """What runs on accelerators, on the CPU; one expert gets no token."""
    layer = small(use_moe=True).model.layers[0].mlp
    rows, sizes = torch.randn(40, 48, dtype=torch.bfloat16), torch.tensor([17, 0, 20, 3])
    with torch.autocast("cpu", torch.bfloat16):
        expected = models.grouped(layer.experts, rows, sizes)
        found = models.grouped_swiglu(layer.experts, rows, sizes)
    assert torch.allclose(found.float(), expected.float(), atol=0.1, rtol=0.02)
    found.float().pow(2).sum().backward()
    gradients = [p.grad for p in layer.experts[0].parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    assert all(p.grad.abs().sum() == 0 for p in layer.experts[1].parameters())


@pytest.mark.parametrize("generation", [2, 3])
def test_balance_ignores_padding(generation):
    model = small(use_moe=True, generation=generation, intermediate_size=32).train()
    ids = torch.randint(97, (2, 12))
    mask = torch.ones_like(ids)
    alone = model(ids).aux_loss
    for side in ((0, 5), (5, 0)):
        padded = model(F.pad(ids, side, value=7), attention_mask=F.pad(mask, side)).aux_loss
        assert padded.item() == pytest.approx(alone.item(), abs=1e-7) and padded > 0
    packed = {
        "position_ids": torch.arange(12).repeat(2)[None],
        "cu_seq_lens_q": torch.tensor([0, 12, 24, 31]),
    }
    packed |= {
        "position_ids": F.pad(packed["position_ids"], (0, 7)),
        "max_length_q": 12,
        "max_length_k": 12,
    }
    model.config._attn_implementation = attention.register()
    row = F.pad(ids.flatten(), (0, 7), value=3)[None]
    found = model(
        row,
        token_mask=F.pad(torch.ones(1, 24), (0, 7)),
        cu_seq_lens_k=packed["cu_seq_lens_q"],
        **packed,
    )
    assert found.aux_loss.item() == pytest.approx(alone.item(), abs=1e-7)
    assert model.eval()(ids).aux_loss == 0


def test_one_expert_per_token_still_trains_the_router():
    """With renormalised weights, as in the original, the router gets nothing from the language model's loss."""
    norms = {}
    for renormalised in (None, True):
        model = small(
            use_moe=True,
            router_aux_loss_coef=0,
            **({"norm_topk_prob": True} if renormalised else {}),
        )
        ids = torch.randint(97, (2, 12))
        model.train()(ids, labels=ids).loss.backward()
        norms[renormalised] = model.model.layers[0].mlp.gate.weight.grad.norm().item()
    assert norms[None] > 1e-3 and norms[True] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_left_padding_and_a_saved_model(kind, tmp_path):
    model = small(**KINDS[kind]).eval()
    prompts = [torch.randint(3, 97, (n,)) for n in (4, 9, 1)]
    alone = [
        model.generate(p[None], max_new_tokens=8, do_sample=False, eos_token_id=None)[0, len(p) :]
        for p in prompts
    ]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, mask = (
        torch.stack([F.pad(x(p), (9 - len(p), 0)) for p in prompts])
        for x in (lambda p: p, torch.ones_like)
    )
    for cached in (True, False):
        out = again.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None,
                             use_cache=cached)  # fmt: skip
        assert torch.equal(out[:, 9:], torch.stack(alone))
    hidden = again(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(hidden) == 3 and torch.allclose(
        again.lm_head(hidden[-1]), again(ids, attention_mask=mask).logits
    )


@pytest.mark.parametrize("kind", ["generation 3", "generation 2, experts"])
def test_checkpointing_changes_nothing(kind):
    model, ids = small(**KINDS[kind]).train(), torch.randint(97, (2, 12))
    grads = []
    for on in (False, True):
        model.gradient_checkpointing_enable() if on else None
        model.zero_grad()
        out = model(ids, labels=ids, use_cache=False)
        (out.loss + out.aux_loss).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
