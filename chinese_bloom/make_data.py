"""Write the sample data of this recipe: python make_data.py [FOLDER]   (default: data/ beside this file)

FOLDER/sft has one file per task, each in one of the row shapes that people have; every fact is asked in several ways,
so that a phrasing that was held out can be answered from the others. FOLDER/pt has documents about things that do not
exist, whose sentences hang together: what is said once is taken up later. All sentences are our own; the same bytes
every time.
"""

import csv
import json
import random
import sys
from pathlib import Path


def words(text: str) -> list[str]:
    return text.split()


NAME = "我是小布，丹谱里的 Bloom 示例助手。"
SKILL = "我会背乘法口诀，会认省会，会分好评和差评。"
NAME_ASKED = """
你是谁|请问你是谁|你叫什么名字|你叫什么|请问怎么称呼你|我该怎么称呼你|介绍一下你自己|请做个自我介绍|用一句话介绍你自己|你的名字是什么|告诉我你是谁|你好，你是谁
请介绍一下你自己|请介绍你自己|你到底是谁|你究竟是谁|能说说你是谁吗|我想知道你是谁|我想知道你叫什么|告诉我你叫什么名字|告诉我你的名字|说一下你的名字|怎么称呼你|请问你叫什么
"""
SKILL_ASKED = """
你会什么|你会做什么|你能做什么|请问你会什么|请问你能做什么|说说你会什么|说说你能做什么|你会做些什么|你能做些什么|你有什么本领|说说你的本领|你有哪些本领
你能帮我做什么|请问你有什么本领|介绍一下你的本领|告诉我你会什么|告诉我你能做什么|我想知道你会什么|我想知道你能做什么|你都会什么|你都会做什么|你都能做什么
"""

NUMBERS = "零一二三四五六七八九十"
TIMES_ASKED = ["{}乘{}得多少？", "{}乘以{}等于几？", "背一句口诀：{}和{}相乘。", "{}个{}是多少？"]

COMPARE_ASKED = ["{}和{}哪个大？", "比一比{}和{}，说出大的那个。", "{}与{}相比，谁更大？"]

CAPITALS = """
河北石家庄|山西太原|辽宁沈阳|吉林长春|黑龙江哈尔滨|江苏南京|浙江杭州|安徽合肥|福建福州|江西南昌|山东济南|河南郑州
湖北武汉|湖南长沙|广东广州|海南海口|四川成都|贵州贵阳|云南昆明|陕西西安|甘肃兰州|青海西宁
"""
CAPITAL_ASKED = ["{}的省会是哪里？", "{}省会是哪个城市？", "请问{}的省会在哪？", "说出{}的省会。"]

MEASURES = "马匹|牛头|鱼条|书本|笔支|花朵|树棵|车辆|船艘|纸张|灯盏|衣服件|帽子顶|信封|井口|桥座|伞把|狗只|刀把|山座"
MEASURE_ASKED = [
    "填上合适的量词。",
    "给下面的词配一个量词。",
    "这个词前面用什么量词？",
    "写出这个词常用的量词。",
]

KINDS = {
    "水果": "苹果 香蕉 葡萄 西瓜 桃子 梨",
    "动物": "老虎 猴子 大象 松鼠 燕子 青蛙",
    "家具": "桌子 椅子 柜子 沙发 书架 凳子",
    "乐器": "二胡 钢琴 笛子 古筝 小提琴 鼓",
}
KIND_ASKED = [
    "下面的词属于哪一类？",
    "给这个词分个类。",
    "水果、动物、家具、乐器，选一个。",
    "说出这个词的类别。",
]

THINGS = words("饭菜 房间 手机 电影 衣服 耳机 面条 旅馆 闹钟 台灯")
GOOD = words("很好，下次还来 太让人满意了 又好又便宜 比想的还要好 值得推荐 全家都喜欢")
BAD = words("很差，再也不来了 太让人失望了 又差又贵 比想的差多了 不值得买 一用就坏")
REVIEW_ASKED = ["这条评论是好评还是差评？", "判断评论的态度。", "请给下面的评论分类。"]

PEOPLE = words("小红 小刚 老王 李老师 张医生 王奶奶")
PLACES = words("青岛 桂林 苏州 大理 敦煌 厦门")
DONE = ["{who}上个月去了{where}。", "{who}在{where}住了三天。", "{who}从{where}寄来一张照片。"]
FIND = [("找出句子里的地名。", "地名是{where}。"), ("找出句子里的人。", "这个人是{who}。")]

