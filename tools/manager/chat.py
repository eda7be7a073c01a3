"""Servers of models to talk to: each a process of a recipe's serve_openai_api.py on a free port,
whose answers are passed through."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
from starlette.requests import Request
from starlette.responses import StreamingResponse

from tools.manager import processes
from tools.manager.errors import Problem
from tools.manager.recipes import Recipes

SCRIPT = "serve_openai_api.py"
MOST = 2
IDLE_SECONDS = 600
READY = re.compile(r"serving (.+) on .*: (http://127\.0\.0\.1:\d+)/v1")
TIMEOUT = httpx.Timeout(600, connect=10)
PARENT_DEATH_SIGNAL = 1
PASSED = ("content-type", "retry-after")


def end_with_manager() -> None:
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)


class Server:
    """weights: the id that it was asked for. In flight: answers that are being passed through."""

    def __init__(self, name: str, weights: str, start: Callable[..., subprocess.Popen]):
        """start: subprocess.Popen with the command, which takes what is common to all."""
        self.id = name
        self.weights = weights
        self.key = secrets.token_urlsafe(24)
        self.url = ""
        self.models: list[str] = []
        self.in_flight = 0
        self.used = time.monotonic()
        self.lines: collections.deque[str] = collections.deque(maxlen=50)
        self.process = start(
            env=processes.environment(DANPU_API_KEY=self.key),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        for raw in self.process.stdout:
            line = raw.decode("utf-8", "replace").strip()
            ready = READY.match(line)
            if ready:
                self.models = ready[1].split(", ")
                self.url = ready[2]
            if line:
                self.lines.append(line[:500])
        self.process.wait()

    @property
    def state(self) -> str:
        if self.process.poll() is not None:
            return "failed"
        return "ready" if self.url else "starting"

    def public(self) -> dict:
        error = None
        if self.state == "failed":
            told = [line for line in self.lines if line.startswith("error: ")]
            error = (told or list(self.lines) or ["it has ended"])[-1].removeprefix("error: ")
        return {
            "id": self.id,
            "weights": self.weights,
            "state": self.state,
            "error": error,
            "models": self.models,
        }

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Chat:
    """root: where the servers run."""

    def __init__(self, root: Path, recipes: Recipes):
        self.root = root
        self.recipes = recipes
        self.servers: dict[str, Server] = {}
        self.number = 0
        self.lock = threading.Lock()
        self.starter = ThreadPoolExecutor(1, "chat")
        self.client: httpx.AsyncClient | None = None

    def script(self, recipe: str | None) -> Path:
        """The server of this recipe, else the first that there is."""
        found = [one.folder / SCRIPT for one in self.recipes.all()]
        found = [file for file in found if file.is_file()]
        own = [file for file in found if file.parent.name == recipe]
        if not found:
            raise Problem(404, f"no recipe here has a {SCRIPT}")
        return (own or found)[0]

    def open(self, weights: str, folder: Path | None, recipe: str | None) -> tuple[Server, bool]:
        """-> (the server of these weights, whether it was begun now). folder: None for the newest
        run that answers."""
        with self.lock:
            self.close_idle(IDLE_SECONDS)
            for server in self.servers.values():
                if server.weights == weights and server.state != "failed":
                    return server, False
            self.make_room()
            self.number += 1
            command = [sys.executable, str(self.script(recipe)), "--host=127.0.0.1", "--port=0"]
            if folder:
                command.append(f"--model={folder}")
            name = f"{self.number}"
            try:
                self.servers[name] = Server(name, weights, partial(self.start, command))
            except OSError as error:
                raise Problem(409, f"the server cannot start: {error.strerror}") from None
            return self.servers[name], True

    def start(self, command: list[str], **how) -> subprocess.Popen:
        """In the one thread that lives as long as the manager: a process ends with the thread that
        began it."""
        how |= {"cwd": self.root, "preexec_fn": end_with_manager}
        return self.starter.submit(partial(subprocess.Popen, command, **how)).result()

    def make_room(self) -> None:
        """Failed ones go, then the one that nobody has asked for the longest time."""
        for name, server in list(self.servers.items()):
            if server.state == "failed":
                del self.servers[name]
        if len(self.servers) < MOST:
            return
        free = [one for one in self.servers.values() if not one.in_flight and one.url]
        if not free:
            told = f"{MOST} servers run and are busy; end one of them first"
            raise Problem(429, told, retry_after="5")
        oldest = min(free, key=lambda one: one.used)
        del self.servers[oldest.id]
        oldest.end()

    def close_idle(self, seconds: float) -> None:
        for name, server in list(self.servers.items()):
            if not server.in_flight and time.monotonic() - server.used > seconds:
                del self.servers[name]
                server.end()

    def all(self) -> list[dict]:
        with self.lock:
            self.close_idle(IDLE_SECONDS)
            return [server.public() for server in self.servers.values()]

    def get(self, name: str) -> Server:
        with self.lock:
            if name not in self.servers:
                raise Problem(404, "there is no such server: it may have ended unused", "server")
            return self.servers[name]

    def close(self, name: str) -> None:
        server = self.get(name)
        with self.lock:
            self.servers.pop(name, None)
        server.end()

    def close_all(self) -> None:
        for name in list(self.servers):
            self.close(name)

    # ---- passing through ----
    async def passed(self, name: str, path: str, request: Request):
        """The server's own answer, piece by piece; its work ends when the client goes."""
        server = self.get(name)
        if server.state != "ready":
            raise Problem(409, f"this server is {server.state}", "server")
        if self.client is None:
            self.client = httpx.AsyncClient(timeout=TIMEOUT, trust_env=False)
        headers = {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
        body = await request.body()
        asked = self.client.build_request(
            request.method, server.url + path, headers=headers, content=body
        )
        server.in_flight += 1
        try:
            answer = await self.unless_gone(request, self.client.send(asked, stream=True))
        except BaseException as error:
            self.done(server)
            if isinstance(error, httpx.HTTPError):
                raise Problem(409, "the server has ended", "server") from None
            raise
        return Passing(self, server, answer)

    async def unless_gone(self, request: Request, work):
        """`work`, or the end of it when the client goes before the answer begins."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(gone(request))
        try:
            await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Problem(408, "the client has gone")
            return working.result()
        finally:
            leaving.cancel()
            if not working.done():
                working.cancel()

    def done(self, server: Server) -> None:
        server.in_flight -= 1
        server.used = time.monotonic()


class Passing(StreamingResponse):
    """A server's answer on its way to the client; when either goes, both end."""

    def __init__(self, chat: Chat, server: Server, answer: httpx.Response):
        kept = {name: answer.headers[name] for name in PASSED if name in answer.headers}
        super().__init__(self.pieces(), answer.status_code, kept)
        self.chat = chat
        self.server = server
        self.answer = answer

    async def pieces(self):
        with contextlib.suppress(httpx.HTTPError):  # it ended in the middle: so does the answer
            async for piece in self.answer.aiter_raw():
                yield piece

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.answer.aclose()
            self.chat.done(self.server)


async def gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
