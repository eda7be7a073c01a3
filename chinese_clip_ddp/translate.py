"""Translate captions into Chinese through an OpenAI-compatible endpoint; the same command goes on
after a kill, line by line.

    python chinese_clip_ddp/translate.py pairs.jsonl zh.jsonl \\
        --endpoint http://127.0.0.1:8000/v1 --model qwen       # a key: OPENAI_API_KEY

Each row of the output is a row of the input with its caption translated; what stood there is kept
as text_source (COLUMN_source). Captions that are Chinese already are kept as they are, equal ones
are asked once. What could not be translated is counted, left out, and asked again by the same
command.
"""

import hashlib
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli  # noqa: I001  (device before torch)

import requests

from journal import end_line, in_threads
from rows import TEXTS

from common.data import files, load, records, turns
from common.data.progress import Progress

PROMPT = (
    "把下面这句图片说明翻译成自然、简洁的中文，意思不增不减，专名照常用译法。只输出译文一行，"
    "不要解释，不要引号。"
)
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # answers that may be others a little later
LONGEST_PAUSE = 60  # seconds between two tries
GIVE_UP = 20  # failures one after another: the endpoint is not there
THOUGHT = re.compile(r"<think>.*?</think>|^.*?</think>", re.S)
QUOTES = ("“”", "「」", "『』", '""', "''", "‘’", "《》")
CHINESE = re.compile(r"[\u3400-\u9fff]")
WORD = re.compile(r"[^\W\d_\u3400-\u9fff]+")  # of another script


@dataclass
class Endpoint:
    """seconds: of one request."""

    address: str
    model: str
    prompt: str = PROMPT
    key: str = ""
    retries: int = 4
    seconds: float = 60
    max_tokens: int = 256


class NotTranslated(Exception):
    """fatal: no other caption will do better (a wrong key, a model that is not there)."""

    def __init__(self, reason: str, fatal: bool = False):
        super().__init__(reason)
        self.fatal = fatal


# ---- one caption ---------------------------------------------------------------------------------


def is_chinese(text: str) -> bool:
    """Whether a text has as many Chinese characters as words of other scripts, or none of these."""
    return len(CHINESE.findall(text)) >= len(WORD.findall(text))


def translate(text: str, endpoint: Endpoint, session: requests.Session) -> str:
    """One caption, tried again after growing pauses. NotTranslated with the last reason."""
    chance = random.Random(text)
    reason = ""
    for attempt in range(endpoint.retries + 1):
        pause = min(LONGEST_PAUSE, 2.0**attempt) * chance.uniform(0.5, 1)
        try:
            answer = _ask(text, endpoint, session)
        except requests.RequestException as error:
            reason = f"no answer: {type(error).__name__}"
        else:
            if answer.status_code == 200:
                translated, reason = _checked(answer, text)
                if translated:
                    return translated
                pause = 0
            else:
                reason = f"HTTP {answer.status_code}"
                if answer.status_code not in AGAIN:
                    detail = " ".join(answer.text.split())[:200]
                    raise NotTranslated(f"{reason}: {detail}", fatal=answer.status_code != 400)
                told = answer.headers.get("Retry-After", "")
                pause = min(float(told), LONGEST_PAUSE) if told.isdigit() else pause
        if attempt < endpoint.retries:
            time.sleep(pause)
    raise NotTranslated(reason)


def _ask(text: str, endpoint: Endpoint, session: requests.Session) -> requests.Response:
    body = {
        "model": endpoint.model,
        "messages": [
            {"role": "system", "content": endpoint.prompt},
            {"role": "user", "content": text},
        ],
        "temperature": 0,
        "max_tokens": endpoint.max_tokens,
    }
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    address = endpoint.address.rstrip("/") + "/chat/completions"
    # a redirect would carry the key to another host
    return session.post(
        address, json=body, headers=headers, timeout=endpoint.seconds, allow_redirects=False
    )


