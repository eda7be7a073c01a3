"""chatglm_lora's batch inference: questions of any shape, resuming, many processes, device maps, tensor parallel."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from harness import ROOT, expect, finish, start

RECIPE = ROOT / "chatglm_lora"
sys.path[:0] = [str(RECIPE)]
import answers
import infer
import placement
import questions
import torch
from modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from tokenization_chatglm import ChatGLMTokenizer, train_sentencepiece

from common import tiny
from common.convert import adapter

TEXTS = [
    "红茶和绿茶",
    "小狗汪汪叫，小猫喵喵叫。",
    "十二加三等于十五。",
    "请问你是谁？我是小谱。",
] * 9
CAUSAL = "{% for m in messages %}{{ m.role + ':' + m.content + '|' }}{% endfor %}{{ 'assistant:' }}"
QUESTIONS = [f"{'请问' * (i % 7)}{i}加{i * i % 11}等于多少？{'小狗' * (i % 5)}" for i in range(22)]


def save_model(folder, **sizes):
    """A random ChatGLM whose answers differ, and sometimes end."""
    torch.manual_seed(0)
    tokenizer = ChatGLMTokenizer(str(train_sentencepiece(TEXTS, 500, folder.parent)))
    config = dict(
        hidden_size=64,
        num_layers=4,
        num_attention_heads=4,
        inner_hidden_size=256,
        max_sequence_length=128,
    )
    config = ChatGLMConfig(
        vocab_size=len(tokenizer), initializer_range=0.15, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id, residual_scale_layers=4, **config | sizes,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.05)
        model.lm_head.weight[config.eos_token_id] *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with base/, adapter/ (on it), odd/ (3 heads) and glm/ (as ChatGLM2/3 are after conversion)."""
    from peft import LoraConfig, get_peft_model
    from transformers import GlmConfig, GlmForCausalLM

    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "base")
    save_model(folder / "odd", hidden_size=48, num_attention_heads=3)
    tokenizer = ChatGLMTokenizer.from_pretrained(folder / "base")
    model = ChatGLMForConditionalGeneration.from_pretrained(folder / "base")
    names = ["query_key_value", "dense_h_to_4h", "dense"]
    lora = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)
    )
    for saved in (lora, tokenizer):
        saved.save_pretrained(folder / "adapter")
    adapter.remember_base(folder / "adapter", str(folder / "base"))
    plain = tiny.make_tokenizer(TEXTS, 500, ["<eos>"], chat_template=CAUSAL, eos_token="<eos>")
    glm = GlmConfig(
        vocab_size=len(plain), hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=144, attention_bias=True, pad_token_id=0, eos_token_id=0,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = GlmForCausalLM(glm)
    with torch.no_grad():
        model.lm_head.weight[0] *= 6
    model.save_pretrained(folder / "glm")
    plain.save_pretrained(folder / "glm")
    return folder


@pytest.fixture(scope="module")
def loaded(models):
    return infer.load(models / "base", say=lambda line: None)


@pytest.fixture
def asked(tmp_path):
    """Questions as a file, with two rows that are none."""
    lines = [json.dumps({"question": q}, ensure_ascii=False) for q in QUESTIONS]
    lines[5:5] = ["{broken", '{"question": " "}']
    (tmp_path / "q.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "q.jsonl"


SHORT = ["--max_new_tokens", "12", "--batch_size", "3"]


def run(*words):
    """The command in this process -> the records it wrote."""
    args = infer.parse_args([str(word) for word in words])
    infer.run(args, infer.settings_of(args))
    return [json.loads(line) for line in args.output.read_text(encoding="utf-8").splitlines()]


# ---- questions --------------------------------------------------------------------------------------------------

SAME = [
    "一加一？",
    {"question": "一加一？"},
    {"prompt": "一加一？", "response": None},
    {"content": "一加一？", "summary": ""},
    {"query": "一加一？"},
    {"text": "一加一？"},
    {"input": "一加一？"},
    {"instruction": "一加一？", "input": "", "output": ""},
    {"context": "Instruction: 一加一？\nAnswer: "},
    {"messages": [{"role": "user", "content": "一加一？"}]},
    {"conversations": [{"from": "human", "value": "一加一？"}]},
    {"conversation": [{"human": "一加一？"}]},
    {"instruction": "Human: 一加一？\nAssistant:"},
    [{"role": "user", "content": "一加一？"}],
    {"ask": "一加一？"},
    {"prompt": [{"role": "user", "content": "一加一？"}]},
]


@pytest.mark.parametrize("record", SAME, ids=lambda r: json.dumps(r, ensure_ascii=False)[:40])
def test_a_question_in_any_shape(record):
    found = questions.question(record, 3, "q:1")
    assert found.messages == [{"role": "user", "content": "一加一？"}], found.error
    assert found.reference is None and found.error is None


def test_answers_that_are_there_become_the_reference():
    rounds = [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]
    for record in (
        {"instruction": "甲", "output": "乙"}, {"content": "甲", "summary": "乙"}, {"messages": rounds},
        {"context": "甲", "target": "乙"}, {"conversation": [{"human": "甲", "assistant": "乙"}]},
    ):  # fmt: skip
        found = questions.question(record, 0, "")
        assert (found.messages, found.reference) == (rounds[:1], "乙"), record
    found = questions.question(
        {"question": "丙", "history": [["甲", "乙"]], "system": "你是丁"}, 0, ""
    )
    assert [m["content"] for m in found.messages] == [
        "你是丁",
        "甲",
        "乙",
        "丙",
    ] and found.reference is None


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"question": " "}, "empty prompt"),
        ({"question": 5}, "question is not text"),
        ({"问题": "一加一？"}, "no question found (columns: 问题"),
        ({"messages": [{"role": "system", "content": "甲"}]}, "no turns"),
        ({"messages": ["甲"]}, "a turn is not an object"),
        ({"question": "\udc8f"}, "broken characters"),
        (7, "not an object"),
    ],
)
def test_a_row_that_asks_nothing(record, reason):
    found = questions.question(record, 0, "")
    assert found.error and not found.messages
    assert reason in found.error or (
        reason == "no turns" and "roles out of order" in found.error
    ), found.error


