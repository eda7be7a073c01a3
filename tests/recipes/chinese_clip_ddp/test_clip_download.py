"""Pictures are fetched from public addresses only, are pictures, and a killed download goes on."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from harness import ROOT, error_line, expect, finish, own_modules, start
from PIL import Image

(download_images,) = own_modules("chinese_clip_ddp", "download_images")
NotFetched, Limits = download_images.NotFetched, download_images.Limits
SCRIPT = ROOT / "chinese_clip_ddp/download_images.py"


def png(shade: int = 0, side: int = 24) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade % 256, shade // 256, 0)).save(file, "PNG")
    return file.getvalue()


class Site:
    """A server on this machine. pages: path -> bytes, or a function of the handler."""

    def __init__(self, pages: dict):
        self.pages = pages
        self.asked: Counter[str] = Counter()
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def count(self) -> int:
        return self.asked.total()


@contextmanager
def served(pages: dict):
    """-> (Site, its address)."""
    site = Site(pages)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            with site.lock:
                site.asked[self.path] += 1
                site.at_once += 1
                site.most_at_once = max(site.most_at_once, site.at_once)
            try:
                page = site.pages.get(self.path)
                with suppress(ConnectionError):
                    if callable(page):
                        page(self)
                    elif page is None:
                        self.send_error(404)
                    else:
                        answer(self, page)
            finally:
                with site.lock:
                    site.at_once -= 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield site, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def answer(handler, body: bytes, status: int = 200, told: int | None = None, **headers) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if told is None else told))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def to(target: str):
    return lambda handler: answer(handler, b"", 302, Location=target)


LOCAL = Limits(seconds=5, retries=0, allow_private=True, max_bytes=1 << 20)


def reason(url: str, limits: Limits = LOCAL) -> str:
    with pytest.raises(NotFetched) as caught:
        download_images.fetch(url, limits)
    return caught.value.reason


# ---- which addresses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1"),
    ],
)
def test_addresses_of_this_network_are_not_public(address):
    assert not download_images.is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert download_images.is_public(address)


PUBLIC_ONLY = Limits(seconds=5, retries=0)


def test_private_addresses_are_refused_before_a_connection(monkeypatch):
    with served({"/a.png": png()}) as (site, url):
        port = url.rpartition(":")[2]
        names = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::1]"]
        names += ["[::ffff:127.0.0.1]", "0.0.0.0"]
        for name in names:
            assert reason(f"http://{name}:{port}/a.png", PUBLIC_ONLY) == "not a public address"
        assert site.count == 0
        assert download_images.fetch(f"{url}/a.png", LOCAL) == png()


def test_a_name_is_asked_for_once_and_all_its_addresses_count(monkeypatch):
    """A name that is public when it is checked and private when it is used gets no second look; one
    of several private addresses is enough to refuse."""
    with served({"/a.png": png()}) as (site, url):
        port = int(url.rpartition(":")[2])
        answers = [["93.184.216.34"], ["127.0.0.1"]]
        asked = []
        reached = []

        def getaddrinfo(host, port, *_, **__):
            asked.append(host)
            found = answers[min(len(asked), len(answers)) - 1]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]

        def create_connection(address, timeout):
            reached.append(address[0])
            raise ConnectionRefusedError("nobody there")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket, "create_connection", create_connection)
        assert reason(f"http://rebind.example:{port}/a.png", PUBLIC_ONLY) == "no connection"
        assert asked == ["rebind.example"] and reached == ["93.184.216.34"]
        answers[:] = [["93.184.216.34", "10.0.0.1"]]
        asked.clear()
        assert reason("http://mixed.example/a.png", PUBLIC_ONLY) == "not a public address"
        assert reached == ["93.184.216.34"] and site.count == 0


def test_a_redirect_is_checked_like_an_address(monkeypatch):
    """From a host that counts as public here to the same machine by its real address."""
    pages = {"/to": to("http://127.0.0.1:9/secret"), "/on": to("/a.png"), "/a.png": png()}
    pages |= {"/file": to("file:///etc/passwd"), "/loop": to("/loop"), "/none": to("http://:80/x")}
    with served(pages) as (site, url):
        port = url.rpartition(":")[2]
        real = download_images.is_public
        resolve = socket.getaddrinfo

        def getaddrinfo(host, port, *args, **settings):
            return resolve(
                "127.0.0.2" if host == "public.example" else host, port, *args, **settings
            )

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(download_images, "is_public", lambda ip: ip == "127.0.0.2" or real(ip))
        connect = socket.create_connection
        local = lambda address, timeout: connect(("127.0.0.1", address[1]), timeout=timeout)
        monkeypatch.setattr(socket, "create_connection", local)
        public = f"http://public.example:{port}"
        assert download_images.fetch(f"{public}/on", PUBLIC_ONLY) == png()
        assert reason(f"{public}/to", PUBLIC_ONLY) == "not a public address"
        assert reason(f"{public}/file", PUBLIC_ONLY) == "wrong address"
        assert reason(f"{public}/none", PUBLIC_ONLY) == "wrong address"
        assert reason(f"{public}/loop", PUBLIC_ONLY) == "too many redirects"
        assert site.asked["/loop"] == 6


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://a.example/x", "gopher://a", "//a/b", "a.jpg", ""),
        *("http://", "http://a:99999999/", "http://a:0/", "http://[::1", "http://a..b/x"),
    ],
)
def test_what_is_no_address_is_wrong(url):
    assert reason(url) == "wrong address"


def test_a_line_break_in_an_address_starts_no_second_request():
    with served({"/a%0D%0AX:%20y": png(), "/x": png()}) as (site, url):
        for path in ("/x\r\nHost: evil", "/a\r\nX: y HTTP/1.1\r\n\r\n"):
            with suppress(NotFetched):
                download_images.fetch(url + path, LOCAL)
        assert all("\n" not in path and "\r" not in path for path in site.asked)
        assert download_images.fetch(f"{url}/x", LOCAL) == png()


def test_chinese_addresses_are_quoted():
    with served({"/%E5%9B%BE/%E7%8C%AB.png?q=%E7%BA%A2&b=1": png()}) as (_, url):
        assert download_images.fetch(f"{url}/图/猫.png?q=红&b=1", LOCAL) == png()


# ---- what comes ----------------------------------------------------------------------------------


def slowly(handler) -> None:
    """Always a little more, never the end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.1)


