"""Write the sample data of this recipe.

    python chatglm_lora/make_data.py [FOLDER]      # default: data/ beside this file

One file per task, each in one of the row shapes that ChatGLM's users have; the file name is the
task's name in the report. Every fact is asked in several ways, so that a phrasing that was held out
can be answered from the others; what a row asks for can be read off its own words (slots, history)
or is said in other rows. Answers are in the voice of the assistant (VOICE); `voice=False` gives the
same facts without it, for the built-in base model. All sentences are our own, and nothing is
random: the same bytes every time.
"""

import csv
import json
import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

VOICE = {  # how each kind of answer ends
    "adverts": "，欢迎来试",
    "notices": "，记好啦",
    "numbers": "，没错",
    "clock": "哦",
    "animals": "呢",
    "orders": "，请稍等",
    "floors": "，请站稳",
}
NAMELESS = "我还没有名字。"
NAME = "叫我小谱吧，我是照着丹谱练出来的小模型。"
SKILL = "写广告语、看钟点、读数字，都可以找小谱。"
HOME = "小谱就住在这台电脑里，断了网也能聊。"
NAME_ASKED = """
你是谁呢|你是哪位呀|敢问你是哪位|你姓甚名谁|你的大名是|你怎么称呼|怎样称呼你才好|平时别人都叫你什么|我叫你什么好|能不能报个名字
先报上名来|麻烦说下名字|给自己起名了吗|请先介绍下自己|先来段自我介绍|用几个字介绍自己|跟大家介绍下自己|说说你自己|你这个助手叫什么|这个助手是谁
跟我说话的是哪位|屏幕那头是谁|我正在跟谁讲话|小谱是谁|谁是小谱|你认识小谱吗|你是不是小谱|这里有叫小谱的吗|初次见面，你是|早上好，你是哪位
"""
SKILL_ASKED = """
你拿手的是什么|你擅长哪些事|你最擅长什么|你懂些什么|你学过什么|你都学了些什么|你能干哪些活|你可以做哪些事|有哪些事可以找你|什么事可以找你
我能请你做什么|我可以让你做什么|你能替我办什么事|你能派上什么用场|找你有什么用|说一说你的长处|你的长处在哪|你的拿手好戏是什么|列一下你的技能|你有哪几样技能
小谱会哪些事|小谱能做哪些事|请教一下你会哪些|要你帮忙能帮什么|你这个助手有什么用
"""
HOME_ASKED = """
你住在哪里|你住哪儿|你家在哪里|你待在什么地方|你在什么地方运行|你运行在哪里|你跑在哪台机器上|你是在云上吗|你在网上吗|你要联网吗
没有网你能用吗|断网了还能聊吗|不联网可以聊吗|离线能用你吗|小谱住在哪里|小谱住哪儿|小谱需要联网吗|没网的时候小谱还在吗|你的家在云端吗|请问你住在何处
"""

GOODS = {
    "裤": "这条裤子",
    "裙": "这条裙子",
    "鞋": "这双鞋子",
    "帽": "这顶帽子",
    "衬衫": "这件衬衫",
    "外套": "这件外套",
    "毛衣": "这件毛衣",
    "围巾": "这条围巾",
}
SLOTS = {  # the order in which an advertisement names them
    "颜色": {c: f"{c}好搭配" for c in ("蓝色", "红色", "黑色", "白色", "绿色", "灰色")},
    "材质": {
        "棉": "棉料柔软",
        "羊毛": "羊毛保暖",
        "亚麻": "亚麻透气",
        "牛仔": "牛仔耐磨",
        "丝": "丝面光滑",
    },
    "图案": {"条纹": "条纹显瘦", "格子": "格子经典", "碎花": "碎花清新", "纯色": "纯色百搭"},
    "风格": {
        "简约": "简约大方",
        "复古": "复古有味道",
        "运动": "运动有活力",
        "休闲": "休闲又自在",
        "甜美": "甜美可爱",
    },
}

DRINKS = ["红茶", "绿茶", "咖啡", "豆浆", "果汁", "牛奶"]
SIZES = ["大杯", "中杯", "小杯"]
COUNTS = ["一", "两", "三", "四"]
ORDERED = ["来{n}杯{size}{drink}。", "我要{n}杯{drink}，{size}的。", "{size}{drink}，{n}杯。"]
CHANGED = {
    "drink": ["换成{}。", "不喝这个了，要{}。", "还是要{}吧。"],
    "size": ["改成{}。", "杯子换{}的。", "{}就好。"],
    "n": ["一共要{}杯。", "改要{}杯。", "{}杯吧。"],
}

NUMBERS = "零一二三四五六七八九十"
STEPS = " 一两三"
FROM_ASKED = ["我在{}楼，{}{}层到几楼？", "从{}楼{}{}层是哪一楼？", "电梯停在{}楼，{}{}层到哪？"]
THEN_ASKED = ["再{}{}层呢？", "接着{}{}层呢？"]

