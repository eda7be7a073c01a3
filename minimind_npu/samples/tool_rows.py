"""Write conversations that use the tools of toolcall/tools.py, as many as asked for.

    python minimind_npu/samples/tool_rows.py rows.jsonl [NUMBER]          # default: 2,000

{"messages", "tools"}: up to three questions that need one call, two in one answer, two one after
the other (a price, then a sum), or no tool. What the tools say comes from the tools; prices are
drawn anew in every row, so that an answer has to be read. Nothing of data/eval/toolcall.jsonl
(`questions`) is among them: neither a question nor a word to look up (of 黄雨伞 both halves are, in
other words).
All sentences are our own; the same bytes every time.
"""

import json
import random
import sys
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the rooms beside this one
from samples.sample_facts import KINDS
from toolcall.registry import Registry
from toolcall.tools import COLOURS, PRICES, THINGS, built_in

from common.data.files import atomic_file

NUMBER = 2000
QUESTIONS = 3  # of a row: its tools take most of its tokens, and stand there once
LONG = 8  # messages after which a row gets no further question
TRIES = 20  # questions drawn until one is new and needs no other tool
PLAIN = ("capital", "province", "opposite", "colour", "measure", "season", "sum", "minus")


class Talk:
    """A conversation that grows; what tools say comes from a registry.

    needs: names of the tools that were called.
    """

    def __init__(self, question: str, registry: Registry):
        self.registry = registry
        self.messages = [{"role": "user", "content": question}]
        self.needs: list[str] = []

    @property
    def question(self) -> str:
        return self.messages[0]["content"]

    def call(self, *calls: tuple[str, dict]) -> list[dict]:
        """One answer with these calls; -> what the tools gave."""
        made = []
        results = []
        for name, arguments in calls:
            function = {"name": name, "arguments": arguments}
            made.append({"type": "function", "function": function})
            results.append(self.registry.call(name, arguments))
            self.needs.append(name)
        self.messages.append({"role": "assistant", "content": "", "tool_calls": made})
        self.messages += [{"role": "tool", "content": result} for result in results]
        return [json.loads(result) for result in results]

    def say(self, answer: str) -> "Talk":
        self.messages.append({"role": "assistant", "content": answer})
        return self


def held_out_words() -> list[str]:
    """Of each thing one colour that only data/eval/ looks up."""
    colours = list(COLOURS)[1:]
    return [colours[i % len(colours)] + thing for i, thing in enumerate(THINGS)]


# ---- kinds of questions --------------------------------------------------------------------------
#
# Each takes (random numbers, words to look up, registry) and gives a Talk.


def sums(rng: random.Random, words: list[str], registry: Registry) -> Talk:
    a = rng.randint(11, 99)
    b = rng.randint(11, 99)
    c = rng.randint(2, 99)
    asked, expression = rng.choice(
        [
            (f"{a}乘{b}", f"{a}*{b}"),
            (f"{a}加{b}", f"{a}+{b}"),
            (f"{max(a, b)}减{min(a, b)}", f"{max(a, b)}-{min(a, b)}"),
            (f"{a * c}除以{c}", f"{a * c}/{c}"),
            (f"{a}乘{b}再加{c}", f"{a}*{b}+{c}"),
            (f"{a}加{b}再乘{c}", f"({a}+{b})*{c}"),
        ]
    )
    frame = rng.choice(["{}等于几？", "请算一算{}。", "{}是多少？", "算一下{}。"])
    talk = Talk(frame.format(asked), registry)
    (found,) = talk.call(("calculator", {"expression": expression}))
    return talk.say(f"{asked}等于{found['result']}。")


def dates(rng: random.Random, words: list[str], registry: Registry) -> Talk:
    start = date(2000, 1, 1).toordinal() + rng.randrange(12000)
    day = date.fromordinal(start)
    said = f"{day.year}年{day.month}月{day.day}日"
    days = rng.randint(2, 99)
    arguments = {"date": f"{day.year}-{day.month}-{day.day}"}
    kind = rng.randrange(3)
    if kind == 0:
        talk = Talk(rng.choice(["{}是星期几？", "请问{}是星期几？"]).format(said), registry)
        (found,) = talk.call(("date", arguments))
        return talk.say(f"是{found['weekday']}。")
    frames = ["{}再过{}天是哪天？", "从{}开始，过{}天是几月几日？"]
    if kind == 2:
        frames = ["{}的前{}天是哪天？", "从{}往回数{}天是几月几日？"]
    talk = Talk(rng.choice(frames).format(said, days), registry)
    (found,) = talk.call(("date", arguments | {"days": -days if kind == 2 else days}))
    year, month, day = found["date"].split("-")
    return talk.say(f"是{year}年{month}月{day}日。")


# from the larger to the smaller, so that amounts stay whole
STEPS = (("千米", "米"), ("米", "厘米"), ("吨", "千克"), ("千克", "克"))
STEPS += (("天", "小时"), ("小时", "分钟"), ("分钟", "秒"))


