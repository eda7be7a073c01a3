"""Draw the sample data of this recipe: python make_data.py [FOLDER]   (default: data/ beside this file)

captions/   stage 1: pictures and what is on them            train.json, train_imgs.tsv
questions/  stage 2: questions about other pictures          train.json, train_N_imgs.tsv, valid.json, valid_imgs.tsv
One to four shapes of six kinds and six colors stand in the corners of a picture, no kind and no color twice. Every
question has all of its answers equally often, on each side of the split, and the answers of one picture do not depend on
each other: whoever answers without looking is right by chance. One row in twenty shows two pictures, one in twenty none.
LLaVA's own layout; a picture is a line of an *_imgs.tsv, its name and its PNG as base64.
All is drawn here and nothing is left to chance: the same bytes every time.
"""

import base64
import io
import json
import random
import sys
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 48  # pixels
CELL = 24
COLORS = {
    "红色": (220, 40, 40),
    "黄色": (235, 200, 30),
    "绿色": (30, 150, 70),
    "蓝色": (40, 90, 230),
    "紫色": (150, 60, 190),
    "黑色": (20, 20, 20),
}
PLACES = {"左上角": (0, 0), "右上角": (1, 0), "左下角": (0, 1), "右下角": (1, 1)}
NUMBERS = ["一个", "两个", "三个", "四个"]
SHAPES = ["圆形", "方形", "三角形", "十字", "圆环", "菱形"]
YES, NO = "有", "没有"
ASKED = {  # kind of question: its wordings; valid has the first one of each
    "color at": ["{place}是什么颜色？", "请说出{place}的颜色。"],
    "shape at": ["{place}画的是什么？", "{place}是什么图形？"],
    "how many": ["图里一共有几个图形？", "数一数有几个图形。"],
    "where": ["{shape}在哪里？", "{shape}画在哪个角？"],
    "is there": ["图里有{shape}吗？", "能看到{shape}吗？"],
    "color of": ["{shape}是什么颜色？", "请说出{shape}的颜色。"],
}
TWO_ASKED = ["第一张图里一共有几个图形？", "第二张图里一共有几个图形？"]
CAPTION_ASKED = ["请描述这张图片。", "图上画了什么？", "这张图里有什么？"]
WORDS = [  # without a picture
    ("三角形有几条边？", "三条"),
    ("方形有几条边？", "四条"),
    ("圆形有角吗？", "没有"),
    ("方形有几个角？", "四个"),
    ("三角形有几个角？", "三个"),
    ("黑色的反义词是什么？", "白色"),
    ("一个圆形加两个圆形是几个？", "三个"),
    ("两个方形加两个方形是几个？", "四个"),
    ("草一般是什么颜色？", "绿色"),
    ("天空一般是什么颜色？", "蓝色"),
    ("香蕉熟了是什么颜色？", "黄色"),
    ("你是谁？", "看图助手"),
]
PAIRED = [("color at", "shape at"), ("where", "color of"), ("how many", "is there")]
PICTURES = {"train": (216, 216, 216), "valid": (24, 72, 24)}  # of each of PAIRED


# ---- pictures ------------------------------------------------------------------------------------


def scene(chance: random.Random, count: int) -> dict[str, tuple[str, str]]:
    """{place: (shape, color)} of so many shapes."""
    places = chance.sample(list(PLACES), count)
    shapes = chance.sample(SHAPES, count)
    colors = chance.sample(list(COLORS), count)
    found = dict(zip(places, zip(shapes, colors, strict=True), strict=True))
    return {place: found[place] for place in PLACES if place in found}


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int, color: tuple) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "圆形":
        pen.ellipse(box, fill=color)
    elif shape == "方形":
        pen.rectangle(box, fill=color)
    elif shape == "三角形":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=color)
    elif shape == "菱形":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=color)
    elif shape == "圆环":
        pen.ellipse(box, outline=color, width=3)
    else:
        pen.rectangle((x - r, y - 2, x + r, y + 2), fill=color)
        pen.rectangle((x - 2, y - r, x + 2, y + r), fill=color)


