"""Text metrics that need no hub, as `evaluate` modules."""

from __future__ import annotations

import tempfile

import datasets
import evaluate


def longest_common_subsequence(a: str, b: str) -> int:
    """Length in characters; O(len(a) * len(b))."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


class AnswerMatch(evaluate.Metric):
    """exact_match: share of answers equal to the reference after stripping; rouge_l: mean F1 of the
    longest common subsequence over characters (Lin 2004), the usual choice for Chinese, which has
    no spaces."""

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions, references):
        exact, rouge = 0, 0.0
        for answer, reference in zip(predictions, references, strict=True):
            answer, reference = answer.strip(), reference.strip()
            exact += answer == reference
            common = longest_common_subsequence(answer, reference)
            rouge += 2 * common / (len(answer) + len(reference)) if common else 0.0
        n = max(1, len(predictions))
        return {"exact_match": exact / n, "rouge_l": rouge / n}


def answer_match(predictions: list[str], references: list[str]) -> dict[str, float]:
    """{"exact_match", "rouge_l"} in [0, 1] over aligned lists."""
    with tempfile.TemporaryDirectory() as cache:
        metric = AnswerMatch(keep_in_memory=True, cache_dir=cache)
        return metric.compute(predictions=predictions, references=references)
