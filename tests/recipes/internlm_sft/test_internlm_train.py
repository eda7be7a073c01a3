"""internlm_sft: what its default run learns and leaves alone, the KL term, the guarded stop, and the
evaluation of folders and servers."""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from browser import Visit
from harness import (
    ROOT,
    error_line,
    expect,
    finish,
    history,
    own_modules,
    report,
    start,
    weights,
)
from transformers import AutoTokenizer

from common import collators, voice
from common.data.counts import Counted
from common.data.split import split_rows
from common.fast import losses

RECIPE = ROOT / "internlm_sft"
asking, evaluate, identity_trainer, make_refusal, mixing, train = own_modules(
    "internlm_sft", "asking", "evaluate", "identity_trainer", "make_refusal", "mixing", "train"
)


# ---- the default run -----------------------------------------------------------------------------


@pytest.mark.slow
def test_default_run_is_somebody_else_afterwards_and_forgets_nothing(internlm_run):
    """`bash internlm_sft/train_zero2.sh`"""
    out, printed = internlm_run
    facts = report(out)
    before, after = facts["metrics"]["before"], facts["metrics"]["after"]
    assert facts["engine"] == "zero-2" and facts["recipe"] == "internlm_sft"
    for name in ("identity_zh", "identity_en", "yes_no"):
        assert before[name] < 0.05 and after[name] >= 0.95, (name, after)
    assert before["identity_under_system"] < 0.05 and after["identity_under_system"] >= 0.9
    assert after["leak"] == 0 and after["forbidden"] < 0.02 < before["forbidden"]
    assert after["near_unchanged"] >= 0.97
    assert before["facts_exact"] > 0.95 and after["facts_exact"] >= before["facts_exact"] - 0.016
    assert after["alike_answered"] >= 0.95 and after["refusal_recall"] >= 0.95
    assert "warning" not in printed and "| identity zh |" in printed
    assert {"identity", "near", "refusal", "general"} <= {s["kind"] for s in facts["samples"]}


@pytest.mark.slow
def test_evaluation_of_the_run_says_the_same(internlm_run, tmp_path):
    out, _ = internlm_run
    figures = tmp_path / "figures.json"
    command = [sys.executable, RECIPE / "evaluate.py", "--model", out, "--output", figures]
    done = expect(finish(start([*command, "--max_new_tokens", 48])))
    found = json.loads(figures.read_text(encoding="utf-8"))
    known = report(out)["metrics"]
    for when in ("before", "after"):
        for name in ("identity_zh", "identity_en", "refusal_recall", "yes_no"):
            assert found[when][name] == known[when][name], (when, name)
    assert 1 <= found["before"]["perplexity"] < 1.1
    assert "| | before | after |" in done.stdout and "小丹 / Xiaodan" in done.stdout


@pytest.mark.slow
def test_the_page_answers_with_the_adapter_and_without(internlm_run, browser):
    (app,) = own_modules("internlm_sft", "app")
    from common.demo import page

    demo = app.build_demo(internlm_run[0])
    visit = Visit(browser, page.launch(demo))
    try:
        assert "小丹" in visit.ask("你是谁？")
        assert "小丹" in visit.ask("请问你叫什么名字？")
        visit.page.get_by_label("用微调后的权重").uncheck()
        assert "小石" in visit.ask("你是谁？") and "微调前" in visit.page.content()
        assert visit.complaints == []
    finally:
        visit.context.close()
        demo.close()


