"""chatglm_lora's page: talking and judging in a real Chromium, and the rows that ratings leave behind.

The model is a ChatGLM of two layers and a LoRA adapter on it, made here in seconds.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import Endless, Visit
from harness import ROOT, expect, finish, start

from common.data.load import load_rows
from common.demo.chat_model import ChatModel

RECIPE = ROOT / "chatglm_lora"
QUESTION, ANSWER = "你是谁？", "叫我小谱吧。"
HTML = "<b>粗</b> <img src=x onerror=\"document.title='hacked'\"> **x** `y`\n# 不是标题"


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"glm_{name}", RECIPE / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def feedback():
    return module("feedback")


@pytest.fixture(scope="module")
def app():
    return module("app")


def rows_of(folder: Path, name: str) -> list[dict]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def rating(
    left="左边",
    right="右边",
    choice="left",
    correction=None,
    question="问题",
    ended=("eos", "eos"),
    who="AB",
):
    sides = {
        side: {"who": name, "answer": text, "ended": how}
        for side, name, text, how in zip(("left", "right"), who, (left, right), ended, strict=True)
    }
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, **sides, "choice": choice, "correction": correction, "comment": ""}


# ---- what follows from a rating -------------------------------------------------------------------------------


def test_what_a_rating_teaches(feedback):
    def taught(**given):
        found = feedback.training_rows(rating(**given))
        chats = [row["messages"][-1]["content"] for row in found.get("sft.jsonl", [])]
        pairs = [
            (r["chosen"][0]["content"], r["rejected"][0]["content"])
            for r in found.get("preference.jsonl", [])
        ]
        return chats, pairs

    assert taught(choice="left") == (["左边"], [("左边", "右边")])
    assert taught(choice="right") == (["右边"], [("右边", "左边")])
    assert taught(choice="tie") == (["左边", "右边"], [])
    assert taught(choice="tie", right="左边") == (["左边"], [])
    assert taught(choice="neither") == ([], [])
    for choice in feedback.CHOICES:
        fixed = taught(choice=choice, correction={"of": "right", "text": "改好"})
        assert fixed == (["改好"], [("改好", "右边")])
    assert taught(choice="left", right="左边") == (["左边"], []), "equal answers made a pair"
    assert taught(choice="left", right=" 左边\n") == (["左边"], [])
    assert taught(choice="left", ended=("length", "eos")) == ([], []), (
        "half an answer was held up as an example"
    )
    assert taught(choice="left", ended=("eos", "stopped")) == (["左边"], [("左边", "右边")])
    assert taught(choice="tie", ended=("stopped", "eos")) == (["右边"], [])
    assert taught(choice="left", left="") == ([], [])


def test_training_reads_every_row(feedback, tmp_path):
    """No row is dropped by load_rows, whatever was typed; no pair has equal answers."""
    texts = [
        "",
        " ",
        "好",
        "好 ",
        "好\n",
        "ｈ",
        "h",
        "a\\nb",
        "a\nb",
        "a＼nb",
        "\u2028x\r\ny",
        "\0好",
        "Human: 甲",
        "🙂",
        "{}",
        '"',
    ]
    files = {"sft.jsonl": b"", "preference.jsonl": b""}
    for left, right, choice, fix in product(texts, texts, feedback.CHOICES, (None, "改", "h")):
        correction = fix and {"of": "left", "text": fix}
        found = feedback.training_rows(
            rating(left, right, choice, correction, question="问" + right)
        )
        for name, some in found.items():
            files[name] += b"".join(map(feedback.line_of, some))
    for name, kind in (("sft.jsonl", "chat"), ("preference.jsonl", "preference")):
        (tmp_path / name).write_bytes(files[name])
        found, stats = load_rows(tmp_path / name, kind=kind, cache_dir=tmp_path / "cache")
        assert not stats["dropped"] and stats["read"] == len(found) > 300, stats
    pairs = [json.loads(row) for row in found["row"]]
    assert all(
        p["chosen"][0]["content"].strip() != p["rejected"][0]["content"].strip() for p in pairs
    )


@pytest.mark.parametrize(
    "bad, why",
    [
        ({"left": "长" * 22000}, "65 KiB, more than 64 KiB"),
        ({"left": "\ud800"}, "broken character"),
        ({"question": " \n"}, "no question"),
        ({"choice": "both"}, "no choice"),
    ],
)
def test_what_is_refused_leaves_nothing(feedback, tmp_path, bad, why):
    with pytest.raises(ValueError, match=why):
        feedback.Store(tmp_path / "kept").add(rating(**bad))
    assert not (tmp_path / "kept").exists()


def test_interval_is_wilsons(feedback):
    assert feedback.interval(0, 0) == (0, 1)
    assert feedback.interval(5, 5) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert feedback.interval(10, 0) == pytest.approx((0.7225, 1), abs=1e-4)


def test_summary(feedback, tmp_path):
    store = feedback.Store(tmp_path / "kept")
    for i in range(8):  # tuned: 6 won, 2 lost, on changing sides
        who = ("tuned", "base") if i % 2 else ("base", "tuned")
        best = "left" if (who[0] == "tuned") == (i > 1) else "right"
        store.add(rating(choice=best, who=who, question=f"问{i}") | {"base": "my models/glm"})
    store.add(rating(choice="tie", who=("tuned", "base")))
    store.add(rating(choice="neither", correction={"of": "left", "text": "改好"}))
    with open(tmp_path / "kept/ratings.jsonl", "ab") as file:
        file.write(b"[1]\n")
    run = expect(
        finish(start([sys.executable, RECIPE / "feedback.py", "kept"], cwd=tmp_path))
    ).stdout
    assert "kept: ratings.jsonl 11 rows, sft.jsonl 11 rows, preference.jsonl 9 rows" in run
    assert "1 lines of ratings.jsonl are no ratings" in run
    assert (
        "tuned against base: 6 won, 2 lost, 1 equally good, 0 both bad; won 75% of those decided"
        in run
    )
    assert "95 % interval 41% to 93%" in run and "B against A: 0 won, 0 lost" in run
    command = f"MODEL='my models/glm' DATA=kept/sft.jsonl OUTPUT=output/kept_sft bash {RECIPE.name}/train_zero2.sh"
    assert command in run and (ROOT / command.split()[-1]).is_file()
    gone = finish(start([sys.executable, RECIPE / "feedback.py", tmp_path / "none"]))
    assert (
        gone.returncode == 1
        and len(gone.stderr.splitlines()) == 1
        and "no ratings.jsonl here" in gone.stderr
    )


# ---- crashes and crowds ---------------------------------------------------------------------------------------

WRITER = f"""
import os, sys, threading
sys.path[:0] = sys.argv[1:3]
import feedback
{inspect.getsource(rating)}
folder, name, threads, each, die_at, short = sys.argv[3], sys.argv[4], *map(int, sys.argv[5:9])
write, count = os.write, [0]
def dying(file, data):
    count[0] += 1
    if count[0] == die_at:
        write(file, data[:max(0, len(data) - short)])
        os.kill(os.getpid(), 9)
    return write(file, data)
