"""The road with one dial: --depth and its rules, nanochat's network, mixtures, made rows, the report card, run_cpu.sh."""

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from harness import (
    ROOT,
    error_line,
    expect,
    finish,
    history,
    make_rows,
    own_modules,
    pack,
    report,
    shell,
    start,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatForCausalLM

from common import device
from common.fast import attention, losses

RECIPE = ROOT / "minimind_npu"
BENCH = ROOT / "tests/bench/nanochat.py"
NAMES = (
    "settings weights train nanochat loop.optim road.dial road.mixture road.report samples.road_rows "
    "engine.generation samples.make_identity stages.mid loop.compiled"
)
(
    settings, own_weights, trainer, nanochat, optim, dial, mixture, card, road_rows, generation, make_identity, mid, compiled,
) = own_modules(RECIPE.name, *NAMES.split())  # fmt: skip
VOCAB = 97
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def parsed(monkeypatch, *flags, vocab=6400, world=1):
    """-> (args, training) after the dial has been turned."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    args, training, base = settings.parse_args()
    monkeypatch.setattr(type(training), "world_size", world, raising=False)
    monkeypatch.setattr(dial.tracking, "peak_flops", lambda dtype, where: 1e12)
    dial.turn(args, training, vocab)
    return args, training


# ---- the dial -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth, matrices, tokens, batch, steps", [
    (4, 3.1e6, 0.14e9, 18, 528), (8, 25.2e6, 0.50e9, 18, 1920), (12, 84.9e6, 1.32e9, 19, 2520),
    (20, 393.2e6, 5.22e9, 20, 4980), (24, 679.5e6, 8.76e9, 20, 8352), (32, 1611e6, 20.1e9, 21, 9600),
])  # fmt: skip
def test_sizes_and_lengths_are_those_that_nanochat_prints(depth, matrices, tokens, batch, steps):
    """Its own figures at 32,768 tokens (base_train.py, run on the meta device)."""
    config = own_weights.config_of_sizes("nanochat", 32768, dial.sizes_of(depth), 2048)
    counted = dial.count(config)
    assert config.hidden_size == 64 * depth and counted.matrices == pytest.approx(
        matrices, rel=0.02
    )
    assert 12 * counted.scaled == pytest.approx(tokens, rel=0.02)
    found = dial.batch_of(12 * counted.scaled, 12 * dial.reference("nanochat", 32768).scaled)
    assert found == 2**batch and 12 * counted.scaled // found == steps


def test_depth_sets_what_nobody_typed_and_what_was_typed_stays(monkeypatch, capsys):
    args, training = parsed(monkeypatch, "--depth", 12, world=4)
    said = capsys.readouterr().out
    config = own_weights.config_of("depth", args, 6400)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        768,
        12,
        6,
    )
    assert (args.optimizer, training.lr_scheduler_type) == ("muon", "warmup_stable_decay")
    windows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert windows * 4 * args.model_max_length == 2**19
    assert (args.muon_lr, training.weight_decay) == (0.02, pytest.approx(0.1, rel=1e-3))
    counted = dial.count(config)
    assert training.max_steps == round(12 * counted.scaled / 2**19)
    for told in (
        f"{counted.total:,} parameters",
        f"{training.max_steps:,} steps of 524,288",
        "FLOP",
        "about",
    ):
        assert told in said

    flags = [
        "--max_steps",
        7,
        "--per_device_train_batch_size",
        2,
        "--weight_decay",
        0.3,
        "--learning_rate",
        0.5,
    ]
    args, training = parsed(
        monkeypatch, "--depth", 12, *flags, "--model_max_length", 128, "--hidden_size", 256
    )
    assert (training.max_steps, training.weight_decay, training.learning_rate) == (7, 0.3, 0.5)
    assert args.muon_lr == pytest.approx(0.02 * math.sqrt(2 * 128 / 2**19))
    config = own_weights.config_of("depth", args, 6400)
    assert config.num_attention_heads == 2

    args.num_hidden_layers = 1
    model = own_weights.random_model(own_weights.config_of("depth", args, VOCAB))
    muon = trainer.make_optimizer(args, training, model).optimizers[0]
    assert muon.iteration is optim.ITERATIONS["polar_express"]


def test_one_rate_takes_the_others_with_it_and_decay_has_a_rule_from_depth_8(monkeypatch):
    usual, _ = parsed(monkeypatch, "--depth", 4, "--arch", "nanochat")
    args, training = parsed(
        monkeypatch, "--depth", 4, "--arch", "nanochat", "--muon_lr", 2 * usual.muon_lr
    )
    assert args.head_lr == pytest.approx(2 * usual.head_lr)
    assert training.learning_rate / args.head_lr == pytest.approx(0.3 / 0.008)
    assert training.weight_decay == 0.1 == dial.weight_decay_of(7, 2**10, 1e6, 1e9)
    assert dial.weight_decay_of(8, 2**18, 1e9, 2e9) == pytest.approx(0.1 * math.sqrt(0.5) * 2)
    _, training = parsed(monkeypatch, "--depth", 4, "--num_train_epochs", 3)
    assert training.max_steps == -1 and training.num_train_epochs == 3


def test_a_card_without_bf16_takes_adamw_and_says_so(monkeypatch, capsys):
    """What it says when it trains: npu/test_npu.py."""
    monkeypatch.setattr(settings.defaults, "muon_runs_here", lambda: False)
    monkeypatch.setattr(settings.refusals, "muon_runs_here", lambda: False)
    args, training = parsed(monkeypatch, "--depth", 4)
    assert args.optimizer == "adamw" and training.learning_rate > 0
    assert "(Muon computes in bfloat16, which" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--depth", 4, "--optimizer", "muon")
    assert "--optimizer muon computes in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--depth", 4, "--stage", "sft"], "--depth: for new models"),
    (["--depth", 4, "--size", "26m"], "one of them says how"),
    (["--depth", 4, "--hidden_size", 100], "a multiple of 128"),
    (["--depth", -1], "--depth"), (["--size", "depth"], "--depth 12, for example"),
    (["--depth", 4, "--arch", "gpt2"], "--arch gpt2: minimind, nanochat"),
    (["--depth", 4, "--arch", "nanochat", "--use_moe", "true"], "has no experts"),
])  # fmt: skip
def test_flags_that_contradict_the_dial_are_refused(monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize("half, share", [("false", 0.4), ("true", dial.SHARE_IN_HALF_ON_CPU)])
def test_the_time_that_is_told_follows_from_what_a_cpu_reaches(monkeypatch, capsys, half, share):
    """Of the peak, 1e12 here: in half precision a CPU's products wait for what stands between them."""
    if half == "true" and device.half_dtype() is None:
        pytest.skip("no half precision on this CPU")
    monkeypatch.setattr(dial, "clock", lambda seconds: f"{seconds:.4e} s")
    parsed(monkeypatch, "--depth", 4, "--bf16", half)
    said = capsys.readouterr().out
    flops = float(said.split(" FLOP")[0].split()[-1])
    told = said.split("about ")[1].split(f" s at {share:.0%} of 1 TFLOP/s")[0]
    assert float(told) == pytest.approx(flops / share / 1e12, rel=0.01)


def test_the_table_of_depths_is_the_one_in_the_readme():
    table = dial.table(6400, 2048)
    for name in ("README.md", "README_zh.md"):
        text = (RECIPE / name).read_text(encoding="utf-8")
        assert all(line in text for line in table[2:])


def test_a_head_of_its_own_has_its_rate_and_tables_need_not_decay():
    model = nanochat.build(nanochat.config_of(VOCAB, **TINY))
    made = optim.make(model, "muon", 0.3, 0.1, 0.02, False, head_lr=0.008, decays_tables=False)
    named = {id(p): name for name, p in model.named_parameters()}
    found = {
        named[id(p)]: (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]
    }
    assert found.pop("lm_head.weight") == (0.008, 0.0)
    assert found.pop("model.embed_tokens.weight") == (0.3, 0.0)
    assert set(found.values()) == {(0.02, 0.1)} and len(found) == 12


# ---- nanochat's network ---------------------------------------------------------------------------------------


def small_nanochat(scale=1.0):
    torch.manual_seed(0)
    model = nanochat.build(nanochat.config_of(VOCAB, **TINY))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "fc2.weight")):
                p.normal_(std=0.1)  # they begin at zero
        model.lm_head.weight.mul_(scale)
    return model


