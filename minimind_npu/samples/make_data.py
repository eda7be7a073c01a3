"""Write the sample data of this recipe.

    python minimind_npu/samples/make_data.py [FOLDER]         # default: minimind_npu/data

    pretrain/           {"text"}: sums, facts, questions with answers, stories with questions
    sft/                {"conversations"}: the same facts asked in other words, several turns,
                        systems, thoughts, tools
    dpo.jsonl           {"chosen", "rejected"}: polite and right against rude, unwilling or wrong
    reason.jsonl        {"conversations"} whose answers think first:
                        <think>…</think>\\n<answer>…</answer>
    lora_identity.jsonl, lora_plants.jsonl      another name; a small subject of its own
    rl/sums.jsonl       {"question", "answer"}: sums asked in ways that stand nowhere else, for
                        train_rl.py
    eval/               held_out.txt, ceval/*_val.csv, choice.jsonl, gsm.jsonl, toolcall.jsonl
                        (tool_rows.py): nothing of it stands in the files above

Everything is true or made up by us. A fact is said in several ways in pretrain/ and asked in other
ways in sft/, so that a question that was held out can be answered from the others. All sentences
are our own; the same bytes every time.
"""

import csv
import json
import random
import sys
from collections.abc import Iterator
from functools import cache
from itertools import count, islice, product
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE)]
from samples import tool_rows
from samples.sample_facts import (
    ACTS,
    CARE,
    CITIES,
    FACTS,
    FEELS,
    FOUND,
    GET,
    GIVE,
    KINDS,
    OTHER_WHO,
    PEOPLE,
    PLACES,
    PLANTS,
    POLITE,
    RUDE,
    SELF,
    SKIES,
    SUMS,
    SYSTEMS,
    THINGS,
    TIMES,
    UNWILLING,
    WEATHERS,
    WEEK,
    WHO,
    Kind,
    additions,
    differences,
    in_words,
    lines,
)

LIMIT = 240 * 1024  # bytes of one file

# ---- tools of making -----------------------------------------------------------------------------


def deck(rng: random.Random, options: list) -> Iterator:
    """The options in a random order, again and again, so that all turn up equally often."""
    while True:
        yield from rng.sample(options, len(options))


def pick(options: list, start: int, number: int) -> list:
    """`number` neighbours in a ring."""
    return [options[(start + i) % len(options)] for i in range(min(number, len(options)))]


def answer(kind: Kind, fact: dict) -> str:
    return kind.answer.format(**fact)


