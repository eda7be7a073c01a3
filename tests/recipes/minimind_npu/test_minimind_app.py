"""minimind_npu's page in a real Chromium: answers, thoughts, the adapter's switch, a pre-trained model that goes on."""

import json
import shutil
from types import SimpleNamespace

import pytest
from browser import Visit
from harness import own_modules
from test_minimind_use import RECIPE, TALK, make_adapter, register, trained  # noqa: F401  (trained is a fixture)

from common.demo import page

app, generation, models = own_modules(RECIPE.name, "app", "engine.generation", "model")
THOUGHTFUL = "9减4等于几？"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def this_copy():
    register(models)


@pytest.fixture
def visit(browser):
    """visit(model) -> a tab on its page, and the prompts it asked the model, as text."""
    opened = []

    def open_page(model):
        chat_model = app.MiniMindChatModel(model)
        prompt, asked = chat_model.prompt, []
        chat_model.prompt = lambda *args: asked.append(prompt(*args)) or asked[-1]
        demo = app.build_demo(chat_model)
        tab = Visit(browser, page.launch(demo))
        opened.append((demo, tab))

        def texts():
            return [chat_model.tokenizer.decode(ids) for ids in asked]

        return SimpleNamespace(tab=tab, page=tab.page, asked=texts)

    yield open_page
    for demo, tab in opened:
        tab.close()
        demo.close()


def test_the_page_answers_and_thinks(visit, trained, tmp_path):  # noqa: F811
    found = visit(trained)
    assert "final · 0." in found.page.locator("#about").inner_text()
    assert found.page.get_by_label("用微调后的权重").count() == 0
    thoughtful = found.tab.ask(THOUGHTFUL)
    assert "思考过程" in thoughtful and "5" in thoughtful and "<think>" not in thoughtful
    found.tab.ask("你是谁？")
    first, second = found.asked()
    assert second.startswith(first + TALK[THOUGHTFUL].split("<answer>")[0]), (
        "the history was not used"
    )
    found.page.get_by_label("先思考再回答").check()
    found.tab.set_system("短一点")
    found.tab.ask("你是谁？")
    assert found.asked()[2].startswith("<|im_start|>system\n短一点") and found.asked()[2].endswith(
        "<think>\n"
    )
    found.page.screenshot(path=tmp_path / "chat.png")
    found.page.get_by_role("button", name="清空对话").click()
    found.tab.until(lambda: found.tab.notes.count() == 0)


def test_examples_are_asked_and_an_adapter_can_be_switched_off(visit, trained, tmp_path):  # noqa: F811
    make_adapter(trained, tmp_path / "run/final")
    found = visit(tmp_path / "run")
    assert " · LoRA · " in found.page.locator("#about").inner_text()
    found.page.get_by_label("用微调后的权重").uncheck()
    found.page.get_by_text(app.EXAMPLES[0], exact=True).click()
    found.tab.notes.first.wait_for()
    answer = found.page.locator(".bot-row").last.inner_text()
    assert TALK[app.EXAMPLES[0]] in answer and "微调前" in answer


def test_a_pretrained_model_goes_on_with_the_text(visit, trained, tmp_path):  # noqa: F811
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/run.json").write_text(json.dumps({"settings": {"stage": "pretrain"}}))
    found = visit(tmp_path / "run")
    assert " · 续写 · " in found.page.locator("#about").inner_text()
    assert found.page.get_by_label("先思考再回答").count() == 0
    found.tab.ask("西班牙的首都")
    assert found.asked() == ["<|im_start|>西班牙的首都"]


def test_the_default_is_the_newest_run(trained, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(trained, tmp_path / "sft")
    monkeypatch.setattr(app, "newest", lambda: generation.newest(tmp_path))
    about = next(block for block in app.build_demo().blocks.values() if block.elem_id == "about")
    assert "sft/final · " in about.value.replace("\\", "")
