"""chinese_bloom's page: asked in the template saved with the model, or going on with a text where there is none."""

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from browser import Visit
from harness import ROOT, expect, finish, start

from common.data.labels import encode_chat
from common.data.spelling import IGNORE
from common.demo import page

RECIPE = ROOT / "chinese_bloom"
QUESTION, ANSWER = "你是谁", "我是小布，丹谱里的 Bloom 示例助手。"
PROMPTS = {
    "alpaca-zh": "下面是一条描述任务的指令，有的带有输入。请写出恰当的回答。\n\n### 指令：\n你是谁\n\n### 回答：\n",
    "belle": "Human: 你是谁\n\nAssistant: ",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("bloom_app", RECIPE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(name, steps, *flags) -> output folder of a short run, made once."""
    made = {}

    def train(name, steps, *flags):
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            flags += (
                "--max_steps",
                steps,
                "--eval_generate",
                0,
                "--report_to",
                "none",
                "--save_strategy",
                "no",
            )
            expect(
                finish(start([sys.executable, RECIPE / "train.py", "--output_dir", out, *flags]))
            )
            made[name] = out
        return made[name]

    return train


@pytest.fixture(scope="module")
def chatty(trained):
    return trained("chatty", 120, "--data_path", RECIPE / "data/sft/identity.jsonl")


@pytest.fixture(scope="module")
def belle(trained):
    """A LoRA adapter, two steps old: only its template matters."""
    data = RECIPE / "data/sft/identity.jsonl"
    return trained("belle", 2, "--data_path", data, "--template", "belle", "--use_lora", "true")


@pytest.fixture(scope="module")
def writer(trained):
    return trained("writer", 60, "--stage", "pt")


@pytest.fixture
def visit(app, browser):
    """visit(run) -> a tab on the page of that run, and the (conversation, prompt text) pairs it asked the model."""
    opened = []

    def open_page(run):
        chat_model = app.load(run)
        demo, asked, stream = app.build_demo(chat_model), [], chat_model.stream

        def listening(turns, *args, **options):
            asked.append((turns, chat_model.tokenizer.decode(chat_model.prompt(turns, 64))))
            return stream(turns, *args, **options)

        chat_model.stream = listening
        opened.append((demo, Visit(browser, page.launch(demo))))
        return SimpleNamespace(tab=opened[-1][1], asked=asked)

    yield open_page
    for demo, tab in opened:
        tab.close()
        demo.close()


@pytest.mark.parametrize("template", PROMPTS)
def test_the_prompt_is_in_the_template_saved_with_the_model(app, chatty, belle, template, tmp_path):
    run = {"alpaca-zh": chatty, "belle": belle}[template]
    shutil.copytree(
        run / "final", tmp_path / "moved"
    )  # away from run.json: the model's folder is enough
    for folder in (run, tmp_path / "moved"):
        chat_model = app.load(folder)
        question = [{"role": "user", "content": QUESTION}]
        prompt = chat_model.prompt(question, 64)
        assert chat_model.chats and chat_model.tokenizer.decode(prompt) == PROMPTS[template]
        row = encode_chat(
            chat_model.tokenizer, [*question, {"role": "assistant", "content": ANSWER}], 256
        )
        assert row["input_ids"][: len(prompt)] == prompt and row["labels"][len(prompt)] != IGNORE


def test_page_answers_in_chromium(visit, chatty, tmp_path):
    page = visit(chatty)
    assert "final · 模板 alpaca-zh · 0.7 M 参数" in page.tab.page.locator("#about").inner_text()
    assert ANSWER in page.tab.ask(QUESTION)
    assert page.asked[0][1] == PROMPTS["alpaca-zh"]
    page.tab.ask("你会什么")
    assert [turn["role"] for turn in page.asked[1][0]] == ["user", "assistant", "user"]
    assert page.asked[1][1].count("### 回答：\n") == 2 and ANSWER in page.asked[1][1]
    assert page.tab.page.get_by_label("允许思考").count() == 0
    page.tab.page.screenshot(path=tmp_path / "chat.png")


def test_a_model_without_template_goes_on_with_the_text(visit, writer):
    assert not json.loads((writer / "final/tokenizer_config.json").read_text()).get("chat_template")
    page = visit(writer)
    assert "final · 续写 · 0." in page.tab.page.locator("#about").inner_text()
    first = page.tab.ask("小店今天卖出2份")
    assert "份" in first
    page.tab.ask("小狐狸丢了")
    assert [text for _, text in page.asked] == ["小店今天卖出2份", "小狐狸丢了"]
    page.tab.page.get_by_text("设置", exact=True).click()
    page.tab.page.get_by_label("最多词元").first.wait_for()
    assert page.tab.page.get_by_label("系统提示词").count() == 0


def test_merged_adapter_keeps_its_template(app, belle, tmp_path):
    merge = [
        sys.executable,
        RECIPE / "merge.py",
        "--output_dir",
        tmp_path / "merged",
        "--adapter",
        belle / "final",
    ]
    expect(finish(start(merge)))
    chat_model = app.load(tmp_path / "merged")
    prompt = chat_model.prompt([{"role": "user", "content": QUESTION}], 64)
    assert not chat_model.adapter and chat_model.tokenizer.decode(prompt) == PROMPTS["belle"]
    again = finish(start(merge))
    assert again.returncode == 1 and "is not empty" in again.stderr.splitlines()[-1]
