"""The chunked loss against full logits: value, gradient, memory, and the models it must refuse."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

from common.fast import losses, softmax

VOCAB = 301


def build(tied=False, name="Qwen2", **more):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        **sizes,
        **more,
    )
    config.use_cache = False
    return getattr(transformers, f"{name}ForCausalLM")(config)


def make_batch(seed=0, shape=(3, 40), labelled=0.6):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, shape, generator=generator)
    keep = torch.rand(shape, generator=generator) < labelled
    return {"input_ids": ids, "labels": ids.masked_fill(~keep, -100)}


def grads(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, stock, batch, **inputs):
    a, b = model(**batch, **inputs), stock(**batch, **inputs)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=1e-5)
    a.loss.backward()
    b.loss.backward()
    ours, theirs = grads(model), grads(stock)
    assert ours.keys() == theirs.keys() and ours
    for name, grad in ours.items():
        torch.testing.assert_close(
            grad, theirs[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CPU_ROWS", 16)
    monkeypatch.setattr(softmax, "CACHE_ELEMENTS", 5 * VOCAB)


@pytest.mark.parametrize("items", [None, 50, torch.tensor(77)])
@pytest.mark.parametrize("head", ["tied", "untied", "frozen", "bias"])
def test_equals_full_logits(head, items):
    stock = build(tied=head == "tied")
    if head == "bias":
        stock.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    if head == "frozen":
        stock.lm_head.requires_grad_(False)
    model = losses.use_chunked_loss(copy.deepcopy(stock))
    for seed in range(2):  # a second micro-batch adds to the gradients
        assert_same(
            model,
            stock,
            make_batch(seed),
            **({} if items is None else {"num_items_in_batch": items}),
        )


class Capped(nn.Linear):
    logit_cap: float

    def forward(self, x):
        return self.logit_cap * torch.tanh(super().forward(x) / self.logit_cap)


@pytest.mark.parametrize("frozen", [False, True])
def test_log_probs_of_capped_logits_are_those_of_full_ones(frozen):
    """Values and gradients, of a head that trains and of one that does not."""
    torch.manual_seed(0)
    head = Capped(32, VOCAB).requires_grad_(not frozen)
    head.logit_cap = 2.0
    hidden = (6 * torch.randn(40, 32)).requires_grad_()
    targets = torch.randint(VOCAB, (40,))
    full = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = losses.head_logprobs(head, hidden, targets)
    assert head(hidden).abs().max() > 1.9
    torch.testing.assert_close(found, full, atol=1e-5, rtol=1e-5)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    weights = torch.randn(40)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), inputs) for x in (found, full))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def test_equals_full_logits_of_a_mixture_of_experts_with_its_auxiliary_loss():
    """One row: the balance of a document is that of the stock forward over it."""
    stock = build(name="Qwen3Moe", **BALANCED, **EXPERTS)
    assert_same(losses.use_chunked_loss(copy.deepcopy(stock)), stock, make_batch(shape=(1, 40)))


def step_in(parts, model):
    """Loss and gradients of a step over batches; num_items_in_batch as the Trainer counts it."""
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in parts)
    model.zero_grad()
    total = sum(model(**batch, num_items_in_batch=items).loss for batch in parts)
    total.backward()
    return total.detach(), {name: grad.clone() for name, grad in grads(model).items()}


def test_the_balance_of_experts_is_the_same_in_one_batch_in_many_and_packed():
    """Weighted by labels like the rest of the loss, so that rows of uneven length count alike."""
    from test_packing import make_rows

    from common import collators
    from common.fast import attention

    attention.register()
    model = losses.use_chunked_loss(build(name="Qwen3Moe", **BALANCED, **EXPERTS))
    rows = make_rows([30, 5, 18, 40, 9, 26, 3, 12])
    padded = [collators.PaddedCollator(0)(rows)]
    one_by_one = [collators.PaddedCollator(0)([row]) for row in rows]
    uneven = [collators.PaddedCollator(0)(part) for part in (rows[:3], rows[3:])]
    packed = [collators.PackedCollator()([rows])]
    rounded = [collators.PackedCollator(64)([rows])]
    assert rounded[0].pop("padding_tokens") == 192 - 143
    for batch in (*padded, *one_by_one, *uneven, *packed, *rounded):
        batch.pop("row_ids")
    expected, wanted = step_in(padded, model)
    without = losses.use_chunked_loss(build(name="Qwen3Moe", **EXPERTS))
    assert expected > step_in(padded, without)[0] + 0.9, "two experts of four, times 0.5"
    for parts in (one_by_one, uneven, packed, rounded):
        is_packed = parts is packed or parts is rounded
        model.config._attn_implementation = "packed" if is_packed else "sdpa"
        loss, found = step_in(parts, model)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        for name, grad in found.items():
            torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("late", [False, True])
def test_equals_full_logits_under_lora(targets, late):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    stock = get_peft_model(build(), settings)
    torch.manual_seed(1)
    base = build() if late else losses.use_chunked_loss(build())
    model = get_peft_model(base, settings)
    if late:
        losses.use_chunked_loss(model)
    model.load_state_dict(stock.state_dict())
    assert_same(model, stock, make_batch())
    head = model.get_base_model().get_output_embeddings()
    assert getattr(head, "base_layer", head).weight.grad is None


def test_trained_copy_of_the_head_under_lora():
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    stock = get_peft_model(build(), settings)
    assert_same(losses.use_chunked_loss(copy.deepcopy(stock)), stock, make_batch())


def test_half_precision_keeps_the_loss_in_fp32():
    stock = build()
    model = losses.use_chunked_loss(copy.deepcopy(stock))
    batch = make_batch()
    exact = stock(**batch).loss
    exact.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss != loss.bfloat16()
    torch.testing.assert_close(loss, exact, atol=5e-3, rtol=0)
    for name, grad in grads(model).items():
        assert (grad - grads(stock)[name]).norm() < 0.03 * grad.norm(), name


def test_half_precision_weights():
    stock, batch = build().bfloat16(), make_batch()
    model = losses.use_chunked_loss(copy.deepcopy(stock))
    a, b = model(**batch).loss, stock(**batch).loss
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    for name, grad in grads(model).items():
        assert (
            grad.dtype == torch.bfloat16 and (grad - grads(stock)[name]).norm() < 0.03 * grad.norm()
        ), name


def test_a_batch_without_labels_gives_zero_with_a_graph():
    model, batch = losses.use_chunked_loss(build()), make_batch(labelled=0)
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_without_labels_the_model_is_stock():
    stock, batch = build().eval(), make_batch()
    model = losses.use_chunked_loss(copy.deepcopy(stock)).eval()
    ids = batch["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), stock.generate(ids, **settings))


def test_evaluation_counts():
    stock, batch = build().eval(), make_batch()
    model = losses.use_chunked_loss(copy.deepcopy(stock)).eval()
    with torch.no_grad():
        logits = stock(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:]
        labels[0] = logits.argmax(-1)[: labels.shape[1]]  # some right ones
        targets = labels.flatten()
        total, correct, count = losses.loss_counts(model(**batch))
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count == (targets != -100).sum() and correct == (logits.argmax(-1) == targets).sum() > 19


def test_evaluation_computes_no_gradient_of_the_weights(monkeypatch):
    """It did: twice the time, and a second [V, D]."""
    model, batch = losses.use_chunked_loss(build()).eval(), make_batch()
    computed = []
    monkeypatch.setattr(losses, "_add_weight_grad_", lambda *args: computed.append(args))
    with torch.no_grad():
        model(**batch)
    assert not computed
    model(**batch)
    assert computed


def test_deep_copy_stands_alone():
    model, batch = losses.use_chunked_loss(build()), make_batch()
    twin = copy.deepcopy(model)
    before = model(**batch).loss
    for p in twin.parameters():
        nn.init.zeros_(p)
    assert (
        model(**batch).loss == before
        and abs(twin(**batch).loss - torch.tensor(float(VOCAB)).log()) < 1e-4
    )
    assert losses.use_chunked_loss(model) is model and "forward" not in model.state_dict()


def test_models_that_change_their_logits_are_refused():
    import transformers

    config = transformers.GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        logits_scaling=3.0,
    )
    with pytest.raises(SystemExit, match="GraniteForCausalLM changes its logits after the head"):
        losses.use_chunked_loss(transformers.GraniteForCausalLM(config))(**make_batch())


def test_models_that_compute_the_loss_themselves_are_refused():
    class OwnLoss(type(build())):
        def forward(self, input_ids, labels=None, **kwargs):
            output = super().forward(input_ids, **kwargs)
            if labels is not None:
                output.loss = F.cross_entropy(
                    output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
                )
            return output

    model = losses.use_chunked_loss(OwnLoss(build().config))
    with pytest.raises(SystemExit, match="OwnLoss computes its loss itself"):
        model(**make_batch())
    assert model(input_ids=make_batch()["input_ids"]).logits.shape[-1] == VOCAB


def test_sequence_logprobs_of_padded_and_packed_rows():
    from test_packing import make_rows

    from common import collators
    from common.fast import attention

    attention.register()
    model = losses.use_chunked_loss(build())
    model.config._attn_implementation = "packed"
    rows = make_rows([7, 30, 1, 18])
    padded, packed = collators.PaddedCollator(0)(rows), collators.PackedCollator()([rows])
    for batch in (padded, packed):
        batch.pop("row_ids")
    a, b = losses.sequence_logprobs(model, **padded), losses.sequence_logprobs(model, **packed)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)

    logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[
        :, :-1
    ]
    targets = padded["labels"][:, 1:]
    token = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    full = (token * (targets != -100)).sum(1)
    torch.testing.assert_close(a, full, atol=1e-4, rtol=1e-5)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = torch.autograd.grad((full * weights).sum(), model.lm_head.weight)[0]
    for x in (a, b):
        got = torch.autograd.grad((x * weights).sum(), model.lm_head.weight)[0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


MEMORY = """
import re, sys, torch
sys.path.insert(0, sys.argv[1])
from common.fast import losses
from transformers import Qwen2Config, Qwen2ForCausalLM
torch.set_num_threads(1)
config = Qwen2Config(vocab_size=40000, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, use_cache=False)
model = Qwen2ForCausalLM(config)
losses.use_chunked_loss(model)
ids = torch.randint(40000, (1, 2048))
def peak(reset=False):  # MiB; resetting starts the high-water mark anew at what is resident now
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**10
with torch.autocast("cpu", dtype=torch.bfloat16, enabled=sys.argv[2] == "bfloat16"):
    model(input_ids=ids[:, :8], labels=ids[:, :8]).loss.backward()  # the gradients are there
    before = peak(reset=True)
    model(input_ids=ids, labels=ids).loss.backward()
    chunked = peak()
    with torch.no_grad():
        model(input_ids=ids)
