"""What people said about a model's answers, kept as rows that training reads: append-only, safe
against crashes.

    python chatglm_lora/feedback.py feedback     # counts, how often the tuned model won, and the
                                                 # commands to train on it

A folder holds
    ratings.jsonl     everything: time, question, both answers and how they were made, choice,
                      correction, comment
    sft.jsonl         {"messages": [...]}: corrected or approved answers; read as kind "chat"
    preference.jsonl  {"prompt": [...], "chosen": [...], "rejected": [...]}; read as kind
                      "preference"

Any number of threads and processes may write. A rating reaches all its files or none: its rows are
noted down before the first of them is appended, under one lock, and whoever comes next finishes
what a killed process left. A line that was cut off goes to FILE.torn. Nobody's name or address is
stored.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/
import argparse
import json
import math
import os
import shlex
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone

from filelock import FileLock, Timeout

from common.data import shapes
from common.runs import machine

RATINGS = "ratings.jsonl"
SFT = "sft.jsonl"
PREFERENCE = "preference.jsonl"
FILES = (RATINGS, SFT, PREFERENCE)
LOCK = ".lock"
NOTE = ".unfinished.json"
MAX_ROW = 1 << 16  # bytes of one line
PATIENCE = 30  # seconds to wait for another writer
CHOICES = ("left", "right", "tie", "neither")
WHOLE = "eos"  # how an answer ended that was neither stopped nor cut off


# ---- a rating -> the rows that are trained -----------------------------------------------------


def verdict(rating: dict) -> tuple[list[str], str | None, str | None]:
    """A rating -> (approved answers, better answer, worse answer); None, None where there is no
    pair.

    A correction is approved and better than what it corrects. Without one, an answer that was
    stopped or cut off is never held up as an example; it may be the worse one.
    """
    sides = {side: rating[side] for side in ("left", "right")}
    correction = rating.get("correction")
    if correction:
        return [correction["text"]], correction["text"], sides[correction["of"]]["answer"]
    liked = {"left": ["left"], "right": ["right"], "tie": ["left", "right"], "neither": []}
    chosen = liked[rating["choice"]]
    approved = [sides[side]["answer"] for side in chosen if sides[side]["ended"] == WHOLE]
    if len(chosen) != 1 or not approved:
        return list(dict.fromkeys(approved)), None, None
    (other,) = set(sides) - set(chosen)
    return approved, approved[0], sides[other]["answer"]


def training_rows(rating: dict) -> dict[str, list[dict]]:
    """A rating -> rows by file name; only such as the readers in common/ take without dropping
    one."""
    approved, better, worse = verdict(rating)
    prompt = rating["prompt"]
    chats = [{"messages": [*prompt, assistant(text)]} for text in approved]
    pairs = []
    if better is not None:
        pair = {"prompt": prompt, "chosen": [assistant(better)], "rejected": [assistant(worse)]}
        pairs.append(pair)
    rows = {
        SFT: [row for row in chats if readable("chat", row)],
        PREFERENCE: [row for row in pairs if readable("preference", row)],
    }
    return {name: some for name, some in rows.items() if some}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def readable(kind: str, row: dict) -> bool:
    """Whether training would use this row (it has text, and two answers that differ)."""
    shape = shapes.detect(kind, [row])
    try:
        return shape is not None and bool(shape.convert(row))
    except shapes.BadRow:
        return False


def line_of(row: dict) -> bytes:
    """A row as a line of a file; ValueError when it is too long or holds what is no text."""
    try:
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise ValueError("a broken character (half a surrogate pair)") from None
    if len(line) > MAX_ROW:
        raise ValueError(f"{len(line) / 1024:.0f} KiB, more than {MAX_ROW // 1024} KiB")
    return line


# ---- the folder --------------------------------------------------------------------------------


class Store:
    """The files of one folder, which the first rating creates. Threads may share a Store."""

    def __init__(self, folder: str | Path, to_write: bool = True):
        """to_write: mend what is there; SystemExit with one line when nothing can be written."""
        self.folder = Path(folder).expanduser()
        if to_write:
            self._check_and_mend()

    def _check_and_mend(self) -> None:
        refusal = f"{self.folder}: cannot keep ratings here"
        candidates = [self.folder, *self.folder.absolute().parents]
        there = next(path for path in candidates if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise SystemExit(f"{refusal}: {there} is not a folder that can be written to")
        if there != self.folder:
            return
        try:
            with self._locked():
                pass
        except (OSError, ValueError) as error:
            raise SystemExit(f"{refusal}: {error}") from None

    def add(self, rating: dict) -> list[str]:
        """Append a rating and the training rows that follow from it; -> the files written to.

        All of it is on the disk on return. ValueError (too long a row, no text) and OSError (disk
        full, no access): nothing was written.

        rating: prompt (messages), left and right ({"answer", "ended", "who", ...}), choice (one of
            CHOICES), correction ({"of": "left" or "right", "text"} or None), and whatever else is
            worth keeping. id and time are added.
        """
        asked = {"messages": [*rating["prompt"], assistant(".")]}
        if rating["choice"] not in CHOICES or not readable("chat", asked):
            raise ValueError("no question, or no choice")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        rows = {RATINGS: [{"id": uuid.uuid4().hex, "time": now} | rating]} | training_rows(rating)
        lines = {name: b"".join(map(line_of, some)) for name, some in rows.items()}
        with self._locked():
            self._append_all(lines)
        return list(lines)

    def _append_all(self, lines: dict[str, bytes]) -> None:
        """All files or none; called under the lock."""
        sizes = {name: self._size(name) for name in lines}
        try:
            self._take_note({name: [sizes[name], line.decode()] for name, line in lines.items()})
            for name, line in lines.items():
                self._append(name, line)
        except BaseException:
            for name, size in sizes.items():
                self._cut(name, size)
            raise
        finally:
            (self.folder / NOTE).unlink(missing_ok=True)

    def counts(self) -> dict[str, int]:
        """Lines of each file."""
        return {name: sum(1 for _ in self._lines(name)) for name in FILES}

    def ratings(self) -> Iterator[dict | None]:
        """What ratings.jsonl holds, oldest first; None for a line that is no rating."""
        for line in self._lines(RATINGS):
            try:
                rating = json.loads(line)
                check_rating(rating)
                yield rating
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield None

    def _lines(self, name: str) -> Iterator[bytes]:
        if (self.folder / name).is_file():
            with open(self.folder / name, "rb") as file:
                yield from (line for line in file if line.strip())

    @contextmanager
    def _locked(self):
        """Alone with whole files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / LOCK).acquire(timeout=PATIENCE)
        except Timeout:
            raise OSError(f"another process has been writing there for {PATIENCE} s") from None
        with lock:
            for name in FILES:
                self._mend(name)
            self._finish()
            yield

    def _mend(self, name: str) -> None:
        """Move a last line that was cut off to FILE.torn; end one that lacks only its newline."""
        path = self.folder / name
        if not self._size(name):
            return
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() == b"\n":
                return
            file.seek(0)
            whole, newline, torn = file.read().rpartition(b"\n")
        try:
            json.loads(torn)
            self._append(name, b"\n")
        except ValueError:
            self._append(name + ".torn", torn + b"\n")
            self._cut(name, len(whole + newline))
            told = f"{path}: a line that was cut off is now in {name}.torn"
            print(told, file=sys.stderr, flush=True)

    def _finish(self) -> None:
        """Append what a writer had noted down and not appended when it was killed."""
        note = self.folder / NOTE
        if not note.is_file():
            return
        for name, (size, line) in json.loads(note.read_text(encoding="utf-8")).items():
            if self._size(name) <= size:
                self._append(name, line.encode())
        note.unlink()

    def _take_note(self, note: dict) -> None:
        part = self.folder / (NOTE + ".part")
        part.unlink(missing_ok=True)
        self._append(part.name, json.dumps(note, ensure_ascii=False).encode())
        os.replace(part, self.folder / NOTE)
        self._sync_folder()

    def _append(self, name: str, data: bytes) -> None:
        """One write, on the disk on return."""
        new = not (self.folder / name).exists()
        file = os.open(self.folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(file, data) != len(data):
                raise OSError(f"{name}: written only in part; is the disk full?")
            os.fsync(file)
        finally:
            os.close(file)
        if new:
            self._sync_folder()

    def _cut(self, name: str, size: int) -> None:
        if not size:
            (self.folder / name).unlink(missing_ok=True)  # an empty file is no data set
        elif self._size(name) > size:
            os.truncate(self.folder / name, size)

    def _size(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_size if path.exists() else 0

    def _sync_folder(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY)  # a new name is on the disk when its folder is
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_rating(rating: dict) -> None:
    """Some error or other for what is no rating."""
    verdict(rating)
    for side in ("left", "right"):
        _ = rating[side]["who"]


# ---- summary -----------------------------------------------------------------------------------


def interval(wins: int, losses: int) -> tuple[float, float]:
    """95 % interval (Wilson) of a share; (0, 1) without a case."""
    n = wins + losses
    if not n:
        return 0.0, 1.0
    z = 1.959964
    scale = 1 + z * z / n
    middle = (wins / n + z * z / (2 * n)) / scale
    half = z * math.sqrt(wins * losses / n**3 + z * z / (4 * n * n)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def duel(ratings: list[dict], one: str, other: str) -> str | None:
    """One line: how often `one` was preferred to `other`; None where they never met."""
    met = [r for r in ratings if {r["left"].get("who"), r["right"].get("who")} == {one, other}]
    if not met:
        return None
    calls = Counter(rating["choice"] for rating in met)
    decided = [rating for rating in met if rating["choice"] in ("left", "right")]
    wins = sum(rating[rating["choice"]]["who"] == one for rating in decided)
    losses = len(decided) - wins
    line = f"{one} against {other}: {wins} won, {losses} lost, "
    line += f"{calls['tie']} equally good, {calls['neither']} both bad"
    if not decided:
        return line
    low, high = interval(wins, losses)
    share = f"won {wins / len(decided):.0%} of those decided"
    return f"{line}; {share}, 95 % interval {low:.0%} to {high:.0%}"


def command(store: Store, name: str, base: str) -> str:
    """The command line that trains `base` on one of the files: with this recipe, or with the one
    for preferences."""
    shells = [HERE / "train_zero2.sh"]
    if name == PREFERENCE:
        shells = sorted(HERE.parent.glob("*dpo*/train*.sh"))
    if not shells:
        return "rows of any DPO trainer: prompt, chosen, rejected, each a list of messages"
    output = f"output/{store.folder.resolve().name}_{Path(name).stem}"
    words = {"MODEL": base, "DATA": str(store.folder / name), "OUTPUT": output}
    given = " ".join(f"{key}={shlex.quote(value)}" for key, value in words.items() if value)
    return f"{given} bash {shells[0].relative_to(HERE.parent)}"


def summary(store: Store) -> str:
    """What a folder holds, who won, and how to train on it, as text."""
    read = list(store.ratings())
    ratings = [rating for rating in read if rating]
    counts = store.counts()
    lines = [f"{store.folder}: " + ", ".join(f"{name} {counts[name]:,} rows" for name in FILES)]
    bad = read.count(None)
    if bad:
        lines.append(f"  {bad} lines of {RATINGS} are no ratings")
    for path in sorted(store.folder.glob("*.torn")):
        lines.append(f"  {path.name}: what a crash cut off, {path.stat().st_size} bytes")
    calls = Counter(rating["choice"] for rating in ratings)
    chosen = ", ".join(f"{name} {calls[name]}" for name in CHOICES)
    corrected = sum(bool(rating.get("correction")) for rating in ratings)
    lines.append(f"chosen: {chosen}; {corrected} corrected")
    duels = [duel(ratings, "tuned", "base"), duel(ratings, "B", "A")]
    lines += [line for line in duels if line]
    bases = [str(rating["base"]) for rating in ratings if rating.get("base")]
    newest_base = bases[-1] if bases else ""
    for name in (SFT, PREFERENCE):
        if counts[name]:
            lines.append(f"train on {name}: {command(store, name, newest_base)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what app.py got as --feedback_dir")
    folder = parser.parse_args().folder
    if not (folder / RATINGS).is_file():
        hint = "name the folder given to app.py as --feedback_dir"
        raise SystemExit(f"{folder}: no {RATINGS} here; {hint}")
    machine.tolerate_terminals()
    print(summary(Store(folder, to_write=False)))


if __name__ == "__main__":
    main()