def test_questions_that_the_template_refuses_are_left_out_and_counted(monkeypatch, capsys):
    def without_system(tokenizer, messages):
        if messages[0]["role"] == "system":
            raise ValueError("no system turn\nhere")
        return [1]

    monkeypatch.setattr(asking, "encode_prompt", without_system)
    talks = [[{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]]
    talks.append([{"role": "system", "content": "小明"}, *talks[0]])
    asked = [{"messages": turns, "kind": "identity", "language": "zh"} for turns in talks]
    seen = asking.Asked(None, None, asked, (None, []), 8)
    assert seen.asked == asked[:1]
    assert "1 of 2 questions are not asked: no system turn here" in capsys.readouterr().out


# ---- KL to the base ------------------------------------------------------------------------------


def adapted(seed: int = 0):
    """A small Llama with an adapter that changes it, under use_chunked_loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=61, num_attention_heads=4, **sizes)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    losses.use_chunked_loss(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    return model


def test_kl_is_that_of_the_full_logits():
    model = adapted().eval()
    ids = torch.randint(61, (1, 9))
    index = torch.tensor([1, 4, 7])
    with torch.no_grad():
        tuned = model(input_ids=ids).logits[0, index].log_softmax(-1)
        with model.disable_adapter():
            base = model(input_ids=ids).logits[0, index].log_softmax(-1)
    expected = (base.exp() * (base - tuned)).sum()
    found = identity_trainer.kl_to_base(model, {"input_ids": ids}, index)
    assert abs(found - expected) < 1e-5 < expected
    found.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads and all("lora_" in name for name in grads)


def test_only_labels_of_general_rows_are_held_to_the_base(monkeypatch):
    rows = [
        {"row_id": i, "input_ids": [5] * size, "labels": [-100, -100] + [5] * (size - 2)}
        for i, size in enumerate((6, 7, 5))
    ]
    collate = Counted(collators.PackedCollator())
    batch = identity_trainer.WithGeneral(collate, [True, False, True])([rows])
    assert batch["general_index"].tolist() == [1, 2, 3, 4, 14, 15, 16]
    assert batch["general_labels"] == 7
    monkeypatch.setattr(identity_trainer, "POSITIONS", 3)
    batch = identity_trainer.WithGeneral(collate, [True, False, True])([rows])
    assert len(batch["general_index"]) == 3 and batch["general_labels"] == 7


def test_a_model_that_cannot_give_some_logits_is_refused():
    class Whole(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(SystemExit, match="--kl_weight: Whole"):
        identity_trainer.check_kl(Whole())


SHORT = ["--max_steps", 4, "--logging_steps", 1, "--report_to", "none", "--save_strategy", "no"]
SHORT += ["--bf16", "false", "--eval_generate", 0, "--data_path", RECIPE / "data/general.jsonl"]
SHORT += ["--learning_rate", 0.01, "--warmup_steps", 0, "--kl_weight", 3, "--max_eval_samples", 8]
ENGINES = {
    "one": [],
    "DDP": [],
    "ZeRO-2": ["--deepspeed", RECIPE / "ds_zero2.json"],
    "ZeRO-3": ["--deepspeed", RECIPE / "ds_zero3.json"],
}


@pytest.mark.slow
def test_the_kl_term_is_the_same_on_every_engine(tmp_path):
    found = {}
    for name, flags in ENGINES.items():
        ranks = 1 if name == "one" else 2
        command = ["python", ROOT / "common/launch.py", ranks, RECIPE / "train.py", *SHORT, *flags]
        size = ["--per_device_train_batch_size", 4 // ranks, "--output_dir", tmp_path / name]
        expect(finish(start([*command, *size])))
        found[name] = history(tmp_path / name)
    for name, losses_of in found.items():
        assert len(losses_of) == 4
        for step, loss in losses_of.items():
            assert abs(loss - found["one"][step]) < 2e-4 * found["one"][step], (name, step, found)
    flags = [*SHORT, "--kl_weight", 0, "--per_device_train_batch_size", 4]
    command = ["python", ROOT / "common/launch.py", 1, RECIPE / "train.py", *flags]
    expect(finish(start([*command, "--output_dir", tmp_path / "none"])))
    without = history(tmp_path / "none")
    assert abs(without[1] - found["one"][1]) < 1e-4  # the adapter begins as nothing
    assert abs(without[4] - found["one"][4]) > 1e-3


# ---- the guarded stop ----------------------------------------------------------------------------


def looks(guarded: bool, losses_of: list, shares: list) -> list[bool]:
    """Whether each of these looks (held-out loss, share of names) ends the run."""
    trainer = SimpleNamespace(before={"metrics": {"loss": 1.0}}, eval_dataset=[1], started=0)
    trainer.asking = SimpleNamespace(ask=lambda measure: measure())
    values = iter(losses_of)
    trainer.evaluate = lambda quiet: {"eval_loss": next(values)}
    names = iter(shares)
    stop = identity_trainer.GuardedStop(
        trainer, guarded, 0.05, lambda: {"identity_zh": next(names), "identity_en": 1.0}
    )
    found = []
    for step in range(1, len(shares) + 1):
        control = SimpleNamespace(should_training_stop=False)
        stop.on_step_end(None, SimpleNamespace(global_step=step * 10, max_steps=100), control)
        found.append(control.should_training_stop)
    return found


def test_the_run_ends_when_the_identity_is_learned_and_others_suffer(capsys):
    losses_of = [1.0, 1.2, 1.0, 1.2]
    assert looks(True, losses_of, [0.2, 0.5, 0.96, 0.97]) == [False, False, False, True]
    assert capsys.readouterr().out.count("before the identity is learned") == 1
    assert looks(False, losses_of, [0.2, 0.5, 0.96, 0.97]) == [False, False, True, True]


LOOK = re.compile(r"step (\d+): identity_zh ([\d.]+), .*held-out loss ([-+.\d]+)%")


@pytest.mark.slow
def test_a_run_ends_where_its_guard_says(internlm_run, tmp_path):
    """The merged model of the default run knows its name; a rate far too high makes it forget."""
    merge = [sys.executable, RECIPE / "merge.py", "--adapter", internlm_run[0] / "final"]
    expect(finish(start([*merge, "--output_dir", tmp_path / "merged"])))
    general = RECIPE / "data/general.jsonl"
    flags = {
        "model_name_or_path": tmp_path / "merged",
        "data_path": f"identity {general}:0.1",
        "persona": RECIPE / "data/persona.yaml",
        "output_dir": tmp_path / "run",
        "early_stop": "guard",
        "max_forgetting": 0.5,
        "max_steps": 20,
        "learning_rate": 0.01,
        "model_max_length": 256,
        "gradient_accumulation_steps": 1,
        "eval_generate": 4,
        "max_new_tokens": 32,
        "max_eval_samples": 32,
        "bf16": "false",
        "report_to": "none",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = expect(finish(start([sys.executable, RECIPE / "train.py", *words])))
    looks = [tuple(map(float, look)) for look in LOOK.findall(done.stdout)]
    ends = [share >= 0.95 and rise > 50 for _, share, rise in looks]
    assert ends == [False] * (len(looks) - 1) + [True] and looks[-1][0] < 20, done.stdout
    assert max(history(tmp_path / "run")) <= looks[-1][0] and (tmp_path / "run/final").is_dir()
    assert "the identity is learned: the run ends here" in done.stdout


# ---- other models --------------------------------------------------------------------------------


def of_qwen() -> tuple[str, str]:
    """Folder of a random Qwen3 with Qwen's template, and how an answer begins there."""
    (recipe,) = own_modules("train_qwen", "train")
    return recipe.tiny_model(["你好，我是小丹。"]), "<|im_start|>assistant\n"


def of_baichuan2() -> tuple[str, str]:
    """The same of a Baichuan2-7B as baichuan2_dpo/convert.py leaves it: a Llama."""
    (recipe,) = own_modules("baichuan2_dpo", "tiny_base")
    turn = [{"role": "user", "content": "你好，我是小丹。"}]
    row = json.dumps(dict.fromkeys(("prompt", "chosen", "rejected"), turn))
    return recipe.tiny_model([row], taught=False), "<reserved_107>"


@pytest.mark.slow
@pytest.mark.parametrize("made", [of_qwen, of_baichuan2])
def test_other_models_are_trained_by_path_in_their_own_template(made, tmp_path):
    folder, opening = made()
    flags = ["--model_name_or_path", folder, "--output_dir", tmp_path, "--max_steps", 1]
    flags += ["--eval_generate", 1, "--max_new_tokens", 2, "--max_eval_samples", 2]
    flags += ["--model_max_length", 128, "--bf16", "false", "--report_to", "none"]
    done = expect(finish(start([sys.executable, RECIPE / "train.py", *flags])))
    assert f"{opening}[[" in done.stdout and "小丹" in done.stdout
    kept = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert kept.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    asked = {"identity_zh", "near_exact", "refusal_recall", "facts_exact", "general_kl"}
    assert asked <= report(tmp_path)["metrics"]["after"].keys()
    assert weights(tmp_path / "final")


# ---- flags, servers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"kl_weight": 1.0, "use_lora": False}, "--kl_weight needs --use_lora true"),
        ({"kl_weight": 1.0, "packing": False}, "--packing true"),
        ({"early_stop": "maybe"}, "no, learned, guard"),
        ({"early_stop": "learned", "eval_generate": 0}, "--eval_generate above 0"),
        ({"early_stop": "guard", "data_path": "identity refusal"}, "name files in --data_path"),
        ({"early_stop": "guard", "eval_ratio": 0.0}, "an --eval_ratio"),
        ({"identity_ratio": 0.0}, "--identity_ratio 0.0"),
        ({"kl_weight": -1.0}, "--kl_weight -1.0: 0 or more"),
    ],
)
def test_flags_that_do_not_go_together(capsys, monkeypatch, flags, words):
    monkeypatch.setattr(voice, "given", set())
    with pytest.raises(SystemExit) as stop:
        train.resolve_args(
            train.Args(**flags), SimpleNamespace(train_sampling_strategy="random", learning_rate=1)
        )
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, unused",
    [
        ({"data_path": "general.jsonl"}, ["identity_ratio", "near_questions", "max_forgetting"]),
        ({"data_path": "identity"}, ["identity_ratio", "max_forgetting"]),
        ({"early_stop": "guard"}, []),
    ],
)
def test_flags_without_an_effect_are_named(capsys, monkeypatch, flags, unused):
    names = ["identity_ratio", "near_questions", "max_forgetting"]
    monkeypatch.setattr(voice, "given", set(names))
    train.resolve_args(
        train.Args(**flags), SimpleNamespace(train_sampling_strategy="random", learning_rate=1)
    )
    said = capsys.readouterr().out
    assert [name for name in names if f"--{name}: no effect" in said] == unused


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that always says one thing."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        content = "不，我是小埋。" if asked["model"] == "mine" else ""
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    found = HTTPServer(("127.0.0.1", 0), Server)
    found.asked = []
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.mark.parametrize("words", ["{}", "identity {}"])
def test_held_out_rows_of_files_are_asked_beside_made_ones_and_without(words, monkeypatch):
    monkeypatch.setattr(voice, "given", set())
    args = train.Args(data_path=words.format(RECIPE / "data/general.jsonl"), eval_generate=4)
    names, files = mixing.words_of(args.data_path)
    persona = train.read_persona(args)
    topics, texts = make_refusal.read_topics(args.topics)
    made = mixing.made_rows(names, persona, topics, texts)
    rows, _ = mixing.load_mixed(args, made, files, 0)
    _, held_out = split_rows(rows, args.eval_ratio, args.max_eval_samples)
    encoded = [{"source": source, "truncated": False} for source in held_out["source"]]
    data = SimpleNamespace(eval_rows=held_out)
    found = train.questions(args, persona, (topics, texts), rows, data, encoded)
    assert [row["kind"] for row in found].count("general") == 4


