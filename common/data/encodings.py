"""Which encoding a text file has, where nothing in it says so.

UTF-8 proves itself. All else is a guess: the encoding in which most characters are ones that people
write. Guesses are named with an example by whoever reads the file.
"""

import codecs
from collections.abc import Callable
from typing import NamedTuple

MIB = 1 << 20
LINE_BYTES = 1 << 16  # a longer line is looked at in pieces
SAMPLE = 1 << 18  # bytes that are not UTF-8 and are looked at
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # inside a character of UTF-8, never its first
BOMS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SURE = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "binary")  # all else is a guess
USUAL = 0.5  # of the characters that are not ASCII: fewer usual ones are another encoding
MANY = 20  # different characters
CLEARLY = 0.15  # by so much a later guess must be better than an earlier one


class Guess(NamedTuple):
    """An encoding, and how usual a character that is not ASCII is in its texts, 0 to 1."""

    name: str
    usual: Callable[[str], float]


def detect(file) -> str:
    """The encoding of a seekable binary file. ValueError, with an example, where it is none that
    is known here."""
    start = file.read(SAMPLE)
    for bom, name in BOMS.items():
        if start.startswith(bom):
            return name
    wide = _utf_16(start)
    if wide:
        return wide
    file.seek(0)
    if _is_utf8(file):
        return "utf-8-sig"
    file.seek(0)
    others, votes = _not_utf8(file)
    return "utf-8-sig" if votes >= 0 else _best(others)


def is_guess(encoding: str) -> bool:
    return encoding not in SURE


# ---- UTF -----------------------------------------------------------------------------------------


def _is_utf8(file) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while block := file.read(MIB):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _not_utf8(file) -> tuple[bytes, int]:
    """-> (lines that are no UTF-8, how many more lines are UTF-8 than are not).

    Lines vote, because GB18030 reads most UTF-8 Chinese as other characters: one bad byte must not
    turn the whole file.
    """
    others = bytearray()
    votes = 0
    is_cut = False
    while piece := file.readline(LINE_BYTES):
        # a piece of a long line may begin inside a character, and end in one
        line = piece.lstrip(CONTINUATION_BYTES) if is_cut else piece
        is_cut = len(piece) == LINE_BYTES and not piece.endswith(b"\n")
        try:
            text, _ = codecs.utf_8_decode(line, "strict", not is_cut)
        except UnicodeDecodeError:
            votes -= 1
            if len(others) < SAMPLE:
                others += piece
            continue
        if not text.isascii():
            votes += 1
    return bytes(others), votes


def _utf_16(start: bytes) -> str | None:
    """utf-16-le or utf-16-be of a text without BOM; ASCII has a zero in every second byte there."""
    start = start[: len(start) // 2 * 2]
    for name, zeros, others in (
        ("utf-16-le", start[1::2], start[::2]),
        ("utf-16-be", start[::2], start[1::2]),
    ):
        found = zeros.count(0)
        if not found or 20 * found < len(zeros) or others.count(0) > found // 10:
            continue
        text = start.decode(name, errors="replace")
        usual = sum(char.isascii() or _is_east_asian(char) for char in text)
        if usual >= 0.9 * len(text):
            return name
    return None


# ---- what people write ---------------------------------------------------------------------------


def _is_east_asian(char: str) -> bool:
    """Han, kana, hangul, full-width forms, punctuation, accented Latin letters."""
    code = ord(char)
    blocks = (
        (0xA0, 0x17F),
        (0x2000, 0x303F),
        (0x3040, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xFF00, 0xFFEF),
    )
    return any(low <= code <= high for low, high in blocks)


def _first_byte(char: str, encoding: str) -> int:
    """The first byte of a character of two bytes in an encoding, 0 where it has none."""
    try:
        encoded = char.encode(encoding)
    except UnicodeEncodeError:
        return 0
    return encoded[0] if len(encoded) == 2 else 0


def _usual_in_gb(char: str) -> float:
    """Signs, and the 3,755 characters of level 1 of GB 2312; those of level 2, and frequent ones of
    traditional texts, count half."""
    first = _first_byte(char, "gb2312")
    if 0xA1 <= first <= 0xA3 or 0xB0 <= first <= 0xD7:
        return 1
    return 0.5 if first > 0xD7 or _usual_in_big5(char) else 0


def _usual_in_big5(char: str) -> float:
    """Signs, and the 5,401 frequent characters."""
    first = _first_byte(char, "big5")
    return 0xA1 <= first <= 0xA3 or 0xA4 <= first <= 0xC6


def _usual_in_japanese(char: str) -> float:
    """Kana, signs, and the 2,965 characters of level 1 of JIS X 0208."""
    if "\u3000" <= char <= "\u30ff" or "\uff01" <= char <= "\uff5e":
        return True
    return 0x88 <= _first_byte(char, "shift_jis") <= 0x97


def _usual_in_korean(char: str) -> float:
    """The 2,350 syllables of KS X 1001."""
    return 0xB0 <= _first_byte(char, "euc_kr") <= 0xC8


def _usual_in_latin(char: str) -> float:
    return "\u00a1" <= char <= "\u00ff" or char in "\u00a0€‘’“”„–—…•™œŒšŠžŽŸ"


GUESSES = (
    Guess("gb18030", _usual_in_gb),
    Guess("cp932", _usual_in_japanese),
    Guess("euc_jp", _usual_in_japanese),
    Guess("big5hkscs", _usual_in_big5),
    Guess("cp949", _usual_in_korean),
    Guess("cp1252", _usual_in_latin),
)


def _best(sample: bytes) -> str:
    scores = {guess.name: _score(guess, sample) for guess in GUESSES}
    if scores["cp949"] > 0.9 and _different(sample.decode("cp949", errors="replace")) >= MANY:
        return "cp949"  # so many Chinese characters would not all have first bytes of hangul
    best = "gb18030"
    for name, score in scores.items():
        if score > scores[best] + CLEARLY:
            best = name
    if scores[best] < USUAL:
        shown = around(sample.decode("gb18030", errors="replace"))
        raise ValueError(
            f"neither UTF-8 nor an encoding that is recognised; as gb18030 it would say {shown!r}; "
            "save it as UTF-8: iconv -f ITS_ENCODING -t UTF-8"
        )
    return best


def _score(guess: Guess, sample: bytes) -> float:
    """Share of usual characters among those that are not ASCII; what does not decode counts
    against it."""
    if guess.name == "cp1252" and not _stand_alone(sample):
        return 0.0
    text = sample.decode(guess.name, errors="replace")
    others = [char for char in text if not char.isascii()]
    if guess.usual is _usual_in_japanese and not any(
        "\u3041" <= char <= "\u30ff" for char in others
    ):
        return 0.0  # Japanese without kana is not written
    return sum(map(guess.usual, others)) / max(1, len(others))


def _different(text: str) -> int:
    return len({char for char in text if not char.isascii()})


def _stand_alone(sample: bytes) -> bool:
    """Whether most bytes above ASCII have ASCII on both sides, like accented letters."""
    above = [byte > 0x7F for byte in sample]
    padded = [False, *above, False]
    alone = sum(
        padded[i] and not padded[i - 1] and not padded[i + 1] for i in range(1, len(padded) - 1)
    )
    return 2 * alone > sum(above)


def around(text: str, size: int = 40) -> str:
    """The part of a text where its first character beyond ASCII stands, within one line."""
    at = next((i for i, char in enumerate(text) if not char.isascii()), 0)
    line_start = text.rfind("\n", 0, at) + 1
    start = max(line_start, at - size // 2)
    return text[start : start + size].split("\n")[0].strip()
