"""How good answers and captions are, offline. Chinese has no spaces between words, so all n-grams
are over characters: numbers of papers that segment words first are others.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from common.runs.metrics import longest_common_subsequence

ORDERS = 4  # n-grams of 1 to 4 characters
SIGMA = 6.0  # CIDEr-D's: how much a difference in length costs
BETA = 1.2  # ROUGE-L's of captions: recall counts more than precision
WHOLE = re.compile(  # of references: names too begin with these words
    r"(不|没)?(是|对|有|能|可以|会|在|行|存在)(的|了|啊)?|不|没|否|正确|不正确|没错|错(的|了|误)?"
    r"|yes|no|true|false"
)
# of answers, asked in this order: what begins like a yes or a no may be neither, or the other
ASKS = re.compile(r"([^不没])[不没]\1|是否|有无|可不可以")
DOUBTS = re.compile(
    r"不(能|太|大)?(知道|清楚|确定|一定|肯定|好说|判断)|(无|没)法|没有?办法|难以"
    r"|not sure\b|unsure\b"
)
RIGHT = re.compile(r"没有?(错|问题)|不错|无误")
NO = re.compile(
    r"(不(?!锈|倒翁)|没|否|无(?!人机)|未(?!来)|非(?!常|洲)|并非|错|no\b|nope\b|not\b|false\b)"
)
YES = re.compile(
    r"(是|有|在|可以|正确|存在|对(?![勾面方于比话])|会(?![议员计场])|能(?![量源力])|行(?![人李星])"
    r"|yes\b|yeah\b|yep\b|true\b)"
)


# ---- answers -------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """NFKC, lower case, blanks joined, without a mark of punctuation at the end."""
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return text.rstrip("。.!?;,、 ")


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that are the reference, both normalised; 0 of none."""
    pairs = zip(answers, references, strict=True)
    right = sum(normalised(answer) == normalised(reference) for answer, reference in pairs)
    return right / max(1, len(answers))


def yes_or_no(text: str) -> bool | None:
    """What an answer begins with; None where that is neither."""
    text = normalised(text)
    if ASKS.match(text) or DOUBTS.match(text):
        return None
    if RIGHT.match(text):
        return True
    if NO.match(text):
        return False
    return True if YES.match(text) else None


def is_yes_or_no(text: str) -> bool:
    """Whether a reference is such an answer and nothing that only begins like one."""
    return WHOLE.fullmatch(normalised(text)) is not None