def _checked(answer: requests.Response, text: str) -> tuple[str, str]:
    """-> (the translation, "" where it is none; why)."""
    try:
        choice = answer.json()["choices"][0]
        said = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return "", "an answer of another form"
    if not isinstance(said, str):
        return "", "an answer without text"
    said = " ".join(THOUGHT.sub("", said).split())
    for opening, closing in QUOTES:
        inner = said[1:-1]
        is_quoted = said == opening + inner + closing
        if is_quoted and opening not in inner and closing not in inner:
            said = inner.strip()
    if choice.get("finish_reason") == "length":
        return "", "cut at its length limit"
    if not said:
        return "", "an empty answer"
    if not CHINESE.search(said):
        return "", "an answer that is not Chinese"
    if len(said) > 3 * len(text) + 40:
        return "", "an answer much longer than the caption"
    return said, ""


# ---- all of them ---------------------------------------------------------------------------------


def read_rows(path: Path, column: str) -> tuple[list[dict], str]:
    """-> (rows that have a caption, the column of it). SystemExit where there is none."""
    files.data_files(path)  # refuses unknown kinds
    encoding = files.told_encoding(path)
    stats = load.no_stats()
    rows = []
    for number, record in files.records(path, encoding):
        try:
            rows.append((number, records.as_record(record)))
        except turns.BadRow as bad:
            load.drop(stats, f"{path}:{number}", bad, strict=False)
    seen = list(dict.fromkeys(name for _, row in rows[:50] for name in row))
    lower = {str(name).lower(): name for name in seen}
    found = column or next((lower[name] for name in TEXTS if name in lower), "")
    if found not in seen:
        raise SystemExit(
            f"{path}: no column {column or 'of captions'}; columns seen: "
            f"{', '.join(map(str, seen[:20]))}; name it with --column"
        )
    with_text = []
    for number, row in rows:
        if isinstance(row.get(found), str) and row[found].strip():
            with_text.append(row)
        else:
            said = f"{type(row.get(found)).__name__} in column {found}"
            load.drop(stats, f"{path}:{number}", turns.BadRow("no caption", said), strict=False)
    for reason, count in stats["dropped"].items():
        print(f"{count:,} rows are left out, e.g. {stats['examples'][reason]}", flush=True)
    return with_text, found


def journal_of(output: Path) -> Path:
    """Where each translation stands as soon as it is there: {"source", "text"} a line."""
    return output.with_name(output.name + ".done.jsonl")


def done_before(journal: Path, told: str) -> dict[str, str]:
    """caption -> translation of an earlier run. SystemExit where that had another model or prompt;
    half a line at the end, of a kill, is passed over."""
    found: dict[str, str] = {}
    if not journal.is_file():
        return found
    lines = [record for _, record in files.records(journal, "utf-8") if isinstance(record, dict)]
    if lines and lines[0].get("made_by") != told:
        raise SystemExit(
            f"{journal}: begun with another model or prompt; choose another output, or delete it"
        )
    for line in lines:
        if isinstance(line.get("source"), str) and isinstance(line.get("text"), str):
            found[line["source"]] = line["text"]
    return found


def translations(
    texts: list[str], endpoint: Endpoint, workers: int
) -> Iterator[tuple[str, str | NotTranslated]]:
    """(caption, translation or why there is none) as they come; at most four times `workers` are
    under way."""
    sessions = threading.local()

    def work(text: str) -> tuple[str, str | NotTranslated]:
        if not hasattr(sessions, "own"):
            sessions.own = requests.Session()
        try:
            return text, translate(text, endpoint, sessions.own)
        except NotTranslated as error:
            return text, error

    yield from in_threads(work, texts, workers)


