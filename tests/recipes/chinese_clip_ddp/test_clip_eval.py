"""Recall@K and zero-shot accuracy against a brute-force ranking; what eval.py reads and says."""

import base64
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import own_modules
from PIL import Image

evaluation, retrieval = own_modules("chinese_clip_ddp", "eval", "retrieval")
COLOURS = {"红": (250, 0, 0), "绿": (0, 250, 0), "蓝": (0, 0, 250), "黑": (0, 0, 0)}


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


def test_probabilities_of_templates_are_averaged_where_asked():
    """A picture that fits one sentence of its class exactly, and one in the middle of another's."""
    table = {
        "猫上": [1.0, 0.0, 0.0],
        "猫下": [0.0, 0.0, 1.0],
        "狗上": [0.8, 0.6, 0.0],
        "狗下": [0.6, 0.0, 0.8],
    }

    def embed(texts):
        return torch.tensor([table[text] for text in texts])

    images = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]])
    averaged = retrieval.class_vectors(embed, ["猫", "狗"], ["{}上", "{}下"])
    apart = retrieval.class_vectors(embed, ["猫", "狗"], ["{}上", "{}下"], average=False)
    assert averaged.shape == (2, 3) and apart.shape == (2, 2, 3)
    assert retrieval.zero_shot(images, averaged, [0, 1])["top1"] == 0.5
    assert retrieval.zero_shot(images, apart, [0, 1], scale=20.0)["top1"] == 1
    one = retrieval.class_vectors(embed, ["猫", "狗"], ["{}上"], average=False)
    assert retrieval.zero_shot(images, one, [0, 1], 20.0) == retrieval.zero_shot(
        images, one[:, 0], [0, 1]
    )
    same = apart[:1].expand(2, -1, -1)
    assert retrieval.zero_shot(images, same, [0, 1], 20.0)["top1"] == 0, "ties count against us"


def test_templates_are_averaged_per_class():
    table = {"猫": [1.0, 0.0], "一只猫": [0.0, 1.0], "狗": [0.0, -1.0], "一只狗": [0.0, -1.0]}
    found = retrieval.class_vectors(
        lambda texts: torch.tensor([table[text] for text in texts]), ["猫", "狗"], ["{}", "一只{}"]
    )
    half = 0.5**0.5
    assert torch.allclose(found, torch.tensor([[half, half], [0.0, -1.0]]))
    assert all(template.count("{}") == 1 for template in retrieval.TEMPLATES)
    assert len(set(retrieval.TEMPLATES)) == len(retrieval.TEMPLATES) > 20


# ---- what eval.py reads ----------------------------------------------------------------------------


class Colours:
    """A model for pictures of one colour: the one that a text names first."""

    size = 4
    path = "colours"
    logit_scale = 20.0
    tokenizer = SimpleNamespace()
    image_processor = SimpleNamespace(do_resize=False)
    preparation = SimpleNamespace(max_length=52)

    def embed_text(self, texts):
        named = [next((i for i, name in enumerate(COLOURS) if name in text), 3) for text in texts]
        return torch.nn.functional.one_hot(torch.tensor(named), 4).float()

    def embed_images(self, some):
        palette = torch.tensor(list(COLOURS.values())).float()
        seen = torch.tensor([picture.getpixel((0, 0)) for picture in some]).float()
        return torch.nn.functional.one_hot(torch.cdist(seen, palette).argmin(-1), 4).float()


def draw(path, colour: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), COLOURS[colour]).save(path)
    return path


def run(monkeypatch, capsys, *flags) -> str:
    """What eval.py prints with these flags, and Colours for its model."""
    monkeypatch.setattr(evaluation.model, "load", lambda path: Colours())
    nothing = {"warnings": ["warning: captions are strange"]}
    monkeypatch.setattr(evaluation, "check_captions", lambda *_: nothing)
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    evaluation.main()
    return capsys.readouterr().out


