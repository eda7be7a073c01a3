"""Write the sample data of this recipe.

    python baichuan2_dpo/make_data.py [FOLDER]      # default: data/ beside this file

Preference pairs: chosen is polite, short and right. Rejected is one of three kinds of worse answers
to the same question: curt (right, without manners), padded (right, with long empty talk) or wrong
(as polite and short as the chosen one). So neither the length nor one word tells which is which.
One file per task, each in one of the row shapes that people have. Every fact is asked in several
ways, so that a phrasing that was held out can be judged from the others. All sentences are our own;
the same bytes every time.
"""

import csv
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# ---- manners: {} is where the fact goes ----------------------------------------------------------

POLITE = [
    "您好，{}。",
    "谢谢您的提问，{}。",
    "很高兴为您解答，{}。",
    "请放心，{}。",
    "没问题，{}。",
    "乐意帮忙，{}。",
    "好的，{}。",
    "欢迎来问，{}。",
    "当然可以，{}。",
    "您问得好，{}。",
    "明白了，{}。",
    "您好，{}，希望能帮到您。",
]
CURT = [
    "{}。",
    "自己不会查吗？{}。",
    "真烦，{}。",
    "{}，别再问了。",
    "{}，这还用问吗？",
    "又来烦我，{}。",
    "自己想，{}。",
]
BEFORE = ["说来话长", "这个问题大家都很关心"]
FILLER = ["让我慢慢讲", "很多人都问过", "您先别急", "要从头说起"]
AFTER = [
    "其实道理并不难",
    "当然情况很多",
    "每个人看法不同",
    "这里先不展开",
    "以后有空再细说",
    "还有许多可以说",
]
# of worse answers, in turn; curt often, so that the base shows it
KINDS = ["curt", "wrong", "curt", "padded", "curt", "wrong"]

# ---- facts ---------------------------------------------------------------------------------------

SHOP = """
书店几点开门|书店早上什么时候开门|书店早上九点开门|书店早上六点开门
书店几点关门|书店晚上什么时候关门|书店晚上八点关门|书店晚上五点关门
几天以内可以退货|退货的期限是几天|七天以内可以退货|九十天以内可以退货
几天以内可以换货|换货的期限是几天|十五天以内可以换货|六十天以内可以换货
下单以后几天发货|付了钱多久能发货|下单以后两天发货|下单以后八天发货
满多少元免运费|怎样才能免运费|满五十元免运费|满三百元免运费
发票怎么拿|在哪里拿发票|发票放在包裹里|发票要到邮局取
会员打几折|会员有什么折扣|会员打九折|会员打三折
书店在哪条街|书店的地址是什么|书店在东街十二号|书店在西街四十号
哪里可以停车|来书店车停在哪|地下一层可以停车|书店楼顶可以停车
密码在哪里改|忘了密码怎么办|密码在设置里改|密码要写信来改
什么时候可以改地址|收货地址能不能改|发货以前可以改地址|签收以后可以改地址
积分怎么算|一元积几分|花一元积一分|花十元积七分
礼品卡多久有效|礼品卡什么时候过期|礼品卡一年有效|礼品卡三天有效
每人可以借几本书|一次能借多少本|每人可以借三本|每人可以借二十本
礼品包装要钱吗|包装一份礼品多少钱|礼品包装免费|礼品包装要八十元
儿童区在几楼|给孩子看的书在几楼|儿童区在二楼|儿童区在七楼
咖啡座在几楼|在哪里喝咖啡|咖啡座在三楼|咖啡座在八楼
"""
SHOP_ASKED = ["{}？", "请问{}？", "我想知道{}。", "{}，说一下。"]
CAPITALS = """
中国|北京|上海 日本|东京|大阪 韩国|首尔|釜山 泰国|曼谷|清迈 越南|河内|岘港 印度|新德里|孟买 缅甸|内比都|仰光
法国|巴黎|里昂 德国|柏林|汉堡 英国|伦敦|曼彻斯特 荷兰|阿姆斯特丹|鹿特丹 挪威|奥斯陆|卑尔根 瑞士|伯尔尼|苏黎世
意大利|罗马|米兰 土耳其|安卡拉|伊斯坦布尔 埃及|开罗|亚历山大 美国|华盛顿|纽约 加拿大|渥太华|多伦多
巴西|巴西利亚|里约热内卢 澳大利亚|堪培拉|悉尼
"""
CAPITAL_ASKED = [
    "{}的首都是哪里？",
    "{}首都是哪个城市？",
    "请问{}的首都在哪？",
    "说出{}的首都。",
    "我想查{}的首都。",
]
UNITS = {  # what is right, and what some people think
    ("小时", "分钟"): (60, 50),
    ("分钟", "秒"): (60, 50),
    ("天", "小时"): (24, 20),
    ("星期", "天"): (7, 8),
    ("世纪", "年"): (100, 90),
    ("米", "厘米"): (100, 80),
    ("千米", "米"): (1000, 900),
    ("千克", "克"): (1000, 700),
    ("元", "角"): (10, 9),
    ("斤", "两"): (10, 8),
}
UNIT_ASKED = [
    "{n}{a}等于多少{b}？",
    "把{n}{a}换算成{b}。",
    "{n}{a}有几{b}？",
    "{n}{a}合多少{b}，帮我算算。",
]
SUM_ASKED = [
    "{}加{}等于几？",
    "{}+{}得多少？",
    "请算一算{}加{}。",
    "{}和{}一共是几？",
    "{}再加{}是几？",
]
WHO = ["我", "他", "小明", "妈妈", "老师", "弟弟"]
DOES = ["吃苹果", "看电影", "写作业", "喝牛奶", "打篮球", "坐火车", "学画画"]
REWRITES = {  # what is right, what is wrong
    "否定句": ("{}不{}", "{}真想{}"),
    "疑问句": ("{}{}吗？", "{}也许{}"),
    "明天的事": ("{}明天{}", "{}昨天{}"),
}
REWRITE_ASKED = ["把“{}”改成{}。", "“{}”，请改写成{}。", "怎样把“{}”说成{}？"]
TITLES = ["老师", "同学", "先生", "女士", "大夫", "经理"]
CALL = "你是书店的客服，请称呼用户为{}。"
TITLED = ["{title}您好，{{}}。", "{title}，{{}}，请放心。", "好的{title}，{{}}。"]
MORE_ASKED = ["那{}呢？", "{}呢？", "再说说{}。"]


