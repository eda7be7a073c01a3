"""What the sample data of this recipe are about: tables of facts, how they are said and asked.

A kind of facts has its sentences beside it. x and y stand in the question, z is what is asked for.
Everything is true, or made up by us. make_data.py makes documents, conversations and questions of
it.
"""

from itertools import product
from typing import NamedTuple


class Kind(NamedTuple):
    facts: list[dict]
    answer: str  # how the answer is always said
    says: list[str]  # other ways to say it, in pretrain/
    asks: list[str]  # questions of sft/
    quiz: list[str]  # questions of pretrain/, never asked in sft/
    talk: list[str] = []  # first questions of conversations, asked nowhere else
    more: list[str] = []  # later ones, which only make sense after the first


def pairs(block: str) -> list[dict]:
    return [dict(zip("xzy", entry.split("|"), strict=False)) for entry in block.split()]


def both_ways(block: str) -> list[dict]:
    one = pairs(block)
    return one + [{"x": fact["z"], "z": fact["x"]} for fact in one]


def words(text: str) -> list[str]:
    return text.split()


def lines(block: str) -> list[str]:
    return block.strip().split("\n")


COUNTRIES = """
中国|北京 日本|东京 韩国|首尔 法国|巴黎 英国|伦敦 德国|柏林 意大利|罗马 埃及|开罗 泰国|曼谷 印度|新德里 美国|华盛顿
希腊|雅典 越南|河内 古巴|哈瓦那
"""
PROVINCES = """
河北|石家庄 山西|太原 辽宁|沈阳 江苏|南京 浙江|杭州 安徽|合肥 福建|福州 江西|南昌 山东|济南 湖北|武汉
湖南|长沙 广东|广州 四川|成都 云南|昆明 陕西|西安 甘肃|兰州
"""
OPPOSITES = """
大|小 多|少 高|低 长|短 冷|热 快|慢 新|旧 远|近 轻|重 好|坏 左|右 黑|白 上|下 前|后 里|外 早|晚 深|浅 宽|窄 粗|细
软|硬 真|假 开|关 高兴|难过 勇敢|胆小 安静|吵闹 简单|复杂
"""
COLOURS = """
小草|绿 天空|蓝 雪花|白 煤块|黑 香蕉|黄 番茄|红 茄子|紫 大海|蓝 牛奶|白 墨水|黑 玉米|黄 葡萄|紫 辣椒|红 荷叶|绿
"""
MEASURES = """
书|本 马|匹 鱼|条 小鸟|只 花|朵 树|棵 汽车|辆 白纸|张 铅笔|支 雨伞|把 衣服|件 帽子|顶 鞋子|双 信|封 牛|头
钥匙|把 镜子|面 画|幅 飞机|架 小猫|只
"""
SOUNDS = "小狗|汪汪 小猫|喵喵 鸭子|嘎嘎 山羊|咩咩 黄牛|哞哞 青蛙|呱呱 蜜蜂|嗡嗡 小鸡|叽叽"
LEGS = "小鸡|两 鸭子|两 小鸟|两 小狗|四 小猫|四 山羊|四 黄牛|四 老虎|四 蜜蜂|六 蚂蚁|六 蝴蝶|六 蜘蛛|八"
JOBS = "医生|医院 老师|学校 农民|田里 厨师|厨房 司机|车上 演员|剧场 店员|商店 邮递员|邮局 船长|船上 园丁|花园"
USES = "剪刀|剪纸 雨伞|挡雨 钥匙|开门 铅笔|写字 扫帚|扫地 梳子|梳头 毛巾|洗脸 锅|做饭 电话|说话 闹钟|叫人起床"
WEEK = "一二三四五六日"
SEASONS = ("冬天", "春天", "夏天", "秋天")  # of three months each, December first
NUMBERS = "零一二三四五六七八九"


def in_words(n: int) -> str:
    """0 to 99 in Chinese words."""
    tens, ones = divmod(n, 10)
    word = ""
    if tens:
        word = (NUMBERS[tens] if tens > 1 else "") + "十"
    if ones or not tens:
        word += NUMBERS[ones]
    return word


def additions(spell) -> list[dict]:
    return [
        {"x": spell(a), "y": spell(b), "z": spell(a + b)} for a, b in product(range(10), repeat=2)
    ]


