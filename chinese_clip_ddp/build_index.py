"""Embed pictures into an index that app.py searches; the same command goes on after a kill.

    python chinese_clip_ddp/build_index.py                              # the sample pictures
    python chinese_clip_ddp/build_index.py --model MODEL --index photos.index --add photos/ more.tar
    python chinese_clip_ddp/build_index.py --index photos.index --delete "photos/private/*"
    python chinese_clip_ddp/build_index.py --index photos.index --query 红色的圆

Only what is new or has changed is embedded; shards that are torn are made again.
"""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli  # noqa: I001  (device before torch)

import index
import model
from common.data.pictures import Place, find_places

from common.data.progress import Progress
from common.runs import flags

DEFAULT = HERE.parent / "output" / HERE.name


def default_index(path: str | Path) -> Path:
    """Beside a run's final/; for other models in output/."""
    is_run = (Path(path) / "final").is_dir()
    return Path(path) / "index" if is_run else DEFAULT / "index"


def places_of(paths: list[str]) -> list[Place]:
    """All pictures of files, tars, *_imgs.tsv and folders. SystemExit for a path that is not there
    or none at all; what is torn is told."""
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise SystemExit(f"--add {path}: no such file or folder")
        problems = []
        places = list(find_places(os.path.realpath(path), problems))
        for problem in problems:
            print(problem, flush=True)
        if not places:
            raise SystemExit(f"--add {path}: no picture in it")
        found += places
    return found


def add(embedder, folder: str | Path, paths: list[str], shard_rows: int = index.SHARD_ROWS) -> dict:
    """Embed what is new in `paths`; -> {added, unusable, known, repaired}, told as well."""
    store = index.Store(folder, embedder.fingerprint, embedder.size)
    places = places_of(paths)
    problems: Counter[str] = Counter()
    examples = {}
    with Progress("embed", total=len(places), unit="pictures") as progress:

        def begin(count: int) -> None:
            progress.total = count

        def after(entries: list[index.Entry]) -> bool:
            for entry in entries:
                if entry.problem:
                    problems[entry.problem] += 1
                    examples.setdefault(entry.problem, str(entry.place))
            return True

        embed = index.embedding(embedder, progress.update)
        counts = index.build(store, places, embed, shard_rows, begin, after)
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    print(f"{folder}: {told or 'nothing to do'}")
    for problem, count in problems.most_common():
        print(f"  {count:,} {problem}, e.g. {examples[problem]}")
    return counts


def named(patterns: list[str]) -> Callable[[Place], bool]:
    """Whether a place is one of these: a path, a folder, or a pattern with * and ?."""
    full = [os.path.realpath(pattern) for pattern in patterns]

    def is_named(place: Place) -> bool:
        return any(
            fnmatchcase(name, pattern) or name.startswith(pattern + os.sep)
            for pattern in full
            for name in (place.path, str(place))
        )

    return is_named


def show(embedder, folder: str | Path, text: str, two_stage: bool, count: int = 10) -> None:
    """Print what is found for a text."""
    opened = index.Index(folder, embedder.fingerprint, two_stage)
    if opened.note:
        print(opened.note)
    found = opened.nearest(embedder.embed_text([text])[0], count)
    for score, entry in found:
        print(f"{score:.3f}  {entry.place}")
    if not found:
        print(f"{folder}: no picture in it")


def parse() -> object:
    parser = cli.Parser(__doc__)
    flag = parser.add_argument
    flag("--model", default=os.environ.get("MODEL", str(DEFAULT)), help="run or model folder")
    flag("--index", default="", help="folder of the index; default: index/ in the run's folder")
    flag("--add", nargs="+", default=[], help="pictures, folders, tars, *_imgs.tsv")
    flag("--delete", nargs="+", default=[], help="paths, folders or patterns to find no more")
    flag("--restore", nargs="+", default=[], help="the contrary of --delete")
    flag("--shard_rows", type=int, default=index.SHARD_ROWS, help="pictures a shard, for --add")
    flag("--query", default="", help="print what is found for this text")
    flag("--two_stage", default="false", choices=["true", "false"], help="for --query")
    args = parser.parse_args()
    if args.shard_rows < 1:
        raise cli.usage_error(f"--shard_rows {args.shard_rows}: at least 1")
    if not (args.add or args.delete or args.restore or args.query):
        args.add = [str(HERE / "data")]
    if not args.add:
        flags.say_unused(["shard_rows"], "nothing is added")
    if not args.query:
        flags.say_unused(["two_stage"], "there is no --query")
    if args.index and not (args.add or args.query):
        flags.say_unused(["model"], "pictures are taken out and in again without one")
    args.index = args.index or str(default_index(args.model))
    if not args.add and not Path(args.index, index.MANIFEST).is_file():
        raise SystemExit(f"--index {args.index}: no index there; --add makes one")
    return args


def main() -> None:
    # a kill is no harm, and there is nothing to save
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = parse()
    if args.delete:
        count = index.delete(index.Store(args.index), named(args.delete))
        print(f"{args.index}: {count:,} deleted")
    if args.restore:
        count = index.restore(index.Store(args.index), named(args.restore))
        print(f"{args.index}: {count:,} restored")
    if args.add or args.query:
        embedder = model.load(args.model)
    if args.add:
        add(embedder, args.index, args.add, args.shard_rows)
    if args.query:
        show(embedder, args.index, args.query, args.two_stage == "true")


if __name__ == "__main__":
    cli.run(main)
