"""Gradio page for a trained model: chat, or continue a text; a run, a model folder, an adapter or a
hub id.

    python chinese_bloom/app.py       # what `bash chinese_bloom/train_zero2.sh` left in output/
    python chinese_bloom/app.py --model output/chinese_bloom_pt       # continues what you type
    python chinese_bloom/app.py --model output/chinese_bloom/final --port 7860 --host 127.0.0.1
    MODEL=bigscience/bloomz-560m python chinese_bloom/app.py

The prompt is built from the chat template saved with the model, by the code that built the training
rows (common/data/labels.py), so training and talking cannot differ. A run of --stage pt, and a
model without a chat template, continue the text instead.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for common/
import gradio as gr

from common.demo import page
from common.demo.chat_model import ChatModel

DEFAULT = HERE.parent / "output" / HERE.name
EXAMPLES = [
    "你是谁？",
    "七乘八得多少？",
    "四川的省会是哪里？",
    "判断评论的态度。\n手机很好，下次还来。",
]
BEGINNINGS = ["小狐狸丢了", "土豆炒白菜的做法：", "小店今天卖出", "青石镇"]


def load(model: str | Path) -> ChatModel:
    """A run of --stage pt continues texts."""
    return ChatModel(model, pretraining_stage="pt")


def template_name(chat_model: ChatModel) -> str:
    """The --template of its run, for people."""
    template = chat_model.settings.get("template")
    return f"模板 {Path(template).name}" if template else "对话"


def build_demo(model: str | Path | ChatModel = DEFAULT) -> gr.Blocks:
    """The page for a run, model or adapter folder; SystemExit with one line when there is no
    model."""
    chat_model = model if isinstance(model, ChatModel) else load(model)
    return page.chat_demo(
        chat_model,
        title=HERE.name,
        examples=EXAMPLES if chat_model.chats else BEGINNINGS,
        facts=[template_name(chat_model)] if chat_model.chats else [],
        system_prompt=chat_model.settings.get("system_prompt", ""),
        system_info="在 alpaca 模板里代替开场白",
    )


def main() -> None:
    args = page.arguments(__doc__, DEFAULT).parse_args()
    page.stay(build_demo(args.model), args)


if __name__ == "__main__":
    main()
