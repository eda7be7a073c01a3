"""Draw the sample data of this recipe: python make_data.py [FOLDER]   (default: data/ beside this file)

X_imgs.tsv and X_texts.jsonl (Chinese-CLIP's layout) for train, train_2 (its captions, drawn once more) and valid;
labels_cn.txt and templates_cn.txt, the classes of a zero-shot test and sentences about one.
Twelve things in eight colours, one of them in one of five places or two to four of them anywhere. Sixteen of the 96 pairs
of thing and colour stand in valid alone, though every thing and every colour is trained: who finds their pictures has
learned the words and not the sentences. Every picture has one caption, and in valid every caption one picture.
All is drawn here and nothing depends on chance: the same pictures every time.
"""

import base64
import io
import json
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 48  # pixels
OFF = 0.05  # parts of a place; nothing lies exactly in its middle
FINE = 4  # drawn so many times larger, then reduced, for smooth edges
COLORS = {
    "红色": (220, 30, 30),
    "橙色": (250, 140, 20),
    "黄色": (240, 210, 20),
    "绿色": (30, 150, 60),
    "蓝色": (40, 90, 230),
    "紫色": (130, 50, 170),
    "粉色": (250, 150, 190),
    "黑色": (25, 25, 25),
}
CELLS = 3  # a side has so many places, and so a picture nine
PLACES = {  # column, row
    "左上角": (0, 0),
    "右上角": (2, 0),
    "左下角": (0, 2),
    "右下角": (2, 2),
    "正中间": (1, 1),
}
PLACED = ["{place}有一{measure}{name}", "一{measure}{name}在{place}", "{name}画在{place}"]
NUMBERS = {2: "两", 3: "三", 4: "四"}
COUNTED = [
    "{number}{measure}{name}",
    "图里有{number}{measure}{name}",
    "这里画着{number}{measure}{name}",
]


class Pen:
    """Draws in a box of one thing: x and y from -1 to 1, y downwards."""

    def __init__(self, draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: tuple):
        self.draw, self.x, self.y, self.radius, self.color = draw, x, y, radius, color
        self.width = max(1, round(radius * 0.2))

    def at(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(self.x + self.radius * a, self.y + self.radius * b) for a, b in points]

    def fill(self, *points: tuple[float, float], color: tuple | None = None) -> None:
        self.draw.polygon(self.at(*points), fill=color or self.color)

    def line(self, *points: tuple[float, float]) -> None:
        self.draw.line(self.at(*points), fill=self.color, width=self.width, joint="curve")

    def disc(self, x: float, y: float, r: float, color: tuple | None = None) -> None:
        self.draw.ellipse(self.at((x - r, y - r), (x + r, y + r)), fill=color or self.color)

    def ring(self, x: float, y: float, r: float) -> None:
        self.draw.ellipse(
            self.at((x - r, y - r), (x + r, y + r)), outline=self.color, width=self.width
        )

    def arc(self, x: float, y: float, r: float, start: int, end: int) -> None:
        box = self.at((x - r, y - r), (x + r, y + r))
        self.draw.arc(box, start, end, fill=self.color, width=self.width)


def circle(pen: Pen) -> None:
    pen.disc(0, 0, 0.95)


def square(pen: Pen) -> None:
    pen.fill((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))


def triangle(pen: Pen) -> None:
    pen.fill((0, -0.95), (0.95, 0.8), (-0.95, 0.8))


def star(pen: Pen) -> None:
    points = []
    for i in range(10):
        r = 1.0 if i % 2 == 0 else 0.42
        points.append((r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)))
    pen.fill(*points)


def heart(pen: Pen) -> None:
    pen.disc(-0.45, -0.35, 0.52)
    pen.disc(0.45, -0.35, 0.52)
    pen.fill((-0.93, -0.15), (0.93, -0.15), (0, 0.95))


def cross(pen: Pen) -> None:
    pen.fill((-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95))
    pen.fill((-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3))


def house(pen: Pen) -> None:
    pen.line((-0.95, -0.1), (0, -0.95), (0.95, -0.1))
    pen.line((-0.7, -0.2), (-0.7, 0.85), (0.7, 0.85), (0.7, -0.2))
    pen.fill((-0.2, 0.85), (-0.2, 0.2), (0.25, 0.2), (0.25, 0.85))


def tree(pen: Pen) -> None:
    pen.fill((0, -1), (0.7, -0.1), (-0.7, -0.1))
    pen.fill((0, -0.5), (0.9, 0.5), (-0.9, 0.5))
    pen.fill((-0.15, 0.5), (0.15, 0.5), (0.15, 1), (-0.15, 1))


def fish(pen: Pen) -> None:
    pen.draw.ellipse(pen.at((-1, -0.55), (0.5, 0.55)), fill=pen.color)
    pen.fill((0.3, 0), (1, -0.6), (1, 0.6))
    pen.disc(-0.55, -0.12, 0.15, color=(255, 255, 255))


