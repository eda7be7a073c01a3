"""A model hub on 127.0.0.1 with faults, for the tests of tools/download.py.

    with Hub({"org/name": {"config.json": b"...", ...}, "datasets/org/rows": {...}}) as hub:
        hub.fault("model.safetensors", "cut", at=1000)

It speaks what huggingface_hub 2.4 asks for (listing, tree, HEAD and GET of files; large files
redirect to a second port under another host name, as to a store) and what modelscope-hub 0.5 does,
and it is a proxy for http://hub.test. It notes every request and how many bytes of files it sent.
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

LARGE = (".safetensors", ".bin", ".gguf", ".parquet")
PIECE = 1 << 14  # bytes written at once


@dataclass
class Seen:
    """One request: who was asked ("hub", "store"), how, what for, and what it got."""

    server: str
    method: str
    path: str
    headers: dict[str, str]
    file: str | None = None
    start: int = 0
    sent: int = 0
    proxied: bool = False


@dataclass
class Fault:
    kind: str
    times: int
    settings: dict = field(default_factory=dict)


class Hub:
    """repos: "org/name", of a data set "datasets/org/name" -> {path: bytes}. token: needed for everything when given."""

    def __init__(self, repos: dict[str, dict[str, bytes]], token: str | None = None):
        self.repos = repos
        self.token = token
        self.commit = "c0ffee" * 6 + "abcd"
        self.faults: dict[str, list[Fault]] = {}
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.on_bytes = None  # (path, bytes of the file that left so far)
        self.servers = [_server(self, name) for name in ("hub", "store")]
        self.url = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.store = f"http://localhost:{self.servers[1].server_port}"

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fault(self, path: str, kind: str, times: int = 1, **settings) -> None:
        """The next `times` GETs of a file (or of "listing") go wrong:

        cut at=N: the connection breaks after byte N of the file; flip at=N: one bit is wrong;
        length by=N: another Content-Length and body; status code=503; slow seconds=S a piece;
        page body=b"...": these bytes instead, with 200 and their own length
        """
        self.faults.setdefault(path, []).append(Fault(kind, times, settings))

    def take_fault(self, path: str) -> Fault:
        with self.lock:
            for fault in self.faults.get(path, []):
                if fault.times > 0:
                    fault.times -= 1
                    return fault
        return Fault("none", 0)

    def asked(self, path: str) -> list[Seen]:
        """Requests that were answered with (some of) a file's bytes, or should have been."""
        return [seen for seen in self.seen if seen.file == path]

    def sent(self, path: str | None = None) -> int:
        return sum(seen.sent for seen in self.seen if path in (None, seen.file))


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _server(hub: Hub, name: str) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "server_name_": name})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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
        server = self.server_name_
        if parts.netloc and self.hub.store.endswith(parts.netloc):  # as a proxy
            server = "store"
        headers = {name.lower(): value for name, value in self.headers.items()}
        proxied = parts.scheme == "http"
        self.seen = Seen(server, self.command, parts.path, headers, proxied=proxied)
        self.hub.seen.append(self.seen)
        path = unquote(parts.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with contextlib.suppress(ConnectionError, TimeoutError):
            if server == "store":
                return self.from_store(path)
            asked = self.headers.get("Authorization")
            if self.hub.token and asked != f"Bearer {self.hub.token}":
                return self.answer(403 if asked else 401, b"", {"X-Error-Code": "GatedRepo"})
            self.route(path, query)

    do_HEAD = do_GET

    def route(self, path: str, query: dict):
        # a model's repository has no kind in front of its name
        path = re.sub(r"^(/api|/api/v1|/openapi/v1)/models/", r"\1/", path)
        repo = r"((?:datasets/)?[^/]+/[^/]+)"
        if found := re.fullmatch(rf"/api/v1/{repo}/repo/(?:files|tree)", path):
            return self.listing(found[1], modelscope_files, query.get("Revision"))
        if found := re.fullmatch(rf"/api/v1/{repo}/repo", path):
            return self.file(found[1], query.get("FilePath", ""))
        if found := re.fullmatch(rf"/openapi/v1/{repo}|/api/v1/{repo}", path):
            return self.listing(found[1] or found[2], modelscope_info, None)
        if found := re.fullmatch(rf"/api/{repo}/tree/(.+)", path):
            return self.listing(found[1], tree_page, found[2])
        if found := re.fullmatch(rf"/api/{repo}(?:/revision/(.+))?", path):
            return self.listing(found[1], repo_info, found[2])
        if found := re.fullmatch(rf"/{repo}/resolve/[^/]+/(.+)", path):
            return self.resolve(found[1], found[2])
        self.answer(404, b"no such page")

    def answer(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- listings --------------------------------------------------------------------------------

    def listing(self, repo: str, make, revision: str | None):
        fault = self.hub.take_fault("listing")
        if fault.kind == "status":
            return self.answer(fault.settings["code"], b"not now")
        if fault.kind == "page":
            return self.answer(200, fault.settings["body"], {"Content-Type": "text/html"})
        files = self.hub.repos.get(repo)
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", "master", self.hub.commit):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        body = json.dumps(make(repo, files, self.hub.commit)).encode()
        self.answer(200, body, {"Content-Type": "application/json"})

    # ---- files -----------------------------------------------------------------------------------

    def resolve(self, repo: str, path: str):
        """HEAD and GET of Hugging Face's address of a file."""
        data = self.hub.repos.get(repo, {}).get(path)
        if data is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        commit = {"X-Repo-Commit": self.hub.commit}
        if path.endswith(LARGE):
            place = f"{self.hub.store}/{quote(repo)}/{quote(path)}?signature=secret-of-the-store"
            linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": len(data)}
            return self.answer(302, b"", {"Location": place} | linked | commit)
        self.file(repo, path, commit)

    def from_store(self, path: str):
        if "Authorization" in self.headers or "Cookie" in self.headers:
            return self.answer(400, b"a token that is none of our business")
        found = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/(.+)", path)
        self.file(found[1], found[2])

    def file(self, repo: str, path: str, headers: dict | None = None):
        data = bytearray(self.hub.repos.get(repo, {}).get(path, b""))
        headers = {"ETag": f'"{git_sha1(data)}"', **(headers or {})}
        if self.command == "HEAD":
            return self.answer(200, bytes(data), headers)
        self.seen.file = path
        fault = self.hub.take_fault(path)
        if fault.kind == "status":
            return self.answer(fault.settings["code"], b"not now")
        if fault.kind == "flip":
            data[fault.settings["at"]] ^= 1
        if fault.kind == "length":
            data = data[: fault.settings["by"]]
        if fault.kind == "page":
            return self.answer(200, fault.settings["body"], {"Content-Type": "text/html"})
        start, end = 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), min(end, int(asked[2] or end - 1) + 1)
            if start >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.seen.start = start
        self.send_response(206 if asked else 200)
        for name, value in {"Content-Length": end - start, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.send_body(path, bytes(data), start, end, fault)

    def send_body(self, path: str, data: bytes, at: int, end: int, fault: Fault):
        stop = fault.settings["at"] if fault.kind == "cut" else end
        while at < min(stop, end):
            piece = data[at : min(at + PIECE, stop, end)]
            if fault.kind == "slow":
                time.sleep(fault.settings["seconds"])
            self.wfile.write(piece)
            at += len(piece)
            self.seen.sent += len(piece)
            if self.hub.on_bytes:
                self.hub.on_bytes(path, at)
        if at < end:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


def repo_info(repo: str, files: dict[str, bytes], commit: str) -> dict:
    """/api/{kind}s/{repo}/revision/{revision}"""
    return {"id": repo.removeprefix("datasets/"), "sha": commit, "siblings": []}


def tree_page(repo: str, files: dict[str, bytes], commit: str) -> list[dict]:
    """/api/{kind}s/{repo}/tree/{commit}?recursive=true"""
    rows = []
    for path, data in files.items():
        row = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
        if path.endswith(LARGE):
            row["lfs"] = {"size": len(data), "oid": sha256(data), "pointerSize": 130}
        rows.append(row)
    return rows


def modelscope_files(repo: str, files: dict[str, bytes], commit: str) -> dict:
    """/api/v1/{kind}s/{repo}/repo/files (of a data set: tree) ?Revision=...&Recursive=True"""
    rows = [{"Type": "tree", "Path": "folder", "Name": "folder", "Size": 0}]
    for path, data in files.items():
        row = {"Type": "blob", "Path": path, "Name": path.split("/")[-1], "Size": len(data)}
        rows.append(row | {"Sha256": sha256(data)})
    return {"Code": 200, "Success": True, "Data": {"Files": rows}}


def modelscope_info(repo: str, files: dict[str, bytes], commit: str) -> dict:
    """/openapi/v1/{kind}s/{repo}"""
    return {"success": True, "data": {"id": repo.removeprefix("datasets/")}}