@pytest.fixture
def chinese_clip(tmp_path):
    """valid_imgs.tsv and valid_texts.jsonl as MUGE has them: a text of two pictures, one whose
    pictures are not there, one with a torn picture."""
    folder = tmp_path / "MUGE"
    folder.mkdir()
    with open(folder / "valid_imgs.tsv", "w") as file:
        for number, colour in enumerate(["红", "红", "绿", "蓝"]):
            data = draw(tmp_path / "one.png", colour).read_bytes()
            data = data[:40] if colour == "蓝" else data
            file.write(f"{number}\t{base64.urlsafe_b64encode(data).decode()}\n")
    texts = [("红色", [0, 1]), ("绿色", [2]), ("蓝色", [3]), ("黑色", [77]), ("绿的", [2])]
    with open(folder / "valid_texts.jsonl", "w", encoding="utf-8") as file:
        for number, (text, images) in enumerate(texts):
            row = {"text_id": number, "text": text, "image_ids": images}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder


def test_chinese_clip_files_beside_the_published_numbers(
    chinese_clip, monkeypatch, capsys, tmp_path
):
    told = run(
        monkeypatch, capsys, "--data_path", chinese_clip, "--output", tmp_path / "figures.json"
    )
    found = json.loads((tmp_path / "figures.json").read_text())["retrieval"]
    to_image, to_text = found["text_to_image"], found["image_to_text"]
    # 红色, 绿色 and 绿的 find theirs; a torn and a missing picture leave two without an answer
    assert to_image["R@1"] == to_image["R@10"] == 3 / 5
    assert (to_image["queries"], to_image["candidates"], to_image["without_answer"]) == (5, 3, 2)
    assert to_text["R@1"] == 3 / 4 and to_text["queries"] == 4, "the torn one is a miss"
    assert found["unusable"] == {"torn": 1}
    assert "| **colours** | 60.0 | 60.0 | 60.0 | 60.0 | 75.0 |" in told
    assert "5 texts, 4 pictures" in told and "nothing is held out" not in told
    assert "| CN-CLIP H/14, fine-tuned, published | 68.9 | 88.7 | 93.1 | 83.6 | – |" in told
    assert (
        "2 texts have no usable picture and count as misses; pictures that cannot be used and count as misses: 1 torn"
        in told
    )
    assert "warning: captions are strange" in told


def test_texts_without_a_picture_are_misses_in_any_encoding_and_beside_torn_lines(
    chinese_clip, monkeypatch, capsys, tmp_path
):
    """As Windows saves them; a line that a download has cut; a text twice; one in another file."""
    texts = chinese_clip / "valid_texts.jsonl"
    more = [{"text": text, "image_ids": [99]} for text in ("黑色", " 白色", "白色", "红色")]
    more += [{"text": f"红色{i}", "image_ids": [0]} for i in range(6)]
    lines = [json.dumps(row, ensure_ascii=False) for row in more] + ['{"text": "紫色", "ima', "[1]"]
    texts.write_bytes((texts.read_text("utf-8") + "\n".join(lines)).encode("gb18030"))
    for name in ("train", "valid_2"):
        (chinese_clip / f"{name}_imgs.tsv").write_text("9\tAAAA\n")
        row = json.dumps({"text": f"{name}里的灰色图片", "image_ids": [100]}, ensure_ascii=False)
        (chinese_clip / f"{name}_texts.jsonl").write_text(row, encoding="utf-8")
    figures = tmp_path / "figures.json"
    run(monkeypatch, capsys, "--data_path", chinese_clip, "--output", figures)
    to_image = json.loads(figures.read_text())["retrieval"]["text_to_image"]
    # 红色 is known; 黑色 and 白色 count once, and the text of the other held-out file
    assert (to_image["queries"], to_image["without_answer"]) == (13, 4)
    every = [*("--data_path", chinese_clip, "--output", figures), "--held_out", "false"]
    run(monkeypatch, capsys, *every)
    assert json.loads(figures.read_text())["retrieval"]["text_to_image"]["queries"] == 14


