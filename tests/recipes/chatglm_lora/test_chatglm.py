"""chatglm_lora: the model's structure, packed rows, checkpoints, generation, and whole runs of its train.py.

Its numbers are compared with the original implementation in test_golden.py.
"""

import copy
import functools
import importlib.util
import json
import shutil
import sys
from itertools import pairwise

import pytest
import torch
from harness import (
    ROOT,
    error_line,
    expect,
    finish,
    history,
    largest_difference,
    report,
    shell,
    start,
    weights,
    weights_sha,
)

RECIPE = ROOT / "chatglm_lora"
sys.path.insert(0, str(RECIPE))
from modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, layout, rotary, visible
from prefix_attention import Documents, _elsewhere, prefix_attention

from common import collators
from common.fast import losses

GMASK, SOP, EOP, MASK, PAD = 131, 134, 135, 130, 3
LENGTHS = [
    (5, 4),
    (30, 2),
    (1, 1),
    (200, 90),
    (64, 70),
    (12, 300),
    (130, 5),
    (3, 3),
]  # of text and answer


def build(seed=0, **more):
    torch.manual_seed(seed)
    settings = {"vocab_size": 160, "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4}
    settings |= {
        "inner_hidden_size": 96,
        "bos_token_id": SOP,
        "pad_token_id": PAD,
        "max_sequence_length": 2048,
    }
    settings |= {
        "initializer_range": 0.3
    }  # at 0.02 the residual drowns the blocks, and every answer is the same
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**settings | more)).eval()