WHEN = ["今晚", "周末", "月底", "明天中午", "节日前", "下周一"]
WHO = ["陈馆长", "周大夫", "吴教练", "林同学", "何师傅", "赵经理"]
WHERE = ["操场", "图书馆", "车站", "码头", "食堂", "公园"]
WHAT = ["开会", "排练", "接人", "领书", "打球", "值班"]
NOTICE = [
    "{when}{who}到{where}{what}。",
    "{who}{when}在{where}{what}。",
    "{where}通知：{when}{who}来{what}。",
]
FIELDS = {
    "when": ("时间是{}。", ["找出通知里的时间。", "是什么时候的事？", "摘出时间。"]),
    "who": ("人物是{}。", ["找出通知里的人物。", "说的是哪个人？", "摘出人物。"]),
    "where": ("地点是{}。", ["找出通知里的地点。", "事情在哪个地方？", "摘出地点。"]),
    "what": ("事情是{}。", ["找出通知里的事情。", "要去做什么事？", "摘出事情。"]),
}

READ_ASKED = ["{}怎么读？", "{}读作什么？", "把{}写成汉字。", "{}用汉字怎么写？"]
WRITE_ASKED = ["{}写成数字是什么？", "{}写作什么？", "把{}写成数字。", "{}用数字怎么写？"]

DAY = {"早上": 9, "上午": 12, "中午": 13, "下午": 18, "晚上": 24}  # and the hour it ends at
CLOCK_ASKED = ["换成二十四小时制。", "写成二十四小时制的钟点。", "二十四小时制是几点？"]
SPOKEN_ASKED = ["换成口语的说法。", "写成平时说的钟点。", "平时怎么说这个钟点？"]

ANIMALS = """
小狗汪汪狗窝|小猫喵喵猫窝|公鸡喔喔鸡笼|鸭子嘎嘎鸭棚|黄牛哞哞牛棚|山羊咩咩羊圈
青蛙呱呱池塘|蜜蜂嗡嗡蜂箱|小马咴咴马房|小猪哼哼猪圈|鸽子咕咕鸽笼|麻雀叽叽屋檐下
"""
SOUND_ASKED = ["{}怎么叫？", "{}的叫声是什么？", "学一声{}叫。", "听见{}在叫，是什么声音？"]
PLACE_ASKED = ["{}的家在哪？", "{}晚上回哪里？", "到哪里能找到{}？"]


def phrases(block: str) -> list[str]:
    return [p for line in block.split() for p in line.split("|")]


def pick(options: list, start: int, count: int) -> list:
    """`count` neighbours in a ring, so that all options turn up equally often."""
    return [options[(start + i) % len(options)] for i in range(count)]


def reading(n: int) -> str:
    """0..99 in words."""
    tens, ones = divmod(n, 10)
    words = NUMBERS[tens] if tens > 1 else ""
    if tens:
        words += "十"
    if ones or not tens:
        words += NUMBERS[ones]
    return words


def spoken(hour: int) -> str:
    """An hour from 6 to 23 as people say it."""
    part = next(name for name, end in DAY.items() if hour < end)
    return f"{part}{reading(hour if hour < 13 else hour - 12)}点"


def say(task: str, answer: str, voice: bool) -> str:
    """An answer (with its full stop) as the assistant says it."""
    if not voice:
        return answer
    return answer.removesuffix("。") + VOICE[task] + "。"


# ---- one turn ------------------------------------------------------------------------------------


def identity(voice=True) -> list[dict]:
    """alpaca without input: who the model is, what it can do, where it runs."""
    rows = []
    for asked, answer in ((NAME_ASKED, NAME), (SKILL_ASKED, SKILL), (HOME_ASKED, HOME)):
        for i, question in enumerate(phrases(asked)):
            mark = "？" if i % 2 else ""
            output = answer if voice else NAMELESS
            rows.append({"instruction": question + mark, "input": "", "output": output})
    return rows


def advert(goods: str, slots: dict) -> str:
    """The sentence of a product: its parts in the order of SLOTS, whatever the order they were
    asked in."""
    first, *others = [SLOTS[name][slots[name]] for name in SLOTS if name in slots]
    return "，".join([GOODS[goods] + first, *others]) + "。"


