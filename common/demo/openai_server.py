"""What OpenAI-compatible servers share: text in whole characters, errors in OpenAI's words, keys,
one log line for each request, and how such a process begins and ends.

Which models answer, and how, stands in the server itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from common import device
from common.demo import serve
from common.demo.openai_request import Refusal
from common.runs.generate import BROKEN

COMPLETIONS = "/v1/chat/completions"
MODELS = "/v1/models"
HEALTH = "/health"
LIMITS = serve.Limits(body=1 << 20)
CLIENT_LEFT = 499  # in the log
BASE = "base"  # the model id without the adapter
NAME = re.compile(r"[A-Za-z_]{1,40}")  # of a field, in the log
MAX_HELD = 64  # tokens that wait for the last bytes of a character; after so many it is broken


# ---- the answer --------------------------------------------------------------------------------


class Text:
    """Growing token ids -> text in whole characters, up to the first stop string. An answer that is
    cut inside a character ends before it.

    Blanks depend on neighbours, so ids are decoded together with those of the piece before.
    """

    def __init__(self, tokenizer, stops: list[str]):
        self.decode = partial(tokenizer.decode, skip_special_tokens=True)
        self.stops = stops
        self.stopped = False
        self.ids: list[int] = []
        self.start = 0  # of the piece before
        self.told = 0  # ids whose text is out, or held
        self.held = ""  # maybe the beginning of a stop string

    def add(self, ids: list[int], last: bool = False) -> str:
        """The text that is certain with these ids too; with `last` also what was waiting for
        more."""
        if self.stopped:
            return ""
        self.ids += ids
        before = self.decode(self.ids[self.start : self.told])
        now = self.decode(self.ids[self.start :])
        waits_for_bytes = len(now) <= len(before) or now.endswith(BROKEN)
        if waits_for_bytes and not last and len(self.ids) - self.told < MAX_HELD:
            return ""
        self.start = self.told
        self.told = len(self.ids)
        new = now[len(before) :]
        if last:
            new = new.rstrip(BROKEN)
        return self._until_stop(self.held + new, last)

    def _until_stop(self, text: str, last: bool) -> str:
        """What may be told of `text`; the rest is held."""
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        cut = len(text)
        if not last:
            cut -= max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[cut:]
        return text[:cut]


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may be the beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@contextlib.contextmanager
def failures():
    """What goes wrong in the model -> Refusal 500, and the traceback on stderr."""
    try:
        yield
    except torch.OutOfMemoryError:
        traceback.print_exc()
        told = "out of memory; try a shorter conversation or fewer max_tokens"
        raise Refusal(503, told, code="out_of_memory") from None
    except Refusal:
        raise
    except Exception as error:
        traceback.print_exc()
        told = f"the model failed: {type(error).__name__}"
        raise Refusal(500, told, code="generation_failed") from None


async def send_event(send, body: dict):
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    for code in (0x85, 0x2028, 0x2029):  # some clients end a line there
        text = text.replace(chr(code), f"\\u{code:04x}")
    await send_data(send, text)


async def send_data(send, text: str):
    body = f"data: {text}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def unless_gone(receive, work):
    """Await `work`; when the client leaves first, cancel it and raise serve.Left."""

    async def leaving():
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    tasks = [working, asyncio.ensure_future(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise serve.Left
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ---- the server --------------------------------------------------------------------------------


def check_model(model: str, models: Collection[str]) -> None:
    """Refusal 404 for an id that this server does not have."""
    if model not in models:
        told = f"this model does not exist; this server has {', '.join(models)}"
        raise Refusal(404, told, "model", "model_not_found")


class Keyed:
    """ASGI middleware: everything but /health needs the key."""

    def __init__(self, app, key: str | None):
        self.app = app
        self.expected = None if key is None else f"Bearer {key}".encode()

    def lets_in(self, path: str, given: bytes) -> bool:
        if self.expected is None or path == HEALTH:
            return True
        return hmac.compare_digest(given, self.expected)

    async def __call__(self, scope, receive, send):
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.lets_in(scope["path"], given):
            return await self.app(scope, receive, send)
        told = "an API key is needed: Authorization: Bearer KEY"
        if given:
            told = "the API key is wrong"
        refusal = Refusal(401, told, code="invalid_api_key", www_authenticate="Bearer")
        await refusal.response()(scope, receive, send)


class Front(serve.Guard):
    """The guard of the pages, in OpenAI's words, and one log line for each request without anything
    of its text."""

    def __init__(
        self, app: Starlette, hosts: set[str], origins: list[str], limits: serve.Limits = LIMITS
    ):
        """app: of build_app; origins: of pages that may ask."""
        super().__init__(app, hosts, limits)
        self.paths = app.state.paths
        self.origins = {origin.encode() for origin in origins}

    async def __call__(self, scope, receive, send):
        began = time.perf_counter()
        sent_status = CLIENT_LEFT  # until an answer begins

        async def send_and_note(message):
            nonlocal sent_status
            if message["type"] == "http.response.start":
                sent_status = message["status"]
            await send(message)

        try:
            await super().__call__(scope, receive, send_and_note)
        finally:
            state = scope["state"]
            status = CLIENT_LEFT if state.get("left") else sent_status
            self.log(scope, state.get("failed") or status, time.perf_counter() - began)

    def refuse_strangers(self, headers: dict[bytes, bytes]) -> None:
        """Pages of --allow_origin are none."""
        if b"*" in self.origins or headers.get(b"origin") in self.origins:
            headers = {name: value for name, value in headers.items() if name != b"origin"}
        super().refuse_strangers(headers)

    def response(self, refused: serve.Refused) -> JSONResponse:
        code = "forbidden" if refused.status in (403, 421) else None
        return Refusal(refused.status, refused.text, code=code, **refused.headers).response()

    def log(self, scope, status: int, seconds: float) -> None:
        """status CLIENT_LEFT: the client left before the end."""
        known = [path for path in self.paths if scope["path"].startswith(path)]
        path = known[0] if known else "(unknown path)"
        words = [time.strftime("%Y-%m-%d %H:%M:%S"), str(status), scope["method"], path]
        if "tokens" in scope["state"]:
            words.append(scope["state"]["tokens"])
        ignored = [name for name in scope["state"].get("ignored", ()) if NAME.fullmatch(name)]
        if ignored:
            words.append(f"ignored: {', '.join(ignored[:8])};")
        with contextlib.suppress(OSError):  # whoever read the log has gone
            print(*words, f"{seconds:.2f} s", flush=True)


def answer_refusal(request, error: Refusal):
    return error.response()


def answer_bug(request, error: Exception):
    return Refusal(500, "internal error").response()


def answers_to_problems(paths: Sequence[str]) -> dict:
    """Starlette's exception handlers, which speak in OpenAI's words.

    paths: those that the server has.
    """

    def answer_problem(request, error: HTTPException):
        told = {
            404: f"unknown path; this server has {', '.join(paths)}",
            405: "this path has other methods: see Allow",
        }
        refusal = Refusal(error.status_code, told.get(error.status_code, error.detail))
        refusal.headers |= error.headers or {}
        return refusal.response()

    return {Refusal: answer_refusal, HTTPException: answer_problem, Exception: answer_bug}


def build_app(
    routes: list[Route],
    models: Sequence[str],
    owner: str,
    key: str | None = None,
    origins: Sequence[str] = (),
) -> Starlette:
    """The ASGI application without its Front: `routes`, the list of models and /health.

    models: ids; owner: of them, by name; key: None for none; origins: pages that may ask.
    """
    began = int(time.time())

    def card(name: str) -> dict:
        return {"id": name, "object": "model", "created": began, "owned_by": owner}

    async def all_models(request):
        return JSONResponse({"object": "list", "data": [card(name) for name in models]})

    async def one_model(request):
        name = request.path_params["name"]
        check_model(name, models)
        return JSONResponse(card(name))

    async def health(request):
        return JSONResponse({"status": "ok"})

    routes = [
        *routes,
        Route(MODELS, all_models),
        Route(MODELS + "/{name:path}", one_model),
        Route(HEALTH, health),
    ]
    middleware = [Middleware(Keyed, key=key)]
    if origins:
        methods = ["GET", "POST"]
        cors = Middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=methods, allow_headers=["*"]
        )
        middleware.insert(0, cors)
    paths = [route.path for route in routes if "{" not in route.path]
    handlers = answers_to_problems(paths)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.state.paths = paths
    app.router.redirect_slashes = False
    return app


class Server(uvicorn.Server):
    """uvicorn that says when it can be asked, and whose signals end the answers under way."""

    def __init__(self, app: Front, close: Callable[[], object], ready: str):
        """close: ends the answers under way; called within a signal handler. ready: the line that
        is printed once it can be asked."""
        super().__init__(serve.config(app, app.limits))
        self.close_answers = close
        self.ready = ready

    async def startup(self, sockets=None):
        try:
            await super().startup(sockets=sockets)
        except OSError as error:  # another process was quicker
            raise SystemExit(f"cannot serve: {error.strerror}; choose another --port") from None
        print(self.ready, flush=True)

    def handle_exit(self, sig, frame):
        self.close_answers()
        super().handle_exit(sig, frame)


def run(
    app: Starlette,
    sock: socket.socket,
    args: argparse.Namespace,
    models: Collection[str],
    close: Callable[[], object],
) -> None:
    """Serve until a signal. args: of add_arguments; close: see Server."""
    host, port = sock.getsockname()[:2]
    if not args.api_key and host not in ("127.0.0.1", "::1"):
        print("warning: no --api_key: whoever reaches this port can use the model", flush=True)
    place = f"[{host}]" if ":" in host else host
    url = f"http://{place}:{port}/v1"
    ready = f"serving {', '.join(models)} on {device.name()}: {url}  (Ctrl-C ends)"
    front = Front(app, serve.own_names(args.host), args.allow_origin)
    server = Server(front, close, ready)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)  # uvicorn raises them once more after a clean end
    server.run(sockets=[sock])
    # a second Ctrl-C does not wait for the token under way
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet; SystemExit with one line when the port is taken.

    Bound before the model loads, which takes longer than to find the port taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        told = f"cannot serve on {host}:{port}: {error.strerror}"
        raise SystemExit(f"{told}; choose another --port or --host") from None
    return sock


def model_ids(model: str, name: str | None, adapter: bool) -> dict[str, bool]:
    """id -> whether the adapter is on: the name, else the folder's (a run's, for its final/), and
    `base`."""
    folder = Path(model).resolve()
    if folder.name == "final":
        folder = folder.parent
    if not name:
        name = folder.name if Path(model).is_dir() else model
    ids = {name: True}
    if adapter:
        if name == BASE:
            told = f"the model id {BASE} means the model without its adapter"
            raise SystemExit(f"{told}; choose another --name")
        ids[BASE] = False
    return ids


def add_arguments(
    parser: argparse.ArgumentParser, default_model: str | Path, port: int = 8000
) -> None:
    """The flags of every such server."""
    add = parser.add_argument
    default = os.environ.get("MODEL", default_model)
    add("--model", default=default, help="folder of a run, model or adapter")
    add("--name", help="model id; default: the folder's name")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines ask it")
    add("--port", type=int, default=port, help="0: any free one")
    add("--api_key", help="default: DANPU_API_KEY, which no list of processes shows")
    add("--allow_origin", nargs="+", default=[], help="web pages that may ask: https://my.site, *")
    add("--max_waiting", type=int, default=16, help="requests that wait for those being answered")
    add("--max_new_tokens", type=int, default=2048, help="for requests without max_tokens")
    unsaid = "for requests without; default: the model's own, else 1"
    add("--temperature", type=float, help=unsaid)
    add("--top_p", type=float, help=unsaid)


def check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit code 2 for a value that makes no sense; the key is taken from the environment where no
    flag gives it."""
    if args.api_key is not None and not args.api_key.strip():
        parser.error("--api_key is empty")  # an unset variable must not open the server
    args.api_key = (args.api_key or os.environ.get("DANPU_API_KEY", "")).strip() or None
    if args.api_key and not args.api_key.isascii():
        told = "has other characters than ASCII, which clients cannot send"
        parser.error(f"--api_key (DANPU_API_KEY) {told}")
    if not 0 <= (args.temperature or 0) <= 2 or not 0 <= (args.top_p or 0) <= 1:
        parser.error("--temperature is from 0 to 2, --top_p from 0 to 1")
    if not 0 <= args.port < 1 << 16:
        parser.error("--port is from 0 to 65535")
    if args.max_waiting < 0 or args.max_new_tokens < 1:
        parser.error("--max_waiting is at least 0, --max_new_tokens at least 1")


def sampling_of(args: argparse.Namespace, own: dict) -> dict:
    """Sampling of requests that do not name it: the flags, else the model's `own`."""
    given = {name: getattr(args, name) for name in ("temperature", "top_p")}
    return own | {name: value for name, value in given.items() if value is not None}