def test_files_encodings_and_bad_rows(models, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_bytes(
        "问题,备注\n你是谁？,x\n小狗怎么叫？,y\n坏了\n".encode("gb18030")
    )
    (folder / "b.txt").write_text("第一问\n\n第二问\n", encoding="utf-8")
    (folder / "c.jsonl").write_text('{"question": "问"}\n{"question": }\n[1]\n', encoding="utf-8")
    out = tmp_path / "new/out.jsonl"
    words = [
        "--input",
        folder,
        "--output",
        out,
        "--column_map",
        "question=问题",
        *SHORT,
        "--model",
        models / "base",
    ]
    found = run(*words)
    assert [r["row"] for r in found] == list(range(len(found))) and len(found) == 8
    texts = [r["messages"][0]["content"] for r in found if "messages" in r]
    assert texts == ["你是谁？", "小狗怎么叫？", "第一问", "第二问", "问"]
    wrong = {r["source"].rsplit("/", 1)[1]: r["error"] for r in found if "error" in r}
    assert wrong.keys() == {"a.csv:4", "c.jsonl:2", "c.jsonl:3"}
    assert "number of cells" in wrong["a.csv:4"] and "wrong JSON" in wrong["c.jsonl:2"]
    said = capsys.readouterr().out
    assert "8 rows: " in said and "3 with an error" in said and f"first: {folder}/a.csv:4" in said
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


# ---- answers ----------------------------------------------------------------------------------------------------

DRAWN = {"temperature": 1.2, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.3}


@pytest.mark.parametrize(
    "sampling", [{}, {"repetition_penalty": 1.5}, DRAWN], ids=["greedy", "penalty", "drawn"]
)
def test_an_answer_does_not_depend_on_the_batch(loaded, sampling):
    together = infer.answer(loaded, QUESTIONS, batch_size=9, max_new_tokens=12, **sampling)
    alone = infer.answer(loaded, QUESTIONS, batch_size=1, max_new_tokens=12, **sampling)
    assert together == alone
    assert len({r["answer"] for r in alone}) > 12
    assert {r["finish_reason"] for r in alone} == {"stop", "length"}
    assert all(r["tokens"] == 12 for r in alone if r["finish_reason"] == "length")


def test_padding_with_the_end_token_does_not_count_as_said(models):
    """A penalty on what was seen must leave the end of answers alone where padding and end are one token."""
    loaded = infer.load(models / "glm", say=lambda line: None)
    found = [
        infer.answer(loaded, QUESTIONS, batch_size=n, max_new_tokens=24, repetition_penalty=1.5)
        for n in (9, 1)
    ]
    assert found[0] == found[1] and any(r["finish_reason"] == "stop" for r in found[0])


def test_other_seeds_and_temperatures_give_other_answers(loaded):
    found = [
        infer.answer(loaded, QUESTIONS, max_new_tokens=8, temperature=1.0, seed=seed)
        for seed in (0, 1, 0)
    ]
    assert found[0] == found[2] != found[1]


def test_greedy_and_penalty_are_those_of_transformers(loaded):
    ids = torch.tensor([loaded.tokenizer(QUESTIONS[3])["input_ids"]])
    for penalty in (1.0, 1.7):
        own = infer.answer(loaded, [QUESTIONS[3]], max_new_tokens=12, repetition_penalty=penalty)[0]
        settings = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": penalty}
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[
            0, ids.shape[1] :
        ]
        text = loaded.tokenizer.decode(out, skip_special_tokens=True)
        assert own["answer"] == text.rstrip("\ufffd").strip(), "without half a character at the end"


def test_tokens_are_drawn_with_their_probability():
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    rows, kept = list(range(4000)), torch.ones(4000, 1, dtype=torch.long)
    for settings, wanted in (
        (answers.Settings(temperature=1.0), chances),
        (answers.Settings(temperature=1.0, top_k=2), torch.tensor([0.625, 0.375, 0, 0, 0])),
        (answers.Settings(temperature=1.0, top_p=0.9), torch.tensor([0.5, 0.3, 0.15, 0, 0]) / 0.95),
        (answers.Settings(temperature=0.5), chances**2 / (chances**2).sum()),
    ):
        choose = answers.Choose(kept, rows, settings)
        drawn = choose(
            torch.zeros(4000, 1, dtype=torch.long), chances.log().expand(4000, -1)
        ).argmax(-1)
        share = drawn.bincount(minlength=5) / 4000
        assert (share - wanted).abs().max() < 0.03 and (share[wanted == 0] == 0).all()


def test_long_questions_lose_their_oldest_rounds(loaded):
    history = [[f"旧{i}" + "茶" * 30, "答" * 10] for i in range(4)]
    asked = [{"question": "新问", "history": history}, "茶" * 400, "短"]
    found = infer.answer(loaded, asked, max_new_tokens=8)
    assert [r.get("shortened", False) for r in found] == [True, True, False]
    assert all(r["tokens"] <= 8 and "error" not in r for r in found)
    settings, room = answers.Settings(max_new_tokens=8), loaded.window - 8
    kept = loaded.tokenizer.decode(
        answers.fit(loaded, questions.question(asked[0], 0, ""), settings)[0]
    )
    assert "旧3" in kept and "旧0" not in kept and "新问" in kept
    ids, _ = answers.fit(loaded, questions.question("头" + "茶" * 400 + "尾", 0, ""), settings)
    assert len(ids) == room and ids[-2:] == loaded.tokenizer("")["input_ids"][-2:]
    assert "尾" in loaded.tokenizer.decode(ids) and "头" in loaded.tokenizer.decode(ids)


def test_system_prompt_stands_before_rows_without_one(loaded):
    fit = lambda row: loaded.tokenizer.decode(
        answers.fit(
            loaded,
            questions.question(row, 0, ""),
            answers.Settings(system_prompt="用红茶", max_new_tokens=8),
        )[0]
    )
    assert "用红茶" in fit("你是谁？")
    assert "用红茶" not in fit({"question": "你是谁？", "system": "用绿茶"})


def test_what_the_template_refuses_is_a_row_with_an_error(loaded):
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = infer.answer(loaded, [{"question": "问", "tools": tools}, "问"], max_new_tokens=4)
    assert "tools" in found[0]["error"] and "answer" in found[1]


def test_out_of_memory_halves_the_batch(loaded, monkeypatch):
    whole, real, sizes = (
        infer.answer(loaded, QUESTIONS[:8], batch_size=8, max_new_tokens=6),
        answers._generate,
        [],
    )

    def small(loaded, chosen, prompts, settings):
        sizes.append(len(chosen))
        if len(chosen) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return real(loaded, chosen, prompts, settings)

    monkeypatch.setattr(answers, "_generate", small)
    limit = 3
    assert infer.answer(loaded, QUESTIONS[:8], batch_size=8, max_new_tokens=6) == whole
    assert sizes == [8, 4, 2, 2, 4, 2, 2] or sizes == [8, 4, 2, 2, 2, 2]
    limit = 0
    found = infer.answer(loaded, QUESTIONS[:2], batch_size=2, max_new_tokens=6)
    assert all("out of memory" in r["error"] for r in found)


# ---- the output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.1"]], ids=["greedy", "drawn"])
def test_a_killed_run_goes_on_where_it_stopped(
    models, asked, tmp_path, sampling, monkeypatch, capsys
):
    words = ["--model", models / "base", "--input", asked, *SHORT, *sampling]
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    wanted = run(*words, "--output", whole)
    assert len(wanted) == 24 and sum("error" in r for r in wanted) == 2
    lines = whole.read_bytes().splitlines(keepends=True)
    order = [q.row for batch in questions.batches(questions.read(asked), 3) for q in batch]
    pick = lambda *places: b"".join(lines[order[i]] for i in places)
    # as two ranks and a kill -9 leave it: two whole batches, one half written, a torn line, what a power cut leaves
    part = [out.with_name(f"out.jsonl.part-{rank}") for rank in (0, 1)]
    part[0].write_bytes(pick(0, 1, 2, 6) + lines[order[7]][:37])
    part[1].write_bytes(pick(3) + b"\0\0\0\n" + pick(4, 5) + lines[order[9]][:-1])
    note = json.loads((tmp_path / "whole.jsonl.run.json").read_text())
    out.with_name("out.jsonl.run.json").write_text(json.dumps(note | {"finished": False}))
    real, again = infer.answer_batch, []

    def watched(loaded, batch, *rest):
        again.extend(q.row for q in batch)
        return real(loaded, batch, *rest)

    monkeypatch.setattr(infer, "answer_batch", watched)
    run(*words, "--output", out)
    assert out.read_bytes() == whole.read_bytes()
    assert "24 rows, 7 of them done before" in capsys.readouterr().out
    assert again == order[6:]  # whole batches, so that no row has other neighbours
    assert not list(tmp_path.glob("out.jsonl.*[!n]"))


def test_another_run_is_refused(models, asked, tmp_path, capsys):
    words = ["--model", models / "base", "--input", asked, "--output", tmp_path / "o", *SHORT]
    first = run(*words)
    out = tmp_path / "o/answers.jsonl"

    def refused(*more) -> str:
        with pytest.raises(SystemExit) as end:
            run(*words, *more)
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "max_new_tokens 12 -> 13" in refused("--max_new_tokens", "13")
    assert "model [" in refused("--model", models / "adapter")
    with pytest.raises(SystemExit) as end:
        run(*words)
    assert end.value.code == 0 and "finished" in capsys.readouterr().out
    before = out.read_bytes()
    asked.write_text('{"question": "别的"}\n', encoding="utf-8")
    assert "input {" in refused() and out.read_bytes() == before
    assert len(run(*words, "--overwrite")) == 1 and len(first) == 24
    out.with_name("answers.jsonl.run.json").unlink()
    assert "not an output of infer.py" in refused() and out.is_file()
    assert not list(out.parent.glob("*.lock"))


MISTAKES = {
    "output is input": (["--output", "{asked}"], 1, "is the input"),
    "unknown flag": (["--max_tokens", "5"], 2, "did you mean --max_new_tokens?"),
    "no room": (["--max_new_tokens", "100"], 1, "window is 128 tokens"),
    "no such model": (["--model", "/nowhere"], 1, "/nowhere: no trained model here"),
    "no such input": (["--input", "/nowhere.txt"], 1, "no such file"),
    "map": (["--max_memory", "cpu:1GiB"], 2, "add --device_map auto"),
    "memory": (["--device_map", "auto", "--max_memory", "cpu=1GiB"], 1, 'write it like "0:20GiB'),
    "device": (["--device_map", "auto", "--max_memory", "3:1GiB"], 1, "0 device(s) are visible"),
    "offload": (
        ["--device_map", "auto", "--max_memory", "cpu:200KiB"],
        1,
        "--offload_folder FOLDER",
    ),
    "tensor parallel": (["--tensor_parallel", "2"], 2, "NPROC=2"),
    "top_p": (["--top_p", "1.5"], 1, "--top_p 1.5"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(models, asked, tmp_path, capsys, name):
    words, code, told = MISTAKES[name]
    base = ["--model", models / "base", "--input", asked, "--output", tmp_path / "o", *SHORT]
    with pytest.raises(SystemExit) as end:
        run(*base, *(word.format(asked=asked) for word in words))
    said = end.value.code if code == 1 else capsys.readouterr().err
    assert (code == 1 or end.value.code == 2) and told in said and "\n" not in said.strip()


@pytest.mark.slow
def test_two_processes_killed_and_resumed_give_what_one_gives(models, asked, tmp_path):
    asked.write_text(
        "".join(json.dumps({"question": f"{q}{n}"}) + "\n" for n in range(10) for q in QUESTIONS)
    )
    words = ["--model", models / "adapter", "--input", asked, *SHORT, "--temperature", "0.9"]
    run(*words, "--output", tmp_path / "one.jsonl")
    out = tmp_path / "two.jsonl"
    command = ["bash", RECIPE / "infer.sh", *words, "--output", out]
    first = start(command, NPROC=2)  # a group of its own, which is killed
    until = time.monotonic() + 90
    parts = [out.with_name(f"two.jsonl.part-{rank}") for rank in (0, 1)]
    while time.monotonic() < until and not all(p.is_file() and p.stat().st_size for p in parts):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    finish(first)
    assert not out.exists()
    second = expect(finish(start(command, fork=True, NPROC=2)))
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert "of them done before" in second.stdout and "220 rows, 0 of" not in second.stdout


# ---- device maps ------------------------------------------------------------------------------------------------


def logits(loaded):
    ids = loaded.tokenizer(QUESTIONS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        return loaded.model(
            ids["input_ids"].to(loaded.device), ids["attention_mask"].to(loaded.device)
        ).logits.cpu()


@pytest.mark.parametrize("name", ["base", "adapter", "glm"])
def test_blocks_on_disk_compute_the_same(models, tmp_path, name):
    said = []
    plain = infer.load(models / name, say=said.append)
    size = plain.model.get_memory_footprint() // 1024
    settings = {
        "max_memory": f"cpu:{size * 3 // 4}KiB",
        "offload_folder": str(tmp_path),
        "say": said.append,
    }
    spread = infer.load(models / name, device_map="sequential", **settings)
    disk = next(line for line in said if line.startswith("disk: "))
    assert "layers" in disk and any(line.startswith("cpu: ") and "embed" in line for line in said)
    assert torch.equal(logits(spread), logits(plain))
    found = [infer.answer(each, QUESTIONS[:5], max_new_tokens=6) for each in (spread, plain)]
    assert found[0] == found[1]
    if name == "adapter":
        base = infer.load(models / "base", say=said.append)
        assert (logits(base) - logits(plain)).abs().max() > 0.1  # the adapter does something


def test_plan_keeps_blocks_whole_and_balanced(models):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(models / "base")
    free = {0: 1 << 30, 1: 1 << 30, "cpu": 1 << 30}
    places, sizes = placement.plan(config, torch.float32, "balanced", free)
    blocks = [places[f"transformer.layers.{i}"] for i in range(4)]
    assert blocks == sorted(blocks) and set(blocks) == {0, 1}
    lines = placement.describe(places, sizes)
    assert (
        len(lines) == 2 and "layers 0-" in lines[0] and "lm_head" in lines[1] and "GiB" in lines[0]
    )


# of programs that use this file's models and questions in processes of their own
PATHS = [str(path) for path in (ROOT, RECIPE, ROOT / "tests/support", Path(__file__).parent)]

DEVICES = """
import sys
sys.path[:0] = {paths!r}
from common import device
import torch
import infer, test_chatglm_infer as tests
said = []
for name in ("base", "adapter"):
    plain = infer.load({models!r} + "/" + name, say=said.append, dtype=torch.float32)
    size = plain.model.get_memory_footprint() // 10240
    for memory in (f"0:{{6 * size}}KiB,1:{{9 * size}}KiB", f"0:{{5 * size}}KiB,1:{{4 * size}}KiB,cpu:{{3 * size}}KiB"):
        settings = dict(dtype=torch.float32, say=said.append)
        spread = infer.load({models!r} + "/" + name, "sequential", memory, {folder!r}, **settings)
        assert (tests.logits(spread) - tests.logits(plain)).abs().max() < 1e-4
        found = [infer.answer(each, tests.QUESTIONS[:4], max_new_tokens=6) for each in (spread, plain)]
        assert found[0] == found[1]
print("\\n".join(said))
"""


def test_two_npus_compute_the_same(npu, models, tmp_path):
    program = DEVICES.format(paths=PATHS, models=str(models), folder=str(tmp_path))
    env = npu("Ascend910B2", 2)
    done = expect(finish(start([sys.executable, "-c", program], **env)))
    told = done.stdout
    for place in ("npu:0: ", "npu:1: ", "cpu: ", "disk: "):
        assert place in told, told


# ---- tensor parallel --------------------------------------------------------------------------------------------

SHARED = """
import sys
sys.path[:0] = {paths!r}
from common import cli, device
import torch
import infer, placement, test_chatglm_infer as tests


def main():
    device.training_defaults(set())
    for name in ("base", "adapter", "glm"):
        plain = infer.load({models!r} + "/" + name, say=lambda line: None)
        shared = infer.load({models!r} + "/" + name, tensor_parallel=2)
        width = shared.model.base_model.layers[0].mlp.parameters().__next__().shape[0]
        found = [tests.logits(plain), tests.logits(shared)]
        print(name, width, (found[0] - found[1]).abs().max().item(), found[0].abs().max().item(), flush=True)
        found = [infer.answer(each, tests.QUESTIONS, max_new_tokens=8, temperature=0.8) for each in (plain, shared)]
        assert found[0] == found[1]
    plan = infer.AutoConfig.from_pretrained({models!r} + "/base").base_model_tp_plan
    placement.SHARES["thirds"] = {{"partition_type": "column", "shape": [3, -1]}}
    mistakes = {{"mlp.dense_h_to_4h": "colwise_gather_output", "attention.query_key_value": "thirds"}}
    for layer, style in mistakes.items():  # as DeepSpeed guesses from names; the shapes fit, the numbers do not
        tests.ChatGLMConfig.base_model_tp_plan = plan | {{"layers.*." + layer: style}}
        try:
            infer.load({models!r} + "/base", tensor_parallel=2)
        except SystemExit as refusal:
            print("refused:", refusal, flush=True)


if __name__ == "__main__":
    cli.run(main)
"""


def test_two_ranks_that_share_every_block_give_the_same_logits(models, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED.format(paths=PATHS, models=str(models)))
    command = [sys.executable, ROOT / "common/launch.py", 2, tmp_path / "shared.py"]
    done = expect(finish(start(command)))
    found = {w[0]: [float(x) for x in w[1:]] for w in map(str.split, done.stdout.splitlines()) if w and w[0] in
             ("base", "adapter", "glm")}  # fmt: skip
    assert found.keys() == {"base", "adapter", "glm"}, done.stdout
    for name, (width, error, size) in found.items():
        assert width in (64, 80, 128, 160) and size > 1 and error < 1e-4 * size, (
            name,
            width,
            error,
            size,
        )
    assert done.stdout.count("refused: --tensor_parallel: the shared model differs") == 2, (
        done.stdout
    )


@pytest.mark.slow
def test_infer_deepspeed(models, asked, tmp_path):
    words = ["--model", models / "glm", "--input", asked, *SHORT]
    run(*words, "--output", tmp_path / "one.jsonl")
    shell = ["bash", RECIPE / "infer_deepspeed.sh", *words, "--output", tmp_path / "two.jsonl"]
    done = expect(finish(start(shell, fork=True, NPROC=2)))
    assert "shared by 2 cpu ranks" in done.stdout
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_what_cannot_be_shared_is_refused(models):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(models / "glm")
    assert placement.refusal(config, 2) is None
    assert "2 key and value heads" in placement.refusal(config, 4)
    config.base_model_tp_plan = None
    assert "no layout is known" in placement.refusal(config, 2)


def test_a_run_that_cannot_share_its_model_ends_before_it_begins(models, asked, tmp_path):
    words = ["--model", models / "odd", "--input", asked, "--output", tmp_path / "o"]
    args = infer.parse_args([str(word) for word in [*words, *SHORT]])
    args.tensor_parallel = 2
    with pytest.raises(SystemExit, match="3 heads of this model cannot be shared by 2 ranks"):
        infer.run(args, infer.settings_of(args))
    assert not (tmp_path / "o").exists()