def no_headers(handler) -> None:
    """A header line now and then."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(60):
        handler.wfile.write(b"X-%d: y\r\n" % i)
        handler.wfile.flush()
        time.sleep(0.1)


def endless(handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"x" * 65536)


def test_what_is_too_much_is_left():
    pages = {
        "/told": lambda handler: answer(handler, b"", told=1 << 40),
        "/endless": endless,
        "/slow": slowly,
        "/headers": no_headers,
        "/short": lambda handler: answer(handler, b"abc", told=1000),
        "/401": lambda handler: answer(handler, b"", 401),
        "/503": lambda handler: answer(handler, b"", 503),
    }
    with served(pages) as (_, url):
        assert reason(f"{url}/told") == reason(f"{url}/endless") == "too large"
        quick = Limits(seconds=0.7, retries=0, allow_private=True)
        begun = time.monotonic()
        assert reason(f"{url}/slow", quick) == reason(f"{url}/headers", quick) == "too slow"
        assert time.monotonic() - begun < 5
        assert reason(f"{url}/short") in ("ended early", "no connection")
        assert reason(f"{url}/401") == "HTTP 401" and reason(f"{url}/503") == "HTTP 503"
        assert reason(f"{url}/none") == "HTTP 404"
    assert reason(f"{url}/gone") == "no connection"


def test_what_may_come_later_is_asked_again_after_longer_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    tries = Counter()

    def third_time(handler):
        tries["a"] += 1
        if tries["a"] < 4:
            return answer(handler, b"", 503, **({"Retry_After": "7"} if tries["a"] == 2 else {}))
        answer(handler, png())

    with served({"/a": third_time}) as (site, url):
        limits = Limits(seconds=5, retries=3, allow_private=True)
        assert download_images.fetch_with_retries(f"{url}/a", limits) == png()
        assert len(pauses) == 3 and pauses[1] == 7 and 0 < pauses[0] <= 1 < pauses[2] <= 4
        with pytest.raises(NotFetched):
            download_images.fetch_with_retries(f"{url}/none", limits)
        assert site.asked["/none"] == 1  # 404 stays 404


# ---- a list --------------------------------------------------------------------------------------


def pages_of(count: int) -> dict:
    return {f"/{i}.png": png(i) for i in range(count)}


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def command(*words) -> list:
    return ["python", SCRIPT, *words, "--allow_private", "true", "--retries", 0]


def test_a_list_becomes_pairs(tmp_path):
    bomb = bytearray(png())
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    pages = pages_of(3) | {
        "/page.jpg": b"<!doctype html><p>not found</p>",
        "/torn.png": png()[:-30],
        "/bomb.png": bytes(bomb),
        "/dot.png": png(side=4),
        "/empty.png": b"",
    }
    with served(pages) as (site, url):
        rows = [("红", "0.png"), ("绿", "1.png"), ("又是红", "0.png"), ("", "2.png")]
        rows += [(name, f"{name}") for name in list(pages)[3:]]
        rows = [(text, name.lstrip("/")) for text, name in rows]
        listed = "\n".join(f"{url}/{name},{text}" for text, name in rows)
        (tmp_path / "list.csv").write_text(f"URL,TEXT\n{listed}\n{url}/none,无\n", encoding="utf-8")
        out = tmp_path / "out"
        done = expect(finish(start(command(tmp_path / "list.csv", out))))
        assert site.asked["/0.png"] == 1
    assert "3 of 9 pictures" in done.stdout and "1 rows have no text" in done.stdout
    pairs = lines_of(out / "pairs.jsonl")
    assert [pair["text"] for pair in pairs] == ["红", "绿", "又是红", ""]
    for pair in pairs:
        number = int(pair["source_url"].rpartition("/")[2].split(".")[0])
        assert (out / pair["image"]).read_bytes() == png(number)
    failed = {
        line["url"].rpartition("/")[2]: line["failed"]
        for line in lines_of(out / "manifest.jsonl")
        if "failed" in line
    }
    assert failed == {
        "page.jpg": "a web page",
        "torn.png": "torn",
        "bomb.png": "too large",
        "dot.png": "too small",
        "empty.png": "empty",
        "none": "HTTP 404",
    }
    assert not list(out.rglob("*.part"))
    # what came can be trained on, by the folder's name
    (rows_,) = own_modules("chinese_clip_ddp", "rows")
    found, stats = rows_.load_pairs(out)
    assert found["text"] == ["红", "绿", "又是红"] and stats["dropped"] == {"no text": 1}


def test_what_is_no_list_is_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("text,image\n红,a.png\n", encoding="utf-8")
    error = error_line(finish(start(command(tmp_path / "a.csv", tmp_path / "out"))), 1)
    assert "no addresses; columns seen: text, image" in error
    error = error_line(finish(start(command(tmp_path / "none.csv", tmp_path / "out"))), 1)
    assert "no such file" in error
    error = error_line(
        finish(start(command(tmp_path / "a.csv", tmp_path / "out", "--worker", 3))), 2
    )
    assert "--workers" in error


def test_text_files_of_addresses(tmp_path):
    (tmp_path / "a.txt").write_text("http://a/1.jpg\n\nhttp://a/2.jpg\t一只猫\n", encoding="utf-8")
    assert download_images.read_list(tmp_path / "a.txt")[0] == [
        ("http://a/1.jpg", ""),
        ("http://a/2.jpg", "一只猫"),
    ]
    (tmp_path / "b.csv").write_bytes("链接,标题\nhttp://a/1,红色的\n".encode("gb18030") * 1)
    found, _ = download_images.read_list(tmp_path / "b.csv", "url=链接,text=标题")
    assert found == [("http://a/1", "红色的")]
    with pytest.raises(SystemExit, match="no column 题目; columns seen: 链接, 标题"):
        download_images.read_list(tmp_path / "b.csv", "url=链接,text=题目")


def test_rows_that_are_left_out_are_counted_and_named(tmp_path, capsys):
    lines = ['{"url": "http://a/1", "text": ["红", "红色"]}', '{"url": "http://a/2", "te', "[1]"]
    lines += ['{"url": ["http://a/3"], "text": "绿"}', '{"text": "蓝"}', '{"url": "http://a/4"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found, stats = download_images.read_list(tmp_path / "a.jsonl")
    assert found == [("http://a/1", "红"), ("http://a/1", "红色"), ("http://a/4", "")]
    assert stats["dropped"] == {"wrong JSON": 1, "not an object": 1, "no address": 2}
    there = {"image": "x.png", "bytes": 1}
    download_images.tell(found, stats, {"http://a/1": there, "http://a/4": there}, tmp_path)
    said = capsys.readouterr().out
    assert f"1 rows are left out, e.g. {tmp_path / 'a.jsonl'}:2: wrong JSON" in said
    assert "2 rows are left out" in said and ":4: no address (list in its column)" in said


def test_no_more_than_so_many_at_once(tmp_path):
    busy = threading.Semaphore(3)  # given back before the answer: the next question may follow it
    refused = []

    def slow(handler):
        if busy.acquire(blocking=False):
            time.sleep(0.05)
            busy.release()
        else:
            refused.append(handler.path)
        answer(handler, png())

    with served(dict.fromkeys((f"/{i}" for i in range(30)), slow)) as (site, url):
        lines = list(
            download_images.in_threads(
                partial(download_images.keep, folder=tmp_path, limits=LOCAL),
                [f"{url}/{i}" for i in range(30)],
                workers=3,
            )
        )
    assert len(lines) == 30 and site.most_at_once > 1 and not refused


def test_a_killed_download_goes_on(tmp_path):
    """kill -9 at three moments, one of them with half a line in the manifest: the end is that of an
    undisturbed one, and what was there is not asked for again."""
    count = 60

    def page(i: int):
        def slow(handler):
            time.sleep(0.02)
            answer(handler, png(i))

        return slow

    with served({f"/{i}.png": page(i) for i in range(count)}) as (site, url):
        (tmp_path / "list.tsv").write_text(
            "url\ttext\n" + "".join(f"{url}/{i}.png\t第{i}张\n" for i in range(count)),
            encoding="utf-8",
        )
        out = tmp_path / "out"
        words = command(tmp_path / "list.tsv", out, "--workers", 2)
        for moment in (10, 25, 40):
            process = start(words)
            while site.count < moment and process.poll() is None:
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        known = {line["url"] for line in lines_of(out / "manifest.jsonl")}
        assert 0 < len(known) < count
        with open(out / "manifest.jsonl", "a", encoding="utf-8") as file:
            file.write('{"url": "' + url + "/59.p")
        lost = next(line for line in lines_of_whole(out / "manifest.jsonl"))
        (out / lost["image"]).write_bytes(b"short")  # a picture that was changed behind our back
        before = site.asked.copy()
        done = expect(finish(start(words)))
        again = {f"{url}{path}" for path in site.asked if site.asked[path] > before[path]}
        assert again & known == {lost["url"]}
    assert f"{len(known) - 1} addresses are settled, {count - len(known) + 1} to ask" in done.stdout
    pairs = lines_of(out / "pairs.jsonl")
    assert [pair["text"] for pair in pairs] == [f"第{i}张" for i in range(count)]
    for i, pair in enumerate(pairs):
        assert (out / pair["image"]).read_bytes() == png(i)


def lines_of_whole(file) -> list[dict]:
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def test_ctrl_c_says_how_to_go_on(tmp_path):
    def slow(handler):
        time.sleep(0.2)
        answer(handler, png())

    with served({f"/{i}": slow for i in range(200)}) as (site, url):
        (tmp_path / "a.txt").write_text(
            "".join(f"{url}/{i}\n" for i in range(200)), encoding="utf-8"
        )
        process = start(command(tmp_path / "a.txt", tmp_path / "out", "--workers", 2))
        while site.count < 6 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        done = expect(finish(process, timeout=60), 75)
        assert "download_images.py" in done.stdout and site.count < 100
