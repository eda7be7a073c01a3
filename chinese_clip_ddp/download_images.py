"""Fetch the pictures of a list of addresses; the same command goes on after a kill.

    python chinese_clip_ddp/download_images.py list.csv pictures/       # columns url, text
    python chinese_clip_ddp/download_images.py urls.txt pictures/       # an address a line
    MODEL=... DATA=pictures/pairs.jsonl bash chinese_clip_ddp/train_zero2.sh

OUTPUT/images/ holds the pictures, OUTPUT/pairs.jsonl the pairs to train on, OUTPUT/manifest.jsonl a
line for every address: what came, or why nothing did. Only addresses of the public internet are
asked, also behind a redirect, unless --allow_private true; no proxy is used. What is kept has been
opened: it is a whole picture.
"""

import contextlib
import hashlib
import http.client
import ipaddress
import json
import random
import socket
import ssl
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli  # noqa: I001  (device before torch)

from common.data.pictures import PictureError, identified, open_picture
from journal import end_line, in_threads
from rows import ADDRESSES, TEXTS, texts_of

from common.data import files, load, records, turns
from common.data.progress import Progress

REDIRECTS = 5
LONGEST_PAUSE = 60  # seconds between two tries
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers that may be others a little later
AGENT = "Mozilla/5.0 (compatible; image fetcher of a training recipe)"
SUFFIX = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}
SUFFIX |= {"BMP": ".bmp", "TIFF": ".tif", "PPM": ".ppm", "AVIF": ".avif", "JPEG2000": ".jp2"}
NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass
class Limits:
    """seconds: of one try, from its first byte to its last."""

    seconds: float = 20
    retries: int = 3
    max_bytes: int = 20 << 20
    min_side: int = 16
    allow_private: bool = False


class NotFetched(Exception):
    """reason: what it is counted under; for_now: another try may do better."""

    def __init__(self, reason: str, detail: str = "", for_now: bool = False, pause: float = 0):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.for_now = for_now
        self.pause = pause  # seconds that the server asks for


# ---- one address ---------------------------------------------------------------------------------


def fetch(url: str, limits: Limits) -> bytes:
    """The bytes behind an address, redirects followed. NotFetched for everything else."""
    deadline = time.monotonic() + limits.seconds
    for _ in range(REDIRECTS + 1):
        try:
            found, url = _ask(url, limits, deadline)
        except NotFetched:
            raise
        except UnicodeError as error:
            raise NotFetched("wrong address", str(error)[:80]) from None
        except ssl.SSLCertVerificationError as error:
            raise NotFetched("certificate not valid", error.verify_message) from None
        except TimeoutError:
            raise NotFetched("too slow", f"{limits.seconds:g} seconds", for_now=True) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline:
                raise NotFetched("too slow", f"{limits.seconds:g} seconds", for_now=True) from None
            raise NotFetched("no connection", str(error)[:80], for_now=True) from None
        if found is not None:
            return found
    raise NotFetched("too many redirects")


