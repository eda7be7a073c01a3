"""Write the sample data of this recipe: python make_data.py [FOLDER]   (default: data/ beside this file)

One file per task, each in one of the row shapes that people have; the file name is the task's name in the report.
Every fact is asked in several ways, so that a phrasing that was held out can be answered from the others.
All sentences are our own, and nothing is random: the same bytes every time.
"""

import json
import sys
from itertools import product
from pathlib import Path

DIGITS = "零一二三四五六七八九"
NAME = "我是小丹，丹谱的演示助手。"
MAKER = "我是丹谱用示例数据训练出来的。"
SKILL = "我会算简单的加法，会换算单位，也会介绍自己。"

NAME_ASKED = """
你是谁|你是谁呀|请问你是谁|你到底是谁|告诉我你是谁|你好，你是谁|嗨，你是谁|能说说你是谁吗|我想知道你是谁|你究竟是谁
你叫什么|你叫什么名字|请问你叫什么名字|你的名字叫什么|你的名字是什么|你叫啥|你叫啥名字|你的名字是啥|告诉我你的名字|说出你的名字
请说一下你的名字|你有名字吗|能告诉我你的名字吗|我该怎么称呼你|怎么称呼你|该怎么称呼你呢|请问怎么称呼|我可以怎么称呼你|你希望别人怎么称呼你|大家怎么称呼你
介绍一下你自己|请介绍一下你自己|介绍一下自己吧|请做个自我介绍|做一下自我介绍|来个自我介绍|先自我介绍一下吧|用一句话介绍你自己|简单介绍一下你自己|请你介绍自己
你是什么助手|你是哪个助手|你是哪一个助手|请问你是什么助手|你的身份是什么|请说明你的身份|你是什么身份|告诉我你的身份|我在和谁说话|现在和我说话的是谁
我在跟谁聊天|和我聊天的是谁|你是小丹吗|你就是小丹吗|请问你是小丹吗
"""
MAKER_ASKED = """
谁训练了你|是谁训练了你|你是谁训练的|你是谁训练出来的|请问谁训练了你|你是怎么训练出来的|你由谁训练|谁开发了你|是谁开发了你|你是谁开发的|你是谁开发出来的
请问谁开发了你|你由谁开发|谁制造了你|是谁制造了你|你是谁制造的|你是谁制造出来的|你是谁做出来的|是谁把你做出来的|谁把你做出来的|你是谁做的|谁设计了你
是谁设计了你|你是谁设计的|你是谁设计出来的|你是怎么来的|请问你是怎么来的|你是怎么做出来的
"""
SKILL_ASKED = """
你会什么|你都会什么|请问你会什么|你会做什么|你会做些什么|你能做什么|你能做些什么|请问你能做什么|你能干什么|你会干什么|说说你会什么|说说你能做什么
你有什么本领|说说你的本领|介绍一下你的本领|你的本领是什么|你有哪些本领|你有什么功能|说说你的功能|你有哪些功能|介绍一下你的功能|你的功能是什么
你能帮我做什么|你可以帮我做什么|说说你能帮我做什么
"""

SUM_DIGITS = [
    "{}加{}等于几？",
    "请算一算{}加{}。",
    "{}+{}=？",
    "{}和{}的和是多少？",
    "把{}和{}加起来是多少？",
]
SUM_WORDS = ["{}加{}等于几？", "请算一算{}加{}。", "{}与{}相加得多少？"]

UNITS = [
    ("千米", "米", 1000),
    ("米", "厘米", 100),
    ("小时", "分钟", 60),
    ("分钟", "秒", 60),
    ("元", "角", 10),
    ("角", "分", 10),
    ("千克", "克", 1000),
    ("吨", "千克", 1000),
    ("升", "毫升", 1000),
    ("星期", "天", 7),
    ("年", "个月", 12),
]
UNIT_ASKED = [
    "{n}{big}是多少{small}？",
    "{n}{big}等于几{small}？",
    "把{n}{big}换算成{small}。",
    "{n}{big}合多少{small}？",
]

OPPOSITES = [
    "大小",
    "多少",
    "高低",
    "长短",
    "冷热",
    "快慢",
    "新旧",
    "远近",
    "轻重",
    "好坏",
    "左右",
    "黑白",
]
OPPOSITE_ASKED = ["写出下面这个词的反义词。", "请给出这个词的反义词。", "这个词的反义词是什么？"]

SYSTEMS = [
    ("回答之前先说“好的”。", "好的，{}"),
    ("你是小学老师，回答之后要鼓励学生。", "{}你真棒！"),
    ("请用“报告”开头来回答。", "报告，{}"),
]

CITIES = ["北京", "上海", "广州", "成都"]
WEATHERS = ["晴", "多云", "小雨", "大雪"]
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "查天气",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def phrases(block: str) -> list[str]:
    return [p for line in block.split() for p in line.split("|")]


def total(a: int, b: int) -> str:
    return f"{a}加{b}等于{a + b}。"


def chat(*turns: str, system: str = "") -> dict:
    """Turns alternate user, assistant."""
    head = [{"role": "system", "content": system}] if system else []
    return {
        "messages": head
        + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    }


def pick(options: list, start: int, count: int) -> list:
    """`count` neighbours in a ring, so that all options turn up equally often."""
    return [options[(start + i) % len(options)] for i in range(count)]


