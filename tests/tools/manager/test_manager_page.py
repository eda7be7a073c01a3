"""The manager's page in a headless Chromium, from an uploaded file to a tool that is called."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import serving as sockets
import torch
from browser import Visit, user
from harness import ROOT, environment, own_modules
from transformers import AutoTokenizer

from common.data.labels import encode_chat
from tools.manager.processes import kill_below

RECIPE = ROOT / "minimind_npu"
WEB = ROOT / "tools/manager/web"
models, tools = own_modules(RECIPE.name, "model", "toolcall.tools")
CALCULATOR = [one for one in tools.built_in().schemas if one["function"]["name"] == "calculator"]
QUESTION = "37乘52等于多少？"
ANSWER = "37乘52等于1924。"
TALK = {"你是谁？": "我是小丹，住在海边。", "几点了？": "现在三点。"}
LOST = "net::ERR"  # what Chromium says of a manager that is gone
WINDOW = 256


# ---- the built files -----------------------------------------------------------------------------


def test_built_files_belong_to_the_sources():
    """`npm run build` writes the hash of each source into dist/sources.json."""
    told = json.loads((WEB / "dist/sources.json").read_text())
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."]
    listed = subprocess.run(command, cwd=WEB, text=True, capture_output=True, check=True)
    names = [name for name in listed.stdout.split() if not name.startswith("dist/")]
    names = [name for name in names if not name.startswith("README")]
    found = {name: hashlib.sha256((WEB / name).read_bytes()).hexdigest() for name in names}
    assert found == told, "cd tools/manager/web && npm ci && npm run build"


def test_built_files_ask_nobody_else():
    """No address but names of XML and the one that React's errors mention."""
    known = ("http://www.w3.org/", "https://react.dev/errors/")
    for file in WEB.glob("dist/**/*"):
        if file.suffix in (".html", ".js", ".css", ".svg"):
            text = file.read_text()
            found = re.findall(r"https?://[\w.-]+\.\w+[\w./-]*", text)
            assert all(address.startswith(known) for address in found), file.name
            assert "eval(" not in text and "new Function" not in text, file.name
    start = (WEB / "dist/index.html").read_text()
    assert start.count("<script") == len(re.findall(r"<script[^>]* src=", start))
    packages = json.loads((WEB / "package.json").read_text())
    versions = [*packages["dependencies"].values(), *packages["devDependencies"].values()]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions)


