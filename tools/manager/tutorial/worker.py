"""Computes the tutorial's figures: a line of JSON in, a line of JSON out, until its input ends.

    {"name": "tokens", "fields": {"weights": "tiny", "text": "你好"}}  ->  {"figure": {…}}
    what cannot be computed                   ->  {"status": 400, "problem": "…", "param": null}

Started by client.py. Models are small ones on the CPU; the two newest stay loaded.
"""

import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
RECIPE = PROJECT / "minimind_npu"
sys.path[:0] = [str(PROJECT), str(RECIPE)]
from common import cli, device  # noqa: F401, I001  (device before torch and transformers)

import functools
import json

import torch
from model import MiniMindForCausalLM, build
from transformers import AutoTokenizer

from common.demo.chat_model import ChatModel
from tools.manager.tutorial.figures import FIGURES
from tools.manager.tutorial.lesson import Lesson, Misfit, watched

LARGEST = (
    2 << 30
)  # bytes of weights: a figure is no reason to fill the memory of a training machine
KEPT = 2  # models


def say(line: dict) -> None:
    OUT.write(json.dumps(line) + "\n")
    OUT.flush()


@functools.lru_cache(maxsize=KEPT)
def lesson_of(weights: str, size: str = "tiny") -> Lesson:
    """weights: a folder, or "tiny" for random weights of `size`. Misfit where they are too large or
    cannot be loaded."""
    say({"loading": weights})
    if weights == "tiny":
        tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(size, len(tokenizer)).eval()
        return Lesson(tokenizer, watched(model), isinstance(model, MiniMindForCausalLM))
    files = Path(weights).rglob("*.safetensors")
    total = sum(file.stat().st_size for file in files if not file.is_symlink())
    if total > LARGEST:
        raise Misfit(f"figures are for weights of up to {LARGEST >> 30} GiB", "weights", 413)
    try:
        chat_model = ChatModel(weights, pretraining_stage="pretrain")
    except SystemExit as error:
        raise Misfit(str(error), "weights") from None
    model = chat_model.model
    if chat_model.adapter:
        model = model.merge_and_unload()
    return Lesson(chat_model.tokenizer, watched(model), isinstance(model, MiniMindForCausalLM))


def answer(line: str) -> dict:
    asked = json.loads(line)
    fields = asked["fields"]
    try:
        lesson = lesson_of(fields.pop("weights"))
        if asked["name"] == "experts" and not lesson.has_experts:
            lesson = lesson_of("tiny", "tiny-moe")
        with torch.inference_mode():
            return {"figure": FIGURES[asked["name"]](lesson, **fields)}
    except Misfit as misfit:
        return {"status": misfit.status, "problem": str(misfit), "param": misfit.param}


def main() -> None:
    os.nice(5)  # training comes first
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    cli.quiet_libraries()
    for line in sys.stdin:
        say(answer(line))


if __name__ == "__main__":
    # what libraries print is no answer
    OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main()