def umbrella(pen: Pen) -> None:
    pen.draw.pieslice(pen.at((-1, -0.9), (1, 1)), 180, 360, fill=pen.color)
    pen.line((0, 0), (0, 0.75))
    pen.arc(-0.25, 0.7, 0.3, 0, 180)


def smile(pen: Pen) -> None:
    pen.ring(0, 0, 0.98)
    pen.disc(-0.35, -0.25, 0.17)
    pen.disc(0.35, -0.25, 0.17)
    pen.arc(0, 0.1, 0.55, 20, 160)


def boat(pen: Pen) -> None:
    pen.fill((-1, 0.35), (1, 0.35), (0.6, 0.9), (-0.6, 0.9))
    pen.line((0, 0.4), (0, -0.95))
    pen.fill((0.15, -0.9), (0.85, 0.15), (0.15, 0.15))


THINGS = {  # name: how it is drawn, and its measure word
    "圆": (circle, "个"),
    "方块": (square, "个"),
    "三角形": (triangle, "个"),
    "五角星": (star, "颗"),
    "爱心": (heart, "颗"),
    "十字": (cross, "个"),
    "房子": (house, "座"),
    "小树": (tree, "棵"),
    "小鱼": (fish, "条"),
    "雨伞": (umbrella, "把"),
    "笑脸": (smile, "张"),
    "小船": (boat, "只"),
}


def name_of(color: str, thing: str) -> str:
    return f"{color}的{thing}"


def is_held_out(color: int, thing: int) -> bool:
    """Sixteen of the 96 pairs: two of every color, one or two of every thing."""
    return (thing - color) % 12 == 0 or (thing - color - 5) % 12 == 0


def draw(thing: str, color: str, cells: list[tuple[int, int]], time: int) -> Image.Image:
    """A thing in each of these places, each in its own way, and each time in another, a little off,
    larger and lighter."""
    chance = random.Random(f"{thing}{color}{cells}{time}")
    side = SIDE * FINE
    image = Image.new("RGB", (side, side), "white")
    surface = ImageDraw.Draw(image)
    shade = chance.randint(-12, 12)
    tint = tuple(min(255, max(0, channel + shade)) for channel in COLORS[color])
    for column, row in cells:
        x = (column + 0.5 + chance.uniform(-OFF, OFF)) * side / CELLS
        y = (row + 0.5 + chance.uniform(-OFF, OFF)) * side / CELLS
        radius = chance.uniform(0.4, 0.46) * side / CELLS
        THINGS[thing][0](Pen(surface, x, y, radius, tint))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX).quantize(16, dither=Image.Dither.NONE)


def some_cells(count: int, number: int) -> list[tuple[int, int]]:
    """So many of the nine places; others for each number."""
    cells = [(column, row) for row in range(CELLS) for column in range(CELLS)]
    return sorted(random.Random(f"{count} of {number}").sample(cells, count))


def pairs(held_out: bool, time: int = 0) -> list[tuple[str, Image.Image]]:
    """(caption, picture) of one side of the split; other pictures for each time."""
    found = []
    for c, color in enumerate(COLORS):
        for t, thing in enumerate(THINGS):
            if is_held_out(c, t) != held_out:
                continue
            words = {"name": name_of(color, thing), "measure": THINGS[thing][1]}
            for p, (place, cell) in enumerate(PLACES.items()):
                text = PLACED[(c + t + p) % len(PLACED)].format(place=place, **words)
                found.append((text, draw(thing, color, [cell], time)))
            for n, (count, number) in enumerate(NUMBERS.items()):
                text = COUNTED[(c + t + n) % len(COUNTED)].format(number=number, **words)
                cells = some_cells(count, 1000 * time + 12 * c + t)
                found.append((text, draw(thing, color, cells, time)))
    return found


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def write(folder: Path, split: str, first_id: int, found: list[tuple[str, Image.Image]]) -> None:
    texts = []
    pictures = []
    for i, (text, image) in enumerate(found):
        row = {"text_id": i, "text": text, "image_ids": [first_id + i]}
        texts.append(json.dumps(row, ensure_ascii=False) + "\n")
        data = base64.urlsafe_b64encode(png(image)).decode()
        pictures.append(f"{first_id + i}\t{data}\n")
    for name, lines in ((f"{split}_texts.jsonl", texts), (f"{split}_imgs.tsv", pictures)):
        (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, "train", 1000, pairs(held_out=False))
    write(folder, "train_2", 2000, pairs(held_out=False, time=1))
    write(folder, "valid", 9000, pairs(held_out=True))
    names = [name_of(color, thing) for color in COLORS for thing in THINGS]
    templates = [PLACED[2].format(place=place, name="{}") for place in PLACES]
    some = {"measure": "个", "name": "{}"}
    templates += [COUNTED[1].format(number=number, **some) for number in NUMBERS.values()]
    for name, lines in (("labels_cn.txt", names), ("templates_cn.txt", templates)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
