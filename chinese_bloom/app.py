"""Gradio page for a trained model: a run's output folder, a model folder, a LoRA adapter or a hub id.

    python chinese_bloom/app.py                             # what `bash chinese_bloom/train_zero2.sh` left in output/
    python chinese_bloom/app.py --model output/chinese_bloom_pt                       # goes on with what you type
    python chinese_bloom/app.py --model output/chinese_bloom/final --port 7860 --host 127.0.0.1
    MODEL=bigscience/bloomz-560m python chinese_bloom/app.py

The prompt is built from the chat template saved with the model, by the code that built the training rows
(common/chat.py), so training and talking cannot differ. A run of --stage pt, and a model without a chat template, go
on with the text instead.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for common/
from common import device, serve  # noqa: I001  (device before torch and transformers)
from common.talk import Talker, split_thought

import argparse
import os
import re
import threading
import time

import gradio as gr

DEFAULT = HERE.parent / "output" / HERE.name
MAX_CHARS, MAX_NEW_TOKENS, MAX_WAITING = 8000, 2048, 16
EXAMPLES = ["你是谁？", "七乘八得多少？", "四川的省会是哪里？", "判断评论的态度。\n手机很好，下次还来。"]
BEGINNINGS = ["小狐狸丢了", "土豆炒白菜的做法：", "小店今天卖出", "青石镇"]
CSS = """
.gradio-container { width: 100%; max-width: 60rem !important; margin: auto }
#about p { color: var(--body-text-color-subdued); font-size: var(--text-sm) }
.message-buttons-right { display: none }  /* would copy a question with its escapes */
.message.thought:last-child:not(:first-child) { & .thought-group { border: 0; background: none; padding: 0 }
    & .title { padding: 0; opacity: 0.7; pointer-events: none } & .arrow { display: none } }
