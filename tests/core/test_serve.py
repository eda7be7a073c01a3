"""What clients may take of a server: slow, false, many and idle ones, on sockets of 127.0.0.1."""

import ast
import asyncio
import json
import logging
import socket
import threading
import time
import urllib.request
from contextlib import ExitStack

import gradio as gr
import psutil
import pytest
from harness import RECIPES, ROOT
from serving import answer, ask, connect, head, rest, served, until

from common.demo import serve

LIMITS = serve.Limits(
    body=1000, bodies=8, body_seconds=1, idle_seconds=2, unread_seconds=1, connections=512
)
SECRET = "geheim"
SLOW = 0.2  # seconds between two bytes


async def app(scope, receive, send):
    """/stream never ends; any other path says how long the body was."""
    head = {"type": "http.response.start", "status": 200, "headers": []}
    piece = {"type": "http.response.body", "body": b"x" * 10_000, "more_body": True}
    message = await receive()
    if scope["path"] == "/stream":
        leaving = asyncio.ensure_future(receive())
        await send(head)
        while not leaving.done():
            await send(piece)
            await asyncio.sleep(0)
        app.left += 1
        return
    said = b"%d" % len(message["body"])
    head["headers"].append((b"content-length", b"%d" % len(said)))
    await send(head)
    await send({"type": "http.response.body", "body": said})


app.left = 0


@pytest.fixture(scope="module")
def server():
    with served(serve.Guard(app, {"127.0.0.1"}, LIMITS), LIMITS) as running:
        yield running


@pytest.fixture
def port(server, caplog):
    """Afterwards the next request is answered, and nothing went wrong inside."""
    caplog.set_level(logging.ERROR, "uvicorn.error")
    yield server.port
    assert ask(server.port)[::2] == (200, b"0")
    assert not caplog.records


def trickle(connection, data: bytes) -> None:
    """A byte at a time until the server has had enough."""
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(SLOW)
        connection.setblocking(False)
        try:
            if connection.recv(1, socket.MSG_PEEK) is not None:
                return
        except BlockingIOError:
            pass
        except ConnectionResetError:
            return
        finally:
            connection.settimeout(30)
    raise AssertionError("the server took it all")


def test_a_slow_body_gets_408(port):
    with connect(port) as slow:
        slow.sendall(head(port, "POST", content_length=900))
        trickle(slow, b"x" * 100)
        status, headers, body = answer(slow)
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body) == {"detail": "the body took more than 1 s"}
        assert rest(slow) == b""


@pytest.mark.parametrize(
    "length, sent, statuses",
    [
        ("5", b"12345GARBAGE\r\n\r\n", [200, 400]),
        ("50", b"12345", [408]),
        ("-5", b"12345", [400]),
        ("+5", b"12345", [400]),
        ("five", b"12345", [400]),
        ("5\r\nContent-Length: 6", b"12345", [400]),
        ("9" * 20, b"12345", [413]),
        ("9" * 30, b"12345", [400]),
        ("1001", b"x" * 1001, [413]),
    ],
)
def test_lengths_that_are_not_true(port, length, sent, statuses):
    with connect(port) as connection:
        connection.sendall(head(port, "POST", content_length=length) + sent)
        found = rest(connection)
    assert [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]] == statuses


def test_a_body_of_unknown_length_is_counted(port):
    def post(parts):
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
        return ask(port, "POST", "/", body, transfer_encoding="chunked")

    assert post([b"x" * 500, b"x" * 500])[::2] == (200, b"1000")
    status, headers, body = post([b"x" * 500] * 2000)
    assert (status, headers["connection"]) == (413, "close") and b"1000 bytes" in body


def test_clients_that_leave_in_the_middle(port):
    for begun in (b"POST / HT", head(port, "POST", content_length=900) + b"x"):
        with connect(port) as connection:
            connection.sendall(begun)
    seen = app.left
    with connect(port) as connection:
        connection.sendall(head(port, path="/stream"))
        connection.recv(10)
    until(lambda: app.left == seen + 1)


def test_a_slow_reader_is_given_up(port):
    """It reads a little now and then, far less than is written."""
    seen = app.left
    with connect(port) as connection:
        connection.sendall(head(port, path="/stream"))

        def gone():
            connection.recv(100)
            time.sleep(SLOW)
            return app.left > seen

        until(gone)