def _ask(url: str, limits: Limits, deadline: float) -> tuple[bytes | None, str]:
    """One request -> (the bytes, or None where it is a redirect; where to)."""
    parts, host, target = _split(url)
    connection = http.client.HTTPConnection(host, parts.port)
    connection.sock = sock = _connected(parts, host, limits, deadline)
    # a server may send a byte now and then for ever: a time-out of the socket never comes
    end = threading.Timer(_left(deadline), _hang_up, [sock])
    end.daemon = True
    end.start()
    try:
        headers = {"User-Agent": AGENT, "Accept": "image/*,*/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and answer.headers.get("Location"):
            return None, urljoin(url, answer.headers["Location"])
        if answer.status != 200:
            pause = answer.headers.get("Retry-After", "")
            raise NotFetched(
                f"HTTP {answer.status}",
                for_now=answer.status in AGAIN,
                pause=min(float(pause), LONGEST_PAUSE) if pause.isdigit() else 0,
            )
        return _body(answer, limits, deadline), url
    finally:
        end.cancel()
        connection.close()
        sock.close()


def _hang_up(sock: socket.socket) -> None:
    """Under TLS too, whose own shutdown would wait for the other side."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _split(url: str):
    """-> (parts, host, path and query in ASCII)."""
    try:
        parts = urlsplit(url)
        port = parts.port  # ValueError for one that is none
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:
        raise NotFetched("wrong address", str(error)[:80]) from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise NotFetched("wrong address", "http:// or https:// and a host are expected")
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        target += "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]")
    return parts, host, target


def _connected(parts, host: str, limits: Limits, deadline: float) -> socket.socket:
    """A socket to an address that was checked: the name is asked for once, so that it cannot turn
    into another one between the check and the connection."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NotFetched("no such host", f"{host}: {error}", for_now=True) from None
    addresses = [info[4] for info in found]
    if not limits.allow_private:
        for address in addresses:
            if not is_public(address[0]):
                raise NotFetched("not a public address", f"{host} is {address[0]}")
    last: OSError | None = None
    for address in addresses:
        try:
            sock = socket.create_connection(address[:2], timeout=_left(deadline))
        except OSError as error:
            last = error
            continue
        if parts.scheme == "http":
            return sock
        return ssl.create_default_context().wrap_socket(sock, server_hostname=host)
    raise last or OSError("no address")


def is_public(address: str) -> bool:
    """Whether an IP address, and one that is wrapped in it, is of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = None
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in NAT64:
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    if inner is not None and not is_public(str(inner)):
        return False
    is_mapped = ip.version == 6 and ip.ipv4_mapped is not None
    return is_mapped or (ip.is_global and not ip.is_multicast)


def _body(answer, limits: Limits, deadline: float) -> bytes:
    told = answer.headers.get("Content-Length", "")
    if told.isdigit() and int(told) > limits.max_bytes:
        raise NotFetched("too large", f"{int(told) >> 20} MiB")
    data = bytearray()
    while piece := answer.read1(1 << 16):
        data += piece
        if len(data) > limits.max_bytes:
            raise NotFetched("too large", f"more than {limits.max_bytes >> 20} MiB")
    _left(deadline)  # perhaps it was hung up
    if told.isdigit() and len(data) < int(told):
        raise NotFetched("ended early", f"{len(data):,} of {int(told):,} bytes", for_now=True)
    return bytes(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def fetch_with_retries(url: str, limits: Limits) -> bytes:
    """Tries again, each time after a longer pause, where that may help."""
    chance = random.Random(url)
    for attempt in range(limits.retries + 1):
        try:
            return fetch(url, limits)
        except NotFetched as error:
            if not error.for_now or attempt == limits.retries:
                raise
            pause = error.pause or min(LONGEST_PAUSE, 2.0**attempt) * chance.uniform(0.5, 1)
        time.sleep(pause)
    raise AssertionError("the last try raises")


def keep(url: str, folder: Path, limits: Limits) -> dict:
    """Fetch a picture into OUTPUT/images; -> its line of the manifest."""
    try:
        data = fetch_with_retries(url, limits)
        kind = identified(data).format
        width, height = identified(data).size
        open_picture(data, size=32)
        if min(width, height) < limits.min_side:
            raise NotFetched("too small", f"{width} x {height} pixels")
    except PictureError as error:
        return {"url": url, "failed": error.reason, "detail": error.detail, "again": False}
    except NotFetched as error:
        return {"url": url, "failed": error.reason, "detail": error.detail, "again": error.for_now}
    name = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:32]
    file = folder / "images" / name[:2] / (name + SUFFIX.get(kind, ".img"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(file) as part:
        part.write_bytes(data)
    return {
        "url": url,
        "image": file.relative_to(folder).as_posix(),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": width,
        "height": height,
    }


# ---- the list ------------------------------------------------------------------------------------


def read_list(path: Path, column_map: str = "") -> tuple[list[tuple[str, str]], dict]:
    """-> ((address, text) of each row, the text "" where there is none; what is left out, as
    load.no_stats counts it). SystemExit where the file has no addresses."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file")
    stats = load.no_stats()
    encoding = files.told_encoding(path)
    if files.suffix_of(path) in (".txt", ".lst", ""):
        lines = path.read_text(encoding=encoding, errors="replace").splitlines()
        split = [line.strip().partition("\t") for line in lines if line.strip()]
        return [(url.strip(), text.strip()) for url, _, text in split], stats
    files.data_files(path)  # refuses unknown kinds
    renames = load.column_renames(column_map)
    found = []
    columns: dict[str, None] = {}
    for number, record in files.records(path, encoding):
        try:
            record = records.as_record(record)
            columns |= dict.fromkeys(map(str, record))
            found += _addressed(load.renamed(record, renames))
        except turns.BadRow as bad:
            load.drop(stats, f"{path}:{number}", bad, strict=False)
    seen = ", ".join(list(columns)[:20])
    absent = [name for name in renames if name not in columns]
    if absent:
        raise SystemExit(f"{path}: column_map: no column {', '.join(absent)}; columns seen: {seen}")
    if not found:
        raise SystemExit(
            f"{path}: no addresses; columns seen: {seen}; accepted: {', '.join(ADDRESSES)}; name "
            "yours with --column_map url=THEIRS"
        )
    return found, stats


def _addressed(record: dict) -> list[tuple[str, str]]:
    """A row's address with each of its texts. BadRow where it has none."""
    lower = {str(name).lower(): value for name, value in record.items()}
    url = next((lower[name] for name in ADDRESSES if lower.get(name)), "")
    if not isinstance(url, str):
        raise turns.BadRow("no address", f"{type(url).__name__} in its column")
    if not url.strip():
        raise turns.BadRow("no address")
    text = next((lower[name] for name in TEXTS if lower.get(name)), "")
    texts = texts_of(text) if text else [""]
    return [(url.strip(), text.strip()) for text in texts]


