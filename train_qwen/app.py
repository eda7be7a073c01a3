"""Gradio chat with a trained model: a run's output folder, a model folder, a LoRA adapter or a hub
id.

    python train_qwen/app.py          # what `bash train_qwen/train_zero2.sh` left in output/
    python train_qwen/app.py --model output/train_qwen/final --port 7860 --host 127.0.0.1
    MODEL=Qwen/Qwen3-8B python train_qwen/app.py

The prompt is built by the code that built the training rows (common/data/labels.py), so training
and talking cannot differ.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for common/
import gradio as gr

from common.demo import page
from common.demo.chat_model import ChatModel

DEFAULT = HERE.parent / "output" / HERE.name
EXAMPLES = ["你是谁？", "3加5等于几？", "2加3再加4，一共是多少？", "把3千米换算成米。"]


def build_demo(model: str | Path | ChatModel = DEFAULT) -> gr.Blocks:
    """The chat page for a run, model or adapter folder; SystemExit with one line when there is no
    model."""
    chat_model = model if isinstance(model, ChatModel) else ChatModel(model)
    trained_to_think = chat_model.settings.get("enable_thinking") is not False
    thinking = gr.Checkbox(
        trained_to_think, label="允许思考", visible=chat_model.can_think, render=False
    )
    return page.chat_demo(
        chat_model,
        title=HERE.name,
        examples=EXAMPLES,
        switches={"thinking": thinking},
        system_prompt=chat_model.settings.get("system_prompt", ""),
    )


def main() -> None:
    args = page.arguments(__doc__, DEFAULT).parse_args()
    page.stay(build_demo(args.model), args)


if __name__ == "__main__":
    main()
