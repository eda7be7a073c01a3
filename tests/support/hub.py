"""A model hub on 127.0.0.1 with faults, for the tests of tools/download.py.

    with Hub({"org/name": {"config.json": b"...", ...}}) as hub:
        hub.fault("model.safetensors", "cut", at=1000, times=2)

One server speaks Hugging Face's layout (large files redirect to a second port under another host
name, as to a CDN), ModelScope's, plain folders (/files/org/name/...), and is a proxy for
http://hub.test and for itself. It notes every request and how many bytes of every file it sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf")
PIECE = 1 << 14  # bytes written at once


@dataclass
class Seen:
    """One request: who was asked ("hub", "cdn"), what for, and how many bytes of the file were
    sent."""

    server: str
    path: str
    headers: dict[str, str]
    file: str | None = None
    start: int = 0
    sent: int = 0
    status: int = 0
    proxied: bool = False


@dataclass
class Fault:
    kind: str
    times: int
    settings: dict = field(default_factory=dict)


class Hub:
    """repos: "org/name" -> {path: bytes}. token: needed for everything when given."""

    def __init__(self, repos: dict[str, dict[str, bytes]], token: str | None = None):
        self.repos, self.token, self.commit = repos, token, "c0ffee" * 6 + "abcd"
        self.faults: dict[str, list[Fault]] = {}
        self.seen: list[Seen] = []
        self.hashes, self.ranges, self.lock = True, True, threading.Lock()
        self.on_bytes = None  # (path, bytes of the file that left so far)
        self.ending = threading.Event()
        self.servers = [_server(self, name) for name in ("hub", "cdn")]
        self.url = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.cdn = f"http://localhost:{self.servers[1].server_port}"

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fault(self, path: str, kind: str, times: int = 1, **settings) -> None:
        """The next `times` answers for a file (or "listing") go wrong. Kinds:

        cut at=N: the connection breaks after byte N of the file; stall at=N: nothing comes after it
        status code=503, retry_after=None; html; length by=N: another Content-Length and body; flip
        at=N: one bit etag: the file has another version (its ETag and first byte differ); place:
        wrong Content-Range redirect to=URL; slow seconds=S: a pause before each piece
        """
        self.faults.setdefault(path, []).append(Fault(kind, times, settings))

    def take_fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults.get(path, []):
                if fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def sent(self, path: str) -> int:
        return sum(seen.sent for seen in self.seen if seen.file == path)

    def asked(self, path: str) -> list[Seen]:
        """Requests that were answered with (some of) a file's bytes, or should have been."""
        return [seen for seen in self.seen if seen.file == path]


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _server(hub: Hub, name: str) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "server_name_": name})
    )
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that go away in the middle are what we test
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    server_name_: str

    def log_message(self, *_):
        pass

    def do_GET(self):
        parts = urlsplit(self.path)
        server = (
            "cdn" if parts.netloc and self.hub.cdn.endswith(parts.netloc) else self.server_name_
        )
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen = Seen(server, parts.path, headers, proxied=parts.scheme == "http")
        self.hub.seen.append(self.seen)
        path, query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
        with contextlib.suppress(ConnectionError, TimeoutError):
            if server == "cdn":
                return self.cdn(path)
            needs = self.hub.token and not path.startswith("/files/")
            if needs and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                return self.answer(401, b"who are you?", {"X-Error-Code": "GatedRepo"})
            self.route(path, query)

    def route(self, path: str, query: dict):
        """The hub's port: which of the layouts is spoken."""
        if found := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            return self.listing(found[1], self.hub_listing, found[2])
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            return self.listing(found[1], self.modelscope_listing, query.get("Revision"))
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            return self.file(found[1], query.get("FilePath", ""))
        if found := re.fullmatch(r"/files/([^/]+/[^/]+)/(.+)", path):
            return self.file(found[1], found[2])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if found[2].endswith(LARGE) and found[2] in self.hub.repos.get(found[1], {}):
                place = f"{self.hub.cdn}/{quote(found[1])}/{quote(found[2])}?signature=secret-of-the-cdn"
                return self.answer(302, b"", {"Location": place, "X-Repo-Commit": self.hub.commit})
            return self.file(found[1], found[2])
        self.answer(404, b"no such page")

    def cdn(self, path: str):
        if "Authorization" in self.headers or "Cookie" in self.headers:
            return self.answer(400, b"a token that is none of our business")
        _, org, name, file = path.split("/", 3)
        self.file(f"{org}/{name}", file)

    def answer(
        self, status: int, body: bytes, headers: dict | None = None, kind: str = "text/plain"
    ):
        self.seen.status = status
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(body),
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    # ---- listings -------------------------------------------------------------------------------------------

    def listing(self, repo: str, make, revision: str | None):
        fault = self.hub.take_fault("listing")
        if fault and fault.kind == "status":
            return self.refuse(fault)
        if fault and fault.kind == "html":
            return self.answer(200, b"<html>please log in</html>", kind="text/html")
        files = self.hub.repos.get(repo)
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, "application/json")
        if revision not in (None, "main", "master", self.hub.commit):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, "application/json")
        self.answer(200, json.dumps(make(repo, files)).encode(), kind="application/json")

    def hub_listing(self, repo: str, files: dict[str, bytes]) -> dict:
        rows = []
        for path, data in files.items():
            row = {"rfilename": path, "size": len(data)}
            if self.hub.hashes:
                row["blobId"] = git_sha1(data)
                if path.endswith(LARGE):
                    sha = hashlib.sha256(data).hexdigest()
                    row["lfs"] = {"size": len(data), "sha256": sha, "pointerSize": 130}
            rows.append(row)
        return {"id": repo, "sha": self.hub.commit, "siblings": rows}

    def modelscope_listing(self, repo: str, files: dict[str, bytes]) -> dict:
        rows = [{"Type": "tree", "Path": "folder", "Name": "folder", "Size": 0}]
        for path, data in files.items():
            row = {"Type": "blob", "Path": path, "Name": path.split("/")[-1], "Size": len(data)}
            if self.hub.hashes:
                row["Sha256"] = hashlib.sha256(data).hexdigest()
            rows.append(row)
        return {"Code": 200, "Success": True, "Data": {"Files": rows}}

    # ---- files ----------------------------------------------------------------------------------------------

    def refuse(self, fault: Fault):
        wait = fault.settings.get("retry_after")
        headers = {"Retry-After": wait} if wait is not None else {}
        self.answer(fault.settings.get("code", 503), b"not now", headers)

    def file(self, repo: str, path: str):
        data = self.hub.repos.get(repo, {}).get(path)
        if data is None:
            return self.answer(404, b"no such file", {"X-Error-Code": "EntryNotFound"})
        self.seen.file = path
        fault = self.hub.take_fault(path) or Fault("none", 0)
        if fault.kind == "status":
            return self.refuse(fault)
        if fault.kind == "html":
            return self.answer(200, b"<html>please log in</html>", kind="text/html")
        if fault.kind == "redirect":
            return self.answer(302, b"", {"Location": fault.settings["to"]})
        self.send_file(path, bytearray(data), fault)

    def send_file(self, path: str, data: bytearray, fault: Fault):
        etag = '"' + hashlib.md5(data).hexdigest() + '"'
        if fault.kind == "etag":
            data[0] ^= 1
            etag = '"another-version"'
        if fault.kind == "flip":
            data[fault.settings["at"]] ^= 1
        if fault.kind == "length":
            by = fault.settings["by"]
            data = data[:by] if by < 0 else data + bytes(by)
        total, start, end = len(data), 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.hub.ranges and self.headers.get("If-Range") in (None, etag):
            start, end = int(asked[1]), min(total, int(asked[2] or total - 1) + 1)
            if start >= total:
                return self.answer(416, b"", {"Content-Range": f"bytes */{total}"})
            self.seen.status = 206
            self.send_response(206)
            shown = start + 1 if fault.kind == "place" else start
            self.send_header("Content-Range", f"bytes {shown}-{end - 1}/{total}")
        else:
            self.seen.status = 200
            self.send_response(200)
        self.send_header("ETag", etag)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.seen.start = start
        self.send_body(path, bytes(data), start, end, fault)

    def send_body(self, path: str, data: bytes, start: int, end: int, fault: Fault):
        stop = fault.settings.get("at", end) if fault.kind in ("cut", "stall") else end
        at = start
        while at < min(stop, end):
            piece = data[at : min(at + PIECE, stop, end)]
            if fault.kind == "slow":
                time.sleep(fault.settings["seconds"])
            self.wfile.write(piece)
            at += len(piece)
            self.seen.sent += len(piece)
            if self.hub.on_bytes:
                self.hub.on_bytes(path, at)
        if at >= end:
            return
        if fault.kind == "stall":
            self.hub.ending.wait(60)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
