"""Train a byte-level BPE tokenizer with the chat format of this recipe, and say how well it
compresses a text.

python minimind_npu/train_tokenizer.py                                                 # our sample data, 6,400 tokens
python minimind_npu/train_tokenizer.py --data_path my_texts.jsonl my_chats/ --max_rows 100000 --eval_path other.txt

Rows of every kind are read: {"text"}, {"conversations"}, {"chosen", "rejected"}, tables, .txt. The
output folder is an ordinary Hugging Face tokenizer: AutoTokenizer.from_pretrained(FOLDER). The one
beside this file (tokenizer/) is what the first command makes: the sample data have words for some
1,500 tokens, no more.

36 ids are fixed: 0 <|endoftext|> (padding), 1 <|im_start|> (bos), 2 <|im_end|> (eos), 3-20
reserved, 21-28 tags that stay visible in decoded text (tool calls, thoughts, answers), 29-35
buffers. Then 256 bytes, the frequent characters, and words. Digits never merge; the other cuts are
those that llama.cpp has under the name deepseek-coder.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from common import cli
from common.data import files, shapes

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|reserved_{i}|>" for i in range(3, 21)),
]
TAGS = [
    f"<{slash}{tag}>"
    for tag in ("tool_call", "tool_response", "think", "answer")
    for slash in ("", "/")
]
BUFFERS = [f"<|buffer{i}|>" for i in range(1, 8)]
FIXED = SPECIAL + TAGS + BUFFERS
CUTS = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]
NUMERALS = "[零一二三四五六七八九十百千万亿两]"
SMALLEST = len(FIXED) + 256
CONTEXT = 32768  # tokens
KINDS = ("text", "chat", "preference")


# ---- texts of rows --------------------------------------------------------------------------------------------


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
    records = files.records(path, files.encoding_of(path))
    start = list(islice(records, 50))
    head = [record for _, record in start if isinstance(record, dict)]
    shape = next((shape for kind in KINDS if (shape := shapes.detect(kind, head))), None)
    if shape is None:
        seen = ", ".join(dict.fromkeys(chain(*head))) or "nothing"
        raise SystemExit(
            f"{path}: no rows of text, chat or preference recognised; columns seen: {seen[:200]}"
        )
    for _, record in chain(start, records):
        try:
            if not isinstance(record, dict):
                raise (
                    record if isinstance(record, shapes.BadRow) else shapes.BadRow("not an object")
                )
            texts = list(strings(shape.convert(record)))
            "".join(texts).encode()
            yield texts
        except UnicodeEncodeError:
            dropped["broken characters"] += 1
        except shapes.BadRow as bad:
            dropped[bad.reason] += 1


def paths(data_path: list[str]) -> list[Path]:
    """The data files of files and folders; says which others lie there. Raises SystemExit for
    weights (a.jsonl:0.7)."""
    found = []
    for path, weight in files.entries(data_path):
        if weight is not None:
            raise SystemExit(
                f"{path}:{weight:g}: weights mean nothing here, every row is read; give the path alone"
            )
        inside, ignored = files.data_files(path)
        found += inside
        if ignored:
            cli.say(f"{path}: ignored: {', '.join(ignored)}")
    return found


def read_texts(data_path: list[str], max_rows: int, dropped: Counter, say=None) -> Iterator[str]:
    """Texts of at most `max_rows` rows (0: all) of files and folders; say(rows) is called every
    thousand rows."""
    every = (texts for path in paths(data_path) for texts in texts_of_file(path, dropped))
    for number, texts in enumerate(islice(every, max_rows or None), 1):
        if say and number % 1000 == 0:
            say(number)
        yield from texts


# ---- tokenizer ------------------------------------------------------------------------------------------------


def train(
    texts: Iterable[str],
    vocab_size: int,
    max_han: int = 2,
    split_numerals: bool = True,
    coverage: float = 0.9995,
):
    """A byte-level BPE with the fixed ids; texts with few different words end below `vocab_size`
    tokens.

    Merges are learned between characters, and the bytes of each frequent character are merged
    before all else: so no token ends inside a character, but for rare ones, which stay bytes.
    max_han: Chinese characters in one token, at most. split_numerals: 一, 二, 十 … are never merged,
    like digits, so that sums in words look alike to a small model. coverage: share of the text
    whose characters become tokens (they get half of the vocabulary at most). Returns a
    PreTrainedTokenizerFast with the chat template.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    counts = Counter()

    def counted():
        for text in texts:
            counts.update(text)
            yield text

    core = Tokenizer(models.BPE())
    cuts = CUTS + [NUMERALS] * split_numerals
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=3 * vocab_size,  # some merges will be refused
        limit_alphabet=vocab_size,
        min_frequency=2,
        show_progress=sys.stderr.isatty(),
    )
    core.train_from_iterator(counted(), trainer)
    merges = [tuple(merge) for merge in json.loads(core.to_str())["model"]["merges"]]
    chars = frequent(counts, coverage, (vocab_size - SMALLEST) // 2)
    merges = [
        merge
        for merge in merges
        if chars.issuperset(whole := "".join(merge)) and han(whole) <= max_han
    ]
    return wrapped(
        core.pre_tokenizer,
        *byte_level(sorted(chars, key=lambda c: (-counts[c], c)), merges, vocab_size),
    )


def frequent(counts: Counter, coverage: float, most: int) -> set[str]:
    """The most frequent characters that make up `coverage` of a text, `most` of them at most."""
    room, chars = coverage * counts.total(), set()
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

    spell = normalizers.ByteLevel().normalize_str
    steps = []
    for char in chars:
        size = len(spelt := spell(char))
        steps += [(spelt[:i], spelt[i]) for i in range(1, size)]
    steps = list(dict.fromkeys(steps)) + [(spell(left), spell(right)) for left, right in merges]
    vocabulary = {
        token: i for i, token in enumerate(FIXED + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    kept = []
    for left, right in steps:
        if len(vocabulary) == vocab_size and left + right not in vocabulary:
            break
        vocabulary.setdefault(left + right, len(vocabulary))
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
    core.add_tokens(
        [AddedToken(name, special=name not in TAGS, normalized=False) for name in FIXED]
    )
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
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    _replace(file, json.dumps(made, ensure_ascii=False, separators=(",", ":")))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows, too
    _replace(folder / "tokenizer_config.json", json.dumps(config, indent=2))


def _replace(file: Path, text: str) -> None:
    draft = file.with_suffix(".draft")
    draft.write_text(text + "\n", encoding="utf-8")
    os.replace(draft, file)


# ---- what it is worth -----------------------------------------------------------------------------------------


def measure(tokenizer, texts: list[str]) -> dict:
    """Compression of `texts`: counts, chars_per_token, bytes_per_token, and how many tokens of the
    vocabulary occur."""
    ids = [i for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in row]
    chars, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    counts = {"chars": chars, "bytes": size, "tokens": len(ids), "different_tokens": len(set(ids))}
    return counts | {"chars_per_token": chars / len(ids), "bytes_per_token": size / len(ids)}


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
    sample = [str(HERE / "data" / name) for name in ("pretrain", "sft")]
    output = HERE.parent / "output" / HERE.name / "tokenizer"
    parser.add_argument(
        "--data_path", nargs="+", default=sample, help="files and folders to learn from"
    )
    parser.add_argument("--output_dir", type=Path, default=output, help="where the tokenizer goes")
    parser.add_argument(
        "--vocab_size", type=int, default=6400, help="tokens, at most (default 6400)"
    )
    parser.add_argument(
        "--max_rows", type=int, default=100000, help="rows read (default 100000), 0: all"
    )
    parser.add_argument(
        "--max_han",
        type=int,
        default=2,
        help="Chinese characters in one token, at most; 4 save 1 %% of tokens",
    )
    parser.add_argument(
        "--split_numerals",
        type=flag,
        default=True,
        help="Chinese numerals never merge, like digits",
    )
    held_out = [str(HERE / "data" / "eval" / "held_out.txt")]
    parser.add_argument(
        "--eval_path", nargs="+", default=held_out, help="texts to measure the compression on"
    )
    args = parser.parse_args()
    if args.vocab_size < SMALLEST:
        raise cli.usage_error(
            f"--vocab_size {args.vocab_size}: at least {SMALLEST} (fixed ids and single bytes)"
        )
    if args.max_rows < 0:
        raise cli.usage_error(f"--max_rows {args.max_rows}: 0 (all) or more")
    if args.output_dir.is_file() or any(args.output_dir.glob("*.safetensors")):
        raise cli.usage_error(
            f"--output_dir {args.output_dir}: is a file, or a model with a tokenizer of its own"
        )
    return args


def report(tokenizer, eval_path: list[str]) -> None:
    """Print what the tokenizer makes of a text. Raises SystemExit when a text does not survive the
    round trip."""
    texts = list(read_texts(eval_path, 0, Counter()))
    if not any(texts):
        raise SystemExit(f"{' '.join(eval_path)}: no text")
    found = measure(tokenizer, texts)
    cli.say(
        f"{' '.join(eval_path)}: {found['chars']:,} characters, {found['bytes']:,} bytes, {found['tokens']:,} tokens"
    )
    cli.say(
        f"{found['chars_per_token']:.2f} characters/token, {found['bytes_per_token']:.2f} bytes/token"
    )
    cli.say(f"{found['different_tokens']:,} of {len(tokenizer):,} tokens occur")
    if not streams(tokenizer, texts):
        raise SystemExit(
            f"{' '.join(eval_path)}: a text is not the same after encoding and decoding"
        )
    cli.say("decoded token by token: equal to the text")


def main() -> None:
    args = arguments()
    started, dropped = time.time(), Counter()

    def say(number: int) -> None:
        if number % 20_000 == 0:
            cli.say(f"{number:,} rows read, {number / (time.time() - started):,.0f} rows/s")

    texts = read_texts(args.data_path, args.max_rows, dropped, say)
    tokenizer = train(texts, args.vocab_size, args.max_han, args.split_numerals)
    for reason, number in dropped.items():
        cli.say(f"{number:,} rows left out: {reason}")
    if len(tokenizer) < args.vocab_size:
        cli.say(
            f"these texts have merges for {len(tokenizer):,} tokens only, not for {args.vocab_size:,}"
        )
    save(tokenizer, args.output_dir)
    cli.say(f"{args.output_dir}: {len(tokenizer):,} tokens after {time.time() - started:.0f} s")
    report(tokenizer, args.eval_path)


if __name__ == "__main__":
    cli.run(main)