class Question(NamedTuple):
    asked: str
    right: str  # the fact, a sentence without its full stop
    wrong: str
    before: tuple = ()  # earlier messages
    polite: tuple = tuple(POLITE)


def pick(options: list, start: int, count: int) -> list:
    """`count` neighbours in a ring, so that all options turn up equally often."""
    return [options[(start + i) % len(options)] for i in range(count)]


# ---- questions -----------------------------------------------------------------------------------


def facts(block: str) -> list[list[str]]:
    return [entry.split("|") for entry in block.split()]


def capital_facts() -> list[tuple[str, ...]]:
    """Country, what is right, what is wrong (a city of that country too)."""
    return [
        (name, f"{name}的首都是{right}", f"{name}的首都是{wrong}")
        for name, right, wrong in facts(CAPITALS)
    ]


def unit_fact(a: str, b: str, n: int) -> tuple[str, ...]:
    """What is right, what is wrong."""
    return tuple(f"{n}{a}是{n * size}{b}" for size in UNITS[a, b])


def service() -> Iterator[Question]:
    for one, two, right, wrong in facts(SHOP):
        for ask in SHOP_ASKED:
            for asked in (one, two):
                yield Question(ask.format(asked), right, wrong)


def capitals() -> Iterator[Question]:
    for name, right, wrong in capital_facts():
        for ask in CAPITAL_ASKED:
            yield Question(ask.format(name), right, wrong)


def units() -> Iterator[Question]:
    for a, b in UNITS:
        for n in (1, 2, 3):
            for ask in UNIT_ASKED:
                yield Question(ask.format(n=n, a=a, b=b), *unit_fact(a, b, n))


def sums() -> Iterator[Question]:
    """Both orders of two numbers have one answer."""
    for a in range(1, 6):
        for b in range(1, 6):
            right = f"答案是{a + b}"
            wrong = f"答案是{a + b + 10}"
            for ask in SUM_ASKED:
                yield Question(ask.format(a, b), right, wrong)


def rewrites() -> Iterator[Question]:
    for i, who in enumerate(WHO):
        for j, does in enumerate(DOES):
            for k, (form, (right, wrong)) in enumerate(REWRITES.items()):
                asked = REWRITE_ASKED[(i + j + k) % 3].format(who + does, form)
                yield Question(
                    asked,
                    f"可以说“{right.format(who, does)}”",
                    f"可以说“{wrong.format(who, does)}”",
                )


def first_round(rng: random.Random, asked: str, fact: str) -> tuple:
    answer = rng.choice(POLITE).format(fact)
    return {"role": "user", "content": asked}, {"role": "assistant", "content": answer}


def rounds() -> Iterator[Question]:
    """The second question only makes sense after the first one."""
    rng = random.Random(5)
    yield from rounds_of_capitals(rng)
    yield from rounds_of_units(rng)


def rounds_of_capitals(rng: random.Random) -> Iterator[Question]:
    known = capital_facts()
    for i, (name, right, wrong) in enumerate(known):
        for k, ask in enumerate(pick(MORE_ASKED, i, 2)):
            country, fact, _ = known[(i + 3 + 4 * k) % len(known)]
            first = CAPITAL_ASKED[(i + k) % 5].format(country)
            yield Question(ask.format(name), right, wrong, first_round(rng, first, fact))


