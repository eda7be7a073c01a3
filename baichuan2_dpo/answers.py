"""What the model answers to held-out prompts, compared with the two answers that are known."""

import json

from pairs import with_system

from common.data.labels import encode_prompt
from common.runs.generate import answer_eval_rows
from common.runs.metrics import longest_common_subsequence


def measure_answers(
    model, tokenizer, rows: list[str], system: str, max_new_tokens: int
) -> tuple[dict, list[dict]]:
    """Greedy answers to canonical preference rows (JSON). Every rank calls it.

    Returns:
        {"exact_match", "rouge_l" (to the chosen answer), "like_chosen" (share closer to it than to
        the rejected one)} and the samples of common.runs.generate.answer_eval_rows, with the
        rejected answer.
    """
    pairs = [
        row for row in map(json.loads, rows) if len(row["chosen"]) == len(row["rejected"]) == 1
    ]  # no tool calls
    chats = [
        json.dumps({**row, "messages": row["prompt"] + row["chosen"]}, ensure_ascii=False)
        for row in pairs
    ]

    def ask(messages, tools):
        return encode_prompt(tokenizer, with_system(messages, system), tools)

    metrics, samples = answer_eval_rows(model, tokenizer, chats, ask, max_new_tokens)
    closer = []
    for sample, row in zip(samples, pairs, strict=True):
        sample["rejected"] = row["rejected"][0]["content"]
        closer.append(
            similar(sample["answer"], sample["reference"])
            > similar(sample["answer"], sample["rejected"])
        )
    return metrics | ({"like_chosen": sum(closer) / len(closer)} if closer else {}), samples


def similar(a: str, b: str) -> float:
    """Share of characters in the longest common subsequence, 0 to 1."""
    return 2 * longest_common_subsequence(a, b) / max(1, len(a) + len(b))
