"""Recall@K and zero-shot accuracy from embeddings, in blocks: no N x M matrix is ever built.

Shapes: N queries, M candidates, E width, C classes. Vectors are normalised; a score is their dot
product. Equal scores count against us: a model that gives all pictures one vector finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

KS = (1, 5, 10)
NEVER = 1 << 40  # the place of what is not there at all, beyond any K
TIE = 1e-6  # scores closer than this are equal; float32 rounds normalised vectors' to about 1e-7
QUERY_BLOCK = 1024
CANDIDATE_BLOCK = 8192
TEMPLATES = (  # our own, for classes whose name is a noun
    "{}",
    "一张{}的图片",
    "一张{}的照片",
    "{}的照片",
    "照片里有{}",
    "图中是{}",
    "这是{}",
    "{}的特写",
    "{}的近景",
    "{}的远景",
    "一张清晰的{}照片",
    "一张模糊的{}照片",
    "一张明亮的{}照片",
    "一张昏暗的{}照片",
    "一张{}的黑白照片",
    "一张裁剪过的{}照片",
    "一幅{}的画",
    "{}的插图",
    "{}的卡通画",
    "{}的素描",
    "一张低分辨率的{}图片",
    "一张好看的{}图片",
    "很大的{}",
    "很小的{}",
)


# ---- retrieval -----------------------------------------------------------------------------------


def ranks(queries: torch.Tensor, candidates: torch.Tensor, relevant: Sequence) -> torch.Tensor:
    """Place, from 1, of each query's best relevant candidate among the candidates that are not
    relevant; NEVER where it has none. [N, E], [M, E] -> int64 [N].

    relevant: for each query the numbers of its relevant candidates, none to many.
    """
    places = torch.full((len(queries),), NEVER)
    for start in range(0, len(queries), QUERY_BLOCK):
        own = relevant[start : start + QUERY_BLOCK]
        row = torch.tensor([i for i, found in enumerate(own) for _ in found], dtype=torch.long)
        column = torch.tensor([j for found in own for j in found], dtype=torch.long)
        asked = queries[start : start + QUERY_BLOCK].float()
        right = (asked[row] * candidates[column].float()).sum(-1)
        best = torch.full((len(asked),), -torch.inf).scatter_reduce(0, row, right, "amax")
        ahead = _count_ahead(asked, candidates, best - TIE, row, column)
        answered = torch.isfinite(best)
        places[start : start + len(asked)][answered] = 1 + ahead[answered]
    return places


def _count_ahead(asked, candidates, bar, row, column) -> torch.Tensor:
    """How many candidates that are not relevant (row, column: those that are) reach the bar.
    [b, E], [M, E], [b] -> int64 [b]."""
    ahead = torch.zeros(len(asked), dtype=torch.long)
    for start in range(0, len(candidates), CANDIDATE_BLOCK):
        block = candidates[start : start + CANDIDATE_BLOCK].float()
        scores = asked @ block.T
        inside = (column >= start) & (column < start + len(block))
        scores[row[inside], column[inside] - start] = -torch.inf
        ahead += (scores >= bar[:, None]).sum(-1)
    return ahead


def recalls(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    relevant: Sequence,
    ks: Sequence[int] = KS,
    unusable: int = 0,
) -> dict:
    """Share of queries with a relevant candidate among the first K. [N, E], [M, E] -> figures.

    A query without any relevant candidate (its picture is missing) is a miss and is counted, so
    that lost pictures never raise a recall. So are `unusable` further queries, which have no vector
    (torn pictures).
    """
    places = with_misses(ranks(queries, candidates, relevant), unusable)
    found = {f"R@{k}": _share(places <= k) for k in ks}
    return found | {
        "mean_recall": sum(found.values()) / len(found),
        "median_rank": float(places.float().median()) if len(places) else 0.0,
        "queries": len(places),
        "candidates": len(candidates),
        "without_answer": sum(not len(numbers) for numbers in relevant),
    }


def with_misses(places: torch.Tensor, count: int) -> torch.Tensor:
    """The places of queries, and those of `count` others that found nothing."""
    return torch.cat([places, torch.full((count,), NEVER)])


def _share(hits: torch.Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else 0.0


def both_ways(
    texts: torch.Tensor,
    images: torch.Tensor,
    pairs: Sequence[tuple[int, int]],
    unusable: int = 0,
) -> dict:
    """{"text_to_image": recalls, "image_to_text": recalls, "mean_recall": of all six}.

    texts [N, E] and images [M, E] stand once each; pairs: (text, image) that belong together;
    unusable: pictures that are asked for as well and cannot be opened.
    """
    images_of = [set() for _ in range(len(texts))]
    texts_of = [set() for _ in range(len(images))]
    for text, image in pairs:
        images_of[text].add(image)
        texts_of[image].add(text)
    to_image = recalls(texts, images, images_of)
    to_text = recalls(images, texts, texts_of, unusable=unusable)
    mean = (to_image["mean_recall"] + to_text["mean_recall"]) / 2
    return {"text_to_image": to_image, "image_to_text": to_text, "mean_recall": mean}


def number_pairs(texts: Sequence[Hashable], images: Sequence[Hashable]) -> tuple:
    """Rows (text, image) -> (each text once, each image once, pairs of numbers).

    Two pictures with one caption are both right answers to it.
    """
    text_numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    image_numbers = {image: i for i, image in enumerate(dict.fromkeys(images))}
    rows = zip(texts, images, strict=True)
    pairs = [(text_numbers[text], image_numbers[image]) for text, image in rows]
    return list(text_numbers), list(image_numbers), list(dict.fromkeys(pairs))


def among(pairs: Sequence[tuple[int, int]], kept: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (text, image) of those images that are `kept`, by their places among these."""
    number = {image: place for place, image in enumerate(kept)}
    return [(text, number[image]) for text, image in pairs if image in number]


