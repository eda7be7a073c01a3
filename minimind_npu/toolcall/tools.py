"""The tools that are there: calculator, date, units, lookup.

    registry = built_in()                                      # toolcall/registry.py
    registry.call("calculator", {"expression": "37*(52+18)"})   # {"result": 2590}

None of them runs code, reads a file or opens a connection, and each ends at once: what a model
writes is a size-limited expression, a date, an amount, a word of a table. What they cannot do is a
ValueError, which the registry makes a text of.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import unicodedata
from datetime import date as Date
from datetime import timedelta
from fractions import Fraction

from toolcall.registry import Registry

# ---- calculator ----------------------------------------------------------------------------------

LONGEST = 300  # characters of an expression
BITS = 4096  # of a whole number, some 1,200 digits
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
FUNCTIONS = {"abs": abs, "max": max, "min": min, "round": round, "sqrt": math.sqrt}
SPELLINGS = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**", "＾": "**"})
PIECES = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+|[a-z]+|[-+*/%(),\s])*")


def calculator(expression: str) -> dict:
    """计算"""
    if len(expression) > LONGEST:
        raise ValueError(f"an expression of more than {LONGEST} characters")
    written = unicodedata.normalize("NFKC", expression).translate(SPELLINGS).strip()
    words = set(re.findall("[a-z]+", written)) - FUNCTIONS.keys()
    if words or not PIECES.fullmatch(written):
        known = ", ".join(FUNCTIONS)
        raise ValueError(f"an expression is made of numbers, + - * / // % ** ( ) and {known}")
    try:
        tree = ast.parse(written, mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("not an expression that can be read") from None
    return {"result": plain(value_of(tree.body))}


def value_of(node: ast.expr) -> int | float:
    """The value of a tree of numbers, operators and FUNCTIONS; ValueError for anything else and for
    numbers that get too large."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return checked(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](value_of(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return checked(combined(type(node.op), value_of(node.left), value_of(node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return checked(applied(node.func.id, [value_of(part) for part in node.args]))
    raise ValueError("not an expression of numbers")


def combined(kind: type, left, right) -> int | float:
    is_whole = isinstance(left, int) and isinstance(right, int)
    if kind is ast.Pow:
        # before it is computed: 9**9**9 would never end
        if is_whole and left and right * math.log2(abs(left)) > BITS:
            raise ValueError("a power that large is not computed")
    elif kind is ast.Div and is_whole and right and left % right == 0:
        return left // right
    return OPERATORS[kind](left, right)


def applied(name: str, parts: list) -> int | float:
    if name == "round" and len(parts) == 2:
        if not isinstance(parts[1], int):
            raise ValueError("round(number, places): places is a whole number")
        return round(parts[0], max(-20, min(20, parts[1])))
    if name in ("max", "min") and parts:
        return FUNCTIONS[name](parts)
    if len(parts) != 1:
        raise ValueError(f"{name} does not take {len(parts)} numbers")
    return FUNCTIONS[name](parts[0])


def size(number: int | float) -> int:
    """Bits before the point."""
    whole = number if isinstance(number, int) else math.ceil(abs(number))
    return abs(whole).bit_length()


def checked(number) -> int | float:
    if isinstance(number, complex):
        raise ValueError("no real number")
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError("no number that can be written")
    if size(number) > BITS:
        raise ValueError("a number that large is not computed")
    return number


def plain(number: int | float) -> int | float:
    """Without what floats add: 0.1 + 0.2 is 0.3; 6.0 is 6."""
    if isinstance(number, int):
        return number
    short = float(f"{number:.12g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


# ---- date ----------------------------------------------------------------------------------------

WEEKDAYS = "一二三四五六日"
DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})", re.ASCII)


def date(date: str, days: int = 0) -> dict:
    """某日再过几天是哪天"""
    parts = DATE.fullmatch(date.strip())
    try:
        start = Date(*map(int, parts.groups()))
    except (AttributeError, ValueError):
        raise ValueError(f"{date[:20]} is no date; one is written 2024-2-28") from None
    try:
        found = start + timedelta(days=days)
    except OverflowError:
        raise ValueError("a date before the year 1 or after 9999") from None
    written = f"{found.year}-{found.month}-{found.day}"
    return {"date": written, "weekday": f"星期{WEEKDAYS[found.weekday()]}"}


