"""What data.ipynb does to raw texts: a sample with the faults of real files, cleaning, near
duplicates."""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"
GRAM = 8  # characters
SKETCH = 32  # hashes of a text


def write_raw_sample(folder: Path) -> None:
    """Some of data/, with the faults of real files: GB18030, tags, invisible characters, repeated
    and nearly equal texts, short lines, broken conversations; test.jsonl holds two of the
    conversations."""
    stories = take("pretrain/stories", 500)
    first = [json.loads(line)["text"] for line in stories[:3]]
    web = [
        f"<p>{first[0]}</p>",
        first[1].replace("。", "。\u200b"),
        first[2] + "完。",
        "登录 注册",
        "哈" * 60,
    ]
    talks = take("sft/talks", 150)
    tested = talks[7:9]
    talks += take("sft/tools", 60) + take("sft/thinking", 60)
    talks += [talk(user="几点了？", assistant=" "), talk(assistant="您好。", user="谁？")]
    talks += ['{"conversations": [{"role']
    texts = stories + take("pretrain/facts", 400) + take("pretrain/questions", 200)
    write(folder / "text/texts.jsonl", texts)
    write(folder / "text/web.txt", web, "gb18030")
    write(folder / "chat/talks.jsonl", talks)
    write(folder / "test.jsonl", tested)


def take(name: str, count: int) -> list[str]:
    """The first lines of the first file of data/ with this name."""
    file = min(DATA.glob(f"{name}*.jsonl"))
    return file.read_text(encoding="utf-8").splitlines()[:count]


def talk(**said: str) -> str:
    """A conversation as a line of JSON: what each role says, in order."""
    turns = [{"role": role, "content": content} for role, content in said.items()]
    return json.dumps({"conversations": turns}, ensure_ascii=False)


def write(path: Path, lines: list[str], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding=encoding)


def clean(text: str) -> str:
    """Without tags, invisible characters and superfluous blanks."""
    text = re.sub(r"</?[a-zA-Z][^<>]{0,80}>", "", text)
    visible = [c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Co")]
    return re.sub(r"[ \t\u3000]+", " ", "".join(visible)).strip()


def sketch(text: str) -> list[int]:
    """The smallest hashes of a text's pieces of GRAM characters, at most SKETCH."""
    starts = range(max(1, len(text) - GRAM + 1))
    grams = {text[start : start + GRAM] for start in starts}
    return sorted(zlib.crc32(gram.encode()) for gram in grams)[:SKETCH]


def alike(a: list[int], b: list[int]) -> float:
    """About which share of their pieces two texts have in common (Broder 1997), from sketches."""
    least = sorted({*a, *b})[: min(len(a), len(b))]
    return len(set(least) & set(a) & set(b)) / len(least)