"""  # the last rule: the line of facts under an answer is a thought without a fold
FONT = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
THEME = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT)
IDLE, BUSY = {"submit_btn": "发送", "stop_btn": False}, {"submit_btn": False, "stop_btn": "停止"}
PRIVATE = {"api_visibility": "private"}  # the page's events are no API
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


def literal(text: str) -> str:
    """Markdown that shows `text` as it was typed: no HTML, no formatting."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def prose(text: str) -> str:
    """Markdown of a model, whose HTML tags are shown instead of obeyed (inside code they are text anyway)."""
    parts = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", text, flags=re.DOTALL)
    return "".join(p if i % 2 else re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", p) for i, p in enumerate(parts))


def show(history: list[dict]) -> list[gr.ChatMessage]:
    """The conversation as the chatbot displays it: thoughts folded, a line of facts under each answer."""
    shown = []
    for row in history:
        if row["role"] == "user":
            shown.append(gr.ChatMessage(literal(row["content"]), "user"))
            continue
        if row["reasoning_content"]:
            fold = {"title": "思考过程", "status": "done" if row["thought_done"] else "pending"}
            shown.append(gr.ChatMessage(prose(row["reasoning_content"]), "assistant", fold))
        if row["content"] or not row["reasoning_content"]:
            shown.append(gr.ChatMessage(prose(row["content"]), "assistant"))
        if row["note"]:
            shown.append(gr.ChatMessage("", "assistant", {"title": row["note"], "status": "done"}))
    return shown


def turns_of(history: list[dict], system: str) -> list[dict]:
    """The conversation as rows of the training data."""
    keys = ("role", "content", "reasoning_content")
    head = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return head + [{k: row[k] for k in keys if k in row} for row in history]


class Speaker(Talker):
    """A Talker that goes on with the last text where the model was pre-trained (--stage pt) or has no chat template."""

    @property
    def chats(self) -> bool:
        return self.tokenizer.chat_template is not None and self.settings.get("stage") != "pt"

    def prompt(self, messages: list[dict], room: int, thinking: bool = True) -> list[int]:
        if self.chats:
            return super().prompt(messages, room, thinking)
        ids = self.tokenizer(messages[-1]["content"], add_special_tokens=False, verbose=False)["input_ids"]
        return ids[-(self.window - room) :]

    def what(self) -> str:
        """How the model is asked, for the line under the title."""
        template = self.settings.get("template")
        return "续写" if not self.chats else f"模板 {Path(template).name}" if template else "对话"


class Page:
    """What the events of the page do. `history`: user and assistant rows as in the training data, with a note each."""

    def __init__(self, talker: Speaker):
        self.talker, self.stops = talker, {}

    def ask(self, text, history, request: gr.Request, system, use_adapter, *numbers):
        if not text.strip():
            return
        if len(text) > MAX_CHARS:
            raise gr.Error(f"最多 {MAX_CHARS} 字，这里有 {len(text)} 字。", print_exception=False)
        stop = self.stops[request.session_hash] = threading.Event()
        history = [*history, {"role": "user", "content": text}]
        turns, begun, count = turns_of(history, system), time.perf_counter(), 0
        answer = {"role": "assistant", "content": "", "reasoning_content": "", "thought_done": True, "note": ""}
        history.append(answer)
        yield show(history), history, gr.update(value="", **BUSY)
        try:
            sampling = dict(zip(SAMPLING, numbers, strict=True))
            for said, count in self.talker.stream(turns, stop, use_adapter, **sampling):  # noqa: B007
                answer["reasoning_content"], answer["content"], answer["thought_done"] = split_thought(said)
                yield show(history), history, gr.skip()
        except Exception as error:
            raise gr.Error(f"{type(error).__name__}: {str(error)[:300]}") from error
        seconds, answer["thought_done"] = time.perf_counter() - begun, True
        facts = [f"{count} 词元", f"{seconds:.1f} 秒", f"{count / seconds:.0f} 词元/秒"]
        facts += ["微调前"] * (not use_adapter) + ["已停止"] * stop.is_set()
        answer["note"] = " · ".join(facts)
        yield show(history), history, gr.skip()

    def pick(self, example: gr.SelectData, history, request: gr.Request, *controls):
        yield from self.ask(example.value["text"], history, request, *controls)

    def again(self, history, request: gr.Request, *controls):
        if history:
            yield from self.ask(history[-2]["content"], history[:-2], request, *controls)

    def undo(self, history):
        return show(history[:-2]), history[:-2], history[-2]["content"] if history else ""

    def halt(self, request: gr.Request):
        self.stops.pop(request.session_hash, threading.Event()).set()

    def clear(self, request: gr.Request):
        self.halt(request)
        return [], gr.update(**IDLE)


def size(model) -> str:
    count = model.num_parameters()
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def build_demo(model: str | Path | Speaker = DEFAULT) -> gr.Blocks:
    """The page for a run, model or adapter folder; SystemExit with one line when there is no model."""
    talker = model if isinstance(model, Speaker) else Speaker(model)
    page, kind = Page(talker), " · LoRA" * talker.adapter + f" · {talker.what()}"
    about = f"{talker.name}{kind} · {size(talker.model)} 参数 · {device.name()} · {talker.model.dtype}"
    hint, examples = ("问点什么", EXAMPLES) if talker.chats else ("写个开头，模型接着写", BEGINNINGS)
    title = f"{HERE.name} · {'聊天' if talker.chats else '续写'}"
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as demo:
        gr.Markdown(f"### {HERE.name}\n{about.replace('torch.', '')}", elem_id="about")
        history = gr.State([])
        chatbot = gr.Chatbot(
            show_label=False, scale=1, min_height=320, buttons=["copy"], allow_tags=False,
            placeholder=f"{hint}，或选一个例子", examples=[{"text": text} for text in examples],
        )  # fmt: skip
        box = gr.Textbox(
            label="问题", show_label=False, placeholder=f"{hint}，回车发送", max_lines=8,
            max_length=MAX_CHARS, **IDLE,
        )  # fmt: skip
        controls = settings(talker)
        shown = [chatbot, history, box]
        one = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress_on": chatbot}
        runs = [
            box.submit(page.ask, [box, history, *controls], shown, **one, **PRIVATE),
            chatbot.example_select(page.pick, [history, *controls], shown, **one, **PRIVATE),
            chatbot.retry(page.again, [history, *controls], shown, **one, **PRIVATE),
        ]
        for run in runs:
            run.then(lambda: gr.update(**IDLE), None, box, queue=False, **PRIVATE)
        box.stop(page.halt, queue=False, **PRIVATE)
        chatbot.undo(page.undo, history, shown, queue=False, **PRIVATE)
        chatbot.clear(page.clear, None, [history, box], cancels=runs, queue=False, **PRIVATE)
        demo.unload(page.halt)
    return demo.queue(max_size=MAX_WAITING)


def settings(talker: Speaker) -> list[gr.components.Component]:
    """The controls under the chat, in the order of Page.ask; their defaults are those of the run and of the model."""
    own, most = talker.model.generation_config, min(MAX_NEW_TOKENS, talker.window // 2)
    heat = (own.temperature or 0) if own.do_sample else 0
    switch = gr.Checkbox(True, label="用微调后的权重", visible=talker.adapter)
    with gr.Accordion("设置", open=False):
        prompt = talker.settings.get("system_prompt", "")
        system = gr.Textbox(
            prompt, label="系统提示词", info="在 alpaca 模板里代替开场白", lines=2, max_length=MAX_CHARS,
            visible=talker.chats,
        )  # fmt: skip
        with gr.Row():
            numbers = [
                gr.Slider(16, most, min(512, most), step=16, min_width=220, label="最多词元", info="max_new_tokens"),
                gr.Slider(0, 2, heat, step=0.05, min_width=220, label="温度", info="temperature；0：不采样"),
                gr.Slider(0.05, 1, own.top_p or 1, step=0.05, min_width=220, label="核采样", info="top_p"),
                gr.Slider(0, 200, own.top_k or 0, step=1, min_width=220, label="候选数", info="top_k；0：不限"),
                gr.Slider(
                    1, 2, own.repetition_penalty or 1, step=0.05, min_width=220, label="重复惩罚", info="penalty"
                ),
            ]
    return [system, switch, *numbers]


def launch(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start the page in the background and return its address; `demo.close()` ends it."""
    return serve.serve(demo, host, port, theme=THEME, css=CSS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.environ.get("MODEL", DEFAULT), help="folder of a run, model or adapter")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines talk to it")
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    args = parser.parse_args()
    demo = build_demo(args.model)
    print(f"chat with {args.model}: {launch(demo, args.host, args.port)}  (Ctrl-C ends)", flush=True)
    demo.block_thread()


if __name__ == "__main__":
    main()
