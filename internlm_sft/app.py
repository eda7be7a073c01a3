"""Gradio chat with a fine-tuned model: a run's output folder, a model folder, a LoRA adapter or a
hub id. A switch asks the same question without the adapter.

    python internlm_sft/app.py        # what `bash internlm_sft/train_zero2.sh` left in output/
    python internlm_sft/app.py --model output/internlm_sft/final --port 7860 --host 127.0.0.1
    MODEL=models/internlm2 python internlm_sft/app.py

The prompt is built by the code that built the training rows (common/data/labels.py), so training
and talking cannot differ.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the module beside this file
import gradio as gr
import published  # noqa: F401  (a folder in InternLM's own layout is answered with its conversion)

from common.demo import page
from common.demo.chat_model import ChatModel

DEFAULT = HERE.parent / "output" / HERE.name
EXAMPLES = ["你是谁？", "Who made you?", "你是ChatGPT吗？", "李白是谁？", "推荐一只股票"]


def build_demo(model: str | Path | ChatModel = DEFAULT) -> gr.Blocks:
    """The chat page for a run, model or adapter folder; SystemExit with one line when there is no
    model."""
    chat_model = model if isinstance(model, ChatModel) else ChatModel(model)
    name = chat_model.settings.get("persona") or {}
    facts = [name["name"]] if isinstance(name, dict) and name.get("name") else []
    return page.chat_demo(chat_model, title=HERE.name, examples=EXAMPLES, facts=facts)


def main() -> None:
    args = page.arguments(__doc__, DEFAULT).parse_args()
    page.stay(build_demo(args.model), args)


if __name__ == "__main__":
    main()
