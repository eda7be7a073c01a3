"""Gradio chat with a trained model: a run's output folder, a model folder, a LoRA adapter or a hub
id.

    python train_qwen/app.py                                # what `bash train_qwen/train_zero2.sh` left in output/
    python train_qwen/app.py --model output/train_qwen/final --port 7860 --host 127.0.0.1
    MODEL=Qwen/Qwen3-8B python train_qwen/app.py

The prompt is built by the code that built the training rows (common/data/labels.py), so training
and talking cannot differ.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for common/
from common import device  # noqa: I001  (device before torch and transformers)
from common.demo import page
from common.demo.page import (
    IDLE,
    MAX_CHARS,
    MAX_WAITING,
    SAMPLING,
    launch,
)
from common.demo.chat_model import ChatModel

import gradio as gr

DEFAULT = HERE.parent / "output" / HERE.name
EXAMPLES = ["你是谁？", "3加5等于几？", "2加3再加4，一共是多少？", "把3千米换算成米。"]


def build_demo(model: str | Path | ChatModel = DEFAULT) -> gr.Blocks:
    """The chat page for a run, model or adapter folder; SystemExit with one line when there is no
    model."""
    chat_model = model if isinstance(model, ChatModel) else ChatModel(model)
    chat = page.Chat(chat_model, ("use_adapter", "thinking", "max_new_tokens", *SAMPLING))
    adapter = " · LoRA" * chat_model.adapter
    about = f"{chat_model.name}{adapter} · {page.size(chat_model.model)} 参数 · {device.name()} · {chat_model.model.dtype}"
    with gr.Blocks(title=f"{HERE.name} · 聊天", analytics_enabled=False, fill_height=True) as demo:
        gr.Markdown(f"### {HERE.name}\n{about.replace('torch.', '')}", elem_id="about")
        chatbot = gr.Chatbot(
            show_label=False,
            scale=1,
            min_height=320,
            buttons=["copy"],
            allow_tags=False,
            placeholder="问点什么，或选一个例子",
            examples=[{"text": text} for text in EXAMPLES],
        )
        box = gr.Textbox(
            label="问题",
            show_label=False,
            placeholder="输入问题，回车发送",
            max_lines=8,
            max_length=MAX_CHARS,
            **IDLE,
        )
        chat.connect(chatbot, box, settings(chat_model))
        demo.unload(chat.halt)
    return demo.queue(max_size=MAX_WAITING)


def settings(chat_model: ChatModel) -> list[gr.components.Component]:
    """The controls under the chat, in the order of Chat.ask; their defaults are those of the run
    and of the model."""
    may_think = chat_model.settings.get("enable_thinking") is not False
    with gr.Row():
        switches = [
            gr.Checkbox(True, label="用微调后的权重", visible=chat_model.adapter),
            gr.Checkbox(may_think, label="允许思考", visible=chat_model.can_think),
        ]
    with gr.Accordion("设置", open=False):
        prompt = chat_model.settings.get("system_prompt", "")
        system = gr.Textbox(prompt, label="系统提示词", lines=2, max_length=MAX_CHARS)
        with gr.Row():
            numbers = [
                page.length(chat_model.window),
                *page.sampling(page.own_sampling(chat_model)),
            ]
    return [system, *switches, *numbers]


def main() -> None:
    args = page.arguments(__doc__, DEFAULT).parse_args()
    page.stay(build_demo(args.model), args, launch)


if __name__ == "__main__":
    main()