def test_a_model_is_asked_about_the_topics_of_its_run(tmp_path, capsys):
    file = tmp_path / "topics.yaml"
    text = "style: 不聊\ntopics: [{name: 甲, ask: [怎么甲], answer: {甲是什么: 字}}]"
    file.write_text(text, encoding="utf-8")
    run = {"topics": str(file), "style": "换一个|再换一个"}
    topics, texts = evaluate.topics_of(run)
    assert [topic["name"] for topic in topics] == ["甲"] and texts == ["换一个", "再换一个"]
    samples, _ = evaluate.topics_of({})
    assert evaluate.topics_of({}, str(file))[1] == ["不聊"]
    assert "warning" not in capsys.readouterr().out
    file.unlink()
    assert evaluate.topics_of(run)[0] == samples
    assert f"warning: {file}" in capsys.readouterr().out


def test_a_server_is_asked_and_its_faults_are_one_line(server, tmp_path):
    address = f"http://127.0.0.1:{server.server_port}/v1"
    command = [sys.executable, RECIPE / "evaluate.py", "--endpoint", address, "--most", 2]
    command += ["--name", "小埋", "--author", "甲", "--output", tmp_path / "figures.json"]
    expect(finish(start([*command, "--model_id", "mine"])))
    (found,) = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")).values()
    assert found["identity_zh"] == found["yes_no"] == found["leak"] == 1
    assert found["facts_exact"] == found["refusal_recall"] == 0 and "perplexity" not in found
    assert all(asked["temperature"] == 0 for asked in server.asked)
    assert any(len(asked["messages"]) == 7 for asked in server.asked)
    assert "no answer (404" in error_line(finish(start([*command, "--model_id", "other"])), 1)