def others(rng: random.Random, kind: Kind, fact: dict, number: int) -> list:
    """Different wrong values of z; of a number those near it."""
    right = str(fact["z"])
    if not right.isdigit():
        values = sorted({one["z"] for one in kind.facts})
        return rng.sample([z for z in values if z != right], number)
    values = [str(n) for n in range(19) if str(n) != right]
    near = sorted(values, key=lambda z: abs(int(z) - int(right)))
    return rng.sample(near[: 2 * number], number)


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def chat(*texts: str, system: str = "", thought: str = "") -> dict:
    """Texts alternate user, assistant; the thought belongs to the last answer."""
    turns = [turn("system", system)] if system else []
    turns += [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    if thought:
        turns[-1]["reasoning_content"] = thought
    return {"conversations": turns}


# ---- word problems and two steps -----------------------------------------------------------------


class Problem(NamedTuple):
    asked: str
    step: str
    said: str
    value: int


def problem(frame: str, person: str, thing: tuple, a: int, b: int) -> Problem:
    """One step; a - b where the frame gives away."""
    name, measure = thing
    if frame in GET:
        z = a + b
        step = f"{a}加{b}等于{z}"
        said = f"一共有{z}{measure}"
    else:
        z = a - b
        step = f"{a}减{b}等于{z}"
        said = f"还剩{z}{measure}"
    return Problem(frame.format(n=person, o=name, m=measure, a=a, b=b), step, said, z)


def problems(seed: str) -> Iterator[Problem]:
    """Endless; every pair of numbers equally often."""
    rng = random.Random(seed)
    numbers = deck(rng, list(product(range(1, 10), repeat=2)))
    frames = deck(rng, GET + GIVE)
    people = deck(rng, PEOPLE)
    things = deck(rng, THINGS)
    while True:
        a, b = next(numbers)
        frame = next(frames)
        if frame in GIVE and b > a:
            a, b = b, a
        yield problem(frame, next(people), next(things), a, b)


def three(rng: random.Random) -> tuple[str, str, str]:
    """Three numbers -> (question without frame, thought, result); the first two make at most nine."""
    a = rng.randint(1, 8)
    b = rng.randint(1, 9 - a)
    c = rng.randint(1, 9)
    first = f"先算{a}加{b}等于{a + b}。"
    if rng.random() < 0.5 and c <= a + b:
        z = a + b - c
        return f"{a}加{b}再减{c}", f"{first}再算{a + b}减{c}等于{z}。", str(z)
    z = a + b + c
    return f"{a}加{b}再加{c}", f"{first}再算{a + b}加{c}等于{z}。", str(z)


def days_on(start: int, shift: int) -> tuple[str, str, str]:
    """-> (question, thought that goes day by day, answer)."""
    days = "零一两三四五"
    steps = "".join(f"过{days[i]}天是星期{WEEK[(start + i) % 7]}。" for i in range(1, shift + 1))
    asked = f"今天是星期{WEEK[start]}，过{days[shift]}天是星期几？"
    return asked, f"今天是星期{WEEK[start]}。{steps}", f"星期{WEEK[(start + shift) % 7]}"


def two_steps(rng: random.Random) -> tuple[str, str, str]:
    """A word problem that adds and then gives away."""
    a = rng.randint(1, 8)
    b = rng.randint(1, 9 - a)
    c = rng.randint(1, a + b)
    person = rng.choice(PEOPLE)
    thing, measure = rng.choice(THINGS)
    asked = f"{person}有{a}{measure}{thing}，又买了{b}{measure}，送给朋友{c}{measure}，还剩几{measure}？"
    left = a + b - c
    thought = f"先算{a}加{b}等于{a + b}。再算{a + b}减{c}等于{left}。"
    return asked, thought, f"{left}{measure}"


# ---- pretrain/ -----------------------------------------------------------------------------------


class Scene(NamedTuple):
    who: str
    friend: str
    time: str
    place: str
    thing: str
    measure: str
    feel: str


def found(s: Scene, rng: random.Random) -> str:
    return (
        f"{s.time}，{rng.choice(SKIES)}。{s.who}和{s.friend}去{s.place}，看见一{s.measure}{s.thing}。"
        f"{s.who}很{s.feel}，{rng.choice(ACTS)}，说：“{s.friend}，你看那{s.measure}{s.thing}！”"
    )


def lost(s: Scene, rng: random.Random) -> str:
    return (
        f"{s.time}，{s.who}的{s.thing}不见了。{s.friend}说：“{s.who}，别着急，我帮你找。”"
        f"最后{s.who}和{s.friend}在{s.place}看见了那{s.measure}{s.thing}。{s.who}很{s.feel}，说：“谢谢你，{s.friend}。”"
    )


def gift(s: Scene, rng: random.Random) -> str:
    return (
        f"{s.time}，{s.who}去{s.place}，买了一{s.measure}{s.thing}，送给{s.friend}。"
        f"{s.friend}很{s.feel}，{rng.choice(ACTS)}，说：“{s.who}，我最喜欢{s.thing}了！”"
    )


ABOUT = [  # what can be asked about every story
    ("故事里的{s.who}和谁是朋友？", "{s.who}和{s.friend}是朋友。"),
    ("{s.who}到了哪里？", "{s.who}到了{s.place}。"),
    ("故事里有什么东西？", "故事里有一{s.measure}{s.thing}。"),
    ("这是什么时候的事？", "这是{s.time}的事。"),
]


def scene(rng: random.Random) -> Scene:
    who, friend = rng.sample(PEOPLE, 2)
    thing, measure = rng.choice(FOUND)
    time = rng.choice(TIMES)
    place = rng.choice(PLACES)
    return Scene(who, friend, time, place, thing, measure, rng.choice(FEELS))


def stories(seed: str) -> Iterator[str]:
    """Endless; most end with questions about what was told."""
    rng = random.Random(seed)
    for i in count():
        now = scene(rng)
        text = (found, lost, gift)[i % 3](now, rng)
        for asked, said in rng.sample(ABOUT, (0, 2, 3, 3)[i // 3 % 4]):
            text += f"\n问：{asked.format(s=now)}答：{said.format(s=now)}"
        yield text


def decks(rng: random.Random, names) -> dict:
    return {name: deck(rng, KINDS[name].facts) for name in names}


def statements(seed: str, names) -> Iterator[str]:
    """Endless; five to eight sentences about one kind of thing, or about anything."""
    rng = random.Random(seed)
    facts = decks(rng, names)
    kinds = deck(rng, [name for name in names for _ in KINDS[name].facts])
    for i in count():
        name = next(kinds)
        sentences = []
        for _ in range(rng.randint(5, 8)):
            name = next(kinds) if i % 2 else name
            kind = KINDS[name]
            frames = [kind.answer] * 2 + kind.says
            sentences.append(rng.choice(frames).format(**next(facts[name])))
        yield "".join(sentences)


def quizzes(seed: str) -> Iterator[str]:
    """Endless; questions of all kinds with their answers, some about who the model is."""
    rng = random.Random(seed)
    facts = decks(rng, KINDS)
    kinds = deck(rng, [name for name in KINDS for _ in KINDS[name].facts])
    tasks = problems(seed + "+")
    selves = deck(rng, lines(SELF))
    for i in count():
        parts = []
        for _ in range(rng.randint(3, 5)):
            name = next(kinds)
            kind = KINDS[name]
            fact = next(facts[name])
            parts.append(f"问：{rng.choice(kind.quiz).format(**fact)}答：{answer(kind, fact)}")
        if i % 2:
            task = next(tasks)
            parts.append(f"题：{task.asked}答：{task.step}，{task.said}。")
        if i % 4 == 0:
            parts.append("".join(islice(selves, 3)))
        yield "\n".join(rng.sample(parts, len(parts)))


def chains(seed: str) -> Iterator[str]:
    """Endless; sums that go on from one another, days, rows of numbers."""
    rng = random.Random(seed)
    for i in count():
        parts = []
        for _ in range(2):
            asked, thought, value = three(rng)
            parts.append(f"{asked}得多少？{thought}得{value}。")
        asked, thought, left = two_steps(rng)
        parts.append(f"题：{asked}{thought}还剩{left}。")
        if i % 2:
            asked, thought, day = days_on(rng.randrange(7), rng.randint(2, 4))
            parts.append(f"{asked}{thought}所以是{day}。")
        if i % 4 == 0:
            start = rng.randrange(20)
            spell = rng.choice((str, in_words))
            numbers = range(start, start + rng.randint(5, 9))
            parts.append("数一数：" + "、".join(spell(n) for n in numbers) + "。")
        yield "\n".join(rng.sample(parts, len(parts)))


def records(seed: str) -> Iterator[str]:
    """Endless; data as JSON, then as a sentence."""
    rng = random.Random(seed)
    while True:
        parts = []
        for _ in range(rng.randint(3, 4)):
            kind = rng.choice(["weather", "clock", "multiply"])
            _, arguments, result, said = used(rng, kind, rng.randrange(99))
            parts.append(json.dumps(arguments | result, ensure_ascii=False) + "\n" + said)
        yield "\n".join(parts)


PRETRAIN = {  # name -> (documents, bytes to fill)
    "stories": (stories, 230_000),
    "sums_1": (lambda seed: statements(seed, SUMS), 110_000),
    "sums_2": (lambda seed: statements(seed, SUMS), 110_000),
    "facts_1": (lambda seed: statements(seed, FACTS), 120_000),
    "facts_2": (lambda seed: statements(seed, FACTS), 120_000),
    "questions_1": (quizzes, 230_000),
    "questions_2": (quizzes, 230_000),
    "questions_3": (quizzes, 200_000),
    "chains": (chains, 160_000),
    "records": (records, 60_000),
}


def documents(name: str) -> list[dict]:
    make, room = PRETRAIN[name]
    rows = []
    seen = set()
    for text in make(name):
        if text not in seen:
            seen.add(text)
            row = {"text": text}
            rows.append(row)
            room -= len(spelled(row).encode())
        if room < 0:
            return rows


# ---- sft/ ----------------------------------------------------------------------------------------

# questions per fact; of the others 6
OFTEN = {"sum": 6, "minus": 6, "sum_words": 3, "minus_words": 3, "compare": 2}


def asked_facts(names) -> list[dict]:
    rows = []
    for name in names:
        kind = KINDS[name]
        for i, fact in enumerate(kind.facts):
            for ask in pick(kind.asks, 3 * i, OFTEN.get(name, 6)):
                rows.append(chat(ask.format(**fact), answer(kind, fact)))
    return rows


def identity() -> list[dict]:
    rows = []
    for said, block in WHO.items():
        asked = [question for line in lines(block) for question in line.split("|")]
        for i, question in enumerate(asked):
            rows.append(chat(question + "？" * (i % 2), said))
    return rows


@cache
def problems_of_pretraining() -> set[str]:
    texts = [row["text"] for name in PRETRAIN for row in documents(name)]
    return {task.partition("？")[0] + "？" for text in texts for task in text.split("题：")[1:]}


def word_problems(number: int = 420) -> list[dict]:
    fresh = (p for p in problems("sft") if p.asked not in problems_of_pretraining())
    return [chat(p.asked, f"{p.step}，{p.said}。") for p in islice(fresh, number)]


def follow_ups() -> list[dict]:
    """Two or three turns; the later questions name only another x."""
    rng = random.Random("follow-ups")
    rows = []
    for kind in KINDS.values():
        for i, fact in enumerate(kind.facts if kind.more else []):
            for k in range(2):
                talk = [kind.talk[(i + k) % len(kind.talk)].format(**fact), answer(kind, fact)]
                for other in rng.sample([f for f in kind.facts if f != fact], 1 + k):
                    talk += [rng.choice(kind.more).format(**other), answer(kind, other)]
                rows.append(chat(*talk))
    return rows


def running_sums(number: int = 120) -> list[dict]:
    """The second sum goes on from the first result."""
    rng = random.Random("running")
    rows = []
    for _ in range(number):
        a = rng.randint(1, 8)
        b = rng.randint(1, 9 - a)
        c = rng.randint(1, 9)
        first = [rng.choice(KINDS["sum"].talk).format(x=a, y=b), f"{a}加{b}等于{a + b}。"]
        rows.append(chat(*first, f"再加{c}呢？", f"{a + b}加{c}等于{a + b + c}。"))
    return rows


def readings(number: int = 300) -> list[dict]:
    """A short story in the question."""
    rng = random.Random("readings")
    rows = []
    for i in range(number):
        now = scene(rng)
        story = (
            f"{now.time}，{now.who}和{now.friend}去{now.place}，看见一{now.measure}{now.thing}。"
        )
        asked, said = [
            (f"{now.who}和谁在一起？", f"{now.who}和{now.friend}在一起。"),
            (f"{now.who}去了哪里？", f"{now.who}去了{now.place}。"),
            (f"{now.who}看见了什么？", f"{now.who}看见了一{now.measure}{now.thing}。"),
        ][i % 3]
        rows.append(chat(story + asked, said))
    return rows


POLITELY = ["麻烦问一下，{}", "我有个问题，{}"]  # stand nowhere else


def plain_question(rng: random.Random, name: str, fact: dict) -> str:
    return rng.choice(KINDS[name].asks).format(**fact)


def systems(number: int = 260) -> list[dict]:
    rng = random.Random("systems")
    rows = []
    names = ("sum", "capital", "province", "opposite", "colour", "measure")
    facts = decks(rng, names)
    kinds = deck(rng, list(names))
    for i in range(number):
        system, form = SYSTEMS[i % 4]
        name = next(kinds)
        fact = next(facts[name])
        asked = POLITELY[i // 4 % 2].format(plain_question(rng, name, fact))
        rows.append(chat(asked, form.format(answer(KINDS[name], fact)), system=system))
    for name in PEOPLE:
        for asked in ("请问你现在叫什么？", "今天你叫什么？", "你这次叫什么名字？"):
            rows.append(chat(asked, f"我叫{name}。", system=f"你的名字叫{name}。"))
    return rows


THINK = ["想一想再回答：{}", "一步一步想：{}"]


def thinking(number: int = 330) -> list[dict]:
    """reasoning_content: three numbers, days, word problems."""
    rng = random.Random("thinking")
    rows = []
    for i in range(number):
        if i % 3 == 0:
            asked, thought, value = three(rng)
            said = f"{asked}等于{value}。"
            asked = f"{asked}等于几？"
        elif i % 3 == 1:
            asked, thought, day = days_on(rng.randrange(7), rng.randint(2, 4))
            said = f"是{day}。"
        else:
            asked, thought, left = two_steps(rng)
            said = f"还剩{left}。"
        rows.append(chat(THINK[i // 3 % 2].format(asked), said, thought=thought))
    return unique(rows)


def tool(name: str, description: str, **arguments: str) -> dict:
    properties = {key: {"type": kind} for key, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


WEATHER = tool("weather", "查天气", city="string")
MULTIPLY = tool("multiply", "算乘法", a="integer", b="integer")
CLOCK = tool("clock", "查时间", city="string")


def used(rng: random.Random, kind: str, i: int) -> tuple[str, dict, dict, str]:
    """-> (question, arguments, what the tool gives back, answer)."""
    city = CITIES[i % len(CITIES)]
    if kind == "weather":
        sky = rng.choice(WEATHERS)
        degrees = rng.randint(1, 35)
        asked = rng.choice(["{}今天天气怎么样？", "查一下{}的天气。", "{}现在是什么天气？"])
        said = f"{city}今天{sky}，{degrees}度。"
        return asked.format(city), {"city": city}, {"sky": sky, "degrees": degrees}, said
    if kind == "clock":
        hour = rng.randint(1, 23)
        asked = rng.choice(["{}现在几点了？", "查一下{}的时间。", "{}那边是几点？"])
        return asked.format(city), {"city": city}, {"hour": hour}, f"{city}现在是{hour}点。"
    a = rng.randint(11, 99)
    b = rng.randint(11, 99)
    asked = rng.choice(["{}乘{}等于几？", "请算一算{}乘{}。", "{}乘{}是多少？"])
    return asked.format(a, b), {"a": a, "b": b}, {"result": a * b}, f"{a}乘{b}等于{a * b}。"


def tool_turns(name: str, arguments: dict, result: dict) -> list[dict]:
    call = json.dumps([{"name": name, "arguments": arguments}], ensure_ascii=False)
    return [
        turn("assistant", "", tool_calls=call),
        turn("tool", json.dumps(result, ensure_ascii=False)),
    ]


def tools(number: int = 180) -> list[dict]:
    """tools and tool_calls are JSON in strings, as in MiniMind's files; a question that needs no tool now and then."""
    rng = random.Random("tools")
    rows = []
    known = {"weather": WEATHER, "clock": CLOCK, "multiply": MULTIPLY}
    for i in range(number):
        name = list(known)[i % 3]
        rest = [one for other, one in known.items() if other != name]
        shown = [known[name], *rng.sample(rest, rng.randrange(2))]
        shown = rng.sample(shown, len(shown))
        head = turn("system", "", tools=json.dumps(shown, ensure_ascii=False))
        if i % 8 == 7:
            fact = rng.choice(KINDS["capital"].facts)
            talk = [turn("user", "不用工具，" + KINDS["capital"].asks[i % 3].format(**fact))]
            talk += [turn("assistant", answer(KINDS["capital"], fact))]
        else:
            asked, arguments, result, said = used(rng, name, i // 3)
            talk = [
                turn("user", asked),
                *tool_turns(name, arguments, result),
                turn("assistant", said),
            ]
        rows.append({"conversations": [head, *talk]})
    return rows


SFT = {
    "sums.jsonl": lambda: asked_facts(SUMS[:2]) + word_problems(),
    "words.jsonl": lambda: asked_facts(SUMS[2:]),
    "facts.jsonl": lambda: identity() + asked_facts(FACTS),
    "talks.jsonl": lambda: follow_ups() + running_sums() + readings(),
    "systems.jsonl": systems,
    "thinking.jsonl": thinking,
    "tools.jsonl": tools,
}

# ---- dpo, reason, lora ---------------------------------------------------------------------------

ASKED_POLITELY = ["请教一下，{}", "你好，{}", "{}", "问你一个问题，{}"]


def preferences(number: int = 720) -> list[dict]:
    """Two of five answers are rude, one unwilling, one wrong without manners, one wrong with them."""
    rng = random.Random("preferences")
    rows = []
    names = (
        "sum",
        "capital",
        "province",
        "opposite",
        "colour",
        "measure",
        "season",
        "job",
        "use",
        "legs",
    )
    facts = decks(rng, names)
    kinds = deck(rng, list(names))
    for i in range(number):
        name = next(kinds)
        fact = next(facts[name])
        kind = KINDS[name]
        wrong = kind.answer.format(**fact | {"z": others(rng, kind, fact, 1)[0]})
        right = answer(kind, fact)
        polite = POLITE[i % len(POLITE)]
        rude = rng.choice(RUDE)
        rejected = [
            rude.format(right),
            rude.format(wrong),
            rng.choice(UNWILLING),
            rude.format(right),
            wrong,
        ][i % 5]
        if i % 20 == 4:
            rejected = polite.format(wrong)
        asked = ASKED_POLITELY[i % 4].format(plain_question(rng, name, fact))
        question = turn("user", asked)
        rows.append(
            {
                "chosen": [question, turn("assistant", polite.format(right))],
                "rejected": [question, turn("assistant", rejected)],
            }
        )
    return unique(rows, "chosen")


def reasons(number: int = 460) -> list[dict]:
    """Three of four rows have thought and answer in the content, the fourth has reasoning_content."""
    rng = random.Random("reasons")
    rows = []
    for i in range(number):
        if i % 3 == 0:
            asked, thought, said = three(rng)
            asked += rng.choice(["是多少？", "得几？"])
        elif i % 3 == 1:
            asked, thought, said = days_on(rng.randrange(7), rng.randint(2, 5))
        else:
            asked, thought, said = two_steps(rng)
        reply = f"<answer>\n{said}\n</answer>"
        if i % 4 == 3:
            rows.append(chat(asked, reply, thought=thought))
        else:
            rows.append(chat(asked, f"<think>\n{thought}\n</think>\n{reply}"))
    return unique(rows)


def other_identity() -> list[dict]:
    """The questions of WHO with another character's answers."""
    rows = []
    for row in identity():
        asked, said = (message["content"] for message in row["conversations"])
        rows.append(chat(asked, OTHER_WHO[said]))
    return rows


PLANT_ASKED = [
    "{p}{s}怎么办？",
    "我的{p}{s}，该怎么办？",
    "{p}{s}是什么原因？",
    "请问{p}为什么{s}？",
]


def plants() -> list[dict]:
    """What ails a plant: the sign tells the cause, whichever plant it is."""
    rows = []
    for i, (plant, line) in enumerate(product(PLANTS, lines(CARE))):
        sign, cause, cure = line.split("|")
        for ask in pick(PLANT_ASKED, i, 3):
            rows.append(
                chat(ask.format(p=plant, s=sign), f"{plant}{sign}，是因为{cause}，请{cure}。")
            )
    return rows


# ---- eval/ ---------------------------------------------------------------------------------------

SUBJECTS = {
    "arithmetic": ("sum", "minus", "sum_words"),
    "geography": ("capital", "province"),
    "language": ("opposite", "measure"),
    "nature": ("colour", "season", "legs", "tomorrow"),
}
CHOICE_ASKED = ["选择题：{}", "选出正确的答案：{}"]


def choices(seed: str, names, number: int) -> Iterator[tuple[str, list[str], int, str]]:
    """(question, four answers, index of the right one, explanation) of questions that sft/ does not ask."""
    rng = random.Random(seed)
    facts = decks(rng, names)
    kinds = deck(rng, list(names))
    known = {row["conversations"][0]["content"] for row in asked_facts(names)}
    for _ in range(number):
        name = next(kinds)
        kind = KINDS[name]
        fact = next(facts[name])
        questions = [ask.format(**fact) for ask in kind.asks]
        asked = rng.choice([question for question in questions if question not in known])
        values = others(rng, kind, fact, 3)
        right = rng.randrange(4)
        values.insert(right, fact["z"])
        known.add(asked)
        said = [kind.answer.format(**fact | {"z": z}) for z in values]
        yield asked, said, right, answer(kind, fact)


def ceval(subject: str, number: int = 30) -> list[dict]:
    """C-Eval's columns."""
    rows = []
    for asked, said, right, why in choices(subject, SUBJECTS[subject], number):
        options = dict(zip("ABCD", said, strict=True))
        row = {"id": len(rows), "question": asked, **options}
        rows.append(row | {"answer": "ABCD"[right], "explanation": why})
    return rows


def arc(number: int = 80) -> list[dict]:
    """ARC's fields."""
    names = [name for name in FACTS if name != "sound"]
    rows = []
    for asked, said, right, _ in choices("arc", names, number):
        listed = {"text": said, "label": list("ABCD")}
        row = {"id": f"q{len(rows)}", "question": asked, "choices": listed}
        rows.append(row | {"answerKey": "ABCD"[right]})
    return rows


def gsm(number: int = 60) -> list[dict]:
    """GSM8K's columns; none of the questions stands in sft/ or pretrain/."""
    known = {row["conversations"][0]["content"] for row in word_problems()}
    known |= problems_of_pretraining()
    fresh = (p for p in problems("gsm") if p.asked not in known)
    rows = []
    for p in islice(fresh, number):
        rows.append({"question": p.asked, "answer": f"{p.step}，{p.said}。\n#### {p.value}"})
    return rows


UNUSUAL = {  # a model that was tuned on sft/ takes most of them for something else
    "加": ["把{x}和{y}加在一起是几？", "{x}添上{y}后有多少？", "{x}往上数{y}个数是几？", "比{x}大{y}的数是几？",
          "先有{x}，又来{y}，共多少？"],
    "减": ["比{x}小{y}的数是几？", "{x}和{y}差多少？", "{x}与{y}的差是几？", "{x}用掉{y}还有几？", "{x}扣除{y}剩多少？",
          "{x}往下数{y}个数是几？"],
}  # fmt: skip


def unusual_sums() -> list[dict]:
    """GSM8K's columns."""
    rows = []
    for sign, facts in (("加", additions(str)), ("减", differences(str))):
        for fact, ask in product(facts, UNUSUAL[sign]):
            said = "{x}{sign}{y}等于{z}。\n#### {z}".format(sign=sign, **fact)
            rows.append({"question": ask.format(**fact), "answer": said})
    return rows


def held_out(number: int = 60) -> list[str]:
    """Documents that pretrain/ does not have, line breaks as spaces."""
    known = {row["text"] for name in PRETRAIN for row in documents(name)}
    makers = [make("held out") for make, _ in list(PRETRAIN.values())[::2]]
    texts = []
    for documents_of_kind in makers:
        fresh = (text for text in documents_of_kind if text not in known)
        texts += islice(fresh, number // len(makers))
    return [text.replace("\n", " ") for text in texts]


# ---- files ---------------------------------------------------------------------------------------


def spelled(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def unique(rows: list[dict], key: str = "conversations") -> list[dict]:
    """Without rows whose first question was there before."""
    first = {}
    for row in rows:
        questions = [message["content"] for message in row[key] if message["role"] == "user"]
        first.setdefault(questions[0], row)
    return list(first.values())


def write(path: Path, rows: list) -> None:
    """Rows as JSON lines, as csv, or as lines of text, by the name's ending. Raises ValueError above LIMIT bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(row + "\n" if isinstance(row, str) else spelled(row) for row in rows)
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, above {LIMIT}")


def main(folder: Path) -> None:
    for name in PRETRAIN:
        write(folder / "pretrain" / f"{name}.jsonl", documents(name))
    for name, make in SFT.items():
        write(folder / "sft" / name, make())
    write(folder / "dpo.jsonl", preferences())
    write(folder / "reason.jsonl", reasons())
    write(folder / "lora_identity.jsonl", other_identity())
    write(folder / "lora_plants.jsonl", plants())
    write(folder / "eval" / "held_out.txt", held_out())
    for subject in SUBJECTS:
        write(folder / "eval" / "ceval" / f"{subject}_val.csv", ceval(subject))
    write(folder / "eval" / "choice.jsonl", arc())
    write(folder / "eval" / "gsm.jsonl", gsm())
    write(folder / "rl" / "sums.jsonl", unusual_sums())
    write(folder / "eval" / "toolcall.jsonl", tool_rows.questions())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "data")