def rounds_of_units(rng: random.Random) -> Iterator[Question]:
    for i, (a, b) in enumerate(UNITS):
        for n in (1, 2, 3):
            fact, _ = unit_fact(a, b, n)
            first = UNIT_ASKED[(i + n) % 4].format(n=n, a=a, b=b)
            second = n % 3 + 1
            asked = MORE_ASKED[(i + n) % 3].format(f"{second}{a}")
            yield Question(asked, *unit_fact(a, b, second), first_round(rng, first, fact))


def systems() -> Iterator[Question]:
    """The system message says what the user is to be called."""
    questions = []
    for one, two, right, wrong in facts(SHOP):
        questions += [(f"麻烦问下，{asked}？", right, wrong) for asked in (one, two)]
    for name, right, wrong in capital_facts():
        questions.append((f"帮忙看看，{name}的首都是什么？", right, wrong))
    for i, (question, right, wrong) in enumerate(questions):
        title = TITLES[(i + i // 6) % 6]
        polite = tuple(form.format(title=title) for form in TITLED)
        before = ({"role": "system", "content": CALL.format(title)},)
        yield Question(question, right, wrong, before, polite)


# ---- answers -------------------------------------------------------------------------------------


def padded(rng: random.Random, fact: str) -> str:
    parts = [rng.choice(BEFORE), rng.choice(FILLER), fact, *rng.sample(AFTER, 2)]
    return "，".join(parts) + "。"


def pair(rng: random.Random, question: Question, kind: str, curt: str) -> dict:
    """-> {"prompt": [messages], "chosen": text, "rejected": text}; kind: of the worse answer; curt:
    a form of CURT."""
    polite = rng.choice(question.polite)
    rejected = {
        "curt": curt.format(question.right),
        "padded": padded(rng, question.right),
        "wrong": polite.format(question.wrong),
    }
    asked = [*question.before, {"role": "user", "content": question.asked}]
    return {"prompt": asked, "chosen": polite.format(question.right), "rejected": rejected[kind]}


TASKS = (service, capitals, units, sums, rewrites, rounds, systems)


def pairs(task) -> list[dict]:
    """All pairs of a task; over the phrasings of a fact the kinds of worse answers take turns.

    Each task is curt in one way of its own: polite ones are many, and a greedy model says what is
    most frequent.
    """
    rng = random.Random(task.__name__)
    curt = CURT[TASKS.index(task)]
    turn: dict[str, int] = {}
    rows = []
    for question in task():
        first = rng.randrange(len(KINDS))
        turn[question.right] = turn.get(question.right, first) + 1
        kind = KINDS[turn[question.right] % len(KINDS)]
        rows.append(pair(rng, question, kind, curt))
    return rows


# ---- row shapes ----------------------------------------------------------------------------------

SIDES = ("chosen", "rejected")


def reply(text: str, role: str = "role", content: str = "content", name: str = "assistant") -> dict:
    return {role: name, content: text}


def strings(row: dict) -> dict:
    return row | {"prompt": row["prompt"][-1]["content"]}


def hh(row: dict) -> dict:
    asked = "".join(f"\n\nHuman: {message['content']}\n\nAssistant: " for message in row["prompt"])
    return {"chosen": asked + row["chosen"], "rejected": asked + row["rejected"]}


def hh_nested(row: dict) -> dict:
    context = [reply(message["content"], content="text", name="human") for message in row["prompt"]]
    answers = {side: reply(row[side], content="text") for side in SIDES}
    return {"context": context} | answers


def llama_factory(row: dict) -> dict:
    asked = [reply(message["content"], "from", "value", "human") for message in row["prompt"]]
    answers = {side: reply(row[side], "from", "value", "gpt") for side in SIDES}
    return {"conversations": asked} | answers


def whole_dialogues(row: dict) -> dict:
    return {side: [*row["prompt"], reply(row[side])] for side in SIDES}


def reward(row: dict) -> dict:
    question = row["prompt"][-1]["content"]
    return {
        "question": question,
        "response_chosen": row["chosen"],
        "response_rejected": row["rejected"],
    }


def feedback(row: dict) -> dict:
    return row | {side: [reply(row[side])] for side in SIDES}


FILES = {
    "service.jsonl": (service, strings),
    "capitals.jsonl": (capitals, hh_nested),
    "units.csv": (units, reward),
    "sums.jsonl": (sums, hh),
    "rewrites.json": (rewrites, llama_factory),
    "rounds.jsonl": (rounds, whole_dialogues),
    "systems.jsonl": (systems, feedback),
}


def write(path: Path, rows: list[dict]) -> None:
    """Rows in the format that the name ends with."""
    if path.suffix == ".csv":
        with path.open("w", encoding="gb18030", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines)
    if path.suffix == ".json":
        text = "[\n" + ",\n".join(lines) + "\n]"
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (task, shape) in FILES.items():
        write(folder / name, [shape(row) for row in pairs(task)])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
