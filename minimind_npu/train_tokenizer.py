"""Train a byte-level BPE tokenizer with the chat format of this recipe, and say how well it
compresses a text.

    python minimind_npu/train_tokenizer.py                # our sample data, at most 6,400 tokens
    python minimind_npu/train_tokenizer.py --data_path my.jsonl my_chats/ --eval_path other.txt

Rows of every kind are read: {"text"}, {"conversations"}, {"chosen", "rejected"}, tables, .txt. Of
more than --max_rows rows, or --max_chars characters, every file gives as many, or every path as
many as its weight says (a:0.7 b:0.3, or a mixture in YAML); of a text 10,000 characters count.
Learning takes up to 100 bytes of memory for each Chinese character that is read. The output
folder is an ordinary Hugging Face tokenizer: AutoTokenizer.from_pretrained(FOLDER). The one beside
this file (tokenizer/) is what the first command makes: the sample data have words for some 1,500
tokens, no more.

36 ids are fixed: 0 <|endoftext|> (padding), 1 <|im_start|> (bos), 2 <|im_end|> (eos), 3-20
reserved, 21-28 tags that stay visible in decoded text (tool calls, thoughts, answers), 29-35
buffers. Then 256 bytes, the frequent characters, and words. Digits never merge; the other cuts are
those that llama.cpp has under the name deepseek-coder.
"""

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from road import mixture

from common import cli
from common.convert.older_readers import save_tokenizer
from common.data import files, shapes
from common.data.files import atomic_file
from common.data.progress import Progress
from common.data.records import as_record, usable
from common.data.turns import BadRow

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|reserved_{i}|>" for i in range(3, 21)),
]
TAGS = [
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
]
BUFFERS = [f"<|buffer{i}|>" for i in range(1, 8)]
FIXED = SPECIAL + TAGS + BUFFERS
# what frames documents and turns in people's files, no words to learn
MARKS = re.compile("|".join(map(re.escape, [*FIXED, "<s>", "</s>"])))
CUTS = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]
NUMERALS = "[零一二三四五六七八九十百千万亿两]"
SMALLEST = len(FIXED) + 256
LONGEST = 10_000  # characters of a text: one book must not outweigh all else
CONTEXT = 32768  # tokens
KINDS = ("text", "chat", "preference")


# ---- texts of rows -------------------------------------------------------------------------------