print(chunked - before, peak() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_logits_are_never_alive(dtype):
    command = [sys.executable, "-c", MEMORY, str(ROOT), dtype]
    chunked, full = map(
        float,
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:],
    )
    logits = 2048 * 40000 * (4 if dtype == "float32" else 2) / 2**20  # MiB
    # a CPU without bf16 makes float32 copies of both; one with AMX holds 0.354 of them in bf16
    assert chunked < (0.35 if dtype == "float32" else 0.4) * full
    assert full > 0.8 * logits  # the probe sees them where they are


def test_sums_of_long_sequences_keep_their_digits():
    """Log-probs of 4,000 tokens: as exact as float64 to the last digits of float32, which adding one by one is not."""
    torch.manual_seed(0)
    lengths = [4000, 0, 1, 2500]
    owner = torch.repeat_interleave(torch.tensor(lengths))
    values = (-5 * torch.rand(len(owner))).requires_grad_()
    found = losses.sum_by_owner(values, owner, 4)
    exact = torch.zeros(4, dtype=torch.float64).index_add(0, owner, values.detach().double())
    assert (found - exact).abs().max() < 1e-3 and found[1] == 0
    assert torch.equal(losses.sum_by_owner(values, owner, 4, most=4096), found)
    found[3].backward()
    assert torch.equal(values.grad, (owner == 3).float())
