"""What an answer says: its final part, and the numbers in it as a person reads them.

Read are signs and money in either order (-$5, $-5, every kind of minus), thousands (1,000 1'000
1{,}000 1\\,000), decimals without a zero (.5), fractions (3/4, 1½, \\frac{1}{2}), powers of ten,
万 亿 million %, full-width digits; and, where no such number stands, circled digits and Chinese
numerals. Exponents of units (m²), footnotes and list marks (①) are none of an answer's numbers.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

# ---- the part that counts ------------------------------------------------------------------------

FINISHED_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
OPENED_TAG = re.compile("<answer>", re.IGNORECASE)
BOX = re.compile(r"\\boxed\s*\{")


def final_answer(answer: str) -> str:
    """What counts of an answer: its last \\boxed{}, in its last <answer>, after its last ####, or
    all that follows its thought. A tag or mark with nothing after it does not take back what stood
    before; a thought that was cut off is no answer."""
    said = answer.split("</think>")[-1].split("<think>")[0]
    return unboxed(after_mark(in_tag(said))).strip()


def in_tag(said: str) -> str:
    finished = FINISHED_TAG.findall(said)
    if finished:
        return last_with_words(finished)
    before, *opened = OPENED_TAG.split(said)
    return last_with_words(opened) or before


def after_mark(said: str) -> str:
    before, *marked = said.split("####")
    found = last_with_words(marked).strip()
    if not found:
        return before
    first_line = found.partition("\n")[0]
    return first_line if numbers(first_line) else found  # what follows a number explains it


def unboxed(said: str) -> str:
    for box in reversed(list(BOX.finditer(said))):
        inside = said[box.end() : end_of_group(said, box.end())]
        if inside.strip():
            return inside
    return said


def end_of_group(said: str, start: int) -> int:
    """Where the brace closes that was opened before `start`; the end where it never does."""
    depth = 1
    for at in range(start, len(said)):
        depth += {"{": 1, "}": -1}.get(said[at], 0)
        if not depth:
            return at
    return len(said)


def last_with_words(parts: list[str]) -> str:
    return next((part for part in reversed(parts) if part.strip()), "")


# ---- characters ----------------------------------------------------------------------------------

LATEX = (
    (r"\\(?:text|textbf|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\{\s*,\s*\}", ","),
    (r"\\!", ""),
    (r"\\(?:[,;: ]|thinspace|quad)", "\u2009"),
    (r"(?<=\d)\s*(?=\\[dtc]?frac)", " "),
    (r"\\[dtc]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r"\1/\2"),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\1/\2"),
    (r"\\(?:times|cdot)(?![A-Za-z])", "×"),
    (r"\\(?:left|right)(?![A-Za-z])", ""),
    (r"\\[()\[\]]", " "),
    (r"\\([%$])", r"\1"),
)
SUPERSCRIPTS = "[⁰¹²³⁴-⁹⁺⁻]+"
SUBSCRIPTS = "[₀-₉]+"
VULGAR = "[¼-¾⅐-⅞]"
SPACES = "[\u00a0\u2006-\u2009\u202f]"  # that stand inside a number
MINUSES = "[\u2010-\u2013\u2212\u2796]"  # hyphens, figure and en dash, minus
UNIT_POWERS = (
    r"(?<=[^\W\d_])\s*\^\s*\{?[+-]?\d+\}?",  # m^2
    r"(?<=(?<![A-Za-z])m)[23](?![A-Za-z\d])|(?<=[kcdm]m)[23](?![A-Za-z\d])",  # 12 m2, 3 cm3
)


def normalised(words: str) -> str:
    """LaTeX, full-width and other forms of characters -> ordinary ones: 1 1/2, 10^3, 1_000."""
    for pattern, ordinary in LATEX:
        words = re.sub(pattern, ordinary, words)
    words = re.sub(rf"(?<=\d){SPACES}(?=\d{{3}}(?!\d))|(?<=\d) (?=000(?!\d))", "_", words)
    words = re.sub(SUPERSCRIPTS, lambda found: "^" + found[0], words)
    words = re.sub(SUBSCRIPTS, "", words)
    words = re.sub(rf"(?<=\d)(?={VULGAR})", " ", words)
    words = unicodedata.normalize("NFKC", words).replace("\u2044", "/").replace("’", "'")
    words = re.sub(MINUSES, "-", words)
    for pattern in UNIT_POWERS:
        words = re.sub(pattern, "", words)
    words = re.sub(r"\.{2,}|(?<=[A-Za-z])\.(?=\d)", " ", words)  # ...5, No.5
    return re.sub(r"(?<=[=:是为得])\s*-\s+(?=[\d.$¥€£])", "-", words)


def is_mark(character: str) -> bool:
    """①, ⑴, ❶ and the like: digits that number things."""
    if unicodedata.category(character) != "No":
        return False
    return not unicodedata.decomposition(character).startswith(("<super>", "<sub>", "<fraction>"))


def readable(words: str) -> str:
    """Normalised words whose numbers are digits: marks and Chinese numerals count only where
    nothing else is there."""
    without_marks = "".join(" " if is_mark(c) else c for c in words)
    text = normalised(without_marks)
    if NUMBER.search(text):
        return text
    if without_marks != words:
        return normalised(
            "".join(f" {unicodedata.numeric(c):.0f} " if is_mark(c) else c for c in words)
        )
    return NUMERAL.sub(lambda found: in_digits(found[0]), text)


# ---- Chinese numerals ----------------------------------------------------------------------------

DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")}
DIGITS |= {c: i for i, c in enumerate("〇壹贰叁肆伍陆柒捌玖")} | {"两": 2}
UNITS = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
INTEGER = f"[{''.join([*DIGITS, *UNITS, *MYRIADS])}]+"
COMMON_WORDS = "(?!一[共起样定些般直切旦边会下])(?<!万)"  # 一共 is no number
NUMERAL = re.compile(f"(?:百分之|{INTEGER}分之)?{COMMON_WORDS}{INTEGER}(?:点[{''.join(DIGITS)}]+)?")
COUNTED_IN = "个元块只条本张人天年岁次米件名头辆支朵颗棵"
BARE_NUMERAL = re.compile(f"(?:负|零下)?{NUMERAL.pattern}[{COUNTED_IN}]?[。.]?")


def in_digits(numeral: str) -> str:
    """三千零五 -> 3005, 二〇二四 -> 2024, 三点五 -> 3.5, 三分之一 -> 1/3, 百分之五 -> 5%."""
    if "分之" in numeral:
        below, _, above = numeral.partition("分之")
        return f"{in_digits(above)}%" if below == "百" else f"{in_digits(above)}/{in_digits(below)}"
    whole, point, decimals = numeral.partition("点")
    digits = one_by_one(whole) if all(c in DIGITS for c in whole) else str(counted(whole))
    return f"{digits}.{one_by_one(decimals)}" if point else digits


def one_by_one(numeral: str) -> str:
    return "".join(str(DIGITS[c]) for c in numeral)


def counted(numeral: str) -> int:
    """一亿二千万, 三千零五, 两百五 (250)."""
    total = 0  # of the myriads that are complete
    part = 0  # below the next myriad
    digit = None
    unit = 1  # the last one
    for c in numeral:
        if c in DIGITS:
            digit = DIGITS[c]
            unit = unit if digit else 1
            continue
        if c in UNITS:
            unit = UNITS[c]
            part += (1 if digit is None else digit) * unit
        else:
            unit = MYRIADS[c]
            part += digit or 0
            if 0 < total < unit:  # 三万亿
                total = (total + part) * unit
            else:
                total += (part or 1) * unit
            part = 0
        digit = None
    return total + part + (digit or 0) * max(1, unit // 10)


# ---- numbers -------------------------------------------------------------------------------------

SIGN = r"(?:(?<![A-Za-z\d.)\]}%-])-|负\s?|零下\s?|\bminus\s|\bnegative\s)"
MONEY = r"(?:(?:US|HK|NT|RMB|CNY|USD)?\s?[$¥€£])"
SCALES = {
    "%": Fraction(1, 100),
    "percent": Fraction(1, 100),
    "‰": Fraction(1, 1000),
    "百": 100,
    "千": 1000,
    "万": 10**4,
    "百万": 10**6,
    "千万": 10**7,
    "亿": 10**8,
    "万亿": 10**12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
MEASURES = "(?![米克瓦卡帕赫焦伏字分])"  # 5千米 is 5 km
SCALE = "|".join(
    f"{word}{MEASURES if word in '百千' else ''}" for word in sorted(SCALES, key=len, reverse=True)
)
NUMBER = re.compile(
    rf"""
    (?P<sign>{SIGN})? (?:{MONEY}\s? (?P<late_sign>-(?=[\d.]))? )? (?P<share>百分之)?
    (?:
      (?<![\d.]) (?P<whole>\d+)[ ](?P<above>\d+)/(?P<below>[1-9]\d*) (?![\d/])
    | (?P<digits>
        (?<![\d.]) (?:\d{{1,3}}(?:[,'_]\d{{3}})+(?![\d])|\d+) (?:\.\d+)?
      | (?<![A-Za-z\d.]) \.\d+
      )
      (?: /(?P<divisor>[1-9]\d*)(?![\d/])
      | [eE](?P<exponent>[+-]?\d{{1,3}})(?!\w)
      | \s?[×xX*·]\s?10\s?\^\s?\{{?(?P<tens>[+-]?\d{{1,3}})\}}?
      | \^\{{?(?P<power>-?\d{{1,2}})\}}?(?!\d)
      )?
    )
    (?:\s?(?P<scale>{SCALE}))?
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Number:
    """written: what the digits say; scale: what 万, million or % after them make of it."""

    written: Fraction
    scale: Fraction = Fraction(1)

    @property
    def value(self) -> Fraction:
        return self.written * self.scale

    def equals(self, other: Number) -> bool:
        """By value; a scale that only one of them names may stand in the question."""
        if self.value == other.value:
            return True
        return (self.scale == 1) != (other.scale == 1) and self.written == other.written


def found_numbers(text: str) -> list[Number]:
    """The numbers of a readable text; parts that follow each other (1亿2000万) are one."""
    found: list[Number] = []
    end = -1
    for match in NUMBER.finditer(text):
        number = number_of(match)
        continues = found and match.start() == end and 1 <= number.scale < found[-1].scale
        if continues and abs(number.value) < found[-1].scale:
            found[-1] = Number(found[-1].value + number.value)
        else:
            found.append(number)
        end = match.end()
    return found


def number_of(match: re.Match) -> Number:
    if match["whole"]:
        written = exact(match["whole"]) + exact(match["above"]) / exact(match["below"])
    else:
        written = exact(match["digits"])
    if match["divisor"]:
        written /= exact(match["divisor"])
    elif match["power"] and written and len(match["digits"]) < 10:
        written **= int(match["power"])
    written *= Fraction(10) ** int(match["exponent"] or match["tens"] or 0)
    if match["sign"] or match["late_sign"]:
        written = -written
    scale = match["scale"] or ("%" if match["share"] else None)
    return Number(written, Fraction(SCALES.get(scale, 1)))


def exact(digits: str) -> Fraction:
    """By way of Decimal, which reads any number of digits; int() refuses more than 4,300."""
    return Fraction(Decimal(re.sub("[,'_]", "", digits)))


def numbers(words: str) -> list[Fraction]:
    """The values of the numbers in a text."""
    return [number.value for number in found_numbers(readable(words))]


# ---- comparing -----------------------------------------------------------------------------------

BEFORE = r"[\s$(约≈~=]*(?:[A-Za-z]\s*=\s*)?"
UNIT = r"[^\W\d_][^\d\s+*=^\\(){}]{0,15}(?: [^\W\d_][^\d\s+*=^\\(){}]{0,15})?"
LETTER_OF_ALGEBRA = r"(?![a-zA-Zπ](?<![mgshtlLAVWKNJ])(?![A-Za-z]))"  # 3x is no amount
AFTER = rf"\s*(?:°[CF]?|{LETTER_OF_ALGEBRA}{UNIT})?[\s.。!！)$,，]*"


def same(given: str, wanted: str) -> bool:
    """Whether an answer's final part is the wanted one: numbers by value, its last one counts; else
    word by word."""
    given = final_answer(given)
    target = only_number(wanted)
    if target is None:
        return plain(given) == plain(wanted)
    found = found_numbers(readable(given))
    return bool(found) and found[-1].equals(target)


def only_number(words: str) -> Number | None:
    """The number that a text is, perhaps with money or a unit; None where it is something else."""
    text = readable(words)
    found = found_numbers(text)
    is_word = not NUMBER.search(normalised(words)) and not BARE_NUMERAL.fullmatch(words.strip())
    if len(found) != 1 or is_word:
        return None
    matches = list(NUMBER.finditer(text))
    before = text[: matches[0].start()]
    after = text[matches[-1].end() :]
    if not re.fullmatch(BEFORE, before) or not re.fullmatch(AFTER, after):
        return None
    return found[0]


def plain(words: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", words).split()).strip(" .。!！").casefold()