def run(rows: list[dict], column: str, output: Path, endpoint: Endpoint, workers: int) -> dict:
    """Translate what is not there yet and write the output; -> {reason: captions that failed}."""
    told = hashlib.sha256(f"{endpoint.model}\n{endpoint.prompt}".encode()).hexdigest()[:16]
    journal = journal_of(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    known = done_before(journal, told)
    texts = dict.fromkeys(row[column] for row in rows)
    todo = [text for text in texts if text not in known and not is_chinese(text)]
    chinese = sum(is_chinese(text) for text in texts)
    print(
        f"{len(texts):,} different captions: {chinese:,} Chinese already, "
        f"{sum(text in known for text in texts):,} translated before, {len(todo):,} to ask",
        flush=True,
    )
    failed: dict[str, list[str]] = {}
    in_a_row = 0
    _begin(journal, told)
    with (
        open(journal, "a", encoding="utf-8", newline="\n") as file,
        Progress("translate", total=len(todo), unit="captions") as progress,
    ):
        for text, found in translations(todo, endpoint, workers):
            progress.update()
            if isinstance(found, str):
                known[text] = found
                line = {"source": text, "text": found}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                in_a_row = 0
                continue
            failed.setdefault(str(found), []).append(text)
            in_a_row += 1
            if found.fatal or in_a_row >= GIVE_UP:
                raise SystemExit(
                    f"{endpoint.address}: {found}; what is translated is kept, the same command "
                    "goes on"
                )
    _write(rows, column, output, known)
    return failed


def _begin(journal: Path, told: str) -> None:
    """A journal that says of which model it is, and ends with a whole line."""
    if not journal.is_file() or not journal.stat().st_size:
        with files.atomic_file(journal) as part:
            part.write_text(json.dumps({"made_by": told}) + "\n", encoding="utf-8")
    end_line(journal)


def _write(rows: list[dict], column: str, output: Path, known: dict[str, str]) -> None:
    """All rows that are Chinese now, in their order."""
    with (
        files.atomic_file(output) as part,
        open(part, "w", encoding="utf-8", newline="\n") as file,
    ):
        for row in rows:
            source = row[column]
            if source in known:
                row = row | {column: known[source], f"{column}_source": source}
            elif not is_chinese(source):
                continue
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("input", help="csv, tsv, json, jsonl or parquet")
    parser.add_argument("output", help="a jsonl file")
    parser.add_argument("--endpoint", required=True, help="address up to /v1")
    parser.add_argument("--model", required=True, help="as the endpoint calls it")
    parser.add_argument("--column", default="", help="of the captions; default: found by its name")
    parser.add_argument("--prompt", default=PROMPT, help="what the model is told to do")
    parser.add_argument("--workers", type=int, default=8, help="requests at once")
    parser.add_argument("--retries", type=int, default=4, help="further tries, with longer pauses")
    parser.add_argument("--timeout", type=float, default=60, help="seconds of one request")
    args = parser.parse_args()
    if args.workers < 1 or args.retries < 0 or args.timeout <= 0:
        raise cli.usage_error("--workers, --timeout: above 0; --retries: 0 or more")
    if not args.endpoint.startswith(("http://", "https://")):
        raise cli.usage_error("--endpoint: an address like http://127.0.0.1:8000/v1")
    endpoint = Endpoint(
        address=args.endpoint,
        model=args.model,
        prompt=args.prompt,
        key=os.environ.get("OPENAI_API_KEY", ""),
        retries=args.retries,
        seconds=args.timeout,
    )
    rows, column = read_rows(Path(args.input), args.column)
    output = Path(args.output)
    if output.suffix != ".jsonl":
        raise cli.usage_error(f"{output}: a jsonl file is written")
    if output.exists() and not journal_of(output).exists():
        raise SystemExit(f"{output} is there and not of this script; choose another output")
    failed = run(rows, column, output, endpoint, args.workers)
    count = sum(map(len, failed.values()))
    for reason, texts in failed.items():
        print(f"  {len(texts):,} not translated: {reason}, e.g. {texts[0][:60]!r}")
    print(f"{output}: {len(rows):,} rows read, captions not translated: {count:,}")
    if count:
        raise SystemExit("not all captions are translated; the same command asks for the others")


if __name__ == "__main__":
    cli.run(main)