# ---- units ---------------------------------------------------------------------------------------

UNITS = {  # kind -> unit -> how many of the first one it is
    "length": {
        "米": 1,
        "毫米": Fraction(1, 1000),
        "厘米": Fraction(1, 100),
        "分米": Fraction(1, 10),
        "里": 500,
        "千米": 1000,
        "公里": 1000,
        "英寸": Fraction("0.0254"),
        "英尺": Fraction("0.3048"),
        "英里": Fraction("1609.344"),
    },
    "weight": {
        "克": 1,
        "两": 50,
        "斤": 500,
        "千克": 1000,
        "公斤": 1000,
        "吨": 1000000,
        "磅": Fraction("453.59237"),
    },
    "time": {"秒": 1, "分钟": 60, "小时": 3600, "天": 86400, "星期": 604800},
}


def units(value: float, unit: str, to: str) -> dict:
    """单位换算"""
    amount = Fraction(str(value))
    if {unit, to} == {"摄氏度", "华氏度"}:
        found = amount * 9 / 5 + 32 if to == "华氏度" else (amount - 32) * 5 / 9
        return {"value": plain(float(found)), "unit": to}
    for kind in UNITS.values():
        if unit in kind and to in kind:
            return {"value": plain(float(amount * kind[unit] / kind[to])), "unit": to}
    known = ", ".join(name for kind in UNITS.values() for name in kind)
    raise ValueError(f"no way from {unit[:20]} to {to[:20]}; known: {known}, 摄氏度, 华氏度")


# ---- lookup --------------------------------------------------------------------------------------

# a made-up shop: yuan of each thing, and what its colour costs more
THINGS = {
    "苹果": 6,
    "香蕉": 5,
    "番茄": 4,
    "茄子": 7,
    "玉米": 3,
    "葡萄": 16,
    "辣椒": 9,
    "牛奶": 12,
    "墨水": 13,
    "铅笔": 2,
    "白纸": 8,
    "图书": 28,
    "邮票": 1,
    "糖果": 11,
    "气球": 3,
    "雨伞": 32,
    "衣服": 79,
    "帽子": 35,
    "鞋子": 88,
    "毛巾": 15,
    "镜子": 19,
    "剪刀": 14,
    "梳子": 6,
    "扫帚": 18,
    "钥匙": 5,
    "闹钟": 45,
    "电话": 66,
    "汽车": 90,
}
COLOURS = {"": 0, "红": 1, "黄": 2, "绿": 3, "蓝": 4, "紫": 5, "黑": 6}
PRICES = {
    colour + thing: price + more
    for thing, price in THINGS.items()
    for colour, more in COLOURS.items()
}


def looked_up_in(table: dict):
    """The tool of a table of one's own: a word -> {word: what the table has}."""

    def lookup(key: str) -> dict:
        """查价格表"""
        word = unicodedata.normalize("NFKC", key).strip()
        if word not in table:
            raise ValueError(f"nothing is known of {word[:40]}")
        return {word: table[word]}

    return lookup


# ---- all of them ---------------------------------------------------------------------------------


def of(required: list[str], **properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": required}


TEXT = {"type": "string"}
SCHEMAS = {
    "calculator": of(["expression"], expression=TEXT),
    "date": of(["date"], date=TEXT, days={"type": "integer"}),
    "units": of(["value", "unit", "to"], value={"type": "number"}, unit=TEXT, to=TEXT),
    "lookup": of(["key"], key=TEXT),
}


def built_in(table: dict | None = None, **limits) -> Registry:
    """The four tools. table: what lookup knows, by default PRICES; limits: of Registry."""
    lookup = looked_up_in(PRICES if table is None else table)
    registry = Registry(**limits)
    for function in (calculator, date, units, lookup):
        registry.add(function, SCHEMAS[function.__name__])
    return registry