def test_of_too_many_at_once_the_rest_get_503_and_when_to_come_again(port):
    """100 clients whose bodies are on their way."""
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(port)) for _ in range(100)]
        for client in clients:
            client.sendall(head(port, "POST", content_length=10) + b"x")
        answers = [answer(client) for client in clients]
    refused = [headers for status, headers, _ in answers if status == 503]
    assert [status for status, *_ in answers].count(408) == LIMITS.bodies
    assert len(refused) == 100 - LIMITS.bodies
    assert all(int(headers["retry-after"]) > 0 for headers in refused)


def test_a_thousand_idle_connections(port, server):
    """Half of them silent, half kept alive after an answer, one in the middle of a head: they do
    not keep others out, take no memory, and are closed after a while whatever they send."""
    process = psutil.Process()
    before = process.memory_info().rss
    with ExitStack() as stack:
        for count in range(1000):
            idle = stack.enter_context(connect(port))
            if count % 2:
                idle.sendall(head(port))
        slow = stack.enter_context(connect(port))
        assert ask(port)[0] == 200
        assert len(server.server_state.connections) <= LIMITS.connections + 1
        assert process.memory_info().rss - before < 100 << 20
        trickle(slow, head(port, name="x" * 100))
        assert rest(slow) == b""
        until(lambda: not server.server_state.connections)


def test_strangers(port):
    assert ask(port, host="evil.example")[0] == 421
    status, headers, _ = ask(port, origin="https://evil.example")
    assert status == 403 and "access-control-allow-origin" not in headers


# ---- Gradio's pages ----------------------------------------------------------------------------


