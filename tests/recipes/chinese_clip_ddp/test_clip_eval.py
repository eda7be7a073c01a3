"""Recall@K and zero-shot accuracy against a brute-force ranking; what eval.py reads and says."""

import itertools

import pytest
import torch
from harness import own_modules

(retrieval,) = own_modules("chinese_clip_ddp", "retrieval")


def vectors(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(count, width, generator=generator)
    return torch.nn.functional.normalize(found, dim=-1)


def brute_force(queries, candidates, relevant, k: int) -> float:
    """Sorts every query's whole row: by score, the wrong ones first among equals."""
    hits = 0
    scores = queries.double() @ candidates.double().T
    for query, right in enumerate(relevant):
        row = [round(score, 6) for score in scores[query].tolist()]
        order = sorted(range(len(row)), key=lambda j: (-row[j], j in right))
        hits += any(j in right for j in order[:k])
    return hits / len(relevant)


@pytest.fixture(params=[(7, 7), (3, 1000), (1000, 1000)], ids=str)
def blocks(request, monkeypatch):
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", request.param[0])
    monkeypatch.setattr(retrieval, "CANDIDATE_BLOCK", request.param[1])


def several_positives(queries: int, candidates: int, seed: int) -> list[set]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(queries):
        count = int(torch.randint(0, 4, (), generator=generator))
        found.append(set(torch.randperm(candidates, generator=generator)[:count].tolist()))
    return found


def test_recalls_are_those_of_a_whole_sort(blocks):
    """Several right answers, queries without any, and candidates that are copies of others."""
    queries = vectors(50, width=4)
    candidates = vectors(40, width=4, seed=1)
    candidates[20:30] = candidates[:10]  # ties across blocks
    relevant = several_positives(50, 40, seed=2)
    without = sum(not numbers for numbers in relevant)
    assert without > 3 and max(map(len, relevant)) == 3
    found = retrieval.recalls(queries, candidates, relevant, ks=(1, 2, 5, 10, 40))
    for k in (1, 2, 5, 10, 40):
        assert found[f"R@{k}"] == brute_force(queries, candidates, relevant, k), k
    assert found["R@40"] == 1 - without / 50
    assert (found["queries"], found["candidates"]) == (50, 40)
    assert found["without_answer"] == without
    assert 0 < found["R@1"] < found["R@5"] < 1


def test_ties_count_against_us():
    same = vectors(1).expand(8, -1)
    found = retrieval.recalls(same, same, [{i} for i in range(8)])
    assert found["R@1"] == found["R@5"] == 0 and found["R@10"] == 1
    assert found["median_rank"] == 8
    # but not those between two right answers
    assert retrieval.recalls(same[:1], same[:2], [{0, 1}])["R@1"] == 1


def test_a_text_whose_picture_is_missing_is_a_miss():
    queries = vectors(4)
    whole = retrieval.recalls(queries, queries, [{0}, {1}, {2}, {3}])
    less = retrieval.recalls(queries, queries[:3], [{0}, {1}, {2}, set()])
    assert whole["R@1"] == 1 and whole["without_answer"] == 0
    assert less["R@1"] == less["R@10"] == 0.75 and less["without_answer"] == 1
    assert retrieval.recalls(queries, queries[:0], [set()] * 4)["R@10"] == 0
    assert retrieval.recalls(queries[:0], queries, [])["R@1"] == 0


def test_both_ways_with_shared_captions_and_pictures():
    """Two pictures of one caption, and a picture with two captions."""
    texts, images, pairs = retrieval.number_pairs(
        ["猫", "狗", "猫", "小狗", "狗"], ["a.png", "b.png", "c.png", "b.png", "b.png"]
    )
    assert texts == ["猫", "狗", "小狗"] and images == ["a.png", "b.png", "c.png"]
    assert pairs == [(0, 0), (1, 1), (0, 2), (2, 1)]
    image_vectors = vectors(3)
    text_vectors = image_vectors[[2, 1, 1]]
    found = retrieval.both_ways(text_vectors, image_vectors, pairs)
    assert found["text_to_image"]["R@1"] == 1
    # picture a is far from its only caption, c and b find one of theirs
    assert found["image_to_text"]["R@1"] in (2 / 3, 1)
    for k, way in itertools.product((1, 5, 10), ("text_to_image", "image_to_text")):
        assert 0 <= found[way][f"R@{k}"] <= 1
    shares = [
        found[way][f"R@{k}"] for k in (1, 5, 10) for way in ("text_to_image", "image_to_text")
    ]
    assert abs(found["mean_recall"] - sum(shares) / 6) < 1e-12


def test_zero_shot_is_the_nearest_class():
    classes = vectors(5, seed=3)
    images = torch.nn.functional.normalize(classes[[0, 0, 0, 1, 2, 4]] + 0.1 * vectors(6), dim=-1)
    labels = [0, 0, 1, 1, 2, 4]  # the third is wrong
    found = retrieval.zero_shot(images, classes, labels)
    nearest = (images @ classes.T).argmax(-1).tolist()
    assert found["top1"] == sum(a == b for a, b in zip(nearest, labels, strict=True)) / 6 == 5 / 6
    assert found["top5"] == 1 and found["per_class"] == (1 + 0.5 + 1 + 1) / 4
    assert found["largest_class"] == 2 / 6 and found["classes"] == 5
    # a model that knows nothing scores nothing, whatever the order of the classes
    blind = retrieval.zero_shot(images, classes[:1].expand(5, -1), labels)
    assert blind["top1"] == 0


def test_templates_are_averaged_per_class():
    table = {"猫": [1.0, 0.0], "一只猫": [0.0, 1.0], "狗": [0.0, -1.0], "一只狗": [0.0, -1.0]}
    found = retrieval.class_vectors(
        lambda texts: torch.tensor([table[text] for text in texts]), ["猫", "狗"], ["{}", "一只{}"]
    )
    half = 0.5**0.5
    assert torch.allclose(found, torch.tensor([[half, half], [0.0, -1.0]]))
    assert all(template.count("{}") == 1 for template in retrieval.TEMPLATES)
    assert len(set(retrieval.TEMPLATES)) == len(retrieval.TEMPLATES) > 20
