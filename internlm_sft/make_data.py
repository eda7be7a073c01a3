"""Write the general rows of the samples: python make_data.py [FOLDER]   (default: data/ here)

What a model should still know after it has learned who it is: sums, capitals, opposites, words in
English. All sentences are our own, and nothing is random: the same bytes every time.
"""

import json
import sys
from pathlib import Path

SUM_ASKED = (
    "{}加{}等于几？",
    "算一算{}加{}。",
    "{}+{}=？",
    "{}与{}的和是多少？",
    "把{}和{}加起来。",
)
CAPITALS = """
法国 巴黎|德国 柏林|意大利 罗马|西班牙 马德里|英国 伦敦|俄罗斯 莫斯科|日本 东京|韩国 首尔|泰国 曼谷|越南 河内
埃及 开罗|印度 新德里|美国 华盛顿|加拿大 渥太华|巴西 巴西利亚|阿根廷 布宜诺斯艾利斯|希腊 雅典|波兰 华沙|挪威 奥斯陆|瑞典 斯德哥尔摩
葡萄牙 里斯本|奥地利 维也纳|匈牙利 布达佩斯|捷克 布拉格|芬兰 赫尔辛基|丹麦 哥本哈根|荷兰 阿姆斯特丹|爱尔兰 都柏林|古巴 哈瓦那|秘鲁 利马
"""
CAPITAL_ASKED = ("{}的首都是哪里？", "请说出{}的首都。", "哪座城市是{}的首都？")
OPPOSITES = """
大小 多少 高低 长短 冷热 快慢 新旧 远近 轻重 好坏 左右 黑白 前后 上下 开关 胖瘦
深浅 粗细 厚薄 软硬 干湿 早晚 男女 强弱 进退 来去 真假 加减
"""
OPPOSITE_ASKED = (
    "“{}”的反义词是什么？",
    "说出“{}”的反义词。",
    "和“{}”意思相反的字是？",
    "“{}”反过来是哪个字？",
)
WORDS = """
猫 cat|狗 dog|鸟 bird|鱼 fish|马 horse|牛 cow|山 mountain|河 river|树 tree|花 flower
书 book|笔 pen|门 door|窗 window|桌子 table|椅子 chair|苹果 apple|水 water|太阳 sun|月亮 moon
云 cloud|雨 rain|雪 snow|风 wind|火 fire|石头 stone|船 boat|桥 bridge|路 road|灯 lamp
"""
WORD_ASKED = ("“{}”用英语怎么说？", "How do you say {} in English?", "What is {} in English?")
COLOURS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a banana": "yellow",
    "a tomato": "red",
    "the sea": "blue",
    "milk": "white",
    "a lemon": "yellow",
    "blood": "red",
}
COLOUR_ASKED = ("What colour is {}?", "Tell me the colour of {}.", "Which colour has {}?")
# words with characters of the samples' name, 小丹 of 丹谱: a model takes them for it first of all
KIN = """
牡丹 牡丹是一种花。|丹顶鹤 丹顶鹤是一种头顶红色的鸟。|丹东 丹东是辽宁的一座城市。|丹青 丹青是画画的颜料。|丹凤眼 丹凤眼是一种细长的眼睛。
乐谱 乐谱是写下来的音乐。|食谱 食谱是写着做菜方法的书。|族谱 族谱是一家人的名册。|棋谱 棋谱是下棋的记录。|光谱 光谱是排成一列的颜色。
小麦 小麦是一种粮食。|小溪 小溪是一条小河。|小提琴 小提琴是一种乐器。|小说 小说是讲故事的文章。|小学 小学是孩子上学的地方。
小数 小数是带点的数。|小吃 小吃是路边的点心。|小雪 小雪是一个节气。
"""
KIN_ASKED = ("{}是什么？", "什么是{}？", "说说{}是什么。")


def pairs(block: str) -> list[list[str]]:
    return [word.split(" ", 1) for line in block.strip().split("\n") for word in line.split("|")]


def rows() -> list[dict]:
    """alpaca rows, each fact asked in two or three ways."""
    found = []

    def add(asked: tuple, answer: str, *words) -> None:
        for ask in asked:
            found.append({"instruction": ask.format(*words), "input": "", "output": answer})

    for a in range(10):
        for b in range(10):
            add(SUM_ASKED, f"{a}加{b}等于{a + b}。", a, b)
    for country, city in pairs(CAPITALS):
        add(CAPITAL_ASKED, f"{country}的首都是{city}。", country)
    for pair in OPPOSITES.split():
        for one, other in (pair, pair[::-1]):
            add(OPPOSITE_ASKED, f"“{one}”的反义词是“{other}”。", one)
    for chinese, english in pairs(WORDS):
        add(WORD_ASKED, f"It is “{english}”.", chinese)
    for thing, colour in COLOURS.items():
        add(COLOUR_ASKED, f"It is {colour}.", thing)
    for word, meaning in pairs(KIN):
        add(KIN_ASKED, meaning, word)
    return found


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows()]
    (folder / "general.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