class Page:
    """A page with a box; its event ends when `go` is set."""

    def __init__(self):
        self.go = threading.Event()
        self.go.set()
        with gr.Blocks(analytics_enabled=False) as self.demo:
            box = gr.Textbox()
            said = gr.Textbox()
            box.submit(self.say, box, said, api_visibility="private", concurrency_limit=1)
            box.blur(self.say, box, said, api_visibility="private", queue=False)
        self.demo.queue(max_size=4)
        serve.serve(self.demo, limits=serve.Limits(body=10_000, body_seconds=1, idle_seconds=2))
        self.port = self.demo.server_port

    def say(self, text):
        self.go.wait(60)
        return text

    def post(self, body, name="queue/join", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {"content_type": "application/json"} | headers
        return ask(self.port, "POST", serve.API + name, body, **headers)


@pytest.fixture(scope="module")
def page():
    made = Page()
    yield made
    made.demo.close(verbose=False)


GOOD = {"data": ["a"], "fn_index": 0, "session_hash": "s"}
ODD = {
    "no json": b'{"geheim": ',
    "no utf-8": b'{"geheim": "\xff"}',
    "deep": b"[" * 9_999,
    "deep and whole": b"[" * 4_000 + b"]" * 4_000,
    "nan": json.dumps(GOOD | {"fn_index": float("nan")}).encode(),
    "half a character": GOOD | {"session_hash": "\ud83d"},
    "a list": [SECRET],
    "types": {"data": SECRET, "fn_index": SECRET, "session_hash": 5},
    "no such event": GOOD | {"fn_index": 999, "event_data": SECRET},
    "a negative one": GOOD | {"fn_index": -1},
    "a huge one": GOOD | {"fn_index": 10**30},
    "no visitor": {"data": [SECRET], "fn_index": 0},
    "empty": b"",
}


@pytest.mark.parametrize("name", ODD)
def test_a_page_refuses_what_it_did_not_send(name, page, caplog):
    status, headers, body = page.post(ODD[name])
    assert 400 <= status < 500 and SECRET.encode() not in body
    assert set(json.loads(body)) == {"detail"}
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert not caplog.records


def test_a_page_takes_no_files_and_no_calls_past_its_queue(page, tmp_path, monkeypatch):
    monkeypatch.setattr(page.demo.app, "uploaded_file_dir", str(tmp_path))
    form = "multipart/form-data; boundary=X"
    file = (
        b'--X\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nx\r\n--X--\r\n'
    )
    assert page.post(file, "upload", content_type=form)[0] == 404
    assert not list(tmp_path.iterdir())
    assert page.post(GOOD, "run/predict")[0] == 404
    assert page.post(GOOD | {"fn_index": 1}, "run/predict")[0] == 200
    assert page.post(GOOD, "call/say")[0] == 404
    assert page.post(GOOD, "component_server")[0] == 404
    status, _, body = ask(page.port, path=serve.API + "file=/etc/geheim")
    assert status == 403 and SECRET.encode() not in body


def test_a_page_that_takes_files_has_its_own_bound():
    guard = serve.PageGuard(app, set(), serve.Limits(body=2000), uploads=True)
    with served(guard, serve.LIMITS) as server:
        assert ask(server.port, "POST", serve.UPLOAD, b"x" * 2000)[::2] == (200, b"2000")
        assert ask(server.port, "POST", serve.UPLOAD, b"x" * 2001)[0] == 413


def test_no_other_page_is_let_in(page):
    """Gradio's own CORS headers do not reach a stranger, not even before a request."""
    evil = {"origin": "https://evil.example"}
    asks = {"access_control_request_method": "POST"}
    for host in ("x.example", f"127.0.0.1:{page.port}"):
        for method, more in (("GET", {}), ("OPTIONS", asks)):
            status, headers, _ = ask(page.port, method, "/", host=host, **evil, **more)
            assert status in (403, 421)
            assert not any(name.startswith("access-control") for name in headers)


def test_slow_large_and_idle_clients_of_a_page(page):
    assert page.post(b" " * 10_001)[0] == 413
    with connect(page.port) as idle, connect(page.port) as slow:
        slow.sendall(head(page.port, "POST", serve.API + "queue/join", content_length=900))
        trickle(slow, b"x" * 100)
        assert answer(slow)[0] == 408
        assert rest(idle) == b""
    assert ask(page.port)[0] == 200


def test_a_page_lets_so_many_wait_and_sends_the_rest_away(page):
    """100 clients while one is served: the queue's four wait, and afterwards there is place."""
    page.go.clear()
    answers = []

    def join(number):
        answers.append(page.post(GOOD | {"session_hash": f"s{number}"}))

    assert page.post(GOOD)[0] == 200
    until(lambda: len(page.demo.server_app.get_blocks()._queue) == 0)
    threads = [threading.Thread(target=join, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    statuses = [status for status, *_ in answers]
    assert (statuses.count(200), statuses.count(503)) == (4, 96)
    refused = [headers for status, headers, _ in answers if status == 503]
    assert all(int(headers["retry-after"]) > 0 for headers in refused)
    page.go.set()
    until(lambda: page.post(GOOD)[0] == 200)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_page_is_served_behind_the_guard(recipe):
    """No page starts Gradio's server by itself."""
    files = [*(ROOT / recipe).rglob("*.py"), ROOT / "common/demo/page.py"]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".launch"):
                found.add(ast.unparse(node.func))
    assert found <= {"page.launch"}


@pytest.mark.parametrize("streams", [False, True])
def test_a_handler_that_ends_with_a_line_tells_it_and_the_page_lives(streams):
    """A model that cannot be opened is a SystemExit in a handler, which would end Gradio's server."""
    import gradio as gr

    def ends(text):
        raise SystemExit("models/x: no trained model here")

    def streams_and_ends(text):
        yield "a"
        ends(text)

    with gr.Blocks() as demo:
        box = gr.Textbox()
        box.submit(streams_and_ends if streams else ends, box, box)
    demo.queue()
    url = serve.serve(demo)
    port = int(url.rstrip("/").rsplit(":", 1)[1])
    try:
        body = json.dumps(GOOD).encode()
        kind = {"content_type": "application/json"}
        assert ask(port, "POST", serve.API + "queue/join", body, **kind)[0] == 200
        events = f"http://127.0.0.1:{port}{serve.API}queue/data?session_hash=s"
        with urllib.request.urlopen(events, timeout=30) as stream:
            told = stream.read().decode()
        assert "no trained model here" in told
        assert ask(port)[0] == 200
    finally:
        demo.close(verbose=False)