def amounts(rng: random.Random, words: list[str], registry: Registry) -> Talk:
    unit, to = rng.choice(STEPS)
    value = rng.randint(2, 99)
    frame = rng.choice(["{}{}等于多少{}？", "{}{}是多少{}？", "把{}{}换成{}。"])
    talk = Talk(frame.format(value, unit, to), registry)
    (found,) = talk.call(("units", {"value": value, "unit": unit, "to": to}))
    return talk.say(f"{value}{unit}等于{found['value']}{to}。")


def prices(rng: random.Random, words: list[str], registry: Registry) -> Talk:
    word = rng.choice(words)
    frame = rng.choice(["{}多少钱？", "查一下{}的价钱。", "请问{}怎么卖？"])
    talk = Talk(frame.format(word), registry)
    (found,) = talk.call(("lookup", {"key": word}))
    return talk.say(f"{word}{found[word]}元。")


def two_prices(rng: random.Random, words: list[str], registry: Registry) -> Talk:
    one, other = rng.sample(words, 2)
    frame = rng.choice(["{}和{}各多少钱？", "查一下{}和{}的价钱。"])
    talk = Talk(frame.format(one, other), registry)
    found = talk.call(("lookup", {"key": one}), ("lookup", {"key": other}))
    return talk.say(f"{one}{found[0][one]}元，{other}{found[1][other]}元。")


def costs(rng: random.Random, words: list[str], registry: Registry) -> Talk:
    """A price, and then what several cost."""
    word = rng.choice(words)
    number = rng.randint(2, 99)
    frame = rng.choice(["买{}份{}要多少钱？", "{}份{}一共多少钱？"])
    talk = Talk(frame.format(number, word), registry)
    (found,) = talk.call(("lookup", {"key": word}))
    (found,) = talk.call(("calculator", {"expression": f"{number}*{found[word]}"}))
    return talk.say(f"一共{found['result']}元。")


def plain(rng: random.Random, words: list[str], registry: Registry) -> Talk:
    """What the model knows by itself."""
    kind = KINDS[rng.choice(PLAIN)]
    fact = rng.choice(kind.facts)
    return Talk(rng.choice(kind.asks).format(**fact), registry).say(kind.answer.format(**fact))


MIX = [sums] * 4 + [dates] * 4 + [amounts] * 3 + [prices] * 2 + [two_prices] * 2 + [costs] * 3
MIX += [plain] * 5


# ---- rows ----------------------------------------------------------------------------------------


def shown_tools(rng: random.Random, talk: Talk) -> list[dict]:
    """The tools it needs, sometimes others; in any order."""
    schemas = {schema["function"]["name"]: schema for schema in talk.registry.schemas}
    needed = sorted(set(talk.needs))
    others = [name for name in schemas if name not in needed]
    names = needed + rng.sample(others, rng.randint(0 if needed else 1, 1))
    return [schemas[name] for name in rng.sample(names, len(names))]


def questions(number: int = 108) -> list[dict]:
    """data/eval/toolcall.jsonl: no question twice, prices as they are."""
    rng = random.Random("held out")
    registry = built_in()
    words = held_out_words()
    found: dict[str, dict] = {}
    while len(found) < number:
        for make in rng.sample(MIX, len(MIX)):
            talk = make(rng, words, registry)
            if talk.question not in found:
                row = {"messages": talk.messages, "tools": shown_tools(rng, talk)}
                found[talk.question] = row
    return list(found.values())[:number]


class Author:
    """Writes rows to train on, no question twice and none of the held-out ones."""

    def __init__(self):
        self.rng = random.Random("tools")
        self.words = sorted(PRICES.keys() - set(held_out_words()))
        self.table = dict(PRICES)
        self.registry = built_in(self.table)
        self.asked = {row["messages"][0]["content"] for row in questions()}

    def talk(self, names: set[str]) -> Talk | None:
        """About something new that these tools are enough for; None where it finds nothing."""
        for _ in range(TRIES):
            talk = self.rng.choice(MIX)(self.rng, self.words, self.registry)
            if talk.question not in self.asked and names.issuperset(talk.needs):
                self.asked.add(talk.question)
                return talk
        return None

    def rows(self) -> Iterator[dict]:
        while True:
            self.table.update({word: self.rng.randint(2, 99) for word in PRICES})
            first = self.talk(set(self.registry.tools))
            if first is None:
                continue
            tools = shown_tools(self.rng, first)
            names = {tool["function"]["name"] for tool in tools}
            messages = first.messages
            for _ in range(QUESTIONS - 1):
                talk = self.talk(names) if len(messages) < LONG else None
                messages = messages + (talk.messages if talk else [])
            yield {"messages": messages, "tools": tools}


def rows(number: int = NUMBER) -> list[dict]:
    return list(islice(Author().rows(), number))


def main() -> None:
    path = Path(sys.argv[1])
    number = int(sys.argv[2]) if len(sys.argv) > 2 else NUMBER
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        for row in rows(number):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{number:,} rows {path}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"python {sys.argv[0]} FILE [NUMBER]")
    main()