def make_rows(lengths=LENGTHS, seed=1):
    """Rows as train.py encodes them: text [gMASK] <sop> answer <eop>."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for i, (text, answer) in enumerate(lengths):
        ids = torch.randint(10, 120, (text + answer,), generator=generator).tolist()
        ids = [*ids[:text], GMASK, SOP, *ids[text:], EOP]
        rows.append(
            {"row_id": i, "input_ids": ids, "labels": [-100] * (text + 2) + ids[text + 2 :]}
        )
    return rows


@functools.cache
def recipe():
    """chatglm_lora/train.py as a module, for its functions."""
    spec = importlib.util.spec_from_file_location("chatglm_lora_train", RECIPE / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def collate(model, rows, packed=True):
    collator = collators.PackedCollator() if packed else collators.PaddedCollator(PAD)
    batch = recipe().with_layout([rows] if packed else rows, collator, model.config)
    batch.pop("row_ids")
    return batch


def gradients(model, batches, **settings):
    """(sum of the losses, {name: gradient}) over `batches`, each weighted by its labels."""
    total = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    model.zero_grad()
    loss = 0
    for batch in batches:
        out = model(**batch, num_items_in_batch=total, use_cache=False, **settings).loss
        out.backward()
        loss += out.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found, expected, atol=2e-6):
    assert abs(found[0] - expected[0]) < 1e-5
    for name, grad in expected[1].items():
        assert torch.allclose(found[1][name], grad, atol=atol, rtol=1e-4), name


# ---- structure --------------------------------------------------------------------------------------------------


def test_positions_and_prefix_of_a_row():
    config = build().config
    ids = torch.tensor([[20, 21, GMASK, SOP, 22, 23], [PAD, PAD, 24, MASK, SOP, 25]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    prefix, positions = layout(config, ids, mask)
    assert prefix.tolist() == [3, 4]
    assert positions[0].tolist() == [[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]
    assert positions[1].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 2]]
    seen = visible(prefix, mask, 6, 6)[:, 0]
    assert seen[0, 0].tolist() == [True, True, True, False, False, False], (
        "the prefix sees itself, not <sop>"
    )
    assert seen[0, 4].tolist() == [True] * 5 + [False]
    assert seen[1, 2].tolist() == [False, False, True, True, False, False] and seen[1, 0, 0]
    assert torch.equal(visible(prefix, mask, 2, 6)[:, 0], seen[:, 4:])


def test_positions_of_packed_documents_are_those_of_each_alone():
    config, rows = build().config, make_rows()
    batch = collate(build(), rows)
    starts = batch["cu_seq_lens_q"].tolist()
    for i, row in enumerate(rows):
        prefix, positions = layout(config, torch.tensor([row["input_ids"]]))
        assert torch.equal(batch["position_ids"][:, :, starts[i] : starts[i + 1]], positions)
        assert batch["prefix_lengths"][i] - starts[i] == prefix[0] == row["input_ids"].index(SOP)


@pytest.mark.parametrize("ids", [[20, 21, GMASK, 22], [20, 21, SOP, 22]])
def test_a_row_without_its_marks_is_refused(ids):
    with pytest.raises(ValueError, match="gMASK"):
        build()(torch.tensor([ids]))


@pytest.mark.parametrize("published", [
    ({"vocab_size": 150528, "bos_token_id": 150004, "eos_token_id": 150005}, (150000, 150001, 150004, 150005, 20003)),
    ({"vocab_size": 130528, "bos_token_id": 130004, "eos_token_id": 130005, "mask_token_id": 130000,
      "gmask_token_id": 130001, "pad_token_id": 3}, (130000, 130001, 130004, 130005, 3)),
    ({}, (130000, 130001, 130004, 130005, 3)),
])  # fmt: skip
def test_ids_of_both_published_vocabularies(published, tmp_path):
    settings, ids = published
    names = ("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    config = ChatGLMConfig(**settings)
    config.save_pretrained(tmp_path)
    for one in (config, ChatGLMConfig.from_pretrained(tmp_path)):
        assert tuple(getattr(one, name) for name in names) == ids
        assert (one.num_hidden_layers, one.max_position_embeddings, one.residual_scale_layers) == (
            28,
            2048,
            28,
        )


@pytest.mark.parametrize("more, word", [
    ({"padded_vocab_size": 65024, "multi_query_attention": True}, "convert"), ({"quantization_bit": 4}, "4-bit"),
    ({"pre_seq_len": 128}, "p-tuning"), ({"position_encoding_2d": False}, "one-dimensional"),
    ({"num_attention_heads": 3}, "heads"),
])  # fmt: skip
def test_checkpoints_that_would_be_computed_wrongly_are_refused(more, word):
    with pytest.raises(ValueError, match=word):
        ChatGLMConfig(**more)


def test_positions_stay_apart_in_bf16():
    """The original computes its angles in the weights' dtype: in bf16 2,048 positions share some hundred rows."""
    places = torch.arange(2048)[None, None].expand(1, 2, -1)
    cos, sin = rotary(places, 64)
    assert (
        cos.dtype == torch.float32
        and len(torch.cat([cos, sin], -1)[0, :, 0, 0].unique(dim=0)) == 2048
    )
    model, ids = build(layers=1), torch.tensor([make_rows([(1500, 40)])[0]["input_ids"]])
    exact = model(ids).logits
    half = copy.deepcopy(model).bfloat16()(ids).logits.float()
    assert (half - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_the_residual_factor_is_that_of_28_layers_whatever_their_number():
    assert build(num_layers=2).transformer.layers[0].alpha == pytest.approx(56**0.5)
    assert build(num_layers=2, residual_scale_layers=2).transformer.layers[
        0
    ].alpha == pytest.approx(2)


# ---- packed rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stock loss", "chunked loss", "checkpointing"])
def test_packed_equals_padded_and_each_row_alone(how):
    model, rows = build().train(), make_rows()
    expected = gradients(model, [collate(model, [row], packed=False) for row in rows])
    assert_close(gradients(model, [collate(model, rows, packed=False)]), expected)
    if how == "chunked loss":
        losses.use_chunked_loss(model)
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    assert_close(gradients(model, [collate(model, rows)]), expected)


def test_checkpointing_runs_every_layer_again():
    """In the first published code the switch existed and did nothing."""
    model, calls = build().train(), []
    model.gradient_checkpointing_enable()
    for layer in model.transformer.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    gradients(model, [collate(model, make_rows(LENGTHS[:2]))])
    assert len(calls) == 2 * len(model.transformer.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["blocks", "two kernels", "mask"])
def test_prefix_attention_equals_the_whole_matrix(path, dtype):
    """Blocks on a CPU; elsewhere two calls of a variable-length kernel (here: a plain one), or one dense mask."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.tensor([0, 40, 41 + 300, 345, 1000])
    prefix = torch.tensor([30, 41 + 1, 343, 345 + 500])
    query, key, value = (
        torch.randn(2, 1000, 16, generator=generator, dtype=dtype) for _ in range(3)
    )
    seen = torch.zeros(1000, 1000, dtype=torch.bool)
    for a, b, end in zip(starts, starts[1:], prefix, strict=False):
        seen[a:b, a:b] = torch.ones(b - a, b - a).tril().bool()
        seen[a:b, a:end] = True
    exact = [x.double() for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=seen).transpose(
        0, 1
    )
    documents = Documents(starts.to(torch.int32), prefix)
    if path == "blocks":
        found = prefix_attention(query, key, value, documents)
    else:
        found = _elsewhere(
            query, key, value, documents, plain_kernel if path == "two kernels" else None
        )
    assert (found.double() - expected).abs().max() < (2e-5 if dtype is torch.float32 else 2e-2)


def plain_kernel(
    query,
    key,
    value,
    cu_seqlens_q,
    max_seqlen_q,
    scale,
    cu_seqlens_k=None,
    max_seqlen_k=None,
    causal=True,
):
    """What a variable-length kernel computes, document by document; causal is aligned at the ends."""
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    assert max_seqlen_q >= cu_seqlens_q.diff().max()
    assert max_seqlen_k is None or max_seqlen_k >= cu_seqlens_k.diff().max()
    parts = []
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True):
        mask = (
            torch.ones(b - a, d - c).tril(diagonal=int((d - c) - (b - a))).bool()
            if causal
            else None
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            query[:, a:b], key[:, c:d], value[:, c:d], attn_mask=mask, scale=scale
        )
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def test_a_packed_row_with_a_cache_is_refused():
    model = build()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**collate(model, make_rows(LENGTHS[:2])), use_cache=True)


# ---- generation -------------------------------------------------------------------------------------------------


def prompts():
    """Left-padded prompts [gMASK] <sop> of different lengths, and each alone."""
    alone = [
        torch.tensor([row["input_ids"][: row["input_ids"].index(SOP) + 1]])
        for row in make_rows()[:4]
    ]
    width = max(one.shape[1] for one in alone)
    ids = torch.cat(
        [torch.nn.functional.pad(one, (width - one.shape[1], 0), value=PAD) for one in alone]
    )
    mask = torch.stack([torch.arange(width) >= width - one.shape[1] for one in alone]).long()
    return ids, mask, alone


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_a_batch_with_padding_says_what_each_row_says_alone(how):
    model, (ids, mask, alone) = build(), prompts()
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD,
    } | how
    batch = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, one in zip(batch, alone, strict=True):
        said = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **settings)[
            0, one.shape[1] :
        ]
        assert torch.equal(row, said)
    assert len({tuple(row.tolist()) for row in batch}) > 1


def test_logits_with_a_cache_are_those_without():
    model, row = build(), torch.tensor([make_rows([(20, 15)])[0]["input_ids"]])
    asked = 22
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    out = model.generate(
        row[:, :asked], output_logits=True, return_dict_in_generate=True, **settings
    )
    whole = model(out.sequences, use_cache=False).logits[0, asked - 1 : -1]
    assert torch.allclose(torch.cat(list(out.logits)), whole, atol=2e-5)
    first = model(row[:, :asked], use_cache=True)
    assert first.past_key_values.get_seq_length() == asked
    with pytest.raises(ValueError, match="position_ids"):
        model(row[:, asked : asked + 1], past_key_values=first.past_key_values)
    few = model(row, logits_to_keep=2).logits
    assert few.shape[1] == 2 and torch.allclose(few, model(row).logits[:, -2:], atol=1e-6)


def test_sampling_and_training_mode():
    model, (ids, mask, _) = build(), prompts()
    torch.manual_seed(0)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=True,
        top_p=0.7,
        temperature=0.95,
    )
    assert out.shape[1] <= ids.shape[1] + 5
    assert model.train()(ids, attention_mask=mask).past_key_values is None


# ---- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder like a published one: fp16, buffers of the rotation, an auto_map; the model it holds)."""
    from safetensors.torch import save_file

    folder, model = tmp_path_factory.mktemp("published"), build(seed=5).half().float()
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    buffers = {
        f"transformer.layers.{i}.attention.rotary_emb.inv_freq": torch.zeros(8) for i in range(3)
    }
    assert len(tensors) + len(buffers) == 3 * 13 + 4  # 368 = 28 * 13 + 4 of the published one
    save_file(tensors | buffers, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("mask_token_id", "gmask_token_id", "dtype")
    }
    config |= {"torch_dtype": "float16", "architectures": ["ChatGLMModel"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def test_a_published_checkpoint_loads_whole_and_reopens_everywhere(published, tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder, model = published
    ids = torch.tensor([make_rows([(20, 5)])[0]["input_ids"]])
    expected = model(ids).logits
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        loaded = auto.from_pretrained(folder, dtype=torch.float32)
        assert type(loaded) is ChatGLMForConditionalGeneration and torch.equal(
            loaded.eval()(ids).logits, expected
        )
    assert AutoModel.from_pretrained(folder, dtype="auto").dtype == torch.float16
    loaded.save_pretrained(tmp_path)
    program = (
        f"import sys; sys.path[:0] = ['{ROOT}', '{RECIPE}']\nfrom common import cli\nimport modeling_chatglm, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained('{tmp_path}').eval()\n"
        f"torch.save(model(torch.tensor({ids.tolist()})).logits, '{tmp_path}/logits.pt')"
    )
    expect(finish(start([sys.executable, "-c", program])))
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert set(weights(tmp_path)) == set(model.state_dict())


@pytest.mark.parametrize(
    "change, word", [("take", "missing"), ("add", "unexpected"), ("cut", "mismatched")]
)
def test_a_checkpoint_that_does_not_fit_is_refused(published, tmp_path, change, word):
    from safetensors.torch import load_file, save_file

    folder, _ = published
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors, name = (
        load_file(folder / "model.safetensors"),
        "transformer.layers.1.mlp.dense_h_to_4h.bias",
    )
    kept = tensors.pop(name)
    if change != "take":
        tensors |= {
            "add": {name: kept, "transformer.prefix.weight": kept.clone()},
            "cut": {name: kept[:-1].clone()},
        }[change]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="mismatch" if change == "cut" else word):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path)


# ---- whole runs -------------------------------------------------------------------------------------------------
# One rank = two under ZeRO-2, checkpoints and kills: test_contract.py and core/test_training.py.

SHORT = [
    "--max_steps", 6, "--save_steps", 3, "--logging_steps", 1, "--eval_generate", 0, "--report_to", "none",
    "--bf16", "false", "--learning_rate", 1e-3, "--data_path", RECIPE / "data",
]  # fmt: skip
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


def train(script, output, size, *flags, nproc):
    """A short run of one of the recipe's shells; `size`: items per device and micro-step."""
    flags = [*SHORT, "--per_device_train_batch_size", size, *flags]
    done = shell(RECIPE / script, *flags, OUTPUT=output, NPROC=nproc, fork=True, **QUIET)
    return expect(done)


@pytest.mark.slow
def test_accelerate_on_two_ranks_gives_what_torchrun_gives_on_one(tmp_path):
    """ZeRO-3 with weights in host memory, as `accelerate launch` starts it, and one plain process."""
    one, two = tmp_path / "one", tmp_path / "two"
    train("train_torchrun.sh", one, 8, "--save_strategy", "no", nproc=1)
    flags = ["--gradient_accumulation_steps", 2, "--save_strategy", "no"]
    train("train_accelerate.sh", two, 2, *flags, nproc=2)
    expected, found = history(one), history(two)
    assert len(expected) == 6 and found.keys() == expected.keys() and expected[6] < expected[1]
    assert max(abs(found[step] - expected[step]) / expected[step] for step in expected) < 1e-5
    assert largest_difference(weights(one / "final"), weights(two / "final")) < 1e-4
    assert all("lora_" in key for key in weights(two / "final")), "only the adapter is saved"
    plain, facts = report(one), report(two)
    assert plain["tokens"] == facts["tokens"]
    assert (plain["engine"], facts["engine"]) == ("single", "zero-3")
    rows = facts["rows"]  # conversations, of which many have several answers
    assert rows["used"] + rows["held_out"] == rows["read"] == 1175
    assert rows["answers"] > 1.2 * rows["used"]


@pytest.mark.slow
def test_a_run_with_dropout_continues_bit_exactly(tmp_path):
    """So the random states of both ranks are restored, too."""
    command = ("train_zero2.sh", tmp_path, 4, "--lora_dropout", 0.1)
    train(*command, nproc=2)
    losses, sha = history(tmp_path), weights_sha(tmp_path / "final")
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(tmp_path / name)
    again = train(*command, "--resume_from_checkpoint", tmp_path / "checkpoint-3", nproc=2)
    assert "continuing from" in again.stdout and "checkpoint-3" in again.stdout
    assert history(tmp_path) == losses
    assert weights_sha(tmp_path / "final") == sha


@pytest.mark.slow
def test_the_command_of_the_readme_learns_and_its_model_answers(tmp_path):
    """`bash chatglm_lora/train_zero2.sh` with a third of its epochs, after which most answers are right;
    base and adapter through peft, as a user would open them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.convert import adapter
    from common.data.labels import encode_prompt
    from common.runs.generate import generate_answers

    short = ["--num_train_epochs", 2, "--eval_generate", 30]
    done = shell(RECIPE / "train_zero2.sh", *short, OUTPUT=tmp_path, NPROC=1, fork=True)
    printed = expect(done).stdout
    facts = report(tmp_path)
    before, after = facts["metrics"]["before"], facts["metrics"]["after"]
    assert (
        facts["engine"] == "zero-2"
        and facts["recipe"] == "chatglm_lora"
        and "| exact match |" in printed
    )
    assert before["exact_match"] < 0.05 and after["exact_match"] > 0.5, facts["metrics"]
    assert after["loss"] < 0.1 * before["loss"]
    final = tmp_path / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(adapter.check_base(final)), final
    )
    asked = [encode_prompt(tokenizer, [{"role": "user", "content": "你是谁呢"}])]
    tuned = generate_answers(model, tokenizer, asked, 40)
    with model.disable_adapter():
        base = generate_answers(model, tokenizer, asked, 40)
    assert "小谱" in tuned[0] and "小谱" not in base[0] and "名字" in base[0]


@pytest.mark.slow
def test_a_model_that_needs_another_way_is_one_line(tmp_path):
    config = {"model_type": "chatglm", "padded_vocab_size": 65024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--output_dir", tmp_path / "out"]
    done = shell(RECIPE / "train_torchrun.sh", *flags, MODEL=tmp_path, NPROC=1, fork=True)
    assert "convert.py" in error_line(done, 1)
