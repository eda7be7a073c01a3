"""What the Gradio pages share: texts made safe to show, looks, controls of sampling, and a chat of
one column."""

from __future__ import annotations

import argparse
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from common.demo import serve
from common.demo.chat_model import ChatModel, split_thought

MAX_CHARS, MAX_NEW_TOKENS, MAX_WAITING = 8000, 2048, 16
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
AT_ONCE = {"queue": False, **PRIVATE}
MODEL = {"concurrency_id": "model", "concurrency_limit": 1, **PRIVATE}  # one generation at a time
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


# ---- texts ----------------------------------------------------------------------------------------------------


def literal(text: str) -> str:
    """Markdown that shows `text` as it was typed: no HTML, no formatting."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def prose(text: str) -> str:
    """Markdown of a model, whose HTML tags are shown instead of obeyed (inside code they are text
    anyway)."""
    parts = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", text, flags=re.DOTALL)
    return "".join(
        p if i % 2 else re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", p) for i, p in enumerate(parts)
    )


def refuse_long(text: str) -> None:
    """gr.Error for a text above MAX_CHARS."""
    if len(text) > MAX_CHARS:
        raise gr.Error(f"最多 {MAX_CHARS} 字，这里有 {len(text)} 字。", print_exception=False)


def failed(error: Exception) -> gr.Error:
    return gr.Error(f"{type(error).__name__}: {str(error)[:300]}")


def size(model) -> str:
    count = model.num_parameters()
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def facts(count: int, seconds: float, *more: str) -> str:
    """The line under an answer of `count` tokens."""
    return " · ".join(
        [f"{count} 词元", f"{seconds:.1f} 秒", f"{count / seconds:.0f} 词元/秒", *more]
    )


# ---- sampling -------------------------------------------------------------------------------------------------


def own_sampling(chat_model: ChatModel) -> tuple:
    """The values of SAMPLING in the model's generation_config."""
    own = chat_model.model.generation_config
    heat = (own.temperature or 0) if own.do_sample else 0
    return heat, own.top_p or 1, own.top_k or 0, own.repetition_penalty or 1