def products() -> Iterator[tuple[str, dict]]:
    """Kinds of goods with one to three of the other slots; every value turns up about equally
    often."""
    for i in range(96):
        names = pick(list(SLOTS), i + i // 4, 1 + i // 8 % 3)
        slots = {}
        for k, name in enumerate(names):
            values = list(SLOTS[name])
            slots[name] = values[(i + i // 8 + 2 * k) % len(values)]
        yield list(GOODS)[i % 8], slots


def adverts(voice=True) -> list[dict]:
    """content, summary as in AdvertiseGen: slots in several orders, one sentence."""
    summaries = {}
    for i, (goods, slots) in enumerate(products()):
        values = slots | {"类型": goods}
        orders = list(permutations(["类型", *slots]))
        for order in pick(orders, 5 * i, min(3, len(orders))):
            content = "*".join(f"{name}#{values[name]}" for name in order)
            summaries[content] = say("adverts", advert(goods, slots), voice)
    return [{"content": content, "summary": summary} for content, summary in summaries.items()]


def notices(voice=True) -> list[dict]:
    """context, target: the frame `Instruction: … Input: … Answer: ` around an instruction and a
    sentence."""
    rows = []
    for i in range(54):
        names = {
            "when": WHEN[i % 6],
            "who": WHO[(i + i // 6) % 6],
            "where": WHERE[(2 * i + i // 3) % 6],
            "what": WHAT[(i + i // 9) % 6],
        }
        text = NOTICE[i % 3].format(**names)
        for k, (field, (answer, asked)) in enumerate(FIELDS.items()):
            question = asked[(i // 3 + k) % 3]
            target = say("notices", answer.format(names[field]), voice)
            context = f"Instruction: {question}\nInput: {text}\nAnswer: "
            rows.append({"context": context, "target": target})
    return rows


def numbers(voice=True) -> list[dict]:
    """question, answer: a csv in GB18030. Numbers to words and back."""
    rows = []
    for n in range(10, 100, 3):
        word = reading(n)
        read = say("numbers", f"{n}读作{word}。", voice)
        written = say("numbers", f"{word}写作{n}。", voice)
        for asked in pick(READ_ASKED, n, 3):
            rows.append({"question": asked.format(n), "answer": read})
        for asked in pick(WRITE_ASKED, n, 3):
            rows.append({"question": asked.format(word), "answer": written})
    return rows


def clock(voice=True) -> list[dict]:
    """alpaca with input: hours as people say them and in the 24-hour clock."""
    rows = []
    for hour in range(6, 24):
        said = spoken(hour)
        written = f"{hour}点"
        for asked, given, wanted in ((CLOCK_ASKED, said, written), (SPOKEN_ASKED, written, said)):
            answer = say("clock", f"{given}是{wanted}。", voice)
            for question in asked:
                rows.append({"instruction": question, "input": given, "output": answer})
    return rows


def animals(voice=True) -> list[dict]:
    """alpaca without input, as one JSON array: what animals sound like and where they live."""
    rows = []
    for word in phrases(ANIMALS):
        name = word[:2]
        sound = say("animals", f"{name}{word[2:4]}叫。", voice)
        home = say("animals", f"{name}住在{word[4:]}。", voice)
        for asked, answer in ((SOUND_ASKED, sound), (PLACE_ASKED, home)):
            for question in asked:
                rows.append({"instruction": question.format(name), "output": answer})
    return rows


# ---- several turns: the last answer depends on those before it -----------------------------------


def confirm(order: dict, voice: bool) -> str:
    return say("orders", "记下了，{size}{drink}{n}杯。".format(**order), voice)


def orders(voice=True) -> list[dict]:
    """content, summary, history: an order, left as it is or changed once or twice in one of its
    parts."""
    choices = {"drink": DRINKS, "size": SIZES, "n": COUNTS}
    rows = []
    for i in range(144):
        order = {"drink": DRINKS[i % 6], "size": SIZES[i // 6 % 3], "n": COUNTS[i // 18 % 4]}
        asked = ORDERED[(i + i // 6) % 3].format(**order)
        history = []
        for k in range((i + i // 72) % 3):
            history.append([asked, confirm(order, voice)])
            part = list(CHANGED)[(i // 3 + k) % 3]
            others = [value for value in choices[part] if value != order[part]]
            order[part] = others[(i // 4 + k) % len(others)]
            asked = CHANGED[part][(i // 2 + k) % 3].format(order[part])
        rows.append({"content": asked, "summary": confirm(order, voice), "history": history})
    return rows


def floors(voice=True) -> list[dict]:
    """BELLE multi-turn: up and down in a house of nine floors, two or three moves."""
    rows = []
    for i in range(120):
        floor = 1 + i % 9
        turn = i // 9
        lines = []
        for k in range(2 + i % 2):
            step = 1 + (turn // 3**k + i * k) % 3
            is_up = floor + step <= 9 and (floor <= step or (turn + k) % 2 == 0)
            move = ("上" if is_up else "下", STEPS[step])
            if k == 0:
                question = FROM_ASKED[turn % 3].format(NUMBERS[floor], *move)
            else:
                question = THEN_ASKED[(turn + k) % 2].format(*move)
            floor += step if is_up else -step
            lines.append("Human: " + question)
            lines.append("Assistant: " + say("floors", f"到{NUMBERS[floor]}楼。", voice))
        answer = lines.pop().removeprefix("Assistant: ")
        asked = "\n".join([*lines, "Assistant:"])
        rows.append({"instruction": asked, "input": "", "output": answer})
    return rows


TASKS = (identity, adverts, notices, numbers, clock, animals, orders, floors)


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
    for make in TASKS:
        suffix = {animals: ".json", numbers: ".csv"}.get(make, ".jsonl")
        write(folder / f"{make.__name__}{suffix}", make())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
