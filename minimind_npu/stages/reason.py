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

from common.data.labels import encode_prompt
from common.data.spelling import IGNORE
from common.fast import losses
from common.runs.generate import expected_answer, generate_answers
from common.runs.metrics import answer_match

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
IN_FORM = re.compile(r"\s*<think>.*?</think>\s*(<answer>.*?</answer>|(?!<answer>).+?)\s*", re.S)
FINAL = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.S)


def tag_ids(tokenizer) -> list[int]:
    """Ids of the tags; SystemExit where one is no token of its own."""
    found = []
    for tag in TAGS:
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise SystemExit(
                f"--stage reason: {tag} is {len(ids)} tokens here; train_tokenizer.py makes it one"
            )
        found.append(ids[0])
    return found


def loss(model, batch: dict, denominator: float, tags: torch.Tensor, think_weight: float):
    """-> (this batch's share of the weighted loss of a step with `denominator` label tokens, sums
    over this batch).

    tags: token ids of TAGS, [4].
    """
    labels = batch["labels"]
    inputs = {name: batch[name] for name in INPUTS}
    log_probs, _, _ = losses.answer_logprobs(model, labels=labels, **inputs)
    targets = labels[labels != IGNORE]
    weights = torch.where(torch.isin(targets, tags.to(targets.device)), think_weight, 1.0)
    count = log_probs.new_tensor(float(len(targets)))
    sums = {"nll": -log_probs.detach().sum(), "count": count}
    return -(weights * log_probs).sum() / denominator, sums


def split_answer(text: str) -> tuple[str, bool]:
    """An answer -> (what its <answer> holds, or what follows its thought; whether it keeps to the
    form)."""
    in_form = IN_FORM.fullmatch(text) is not None
    finals = FINAL.findall(text)
    final = finals[-1] if finals else text.split("</think>")[-1]
    return final.strip(), in_form


def measure(model, tokenizer, rows: list[dict], max_new_tokens: int) -> tuple[dict, list[dict]]:
    """Greedy answers to held-out rows -> {"exact_match": of the final answers, "in_form"} and
    samples to look at."""
    prompts = [encode_prompt(tokenizer, row["messages"][:-1], row.get("tools")) for row in rows]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens)
    found = [split_answer(answer) for answer in answers]
    samples = []
    for row, answer in zip(rows, answers, strict=True):
        reference, _ = split_answer(expected_answer(tokenizer, row))
        question = row["messages"][-2]["content"]
        samples.append({"prompt": question, "reference": reference, "answer": answer})
    references = [sample["reference"] for sample in samples]
    right = answer_match([final for final, _ in found], references)["exact_match"]
    in_form = sum(kept for _, kept in found) / max(1, len(found))
    return {"exact_match": right, "in_form": in_form}, samples