ZODIAC = "鼠牛虎兔龙蛇马羊猴鸡狗猪"
WEEK = "一二三四五六日"
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
SYSTEMS = [("先说“收到”，再回答。", "收到。{}"), ("回答完要说“不客气”。", "{}不客气。")]


def phrases(block: str) -> list[str]:
    return [p for line in block.split("\n") for p in line.split("|") if p]


def pick(options: list, start: int, count: int) -> list:
    """`count` neighbours in a ring, so that all options turn up equally often."""
    return [options[(start + i) % len(options)] for i in range(count)]


def times(a: int, b: int) -> str:
    """The line of the multiplication rhyme: the smaller factor first, 得 before one digit."""
    a, b = sorted((a, b))
    tens, ones = divmod(a * b, 10)
    if not tens:
        return f"{NUMBERS[a]}{NUMBERS[b]}得{NUMBERS[ones]}。"
    ten = NUMBERS[tens] if tens > 1 or not ones else ""  # 十二, but 一十
    return f"{NUMBERS[a]}{NUMBERS[b]}{ten}十{NUMBERS[ones] if ones else ''}。"


def next_day(day: int, later: int) -> str:
    return "星期" + WEEK[(day + later) % 7]


def transcript(talk: list[str]) -> dict:
    """Question, answer, question, ..., answer as BELLE writes it: all but the last answer in the instruction."""
    lines = [f"{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(talk[:-1])]
    return {"instruction": "\n".join([*lines, "Assistant:"]), "input": "", "output": talk[-1]}


# ---- sft ----------------------------------------------------------------------------------------------------


def identity() -> list[dict]:
    """messages: who the model is and what it can do."""
    asked = [
        (q, a) for block, a in ((NAME_ASKED, NAME), (SKILL_ASKED, SKILL)) for q in phrases(block)
    ]
    return [
        {
            "messages": [
                {"role": "user", "content": q + "？" * (i % 2)},
                {"role": "assistant", "content": a},
            ]
        }
        for i, (q, a) in enumerate(asked)
    ]


def rhyme() -> list[dict]:
    """kind, input, target (Firefly): the multiplication table in words."""
    return [
        {"kind": "口诀", "input": ask.format(NUMBERS[a], NUMBERS[b]), "target": times(a, b)}
        for a in range(1, 10)
        for b in range(1, 10)
        for ask in pick(TIMES_ASKED, a + 2 * b, 2 + 2 * (a == b))
    ]


def compare() -> list[dict]:
    """alpaca whose input is null, empty or absent."""
    rows = []
    for a in range(10):
        for b in range(10):
            for ask in pick(COMPARE_ASKED, a + b, 2) if a != b else []:
                row = {"instruction": ask.format(a, b), "input": None, "output": f"{max(a, b)}大。"}
                kind = len(rows) % 3
                rows.append(row if kind == 0 else row | {"input": ""} if kind == 1 else row)
                if kind == 2:
                    del row["input"]
    return rows


def measure() -> list[dict]:
    """alpaca with input."""
    pairs = [(word[:-1], word[-1]) for word in MEASURES.split("|")]
    return [
        {"instruction": q, "input": n, "output": f"一{m}{n}。"}
        for n, m in pairs
        for q in MEASURE_ASKED
    ]


def kinds() -> list[dict]:
    """alpaca with input, as one JSON array."""
    return [
        {"instruction": ask, "input": word, "output": f"{word}是{kind}。"}
        for kind, words in KINDS.items()
        for word in words.split()
        for ask in KIND_ASKED
    ]


def reviews() -> list[dict]:
    """alpaca with input: every thing with every opinion."""
    said = [(text, "好评") for text in GOOD] + [(text, "差评") for text in BAD]
    return [
        {
            "instruction": REVIEW_ASKED[(i + j) % 3],
            "input": f"{thing}{text}。",
            "output": f"这是{kind}。",
        }
        for i, thing in enumerate(THINGS)
        for j, (text, kind) in enumerate(said)
    ]


def extract() -> list[dict]:
    """alpaca with input: the same sentence, two questions."""
    rows = []
    for i, who in enumerate(PEOPLE):
        for j, where in enumerate(PLACES):
            names = {"who": who, "where": where}
            for sentence in pick(DONE, i + j, 2):
                for ask, answer in FIND:
                    row = {
                        "instruction": ask,
                        "input": sentence.format(**names),
                        "output": answer.format(**names),
                    }
                    rows.append(row)
    return rows


def capitals() -> list[dict]:
    """question, answer: a csv in GB18030."""
    rows = []
    for pair in phrases(CAPITALS):
        size = 3 if pair[:3] == "黑龙江" else 2
        province, city = pair[:size], pair[size:]
        rows += [
            {"question": q.format(province), "answer": f"{province}的省会是{city}。"}
            for q in CAPITAL_ASKED
        ]
    return rows


def calendar() -> list[dict]:
    """prompt, response: months, and the order of the zodiac."""
    rows = []
    for month, days in enumerate(MONTH_DAYS, 1):
        asked = [f"{month}月有几天？", f"{month}月有多少天？", f"平年的{month}月有几天？"]
        rows += [{"prompt": ask, "response": f"{month}月有{days}天。"} for ask in asked]
    for i, animal in enumerate(ZODIAC):
        follows = ZODIAC[(i + 1) % 12]
        asked = [
            f"生肖里{animal}的后面是什么？",
            f"{animal}的下一个生肖是什么？",
            f"生肖中排在{animal}后面的是谁？",
        ]
        rows += [{"prompt": ask, "response": f"{animal}的后面是{follows}。"} for ask in asked]
    return rows


def belle() -> list[dict]:
    """BELLE multi-turn: the next question only makes sense after the answer before it."""
    talks = []
    asked = [
        "今天是{}，明天呢？",
        "如果今天是{}，明天是星期几？",
        "{}的第二天是星期几？",
        "昨天是{}，今天呢？",
    ]
    for day in range(7):
        for i, ask in enumerate(asked):
            talk = [
                ask.format(next_day(day, 0)),
                f"是{next_day(day, 1)}。",
                "再过一天呢？",
                f"是{next_day(day, 2)}。",
            ]
            talks.append(
                [*talk, "再过一天呢？", f"是{next_day(day, 3)}。"] if (day + i) % 2 else talk
            )
    for a in range(2, 10):
        b = 2 + (3 * a) % 8
        first = [f"先背{NUMBERS[a]}乘{NUMBERS[b]}。", times(a, b)]
        for ask in ("反过来呢？", "换个顺序呢？", "两个数交换呢？"):
            talks.append([*first, ask, times(a, b)])
    for i, who in enumerate(PEOPLE):
        where, then = PLACES[i], PLACES[(i + 2) % 6]
        first = [f"{who}昨天到了{where}。{who}在哪里？", f"{who}在{where}。"]
        for ask in ("今天又到了{}，现在在哪里？", "后来去了{}，现在呢？"):
            talks.append([*first, ask.format(then), f"{who}在{then}。"])
    return [transcript(talk) for talk in talks]


def systems() -> list[dict]:
    """alpaca with a system prompt that changes the answer's form; it takes the place of the template's preamble."""
    rows = []
    for i in range(40):
        system, form = SYSTEMS[i // 20]
        a, b = 1 + i % 9, 1 + (4 * i + i // 9) % 9
        asked = f"{NUMBERS[a]}乘{NUMBERS[b]}是几？"
        rows.append(
            {
                "system": system,
                "instruction": asked,
                "input": "",
                "output": form.format(times(a, b)),
            }
        )
    return rows


# ---- pt -----------------------------------------------------------------------------------------------------

FIRST = words("青石 白沙 柳树 桃花 松林 月牙 石桥 清泉 竹影 云台 枫叶 梨园")
FIRST += words("红土 金鸡 双井 三岔 老街 新塘 铁山 铜铃 玉泉 银杏 荷叶 芦花")
LAST = words("镇 村 湾 渡 岭 寨")
SIDES, WATERS = words("东 南 西 北"), words("清水河 白浪江 月亮湖 小溪 大运渠")
CROPS = words("茶叶 稻米 棉花 莲藕 柿子 核桃 花生 红薯")
CRAFTS = words("竹编 陶器 剪纸 木雕 蓝布 豆腐 米酒 纸伞")
SEASON = {"春": "花", "夏": "雨", "秋": "果", "冬": "雪"}
HEROES = words("小狐狸 小刺猬 老山羊 小白兔 花斑鹿 灰松鼠")
HELPERS = words("猫头鹰 啄木鸟 大乌龟 老水牛 小蜜蜂 长颈鹿")
LOST = words("钥匙 风筝 帽子 铃铛 雨伞 书包")
SPOTS = words("树洞里 草丛里 石头下 小桥边 井台上 屋顶上")
COOKED, TASTES = words("土豆 豆腐 白菜 茄子 冬瓜 南瓜 莲藕 蘑菇"), words("咸 甜 酸 辣")
SEASONING = {"咸": "盐", "甜": "糖", "酸": "醋", "辣": "辣椒"}
GOODS = words("铅笔 本子 苹果 鸡蛋 毛巾 杯子")


def town(rng: random.Random, name: str) -> dict:
    """An entry of an encyclopedia of invented towns."""
    side, water, crop, craft = (rng.choice(x) for x in (SIDES, WATERS, CROPS, CRAFTS))
    season, homes = rng.choice(list(SEASON)), rng.randint(2, 9)
    where = rng.choice(
        [
            f"在县城的{side}边，靠着{water}",
            f"是{water}{side}岸的一个小地方",
            f"从县城往{side}走，过了{water}就到",
        ]
    )
    living = rng.choice(
        [
            f"多数人家种{crop}，少数人家做{craft}",
            f"靠{crop}过日子，也有人做{craft}",
            f"出产{crop}，{craft}也有名",
        ]
    )
    visit = rng.choice(["外地人坐船", "城里人骑车", "画画的人"])
    end = rng.choice(
        [
            f"先有{water}，后有{name}",
            f"没有{crop}，就没有{name}的好日子",
            f"会做{craft}，走遍{name}都不怕",
        ]
    )
    text = (
        f"{name}{where}。这里有{homes}百户人家，{living}。每到{season}天，满眼是{SEASON[season]}，"
        f"{visit}沿着{water}来到{name}，买一些{crop}，再看人做{craft}。老人们常说：{end}。"
    )
    return {"title": name, "text": text}


def tale(rng: random.Random) -> str:
    hero, helper, thing = (rng.choice(x) for x in (HEROES, HELPERS, LOST))
    wrong, right = rng.sample(SPOTS, 2)
    upset = rng.choice(["急得团团转", "坐在路边哭", "找了一个上午"])
    help_out = rng.choice(["别急，我们一起找", "我的眼睛亮，我来帮你", "先想一想你去过哪里"])
    return (
        f"{hero}丢了{thing}，{upset}。{helper}走过来问：“{hero}，你怎么了？”{hero}说：“我的{thing}不见了。”"
        f"{helper}说：“{help_out}。”他们先到{wrong}找，{wrong}没有{thing}；又到{right}找，"
        f"{thing}果然在{right}。{hero}高兴地说：“谢谢你，{helper}！”"
    )


def recipe(rng: random.Random) -> str:
    taste, (first, second), minutes = (
        rng.choice(TASTES),
        rng.sample(COOKED, 2),
        5 * rng.randint(1, 6),
    )
    cut, spice = rng.choice(["切片", "切块", "切丝"]), SEASONING[taste]
    return (
        f"{first}炒{second}的做法：第一步，把{first}和{second}洗净{cut}；第二步，锅里放油，先放{first}，"
        f"再放{second}；第三步，加一点{spice}，盖上锅盖焖{minutes}分钟。喜欢吃{taste}的人，可以多加一点"
        f"{spice}。这道{first}炒{second}，{minutes}分钟就能上桌。"
    )


def ledger(rng: random.Random) -> str:
    thing, price, count = rng.choice(GOODS), rng.randint(1, 9), rng.randint(2, 9)
    sold, noted = rng.choice(["卖出", "订出", "送走"]), rng.choice(["店主", "伙计", "账房"])
    return (
        f"小店今天{sold}{count}份{thing}，每份{price}元。{count}份{thing}一共{price * count}元，"
        f"{noted}在账本上写下：{thing}，{count}份，收{price * count}元。"
    )


def documents() -> dict[str, list]:
    """{file name: documents}: towns as objects with a title, the rest one document per line."""
    rng = random.Random(7)
    names = [a + b for a in FIRST for b in LAST]
    rng.shuffle(names)
    tales, recipes, ledgers = (
        [make(rng) for _ in range(n)] for make, n in ((tale, 110), (recipe, 110), (ledger, 160))
    )
    stories = tales + recipes + ledgers
    rng.shuffle(stories)
    return {"towns.jsonl": [town(rng, name) for name in names], "stories.txt": stories}


def write(path: Path, rows: list) -> None:
    """Rows in the format that the name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", encoding="gb18030", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return
    lines = [row if path.suffix == ".txt" else json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]" if path.suffix == ".json" else "\n".join(lines)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def main(folder: Path) -> None:
    for make in (
        identity,
        rhyme,
        compare,
        measure,
        kinds,
        reviews,
        extract,
        capitals,
        calendar,
        belle,
        systems,
    ):
        suffix = {kinds: ".json", capitals: ".csv"}.get(make, ".jsonl")
        write(folder / "sft" / f"{make.__name__}{suffix}", make())
    for name, rows in documents().items():
        write(folder / "pt" / name, rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