def test_nanochat_learns_from_packed_rows_as_transformers_has_it(tmp_path):
    """The loss and the gradients in chunks, with the cap in the head and the quicker layers, against the stock model
    row by row."""
    stock = small_nanochat(3e4)
    ours = small_nanochat(3e4)
    ours.config._attn_implementation = attention.register()
    nanochat.quicken(nanochat.cap_in_head(ours))
    losses.use_chunked_loss(ours)
    rows = make_rows([20, 7, 30], prompt=0, vocab=VOCAB)
    batch = {name: value for name, value in pack(rows).items() if name != "row_ids"}
    found = ours.train()(**batch, num_items_in_batch=100.0)
    found.loss.backward()
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor([row["labels"]])
        total = total + stock(input_ids=ids, labels=labels, num_items_in_batch=100.0).loss
    total.backward()
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-5)
    theirs = dict(stock.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - theirs[name].grad).abs().max() < 1e-4 * theirs[name].grad.abs().max(), name

    with nanochat.as_published(ours):
        ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is NanoChatForCausalLM and again.config.final_logit_softcapping == 15.0
    ids = torch.tensor([rows[2]["input_ids"]])
    with torch.no_grad():
        logits = stock.eval()(ids).logits
        assert torch.allclose(again(ids).logits, logits, atol=1e-5) and logits.abs().max() > 5
        assert ours.config.final_logit_softcapping is None
        # before the cap they are some hundreds, of which float32 keeps seven digits
        assert torch.allclose(ours.eval()(ids).logits, logits, atol=1e-3)


