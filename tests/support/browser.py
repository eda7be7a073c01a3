"""A headless Chromium on the recipes' pages, and what their tests ask a model."""

from __future__ import annotations

import time


def user(*texts: str) -> list[dict]:
    """One question, or question, answer, question ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


class Endless:
    """Inside, `chat_model` takes 20 ms a token and never ends an answer by itself."""

    def __init__(self, chat_model):
        self.chat_model = chat_model
        self.tokens = 0

    def __enter__(self):
        def slow(module, inputs, output):
            self.tokens += 1
            time.sleep(0.02)
            output.logits[..., self.chat_model.tokenizer.eos_token_id] = -1e9

        model = self.chat_model.model
        if self.chat_model.adapter:
            model = model.get_base_model()
        self.hook = model.register_forward_hook(slow)
        return self

    def __exit__(self, *_):
        self.hook.remove()


class Visit:
    """One visitor's tab, and everything that must not happen in it."""

    def __init__(self, browser, address, box: str = "问题", **context):
        """box: label of what people type into, or what its placeholder says."""
        self.context = browser.new_context(locale="zh-CN", **context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.set_default_timeout(20_000)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self.interrupted)
        self.page.on("console", self.heard)
        self.page.on("request", self.requested)
        self.address = address
        self.page.goto(address)
        self.box = self.page.get_by_label(box).or_(self.page.get_by_placeholder(box)).first
        send = self.page.get_by_role("button", name="发送")
        self.send = send.or_(self.page.get_by_test_id("submit-button")).first
        self.notes = self.page.get_by_text("词元/秒")
        self.box.wait_for()

    def heard(self, message):
        if message.type == "error":
            self.complaints.append(f"console: {message.text}")

    def interrupted(self, dialog):
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def requested(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.complaints.append(f"request: {request.url}")

    def ask(self, text: str, wait: bool = True) -> str:
        """Type, press Enter; the new answer's bubble as text."""
        count = self.notes.count()
        self.box.fill(text)
        self.box.press("Enter")
        if wait:
            self.notes.nth(count).wait_for()
            self.send.wait_for()
            return self.page.locator(".bot-row").last.inner_text()

    def set_system(self, text: str):
        """Open the settings and type a system prompt.

        Gradio mounts what is in a closed accordion only now, and then sets its value.
        """
        self.page.get_by_text("设置", exact=True).click()
        box = self.page.get_by_label("系统提示词")

        def stays():
            box.fill(text)
            self.page.wait_for_timeout(500)
            return box.input_value() == text

        self.until(stays)

    def until(self, condition, seconds: float = 15):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "did not happen"
            self.page.wait_for_timeout(50)

    def close(self):
        self.context.close()
        assert not self.complaints, self.complaints