def strings(value) -> Iterator[str]:
    """What a canonical row says: contents, thoughts, roles (the template writes them), tools and
    calls as JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for key, inside in value.items():
            if key in ("tools", "tool_calls"):
                yield from (json.dumps(item, ensure_ascii=False) for item in inside)
            else:
                yield from strings(inside)


def texts_of_file(path: Path, dropped: Counter) -> Iterator[list[str]]:
    """The texts of each row of one file; unusable rows are counted. Raises SystemExit for a file
    without known rows."""
    records = files.records(path, files.told_encoding(path))
    start = list(islice(records, 50))
    shape = shape_of(usable([record for _, record in start]), path)
    for _, record in chain(start, records):
        try:
            texts = [text[:LONGEST] for text in strings(shape.convert(as_record(record)))]
            "".join(texts).encode()
            yield texts
        except UnicodeEncodeError:
            dropped["broken characters"] += 1
        except BadRow as bad:
            dropped[bad.reason] += 1


def shape_of(records: list[dict], path: Path):
    """What the first rows of a file are. SystemExit where they are nothing known."""
    for kind in KINDS:
        shape = shapes.detect(kind, records)
        if shape is not None:
            return shape
    columns = ", ".join(dict.fromkeys(chain(*records))) or "nothing"
    raise SystemExit(
        f"{path}: no rows of text, chat or preference recognised; columns seen: {columns[:200]}"
    )


def files_of(path: Path) -> list[Path]:
    """The data files of a file or folder; says which others lie there."""
    inside, ignored = files.data_files(path)
    apart = files.held_out_files(path, inside)
    if apart:
        cli.say(f"{path}: held out, not read: {', '.join(map(str, apart))}")
    if ignored:
        cli.say(f"{path}: ignored: {', '.join(ignored)}")
    return [file for file in inside if file not in apart]


def groups(data_path: list[str]) -> list[tuple[list[Path], float]]:
    """(files, their share of the rows): one group where nothing has a weight."""
    if len(data_path) == 1 and mixture.is_mixture(data_path[0]):
        parts = mixture.read(Path(data_path[0]).expanduser())
        found = [(part.path, part.weight) for part in parts]
        if any(part.epochs != 1 for part in parts):
            cli.say(f"{data_path[0]}: epochs mean nothing here: a row is read once")
    else:
        found = files.entries(data_path)
    found = [(files_of(path), weight) for path, weight in found]
    if any(weight is None for _, weight in found):
        if any(weight is not None for _, weight in found):
            cli.say("some paths have no weight, so none counts here: every file gives as many rows")
        return [([file for inside, _ in found for file in inside], 1.0)]
    total = sum(weight for _, weight in found)
    return [(inside, weight / total) for inside, weight in found]


def rows_of(
    paths: list[Path], max_rows: float, max_chars: float, dropped: Counter
) -> Iterator[list[str]]:
    """The texts of each row, until there are `max_rows` or `max_chars` characters; of every file as
    much."""
    if math.isfinite(max_rows + max_chars):
        paths = sorted(paths, key=lambda path: path.stat().st_size)  # what one lacks others have
    for number, path in enumerate(paths):
        others = len(paths) - number
        rows = max_rows / others
        chars = max_chars / others
        for texts in texts_of_file(path, dropped):
            if rows < 1e-6 or chars <= 0:  # shares are not exact
                break
            yield texts
            size = sum(map(len, texts))
            rows -= 1
            chars -= size
            max_rows -= 1
            max_chars -= size


def read_texts(
    data_path: list[str], max_rows: int, dropped: Counter, max_chars: int = 0
) -> Iterator[str]:
    """Texts of at most `max_rows` rows and about `max_chars` characters (0: all) of files and
    folders, or of a mixture; LONGEST characters of each."""
    rows = max_rows or math.inf
    chars = max_chars or math.inf
    with Progress("read") as progress:
        for inside, share in groups(data_path):
            for texts in rows_of(inside, rows * share, chars * share, dropped):
                yield from texts
                progress.update(1)


# ---- tokenizer -----------------------------------------------------------------------------------


def train(
    texts: Iterable[str],
    vocab_size: int,
    max_han: int = 2,
    split_numerals: bool = True,
    coverage: float = 0.9995,
):
    """A byte-level BPE with the fixed ids, a PreTrainedTokenizerFast with the chat template; texts
    with few different words end below `vocab_size` tokens. Nothing is learned from the fixed tokens
    (MARKS) that stand in the texts.

    Merges are learned between characters, and the bytes of each frequent character are merged
    before all else: so no token ends inside a character, but for rare ones, which stay bytes.

    max_han: Chinese characters in one token, at most.
    split_numerals: 一, 二, 十 … are never merged, like digits, so that sums in words look alike to
        a small model.
    coverage: share of the text whose characters become tokens (they get half of the vocabulary at
        most).
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    counts = Counter()

    def counted():
        for text in chain.from_iterable(map(MARKS.split, texts)):
            counts.update(text)
            yield text
        cli.say(f"{counts.total():,} characters to learn from")

    cuts = [*CUTS, NUMERALS] if split_numerals else CUTS
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(splits)
    trainer = trainers.BpeTrainer(
        vocab_size=3 * vocab_size,  # some merges will be refused
        limit_alphabet=vocab_size,
        min_frequency=2,
        show_progress=sys.stderr.isatty(),
    )
    core.train_from_iterator(counted(), trainer)

    chars = frequent(counts, coverage, (vocab_size - SMALLEST) // 2)
    merges = []
    for left, right in json.loads(core.to_str())["model"]["merges"]:
        token = left + right
        if chars.issuperset(token) and han(token) <= max_han:
            merges.append((left, right))
    ordered = sorted(chars, key=lambda char: (-counts[char], char))
    vocabulary, kept = byte_level(ordered, merges, vocab_size)
    return wrapped(core.pre_tokenizer, vocabulary, kept)


def frequent(counts: Counter, coverage: float, most: int) -> set[str]:
    """The most frequent characters that make up `coverage` of a text, `most` of them at most."""
    room = coverage * counts.total()
    chars = set()
    for char, number in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]:
        if room <= 0:
            break
        chars.add(char)
        room -= number
    return chars


def han(text: str) -> int:
    return sum("\u4e00" <= char <= "\u9fff" for char in text)


def byte_level(chars: list[str], merges: list[tuple], vocab_size: int) -> tuple[dict, list]:
    """-> (vocabulary {token: id}, merges) of a byte-level BPE: fixed ids, bytes, characters byte by
    byte, merges."""
    from tokenizers import normalizers, pre_tokenizers

    spell = normalizers.ByteLevel().normalize_str  # each byte as one printable character
    steps = []
    for char in chars:
        spelt = spell(char)
        steps += [(spelt[:i], spelt[i]) for i in range(1, len(spelt))]
    steps = list(dict.fromkeys(steps))
    steps += [(spell(left), spell(right)) for left, right in merges]

    first = [*FIXED, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(first)}
    kept = []
    for left, right in steps:
        token = left + right
        if len(vocabulary) == vocab_size and token not in vocabulary:
            break
        vocabulary.setdefault(token, len(vocabulary))
        kept.append((left, right))
    return vocabulary, kept


