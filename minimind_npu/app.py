"""Gradio chat with a trained model: a run's output folder, a model folder or a LoRA adapter.

    python minimind_npu/app.py                              # the newest run that answers
    python minimind_npu/app.py --model output/minimind_npu/reason --port 7860 --host 127.0.0.1
    MODEL=my_model python minimind_npu/app.py
    python minimind_npu/app.py --base_url http://127.0.0.1:8998/v1     # a server's; --model ID

The prompt is built by the code that built the training rows (common/data/labels.py), so training
and talking cannot differ. A pre-trained model continues the text instead.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common.demo import page  # noqa: I001  (with common.device, which comes before torch)

import gradio as gr

from engine.generation import MiniMindChatModel, newest
from server.client import ServedModel

EXAMPLES = ["你是谁？", "七加五等于几？", "西班牙的首都是哪里？", "想一想再回答：6加2再减5等于几？"]
BEGINNINGS = ["冬天里的一天，", "傍晚，小丽", "山羊有", "三加五等于"]


def build_demo(model: str | Path | MiniMindChatModel | ServedModel | None = None) -> gr.Blocks:
    """The chat page for a run, model or adapter folder (default: the newest run), or for a server's
    model; SystemExit when there is no model."""
    chat_model = model
    if not isinstance(model, (MiniMindChatModel, ServedModel)):
        chat_model = MiniMindChatModel(model or newest())
    can_think = chat_model.chats and chat_model.can_think
    thinking = gr.Checkbox(False, label="先思考再回答", visible=can_think, render=False)
    return page.chat_demo(
        chat_model,
        title=HERE.name,
        examples=EXAMPLES if chat_model.chats else BEGINNINGS,
        switches={"thinking": thinking},
    )


def main() -> None:
    parser = page.arguments(__doc__, "")
    parser.add_argument("--base_url", help="ask a server; its key: DANPU_API_KEY")
    args = parser.parse_args()
    if args.base_url:
        model = ServedModel(args.base_url, args.model)
        args.model = f"{model.name} of {args.base_url}"
    else:
        model = args.model = args.model or newest()
    page.stay(build_demo(model), args)


if __name__ == "__main__":
    main()
