"""Draw the sample data of this recipe: python make_data.py [FOLDER]   (default: data/ beside this file)

captions/   stage 1: pictures and what is on them            train.json, train_imgs.tsv
questions/  stage 2: questions about other pictures          train_N.json, train_N_imgs.tsv, valid.json, valid_imgs.tsv
A picture has one to four shapes of one kind and one color, each in a corner or in the middle. Every question has all of
its answers equally often, on each side of the split, and the answers of one picture do not depend on each other: whoever
answers without looking is right by chance. One row in twenty shows two pictures, one in twenty none.
LLaVA's own layout; a picture is a line of an *_imgs.tsv, its name and its PNG as base64.
All is drawn here and nothing is left to chance: the same bytes every time.
"""

import base64
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

SIDE = 48  # pixels
COLORS = {
    "红色": (220, 40, 40),
    "黄色": (235, 200, 30),
    "绿色": (30, 150, 70),
    "蓝色": (40, 90, 230),
    "紫色": (150, 60, 190),
    "黑色": (20, 20, 20),
}
PLACES = {  # their middles; a patch of the built-in tower holds one
    "左上角": (8, 8),
    "右上角": (40, 8),
    "左下角": (8, 40),
    "右下角": (40, 40),
    "正中间": (24, 24),
}
NUMBERS = ["一个", "两个", "三个", "四个"]
SHAPES = ["圆形", "方形", "三角形", "十字", "圆环", "菱形"]
YES = "是"
NO = "不是"
BLACK = "黑色"  # the one that is no color in "is it colored?"
ASKED = {  # kind of question: its wordings; valid has the first one of each
    "color": ["图形是什么颜色？", "请说出图形的颜色。"],
    "number": ["图里有几个图形？", "数一数有几个图形。"],
    "shape": ["画的是什么图形？", "请说出图形的名称。"],
    "place": ["图形在哪里？", "图形画在什么位置？"],
    "is colored": ["图形是彩色的吗？", "它是彩色的吗？"],
}
ANSWERS = {
    "color": list(COLORS),
    "number": NUMBERS,
    "shape": SHAPES,
    "place": list(PLACES),
    "is colored": [YES, NO],
}
TWO_ASKED = ["第一张图是什么颜色？", "第二张图是什么颜色？"]
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
# kinds whose answers do not depend on each other
TOGETHER = [("color", "number"), ("shape", "place", "is colored")]
PICTURES = {"train": (480, 300), "valid": (72, 60)}  # of each of TOGETHER


# ---- pictures ------------------------------------------------------------------------------------


class Scene(NamedTuple):
    shape: str
    color: str
    places: tuple[str, ...]


def scene(chance: random.Random, **known: str) -> Scene:
    """A scene by chance, but for what is known of it: shape, color, number, place."""
    number = NUMBERS.index(known.get("number") or chance.choice(NUMBERS)) + 1
    places = tuple(chance.sample(list(PLACES), number))
    if "place" in known:
        places = (known["place"],)
    shape = known.get("shape") or chance.choice(SHAPES)
    return Scene(shape, known.get("color") or chance.choice(list(COLORS)), places)


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