def test_names_of_classes_in_gb18030(monkeypatch, capsys, tmp_path):
    for number, colour in enumerate("红绿"):
        draw(tmp_path / f"test/{number:03d}/0.png", colour)
    (tmp_path / "label_cn.txt").write_bytes("红色的圆\n绿色的圆\n".encode("gb18030"))
    (tmp_path / "templates_cn.txt").write_bytes("一张{}的图片\n".encode("gb18030"))
    told = run(monkeypatch, capsys, "--data_path", tmp_path)
    assert "| **colours** | 100.0 |" in told and "2 classes" in told


def test_pairs_that_may_have_been_trained_on_are_told(monkeypatch, capsys, tmp_path):
    draw(tmp_path / "a.png", "红")
    for name, is_told in (("pairs.csv", True), ("test.csv", False)):
        (tmp_path / name).write_text("text,image\n红色,a.png\n", encoding="utf-8")
        told = run(monkeypatch, capsys, "--data_path", tmp_path / name)
        assert ("nothing is held out by its name (valid, test): all 1 pairs" in told) == is_told


def test_flags_that_change_nothing_are_named(chinese_clip, monkeypatch, capsys, tmp_path):
    told = run(monkeypatch, capsys, "--data_path", chinese_clip, "--average", "probabilities")
    assert "--average: no effect; nothing is classified" in told
    draw(tmp_path / "colours/红/a.png", "红")
    flags = ["--data_path", tmp_path / "colours", "--task", "classification"]
    told = run(monkeypatch, capsys, *flags, "--held_out", "false", "--image_root", tmp_path)
    assert "--held_out: no effect" in told and "--image_root: no effect" in told
    assert "no effect" not in run(monkeypatch, capsys, *flags, "--templates", "{}色")


