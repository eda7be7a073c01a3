"""Gradio page for a trained model: a run's output folder, a model folder, a LoRA adapter or a hub
id.

    python chinese_bloom/app.py                             # what `bash chinese_bloom/train_zero2.sh` left in output/
    python chinese_bloom/app.py --model output/chinese_bloom_pt                       # goes on with what you type
    python chinese_bloom/app.py --model output/chinese_bloom/final --port 7860 --host 127.0.0.1
    MODEL=bigscience/bloomz-560m python chinese_bloom/app.py

The prompt is built from the chat template saved with the model, by the code that built the training
rows (common/data/labels.py), so training and talking cannot differ. A run of --stage pt, and a
model without a chat template, go on with the text instead.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for common/
from common import device  # noqa: I001  (device before torch and transformers)
from common.demo import page
from common.demo.page import IDLE, MAX_CHARS, MAX_WAITING, SAMPLING, launch
from common.demo.chat_model import ChatModel

import gradio as gr

DEFAULT = HERE.parent / "output" / HERE.name
EXAMPLES = [
    "你是谁？",
    "七乘八得多少？",
    "四川的省会是哪里？",
    "判断评论的态度。\n手机很好，下次还来。",
]
BEGINNINGS = ["小狐狸丢了", "土豆炒白菜的做法：", "小店今天卖出", "青石镇"]


class Speaker(ChatModel):
    """A ChatModel that goes on with the last text where the model was pre-trained (--stage pt) or has
    no chat template."""

    @property
    def chats(self) -> bool:
        return self.tokenizer.chat_template is not None and self.settings.get("stage") != "pt"

    def prompt(self, messages: list[dict], room: int, thinking: bool = True) -> list[int]:
        if self.chats:
            return super().prompt(messages, room, thinking)
        ids = self.tokenizer(messages[-1]["content"], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids[-(self.window - room) :]

    def what(self) -> str:
        """How the model is asked, for the line under the title."""
        template = self.settings.get("template")
        return "续写" if not self.chats else f"模板 {Path(template).name}" if template else "对话"


def build_demo(model: str | Path | Speaker = DEFAULT) -> gr.Blocks:
    """The page for a run, model or adapter folder; SystemExit with one line when there is no
    model."""
    chat_model = model if isinstance(model, Speaker) else Speaker(model)
    chat = page.Chat(chat_model, ("use_adapter", "max_new_tokens", *SAMPLING))
    kind = " · LoRA" * chat_model.adapter + f" · {chat_model.what()}"
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


def settings(chat_model: Speaker) -> list[gr.components.Component]:
    """The controls under the chat, in the order of Chat.ask; their defaults are those of the run
    and of the model."""
    switch = gr.Checkbox(True, label="用微调后的权重", visible=chat_model.adapter)
    with gr.Accordion("设置", open=False):
        prompt = chat_model.settings.get("system_prompt", "")
        system = gr.Textbox(
            prompt,
            label="系统提示词",
            info="在 alpaca 模板里代替开场白",
            lines=2,
            max_length=MAX_CHARS,
            visible=chat_model.chats,
        )
        with gr.Row():
            numbers = [
                page.length(chat_model.window),
                *page.sampling(page.own_sampling(chat_model)),
            ]
    return [system, switch, *numbers]


def main() -> None:
    args = page.arguments(__doc__, DEFAULT).parse_args()
    page.stay(build_demo(args.model), args, launch)


if __name__ == "__main__":
    main()
