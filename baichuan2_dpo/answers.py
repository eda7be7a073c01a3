"""What the model answers to held-out prompts, compared with the two answers that are known."""

import json

from pairs import with_system

from common.data.labels import encode_prompt
from common.runs.generate import answer_eval_rows, expected_answer
from common.runs.metrics import longest_common_subsequence


def measure_answers(
    model, tokenizer, rows: list[str], system: str, max_new_tokens: int
) -> tuple[dict, list[dict]]:
    """Greedy answers to canonical preference rows (JSON). Every rank calls it.

    Returns:
        {"exact_match", "rouge_l" (to the chosen answer), "like_chosen" (share closer to it than to
        the rejected one)} and the samples of common.runs.generate.answer_eval_rows, with the
        rejected answer. Both are empty without rows.
    """
    pairs = [pair for pair in map(json.loads, rows) if is_one_message(pair)]
    chats = [{**pair, "messages": pair["prompt"] + pair["chosen"]} for pair in pairs]

    def encode(messages, tools):
        return encode_prompt(tokenizer, with_system(messages, system), tools)

    metrics, samples = answer_eval_rows(
        model, tokenizer, list(map(json.dumps, chats)), encode, max_new_tokens
    )
    if not samples:
        return metrics, samples
    like_chosen = 0
    for sample, pair in zip(samples, pairs, strict=True):
        chat = {**pair, "messages": pair["prompt"] + pair["rejected"]}
        sample["rejected"] = expected_answer(tokenizer, chat)
        to_chosen = similarity(sample["answer"], sample["reference"])
        like_chosen += to_chosen > similarity(sample["answer"], sample["rejected"])
    return metrics | {"like_chosen": like_chosen / len(samples)}, samples


def is_one_message(pair: dict) -> bool:
    """Whether both answers are one message each: no tool calls with their results."""
    return len(pair["chosen"]) == len(pair["rejected"]) == 1


def similarity(a: str, b: str) -> float:
    """Share of characters in the longest common subsequence, 0 to 1."""
    return 2 * longest_common_subsequence(a, b) / max(1, len(a) + len(b))