if die_at:
    os.write = dying
store = feedback.Store(folder)
def work(k):
    for i in range(each):
        question = name + "-" + str(k) + "-" + str(i)
        store.add(rating(question=question))
        print(question, flush=True)
many = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
[t.start() for t in many]
[t.join() for t in many]
"""


def writer(folder, name, threads=1, each=1, die_at=0, short=0) -> subprocess.Popen:
    """A process whose threads each add `each` ratings, and print their questions when they are acknowledged.

    die_at: it is killed in its n-th write, of which the last `short` bytes are missing.
    """
    return start(
        [sys.executable, "-c", WRITER, ROOT, RECIPE, folder, name, threads, each, die_at, short]
    )


def asked(folder: Path) -> list[list[str]]:
    """The questions in each file, sorted."""
    found = rows_of(folder, "ratings"), rows_of(folder, "sft"), rows_of(folder, "preference")
    return [
        sorted(row.get("prompt", row.get("messages"))[0]["content"] for row in some)
        for some in found
    ]


@pytest.mark.parametrize("short", [0, 1, 20, 1 << 20])
@pytest.mark.parametrize("file", ["note", "ratings", "sft", "preference"])
def test_kill_in_the_middle_of_a_write(feedback, tmp_path, file, short):
    """Of the second rating all or nothing is there after the next start, and what was torn is kept."""
    order = ["note", "ratings", "sft", "preference"]
    killed = writer(tmp_path, "a", each=2, die_at=len(order) + 1 + order.index(file), short=short)
    said = killed.communicate(timeout=60)[0].split()
    assert killed.returncode == -9 and said == ["a-0-0"]
    feedback.Store(tmp_path)
    expected = ["a-0-0"] if file == "note" else ["a-0-0", "a-0-1"]
    assert asked(tmp_path) == [expected] * 3
    torn = [path.name for path in tmp_path.glob("*.torn")]
    assert torn == ([f"{file}.jsonl.torn"] if file != "note" and short == 20 else [])
    assert all((tmp_path / name).read_bytes().startswith(b'{"') for name in torn)
    feedback.Store(tmp_path).add(rating(question="b"))
    assert asked(tmp_path) == [[*expected, "b"]] * 3


def test_kill_at_any_time(feedback, tmp_path):
    """Every rating that was acknowledged is in all three files, each once."""
    acknowledged = []
    for i in range(6):
        process = writer(tmp_path, str(i), threads=2, each=10000)
        for _ in range(3 + 2 * i):
            acknowledged.append(process.stdout.readline().strip())
        time.sleep(0.003 * i)
        process.kill()
        acknowledged += process.communicate()[0].split()
    feedback.Store(tmp_path)
    ratings, chats, pairs = asked(tmp_path)
    assert ratings == chats == pairs and len(set(ratings)) == len(ratings)
    assert set(acknowledged) <= set(ratings) and len(ratings) <= len(acknowledged) + 2 * 6


def test_twenty_writers_lose_nothing(feedback, tmp_path):
    processes = [writer(tmp_path, str(p), threads=5, each=5) for p in range(4)]
    for process in processes:
        expect(finish(process))
    expected = sorted(f"{p}-{k}-{i}" for p, k, i in product(range(4), range(5), range(5)))
    assert asked(tmp_path) == [expected] * 3
    assert len({row["id"] for row in rows_of(tmp_path, "ratings")}) == 100
    assert not list(tmp_path.glob("*.torn"))


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_full_disk_leaves_the_files_as_they_were(feedback, tmp_path, monkeypatch, fails_at):
    store, write, count = feedback.Store(tmp_path), os.write, [0]
    store.add(rating(question="a"))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}

    def full(file, data):
        count[0] += 1
        return write(file, data if count[0] != fails_at else data[:20])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="is the disk full"):
        store.add(rating(question="b"))
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before
    store.add(rating(question="b"))
    assert asked(tmp_path) == [["a", "b"]] * 3


def test_a_file_edited_by_hand(feedback, tmp_path):
    """A last row without its newline is a row; rows that somebody took out stay out."""
    store = feedback.Store(tmp_path)
    for question in "ab":
        store.add(rating(question=question))
    path = tmp_path / "sft.jsonl"
    path.write_bytes(path.read_bytes().splitlines()[0])
    feedback.Store(tmp_path).add(rating(question="c"))
    assert asked(tmp_path) == [["a", "b", "c"], ["a", "c"], ["a", "b", "c"]] and not list(
        tmp_path.glob("*.torn")
    )


def test_a_folder_that_cannot_be_used_is_one_line(feedback, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        with pytest.raises(SystemExit, match="cannot keep ratings here"):
            feedback.Store(tmp_path / folder)
    assert not feedback.Store(tmp_path / "new" / "er").folder.exists(), (
        "made before there is anything to keep"
    )


# ---- the page -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(app, tmp_path_factory):
    """A ChatModel on an adapter that knows two answers; its base knows nothing."""
    import torch
    from peft import LoraConfig, get_peft_model

    from common.convert import adapter
    from common.data.labels import encode_chat

    glm = sys.modules["modeling_chatglm"]
    folder = tmp_path_factory.mktemp("glm")
    known = {QUESTION: ANSWER, "小狗怎么叫？": "小狗汪汪叫。"}
    vocabulary = sys.modules["tokenization_chatglm"].train_sentencepiece(
        [*known, *known.values()] * 5, 400, folder
    )
    tokenizer = glm.ChatGLMTokenizer(str(vocabulary))
    torch.manual_seed(0)
    model = glm.ChatGLMForConditionalGeneration(glm.ChatGLMConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_layers=2, num_attention_heads=4, inner_hidden_size=128,
        max_sequence_length=512, initializer_range=0.05, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    for part in (model, tokenizer):
        part.save_pretrained(folder / "base")
    rows = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in known.items()
    ]
    rows = [encode_chat(tokenizer, row, 128) for row in rows]
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(120):
        row = rows[step % 2]
        model(
            input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "run/final")
    tokenizer.save_pretrained(folder / "run/final")
    config = folder / "run/final/adapter_config.json"
    told = json.loads(config.read_text()) | {"base_model_name_or_path": str(folder / "base")}
    config.write_text(json.dumps(told))
    adapter.remember_base(folder / "run/final", str(folder / "base"))
    chat_model = ChatModel(folder / "run")
    chat_model.path = folder / "run"
    return chat_model


@pytest.fixture
def serving(app, tuned, tmp_path):
    """serving(questions) -> address of the page, whose ratings go to tmp_path / "kept"."""
    opened = []

    def serve(questions=()):
        opened.append(app.build_demo(tuned, tmp_path / "kept", questions))
        return app.launch(opened[-1])

    yield serve
    for demo in opened:
        demo.close()


class Rater(Visit):
    """A visitor of the second tab."""

    def __init__(self, browser, address, **context):
        super().__init__(browser, address, **context)
        self.page.get_by_role("tab", name="标注").click()
        self.question = self.page.get_by_label("题目")
        self.question.wait_for()

    def answers(self) -> tuple[str, str]:
        return tuple(
            self.page.locator(f"#{side} textarea").input_value() for side in ("left", "right")
        )

    def labels(self) -> str:
        return " ".join(self.page.locator(f"#{side}").inner_text() for side in ("left", "right"))

    def compare(self, text: str | None = None):
        if text is not None:
            self.question.fill(text)
        self.page.get_by_role("button", name="出两个回答").click()
        self.page.get_by_role("radio", name="左好").wait_for()
        return self.answers()

    def shorter(self):
        """The base model babbles to the limit: make it a low one."""
        self.page.get_by_text("设置", exact=True).last.click()
        box = self.page.get_by_label("number input for 最多词元").last
        box.wait_for()
        self.page.wait_for_timeout(
            500
        )  # Gradio mounts what is in a closed accordion only now, and then sets its value
        box.fill("32")
        box.press("Enter")

    def news(self, text: str) -> str:
        self.page.get_by_text(text).wait_for()
        return self.page.locator("#news").inner_text()


@pytest.fixture
def visit(browser, serving):
    """visit(kind, questions, **context) -> a Visit or Rater."""
    opened = []

    def open_page(kind=Visit, questions=(), **context):
        opened.append(kind(browser, serving(questions), **context))
        return opened[-1]

    yield open_page
    for tab in opened:
        tab.close()


@pytest.mark.slow
def test_chat_in_chromium(visit, tuned, monkeypatch, tmp_path):
    prompts, stream = [], tuned.stream
    monkeypatch.setattr(
        tuned, "stream", lambda turns, *a, **k: prompts.append(turns) or stream(turns, *a, **k)
    )
    tab = visit()
    assert "run/final · LoRA · 0.1 M 参数" in tab.page.locator("#about").inner_text()
    assert ANSWER in tab.ask(QUESTION)
    tab.ask("小狗怎么叫？")
    assert [row["role"] for row in prompts[1]] == ["user", "assistant", "user"] and prompts[1][1][
        "content"
    ] == ANSWER
    tab.page.get_by_role("button", name="撤销").click()
    tab.until(lambda: tab.notes.count() == 1 and tab.box.input_value() == "小狗怎么叫？")
    tab.page.get_by_label("用微调后的权重").uncheck()
    with Endless(tuned) as slow:
        bubble = tab.page.locator(".bot-row .message-content").last
        tab.ask(QUESTION, wait=False)
        tab.page.get_by_role("button", name="停止").wait_for()
        lengths = set()
        tab.until(
            lambda: lengths.add(len(bubble.inner_text())) or len(lengths) > 3 and slow.tokens > 20
        )
        tab.page.get_by_role("button", name="停止").click()
        tab.notes.nth(1).wait_for()
        assert slow.tokens < 250 and "微调前 · 已停止" in tab.notes.nth(1).inner_text()
    tab.page.get_by_label("用微调后的权重").check()
    tab.page.get_by_role("button", name="重试").click()
    tab.until(lambda: len(prompts) == 4 and tab.notes.count() == 2)
    tab.page.get_by_role("button", name="发送").wait_for()
    assert prompts[3] == prompts[2] and "已停止" not in tab.notes.nth(1).inner_text()
    tab.ask(HTML)
    shown = tab.page.locator(".user-row").last
    assert (
        shown.inner_text().strip() == HTML
        and shown.locator("img, b, strong, h1, code").count() == 0
    )
    assert tab.page.title() != "hacked" and not (tmp_path / "kept").exists()
    tab.page.get_by_role("button", name="清空对话").click()
    tab.page.get_by_text(QUESTION).wait_for()  # the examples are back


@pytest.mark.slow
def test_judging_in_chromium(visit, tuned, tmp_path):
    tab = visit(Rater)
    tab.shorter()
    answers = tab.compare(QUESTION)
    assert ANSWER in answers and len(set(answers)) == 2
    best = answers.index(ANSWER)
    assert "微调" not in tab.labels() + tab.page.locator("#news").inner_text(), (
        "told before it was rated"
    )
    assert not (tmp_path / "kept").exists()
    tab.page.get_by_role("button", name="提交").click()
    tab.news("先选一项")
    tab.page.get_by_role("radio", name=("左好", "右好")[best]).check()
    tab.page.get_by_label("备注").fill("答得对 <b>")
    tab.page.get_by_role("button", name="提交").click()
    told = tab.news("揭晓")
    assert f"{'左右'[best]}边是微调后" in told and f"{'右左'[best]}边是微调前" in told
    assert "微调后" in tab.page.locator(f"#{('left', 'right')[best]}").inner_text()
    assert "这一次写了 1 条，一共 1 条" in tab.page.locator("#counts").inner_text()
    assert (
        tab.question.input_value() == "" and tab.page.get_by_role("radio", name="左好").count() == 0
    )
    (row,) = rows_of(tmp_path / "kept", "ratings")
    assert (
        row["prompt"] == [{"role": "user", "content": QUESTION}] and row["comment"] == "答得对 <b>"
    )
    winner = row[row["choice"]]
    assert (
        winner["who"] == "tuned"
        and winner["answer"] == ANSWER
        and winner["sampling"]["max_new_tokens"] == 32
    )
    assert rows_of(tmp_path / "kept", "sft")[0]["messages"][1] == {
        "role": "assistant",
        "content": ANSWER,
    }

    answers = tab.compare("小猫怎么叫？")
    worse = answers.index(next(a for a in answers if len(a) == max(map(len, answers))))
    name = ("左", "右")[worse]
    tab.page.get_by_role("button", name=f"修改{name}边的回答").click()
    box = tab.page.get_by_label(f"改{name}边的回答")
    tab.until(lambda: box.count() and box.input_value() == answers[worse])
    assert tab.page.get_by_role("radio", name=f"{name}好").is_checked()
    box.fill(HTML)
    tab.page.get_by_role("button", name="提交").click()
    assert "改了一个回答" in tab.news("揭晓")
    assert "这一次写了 2 条，一共 2 条" in tab.page.locator("#counts").inner_text()
    pair = rows_of(tmp_path / "kept", "preference")[1]
    assert pair["chosen"][0]["content"] == HTML and pair["rejected"][0]["content"] == answers[worse]
    assert rows_of(tmp_path / "kept", "sft")[1]["messages"][1]["content"] == HTML
    assert tab.page.title() != "hacked"
    for name, kind in (("sft", "chat"), ("preference", "preference")):
        found, stats = load_rows(tmp_path / f"kept/{name}.jsonl", kind=kind)
        assert len(found) == 2 and not stats["dropped"]


@pytest.mark.slow
def test_questions_of_a_file_samplings_and_stop(app, visit, tuned, tmp_path):
    (tmp_path / "asked.jsonl").write_text(
        json.dumps({"question": QUESTION, "answer": "x", "history": [["甲", "乙"]]})
    )
    (tmp_path / "asked.txt").write_text(
        f"小狗怎么叫？\n\n{'长' * 9000}\n小狗怎么叫？\n", encoding="gb18030"
    )
    questions = [
        p for name in ("asked.jsonl", "asked.txt") for p in app.read_questions(tmp_path / name)
    ]
    assert [len(prompt) for prompt in questions] == [3, 1]
    tab = visit(Rater, questions, viewport={"width": 400, "height": 850})
    tab.until(lambda: tab.question.input_value() == QUESTION)
    assert tab.page.get_by_label("前文").input_value() == "问：甲\n答：乙"
    tab.page.get_by_role("button", name="跳过").click()
    tab.until(
        lambda: (
            tab.question.input_value() == "小狗怎么叫？"
            and not tab.page.get_by_label("前文").is_visible()
        )
    )
    tab.page.get_by_label("两种采样").check()
    with Endless(tuned) as slow:
        tab.page.get_by_role("button", name="出两个回答").click()
        stop = tab.page.get_by_role("button", name="停下这个")
        tab.until(lambda: len(tab.answers()[0]) > 3)
        assert tab.answers()[1] == "", "both at a time"
        stop.click()
        tab.until(lambda: len(tab.answers()[1]) > 3 and "左边的回答 · 已停下" in tab.labels())
        stop.click()
        tab.page.get_by_role("radio", name="左好").wait_for()
        assert slow.tokens < 400
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
    tab.page.get_by_role("radio", name="一样好").check()
    tab.page.get_by_role("button", name="提交").click()
    told = tab.news("揭晓")
    assert "采样一" in told and "采样二" in told and "没说完的回答不当作榜样" in told
    (row,) = rows_of(tmp_path / "kept", "ratings")
    assert {row[side]["who"] for side in ("left", "right")} == {"A", "B"} and row["left"][
        "ended"
    ] == "stopped"
    assert {row[side]["sampling"]["temperature"] for side in ("left", "right")} == {0, 0.95}
    assert not rows_of(tmp_path / "kept", "sft") and not rows_of(tmp_path / "kept", "preference")
    assert "题都出过了" in tab.page.locator("#counts").inner_text()
    again = app.Judge(tuned, app.Store(tmp_path / "kept"), questions)
    assert list(again.open) == questions[:1], "what was rated is asked again"


def test_visitors_get_different_questions(app, tuned, tmp_path):
    questions = [[{"role": "user", "content": text}] for text in "甲乙丙"]
    judge = app.Judge(tuned, app.Store(tmp_path), questions)
    judge.ui = SimpleNamespace(question="question", earlier="earlier", counts="counts")
    first, second, third = (SimpleNamespace(session_hash=name) for name in "abc")

    def shown(page):
        return page["question"]["value"]

    assert [shown(judge.arrive(visitor)) for visitor in (first, second)] == ["甲", "乙"]
    judge.leave(first)
    assert shown(judge.arrive(third)) == "甲", "the question of somebody who left was lost"
    assert [shown(judge.following(judge.sitting(second))) for _ in range(2)] == ["丙", ""]
    assert len(judge.sittings) == 2


@pytest.mark.slow
def test_skipping_and_closing_free_the_model(visit, tuned, tmp_path):
    tab = visit(Rater)
    with Endless(tuned) as slow:
        for leave in (lambda: tab.page.get_by_role("button", name="跳过").click(), tab.page.close):
            tab.question.fill(QUESTION)
            tab.page.get_by_role("button", name="出两个回答").click()
            tab.until(lambda: len(tab.answers()[0]) > 3)
            seen = slow.tokens
            leave()
            deadline = time.monotonic() + 15
            while tuned.lock.locked() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.3)
            assert not tuned.lock.locked() and slow.tokens < seen + 150, (
                "the second answer was begun"
            )
            if not tab.page.is_closed():
                tab.page.get_by_role("button", name="出两个回答").wait_for()
    assert not (tmp_path / "kept").exists()


# ---- the page's own HTTP --------------------------------------------------------------------------------------


class Client:
    """What a browser sends and hears, without a browser."""

    def __init__(self, address: str):
        self.api, self.session = address + "gradio_api/", uuid.uuid4().hex
        self.config = json.loads(urllib.request.urlopen(address + "config").read())

    def event(self, label: str, kind: str) -> dict:
        known = {
            c["id"]: c["props"].get("label") or c["props"].get("value")
            for c in self.config["components"]
        }
        return next(
            d
            for d in self.config["dependencies"]
            if [label, kind] in [[known.get(i), k] for i, k in d["targets"]]
        )

    def post(self, path: str, event: dict, values: list):
        body = {
            "data": values,
            "fn_index": event["id"],
            "session_hash": self.session,
            "event_data": None,
        }
        request = urllib.request.Request(
            self.api + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    def compare(self, question: str):
        """Ask, and wait for the end of the answers."""
        event = self.event("题目", "submit")
        initial = {c["id"]: c["props"].get("value") for c in self.config["components"]}
        self.post("queue/join", event, [question, *(initial[i] for i in event["inputs"][1:])])
        with urllib.request.urlopen(
            f"{self.api}queue/data?session_hash={self.session}", timeout=60
        ) as lines:
            for line in lines:
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return

    def fix(self, side: str):
        self.post("run/predict", self.event(f"修改{side}边的回答", "click"), [None])

    def submit(self, choice: str | None, correction: str = "") -> str:
        said = self.post("run/predict", self.event("提交", "click"), [choice, correction, ""])
        return json.dumps(said, ensure_ascii=False)


def test_twenty_visitors_at_once(feedback, serving, tuned, monkeypatch, tmp_path):
    """Twenty pages over HTTP and another process on the same folder: every rating is there once, with its own pair."""

    def instant(turns, stop, use_adapter=True, **sampling):
        yield f"{turns[-1]['content']} {'后' if use_adapter else '前'}", 3

    monkeypatch.setattr(tuned, "stream", instant)
    address, barrier = serving(), threading.Barrier(20)
    other = writer(tmp_path / "kept", "other", threads=4, each=5)

    def visitor(k: int) -> None:
        client = Client(address)
        barrier.wait()
        for i in range(3):
            client.compare(f"{k}-{i}")
            with ThreadPoolExecutor(2) as twice:  # a double click
                said = list(twice.map(lambda _: client.submit("left"), range(2)))
            assert sorted("揭晓" in text for text in said) == [False, True], said

    with ThreadPoolExecutor(20) as crowd:
        list(crowd.map(visitor, range(20)))
    expect(finish(other))
    pages = [f"{k}-{i}" for k, i in product(range(20), range(3))]
    others = [f"other-{k}-{i}" for k, i in product(range(4), range(5))]
    assert asked(tmp_path / "kept") == [sorted(pages + others)] * 3
    for row in rows_of(tmp_path / "kept", "preference"):
        question = row["prompt"][0]["content"]
        if not question.startswith("other"):
            both = {row["chosen"][0]["content"], row["rejected"][0]["content"]}
            assert both == {f"{question} 前", f"{question} 后"}
    kept = (tmp_path / "kept/ratings.jsonl").read_text()
    assert "127.0.0.1" not in kept and "session" not in kept
    sides = [row["left"]["who"] for row in rows_of(tmp_path / "kept", "ratings") if "mode" in row]
    assert 10 < sides.count("tuned") < 50, "not at random"


def test_what_the_page_refuses(app, serving, tuned, monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "stream", lambda turns, *_, **__: iter([("答" * 12000, 3)]))
    client = Client(serving())
    assert "没有等着评的回答" in client.submit("left")
    client.compare("问")
    assert "先选一项" in client.submit(None)
    assert "没有写入：修改最多" in client.submit("left", "长" * (app.MAX_CHARS + 1))
    assert "没有写入" in client.submit("left") and "64 KiB" in client.submit("left"), (
        "too long a row was written"
    )
    assert not (tmp_path / "kept").exists() or not rows_of(tmp_path / "kept", "ratings")
    monkeypatch.setattr(tuned, "stream", lambda turns, *_, **__: iter([("答", 3)]))
    client.compare("问")
    client.fix("左")
    assert "揭晓" in client.submit("right", "改好")
    assert rows_of(tmp_path / "kept", "ratings")[0]["correction"] == {"of": "left", "text": "改好"}


def test_command_line(app, tuned, monkeypatch, tmp_path, capsys):
    """What it prints when it serves, and one line for each thing that is wrong."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, flags)])
        app.main()
        return capsys.readouterr().out

    (tmp_path / "file").write_text("")
    (tmp_path / "asked.txt").write_text("一\n二\n一\n")
    kept, model = ("--feedback_dir", tmp_path / "kept"), ("--model", tuned.path)
    for flags, why in (
        ((*kept, "--model", tmp_path / "none"), "no trained model here; train one first"),
        (("--feedback_dir", tmp_path / "file", *model), "file: cannot keep ratings here"),
        ((*kept, *model, "--questions", tmp_path / "none.txt"), "none.txt: no such file"),
    ):
        with pytest.raises(SystemExit, match=why):
            run(*flags)
    fetched = []
    address = r"http://127\.0\.0\.1:\d+/"
    served = lambda demo: fetched.append(
        (urllib.request.urlopen(demo.local_url).status, demo.close())
    )
    monkeypatch.setattr(app.gr.Blocks, "block_thread", served)
    said = run(*kept, *model, "--questions", tmp_path / "asked.txt")
    assert (
        "2 questions of 3" in said
        and re.search(f"chat with .+: {address}", said)
        and fetched[0][0] == 200
    )