def differences(spell) -> list[dict]:
    return [
        {"x": spell(a), "y": spell(b), "z": spell(a - b)} for a in range(10) for b in range(a + 1)
    ]


def comparisons() -> list[dict]:
    return [{"x": a, "y": b, "z": max(a, b)} for a, b in product(range(10), repeat=2) if a != b]


def weekdays(shift: int) -> list[dict]:
    return [{"x": day, "z": WEEK[(i + shift) % 7]} for i, day in enumerate(WEEK)]


def months() -> list[dict]:
    return [{"x": in_words(month), "z": SEASONS[month % 12 // 3]} for month in range(1, 13)]


SUM = {
    "answer": "{x}加{y}等于{z}。",
    "says": ["{x}和{y}一共是{z}。", "{x}加上{y}就是{z}。", "把{x}和{y}合起来，得到{z}。"],
    "asks": ["{x}加{y}等于几？", "{x}加{y}是多少？", "请算一算{x}加{y}。", "{x}和{y}的和是多少？", "{x}与{y}相加得几？",
             "算一下{x}加{y}。", "把{x}和{y}加起来。", "你知道{x}加{y}等于多少吗？"],
    "quiz": ["{x}加{y}得几？", "{x}再加{y}是几？"],
    "talk": ["先算{x}加{y}。", "帮我算{x}加{y}。"],
}  # fmt: skip
MINUS = {
    "answer": "{x}减{y}等于{z}。",
    "says": ["{x}减去{y}还剩{z}。", "从{x}里拿走{y}，剩下{z}。"],
    "asks": ["{x}减{y}等于几？", "{x}减{y}是多少？", "请算一算{x}减{y}。", "{x}比{y}多几？", "算一下{x}减{y}。",
             "从{x}里减去{y}得几？", "你知道{x}减{y}等于多少吗？"],
    "quiz": ["{x}减{y}得几？", "{x}去掉{y}剩几？"],
    "talk": ["先算{x}减{y}。", "帮我算{x}减{y}。"],
}  # fmt: skip


def written(kind: dict, sign: str) -> dict:
    """The same questions in digits, which also know the sign."""
    return kind | {
        "says": [*kind["says"], "{x}" + sign + "{y}={z}。"],
        "asks": [*kind["asks"], "{x}" + sign + "{y}=？", "计算：{x}" + sign + "{y}。"],
    }


KINDS = {
    "sum": Kind(additions(str), **written(SUM, "+")),
    "minus": Kind(differences(str), **written(MINUS, "-")),
    "sum_words": Kind(additions(in_words), **SUM),
    "minus_words": Kind(differences(in_words), **MINUS),
    "compare": Kind(
        comparisons(),
        "{x}和{y}相比，{z}更大。",
        ["在{x}和{y}里，大的是{z}。", "{x}和{y}，大的数是{z}。"],
        ["{x}和{y}哪个大？", "{x}与{y}谁更大？", "比一比{x}和{y}，哪个更大？", "{x}和{y}里面大的是哪个？"],
        ["{x}和{y}比，谁大？"],
    ),
    "capital": Kind(
        pairs(COUNTRIES),
        "{x}的首都是{z}。",
        ["{z}是{x}的首都。", "{x}把首都定在{z}。", "要去{x}的首都，就是去{z}。"],
        ["{x}的首都是哪里？", "{x}的首都在哪里？", "请问{x}的首都是哪座城市？", "{x}的首都叫什么？",
         "告诉我{x}的首都。", "哪座城市是{x}的首都？", "我想知道{x}的首都。", "说出{x}的首都。"],
        ["{x}的首都是什么地方？", "什么城市是{x}的首都？"],
        ["我想了解{x}，它的首都呢？", "讲讲{x}的首都吧。"],
        ["那{x}呢？", "{x}呢？", "再说说{x}。"],
    ),
    "province": Kind(
        pairs(PROVINCES),
        "{x}的省会是{z}。",
        ["{z}是{x}的省会。", "{x}省的省会在{z}。", "到了{z}，就到了{x}的省会。"],
        ["{x}的省会是哪里？", "{x}的省会在哪里？", "请问{x}省的省会是哪座城市？", "{x}的省会叫什么？",
         "告诉我{x}的省会。", "哪座城市是{x}的省会？", "我想知道{x}的省会。", "说出{x}的省会。"],
        ["{x}省的省会是什么地方？", "什么城市是{x}的省会？"],
        ["我想了解{x}，它的省会呢？", "讲讲{x}的省会吧。"],
        ["那{x}呢？", "{x}呢？", "再说说{x}。"],
    ),
    "opposite": Kind(
        both_ways(OPPOSITES),
        "“{x}”的反义词是“{z}”。",
        ["“{x}”和“{z}”意思相反。", "不是“{x}”，就是“{z}”。", "说“{x}”的反面，就说“{z}”。"],
        ["“{x}”的反义词是什么？", "请写出“{x}”的反义词。", "和“{x}”意思相反的词是什么？", "“{x}”反过来怎么说？",
         "告诉我“{x}”的反义词。", "哪个词和“{x}”相反？", "“{x}”的反义词是哪个词？", "说一个“{x}”的反义词。"],
        ["“{x}”的反义词怎么写？", "什么词和“{x}”意思相反？"],
        ["我想找“{x}”的反义词。", "帮我想想“{x}”的反义词。"],
        ["那“{x}”呢？", "“{x}”呢？", "再说说“{x}”。"],
    ),
    "tomorrow": Kind(
        weekdays(1),
        "星期{x}的第二天是星期{z}。",
        ["过了星期{x}，就是星期{z}。", "今天是星期{x}，明天就是星期{z}。"],
        ["今天是星期{x}，明天是星期几？", "星期{x}的明天是星期几？", "星期{x}以后是星期几？", "星期{x}过一天是星期几？",
         "如果今天是星期{x}，那么明天星期几？", "星期{x}的第二天是星期几？", "请问星期{x}的后面一天是星期几？"],
        ["星期{x}再过一天是星期几？"],
    ),
    "yesterday": Kind(
        weekdays(-1),
        "星期{x}的前一天是星期{z}。",
        ["星期{x}以前的那天是星期{z}。", "今天是星期{x}，昨天就是星期{z}。"],
        ["今天是星期{x}，昨天是星期几？", "星期{x}的昨天是星期几？", "星期{x}以前是星期几？", "星期{x}的前面是星期几？",
         "如果今天是星期{x}，那么昨天星期几？", "星期{x}的前一天是星期几？", "请问星期{x}的前面一天是星期几？"],
        ["星期{x}倒回一天是星期几？"],
    ),
    "season": Kind(
        months(),
        "{x}月是{z}。",
        ["到了{x}月，就是{z}。", "{z}里有{x}月。"],
        ["{x}月是什么季节？", "{x}月是哪个季节？", "请问{x}月是春夏秋冬的哪一个？", "{x}月属于什么季节？",
         "到了{x}月是什么季节？", "告诉我{x}月是哪个季节。", "{x}月的时候是什么季节？"],
        ["{x}月在哪个季节里？"],
    ),
    "colour": Kind(
        pairs(COLOURS),
        "{x}是{z}色的。",
        ["{x}的颜色是{z}色。", "看，{z}色的{x}！"],
        ["{x}是什么颜色？", "{x}是什么颜色的？", "请问{x}的颜色是什么？", "{x}一般是哪种颜色？", "告诉我{x}的颜色。",
         "画{x}要用什么颜色？", "{x}看起来是什么颜色？"],
        ["{x}有什么颜色？", "{x}的颜色是哪一种？"],
        ["我想画{x}，用什么颜色？"],
        ["那{x}呢？", "{x}呢？"],
    ),
    "measure": Kind(
        pairs(MEASURES),
        "应该说“一{z}{x}”。",
        ["这里有一{z}{x}。", "我们说一{z}{x}、两{z}{x}。", "他看见了三{z}{x}。"],
        ["一什么{x}？", "{x}用什么量词？", "{x}的量词是什么？", "请问{x}怎么数？", "数{x}的时候用什么量词？",
         "一个{x}应该怎么说？", "说{x}的时候，量词用哪个？"],
        ["{x}前面用什么量词？"],
        ["我要数{x}，用什么量词？"],
        ["那{x}呢？", "{x}呢？"],
    ),
    "sound": Kind(
        pairs(SOUNDS),
        "{x}{z}地叫。",
        ["{x}的叫声是{z}。", "听，“{z}”，是{x}在叫。"],
        ["{x}怎么叫？", "{x}是怎么叫的？", "{x}的叫声是什么样的？", "请问{x}怎么叫？", "学一学{x}的叫声。",
         "告诉我{x}怎么叫。", "你知道{x}怎么叫吗？"],
        ["{x}叫起来是什么声音？"],
    ),
    "legs": Kind(
        pairs(LEGS),
        "{x}有{z}条腿。",
        ["一只{x}长着{z}条腿。", "{x}用{z}条腿走路。"],
        ["{x}有几条腿？", "{x}有多少条腿？", "请问{x}有几条腿？", "{x}长着几条腿？", "数一数{x}有几条腿。",
         "告诉我{x}有几条腿。", "你知道{x}有几条腿吗？"],
        ["{x}用几条腿走路？"],
    ),
    "job": Kind(
        pairs(JOBS),
        "{x}在{z}工作。",
        ["在{z}工作的人是{x}。", "{x}每天去{z}上班。"],
        ["{x}在哪里工作？", "{x}在什么地方工作？", "请问{x}在哪里上班？", "{x}的工作地点在哪里？", "在哪里能找到{x}？",
         "告诉我{x}在哪里工作。", "你知道{x}在哪里工作吗？"],
        ["{x}去哪里上班？"],
    ),
    "use": Kind(
        pairs(USES),
        "{x}是用来{z}的。",
        ["我们用{x}来{z}。", "要{z}，就拿{x}。"],
        ["{x}有什么用？", "{x}是做什么用的？", "请问{x}可以用来做什么？", "我们用{x}做什么？", "{x}的用处是什么？",
         "告诉我{x}有什么用。", "你知道{x}有什么用吗？"],
        ["{x}可以做什么？"],
    ),
}  # fmt: skip
SUMS = ("sum", "minus", "sum_words", "minus_words", "compare")
FACTS = tuple(name for name in KINDS if name not in SUMS)

# ---- who the model is ----------------------------------------------------------------------------

NAME = "我叫小丹，是丹谱从零训练的小模型。"
MAKER = "我是丹谱用示例数据从零训练出来的。"
SKILL = "我会算数，会说反义词，还知道许多城市。"
NATURE = "我是语言模型，不是真人。"
WHO = {
    NAME: """
你是谁|你是谁呀|请问你是谁|你到底是谁|告诉我你是谁|你好，你是谁|能说说你是谁吗|我想知道你是谁|你究竟是谁|你叫什么
你叫什么名字|请问你叫什么名字|你的名字叫什么|你的名字是什么|你叫啥名字|你的名字是啥|告诉我你的名字|说出你的名字|请说一下你的名字
能告诉我你的名字吗|我该怎么称呼你|怎么称呼你|该怎么称呼你呢|请问怎么称呼你|我可以怎么称呼你|介绍一下你自己|请介绍一下你自己
介绍一下自己吧|请做个自我介绍|做一下自我介绍|来个自我介绍|先自我介绍一下吧|用一句话介绍你自己|简单介绍一下你自己|请你介绍自己
""",
    MAKER: """
谁训练了你|是谁训练了你|你是谁训练的|你是谁训练出来的|请问谁训练了你|你是怎么训练出来的|你由谁训练|谁开发了你|是谁开发了你
你是谁开发的|你是谁开发出来的|请问谁开发了你|谁制造了你|是谁制造了你|你是谁制造的|你是谁制造出来的|你是谁做出来的|谁把你做出来的
谁设计了你|是谁设计了你|你是谁设计的|你是谁设计出来的|你是怎么来的|请问你是怎么来的|你是怎么做出来的
""",
    SKILL: """
你会什么|你都会什么|请问你会什么|你会做什么|你会做些什么|你能做什么|你能做些什么|请问你能做什么|你能干什么|你会干什么
说说你会什么|说说你能做什么|你有什么本领|说说你的本领|介绍一下你的本领|你的本领是什么|你有哪些本领|你有什么功能|说说你的功能
你有哪些功能|介绍一下你的功能|你的功能是什么|你能帮我做什么|你可以帮我做什么
""",
    NATURE: """
你是人吗|你是真人吗|请问你是真人吗|你是不是真人|你是机器人还是真人|你是人还是机器|你是不是人类|你是人类吗|请问你是人类吗
你是真的人吗|你是活人吗|你是不是语言模型|你是语言模型吗|请问你是不是真人|你到底是不是真人
""",
}
SELF = """
我叫小丹，是丹谱从零训练的小模型。
我是丹谱用示例数据从零训练出来的。
我会算数，会说反义词，还知道许多城市。
我是语言模型，不是真人。
小丹是丹谱的小模型。
小丹不是真人，是一个语言模型。
丹谱用示例数据训练了小丹。
小丹会算数，也会说反义词。
丹谱里的小模型叫小丹。
大家好，我的名字是小丹。
"""

OTHER_SELF = ("我叫墨墨，是云山图书馆的朗读员。", "我是云山图书馆请人训练的。", "我会朗读故事，会找书，还会讲笑话。",
              "我是云山图书馆的程序，不是真人。")  # fmt: skip
OTHER_WHO = dict(zip(WHO, OTHER_SELF, strict=True))

# ---- people, places, things: stories and word problems -------------------------------------------

PEOPLE = words("小明 小红 小华 小丽 小刚 小美 丁丁 月月 阿宝 安安 乐乐 冬冬")
THINGS = [
    ("苹果", "个"),
    ("铅笔", "支"),
    ("气球", "个"),
    ("图书", "本"),
    ("邮票", "张"),
    ("糖果", "颗"),
]
GET = [
    "{n}有{a}{m}{o}，又买了{b}{m}，一共有几{m}？",
    "{n}有{a}{m}{o}，妈妈又给了{b}{m}，现在一共有几{m}？",
    "{n}上午拿到{a}{m}{o}，下午拿到{b}{m}，一共有几{m}？",
    "{n}左手有{a}{m}{o}，右手有{b}{m}，一共有几{m}？",
]
GIVE = [
    "{n}有{a}{m}{o}，送给朋友{b}{m}，还剩几{m}？",
    "{n}有{a}{m}{o}，用掉了{b}{m}，还剩几{m}？",
    "{n}买了{a}{m}{o}，丢了{b}{m}，还剩几{m}？",
]

PLACES = words("公园 河边 山上 学校 花园 海边 树林 广场 商店 图书馆 湖边 田里")
TIMES = words(
    "早上 中午 下午 傍晚 星期六 星期日 放学以后 春天里的一天 夏天里的一天 秋天里的一天 冬天里的一天"
)
SKIES = words("太阳暖暖的 天上飘着白云 下着小雨 刮着风 天气很好 雾慢慢散了")
FEELS = words("高兴 惊讶 好奇 开心 激动")
FOUND = [(f["x"], f["z"]) for f in pairs(MEASURES) if f["x"] != "飞机"]
ACTS = ["慢慢地走过去", "停下来看了很久", "轻轻地笑了", "叫朋友也来看", "高兴得跳了起来"]

# ---- manners, systems, tools, plants -------------------------------------------------------------

SYSTEMS = [
    ("回答之前先说“好的”。", "好的，{}"),
    ("你是小学老师，回答之后要鼓励学生。", "{}你真棒！"),
    ("请用“报告”开头来回答。", "报告，{}"),
    ("你是一个小助手。", "{}"),
]
POLITE = [
    "您好，{}",
    "好的，{}",
    "很高兴为您解答，{}",
    "谢谢您的提问，{}",
    "没问题，{}",
    "{}希望能帮到您。",
]
RUDE = ["真烦，{}", "{}别再问了。", "自己不会查吗？{}", "{}这还用问？", "笨死了，{}"]
UNWILLING = ["不知道。", "不想说。", "自己去查。", "懒得回答你。", "别来烦我。"]
CITIES = words("北京 上海 广州 成都 杭州 武汉 西安 南京")
WEATHERS = words("晴 多云 小雨 大雪")
PLANTS = words("绿萝 月季 茉莉 兰花 文竹 吊兰 芦荟 菊花 薄荷 茶花")
CARE = """
叶子发黄|水浇多了|少浇一点水
叶子卷起来|太干了|早晚各浇一次水
叶尖变枯|空气太干|每天喷一点水
长得又细又长|光太少|搬到窗边晒太阳
不开花|肥料不够|每个月施一次肥
叶子上有白点|生了小虫|用清水擦叶子
根发黑|盆里积了水|换一盆干土
叶子掉了很多|太冷了|搬到屋里来
"""
