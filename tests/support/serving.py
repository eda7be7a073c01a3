"""A server in a thread of the test, as the recipes' servers run it, and bytes sent to one by hand."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager, suppress

import uvicorn

from common.demo import serve


@contextmanager
def served(app, limits: serve.Limits):
    """-> the uvicorn.Server of an app on a free port of 127.0.0.1; .port is that port."""
    server = uvicorn.Server(serve.config(app, limits))
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server.port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"


def until(found, seconds: float = 30):
    """The first true value of found(); the bound is one of hangs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def head(port: int, method: str = "GET", path: str = "/", **headers) -> bytes:
    """The bytes of a request up to its body. headers: with _ for -."""
    lines = [f"{method} {path} HTTP/1.1"]
    for name, value in ({"host": f"127.0.0.1:{port}"} | headers).items():
        lines.append(f"{name.replace('_', '-')}: {value}")
    return "\r\n".join([*lines, "", ""]).encode()


def rest(connection: socket.socket) -> bytes:
    """What still comes until the server closes."""
    found = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """-> (status, headers, body) of the next answer, whose length is said; the connection stays."""
    found = b""
    while b"\r\n\r\n" not in found:
        piece = connection.recv(1 << 16)
        assert piece, f"closed after {found!r}"
        found += piece
    first, _, body = found.partition(b"\r\n\r\n")
    status, *fields = first.decode("latin-1").split("\r\n")
    headers = {}
    for field in fields:
        name, _, value = field.partition(":")
        headers[name.lower()] = value.strip()
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(1 << 16)
    return int(status.split()[1]), headers, body


def ask(port: int, method: str = "GET", path: str = "/", body: bytes = b"", **headers):
    """-> (status, headers, body) of a request on a connection of its own."""
    if method != "GET" and "transfer_encoding" not in headers:
        headers = {"content_length": len(body)} | headers
    with connect(port) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(head(port, method, path, **headers) + body)
        return answer(connection)