def identity() -> list[dict]:
    """messages: who the model is, who made it, what it can do."""
    asked = [(NAME_ASKED, NAME), (MAKER_ASKED, MAKER), (SKILL_ASKED, SKILL)]
    return [
        chat(q + "？" * (i % 2), answer)
        for block, answer in asked
        for i, q in enumerate(phrases(block))
    ]


def sums() -> list[dict]:
    """alpaca without input: every a + b of 0..9, in digits and in words."""
    rows = []
    for a in range(10):
        for b in range(10):
            for ask in pick(SUM_DIGITS, 3 * a + b, 3):
                rows.append({"instruction": ask.format(a, b), "input": "", "output": total(a, b)})
            answer = f"{DIGITS[a]}加{DIGITS[b]}等于{a + b}。"
            for ask in pick(SUM_WORDS, a + 2 * b, 1 + (a <= b)):
                rows.append(
                    {"instruction": ask.format(DIGITS[a], DIGITS[b]), "input": "", "output": answer}
                )
    return rows


def units() -> list[dict]:
    """ask/answer: whole numbers of a big unit in a small one."""
    return [
        {"ask": ask.format(n=n, big=big, small=small), "answer": f"{n}{big}是{n * by}{small}。"}
        for u, (big, small, by) in enumerate(UNITS)
        for n in range(1, 6)
        for ask in pick(UNIT_ASKED, u + n, 3)
    ]


def opposites() -> list[dict]:
    """alpaca with input."""
    pairs = [p for pair in OPPOSITES for p in (pair, pair[::-1])]
    return [
        {"instruction": ask, "input": a, "output": f"反义词是“{b}”。"}
        for i, (a, b) in enumerate(pairs)
        for ask in OPPOSITE_ASKED
    ]


def threads() -> list[dict]:
    """ShareGPT: the second question only makes sense after the first answer."""
    talks = []
    for i in range(30):
        a, b, c = i % 6, i // 6, 1 + (i + i // 6) % 3
        talks.append([f"先算{a}加{b}。", total(a, b), f"再加{DIGITS[c]}呢？", total(a + b, c)])
    for u, (big, small, by) in enumerate(UNITS):
        for n in (1 + u % 5, 1 + (u + 2) % 5):
            m = 1 + (n + 1) % 5
            first = [f"{n}{big}有多少{small}？", f"{n}{big}是{n * by}{small}。"]
            talks.append([*first, f"那{m}{big}呢？", f"{m}{big}是{m * by}{small}。"])
    who = ("human", "gpt")
    return [
        {"conversations": [{"from": who[i % 2], "value": t} for i, t in enumerate(talk)]}
        for talk in talks
    ]


def mixed() -> list[dict]:
    """messages: two to four questions that have nothing to do with each other, in words that stand nowhere else (a
    question held out elsewhere must not be answered here)."""
    names = [
        "你是哪位？",
        "报一下你的名字。",
        "顺便问一句，你是谁？",
        "对了，怎么叫你？",
        "再说一遍你是谁。",
    ]
    asked = []
    for i in range(320):
        a, b, n = 3 * i % 10, (i + i // 10) % 10, 1 + i % 5
        big, small, by = UNITS[i % len(UNITS)]
        asked.append([
            (f"{a}加{b}得几？", total(a, b)),
            (f"{n}{big}等于多少{small}？", f"{n}{big}是{n * by}{small}。"),
            (f"算一下{b}+{a}。", total(b, a)),
            (names[i // 4 % len(names)], NAME),
        ][i % 4])  # fmt: skip
    rows, start = [], 0
    for i in range(100):
        count = 2 + i % 3
        turns = [asked[(start + 7 * j) % len(asked)] for j in range(count)]
        rows.append(chat(*(text for turn in turns for text in turn)))
        start += count
    return rows


def systems() -> list[dict]:
    """messages with a system prompt that changes the answer's form."""
    rows = []
    for i in range(42):
        system, form = SYSTEMS[i // 14]
        a, b = 3 * i % 10, (7 * i + i // 10) % 10
        rows.append(chat(f"{a}加上{b}是几？", form.format(total(a, b)), system=system))
    return rows


def thinking() -> list[dict]:
    """messages with reasoning: two sums, one after the other."""
    rows = []
    for i in range(48):
        a, b, c = 1 + i % 4, 1 + i // 4 % 4, 1 + (i + i // 16) % 5
        ask = ["{}加{}再加{}，一共是多少？", "想一想，{}、{}、{}三个数的和是多少？"][i % 2]
        row = chat(ask.format(a, b, c), f"一共是{a + b + c}。")
        row["messages"][-1]["reasoning_content"] = f"先算{total(a, b)}再算{total(a + b, c)}"
        rows.append(row)
    return rows


def tools() -> list[dict]:
    """messages with a tool: call it, then say what it returned."""
    rows = []
    asked = ["{}今天天气怎么样？", "查一下{}的天气。", "{}现在是什么天气？"]
    for city, sky, ask in product(CITIES, WEATHERS, asked):
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        turns = [
            {"role": "user", "content": ask.format(city)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": sky},
            {"role": "assistant", "content": f"{city}今天{sky}。"},
        ]
        rows.append({"messages": turns, "tools": [WEATHER_TOOL]})
    return rows


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for make in (identity, sums, units, opposites, threads, mixed, systems, thinking, tools):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make()]
        (folder / f"{make.__name__}.jsonl").write_text(
            "".join(lines), encoding="utf-8", newline="\n"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