def draw(found: dict[str, tuple[str, str]], name: str) -> bytes:
    """The PNG of a scene, each shape a little off, larger and lighter in its own way."""
    chance = random.Random(f"draw {name}")
    image = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for place, (shape, color) in found.items():
        column, row = PLACES[place]
        shade = chance.randint(-12, 12)
        tint = tuple(min(255, max(0, channel + shade)) for channel in COLORS[color])
        x = CELL * column + CELL // 2 + chance.randint(-1, 1)
        y = CELL * row + CELL // 2 + chance.randint(-1, 1)
        draw_shape(pen, shape, x, y, chance.randint(8, 9), tint)
    file = io.BytesIO()
    image.quantize(8, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


# ---- questions -----------------------------------------------------------------------------------


def all_questions(kind: str) -> list[tuple[str, str, str]]:
    """(kind, what is asked about, answer): every question of a kind with every answer that it can have."""
    about = {"color at": PLACES, "shape at": PLACES, "how many": [""]}.get(kind, SHAPES)
    answers = {
        "color at": COLORS,
        "shape at": SHAPES,
        "how many": NUMBERS,
        "where": PLACES,
        "is there": [YES, NO],
        "color of": COLORS,
    }
    return [(kind, what, answer) for what, answer in product(about, answers[kind])]


def answer_in(found: dict[str, tuple[str, str]], kind: str, what: str) -> str | None:
    """What a scene answers; None where the question makes no sense."""
    of_shape = {shape: (place, color) for place, (shape, color) in found.items()}
    if kind == "color at":
        return found[what][1] if what in found else None
    if kind == "shape at":
        return found[what][0] if what in found else None
    if kind == "how many":
        return NUMBERS[len(found) - 1]
    if kind == "is there":
        return YES if what in of_shape else NO
    return of_shape.get(what, (None, None))[kind == "color of"]


def groups(kinds: tuple[str, str], count: int, seed: str) -> list[tuple]:
    """`count` pairs of questions, one of each kind; of every kind all questions with all answers equally often.
    Any two can be true of one picture."""
    chance = random.Random(seed)
    columns = []
    for kind in kinds:
        questions = all_questions(kind)
        assert count % len(questions) == 0, (kind, count, len(questions))
        columns.append(chance.sample(questions * (count // len(questions)), count))
    return list(zip(*columns, strict=True))


def scene_for(group: tuple, seed: str) -> dict[str, tuple[str, str]]:
    """A scene of which all these answers are true."""
    chance = random.Random(f"scene {seed}")
    while True:
        found = scene(chance, chance.randint(1, 4))
        if all(answer_in(found, kind, what) == answer for kind, what, answer in group):
            return found


def wording(kind: str, what: str, number: int) -> str:
    return ASKED[kind][number % len(ASKED[kind])].format(place=what, shape=what)


# ---- rows ----------------------------------------------------------------------------------------


def row(name: str, images: list[str], *texts: str) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    shown = {"image": images[0] if len(images) == 1 else images} if images else {}
    return {"id": name} | shown | {"conversations": turns}


def with_mark(text: str, number: int) -> str:
    return f"{text}\n<image>" if number % 4 == 3 else f"<image>\n{text}"


def questions(split: str) -> tuple[list[dict], dict[str, dict]]:
    """-> (rows, {picture's name: scene})."""
    rows, scenes = [], {}
    sets = []
    for kinds, count in zip(PAIRED, PICTURES[split], strict=True):
        sets += groups(kinds, count, f"{split} {kinds}")
    times: dict[tuple, int] = {}  # how often a question with its answer was asked
    for i, group in enumerate(sets):
        name = f"{split}_{i:04d}.png"
        scenes[name] = scene_for(group, name)
        asked = []
        for kind, what, answer in group:
            times[kind, what, answer] = times.get((kind, what, answer), -1) + 1
            number = 0 if split == "valid" else times[kind, what, answer]
            asked.append((wording(kind, what, number), answer))
        if i % 3 == 2:  # one conversation, else a row for each
            texts = [text for pair in asked for text in pair]
            texts[0] = with_mark(texts[0], i)
            rows.append(row(f"{split}_{i:04d}", [name], *texts))
            continue
        for j, (text, answer) in enumerate(asked):
            rows.append(row(f"{split}_{i:04d}_{j}", [name], with_mark(text, i + j), answer))
    extra = max(8, len(rows) // 18 // 8 * 8)
    rows += two_pictures(split, scenes, extra)
    for i in range(extra):
        rows.append(row(f"{split}_words_{i}", [], *WORDS[i % len(WORDS)]))
    random.Random(split).shuffle(rows)
    return rows, scenes


def two_pictures(split: str, scenes: dict[str, dict], count: int) -> list[dict]:
    """Which of two pictures is meant is said by its number; every answer equally often."""
    chance = random.Random(f"two {split}")
    by_count = {n: [name for name in scenes if len(scenes[name]) == n] for n in range(1, 5)}
    rows = []
    for i in range(count):
        asked, answer = i % 2, i // 2 % 4
        pair = [chance.choice(by_count[chance.randint(1, 4)]) for _ in range(2)]
        pair[asked] = chance.choice(by_count[answer + 1])
        text = f"第一张：<image>\n第二张：<image>\n{TWO_ASKED[asked]}"
        rows.append(row(f"{split}_two_{i}", pair, text, NUMBERS[answer]))
    return rows


def captions(count: int) -> tuple[list[dict], dict[str, dict]]:
    chance = random.Random("captions")
    rows, scenes = [], {}
    for i in range(count):
        name = f"caption_{i:04d}.png"
        scenes[name] = scene(chance, i % 4 + 1)
        said = [f"{place}是{color}的{shape}" for place, (shape, color) in scenes[name].items()]
        text = with_mark(CAPTION_ASKED[i // 4 % len(CAPTION_ASKED)], i // 12)
        rows.append(row(f"caption_{i:04d}", [name], text, "，".join(said) + "。"))
    return rows, scenes


# ---- files ---------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(one, ensure_ascii=False) for one in rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8", newline="\n")


def write_pictures(folder: Path, name: str, scenes: dict[str, dict], files: int = 1) -> None:
    lines = [
        f"{key}\t{base64.b64encode(draw(found, key)).decode()}\n" for key, found in scenes.items()
    ]
    share = -(-len(lines) // files)
    for i in range(files):
        path = folder / (f"{name}_{i}_imgs.tsv" if files > 1 else f"{name}_imgs.tsv")
        path.write_text("".join(lines[i * share : (i + 1) * share]), "utf-8", newline="\n")


def main(folder: Path) -> None:
    for name in ("captions", "questions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows, scenes = captions(288)
    write_rows(folder / "captions" / "train.json", rows)
    write_pictures(folder / "captions", "train", scenes)
    for split, files in (("train", 2), ("valid", 1)):
        rows, scenes = questions(split)
        write_rows(folder / "questions" / f"{split}.json", rows)
        write_pictures(folder / "questions", split, scenes, files)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