def draw(found: Scene, name: str) -> bytes:
    """The PNG of a scene, each shape a little off, larger and lighter in its own way."""
    chance = random.Random(f"draw {name}")
    image = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for place in found.places:
        x, y = PLACES[place]
        shade = chance.randint(-12, 12)
        tint = tuple(min(255, max(0, channel + shade)) for channel in COLORS[found.color])
        r = chance.randint(5, 6)
        draw_shape(pen, found.shape, x + chance.randint(-1, 1), y + chance.randint(-1, 1), r, tint)
    file = io.BytesIO()
    image.quantize(8, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


# ---- questions -----------------------------------------------------------------------------------


def groups(kinds: tuple[str, ...], count: int, seed: str) -> list[dict[str, str]]:
    """`count` times kind -> answer; of every kind all answers equally often."""
    chance = random.Random(seed)
    columns = []
    for kind in kinds:
        answers = ANSWERS[kind]
        assert count % len(answers) == 0, (kind, count, len(answers))
        columns.append(chance.sample(answers * (count // len(answers)), count))
    return [dict(zip(kinds, answers, strict=True)) for answers in zip(*columns, strict=True)]


def scene_for(group: dict[str, str], seed: str) -> Scene:
    """A scene of which all these answers are true."""
    chance = random.Random(f"scene {seed}")
    known = {kind: answer for kind, answer in group.items() if kind != "is colored"}
    if group.get("is colored") == YES:
        known["color"] = chance.choice([color for color in COLORS if color != BLACK])
    elif group.get("is colored") == NO:
        known["color"] = BLACK
    return scene(chance, **known)


# ---- rows ----------------------------------------------------------------------------------------


def row(name: str, images: list[str], *texts: str) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    shown = {"image": images[0] if len(images) == 1 else images} if images else {}
    return {"id": name} | shown | {"conversations": turns}


def with_mark(text: str, number: int) -> str:
    return f"{text}\n<image>" if number % 4 == 3 else f"<image>\n{text}"


def questions(split: str) -> tuple[list[dict], dict[str, Scene]]:
    """-> (rows, {picture's name: scene})."""
    rows, scenes = [], {}
    sets = []
    for kinds, count in zip(TOGETHER, PICTURES[split], strict=True):
        sets += groups(kinds, count, f"{split} {kinds}")
    times = Counter()  # how often a question with its answer was asked
    for i, group in enumerate(sets):
        name = f"{split}_{i:04d}.png"
        scenes[name] = scene_for(group, name)
        asked = []
        for kind, answer in group.items():
            number = 0 if split == "valid" else times[kind, answer]
            times[kind, answer] += 1
            asked.append((ASKED[kind][number % 2], answer))
        if i % 2:  # one conversation, else a row for each
            texts = [text for pair in asked for text in pair]
            texts[0] = with_mark(texts[0], i)
            rows.append(row(f"{split}_{i:04d}", [name], *texts))
            continue
        for j, (text, answer) in enumerate(asked):
            rows.append(row(f"{split}_{i:04d}_{j}", [name], with_mark(text, i + j), answer))
    extra = max(12, len(rows) // 18 // 12 * 12)
    rows += two_pictures(split, scenes, extra)
    for i in range(extra):
        question, answer = WORDS[i % len(WORDS)]
        # equal prompts would be taken out of training
        asked = f"请问{question}" if split == "valid" else question
        rows.append(row(f"{split}_words_{i}", [], asked, answer))
    random.Random(split).shuffle(rows)
    return rows, scenes


def two_pictures(split: str, scenes: dict[str, Scene], count: int) -> list[dict]:
    """Which of two pictures is meant is said by its number; every answer equally often."""
    chance = random.Random(f"two {split}")
    of_color = {color: [n for n, one in scenes.items() if one.color == color] for color in COLORS}
    rows = []
    for i in range(count):
        asked, answer = i % 2, list(COLORS)[i // 2 % len(COLORS)]
        pair = [chance.choice(list(scenes)) for _ in range(2)]
        pair[asked] = chance.choice(of_color[answer])
        marks = "<image>\n<image>" if i // 12 % 2 == 0 else "第一张：<image>\n第二张：<image>"
        text = f"{marks}\n{TWO_ASKED[asked]}"
        rows.append(row(f"{split}_two_{i}", pair, text, answer))
    return rows


def captions(count: int) -> tuple[list[dict], dict[str, Scene]]:
    chance = random.Random("captions")
    rows, scenes = [], {}
    for i in range(count):
        name = f"caption_{i:04d}.png"
        found = scenes[name] = scene(chance, number=NUMBERS[i % 4])
        places = "、".join(place for place in PLACES if place in found.places)
        said = f"{NUMBERS[len(found.places) - 1]}{found.color}的{found.shape}，在{places}。"
        text = with_mark(CAPTION_ASKED[i // 4 % len(CAPTION_ASKED)], i // 12)
        rows.append(row(f"caption_{i:04d}", [name], text, said))
    return rows, scenes


# ---- files ---------------------------------------------------------------------------------------


def names_of(name: str, suffix: str, files: int) -> list[str]:
    return [f"{name}_{i}{suffix}" if files > 1 else f"{name}{suffix}" for i in range(files)]


def write_rows(folder: Path, name: str, rows: list[dict], files: int = 1) -> None:
    lines = [json.dumps(one, ensure_ascii=False) for one in rows]
    for i, file in enumerate(names_of(name, ".json", files)):
        text = "[\n" + ",\n".join(lines[i::files]) + "\n]\n"
        (folder / file).write_text(text, encoding="utf-8", newline="\n")


def write_pictures(folder: Path, name: str, scenes: dict[str, Scene], files: int = 1) -> None:
    lines = [
        f"{key}\t{base64.b64encode(draw(found, key)).decode()}\n" for key, found in scenes.items()
    ]
    for i, file in enumerate(names_of(name, "_imgs.tsv", files)):
        (folder / file).write_text("".join(lines[i::files]), encoding="utf-8", newline="\n")


def main(folder: Path) -> None:
    for name in ("captions", "questions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows, scenes = captions(288)
    write_rows(folder / "captions", "train", rows)
    write_pictures(folder / "captions", "train", scenes)
    for split, files in (("train", 2), ("valid", 1)):
        rows, scenes = questions(split)
        write_rows(folder / "questions", split, rows, files)
        write_pictures(folder / "questions", split, scenes, files)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