def test_captions_as_coco_cn_publishes_them(monkeypatch, capsys, tmp_path):
    for name, colour in (("COCO_1", "红"), ("COCO_2", "绿")):
        draw(tmp_path / f"pictures/{name}.jpg", colour)
    lines = ["COCO_1#zhc#0\t红色", "COCO_1#zhc#1\t红的", "COCO_2#zhc#0\t绿色", "", "COCO_3#0\t蓝色"]
    (tmp_path / "coco-cn_test.txt").write_text("\n".join(lines), encoding="utf-8")
    flags = ["--data_path", tmp_path / "coco-cn_test.txt", "--image_root", tmp_path / "pictures"]
    told = run(monkeypatch, capsys, *flags)
    assert "4 texts, 3 pictures; 1 texts have no usable picture" in told
    assert "count as misses: 1 missing" in told and "| 57.0 | 84.1 | 93.6 |" in told
    (tmp_path / "coco-cn_test.txt").write_text("COCO_1 红色\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="coco-cn_test.txt:1: not of the form picture#zhc#0"):
        run(monkeypatch, capsys, *flags)
    (tmp_path / "coco-cn_test.txt").write_text("COCO_9#zhc#0\t红色\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="all pictures are missing, e.g. .*COCO_9.jpg; name their"):
        run(monkeypatch, capsys, *flags)


def test_elevater_folders(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "cifar-10"
    for number, colour in enumerate("红绿蓝"):
        for i in range(4):
            draw(folder / f"test/{number:03d}/{i}.png", colour)
    draw(folder / "test/000/wrong.png", "绿")
    (folder / "test/001/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "label_cn.txt").write_text("红色\n绿色\n蓝色\n", encoding="utf-8")
    told = run(monkeypatch, capsys, "--data_path", folder, "--output", tmp_path / "figures.json")
    found = json.loads((tmp_path / "figures.json").read_text())["classification"]
    assert found["pictures"] == 14 and found["classes"] == 3
    assert abs(found["top1"] - 12 / 14) < 1e-12, "a torn picture is a miss"
    assert abs(found["per_class"] - (4 / 5 + 4 / 5 + 1) / 3) < 1e-12, "of its class as well"
    assert found["largest_class"] == 5 / 14
    assert found["unusable"] == {"torn": 1}
    assert "| CN-CLIP B/16, published | 92.0 |" in told
    (folder / "test/007").mkdir()
    draw(folder / "test/007/a.png", "红")
    with pytest.raises(SystemExit, match="007: neither one of the 3 lines of .*label_cn.txt nor"):
        run(monkeypatch, capsys, "--data_path", folder)


def test_folders_of_classes_and_templates_of_ones_own(monkeypatch, capsys, tmp_path):
    for colour in "红绿":
        draw(tmp_path / f"colours/{colour}/a.png", colour)
    flags = ["--data_path", tmp_path / "colours", "--task", "classification"]
    told = run(monkeypatch, capsys, *flags, "--templates", "{}色")
    assert "| **colours** | 100.0 | 100.0 | 100.0 | 50.0 |" in told
    (tmp_path / "templates.txt").write_text("{}色\n一个{}\n", encoding="utf-8")
    assert evaluation.read_templates(str(tmp_path / "templates.txt")) == ["{}色", "一个{}"]
    assert len(evaluation.read_templates("")) == len(retrieval.TEMPLATES)
    (tmp_path / "colours/templates_cn.txt").write_text("{}的圆\n", encoding="utf-8")
    assert evaluation.read_templates("", tmp_path / "colours") == ["{}的圆"]
    with pytest.raises(SystemExit, match="'没有' has no {} for the class, or several"):
        run(monkeypatch, capsys, *flags, "--templates", "没有")
    with pytest.raises(SystemExit, match="no class_name/picture in it"):
        run(monkeypatch, capsys, "--data_path", tmp_path / "colours/红", "--task", "classification")


def test_classes_named_in_captions(monkeypatch, capsys, tmp_path):
    rows = ["text,image"]
    for i, (colour, text) in enumerate([("红", "一个红圆"), ("绿", "绿圆在左"), ("蓝", "什么")]):
        draw(tmp_path / f"data/{i}.png", colour)
        rows.append(f"{text},{i}.png")
    (tmp_path / "data/pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "data/labels_cn.txt").write_text("红\n绿\n蓝\n红圆\n绿圆\n", encoding="utf-8")
    told = run(monkeypatch, capsys, "--data_path", tmp_path / "data")
    assert "T→I R@1" in told and "mean of classes" in told, "both"
    assert "1 captions name no class and are left out" in told
    assert "2 pictures, 5 classes" in told


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--data_path", "/nowhere"], "/nowhere: no such file or folder"),
        (["--task", "classification", "--data_path", __file__], "wants a folder of classes"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, flags, said):
    with pytest.raises(SystemExit, match=said):
        run(monkeypatch, capsys, *flags)


NAMED = {
    "data/Flickr30k-CN/test_imgs.tsv": "flickr30k-cn",
    "elevater/cifar-100": "cifar-100",
    "elevater/cifar-10/test": "cifar-10",
    "MUGE/valid_imgs.tsv": "muge",
    "coco-cn_test.txt": "coco-cn",
    "imagenet-1k": "imagenet",
    "muge/photos/pairs/mine.csv": "",  # a folder somewhere above
    "smuggled.csv": "",
    "fashion-mnist": "",  # others' numbers
    "imagenet-a/test": "",
}


@pytest.mark.parametrize("path", NAMED)
def test_the_benchmark_is_known_by_the_last_parts_of_its_name(path):
    assert evaluation.benchmark_of("", path) == NAMED[path]


def test_the_benchmark_may_be_given(tmp_path):
    assert evaluation.benchmark_of("muge", "mine") == "muge"
    (tmp_path / "muge/photos").mkdir(parents=True)
    assert evaluation.benchmark_of("", tmp_path / "muge/photos") == ""
    known = set(evaluation.RETRIEVAL) | set(evaluation.CLASSIFICATION)
    assert known == set(evaluation.NAMES)
