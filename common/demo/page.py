"""What the Gradio pages share: texts made safe to show, controls, and a whole page of one chat."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from common import cli
from common.demo import serve
from common.demo.chat_model import SAMPLING, ChatModel, split_thought

MAX_CHARS = 8000
MAX_NEW_TOKENS = 2048
MAX_WAITING = 16
CSS = """
.gradio-container { width: 100%; max-width: 60rem !important; margin: auto }
#about p { color: var(--body-text-color-subdued); font-size: var(--text-sm) }
.message-buttons-right { display: none }  /* would copy a question with its escapes */
.message.thought:last-child:not(:first-child) {
    & .thought-group { border: 0; background: none; padding: 0 }
    & .title { padding: 0; opacity: 0.7; pointer-events: none }
    & .arrow { display: none }
}
"""  # the last rule: the line of facts under an answer is a thought without a fold
FONT = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
THEME = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT)
IDLE = {"submit_btn": "发送", "stop_btn": False}
BUSY = {"submit_btn": False, "stop_btn": "停止"}
PRIVATE = {"api_visibility": "private"}  # the page's events are no API
AT_ONCE = {"queue": False, **PRIVATE}
MODEL = {"concurrency_id": "model", "concurrency_limit": 1, **PRIVATE}  # one generation at a time


# ---- texts -------------------------------------------------------------------------------------


def escape_markdown(text: str) -> str:
    """Markdown that shows `text` as it was typed: no HTML, no formatting."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def escape_html_outside_code(text: str) -> str:
    """Markdown of a model, whose HTML tags are shown instead of obeyed.

    Inside code they are text anyway.
    """
    parts = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", text, flags=re.DOTALL)
    # every second part is code
    parts[::2] = [re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", prose) for prose in parts[::2]]
    return "".join(parts)


def refuse_long(text: str) -> None:
    """gr.Error for a text above MAX_CHARS."""
    if len(text) > MAX_CHARS:
        raise gr.Error(f"最多 {MAX_CHARS} 字，这里有 {len(text)} 字。", print_exception=False)


def failed(error: Exception) -> gr.Error:
    """What the page shows of an error during generation."""
    return gr.Error(f"{type(error).__name__}: {str(error)[:300]}")


def about(chat_model: ChatModel, title: str, *more: str) -> str:
    """Markdown of the head: the title, and a line of facts about the model."""
    facts = [chat_model.name]
    if chat_model.adapter:
        facts.append("LoRA")
    if not chat_model.chats:
        facts.append("续写")
    facts += [*more, *chat_model.described()]
    return f"### {title}\n{escape_markdown(' · '.join(facts))}"


def answer_note(count: int, seconds: float, *more: str) -> str:
    """The line of facts under an answer of `count` tokens."""
    speed = count / seconds
    return " · ".join([f"{count} 词元", f"{seconds:.1f} 秒", f"{speed:.0f} 词元/秒", *more])


# ---- controls ----------------------------------------------------------------------------------


def question_box(hint: str) -> gr.Textbox:
    """Where people type; Enter sends."""
    return gr.Textbox(
        label="问题",
        show_label=False,
        placeholder=f"{hint}，回车发送",
        max_lines=8,
        max_length=MAX_CHARS,
        **IDLE,
    )


def system_box(chat_model: ChatModel, prompt: str = "", info: str | None = None) -> gr.Textbox:
    """The system prompt, shown where the chat template knows one."""
    return gr.Textbox(
        prompt,
        label="系统提示词",
        info=info,
        lines=2,
        max_length=MAX_CHARS,
        visible=chat_model.takes_system,
    )


def length(window: int, width: int = 220) -> gr.Slider:
    """max_new_tokens, for a model of so many positions."""
    most = min(MAX_NEW_TOKENS, window // 2)
    start = min(512, most)
    return gr.Slider(
        16, most, start, step=16, min_width=width, label="最多词元", info="max_new_tokens"
    )


def sampling(values: dict[str, float], width: int = 220) -> list[gr.Slider]:
    """The controls of SAMPLING, in its order, standing at `values`."""

    def slider(name, low, high, step, label, info):
        return gr.Slider(
            low, high, values[name], step=step, min_width=width, label=label, info=info
        )

    return [
        slider("temperature", 0, 2, 0.05, "温度", "temperature；0：不采样"),
        slider("top_p", 0.05, 1, 0.05, "核采样", "top_p"),
        slider("top_k", 0, 200, 1, "候选数", "top_k；0：不限"),
        slider("repetition_penalty", 1, 2, 0.05, "重复惩罚", "penalty"),
    ]


# ---- what is displayed -------------------------------------------------------------------------


def answer_bubbles(thought: str, thought_done: bool, text: str, note: str) -> list[gr.ChatMessage]:
    """An answer as the chatbot displays it: its thought folded, a line of facts under it."""
    bubbles = []
    if thought:
        fold = {"title": "思考过程", "status": "done" if thought_done else "pending"}
        bubbles.append(gr.ChatMessage(escape_html_outside_code(thought), "assistant", fold))
    if text or not thought:
        bubbles.append(gr.ChatMessage(escape_html_outside_code(text), "assistant"))
    if note:
        bubbles.append(gr.ChatMessage("", "assistant", {"title": note, "status": "done"}))
    return bubbles


def show(history: list[dict]) -> list[gr.ChatMessage]:
    """The conversation as the chatbot displays it."""
    shown = []
    for row in history:
        if row["role"] == "user":
            shown.append(gr.ChatMessage(escape_markdown(row["content"]), "user"))
        else:
            shown += answer_bubbles(
                row["reasoning_content"], row["thought_done"], row["content"], row["note"]
            )
    return shown


def turns_of(history: list[dict], system: str) -> list[dict]:
    """The conversation as rows of the training data."""
    keys = ("role", "content", "reasoning_content")
    turns = [{key: row[key] for key in keys if key in row} for row in history]
    if system.strip():
        turns.insert(0, {"role": "system", "content": system.strip()})
    return turns


# ---- a chat ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A question that is being answered; cleared: nobody wants to see it any more."""

    stop: threading.Event = field(default_factory=threading.Event)
    cleared: bool = False


class Runs:
    """The question of each visitor that is being answered."""

    def __init__(self):
        self.running: dict[str, Run] = {}

    def begin(self, request: gr.Request) -> Run:
        run = self.running[request.session_hash] = Run()
        return run

    def end(self, request: gr.Request) -> None:
        self.running.pop(request.session_hash, None)

    def halt(self, request: gr.Request) -> None:
        """End the answer within one token."""
        run = self.running.get(request.session_hash)
        if run:
            run.stop.set()

    def drop(self, request: gr.Request) -> bool:
        """End the answer and never show it again; whether there was one.

        Its run then does the last clearing.
        """
        run = self.running.get(request.session_hash)
        if run is None:
            return False
        run.cleared = True
        run.stop.set()
        return True


class Chat(Runs):
    """The events of a chat.

    `history`: user and assistant rows as in the training data, answers with a note.
    """

    def __init__(self, chat_model: ChatModel, controls: Sequence[str]):
        """controls: what the page passes to ChatModel.stream, in this order, after the system
        prompt."""
        super().__init__()
        self.chat_model = chat_model
        self.controls = controls

    def ask(self, text, history, request: gr.Request, system, *values):
        if not text.strip():
            return
        refuse_long(text)
        refuse_long(system)
        run = self.begin(request)
        options = dict(zip(self.controls, values, strict=True))
        history = [*history, {"role": "user", "content": text}]
        turns = self.turns_of(history, system)
        answer = {
            "role": "assistant",
            "content": "",
            "reasoning_content": "",
            "thought_done": True,
            "note": "",
        }
        history.append(answer)
        try:
            yield self.show(history), history, gr.update(value="", **BUSY)
            for _ in self.answer(answer, turns, run.stop, options):
                if not run.cleared:
                    yield self.show(history), history, gr.skip()
            if run.cleared:  # after the last look at it, which else would come back
                yield [], [], gr.skip()
        except Exception as error:
            raise failed(error) from error
        finally:
            self.end(request)

    def answer(self, answer: dict, turns: list[dict], stop: threading.Event, options: dict):
        """Let `answer` grow, with a step for each look at it; the last one has its note."""
        began = time.perf_counter()
        count = 0
        for count in self.grow(answer, turns, stop, options):  # noqa: B007
            yield
        seconds = time.perf_counter() - began
        more = []
        if not options["use_adapter"]:
            more.append("微调前")
        if stop.is_set():
            more.append("已停止")
        answer |= {"thought_done": True, "note": answer_note(count, seconds, *more)}
        yield

    def grow(self, answer: dict, turns: list[dict], stop: threading.Event, options: dict):
        """Let the texts of `answer` grow; gives its tokens so far."""
        for text, count in self.chat_model.stream(turns, stop, **options):
            thought, content, done = split_thought(text)
            answer |= {"reasoning_content": thought, "content": content, "thought_done": done}
            yield count

    def show(self, history: list[dict]) -> list[gr.ChatMessage]:
        return show(history)

    def turns_of(self, history: list[dict], system: str) -> list[dict]:
        return turns_of(history, system)

    def pick(self, example: gr.SelectData, history, request: gr.Request, *controls):
        yield from self.ask(example.value["text"], history, request, *controls)

    def again(self, history, request: gr.Request, *controls):
        if history:
            yield from self.ask(history[-2]["content"], history[:-2], request, *controls)

    def undo(self, history):
        question = history[-2]["content"] if history else ""
        return self.show(history[:-2]), history[:-2], question

    def clear(self, request: gr.Request):
        answering = self.drop(request)
        return [], [], gr.skip() if answering else gr.update(**IDLE)

    def connect(self, chatbot: gr.Chatbot, box: gr.Textbox, controls: list) -> None:
        """controls: the system prompt, then those of __init__."""
        history = gr.State([])
        shown = [chatbot, history, box]
        generating = MODEL | {"show_progress_on": chatbot}
        runs = [
            box.submit(self.ask, [box, history, *controls], shown, **generating),
            chatbot.example_select(self.pick, [history, *controls], shown, **generating),
            chatbot.retry(self.again, [history, *controls], shown, **generating),
        ]
        for run in runs:
            run.then(lambda: gr.update(**IDLE), None, box, **AT_ONCE)
        box.stop(self.halt, **AT_ONCE)
        chatbot.undo(self.undo, history, shown, **AT_ONCE)
        chatbot.clear(self.clear, None, shown, **AT_ONCE)


# ---- the page ----------------------------------------------------------------------------------


def chat_column(
    chat_model: ChatModel,
    examples: Sequence[str],
    switches: dict[str, gr.Checkbox] | None = None,
    system_prompt: str = "",
    system_info: str | None = None,
    make: Callable[..., Chat] = Chat,
    **look,
) -> Chat:
    """A conversation, the box to type in and the settings, connected; to be called inside a page.

    Arguments as of chat_demo; look: of gr.Chatbot.
    """
    switches = switches or {}
    hint = "问点什么" if chat_model.chats else "写个开头，模型接着写"
    chatbot = gr.Chatbot(
        show_label=False,
        min_height=320,
        buttons=["copy"],
        allow_tags=False,
        placeholder=f"{hint}，或选一个例子",
        examples=[{"text": text} for text in examples],
        **look,
    )
    box = question_box(hint)
    any_switch = chat_model.adapter or any(switch.visible for switch in switches.values())
    with gr.Row(visible=any_switch):
        use_adapter = gr.Checkbox(True, label="用微调后的权重", visible=chat_model.adapter)
        for switch in switches.values():
            switch.render()
    with gr.Accordion("设置", open=False):
        system = system_box(chat_model, system_prompt, system_info)
        with gr.Row():
            numbers = [length(chat_model.window), *sampling(chat_model.sampling_defaults())]
    chat = make(chat_model, ["use_adapter", *switches, "max_new_tokens", *SAMPLING])
    chat.connect(chatbot, box, [system, use_adapter, *switches.values(), *numbers])
    return chat


def chat_demo(
    chat_model: ChatModel,
    title: str,
    examples: Sequence[str],
    facts: Sequence[str] = (),
    switches: dict[str, gr.Checkbox] | None = None,
    system_prompt: str = "",
    system_info: str | None = None,
    make: Callable[..., Chat] = Chat,
) -> gr.Blocks:
    """The page of one chat.

    Args:
        examples: questions; beginnings of a text where the model continues one.
        facts: more for the line under the title.
        switches: argument of ChatModel.stream -> the checkbox (with render=False) that sets it.
        system_prompt, system_info: what the box of the system prompt holds at first, and the text
            beside it.
        make: makes the Chat, from the arguments of one.
    """
    kind = "聊天" if chat_model.chats else "续写"
    with gr.Blocks(title=f"{title} · {kind}", analytics_enabled=False, fill_height=True) as demo:
        gr.Markdown(about(chat_model, title, *facts), elem_id="about")
        chat = chat_column(
            chat_model, examples, switches, system_prompt, system_info, make, scale=1
        )
        demo.unload(chat.halt)
    return demo.queue(max_size=MAX_WAITING)


# ---- serving -----------------------------------------------------------------------------------


def launch(
    demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, css: str = CSS
) -> str:
    """Start the page in the background and return its address; `demo.close()` ends it."""
    return serve.serve(demo, host, port, theme=THEME, css=css)


def arguments(description: str, default: str | Path) -> cli.Parser:
    """--model, --host and --port."""
    parser = cli.Parser(description)
    add = parser.add_argument
    add("--model", default=os.environ.get("MODEL", default), help="run, model or adapter folder")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines talk to it")
    add("--port", type=int, help="default: the first free one from 7860")
    return parser


def stay(demo: gr.Blocks, args, launch: Callable = launch) -> None:
    """Serve until Ctrl-C; args: --model, --host and --port."""
    address = launch(demo, args.host, args.port)
    print(f"chat with {args.model}: {address}  (Ctrl-C ends)", flush=True)
    demo.block_thread()