def yes_no(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Over the references that are yes or no (POPE's figures, Li et al. 2023): {"questions",
    "accuracy", "precision", "recall", "f1", "said_yes" (share)}, {} where there is none. An answer
    that is neither is wrong."""
    asked = [
        (yes_or_no(answer), yes_or_no(reference))
        for answer, reference in zip(answers, references, strict=True)
        if is_yes_or_no(reference)
    ]
    if not asked:
        return {}
    said_yes = sum(answer is True for answer, _ in asked)
    are_yes = sum(wanted is True for _, wanted in asked)
    both = sum(answer is True and wanted is True for answer, wanted in asked)
    precision = both / max(1, said_yes)
    recall = both / max(1, are_yes)
    return {
        "questions": len(asked),
        "accuracy": sum(answer is wanted for answer, wanted in asked) / len(asked),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "said_yes": said_yes / len(asked),
    }


# ---- captions ------------------------------------------------------------------------------------


def characters(text: str) -> str:
    """What n-grams are made of: letters, numbers and symbols, no blanks and no punctuation."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in text if unicodedata.category(c)[0] not in "PZC")


def ngrams(text: str, n: int) -> Counter:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F of the longest common subsequence (Lin 2004) with BETA; of several references the best
    precision and the best recall, as COCO's evaluation has it."""
    total = 0.0
    for caption, wanted in zip(captions, references, strict=True):
        said = characters(caption)
        common = [
            (longest_common_subsequence(said, reference), len(reference))
            for reference in map(characters, wanted)
        ]
        precision = max(length / max(1, len(said)) for length, _ in common)
        recall = max(length / max(1, of) for length, of in common)
        if precision and recall:
            total += (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return total / max(1, len(captions))


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to -4 of the corpus (Papineni et al. 2002), the reference of the nearest length."""
    matched = [0] * ORDERS
    said = [0] * ORDERS
    length = wanted_length = 0
    for caption, wanted in zip(captions, references, strict=True):
        caption = characters(caption)
        wanted = [characters(reference) for reference in wanted]
        length += len(caption)
        nearest = min(wanted, key=lambda one: (abs(len(one) - len(caption)), len(one)))
        wanted_length += len(nearest)
        for n in range(1, ORDERS + 1):
            most = Counter()
            for reference in wanted:
                most |= ngrams(reference, n)
            found = ngrams(caption, n)
            matched[n - 1] += (found & most).total()
            said[n - 1] += found.total()
    brevity = min(1.0, math.exp(1 - wanted_length / length)) if length else 0.0
    scores = []
    logs = 0.0
    for n in range(ORDERS):
        logs += math.log(matched[n] / said[n]) if matched[n] else -math.inf
        scores.append(brevity * math.exp(logs / (n + 1)))
    return scores


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015, section 5), times 10 as usual: the tf-idf cosine of n-grams,
    clipped to the reference's, with a penalty for other lengths. How rare an n-gram is, is counted
    over the references of this very set, so only figures on one set can be compared."""
    of_picture = [[_counts(reference) for reference in wanted] for wanted in references]
    documents: Counter = Counter()
    for counted in of_picture:
        documents.update({ngram for counts in counted for ngram in counts})
    log_pictures = math.log(max(1, len(references)))

    def vector(counts: Counter) -> dict[str, float]:
        return {
            ngram: count * (log_pictures - math.log(max(1, documents[ngram])))
            for ngram, count in counts.items()
        }

    total = 0.0
    for caption, counted in zip(captions, of_picture, strict=True):
        said = _counts(caption)
        scores = [
            _similarity(vector(said), vector(counts), _bigrams(said) - _bigrams(counts))
            for counts in counted
        ]
        total += 10 * sum(scores) / len(scores)
    return total / max(1, len(captions))


def _counts(text: str) -> Counter:
    """All n-grams of a text."""
    text = characters(text)
    found = Counter()
    for n in range(1, ORDERS + 1):
        found += ngrams(text, n)
    return found


def _bigrams(counts: Counter) -> int:
    """The length of a text, as COCO's implementation measures it."""
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(said: dict, wanted: dict, longer: int) -> float:
    """Mean over the orders, with the penalty for the difference in length."""
    total = 0.0
    for n in range(1, ORDERS + 1):
        one = {ngram: weight for ngram, weight in said.items() if len(ngram) == n}
        other = {ngram: weight for ngram, weight in wanted.items() if len(ngram) == n}
        product = sum(
            min(weight, other[ngram]) * other[ngram]
            for ngram, weight in one.items()
            if ngram in other
        )
        norms = math.sqrt(sum(w * w for w in one.values()) * sum(w * w for w in other.values()))
        total += product / norms if norms else product
    return total / ORDERS * math.exp(-(longer**2) / (2 * SIGMA**2))


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict:
    """{"captions", "rouge_l", "bleu_1".."bleu_4", "cider_d"}: shares, but for CIDEr-D, where 10 is
    a caption that is all of its references."""
    scores = {"captions": len(captions), "rouge_l": rouge_l(captions, references)}
    scores |= {f"bleu_{n}": value for n, value in enumerate(bleu(captions, references), 1)}
    return scores | {"cider_d": cider_d(captions, references)}


# ---- multiple choice -----------------------------------------------------------------------------


def choice_scores(asked: Sequence[dict]) -> dict:
    """asked: {"group", "category", "right": bool} of every question in every order of its options.

    {"questions", "accuracy" (the first order of each), "circular" (right in all orders: MMBench's
    CircularEval, Liu et al. 2023), "by_category": {name: the same of it}}.
    """
    groups: dict = {}
    for one in asked:
        groups.setdefault(one["group"], []).append(one)
    first = [rounds[0]["right"] for rounds in groups.values()]
    every = [all(one["right"] for one in rounds) for rounds in groups.values()]
    categories: dict[str, list[bool]] = {}
    for rounds, right in zip(groups.values(), every, strict=True):
        categories.setdefault(rounds[0]["category"], []).append(right)
    count = max(1, len(groups))
    return {
        "questions": len(groups),
        "accuracy": sum(first) / count,
        "circular": sum(every) / count,
        "by_category": {name: sum(of) / len(of) for name, of in sorted(categories.items()) if name},
    }