# ---- zero-shot classification --------------------------------------------------------------------


def class_vectors(
    embed_text: Callable[[list[str]], torch.Tensor],
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    average: bool = True,
) -> torch.Tensor:
    """One normalised vector per class, the mean over all templates (Radford et al. 2021, 3.1.4):
    [C, E]; not averaged: [C, T, E], for zero_shot to average probabilities."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    vectors = embed_text(texts).view(len(names), len(templates), -1)
    return torch.nn.functional.normalize(vectors.mean(1), dim=-1) if average else vectors


def likeliest(
    images: torch.Tensor, classes: torch.Tensor, labels: Sequence[int], scale: float
) -> torch.Tensor:
    """Place, from 1, of each picture's class by its probability, summed over the templates: what
    one sentence says beside the class (where, how many) need not fit. [N, E], [C, T, E] -> [N]."""
    found = []
    for start in range(0, len(images), QUERY_BLOCK):
        block = images[start : start + QUERY_BLOCK].float()
        logits = scale * (block @ classes.flatten(0, 1).T)
        scores = logits.view(len(block), *classes.shape[:2]).logsumexp(-1)
        right = torch.as_tensor(labels[start : start + QUERY_BLOCK])[:, None]
        bar = scores.gather(1, right) - TIE * scale
        found.append((scores >= bar).sum(1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def zero_shot(
    images: torch.Tensor,
    classes: torch.Tensor,
    labels: Sequence[int],
    scale: float = 1.0,
    unusable: Sequence[int] = (),
) -> dict:
    """Accuracy of the nearest class. [N, E], [C, E] -> {"top1", "top5", "per_class" (the mean of
    the classes' top1), "pictures", "classes", "largest_class" (what always naming it gives)}.

    classes [C, T, E]: the likeliest class over T templates, cosines times `scale` being logits.
    unusable: labels of further pictures, which cannot be opened: misses.
    """
    if classes.dim() == 3:
        places = likeliest(images, classes, labels, scale)
    else:
        places = ranks(images, classes, [[label] for label in labels])
    places = with_misses(places, len(unusable))
    labels = torch.tensor([*labels, *unusable], dtype=torch.long)
    of_class = [_share(places[labels == label] <= 1) for label in labels.unique()]
    sizes = labels.unique(return_counts=True)[1]
    return {
        "top1": _share(places <= 1),
        "top5": _share(places <= 5),
        "per_class": sum(of_class) / len(of_class) if of_class else 0.0,
        "pictures": len(labels),
        "classes": len(classes),
        "largest_class": float(sizes.max()) / len(labels) if len(labels) else 0.0,
    }
