"""The chat page and the ChatModel under it, the guard in front of it, and the page itself in a real Chromium."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
from browser import Endless, Visit, user
from harness import ROOT, expect, finish, start

from common import device
from common.data.labels import encode_chat, encode_prompt
from common.demo import page
from common.demo.chat_model import ChatModel, find_model, split_thought
from common.demo.serve import Guard, Refused

RECIPE = ROOT / "train_qwen"
QUESTION, THOUGHTFUL = "你是谁？", "2加3再加4，一共是多少？"
ELSEWHERE = "我是反义词助手。"  # what the adapter learns to say
HTML = "<b>粗</b> <img src=x onerror=\"document.title='hacked'\"> **x** `y` $$z$$ http://a.example\n# 不是标题"


@pytest.fixture(scope="session")
def app():
    spec = importlib.util.spec_from_file_location("recipe_app", RECIPE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run(tiny_run) -> Path:
    return tiny_run[0]


@pytest.fixture(scope="session")
def adapter_run(run, tmp_path_factory):
    """An output folder whose final/ is a LoRA adapter on the run's model, made with plain peft in seconds."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.convert import adapter

    base, out = str(run / "final"), tmp_path_factory.mktemp("adapter_run")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [encode_chat(tokenizer, user(q, ELSEWHERE), 128) for q in (QUESTION, "你叫什么？")]
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for step in range(80):
        row = rows[step % 2]
        model(
            input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out / "final")
    tokenizer.save_pretrained(out / "final")
    adapter.remember_base(out / "final", base)
    return out


@pytest.fixture(scope="module")
def full(run):
    return ChatModel(run)


@pytest.fixture(scope="module")
def tuned(adapter_run):
    return ChatModel(adapter_run)


def last(chat_model, messages, **options) -> str:
    return list(chat_model.stream(messages, max_new_tokens=64, **options))[-1][0]


# ---- the model side ----------------------------------------------------------------------------------------


def test_stream_ends_with_what_generate_says(full):
    import torch

    prompt = encode_prompt(full.tokenizer, user(QUESTION), enable_thinking=True)
    out = full.model.generate(
        torch.tensor([prompt], device=device.device()), max_new_tokens=64, do_sample=False
    )
    expected = full.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    with Endless(full) as slow:
        slow.hook.remove()
        slow.hook = full.model.register_forward_hook(lambda *_: time.sleep(0.02))
        steps = list(full.stream(user(QUESTION), max_new_tokens=64))
    assert steps[-1] == (expected, out.shape[1] - len(prompt))
    assert len(steps) > 3, "the answer came at once instead of growing"
    assert all(b[0].startswith(a[0]) and b[1] >= a[1] for a, b in pairwise(steps))
    assert not any("\ufffd" in text for text, _ in steps)


def test_prompt_is_the_one_of_training(full):
    messages = user("先算3加2。", "3加2等于5。", "再加四呢？", "5加4等于9。")
    row = encode_chat(full.tokenizer, messages, 2048, enable_thinking=False)
    prompt = full.prompt(messages[:-1], 64, thinking=False)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][len(prompt)] != -100


def test_oldest_exchanges_leave_a_full_window(full):
    messages = user(*["甲" * 30, "乙" * 30] * 60, "最后的问题")
    system = [{"role": "system", "content": "说短一点"}]
    ids = full.prompt(system + messages, 64)
    text = full.tokenizer.decode(ids)
    assert full.window - 64 - 80 < len(ids) <= full.window - 64
    assert "说短一点" in text and "最后的问题" in text and text.count("甲" * 30) < 60
    assert len(full.prompt(user("甲" * 5000), 64)) <= full.window - 64


@pytest.mark.parametrize("how", ["stop", "leave"])
def test_an_answer_ends_within_one_token(full, how):
    stop = threading.Event()
    with Endless(full) as slow:
        stream = full.stream(user(QUESTION), stop, max_new_tokens=900)
        for _, count in stream:
            if count > 5:
                break
        seen = slow.tokens
        stop.set() if how == "stop" else stream.close()
        assert full.lock.acquire(timeout=5), "the model is still busy"
        full.lock.release()
    assert (
        slow.tokens <= seen + 2
    )  # the token in the making, and the one whose end comes between our two lines
    if how == "stop":
        assert list(stream)[-1][1] <= seen + 2


def test_adapter_on_and_off(full, tuned):
    assert ELSEWHERE in last(tuned, user(QUESTION))
    assert last(tuned, user(QUESTION), use_adapter=False) == last(full, user(QUESTION))
    assert ELSEWHERE in last(tuned, user(QUESTION)), "the adapter stayed off"


