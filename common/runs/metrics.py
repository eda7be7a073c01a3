"""Text metrics that need no hub."""

from __future__ import annotations

import json
import re


def longest_common_subsequence(a: str, b: str) -> int:
    """Length in characters; O(len(a) * len(b))."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(row[j], row[j - 1])
            diagonal = above
    return row[-1]


def answer_match(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Over aligned lists, both in [0, 1]:

    exact_match: share of answers equal to the reference after stripping
    rouge_l: mean F1 of the longest common subsequence over characters (Lin 2004), the usual choice
        for Chinese, which has no spaces
    """
    exact = 0
    rouge = 0.0
    for answer, reference in zip(predictions, references, strict=True):
        answer = answer.strip()
        reference = reference.strip()
        exact += answer == reference
        common = longest_common_subsequence(answer, reference)
        if common:
            rouge += 2 * common / (len(answer) + len(reference))
    count = max(1, len(predictions))
    return {"exact_match": exact / count, "rouge_l": rouge / count}


def with_plain_calls(text: str) -> str:
    """A text with the tool calls in it that are JSON ({"name", "arguments"}) in one spelling,
    whatever their blanks, their escapes and the order of their keys."""
    parts = []
    at = 0
    for brace in re.finditer(r"\{", text):
        if brace.start() < at:
            continue
        try:
            call, end = json.JSONDecoder().raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(call.get("name"), str) and "arguments" in call:
            if isinstance(call["arguments"], str):
                call["arguments"] = _parsed(call["arguments"])
            spelt = json.dumps(call, sort_keys=True, ensure_ascii=False)
            parts += [text[at : brace.start()].rstrip(), spelt]
            at = end + len(text[end:]) - len(text[end:].lstrip())
    return "".join(parts) + text[at:]


def _parsed(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
