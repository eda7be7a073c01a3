"""Gradio chat with a trained model: a run's output folder, a model folder or a LoRA adapter.

    python minimind_npu/app.py                              # the newest run that answers
    python minimind_npu/app.py --model output/minimind_npu/reason --port 7860 --host 127.0.0.1
    MODEL=my_model python minimind_npu/app.py
    python minimind_npu/app.py --base_url http://127.0.0.1:8998/v1     # a server's; --model ID
    python minimind_npu/app.py --model output/minimind_npu/toolcall --tools python my_tools.py

With its box checked the model may call tools within an answer: the built-in ones and those of
--tools (python runs code in the sandbox). Each call stands folded where it was made, with what it
gave.

The prompt is built by the code that built the training rows (common/data/labels.py), so training
and talking cannot differ. A pre-trained model continues the text instead.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common.demo import page  # noqa: I001  (with common.device, which comes before torch)

import json
import threading
from functools import partial

import gradio as gr

from common.demo.chat_model import split_thought
from engine.generation import MiniMindChatModel, newest
from server.client import ServedModel
from toolcall.calls import OPENED
from toolcall.own_tools import registry_of
from toolcall.registry import Registry
from toolcall.talk import Part, with_tools

EXAMPLES = ["你是谁？", "七加五等于几？", "西班牙的首都是哪里？", "想一想再回答：6加2再减5等于几？"]
BEGINNINGS = ["冬天里的一天，", "傍晚，小丽", "山羊有", "三加五等于"]


class ToolChat(page.Chat):
    """A chat whose model may call tools.

    An answer in the history has `steps` too, the messages before what it said last, and `call`,
    what it has written of the next one.
    """

    def __init__(self, registry: Registry, chat_model, controls):
        """controls: as of page.Chat, and "tools", whether the model may call them."""
        super().__init__(chat_model, controls)
        self.registry = registry

    def grow(self, answered: dict, turns: list[dict], stop: threading.Event, options: dict):
        registry = self.registry if options.pop("tools") else None
        last = Part("assistant")
        count = 0
        for parts, count in with_tools(self.chat_model, turns, registry, stop, **options):
            *before, last = parts
            if last.role == "tool":
                before = parts
                last = Part("assistant")
            answered["steps"] = [part.message for part in before]
            answered |= texts_of(last.text, hides_call=registry is not None)
            yield count
        answered |= texts_of(last.text, hides_call=False)  # one that was not run stays as it is
        yield count

    def show(self, history: list[dict]) -> list[gr.ChatMessage]:
        shown = []
        for row in history:
            shown += bubbles_of(row.get("steps", []))
            shown += page.show([row])
            if row.get("call"):
                shown.append(call_bubble("调用工具…", row["call"]))
        return shown

    def turns_of(self, history: list[dict], system: str) -> list[dict]:
        turns = page.turns_of([], system)
        for row in history:
            turns += [*row.get("steps", []), *page.turns_of([row], "")]
        return turns


def texts_of(text: str, hides_call: bool) -> dict:
    """What a row of the history holds of a text of the model."""
    thought, content, done = split_thought(text)
    call = ""
    if hides_call:
        content, _, call = content.partition(OPENED)
    texts = {"reasoning_content": thought, "content": content.strip(), "call": call.strip()}
    return texts | {"thought_done": done}


def bubbles_of(steps: list[dict]) -> list[gr.ChatMessage]:
    """Messages of an answer before its last: what was said, and each call folded with its
    result."""
    shown = []
    made: list[dict] = []  # calls whose results follow
    for message in steps:
        if message["role"] == "tool":
            call = made.pop(0) if made else {"name": "工具", "arguments": ""}
            shown.append(call_bubble(call["name"], call["arguments"], message["content"]))
            continue
        thought = message["reasoning_content"]
        if thought or message["content"]:
            shown += page.answer_bubbles(thought, True, message["content"], "")
        made = [call["function"] for call in message.get("tool_calls", [])]
    return shown


def call_bubble(name: str, arguments: dict | str, result: str = "") -> gr.ChatMessage:
    """A fold; without a result one that is still going on."""
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    text = page.escape_markdown(arguments)
    if result:
        text += f"\n\n= {page.escape_markdown(result)}"
    fold = {"title": name, "status": "done" if result else "pending"}
    return gr.ChatMessage(text, "assistant", fold)


def build_demo(
    model: str | Path | MiniMindChatModel | ServedModel | None = None,
    registry: Registry | None = None,
) -> gr.Blocks:
    """The chat page for a run, model or adapter folder (default: the newest run), or for a server's
    model; SystemExit when there is no model. registry: tools, by default the built-in ones."""
    chat_model = model
    if not isinstance(model, (MiniMindChatModel, ServedModel)):
        chat_model = MiniMindChatModel(model or newest())
    can_think = chat_model.chats and chat_model.can_think
    registry = registry or registry_of([])
    thinking = gr.Checkbox(False, label="先思考再回答", visible=can_think, render=False)
    tools = gr.Checkbox(
        False,
        label="用工具",
        info=" ".join(registry.tools),
        visible=chat_model.takes_tools,
        render=False,
    )
    return page.chat_demo(
        chat_model,
        title=HERE.name,
        examples=EXAMPLES if chat_model.chats else BEGINNINGS,
        switches={"thinking": thinking, "tools": tools},
        make=partial(ToolChat, registry),
    )


def main() -> None:
    parser = page.arguments(__doc__, "")
    parser.add_argument("--base_url", help="ask a server; its key: DANPU_API_KEY")
    own = "beside the built-in tools: python (the sandbox), files of yours"
    parser.add_argument("--tools", nargs="+", default=[], help=own)
    args = parser.parse_args()
    registry = registry_of(args.tools)
    if args.base_url:
        model = ServedModel(args.base_url, args.model)
        args.model = f"{model.name} of {args.base_url}"
    else:
        model = args.model = args.model or newest()
    page.stay(build_demo(model, registry), args)


if __name__ == "__main__":
    main()