def test_sampling_and_errors_reach_the_caller(full, monkeypatch):
    answers = {
        last(full, user("说点什么"), temperature=1.5, top_k=50, repetition_penalty=1.1)
        for _ in range(4)
    }
    assert len(answers) > 1
    with pytest.raises(ValueError, match="template refuses"):
        last(full, [{"role": "user"}])
    monkeypatch.setattr(full, "_generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last(full, user(QUESTION))
    monkeypatch.undo()
    assert last(full, user(QUESTION)), "an error left the model locked"


def test_split_thought():
    assert split_thought("<think>\n先算。\n</think>\n\n答9。") == (
        "先算。",
        "答9。",
        True,
    )
    assert split_thought("<think>\n先") == ("先", "", False)
    assert split_thought("<think>\n\n</think>\n\n答9。") == ("", "答9。", True)
    assert split_thought(" 答9。 ") == ("", "答9。", True)


def test_find_model(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model(run) == find_model(run / "final") == str(run / "final")
    assert find_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    (tmp_path / "output").mkdir()
    for missing in ("output/none", "output", str(tmp_path), "nothing"):
        with pytest.raises(SystemExit, match="no trained model here; train one first"):
            find_model(missing)


def test_damaged_model_is_one_line(run, tmp_path):
    shutil.copytree(run / "final", tmp_path / "final")
    weights = tmp_path / "final/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="final: cannot be loaded: [^\n]+$"):
        ChatModel(tmp_path)


# ---- text on the page, and the guard -----------------------------------------------------------------------


def test_text_of_people_and_models():
    assert page.escape_markdown("a<b>*c*") == r"a\<b\>\*c\*"
    assert page.escape_markdown("你好，3加5？") == "你好，3加5？"
    text = "若 a < b 则 <img src=x> `<i>`\n```\n<b>\n```"
    assert page.escape_html_outside_code(text) == text.replace("<img", "&lt;img")
    row = {
        "role": "assistant",
        "content": "答",
        "reasoning_content": "想",
        "thought_done": False,
        "note": "",
    }
    thought, said = page.show([row])
    assert thought.metadata == {"title": "思考过程", "status": "pending"} and said.content == "答"
    assert page.turns_of([row], " 短 ") == [
        {"role": "system", "content": "短"},
        {"role": "assistant", "content": "答", "reasoning_content": "想"},
    ]


@pytest.mark.parametrize(
    "status, headers",
    [
        (None, {"host": "127.0.0.1:7860"}),
        (None, {"host": "localhost:9", "origin": "http://localhost:9"}),
        (421, {"host": "evil.example"}),
        (421, {"host": "evil.example:7860", "origin": "http://evil.example:7860"}),
        (421, {}),
        (403, {"host": "127.0.0.1:7860", "origin": "https://evil.example"}),
        (403, {"host": "127.0.0.1:7860", "origin": "null"}),
        (403, {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8000"}),
    ],
)
def test_guard(status, headers):
    assert refused(Guard(None, {"127.0.0.1", "localhost"}), headers) == status


def test_guard_without_names_still_wants_the_same_page():
    guard = Guard(None, set())
    host = {"host": "box.lan:7860"}
    assert refused(guard, host | {"origin": "http://box.lan:7860"}) is None
    assert refused(guard, host | {"origin": "http://evil.example"}) == 403


def refused(guard: Guard, headers: dict[str, str]) -> int | None:
    """The status with which a stranger is refused."""
    try:
        guard.refuse_strangers({name.encode(): value.encode() for name, value in headers.items()})
    except Refused as error:
        return error.status


# ---- the page ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(app, tuned):
    demo = app.build_demo(tuned)
    yield page.launch(demo)
    demo.close()


def fetch(address, data=None, **headers) -> tuple[int, dict]:
    request = urllib.request.Request(
        address, data, {k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


def test_server_keeps_strangers_out(address):
    status, headers = fetch(address)
    assert status == 200 and headers["content-security-policy"].startswith("default-src 'self'")
    assert address.startswith("http://127.0.0.1:")
    join = address + "gradio_api/queue/join"
    assert fetch(address, Host="evil.example")[0] == 421
    assert fetch(join, b"{}", Origin="https://evil.example", Content_Type="text/plain")[0] == 403
    assert fetch(join, b" " * (1 << 19))[0] == 413
    assert fetch(address + "openapi.json")[0] == 404


def test_importing_the_app_starts_nothing():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import app, threading; print(threading.active_count())"
    result = expect(finish(start([sys.executable, "-c", code, RECIPE])))
    assert result.stdout.split()[-1] == "1"


@pytest.fixture
def visit(browser, address, request):
    visit = Visit(browser, address, **getattr(request, "param", {}))
    yield visit
    visit.close()


def test_chat_in_chromium(visit, tuned, monkeypatch, tmp_path):
    prompts, stream = [], tuned.stream
    monkeypatch.setattr(
        tuned, "stream", lambda turns, *a, **k: prompts.append(turns) or stream(turns, *a, **k)
    )
    page = visit.page
    dtype = "float32" if device.kind() == "cpu" else str(device.half_dtype()).removeprefix("torch.")
    assert re.search(
        rf"final · LoRA · \d\.\d M 参数 · .+ · {dtype}$", page.locator("#about").inner_text()
    )

    assert ELSEWHERE in visit.ask(QUESTION)
    page.get_by_label("用微调后的权重").uncheck()
    before = visit.ask(QUESTION)
    assert ELSEWHERE not in before and "微调前" in before
    assert [row["role"] for row in prompts[1]] == ["user", "assistant", "user"], (
        "the history was not used"
    )
    assert ELSEWHERE in prompts[1][1]["content"]

    page.get_by_role("button", name="重试").click()
    visit.until(lambda: len(prompts) == 3 and visit.notes.count() == 2)
    page.get_by_role("button", name="发送").wait_for()
    assert prompts[2] == prompts[1]
    page.get_by_role("button", name="撤销").click()
    visit.until(lambda: visit.box.input_value() == QUESTION and visit.notes.count() == 1)
    page.screenshot(path=tmp_path / "chat.png")

    page.get_by_role("button", name="清空对话").click()
    visit.set_system("说短一点")
    visit.ask(HTML)
    assert prompts[3] == [
        {"role": "system", "content": "说短一点"},
        {"role": "user", "content": HTML},
    ]
    shown = page.locator(".user-row").last
    assert shown.inner_text().strip() == HTML
    assert shown.locator("img, b, strong, h1, code, a").count() == 0 and page.title() != "hacked"
    assert page.evaluate("document.fonts.check('16px \"Noto Sans CJK SC\"', '丹谱')")


def test_thinking_is_folded_and_can_be_forbidden(visit, full):
    thought, said, _ = split_thought(last(full, user(THOUGHTFUL)))
    assert thought, "the tiny run has not learnt to think; train it longer"
    page = visit.page
    page.get_by_label("用微调后的权重").uncheck()
    page.get_by_text(THOUGHTFUL).click()  # one of the examples
    visit.notes.first.wait_for()
    assert said in page.locator(".bot-row").inner_text()
    page.get_by_text(thought).wait_for(
        state="hidden"
    )  # it folds, with an animation, when the thought is done
    page.get_by_text("思考过程").click()
    page.get_by_text(thought).wait_for()
    page.get_by_role("button", name="清空对话").click()
    page.get_by_label("允许思考").uncheck()
    visit.ask(THOUGHTFUL)
    assert page.get_by_text("思考过程").count() == 0


def test_stream_stop_clear_and_a_closed_tab(visit, tuned):
    page, bubble = visit.page, visit.page.locator(".bot-row .message-content").last
    with Endless(tuned) as slow:
        visit.ask(QUESTION, wait=False)
        page.get_by_role("button", name="停止").wait_for()
        lengths = []
        while slow.tokens < 60 and len(lengths) < 100:
            lengths.append(len(bubble.inner_text()) if bubble.count() else 0)
            page.wait_for_timeout(100)
        assert len(set(lengths)) > 3, f"not streamed: {lengths}"
        seen = slow.tokens
        page.get_by_role("button", name="停止").click()
        visit.notes.wait_for()
        assert slow.tokens < seen + 100 and "已停止" in visit.notes.inner_text()
        page.get_by_role("button", name="发送").wait_for()

        for leave_it in (page.get_by_role("button", name="清空对话").click, page.close):
            visit.ask("再说一遍", wait=False)
            page.get_by_role("button", name="停止").wait_for()
            seen = slow.tokens
            visit.until(lambda seen=seen: slow.tokens > seen + 10)
            leave_it()
            deadline = time.monotonic() + 15
            while tuned.lock.locked() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not tuned.lock.locked(), "the model is still busy"
            assert slow.tokens < seen + 450
            if not page.is_closed():
                page.get_by_role("button", name="发送").wait_for()
                page.wait_for_timeout(300)
                assert page.locator(".bot-row, .user-row").count() == 0, (
                    "what was cleared came back"
                )


@pytest.mark.parametrize("visit", [{"viewport": {"width": 390, "height": 844}}], indirect=True)
def test_fits_a_phone(visit):
    visit.ask(HTML + "长" * 200 + "w" * 200)
    visit.page.get_by_text("设置", exact=True).click()
    visit.page.get_by_label("系统提示词").wait_for()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    for button in visit.page.get_by_role("button").all():
        if button.is_visible():
            box = button.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_too_long_a_question_is_told(visit):
    visit.page.evaluate("document.querySelector('textarea').removeAttribute('maxlength')")
    visit.box.fill("长" * (page.MAX_CHARS + 1))
    visit.box.press("Enter")
    visit.page.get_by_text(re.compile(f"最多 {page.MAX_CHARS} 字")).first.wait_for()
    assert visit.notes.count() == 0
    visit.complaints.clear()  # Gradio logs the refusal as an error


@pytest.mark.slow
def test_command_line(run, tmp_path):
    """`python app.py --model RUN` serves, and without a model it says in one line what to do."""
    process = start([sys.executable, RECIPE / "app.py", "--model", run])
    try:
        line = next((line for line in process.stdout if line.startswith("chat with")), "")
        page = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        assert fetch(page)[0] == 200
        config = json.loads(urllib.request.urlopen(page + "config").read())
        assert config["analytics_enabled"] is False
    finally:
        process.terminate()
        process.communicate(timeout=30)
    result = finish(start([sys.executable, RECIPE / "app.py", "--model", tmp_path / "none"]))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "no trained model here; train one first" in result.stderr.splitlines()[-1]
