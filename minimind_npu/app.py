"""Gradio chat with a trained model: a run's output folder, a model folder or a LoRA adapter.

    python minimind_npu/app.py                              # the newest run that answers
    python minimind_npu/app.py --model output/minimind_npu/reason --port 7860 --host 127.0.0.1
    MODEL=my_model python minimind_npu/app.py

The prompt is built by the code that built the training rows (common/data/labels.py), so training
and talking cannot differ. A pre-trained model goes on with the text instead.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import device  # noqa: I001  (device before torch and transformers)
from common.demo import page
from common.demo.page import IDLE, MAX_CHARS, MAX_WAITING, SAMPLING, launch

import gradio as gr
from engine.generation import MiniMindChatModel, newest

EXAMPLES = ["你是谁？", "七加五等于几？", "西班牙的首都是哪里？", "想一想再回答：6加2再减5等于几？"]
BEGINNINGS = ["冬天里的一天，", "傍晚，小丽", "山羊有", "三加五等于"]


def build_demo(model: str | Path | MiniMindChatModel | None = None) -> gr.Blocks:
    """The chat page for a run, model or adapter folder (default: the newest run); SystemExit when
    there is no model."""
    chat_model = (
        model if isinstance(model, MiniMindChatModel) else MiniMindChatModel(model or newest())
    )
    chat = page.Chat(chat_model, ("use_adapter", "thinking", "max_new_tokens", *SAMPLING))
    kind = " · LoRA" * chat_model.adapter + " · 续写" * (not chat_model.chats)
    about = f"{chat_model.name}{kind} · {page.size(chat_model.model)} 参数 · {device.name()} · {chat_model.model.dtype}"
    hint, examples = (
        ("问点什么", EXAMPLES) if chat_model.chats else ("写个开头，模型接着写", BEGINNINGS)
    )
    title = f"{HERE.name} · {'聊天' if chat_model.chats else '续写'}"
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as demo:
        gr.Markdown(f"### {HERE.name}\n{about.replace('torch.', '')}", elem_id="about")
        chatbot = gr.Chatbot(
            show_label=False,
            scale=1,
            min_height=320,
            buttons=["copy"],
            allow_tags=False,
            placeholder=f"{hint}，或选一个例子",
            examples=[{"text": text} for text in examples],
        )
        box = gr.Textbox(
            label="问题",
            show_label=False,
            placeholder=f"{hint}，回车发送",
            max_lines=8,
            max_length=MAX_CHARS,
            **IDLE,
        )
        chat.connect(chatbot, box, settings(chat_model))
        demo.unload(chat.halt)
    return demo.queue(max_size=MAX_WAITING)


def settings(chat_model: MiniMindChatModel) -> list[gr.components.Component]:
    """The controls under the chat, in the order of Chat.ask; their defaults are those of the
    model."""
    with gr.Row():
        switches = [
            gr.Checkbox(True, label="用微调后的权重", visible=chat_model.adapter),
            gr.Checkbox(
                False, label="先思考再回答", visible=chat_model.chats and chat_model.can_think
            ),
        ]
    with gr.Accordion("设置", open=False):
        system = gr.Textbox(
            "", label="系统提示词", lines=2, max_length=MAX_CHARS, visible=chat_model.chats
        )
        with gr.Row():
            numbers = [
                page.length(chat_model.window),
                *page.sampling(page.own_sampling(chat_model)),
            ]
    return [system, *switches, *numbers]


def main() -> None:
    args = page.arguments(__doc__, "").parse_args()
    args.model = args.model or newest()
    page.stay(build_demo(args.model), args, launch)


if __name__ == "__main__":
    main()