# ---- a manager with something to look at ---------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with runs/kind, whose model knows TALK and calls the calculator for QUESTION."""
    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    torch.manual_seed(0)
    model = models.build("tiny", len(tokenizer), hidden_size=64, num_hidden_layers=2)
    call = {"name": "calculator", "arguments": {"expression": "37*52"}}
    calls = [{"type": "function", "function": call}]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    told = {"role": "tool", "content": '{"result": 1924}'}
    ended = {"role": "assistant", "content": ANSWER}
    rows = [encode_chat(tokenizer, user(*pair), WINDOW) for pair in TALK.items()]
    talk = [*user(QUESTION), called, told, ended]
    rows.append(encode_chat(tokenizer, talk, WINDOW, tools=CALCULATOR))
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(200):
        loss = model(ids, labels=labels, attention_mask=(ids != 0).long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    assert loss < 0.05
    folder = tmp_path_factory.mktemp("runs")
    model.save_pretrained(folder / "kind/final")
    tokenizer.save_pretrained(folder / "kind/final")
    return folder


class Served:
    """A manager in a process of its own, on the same state and port whenever it starts."""

    def __init__(self, state: Path, weights: Path):
        self.state = state
        self.weights = weights
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tools.manager", "--port", self.port]
        command += ["--state", self.state, "--weights", self.weights, "--recipe", RECIPE.name]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment(PYTHONIOENCODING="utf-8"),
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        self.address = re.search(r"http://127\.0\.0\.1:(\d+)/", line)[0]
        self.port = int(self.address.rsplit(":")[-1].strip("/"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.address + path) as answer:
            return json.load(answer)

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()
        for file in self.state.glob("jobs/*/pid"):
            pid = int(file.read_text())
            if psutil.pid_exists(pid):
                kill_below(pid)


@pytest.fixture(scope="module")
def manager(weights, tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("state"), weights)
    yield served
    served.close()


@pytest.fixture(scope="module")
def visit(browser, manager):
    visit = Visit(browser, manager.address, box="主菜单", viewport={"width": 1280, "height": 900})
    visit.page.set_default_timeout(60_000)
    yield visit
    visit.close()


def go(visit, words: str):
    visit.page.goto(f"{visit.address}#/{words}")


def picture(visit, name: str) -> None:
    """To look at: DANPU_PICTURES=folder, on a screen and on a phone."""
    folder = os.environ.get("DANPU_PICTURES")
    if not folder:
        return
    for width in (1280, 390):
        visit.page.set_viewport_size({"width": width, "height": 1500})
        visit.page.wait_for_timeout(400)
        visit.page.screenshot(path=f"{folder}/{name}-{width}.png")
    visit.page.set_viewport_size({"width": 1280, "height": 900})


def fits(visit) -> None:
    """Nothing stands out of a phone's screen to the right."""
    visit.page.set_viewport_size({"width": 390, "height": 844})
    # charts learn of their new width a moment later
    visit.until(lambda: visit.page.evaluate("document.documentElement.scrollWidth") <= 390)
    visit.page.set_viewport_size({"width": 1280, "height": 900})


def choose_kind(visit, choice) -> None:
    """The taught weights, in a list of models."""
    visit.until(lambda: "kind" in choice.inner_text())
    label = next(line for line in choice.inner_text().splitlines() if "kind" in line)
    choice.select_option(label=label.strip())


# ---- a morning's work ----------------------------------------------------------------------------


def test_a_file_is_uploaded_and_seen_as_training_sees_it(visit, tmp_path):
    page = visit.page
    go(visit, "data")
    rows = [{"text": f"第{i}只小猫住在海边，它喜欢晒太阳，也喜欢吃鱼。"} for i in range(60)]
    rows.append({"text": ""})
    file = tmp_path / "cats.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    page.get_by_label("数据文件").set_input_files(file)
    page.get_by_role("heading", name="cats.jsonl").wait_for()
    trained = page.locator(".sample-row .token.trained").first
    trained.wait_for()
    shown = page.locator(".sample-row .tokens").first.inner_text()
    assert "只小猫住在海边" in shown
    assert page.get_by_role("img", name="长度分布").is_visible()
    assert "没有用上的行" in page.locator("main").inner_text()
    picture(visit, "data")
    fits(visit)


def test_training_outlives_its_manager_and_stops_when_told(visit, manager):
    page = visit.page
    page.get_by_role("link", name="用它训练").click()
    page.get_by_role("heading", name="参数", exact=True).wait_for()
    page.get_by_label("cats.jsonl").wait_for()
    assert page.get_by_label("cats.jsonl").is_checked()
    steps = page.get_by_label("max_steps", exact=True)
    steps.fill("many")
    page.get_by_label("logging_steps", exact=True).fill("1")
    start = page.get_by_role("button", name="开始训练")
    start.click()
    page.locator(".field.wrong", has_text="max_steps").wait_for()
    picture(visit, "train-form")
    fits(visit)
    steps.fill("100000")
    page.get_by_label("查找参数").fill("warmup")
    page.get_by_label("warmup_steps", exact=True).fill("0")
    visit.complaints = [one for one in visit.complaints if "400" not in one]
    start.click()

    page.get_by_role("heading", name="曲线").wait_for()
    job = manager.get("api/status")["jobs"][0]["id"]

    def losses() -> list[float]:
        series = manager.get(f"api/train/metrics?job={job}")["series"]
        return [value for _, value in series.get("loss", [])]

    sockets.until(lambda: len(losses()) > 12 and losses()[-1] < losses()[0] - 1, 90)
    found = losses()
    page.get_by_role("img", name="损失").wait_for()
    visit.until(lambda: f"step {len(found)}" in page.get_by_label("日志").inner_text())
    picture(visit, "train-job")
    fits(visit)

    manager.kill()
    page.get_by_text("管理器没有应答").wait_for()
    manager.start()
    page.get_by_text("实时").wait_for()
    later = len(found) + 2
    visit.until(lambda: len(losses()) >= later, 60)
    visit.until(lambda: f"step {later}/" in page.get_by_label("日志").inner_text())
    log = page.get_by_label("日志").inner_text()
    assert [log.count(f"step {step}/") for step in range(1, later)] == [1] * (later - 1)
    visit.complaints = [one for one in visit.complaints if LOST not in one]

    page.get_by_role("button", name="停止（先存检查点）").click()
    page.locator(".badge", has_text="已停止").first.wait_for()
    page.get_by_role("button", name="接着训练").wait_for()
    assert manager.process.poll() is None
    go(visit, "overview")
    page.get_by_text("硬盘余量").wait_for()
    picture(visit, "overview")
    fits(visit)


def test_weights_are_talked_to(visit):
    page = visit.page
    go(visit, "chat")
    choice = page.get_by_label("模型", exact=True)
    choose_kind(visit, choice)
    ask = page.get_by_placeholder("问点什么")
    ask.wait_for()
    page.get_by_text("采样与系统提示").click()
    page.get_by_label("温度").fill("0")
    ask.fill("你是谁？")
    ask.press("Enter")
    page.get_by_text("词元/秒").wait_for()
    assert TALK["你是谁？"] in page.locator(".bubble.assistant").inner_text()
    picture(visit, "chat")
    fits(visit)


def test_a_tool_is_called_edited_and_sent_again(visit):
    page = visit.page
    go(visit, "tools")
    choice = page.get_by_label("模型", exact=True).locator("visible=true")
    choose_kind(visit, choice)
    ask = page.get_by_placeholder("问一个用得上工具的问题")
    ask.wait_for()
    shown = page.get_by_label("模型看得到的工具")
    assert len(json.loads(shown.input_value())) == len(tools.built_in().schemas)
    shown.fill(json.dumps(CALCULATOR))
    ask.fill(QUESTION)
    ask.press("Enter")
    steps = page.locator(".steps .step:visible")
    page.locator(".step.assistant", has_text=ANSWER).wait_for()
    assert steps.count() == 4
    assert "1924" in page.locator(".step.tool").inner_text()
    picture(visit, "tools")
    fits(visit)

    page.locator(".step.call").get_by_role("button", name="改").click()
    page.get_by_label("模型调用工具").fill(
        '[{"name": "calculator", "arguments": {"expression": "6*7"}}]'
    )
    page.get_by_role("button", name="从这里重发").click()
    page.locator(".step.tool", has_text="42").wait_for()


def test_chapters_compute_their_figures(visit):
    page = visit.page
    go(visit, "tutorial")
    assert page.locator(".contents li").count() == 11
    go(visit, "tutorial/tokenizer")
    page.get_by_label("随便写点什么").fill("小猫hello")
    visit.until(lambda: "小猫hello" in page.locator(".tokens.big").inner_text().replace("\n", ""))
    go(visit, "tutorial/attention")
    page.get_by_role("img", name="注意力热图").wait_for()
    fits(visit)
    go(visit, "tutorial/sft")
    choice = page.get_by_label("用哪个模型算")
    choose_kind(visit, choice)
    box = page.locator(".figure-box")
    box.get_by_label("问题").fill("几点了？")
    box.get_by_label("回答").fill(TALK["几点了？"])
    # the model was taught this answer: it is no surprise
    visit.until(lambda: mean_loss(page) < 0.5)
    fits(visit)


def mean_loss(page) -> float:
    found = re.search(r"平均损失 ([\d.e-]+)", page.locator(".figure-box").inner_text())
    return float(found[1]) if found else float("inf")
