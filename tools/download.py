"""Fetch a model, whole: resumed after a cut, every file checked, broken ones fetched again, pickles
refused.

    python -m tools.download ORG/NAME                           # Hugging Face; HF_ENDPOINT=https://mirror, HTTPS_PROXY
    python -m tools.download ORG/NAME --source modelscope       # DANPU_SOURCE=modelscope does the same
    python -m tools.download ORG/NAME --source http://host/dir  # a mirror of the hub, or a folder with our manifest
    python -m tools.download ORG/NAME --dry_run                 # what it would fetch
    python -m tools.download models/NAME --verify               # read all of it again; no network
    python -m tools.download models/NAME --repair               # and fetch what is broken
    python -m tools.download models/NAME --manifest --try       # facts, memory for training; one sentence

The same command again continues, and ends at once when all is there. Exit codes: 0 done, 1 failed,
2 usage, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from tools.hub import fetch, model_folder, sources, weights
from tools.hub.fetch import Entry, size_text
from tools.hub.link import Fatal, Link, session
from tools.hub.model_folder import is_whole, load_record, say
from tools.hub.progress import Meter

INTERRUPTED = (
    75  # as in common.cli, which would import torch: seconds that a download has no use for
)
ROOM = 16 << 20  # bytes of the disk that stay free


# ---- command line -------------------------------------------------------------------------------------------


def flag(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"true or false, not {text!r}")


def count(least: float, kind: type = int) -> Callable:
    def number(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < 1e9:
            raise argparse.ArgumentTypeError(f"a number from {least}, not {text!r}")
        return value

    return number


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        if unknown:
            near = difflib.get_close_matches(
                unknown[1], self._option_string_actions, n=1, cutoff=0.5
            )
            message = f"unknown flag {unknown[1]}" + (
                f"; did you mean {near[0]}?" if near else "; see --help"
            )
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    made = Parser(
        "python -m tools.download", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    add = made.add_argument
    add("model", help="ORG/NAME on the hub, or a folder that was fetched before")
    known = os.environ.get("DANPU_SOURCE") or None
    add(
        "--source",
        default=known,
        help="hf (default), modelscope, or http(s)://... (which gets no token)",
    )
    add("--to", default="models", help="the model goes to TO/NAME (default: models)")
    add("--revision", help="branch, tag or commit (default: main, on ModelScope master)")
    add(
        "--include",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help='only these, e.g. "*.json" "*.py"',
    )
    add("--exclude", nargs="+", action="extend", default=[], metavar="PATTERN", help="not these")
    add("--workers", type=count(1), default=4, help="files at once (default: 4)")
    add(
        "--retries", type=count(0), default=8, help="tries in a row without a new byte (default: 8)"
    )
    add(
        "--retry_wait",
        type=count(0, float),
        default=1,
        help="seconds before the first, then doubled (default: 1)",
    )
    stall = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or "30"
    add(
        "--stall",
        type=count(0.1, float),
        default=stall,
        help="cut after so many seconds without a byte (default: 30)",
    )
    when = "aria2c: auto for files from 64 MiB where it is installed, true from 1 MiB, false never (default: auto)"
    add("--aria2", choices=("auto", "true", "false"), default="auto", help=when)
    switches = {
        "allow_pickle": "fetch weights that are there only as pickle (they can run code when loaded)",
        "dry_run": "only show files and sizes",
        "verify": "read the folder again: sizes, sha256, safetensors; no network",
        "repair": "the same, then fetch what is broken, changed or missing",
        "manifest": "write manifest.json: files, hashes, parameters, parallel sizes, memory for training",
        "try": "load the model and let it write a sentence",
    }
    for name, text in switches.items():
        add(
            f"--{name}",
            dest=f"{name}_" if name == "try" else name,
            type=flag,
            nargs="?",
            default=False,
            help=text,
        )
    add(
        "--window",
        type=count(1),
        default=2048,
        help="tokens per row in the memory table (default: 2048)",
    )
    add("--batch", type=count(1), default=2, help="rows per card in the memory table (default: 2)")
    add("--lora_r", type=count(1), default=16, help="rank in the memory table (default: 16)")
    add("--prompt", default="你好，请用一句话介绍你自己。", help="what --try asks")
    return made


def parse_args(argv: list[str]) -> argparse.Namespace:
    made, words = parser(), []
    bare = {a.option_strings[0] for a in made._actions if a.nargs == "?"}
    for word, after in zip(argv, [*argv[1:], "--"], strict=True):
        name, equals, value = word.partition("=")
        word = (
            name.replace("-", "_").replace("__", "--", 1) + equals + value
            if word.startswith("--")
            else word
        )
        words.append(word)
        if word in bare and after.lower() not in ("true", "false", "1", "0", "yes", "no"):
            words.append("true")  # else `--repair ORG/NAME` would read the name as its value
    args = made.parse_args(words)
    if args.source not in (None, "hf", "modelscope") and not re.fullmatch(
        r"https?://[^\s/@?#]+[^\s@?#]*", args.source
    ):
        hint = "hf, modelscope, or http(s)://HOST/... without password or query (~/.netrc may hold the password)"
        made.error(f"--source {args.source}: {hint}")
    return args


def place(args) -> tuple[Path, dict]:
    """(the folder in question, its record or {})."""
    given = Path(args.model).expanduser()
    if given.is_dir():
        return given, load_record(given)
    name = r"[A-Za-z0-9_][\w.-]*"
    below = args.model.startswith(f"{args.to.rstrip('/')}/")  # a folder was meant
    if below or not re.fullmatch(rf"({name}/)?{name}", args.model, re.ASCII):
        raise SystemExit(f"{args.model}: no such folder, and no model of a hub (ORG/NAME)")
    folder = Path(args.to).expanduser() / args.model.rsplit("/", 1)[-1]
    return folder, load_record(folder)


# ---- fetching -----------------------------------------------------------------------------------------------


def settle(
    entry: Entry, folder: Path, record: dict, repair: bool, link: Link, show: Callable
) -> str:
    """Make one file whole, fetched or found; returns its sha256. Only `repair` replaces what
    someone changed."""
    target = fetch.safe_target(folder, entry.path)
    if target.is_file():
        known = record["files"].get(entry.path, {})
        mine = entry if entry.hashed else Entry(entry.path, "", entry.size, known.get("sha256"))
        sha, wrong = fetch.examine(target, mine, link.stop)
        if wrong is None:
            return sha
        if not repair:
            raise Fatal(f"{wrong}: changed since it was fetched; --repair true fetches it again")
        link.note(f"{entry.path}: {wrong}; fetched again")
        target.unlink()
    return fetch.fetch(entry, folder, link, show)


def fetch_all(todo: list[Entry], folder: Path, record: dict, args, link: Link) -> dict[str, str]:
    """Fetch in parallel, largest first, and record each whole file at once; path -> why it could
    not be fetched."""
    have = {
        e.path: fetch.gathered(fetch.part_of(fetch.safe_target(folder, e.path), e)) for e in todo
    }
    meter, failed = Meter(todo, have), {}
    link.note = meter.note
    pool = ThreadPoolExecutor(args.workers)
    todo = sorted(todo, key=lambda e: -(e.size or 0))
    jobs = {pool.submit(settle, e, folder, record, args.repair, link, meter.show): e for e in todo}
    waiting = set(jobs)
    try:
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for job in done:
                try:
                    model_folder.note_whole(folder, record, jobs[job], job.result())
                    meter.finish(jobs[job].path)
                except Fatal as error:
                    failed[jobs[job].path] = str(error)
                    if error.status in (401, 403, 407):  # the others would end the same way
                        return failed
            meter.tick()
    finally:
        link.stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        wait(
            waiting, timeout=2
        )  # a worker stops at its next block; one that waits for bytes is left behind
        meter.close()
    return failed


def download(args, folder: Path, record: dict) -> None:
    link = Link(session(), args.stall, args.retries, args.retry_wait, note=say)
    if args.aria2 != "false":
        link.aria2 = shutil.which("aria2c")
        if args.aria2 == "true":
            link.aria2_from = 1 << 20
            if link.aria2 is None:
                raise SystemExit(
                    "--aria2 true: no aria2c on PATH (apt install aria2), or leave the flag out"
                )
    listing, wanted, skipped = ask(args, folder, record, link)
    for line in left_out(skipped):
        say(line)
    if args.dry_run:
        return show_plan(folder, record, listing, wanted)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with model_folder.only_one(folder):
            fill(args, folder, listing, wanted, link)
    except OSError as error:
        raise SystemExit(explain(error, folder)) from None


def which_model(args, folder: Path, record: dict) -> tuple[str, str, str | None]:
    """(repo, source, revision) that the command line names, or the record where a folder was
    given."""
    continued = Path(args.model).expanduser().is_dir()
    if continued and not record:
        raise SystemExit(f"{folder} was not fetched by this program; give ORG/NAME (and --to)")
    repo = record["repo"] if continued else args.model
    if record and record["repo"] != repo:
        raise SystemExit(f"{folder} holds {record['repo']}, not {repo}; choose another --to")
    source = args.source or (record["source"] if continued else "hf")
    if args.revision or source != record.get("source"):
        return repo, source, args.revision
    # a repair is no update
    recorded = record["commit"] or record["revision"] if args.repair else record["revision"]
    return repo, source, recorded if continued or args.repair else None


def ask(args, folder: Path, record: dict, link: Link):
    """(listing, files wanted, reason -> files left out)."""
    repo, source, revision = which_model(args, folder, record)
    listing = sources.open_source(source, repo, revision, link)
    version = listing.commit[:12] or listing.revision
    say(f"{repo} {version and f'({version}) '}from {listing.place}, {len(listing.files)} files")
    for file in listing.files:
        fetch.safe_target(folder, file.path)
        if file.size is not None and not (isinstance(file.size, int) and file.size >= 0):
            raise Fatal(f"the source gives {file.path} the size {file.size!r}")
    wanted, skipped = sources.choose(listing.files, args.include, args.exclude, args.allow_pickle)
    if (
        record
        and not args.include
        and not args.exclude
        and (args.repair or Path(args.model).expanduser().is_dir())
    ):
        wanted, skipped = [f for f in listing.files if f.path in record["wanted"]], {}
    chosen = {f.path for f in wanted}
    # another version than the one that was fetched: never a mixture of both
    wanted += [
        f for f in listing.files if f.path not in chosen and model_folder.outdated(record, f)
    ]
    return listing, wanted, skipped


def left_out(skipped: dict[str, list[Entry]]) -> Iterable[str]:
    why = {
        "pickle": "pickles can run code when loaded",
        "code": 'the repository\'s own code is fetched by --include "*.py" and never run by us',
        "other formats": "fetched by --include",
        "the same weights again": "fetched by --include",
    }
    for reason in why.keys() & skipped.keys():
        files = skipped[reason]
        names = ", ".join(f.path for f in files[:4]) + (
            f" and {len(files) - 4} more" if len(files) > 4 else ""
        )
        yield f"  left out ({reason}): {names}, {size_text(sum(f.size or 0 for f in files))}; {why[reason]}"


def show_plan(folder: Path, record: dict, listing, wanted: list[Entry]) -> None:
    """--dry_run: every file, its size and what is there of it."""
    missing = 0
    for entry in wanted:
        part = fetch.gathered(fetch.part_of(folder / entry.path, entry))
        whole = is_whole(folder, record, entry)
        known = (
            "to be read"
            if (folder / entry.path).exists()
            else f"{size_text(part)} there"
            if part
            else ""
        )
        missing += 0 if whole else (entry.size or 0) - part
        size = "unknown" if entry.size is None else size_text(entry.size)
        say(f"  {size:>12}  {entry.path}  {'there' if whole else known}".rstrip())
    total, free = (
        size_text(sum(e.size or 0 for e in wanted)),
        size_text(model_folder.free_space(folder)),
    )
    say(f"{len(wanted)} files, {total}; {size_text(missing)} to fetch into {folder} ({free} free)")


def fill(args, folder: Path, listing, wanted: list[Entry], link: Link) -> None:
    """Bring the folder to what the listing says; the caller holds the lock."""
    record = load_record(folder)  # another download may have ended just now
    strange = (
        []
        if record
        else sorted(p.name for p in folder.iterdir() if not p.name.startswith(".danpu."))
    )
    if strange and not args.repair:
        raise SystemExit(
            f"{folder} has files that this program did not fetch ({', '.join(strange[:3])}): --repair true keeps what "
            "is right and replaces the rest, --to chooses another folder"
        )
    offered = {e.path for e in listing.files}
    revision = (
        record["revision"] if record and args.repair and not args.revision else listing.revision
    )
    record = {
        "source": listing.source,
        "place": listing.place,
        "repo": listing.repo,
        "commit": listing.commit,
        "revision": revision,
        "files": record.get("files", {}),
        "wanted": sorted({e.path for e in wanted} | (offered & set(record.get("wanted", [])))),
    }
    model_folder.retire(folder, record, wanted, offered)
    todo = [e for e in wanted if args.repair or not is_whole(folder, record, e)]
    check_space(folder, todo)
    failed = fetch_all(todo, folder, record, args, link) if todo else {}
    if failed:
        named = "; ".join(f"{path}: {why}" for path, why in list(failed.items())[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise SystemExit(
            f"{len(failed)} of {len(wanted)} files could not be fetched: {named}{more}. Continue with: {again()}"
        )
    model_folder.drop_parts(folder, record)
    conclude(folder, record, wanted, todo)


def check_space(folder: Path, todo: list[Entry]) -> None:
    there = sum(fetch.gathered(fetch.part_of(folder / e.path, e)) for e in todo)
    missing = [e for e in todo if not (folder / e.path).is_file()]  # the others are probably right
    need, free = sum(e.size or 0 for e in missing) - there, model_folder.free_space(folder)
    if need + ROOM > free:
        lacks = size_text(need + ROOM - free)
        raise SystemExit(
            f"{size_text(need)} to fetch, {size_text(free)} free under {folder}: {lacks} too little; --to another disk"
        )


def conclude(folder: Path, record: dict, wanted: list[Entry], todo: list[Entry]) -> None:
    """Check what belongs together, and say what there is and what comes next."""
    problems = weights.index_problems(folder, set(record["wanted"]))
    if problems:
        raise SystemExit(
            f"{folder} is not sound: {'; '.join(problems[:3])}. So it is in the repository itself"
        )
    total = size_text(sum((folder / e.path).stat().st_size for e in wanted))
    bare = sum(not e.hashed for e in wanted)
    how = (
        f"{bare} of them by size and structure only (the source has no hash)" if bare else "by hash"
    )
    say(
        f"{folder}: {len(wanted)} files, {total}, {'all were there' if not todo else 'whole'}; checked {how}"
    )
    if (folder / "config.json").is_file():
        say(f"next: MODEL={shlex.quote(str(folder))} DATA=my.jsonl bash RECIPE/train_zero2.sh")


def explain(error: OSError, folder: Path) -> str:
    if error.errno in fetch.FULL:
        free = size_text(model_folder.free_space(folder))
        left = f"no space left on device under {folder} ({free} free)"
        return f"{left}. What arrived is kept; free some space, then: {again()}"
    return f"{error.filename or folder}: {error.strerror or error}"


# ---- frame --------------------------------------------------------------------------------------------------


def again() -> str:
    return f"python -m tools.download {shlex.join(sys.argv[1:])}"


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    folder, record = place(args)
    local = Path(args.model).expanduser().is_dir() and (args.manifest or args.try_)
    if args.verify and not args.repair:
        model_folder.verify(folder, record, args.workers)
    elif args.repair or args.dry_run or not local:
        download(args, folder, record)
    if args.manifest and not args.dry_run:
        from tools.hub import manifest

        manifest.write(folder, load_record(folder), args.window, args.batch, args.lora_r)
    if args.try_ and not args.dry_run:
        from tools.hub import try_model

        try_model.try_out(folder, args.prompt)


def outcome(argv: list[str]) -> tuple[int, str | None]:
    """(exit code, last line) of main(): one line for what goes wrong, and the exit codes of
    common.cli."""
    try:
        main(argv)
        return 0, None
    except KeyboardInterrupt:
        return INTERRUPTED, f"interrupted; what arrived is kept. Continue with: {again()}"
    except Fatal as error:
        return 1, f"error: {error}"
    except OSError as error:
        return 1, f"error: {explain(error, Path('.'))}"
    except SystemExit as error:
        return (
            (1, f"error: {error.code}")
            if isinstance(error.code, str)
            else (int(error.code or 0), None)
        )


def run() -> None:
    for name in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # SIGINT too: a shell's background jobs start with it ignored
        signal.signal(name, signal.default_int_handler)
    code, message = outcome(sys.argv[1:])
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # a worker may still wait for bytes


if __name__ == "__main__":
    run()