def known(manifest: Path, folder: Path, retry_failed: bool) -> dict[str, dict]:
    """address -> its line, of those that need not be asked again: their pictures are there, or they
    failed for good."""
    lines: dict[str, dict] = {}
    if not manifest.is_file():
        return lines
    for _, record in files.records(manifest, "utf-8"):
        if isinstance(record, dict) and isinstance(record.get("url"), str):
            lines[record["url"]] = record
    return {url: line for url, line in lines.items() if _is_settled(line, folder, retry_failed)}


def _is_settled(line: dict, folder: Path, retry_failed: bool) -> bool:
    if "image" not in line:
        return not line.get("again") and not retry_failed
    try:
        return (folder / line["image"]).stat().st_size == line["bytes"]
    except (OSError, KeyError, TypeError):
        return False


def run(rows: list[tuple[str, str]], folder: Path, limits: Limits, workers: int, again: bool):
    """Fetch what is not there yet, write manifest and pairs; -> {address: its line}."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.jsonl"
    lines = known(manifest, folder, again)
    todo = [url for url in dict.fromkeys(url for url, _ in rows) if url not in lines]
    if len(todo) < len(rows):
        print(f"{len(lines):,} addresses are settled, {len(todo):,} to ask", flush=True)
    end_line(manifest)
    ask = partial(keep, folder=folder, limits=limits)
    with (
        open(manifest, "a", encoding="utf-8") as journal,
        Progress("download", total=len(todo), unit="addresses") as progress,
    ):
        for line in in_threads(ask, todo, workers):
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            lines[line["url"]] = line
            progress.update()
    with (
        files.atomic_file(folder / "pairs.jsonl") as part,
        open(part, "w", encoding="utf-8", newline="\n") as pairs,
    ):
        for url, text in rows:
            if "image" in lines[url]:
                pair = {"text": text, "image": lines[url]["image"], "source_url": url}
                pairs.write(json.dumps(pair, ensure_ascii=False).encode(errors="replace").decode())
                pairs.write("\n")
    return lines


def tell(rows: list[tuple[str, str]], stats: dict, lines: dict[str, dict], folder: Path) -> None:
    """stats: of read_list."""
    for reason, count in stats["dropped"].items():
        print(f"  {count:,} rows are left out, e.g. {stats['examples'][reason]}")
    asked = {url: lines[url] for url, _ in rows}
    there = [line for line in asked.values() if "image" in line]
    size = sum(line["bytes"] for line in there) / (1 << 20)
    print(f"{len(there):,} of {len(asked):,} pictures, {size:,.1f} MiB, in {folder / 'images'}")
    reasons: dict[str, list[str]] = {}
    for url, line in asked.items():
        if "image" not in line:
            detail = f" ({line['detail']})" if line["detail"] else ""
            reasons.setdefault(line["failed"], []).append(f"{url[:100]}{detail}")
    for reason, examples in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"  {len(examples):,} {reason}, e.g. {examples[0]}")
    silent = sum(not text for _, text in rows)
    if silent:
        print(f"  {silent:,} rows have no text; a row needs one to be trained on")
    print(f"pairs: {folder / 'pairs.jsonl'}")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "list", help="csv, tsv, json, jsonl, parquet, or .txt with an address a line"
    )
    parser.add_argument("output", help="folder; what is in it is kept")
    parser.add_argument("--workers", type=int, default=16, help="addresses asked at once")
    parser.add_argument("--retries", type=int, default=3, help="further tries, with longer pauses")
    parser.add_argument("--timeout", type=float, default=20, help="seconds of one try")
    parser.add_argument("--max_mib", type=float, default=20, help="larger files are left")
    parser.add_argument("--min_side", type=int, default=16, help="pixels; smaller is left")
    parser.add_argument("--column_map", default="", help="url=THEIRS,text=THEIRS")
    parser.add_argument("--retry_failed", default="false", help="ask again what failed for good")
    parser.add_argument("--allow_private", default="false", help="also addresses of this network")
    args = parser.parse_args()
    for name in ("retry_failed", "allow_private"):
        if getattr(args, name) not in ("true", "false"):
            raise cli.usage_error(f"--{name}: true or false")
    if args.workers < 1 or args.retries < 0 or args.timeout <= 0 or args.max_mib <= 0:
        raise cli.usage_error("--workers, --timeout, --max_mib: above 0; --retries: 0 or more")
    limits = Limits(
        seconds=args.timeout,
        retries=args.retries,
        max_bytes=int(args.max_mib * (1 << 20)),
        min_side=args.min_side,
        allow_private=args.allow_private == "true",
    )
    rows, stats = read_list(Path(args.list), args.column_map)
    folder = Path(args.output)
    lines = run(rows, folder, limits, args.workers, args.retry_failed == "true")
    tell(rows, stats, lines, folder)
    if not any("image" in lines[url] for url, _ in rows):
        raise SystemExit(f"{args.list}: no picture could be fetched")


if __name__ == "__main__":
    cli.run(main)