def wrapped(cuts, vocabulary: dict, merges: list):
    """-> PreTrainedTokenizerFast: the cuts between words, then bytes and their merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [cuts, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    fixed = [AddedToken(name, special=name not in TAGS, normalized=False) for name in FIXED]
    core.add_tokens(fixed)
    end, start, stop = SPECIAL[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8"),
        bos_token=start,
        eos_token=stop,
        pad_token=end,
        unk_token=end,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save(tokenizer, folder: Path) -> None:
    """The tokenizer's files, tokenizer.json in one line: a third of the size."""
    save_tokenizer(tokenizer, folder)
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    with atomic_file(file) as part:
        text = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
        part.write_text(text + "\n", encoding="utf-8")


# ---- what it is worth ----------------------------------------------------------------------------


def measure(tokenizer, texts: list[str]) -> dict:
    """Compression of `texts`: counts, chars_per_token, bytes_per_token, and how many tokens of the
    vocabulary occur."""
    rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = [i for row in rows for i in row]
    chars = sum(len(text) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return {
        "chars": chars,
        "bytes": size,
        "tokens": len(ids),
        "different_tokens": len(set(ids)),
        "chars_per_token": chars / len(ids),
        "bytes_per_token": size / len(ids),
    }


def streams(tokenizer, texts: Iterable[str]) -> bool:
    """Whether decoding token by token, as a chat shows it, gives each text back."""
    from tokenizers.decoders import DecodeStream

    for text in texts:
        stream = DecodeStream(skip_special_tokens=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        shown = "".join(stream.step(tokenizer.backend_tokenizer, i) or "" for i in ids)
        if shown != text or tokenizer.decode(ids) != text:
            return False
    return True


def flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    sample = [str(HERE / "data" / name) for name in ("pretrain", "sft")]
    held_out = [str(HERE / "data" / "eval" / "held_out.txt")]
    output = HERE.parent / "output" / HERE.name / "tokenizer"
    add("--data_path", nargs="+", default=sample, help="files and folders to learn from")
    add("--output_dir", type=Path, default=output, help="where the tokenizer goes")
    add("--vocab_size", type=int, default=6400, help="tokens, at most (default 6400)")
    add("--max_rows", type=int, default=100000, help="rows read (default 100000), 0: all")
    add("--max_chars", type=int, default=50_000_000, help="characters read, 0: all")
    add(
        "--max_han",
        type=int,
        default=2,
        help="Chinese characters in one token, at most; 4 save 1 %% of tokens",
    )
    add(
        "--split_numerals",
        type=flag,
        default=True,
        help="Chinese numerals never merge, like digits",
    )
    add("--eval_path", nargs="+", default=held_out, help="texts to measure the compression on")
    args = parser.parse_args()
    if args.vocab_size < SMALLEST:
        raise cli.usage_error(
            f"--vocab_size {args.vocab_size}: at least {SMALLEST} (fixed ids and single bytes)"
        )
    for name in ("max_rows", "max_chars"):
        value = getattr(args, name)
        if value < 0:
            raise cli.usage_error(f"--{name} {value}: 0 (all) or more")
    if args.output_dir.is_file() or any(args.output_dir.glob("*.safetensors")):
        raise cli.usage_error(
            f"--output_dir {args.output_dir}: is a file, or a model with a tokenizer of its own"
        )
    return args


def report(tokenizer, eval_path: list[str]) -> None:
    """Print what the tokenizer makes of a text. Raises SystemExit when a text does not survive the
    round trip."""
    name = " ".join(eval_path)
    texts = list(read_texts(eval_path, 0, Counter()))
    if not any(texts):
        raise SystemExit(f"{name}: no text")
    found = measure(tokenizer, texts)
    cli.say(
        f"{name}: {found['chars']:,} characters, {found['bytes']:,} bytes, "
        f"{found['tokens']:,} tokens\n"
        f"{found['chars_per_token']:.2f} characters/token, "
        f"{found['bytes_per_token']:.2f} bytes/token\n"
        f"{found['different_tokens']:,} of {len(tokenizer):,} tokens occur"
    )
    if not streams(tokenizer, texts):
        raise SystemExit(f"{name}: a text is not the same after encoding and decoding")
    cli.say("decoded token by token: equal to the text")


def main() -> None:
    args = arguments()
    started = time.time()
    dropped = Counter()
    texts = read_texts(args.data_path, args.max_rows, dropped, args.max_chars)
    tokenizer = train(texts, args.vocab_size, args.max_han, args.split_numerals)
    for reason, number in dropped.items():
        cli.say(f"{number:,} rows left out: {reason}")
    if len(tokenizer) < args.vocab_size:
        cli.say(
            f"these texts have merges for {len(tokenizer):,} tokens only, not for "
            f"{args.vocab_size:,}"
        )
    save(tokenizer, args.output_dir)
    cli.say(f"{args.output_dir}: {len(tokenizer):,} tokens after {time.time() - started:.0f} s")
    report(tokenizer, args.eval_path)


if __name__ == "__main__":
    cli.run(main)