def length(window: int, width: int = 220) -> gr.Slider:
    """max_new_tokens, for a model of so many positions."""
    most = min(MAX_NEW_TOKENS, window // 2)
    return gr.Slider(
        16, most, min(512, most), step=16, min_width=width, label="最多词元", info="max_new_tokens"
    )


def sampling(values: tuple, width: int = 220) -> list[gr.Slider]:
    """The controls of SAMPLING, standing at `values`."""
    heat, top_p, top_k, penalty = values
    return [
        gr.Slider(
            0, 2, heat, step=0.05, min_width=width, label="温度", info="temperature；0：不采样"
        ),
        gr.Slider(0.05, 1, top_p, step=0.05, min_width=width, label="核采样", info="top_p"),
        gr.Slider(0, 200, top_k, step=1, min_width=width, label="候选数", info="top_k；0：不限"),
        gr.Slider(1, 2, penalty, step=0.05, min_width=width, label="重复惩罚", info="penalty"),
    ]


# ---- a chat ---------------------------------------------------------------------------------------------------


def show(history: list[dict]) -> list[gr.ChatMessage]:
    """The conversation as the chatbot displays it: thoughts folded, a line of facts under each
    answer."""
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


@dataclass
class Run:
    """A question that is being answered; cleared: nobody wants to see it any more."""

    stop: threading.Event = field(default_factory=threading.Event)
    cleared: bool = False


class Runs:
    """The question that each visitor has asked and that is being answered."""

    def __init__(self):
        self.running: dict[str, Run] = {}

    def begin(self, request: gr.Request) -> Run:
        run = self.running[request.session_hash] = Run()
        return run

    def end(self, request: gr.Request) -> None:
        self.running.pop(request.session_hash, None)

    def halt(self, request: gr.Request) -> None:
        """The answer ends within one token."""
        if run := self.running.get(request.session_hash):
            run.stop.set()

    def drop(self, request: gr.Request) -> bool:
        """End the answer; whether there was one. It must not be shown again, its run does the last
        clearing."""
        run = self.running.get(request.session_hash)
        if run:
            run.cleared = True
            run.stop.set()
        return run is not None


class Chat(Runs):
    """The events of a chat. `history`: user and assistant rows as in the training data, with a note
    each."""

    def __init__(self, chat_model: ChatModel, controls: tuple[str, ...]):
        """controls: what ChatModel.stream is told by the page, in this order, after the system
        prompt."""
        super().__init__()
        self.chat_model, self.controls = chat_model, controls

    def ask(self, text, history, request: gr.Request, system, *values):
        if not text.strip():
            return
        refuse_long(text)
        run, how = self.begin(request), dict(zip(self.controls, values, strict=True))
        history = [*history, {"role": "user", "content": text}]
        turns = turns_of(history, system)
        answer = {
            "role": "assistant",
            "content": "",
            "reasoning_content": "",
            "thought_done": True,
            "note": "",
        }
        history.append(answer)
        try:
            yield show(history), history, gr.update(value="", **BUSY)
            for _ in self.answer(answer, turns, run.stop, how):
                if not run.cleared:
                    yield show(history), history, gr.skip()
            if run.cleared:  # after the last look at it, which else would come back
                yield [], [], gr.skip()
        except Exception as error:
            raise failed(error) from error
        finally:
            self.end(request)

    def answer(self, answer: dict, turns: list[dict], stop: threading.Event, how: dict):
        """Let `answer` grow, with a step for each look at it; the last one has its facts."""
        begun, count = time.perf_counter(), 0
        for said, count in self.chat_model.stream(turns, stop, **how):  # noqa: B007
            answer["reasoning_content"], answer["content"], answer["thought_done"] = split_thought(
                said
            )
            yield
        seconds, answer["thought_done"] = time.perf_counter() - begun, True
        more = ["微调前"] * (not how["use_adapter"]) + ["已停止"] * stop.is_set()
        answer["note"] = facts(count, seconds, *more)
        yield

    def pick(self, example: gr.SelectData, history, request: gr.Request, *controls):
        yield from self.ask(example.value["text"], history, request, *controls)

    def again(self, history, request: gr.Request, *controls):
        if history:
            yield from self.ask(history[-2]["content"], history[:-2], request, *controls)

    def undo(self, history):
        return show(history[:-2]), history[:-2], history[-2]["content"] if history else ""

    def clear(self, request: gr.Request):
        return [], [], gr.skip() if self.drop(request) else gr.update(**IDLE)

    def connect(self, chatbot: gr.Chatbot, box: gr.Textbox, controls: list) -> None:
        """controls: the system prompt, then those of __init__."""
        history = gr.State([])
        shown, one = [chatbot, history, box], MODEL | {"show_progress_on": chatbot}
        runs = [
            box.submit(self.ask, [box, history, *controls], shown, **one),
            chatbot.example_select(self.pick, [history, *controls], shown, **one),
            chatbot.retry(self.again, [history, *controls], shown, **one),
        ]
        for run in runs:
            run.then(lambda: gr.update(**IDLE), None, box, **AT_ONCE)
        box.stop(self.halt, **AT_ONCE)
        chatbot.undo(self.undo, history, shown, **AT_ONCE)
        chatbot.clear(self.clear, None, shown, **AT_ONCE)


# ---- serving --------------------------------------------------------------------------------------------------


def launch(
    demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, css: str = CSS
) -> str:
    """Start the page in the background and return its address; `demo.close()` ends it."""
    return serve.serve(demo, host, port, theme=THEME, css=css)


def arguments(doc: str, default: Path) -> argparse.ArgumentParser:
    """--model, --host and --port."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL", default),
        help="folder of a run, model or adapter",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines talk to it"
    )
    parser.add_argument(
        "--port", type=int, default=None, help="default: the first free one from 7860"
    )
    return parser


def stay(demo: gr.Blocks, args: argparse.Namespace, launch: Callable) -> None:
    """Serve until Ctrl-C."""
    print(
        f"chat with {args.model}: {launch(demo, args.host, args.port)}  (Ctrl-C ends)", flush=True
    )
    demo.block_thread()