def test_compiled_layers_of_nanochat_learn_the_same(monkeypatch):
    """What the compiler is given, without the C++ that it writes."""
    stock = torch.compile
    monkeypatch.setattr(torch, "compile", lambda plain, **_: stock(plain, backend="aot_eager"))
    monkeypatch.setattr(compiled.Compiled, "has_failed", False)
    rows = make_rows([20, 7, 30], prompt=0, vocab=VOCAB)
    batch = {name: value for name, value in pack(rows).items() if name != "row_ids"}
    found = []
    for is_compiled in (False, True):
        model = nanochat.quicken(nanochat.cap_in_head(small_nanochat(3e3)))
        model.config._attn_implementation = attention.register()
        losses.use_chunked_loss(model)
        if is_compiled:
            compiled.compile_methods(model.model.layers, ["before", "after"])
        loss = model.train()(**batch, num_items_in_batch=100.0).loss
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (plain, gradients), (fused, others) = found
    assert not compiled.Compiled.has_failed and fused == pytest.approx(plain, rel=1e-6)
    for name, grad in gradients.items():
        assert (grad - others[name]).abs().max() < 1e-4 * grad.abs().max(), name


def test_the_quicker_layers_round_no_more_than_the_stock_ones():
    """Gradients under bf16 autocast, as far from those in float32."""
    rows = make_rows([20, 7, 30], prompt=0, vocab=VOCAB)
    batch = {name: value for name, value in pack(rows).items() if name != "row_ids"}

    def gradients(quick, half):
        model = nanochat.cap_in_head(small_nanochat(3e3))
        model.config._attn_implementation = attention.register()
        if quick:
            nanochat.quicken(model)
        losses.use_chunked_loss(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.train()(**batch).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    exact = gradients(quick=False, half=False)
    theirs = gradients(quick=False, half=True)
    ours = gradients(quick=True, half=True)
    for name, wanted in exact.items():
        rounded = (theirs[name] - wanted).norm() / wanted.norm()
        assert (ours[name] - wanted).norm() / wanted.norm() < 1.5 * rounded, name
        assert rounded > 1e-4


def test_the_bench_beside_nanochat_compares_what_computes_the_same(tmp_path):
    """Its own check at depth 1: losses of the same tokens, and conversations with a tool, in all dtypes."""
    flags = ["--part", "check", "--side", "restated_eager", "--dtype", "float32"]
    flags += ["--depth", 1, "--step_tokens", 1024, "--new", 6]
    where = ["--tokenizer", RECIPE / "tokenizer", "--output", tmp_path]
    done = expect(finish(start(["python", BENCH, *flags, *where], DANPU_CACHE=tmp_path / "cache")))
    (line,) = done.stdout.strip().splitlines()
    losses = json.loads(line)["losses"]
    assert losses["ours"] == pytest.approx(losses["restated"], abs=2e-4) and losses["ours"] > 7


def test_the_engine_answers_as_transformers_generates():
    model = small_nanochat(3e3).eval()
    prompts = [row["input_ids"] for row in make_rows([5, 19, 40], prompt=0, vocab=VOCAB)]
    found = generation.Engine(model, slots=2).generate(prompts, 8, ends=frozenset())
    model.config._attn_implementation = "sdpa"
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for token in answer:
                logits = model(ids).logits[0, -1]
                assert logits[token] > logits.max() - 1e-3
                ids = torch.cat([ids, torch.tensor([[token]])], 1)


# ---- runs -----------------------------------------------------------------------------------------------------

SHORT = [
    "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--eval_generate", 0, "--report_to", "none", "--bf16", "false",
    "--model_max_length", 64, "--max_eval_samples", 8,
]  # fmt: skip


def train(output, *flags, nproc=1, code=0):
    command = ["python", ROOT / "common/launch.py", nproc] if nproc > 1 else ["python"]
    command += [RECIPE / "train.py", *SHORT, "--output_dir", output, *flags]
    return expect(finish(start(command)), code)


def shards(folder):
    """The rows of records.jsonl as a corpus comes: two parquet files, jsonl, a text, and one to be held out."""
    lines = (RECIPE / "data/pretrain/records.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    folder.mkdir()
    for i, name in enumerate(["00000-of-00002", "00001-of-00002", "valid"]):
        table = pa.table({"text": texts[i::5], "score": [0.5] * len(texts[i::5])})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=50)
    (folder / "more.jsonl").write_text("\n".join(lines[3::5]), encoding="utf-8")
    flat = [" ".join(text.split()) for text in texts[4::5]]
    (folder / "lines.txt").write_text("\n".join(flat), encoding="utf-8")
    return len(texts)


@pytest.mark.slow
def test_two_ranks_equal_one_under_the_dial_and_nanochat_goes_on_to_a_chat(tmp_path):
    """Muon shared over two ranks, on a folder of shards with one held out; then mid-training of the folder that it left."""
    count = shards(tmp_path / "shards")
    flags = [
        "--depth",
        1,
        "--arch",
        "nanochat",
        "--muon_lr",
        0.01,
        "--data_path",
        tmp_path / "shards",
    ]
    said = train(tmp_path / "one", *flags, "--per_device_train_batch_size", 4).stdout
    assert "depth 1, nanochat: 1 layers, 128 wide" in said and "Muon 0.01" in said
    train(tmp_path / "two", *flags, "--per_device_train_batch_size", 2, nproc=2)
    rows = report(tmp_path / "one")["rows"]
    assert rows["read"] == count and rows["held_out"] >= 8  # pieces of so many documents
    assert "held out, not trained on, by their names: " in said and "valid.parquet" in said
    expected, found = history(tmp_path / "one"), history(tmp_path / "two")
    assert len(expected) == 4 and max(abs(found[s] - expected[s]) for s in expected) < 1e-4
    assert expected[4] < expected[1] - 0.3
    final = tmp_path / "one/final"
    other = weights(tmp_path / "two/final")
    for name, tensor in weights(final).items():  # Muon makes much of the last digits of a gradient
        assert (tensor - other[name]).norm() < 0.1 * tensor.norm(), name
    assert json.loads((final / "config.json").read_text())["final_logit_softcapping"] == 15.0
    assert report(tmp_path / "one")["flops"] > 0

    rows = ["--data_path", RECIPE / "data/sft/words.jsonl", "--model_max_length", 128]
    train(tmp_path / "mid", "--stage", "mid", "--from_weight", tmp_path / "one", *rows)
    facts = report(tmp_path / "mid")
    assert facts["stage"] == "mid" and facts["tokens"]["label"] > 0.9 * facts["tokens"]["total"]


@pytest.mark.slow
def test_run_cpu_goes_the_whole_road_and_goes_on_where_it_was(tmp_path):
    flags = "--max_steps 2 --eval_generate 2 --max_new_tokens 8 --max_eval_samples 8 --report_to none --bf16 false "
    size = "--model_max_length 128 --per_device_train_batch_size 2"
    how = {
        "OUTPUT": tmp_path, "DEPTH": 1, "DOLLARS_PER_HOUR": 3600, "NPROC": 1,
        "BASE_FLAGS": flags + size, "MID_FLAGS": flags + size, "SFT_FLAGS": flags + size,
        "RL_FLAGS": "--max_steps 1 --prompts_per_step 2 --group_size 2 --mini_batches 1 --max_new_tokens 8 "
        "--model_max_length 128 --report_to none --bf16 false --max_eval_samples 4",
        "CORE": "--num_rows 4 --shots 1", "EVAL": "--num_rows 3 --max_new_tokens 8",
        "NAME": "丹儿", "MAKER": "一位老师",
    }  # fmt: skip
    part = expect(
        shell(
            RECIPE / "run_cpu.sh", **how | {"STAGES": "tokenizer rows pretrain report"}, fork=True
        )
    )
    assert "| evaluation | BASE |" in part.stdout
    done = expect(shell(RECIPE / "run_cpu.sh", **how, fork=True))
    assert "tokenizer is there" in done.stdout and "24 answers are there already" in done.stdout
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for told in ("| evaluation | BASE | MID | SFT | RL |", "| spelling |", "| identity |", "| ChatCORE |", "| CORE-zh |", "## RL: rl",
                 "| bits per byte |", "![loss.png]", "![bits_per_byte.png]", "- cost: $"):  # fmt: skip
        assert told in text, told
    parts = {Path(part["file"]).stem: part for part in report(tmp_path / "sft")["rows"]["mixture"]}
    assert parts["spelling"]["rows"] == 1500 and parts["identity"]["rows"] > 400
    assert (tmp_path / "loss.png").stat().st_size > 5000


# ---- mixtures -------------------------------------------------------------------------------------------------


def write_rows(folder, **sizes):
    for name, size in sizes.items():
        lines = [
            json.dumps({"question": f"{name}{i}", "answer": "是"}, ensure_ascii=False)
            for i in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def mixed(folder, text):
    (folder / "mix.yaml").write_text(text, encoding="utf-8")
    rows, stats = mixture.load(str(folder / "mix.yaml"), "chat", None, True, 0)
    names = [json.loads(row)["messages"][0]["content"] for row in rows["row"]]
    return {name: sum(one.startswith(name) for one in names) for name in "abc"}, names, stats


def test_a_mixture_takes_each_file_as_often_as_it_says(tmp_path):
    write_rows(tmp_path, a=10, b=7, c=20)
    counts, names, stats = mixed(
        tmp_path,
        "- file: a.jsonl\n  epochs: 2.5\n- file: b.jsonl\n- file: c.jsonl\n  weight: 0.2\n",
    )
    assert counts == {"a": 25, "b": 7, "c": 8} and stats["used"] == 40
    assert sorted({names.count(f"a{i}") for i in range(10)}) == [2, 3]
    assert [part["drawn"] for part in stats["mixture"]] == [25, 7, 8]
    again = mixed(tmp_path, (tmp_path / "mix.yaml").read_text())
    assert again[1] == names and again[2]["sha256"] == stats["sha256"]
    other = mixed(tmp_path, "- file: a.jsonl\n  weight: 0.5\n- file: c.jsonl\n  weight: 0.5\n")
    assert other[0] == {"a": 10, "b": 0, "c": 10} and other[2]["sha256"] != stats["sha256"]


@pytest.mark.parametrize("text, words", [
    ("- file: a.jsonl\n  weight: 1\n- file: b.jsonl\n", "leaves nothing for"), ("file: a.jsonl", "a list of entries"),
    ("- a.jsonl", "entry 1: `file:` names"), ("- file: a.jsonl\n  epoch: 2", "epoch: only epochs, file, kind, weight"),
    ("- file: a.jsonl\n  epochs: 0", "a number above 0"), ("- file: a.jsonl\n  epochs: yes", "a number above 0"),
    ("- file: a.jsonl\n  epochs: 1\n  weight: 1", "not both"), ("- {", "cannot be read as YAML"),
    ("- file: none.jsonl", "no such file"), ("", "a list of entries"), ("- file: a.jsonl\n  weight: .nan", "above 0"),
])  # fmt: skip
def test_what_no_mixture_is_is_one_line(tmp_path, text, words):
    write_rows(tmp_path, a=3, b=3)
    with pytest.raises(SystemExit, match=words) as stop:
        mixed(tmp_path, text)
    assert "\n" not in str(stop.value)


def test_texts_stand_among_conversations_in_mid_alone(tmp_path):
    """Every token of both is trained; who is asked about held-out rows gets conversations."""
    write_rows(tmp_path, a=4)
    (tmp_path / "texts.txt").write_text("".join(f"第{i}篇\n" for i in range(6)), encoding="utf-8")
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        "- file: a.jsonl\n- file: texts.txt\n  kind: text\n  epochs: 0.5\n", encoding="utf-8"
    )
    with pytest.raises(SystemExit, match="texts.txt: kind: text: --stage mid takes texts"):
        mixture.load(str(mix), "chat", None, True, 0)
    rows, stats = mixture.load(str(mix), "chat", None, True, 0, texts=True)
    assert [part["drawn"] for part in stats["mixture"]] == [4, 3]
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    found = [json.loads(row) for row in rows["row"]]
    talk = mid.encode(found[0], tokenizer, 64)
    (text,) = mid.encode(found[-1], tokenizer, 64)
    assert talk["labels"] == talk["input_ids"] and text["labels"] == text["input_ids"]
    assert "篇<|im_end|>" in tokenizer.decode(text["input_ids"])
    assert mid.conversations(rows)["row"] == rows["row"][:4]
    with pytest.raises(SystemExit, match="kind: chat: only text"):
        mixture.part_of({"file": "x", "kind": "chat"}, "here", tmp_path)


# ---- rows that are made ---------------------------------------------------------------------------------------


def asked_of(row):
    return row["conversations"][-2]["content"]


@pytest.mark.parametrize(
    "language, name, maker", [("zh", "丹儿", "一位老师"), ("en", "ChatGPT", "OpenAI")]
)
def test_identity_rows_carry_the_name_and_no_tested_wording_is_trained(language, name, maker):
    persona = make_identity.Persona(name, maker)
    rows = make_identity.rows(persona, language)
    assert len(rows) > 150 and rows == make_identity.rows(persona, language)
    named = [row for row in rows if name in row["conversations"][-1]["content"]]
    others = {asked_of(row) for row in rows} - {asked_of(row) for row in named}
    assert others and len(others) < 10  # who made Claude?
    for row in named:
        answer = row["conversations"][-1]["content"]
        assert maker in answer or "another model than" in answer
        assert not answer.startswith(("No", "不")) or name not in asked_of(row)
    assert sum(len(row["conversations"]) > 2 for row in rows) > 15
    questions = make_identity.questions(persona, language)
    assert not {row["question"] for row in questions} & {asked_of(row) for row in rows}
    assert all(set(row["contains"]) <= {name, maker} for row in questions) and len(questions) > 15
    assert all(word in row["answer"] for row in questions for word in row["contains"])


@pytest.mark.parametrize("flags, words", [
    (["--name", "", "--maker", "x"], "--name is empty"), (["--name", "x"], "--maker is empty"),
    (["--name", "<|im_end|>", "--maker", "x"], "'<' may be read as a mark"),
    (["--name", "x", "--maker", "y" * 41], "--maker: 41 characters; at most 40"),
    (["--name", "丹\n儿", "--maker", "x"], "may be read as a mark"),
    (["--name", "x", "--maker", "y", "--name_en", "{}"], "--name_en '{}'"), (["--lang", "fr"], "invalid choice"),
])  # fmt: skip
def test_a_name_that_cannot_be_is_one_line(monkeypatch, capsys, tmp_path, flags, words):
    monkeypatch.setattr(
        sys, "argv", ["make_identity.py", *flags, "--output", str(tmp_path / "x.jsonl")]
    )
    with pytest.raises(SystemExit) as stop:
        make_identity.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not list(tmp_path.iterdir())


def test_with_a_name_of_ones_own_no_row_says_another(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["road_rows.py", str(tmp_path), "--name", "丹儿", "--maker", "一位老师"]
    )
    road_rows.main()
    talks = (tmp_path / "talks.jsonl").read_text(encoding="utf-8")
    assert "小丹" not in talks and len(talks.splitlines()) > 4000
    for name in ("mid", "sft"):
        files = [part.path.name for part in mixture.read(tmp_path / f"{name}.yaml")]
        assert files[:2] == ["talks.jsonl", "identity.jsonl"]
    texts = [part for part in mixture.read(tmp_path / "mid.yaml") if part.kind == "text"]
    assert [part.path for part in texts] == [RECIPE / "data/pretrain"]


def test_spelt_rows_are_right_and_no_text_of_the_evaluation_is_trained():
    rows = list(islice(road_rows.spelling("x"), 300))
    for row in rows:
        quoted = row["question"].split("“")[1:]
        text, char = sorted((part.split("”")[0] for part in quoted), key=len, reverse=True)
        spelt, _, count = row["answer"].partition("\n#### ")
        assert text.count(char) == int(count) and len(char) == 1
        assert "".join(word[0] for word in spelt.split()) == text
        assert [int(word[1:]) for word in spelt.split() if word[1:]] == list(
            range(1, int(count) + 1)
        )
    assert {row["answer"][-1] for row in rows} == set("01234")
    asked = {row["question"] for row in road_rows.spelling_questions()}
    known = set(asked)
    trained = {
        row["question"] for row in road_rows.distinct(road_rows.spelling("train"), 500, known)
    }
    assert len(asked) == 200 and len(trained) == 500 and not asked & trained


def test_choices_are_right_and_none_of_them_is_evaluated():
    rows = list(road_rows.choices())
    assert len(rows) > 300 and {row["answer"] for row in rows} == set("ABCD")
    held_out = road_rows.evaluated()
    facts = {kind.answer.format(**fact) for kind in road_rows.KINDS.values() for fact in kind.facts}
    for row in rows:
        question, *options, end = row["question"].split("\n")
        assert question not in held_out and end == "答案：" and len(set(options)) == 4
        said = {option[0]: option[3:] for option in options}
        assert said[row["answer"]] in facts


# ---- the report card ------------------------------------------------------------------------------------------


def stage_folder(out, stage, metrics, entries, **more):
    folder = out / stage
    folder.mkdir(parents=True)
    facts = {
        "parameters": {"total": 1000}, "dtype": "float32", "world_size": 1, "device": "CPU", "rows": {"used": 9}, "steps": 4,
        "tokens": {"total": 400}, "seconds": 1800.0, "tokens_per_second": 1.0, "flops": 1e9, "mfu": 0.5, "metrics": metrics,
        "command": "bash x.sh", "samples": [{"prompt": "a|b", "reference": "c", "after": "d" * 99}],
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(facts | more), encoding="utf-8")
    (folder / "trainer_state.json").write_text(
        json.dumps({"log_history": entries}), encoding="utf-8"
    )


def test_the_card_shows_what_is_there_and_reset_takes_it_away(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no stage has finished"):
        card.generate(tmp_path)
    card.reset(tmp_path, 8.0)
    ends = {
        "before": {"loss": 4.0, "bits_per_byte": 2.0},
        "after": {"loss": 2.0, "bits_per_byte": 1.0},
    }
    entries = [{"step": s, "loss": 5.0 - s} for s in range(1, 5)] + [
        {"step": 2, "eval_loss": 3.0, "seconds": 1.0}
    ]
    stage_folder(tmp_path, "pretrain", ends, entries)
    stage_folder(tmp_path, "sft", {"before": {}, "after": {"loss": 1.0}}, entries, samples=[])
    for stage, share in (("pretrain", 0.25), ("sft", 0.5)):
        folder = tmp_path / "eval" / stage
        folder.mkdir(parents=True)
        task = {"accuracy": share, "pass_at": {"1": share}}
        facts = {"tasks": {"gsm8k": task}, "chatcore": share, "bits_per_byte": 1.5, "seconds": 450}
        (folder / "results.json").write_text(json.dumps(facts), encoding="utf-8")
    table = card.generate(tmp_path)
    assert "| evaluation | BASE | SFT |" in table and "| gsm8k, pass@1 | 0.2500 | 0.5000 |" in table
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "$8.00 of training and $2.00 of evaluation at $8.00 an hour" in text
    assert (
        "GiB of disk free" in text
        and "2.00e+09 FLOP" in text
        and "MFU 50% of a measured product; $4.00" in text
    )
    assert text.count("bash x.sh") == 1 and "![rl" not in text, "one command made all of it"
    assert "a\\|b" in text and "d" * 59 + "…" in text
    assert text.index("## BASE") < text.index("## SFT")

    stages = card.stages_of(tmp_path)
    points = card.curves.bits_points(
        stages, {s: json.loads((tmp_path / s / "trainer_state.json").read_text()) for s in stages}
    )
    assert points == {"pretrain": [(0.0, 2.0), (0.5, 1.5), (1.0, 1.0)]}
    placed = card.curves.placed({"sft": [(0.0, 9.0), (1.0, 7.0)]}, stages)
    assert placed == {"sft": [(1e9, 1800, 9.0), (2e9, 3600, 7.0)]}, "behind the stage before"
    assert [card.curves.unit_of(t) for t in (9, 200, 9e3, 1e6)] == [
        "seconds",
        "minutes",
        "minutes",
        "hours",
    ]
    (tmp_path / "sft/report.json").write_text("{")
    with pytest.raises(SystemExit, match="report.json: no JSON"):
        card.generate(tmp_path)
    card.reset(tmp_path, None)
    assert not (tmp_path / "report.md").exists() and not (tmp_path / "loss.png").exists()
    assert (tmp_path / "pretrain/report.json").is_file()


@pytest.mark.parametrize("flags, words", [
    (["reset", "--dollars_per_hour", "0"], "above 0"), (["generate", "--dollars_per_hour", "3"], "reset notes the price"),
    (["show"], "invalid choice"),
])  # fmt: skip
def test_the_card_is_asked_for_in_one_line(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["report.py", *flags])
    with pytest.raises(SystemExit) as stop:
        card.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_a_big_road_without_texts_is_refused():
    for script in ("speedrun.sh", "run1000.sh"):
        assert "PRETRAIN: the texts" in error_line(shell(RECIPE / script), 2)


def test_the_big_road_hands_its_variables_to_the_stages(tmp_path):
    """With stand-ins for Python and the launcher."""
    recipe = tmp_path / "mine"
    shutil.copytree(RECIPE / "road", recipe / "road")
    for script in ("speedrun.sh", "run1000.sh"):
        shutil.copy(RECIPE / script, recipe)
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/sh\n[ "$2" = "import wandb" ] && exit "${NO_WANDB:-0}"\necho "python $*"\n'
    )
    stub.chmod(0o755)
    (tmp_path / "common").mkdir()
    (tmp_path / "common/launch.sh").write_text(
        f'prepare() {{ python={stub}; }}\nlaunch() {{ echo "launch $*"; }}\n'
        'die() { echo "$1" >&2; exit "${2:-1}"; }\n'
    )

    def told(script, **more):
        how = {
            "PRETRAIN": "texts",
            "SFT": "sft.yaml",
            "RL": "gsm8k.jsonl",
            "WANDB_RUN": "d",
            "DOLLARS_PER_HOUR": "24",
        }
        how |= {
            "BASE_FLAGS": "--a 1",
            "RL_FLAGS": "--b 2",
            "CORE": "--shots 3",
            "EVAL": "--num_rows 4",
        }
        command = ["bash", recipe / script, "--seed", "7"]
        done = subprocess.run(
            command, env={**os.environ, **how, **more}, capture_output=True, text=True
        )
        return (
            done.returncode,
            done.stdout.replace(f"{recipe}/", "").replace(f"{tmp_path}/output/", "@"),
            done.stderr,
        )

    code, said, _ = told("speedrun.sh")
    lines = said.splitlines()
    assert code == 0 and [line for line in lines if line.startswith("launch train")] == [
        "launch train.py --output_dir @road/pretrain --report_to wandb --depth 20 --tokenizer @road/tokenizer "
        "--data_path texts --a 1 --seed 7",
        "launch train.py --output_dir @road/mid --report_to wandb --stage mid --from_weight @road/pretrain "
        "--data_path @road/rows/mid.yaml --seed 7",
        "launch train.py --output_dir @road/sft --report_to wandb --stage sft --from_weight @road/mid "
        "--data_path sft.yaml --seed 7",
        "launch train_rl.py --output_dir @road/rl --report_to wandb --from_weight @road/sft --data_path gsm8k.jsonl --b 2",
    ]
    assert lines[0] == "python road/report.py reset --output_dir @road --dollars_per_hour 24"
    assert "--vocab_size 32768 --data_path texts" in said
    assert said.count("launch evaluation/core.py") == said.count("--shots 3") == 4
    assert said.count("launch evaluation/chat_eval.py") == said.count("--num_rows 4") == 4
    _, said, _ = told("run1000.sh", WANDB_RUN="dummy", STAGES="pretrain")
    assert "@road32/pretrain --depth 32" in said and "wandb" not in said
    code, _, error = told("speedrun.sh", NO_WANDB="1")
    assert code == 1 and "pip install wandb" in error and len(error.splitlines()) == 1
    assert told("speedrun.sh", STAGES="talk")[0] == 2


# ---- scaling, tokenizers ---------------------------------------------------------------------------------------


def test_scaling_fits_the_law_of_its_runs_and_says_what_it_expects_before_it_looks(tmp_path):
    """Every run is there already, as after a kill: with bits per byte of a known law, the greater depth a bit above."""
    budgets = (1e12, 2e12, 4e12)

    def law(flops):
        return 30 * flops**-0.05

    def ended(depth, flops, bits):
        folder = tmp_path / f"d{depth}_{flops:.2g}"
        folder.mkdir()
        facts = {"tokens": {"total": 1000}, "parameters": {"total": 10**6}}
        facts["metrics"] = {"after": {"bits_per_byte": bits}}
        (folder / "report.json").write_text(json.dumps(facts))

    for flops in budgets:
        ended(2, flops, law(flops))
        ended(3, flops, law(flops) + 0.1)
    ended(4, 8e12, 6.5)
    command = ["python", RECIPE / "road/scaling.py", "--depths", 3, 2, "--budgets", *budgets]
    done = expect(finish(start([*command, "--predict", 4, "--output_dir", tmp_path])))
    facts = json.loads((tmp_path / "scaling.json").read_text())
    assert facts["law"] == pytest.approx([30, 0.05], rel=1e-6)
    assert facts["predicted"]["bits_per_byte"] == pytest.approx(law(8e12))
    assert facts["predicted"]["flops"] == 8e12 and facts["measured"]["bits_per_byte"] == 6.5
    assert f"predicted {law(8e12):.4f}, measured 6.5000" in done.stdout
    assert done.stdout.count("**") == 2 * len(budgets), "the best of each budget is marked"
    assert (tmp_path / "scaling.png").stat().st_size > 5000


def test_tokenizers_are_set_side_by_side_by_bytes_and_characters(tmp_path):
    (tmp_path / "mine.txt").write_text("春天来了，春天来了。" * 20, encoding="utf-8")
    other = ROOT / "baichuan2_dpo/data"
    command = ["python", RECIPE / "eval_tokenizer.py", "--output_dir", tmp_path / "out"]
    done = expect(finish(start([*command, "--texts", f"mine={tmp_path / 'mine.txt'}"])))
    found = json.loads((tmp_path / "out/tokenizers.json").read_text())["tokenizer"]["mine"]
    tokenizer = own_weights.AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    text = (tmp_path / "mine.txt").read_text(encoding="utf-8")
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert found["bytes_per_token"] == pytest.approx(len(text.encode()) / tokens)
    assert found["chars_per_token"] == pytest.approx(len(text) / tokens)
    assert "| mine | tokenizer |" in done.stdout
    refused = error_line(finish(start([*command, other])), 1)
    assert str(other) in refused
