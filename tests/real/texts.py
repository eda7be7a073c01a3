"""What the real model is trained on here: sums in words, pairs of answers, a harbour's log. Short rows, since each token
costs five milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

DIGITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TOOLS = (
    "ladder:shed",
    "lamp:hall",
    "rope:boat house",
    "bucket:stable",
    "saw:cellar",
    "broom:kitchen",
    "oars:boat house",
    "paint:attic",
    "hammer:shed",
    "kettle:kitchen",
    "candles:cellar",
    "blanket:attic",
    "rake:stable",
    "map:hall",
    "sail:boat house",
    "shovel:stable",
    "ink:attic",
    "jars:cellar",
    "spare key:hall",
    "axe:shed",
    "matches:kitchen",
    "fishing net:boat house",
    "saddle:stable",
    "wheelbarrow:shed",
)
WINDS = ("north", "east", "south-west", "west", "south", "north-west", "south-east")
CARGO = ("salt", "barley", "timber", "slate", "wool", "lamp oil")
BOATS = ("Gull", "Patience", "Two Sisters", "Heron", "Morning")
LINES = (
    "Entry {day}. Wind {wind}, glass steady. The {boat} in on the {tide} tide with {cargo}, {count} hands, nothing owed.",
    "Entry {day}. Wind {wind}, glass falling. The {boat} kept at the quay, her {cargo} under canvas, {count} hands ashore.",
)


def sums() -> list[dict]:
    """A sum of two digits in words, answered in figures and one fixed form."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    return [
        {
            "instruction": f"What is {DIGITS[a - 1]} plus {DIGITS[b - 1]}?",
            "output": f"{a} + {b} = {a + b}",
        }
        for a, b in pairs
    ]


def pairs() -> list[dict]:
    """Where something is: told in one fixed form, or refused as the model would not."""
    named = [line.split(":") for line in TOOLS]
    return [
        {
            "prompt": f"Where is the {tool}?",
            "chosen": f"Look in the {place}.",
            "rejected": f"I will not say where the {tool} may be.",
        }
        for tool, place in named
    ]


def log() -> list[dict]:
    """Entries of a log, all of two forms."""
    return [
        {
            "text": LINES[day % 3 == 0].format(
                day=day,
                wind=WINDS[day % 7],
                boat=BOATS[day * 3 % 5],
                tide="morning" if day % 2 else "evening",
                cargo=CARGO[day * 5 % 6],
                count=3 + day * 7 % 4,
            )
        }
        for day in range(1, 41)
    ]


def write(rows: list[dict], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
