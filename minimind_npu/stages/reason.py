"""Reasoning: fine-tuning on answers that think first, with more weight on the tags that frame
thought and answer.

Loss: sum of w * cross entropy over label tokens / the number of label tokens, w = `think_weight`
where the label is one of the tags, else 1. The tags are tokens of their own, so nothing else gets
that weight.
Rows: conversations whose answers read <think>...</think><answer>...</answer>, or have
reasoning_content.
"""

from __future__ import annotations

import re

import torch
from stages.pretrain import INPUTS, metrics  # noqa: F401
from stages.sft import COLUMNS, KIND, encode  # noqa: F401

from common.collators import IGNORE
from common.data.labels import encode_prompt
from common.fast import losses
from common.runs.generate import generate_answers
from common.runs.metrics import answer_match

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def tag_ids(tokenizer) -> list[int]:
    """Ids of the tags; SystemExit where one is no token of its own."""
    ids = [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in TAGS]
    for tag, found in zip(TAGS, ids, strict=True):
        if len(found) != 1:
            raise SystemExit(
                f"--stage reason: {tag} is {len(found)} tokens here; train_tokenizer.py makes it one"
            )
    return [found[0] for found in ids]


def loss(model, batch: dict, items: float, tags: torch.Tensor, think_weight: float):
    """-> (weighted loss of the batch as its part of a step with `items` label tokens, sums over
    this batch)."""
    labels = batch["labels"]
    log_probs, _, _ = losses.answer_logprobs(
        model, labels=labels, **{name: batch[name] for name in INPUTS}
    )
    targets = labels[labels != IGNORE]
    weights = torch.where(torch.isin(targets, tags.to(targets.device)), think_weight, 1.0)
    nll, count = -log_probs.detach().sum(), log_probs.new_tensor(float(len(targets)))
    return -(weights * log_probs).sum() / items, {
        "nll": nll,
        "correct": nll * float("nan"),
        "count": count,
    }


def parts(text: str) -> tuple[str, bool]:
    """An answer -> (what its <answer> holds, or what follows its thought; whether it keeps to the
    form)."""
    form = re.fullmatch(
        r"\s*<think>(.*?)</think>\s*(<answer>(.*?)</answer>|(?!<answer>).+?)\s*", text, re.S
    )
    found = re.findall(r"<answer>(.*?)(?:</answer>|$)", text, re.S)
    return (found[-1] if found else text.split("</think>")[-1]).strip(), bool(form)


def measure(model, tokenizer, rows: list[dict], max_new_tokens: int) -> tuple[dict, list[dict]]:
    """Greedy answers to held-out rows -> {"exact_match": of the final answers, "in_form"} and
    samples to look at."""
    prompts = [encode_prompt(tokenizer, row["messages"][:-1], row.get("tools")) for row in rows]
    raw = generate_answers(model, tokenizer, prompts, max_new_tokens)
    wanted = [parts(row["messages"][-1]["content"])[0] for row in rows]
    found = [parts(answer) for answer in raw]
    share = sum(kept for _, kept in found) / max(1, len(found))
    right = answer_match([text for text, _ in found], wanted)["exact_match"]
    samples = [
        {"prompt": row["messages"][-2]["content"], "reference": reference, "answer": answer}
        for row, reference, answer in zip(rows, wanted, raw, strict=True)
    ]
    return {"exact_match": right, "in_form": share}, samples
