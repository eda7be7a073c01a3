"""How well tokenizers compress: bytes and characters per token on Chinese, English, code and sums.

    python minimind_npu/eval_tokenizer.py                       # the shipped one on built-in texts
    python minimind_npu/eval_tokenizer.py output/tokenizer qwen3 gpt2 --texts zh=wiki.jsonl

The first tokenizer is compared with the others. Names are folders or hub ids. A text of one's own
is NAME=FILE, with rows as for pre-training; the built-in ones are small (the held-out sentences,
this recipe's README and code, sums), so they say little of a corpus. Special tokens in a text are
spelt out. Result: the table, tokenizers.md, tokenizers.json and tokenizers.png in --output_dir.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from train_tokenizer import measure

from common import cli
from common.convert import models
from common.data.files import atomic_file
from common.data.load import load_rows

BUILT_IN = ("zh", "en", "code", "sums")
MOST = 2_000_000  # characters of a text


# ---- texts ---------------------------------------------------------------------------------------


def built_in(name: str) -> list[str]:
    if name == "zh":
        return (HERE / "data/eval/held_out.txt").read_text(encoding="utf-8").splitlines()
    if name == "en":
        return (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    if name == "code":
        return [file.read_text(encoding="utf-8") for file in sorted(HERE.glob("*.py"))]
    return [f"{a} + {b} = {a + b}" for a in range(7, 1000, 61) for b in range(3, 900, 53)]


def read_texts(words: list[str]) -> dict[str, list[str]]:
    """NAME=FILE -> name -> texts, as many as MOST characters hold."""
    if not words:
        return {name: built_in(name) for name in BUILT_IN}
    found = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path:
            raise cli.usage_error(f"--texts {word}: NAME=FILE")
        rows, _ = load_rows(path, "text")
        texts = []
        room = MOST
        for row in rows["row"]:
            if room <= 0:
                break
            texts.append(json.loads(row)["text"][:room])
            room -= len(texts[-1])
        found[name] = texts
    return found


# ---- figures -------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, dict]], sizes: dict[str, int]) -> str:
    """A line a text and tokenizer; how many tokens fewer the first one needs than each other."""
    first, *_ = results
    lines = [
        "| text | tokenizer | vocabulary | bytes per token | characters per token | "
        f"tokens of {first} |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for text in results[first]:
        own = results[first][text]["tokens"]
        for name, found in results.items():
            one = found[text]
            cells = [text, name, f"{sizes[name]:,}", f"{one['bytes_per_token']:.2f}"]
            cells += [f"{one['chars_per_token']:.2f}", f"{own / one['tokens'] - 1:+.1%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(file: Path, results: dict[str, dict[str, dict]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results)
    texts = list(results[names[0]])
    width = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(texts), 4), dpi=120)
    for i, name in enumerate(names):
        places = [place + i * width for place in range(len(texts))]
        values = [results[name][text]["bytes_per_token"] for text in texts]
        axes.bar(places, values, width, label=name)
    middle = (len(names) - 1) * width / 2
    axes.set_xticks([place + middle for place in range(len(texts))], texts)
    axes.set(ylabel="bytes per token")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    figure.tight_layout()
    with atomic_file(file) as part:
        figure.savefig(part, format="png")
    plt.close(figure)


def shown_as(name: str, names: list[str]) -> str:
    """The end of a path, where no other ends so."""
    short = Path(name).name
    return short if [Path(other).name for other in names].count(short) == 1 else name


# ---- command line --------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("tokenizers", nargs="*", help="folders or hub ids; unset: the shipped one")
    add("--texts", nargs="+", default=[], help="NAME=FILE; unset: zh, en, code and sums of ours")
    add("--output_dir", default=str(HERE.parent / "output" / HERE.name / "tokenizers"))
    args = parser.parse_args()
    args.tokenizers = args.tokenizers or [str(HERE / "tokenizer")]
    if len(set(args.tokenizers)) < len(args.tokenizers):
        raise cli.usage_error("a tokenizer stands there twice")
    return args


def main() -> None:
    from transformers import AutoTokenizer

    args = parse_args()
    cli.quiet_libraries()
    texts = read_texts(args.texts)
    results = {}
    sizes = {}
    for path in args.tokenizers:
        tokenizer = models.load(AutoTokenizer, path, "tokenizer")
        name = shown_as(path, args.tokenizers)
        results[name] = {text: measure(tokenizer, found) for text, found in texts.items()}
        sizes[name] = len(tokenizer)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    text = table(results, sizes)
    contents = {"tokenizers.md": text + "\n", "tokenizers.json": json.dumps(results, indent=1)}
    for name, content in contents.items():
        with atomic_file(out / name) as part:
            part.write_text(content, encoding="utf-8")
    picture(out / "tokenizers.png", results)
    print(f"{text}\n\n{out / 'tokenizers.png'}")


if __name__ == "__main__":
    cli.run(main)
