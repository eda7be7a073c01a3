"""Public sets of conversations with tools -> rows for --stage sft and eval_toolcall.py.

    python minimind_npu/data_prepare_toolcall.py --data_path hermes.json --output tools.jsonl
    python minimind_npu/data_prepare_toolcall.py --data_path "glaive/ xlam.parquet" \\
        --max_samples 10000 --mix sft_t2t_mini.jsonl --mix_ratio 0.3 --output tools.jsonl
    DATA=tools.jsonl bash minimind_npu/train_ddp.sh --stage sft --from_weight sft

Layouts (recognised record by record; --source insists on one): hermes, glaive, xlam, chatglm3, and
messages, which is OpenAI's, ShareGPT's and MiniMind's: toolcall/layouts.py. A row is
{"messages", "tools"}. Left out, counted by reason and shown once: what cannot be read, calls of
tools that the row has not, without a required argument or with one that the tool has not, rows
without tools, rows that were there before. Rows whose tools are not called stay: a model has to
learn that too.

--mix: conversations without tools (any shape that training reads), so that the model does not
forget to talk; --mix_ratio is their share of all rows.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator

from toolcall.layouts import LAYOUTS, canonical, layout_of

from common import cli
from common.data import files, load
from common.data.progress import Progress
from common.data.records import as_record
from common.data.turns import BadRow


def tool_rows(paths: str, source: str, stats: dict) -> Iterator[str]:
    """The usable rows of files and folders as JSON; everything else is counted in `stats`."""
    seen: set[str] = set()
    for path, weight in files.entries(paths):
        if weight is not None:
            raise SystemExit(f"{path}:{weight}: no weights here; --max_samples and --mix_ratio")
        found, ignored = files.data_files(path)
        stats["ignored"] += ignored
        before = (stats["read"], stats["used"])
        for file in found:
            yield from rows_of(file, source, seen, stats)
        refuse_useless(path, before, stats)


def refuse_useless(path: Path, before: tuple[int, int], stats: dict) -> None:
    """SystemExit where nothing, or less than half, of a path can be used; rows that were there
    before are no fault of it."""
    twice = stats["dropped"].get(TWICE, 0)
    of_path = {"read": stats["read"] - before[0], "used": stats["used"] - before[1] + twice}
    reasons = {name: stats[name] for name in ("dropped", "examples")}
    load.refuse_useless(path, of_path | reasons)


TWICE = "the same row again"


def rows_of(file: Path, source: str, seen: set[str], stats: dict) -> Iterator[str]:
    encoding = files.told_encoding(file)
    stats["encodings"][str(file)] = encoding.removesuffix("-sig")
    layouts: Counter = Counter()
    with Progress(f"read {file.name}") as progress:
        for number, record in files.records(file, encoding):
            stats["read"] += 1
            progress.update()
            where = f"{file}:{number}"
            try:
                text, layout, notes = converted(record, source, encoding)
                if text in seen:
                    raise BadRow(TWICE)
            except BadRow as bad:
                load.drop(stats, where, bad, strict=False)
                continue
            seen.add(text)
            stats["used"] += 1
            layouts[layout] += 1
            for note in notes:
                stats["changed"][note] = stats["changed"].get(note, 0) + 1
                stats["examples"].setdefault(note, where)
            yield text
    stats["shapes"][str(file)] = " and ".join(layouts) or "none"


def converted(record, source: str, encoding: str) -> tuple[str, str, list[str]]:
    """-> (row as JSON, name of its layout, what was left out)."""
    record = as_record(record)
    layout = layout_of(record)
    if source not in ("auto", layout.name):
        raise BadRow(f"not of --source {source}", f"looks like {layout.name}")
    notes: list[str] = []
    return load.as_json(canonical(record, layout, notes), encoding), layout.name, notes


def drawn(rows: list[str], number: int | None, seed: int) -> list[str]:
    """At most so many of the rows, in their order."""
    if number is None or number >= len(rows):
        return rows
    chosen = random.Random(seed).sample(range(len(rows)), number)
    return [rows[i] for i in sorted(chosen)]


def mixed_in(rows: list[str], paths: str, ratio: float, seed: int) -> list[str]:
    """The rows with others between them that are `ratio` of all."""
    others, stats = load.load_rows(paths, "chat")
    cli.say(f"to mix in: {load.summary(stats)}")
    wanted = round(len(rows) * ratio / (1 - ratio))
    chosen = drawn(list(others["row"]), wanted, seed)
    if len(chosen) < wanted:
        share = len(chosen) / (len(chosen) + len(rows))
        cli.say(f"  all {len(chosen):,} of --mix, {share:.1%} of the rows: there are no more")
    together = [*rows, *chosen]
    random.Random(seed).shuffle(together)
    return together


def told(rows: list[str]) -> str:
    """What is in the tool rows."""
    calls: Counter = Counter()
    without = 0
    for text in rows:
        made = [c for m in json.loads(text)["messages"] for c in m.get("tool_calls", [])]
        calls.update(call["function"]["name"] for call in made)
        without += not made
    often = ", ".join(f"{name} {count:,}" for name, count in calls.most_common(5))
    return (
        f"{len(rows):,} rows with tools, {without:,} of them call none; {calls.total():,} calls of "
        f"{len(calls):,} tools: {often}"
    )


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data_path", required=True, help="files and folders with conversations and tools")
    add("--output", required=True, help="the .jsonl to write")
    sources = ["auto", *(layout.name for layout in LAYOUTS)]
    add("--source", choices=sources, default="auto", help="rows of other layouts are left out")
    add("--max_samples", type=int, help="at most so many rows with tools, drawn by --seed")
    add("--mix", default="", help="files and folders of conversations without tools")
    add("--mix_ratio", type=float, default=0.0, help="their share of all rows, below 1")
    add("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    if not 0 <= args.mix_ratio < 1:
        raise cli.usage_error(f"--mix_ratio {args.mix_ratio}: from 0 to below 1")
    if bool(args.mix) != bool(args.mix_ratio):
        raise cli.usage_error("--mix and --mix_ratio go together")
    if args.max_samples is not None and args.max_samples < 1:
        raise cli.usage_error(f"--max_samples {args.max_samples} makes no sense")
    if not args.output.endswith(".jsonl"):
        raise cli.usage_error(f"--output {args.output}: a name that ends in .jsonl")
    return args


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    stats = load.no_stats()
    rows = list(tool_rows(args.data_path, args.source, stats))
    cli.say(load.summary(stats))
    rows = drawn(rows, args.max_samples, args.seed)
    cli.say(told(rows))
    if args.mix:
        rows = mixed_in(rows, args.mix, args.mix_ratio, args.seed)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(output) as part, part.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"{row}\n" for row in rows)
    cli.say(f"{len(rows):,} rows -> {output}")


if __name__ == "__main__":
    cli.run(main)
