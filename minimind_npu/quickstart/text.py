"""The text of quickstart.py: synthetic Chinese sentences with something to learn, or files; cut
into windows of tokens.

Sums, days, opposites, provinces, orders, and names to carry along. What follows the last comma of a
synthetic sentence is decided by what stands before it, so that the model's ending is right or
wrong.
"""

import hashlib
import json
import random

import torch

from common import cli
from common.data.load import load_rows, summary
from common.data.spelling import encode_text
from common.data.split import describe_split, split_rows
from common.runs.generate import generate_answers

NAMES = ["小明", "小红", "李雷", "韩梅", "王芳", "张伟", "刘洋", "陈静", "阿强", "阿珍"]
FRUITS = ["苹果", "桃子", "橘子", "香蕉", "西瓜", "梨"]
DAYS = "一二三四五六日"
CITIES = {
    "成都": "四川",
    "杭州": "浙江",
    "南京": "江苏",
    "广州": "广东",
    "武汉": "湖北",
    "长沙": "湖南",
    "西安": "陕西",
    "济南": "山东",
    "福州": "福建",
    "昆明": "云南",
}
ANIMALS = {
    "猫": "鱼",
    "狗": "骨头",
    "兔子": "萝卜",
    "熊猫": "竹子",
    "猴子": "香蕉",
    "羊": "青草",
    "蜜蜂": "花蜜",
}
OPPOSITES = {
    "大": "小",
    "高": "矮",
    "快": "慢",
    "冷": "热",
    "轻": "重",
    "远": "近",
    "新": "旧",
    "黑": "白",
}
EVAL_RATIO = 0.05


# ---- sentences -----------------------------------------------------------------------------------


def _sum(rng: random.Random, name: str) -> str:
    a = rng.randint(1, 9)
    b = rng.randint(1, 9)
    fruit = rng.choice(FRUITS)
    return f"{name}有{a}个{fruit}，又买了{b}个，一共有{a + b}个{fruit}。"


def _rest(rng: random.Random, name: str) -> str:
    a = rng.randint(2, 18)
    b = rng.randint(1, a - 1)
    return f"{name}带了{a}元，花了{b}元，还剩{a - b}元。"


def _day(rng: random.Random, name: str) -> str:
    day = rng.randrange(7)
    return f"今天是星期{DAYS[day]}，明天是星期{DAYS[(day + 1) % 7]}。"


def _city(rng: random.Random, name: str) -> str:
    city = rng.choice(list(CITIES))
    return f"{name}住在{city}，{city}在{CITIES[city]}。"


def _animal(rng: random.Random, name: str) -> str:
    animal = rng.choice(list(ANIMALS))
    return f"{name}家有一只{animal}，{animal}爱吃{ANIMALS[animal]}。"


def _opposite(rng: random.Random, name: str) -> str:
    word, other = rng.choice(list(OPPOSITES.items()))
    if rng.random() < 0.5:
        word, other = other, word
    return f"老师问{name}{word}的反面，{name}答{other}。"


def _order(rng: random.Random, name: str) -> str:
    second, third = rng.sample([other for other in NAMES if other != name], 2)
    return f"{name}比{second}高，{second}比{third}高，最高的是{name}。"


SENTENCES = (_sum, _rest, _day, _city, _animal, _opposite, _order)


def documents(count: int, seed: int) -> list[str]:
    """`count` different documents of two to four sentences about one person; the same list for the
    same seed."""
    rng = random.Random(seed)
    found = {}
    while len(found) < count:
        name = rng.choice(NAMES)
        kinds = rng.sample(SENTENCES, rng.randint(2, 4))
        found["".join(sentence(rng, name) for sentence in kinds)] = True
    return list(found)


# ---- data ----------------------------------------------------------------------------------------


def read_text(args) -> tuple[list[str], list[str], dict]:
    """Documents to train on, held-out documents (5 %, none of them in the first list), and
    counts."""
    if args.data_path:
        rows, stats = load_rows(args.data_path, "text", seed=args.seed)
        cli.say(summary(stats))
        train_rows, eval_rows = split_rows(rows, EVAL_RATIO, 500, args.seed)
        for line in describe_split(rows, train_rows, eval_rows, EVAL_RATIO, 500):
            cli.say(line)
        train_texts = [json.loads(row)["text"] for row in train_rows["row"]]
        eval_texts = [json.loads(row)["text"] for row in eval_rows["row"]]
    else:
        texts = documents(args.num_samples, args.seed)
        cut = max(1, int(EVAL_RATIO * args.num_samples))
        train_texts = texts[cut:]
        eval_texts = texts[:cut]
        digest = hashlib.sha256("".join(texts).encode()).hexdigest()
        stats = {"read": len(texts), "dropped": {}, "sha256": digest}
    stats["used"] = len(train_texts)
    stats["held_out"] = len(eval_texts)
    return train_texts, eval_texts, stats


def windows(tokenizer, texts: list[str], length: int) -> torch.Tensor:
    """Documents end to end, each closed by the end token, cut into windows [N, T]; the rest at the
    end is left out."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for text in texts for token in (*encode_text(tokenizer, text), *end)]
    if len(ids) < length:
        raise SystemExit(
            f"{len(texts)} documents are {len(ids)} tokens, less than one window of {length}: "
            "give more text, or a smaller --max_length"
        )
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


# ---- what the model makes of it ------------------------------------------------------------------


def questions(texts: list[str], count: int) -> list[tuple[str, str]]:
    """The first sentence of some texts: (up to its last comma, what comes after)."""
    found = []
    for text in texts[:count]:
        sentence = text.split("。")[0][:100] + "。"
        cut = sentence.rfind("，") + 1 or len(sentence) // 2
        found.append((sentence[:cut], sentence[cut:]))
    return found


def endings(model, tokenizer, asked: list[tuple[str, str]]) -> tuple[list[str], float]:
    """(how the model ends each beginning, up to the full stop; the share that is right). All ranks
    call it."""
    prompts = [encode_text(tokenizer, beginning) for beginning, _ in asked]
    texts = generate_answers(model, tokenizer, prompts, 24)
    answers = [text.split("。")[0] + "。" for text in texts]
    right = [answer == wanted for answer, (_, wanted) in zip(answers, asked, strict=True)]
    return answers, sum(right) / len(asked)
