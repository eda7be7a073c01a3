"""What stands in front of every server here: bounds on what one client may take, no foreign hosts
or pages; and a Gradio page behind it, which loads nothing from outside.

Guard looks at requests (ASGI), Connection at sockets (uvicorn): neither a slow body or head nor an
idle, unread or crowded connection keeps others waiting for longer than Limits says.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial, wraps
from http import HTTPStatus
from urllib.parse import urlsplit

import uvicorn
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

# even if a model writes ![](http://...)
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
FOREIGN_HOST = "this host name is not served here"
FOREIGN_PAGE = "requests of other pages are refused"
RETRY_SECONDS = 5  # when a client that found no place may come again
DRAINED = 1 << 26  # bytes of a body that is too large, read so that its client sees the answer
JSON = b"application/json"
API = "/gradio_api/"
# what a page posts; the last is for events without a queue
EVENTS = tuple(API + name for name in ("queue/join", "cancel", "reset", "run/predict"))
UPLOAD = API + "upload"
NO_API_PAGES = {"docs_url": None, "redoc_url": None, "openapi_url": None}
LAUNCH = {  # arguments of gr.Blocks.launch
    "prevent_thread_lock": True,
    "share": False,
    "quiet": True,
    "show_error": True,
    "inbrowser": False,
    "footer_links": [],
    "pwa": False,
    "ssr_mode": False,
    "mcp_server": False,
    "allowed_paths": [],
}


@dataclass(frozen=True)
class Limits:
    """What clients may take of a server.

    Attributes:
        body: bytes of one request.
        bodies: requests whose body is still coming; the next one is refused.
        body_seconds: until a body is here.
        idle_seconds: from the opening of a connection, or the end of an answer, to the next whole
            head of a request.
        unread_seconds: how long an answer may wait for its reader.
        connections: open at once; one more closes the one that is idle for the longest time.
    """

    body: int = 1 << 18
    bodies: int = 64
    body_seconds: float = 30
    idle_seconds: float = 75
    unread_seconds: float = 60
    connections: int = 512


LIMITS = Limits()


class Refused(Exception):
    """A request that goes no further; `text` says why without a word of it."""

    def __init__(self, status: int, text: str, **headers: str):
        self.status = status
        self.text = text
        self.headers = headers


class Left(Exception):
    """The client has gone."""


class Guard:
    """ASGI middleware: bodies within the limits, whole before the app sees them, of clients that
    asked for this server (DNS rebinding) from its own page (another one in the same browser)."""

    def __init__(self, app, hosts: set[str], limits: Limits = LIMITS):
        """hosts: names that may stand in the address, none for all."""
        self.app = app
        self.hosts = {name.encode() for name in hosts}
        self.limits = limits
        self.bodies = 0

    def refuse_strangers(self, headers: dict[bytes, bytes]) -> None:
        """Refused 421 for a foreign host name, 403 for a request of another page."""
        host = headers.get(b"host", b"")
        origin = headers.get(b"origin")
        try:
            name = urlsplit(b"//" + host).hostname
            page = host if origin is None else urlsplit(origin).netloc
        except ValueError:  # brackets that are no IPv6 address
            raise Refused(421, FOREIGN_HOST) from None
        if self.hosts and name not in self.hosts:
            raise Refused(421, FOREIGN_HOST)
        if page != host:
            raise Refused(403, FOREIGN_PAGE)

    def check(self, scope, headers: dict[bytes, bytes]) -> None:
        """Refused for what no body could make right."""
        self.refuse_strangers(headers)

    def check_body(self, headers: dict[bytes, bytes], body: bytes) -> None:
        """Refused for a body that no app behind this one could take."""

    async def whole_body(self, length: int, receive) -> bytes:
        """The body; Refused 503, 408 or 413 where it is one too many, too slow or too large.

        length: what the client says, 0 when it does not; believed only when it is absurd.
        """
        if length > DRAINED:
            raise too_large(self.limits.body)
        if self.bodies >= self.limits.bodies:
            raise Refused(503, "too many requests at once; try again later")
        self.bodies += 1
        seconds = self.limits.body_seconds
        try:
            return await asyncio.wait_for(read_body(receive, self.limits.body), seconds)
        except asyncio.TimeoutError:
            told = f"the body took more than {seconds:g} s"
            raise Refused(408, told, connection="close") from None
        finally:
            self.bodies -= 1

    def more_headers(self, status: int) -> list[tuple[bytes, bytes]]:
        """What every answer of this status carries beside the app's headers."""
        return [(b"retry-after", b"%d" % RETRY_SECONDS)] if status == 503 else []

    def response(self, refused: Refused) -> JSONResponse:
        return JSONResponse({"detail": refused.text}, refused.status, refused.headers)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        app = self.app
        try:
            self.check(scope, headers)
            length = int(headers.get(b"content-length", b"0"))
            if length or b"transfer-encoding" in headers:
                body = await self.whole_body(length, receive)
                self.check_body(headers, body)
                receive = replay(body, receive)
        except Refused as refused:
            app = self.response(refused)
        except Left:
            return

        async def send_more(message):
            if message["type"] == "http.response.start":
                more = self.more_headers(message["status"])
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        await app(scope, receive, send_more)


async def read_body(receive, most: int) -> bytes:
    """The body, also a chunked one, counted and not believed; Refused 413 when it is too large."""
    body = bytearray()
    size = 0
    more = True
    while more and size <= DRAINED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Left
        size += len(message["body"])
        more = message["more_body"]
        if size <= most:
            body += message["body"]
    if size > most:
        raise too_large(most)
    return bytes(body)


def too_large(most: int) -> Refused:
    return Refused(413, f"the body is larger than {most} bytes", connection="close")


def replay(body: bytes, receive: Callable[[], Awaitable]) -> Callable[[], Awaitable]:
    """`receive` that gives the body, in one piece, before what comes after it."""
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving():
        return given.pop() if given else await receive()

    return receiving


# ---- connections -------------------------------------------------------------------------------


class Connection(H11Protocol):
    """uvicorn's connection, which nobody holds open without asking or without reading.

    uvicorn's own limit_concurrency counts idle connections as work, and its keep-alive time begins
    anew with every byte.
    """

    def __init__(self, *args, limits: Limits, **kwargs):
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.idle: asyncio.TimerHandle | None = None  # while no request is being answered
        self.unread: asyncio.TimerHandle | None = None  # while more is written than read

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.wait_for_a_request()
        if len(self.connections) > self.limits.connections:
            idle = [one for one in self.connections if one.idle]
            min(idle, key=lambda one: one.idle.when()).give_up()

    def wait_for_a_request(self) -> None:
        self.idle = self.loop.call_later(self.limits.idle_seconds, self.give_up)

    def give_up(self) -> None:
        self.stop_waiting()
        self.transport.abort()

    def stop_waiting(self) -> None:
        for timer in (self.idle, self.unread):
            if timer:
                timer.cancel()
        self.idle = None
        self.unread = None

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self.idle:  # a request has begun
            self.idle.cancel()
            self.idle = None

    def on_response_complete(self) -> None:
        self.wait_for_a_request()  # first: one that came in the same packet begins at once
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(self.limits.unread_seconds, self.give_up)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.unread:
            self.unread.cancel()
            self.unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        super().connection_lost(exc)


def config(app, limits: Limits) -> uvicorn.Config:
    """uvicorn's settings for an app behind a Guard."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=partial(Connection, limits=limits),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=10,
    )


def own_names(host: str) -> set[str]:
    """Names that may stand in the address of a server bound to `host`; none: any."""
    if host in ("0.0.0.0", "::"):
        return set()
    return {host.lower(), "127.0.0.1", "localhost"}


# ---- Gradio's pages ----------------------------------------------------------------------------


class PageGuard(Guard):
    """In front of Gradio, which answers any Host and any Origin, takes files that no page asked
    for, and fails at JSON that is none (NaN, half characters)."""

    def __init__(self, app, hosts: set[str], limits: Limits = LIMITS, uploads: bool = False):
        """uploads: the page has a component that takes files."""
        super().__init__(app, hosts, limits)
        self.posted = (*EVENTS, UPLOAD) if uploads else EVENTS

    def check(self, scope, headers: dict[bytes, bytes]) -> None:
        super().check(scope, headers)
        reads = scope["method"] in ("GET", "HEAD", "OPTIONS")
        if not reads and scope["path"] not in self.posted:
            raise Refused(404, "this page has nothing there")

    def check_body(self, headers: dict[bytes, bytes], body: bytes) -> None:
        if headers.get(b"content-type", b"").startswith(JSON):
            try:
                from_json(body, allow_inf_nan=False)
            except ValueError:
                raise Refused(400, "the body is not valid JSON in UTF-8") from None

    def more_headers(self, status: int) -> list[tuple[bytes, bytes]]:
        return [*super().more_headers(status), (b"content-security-policy", POLICY)]


def answer_problem(request, error: HTTPException) -> JSONResponse:
    """What Gradio refuses, which it does in the words of the request; the page shows a full queue's
    detail."""
    detail = error.detail if error.status_code == 503 else HTTPStatus(error.status_code).phrase
    return JSONResponse({"detail": detail}, error.status_code)


def answer_misfit(request, error: Exception) -> JSONResponse:
    """A body of other types than Gradio's, or an event that the page does not have."""
    return JSONResponse({"detail": "this is no request of the page"}, 422)


def surviving(handler):
    """A page's handler whose SystemExit (a model that cannot be opened ...) is told on the page: in
    a handler it would end the server."""
    import gradio as gr

    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def guarded(*args, **kwargs):
            try:
                yield from handler(*args, **kwargs)
            except SystemExit as error:
                raise gr.Error(str(error), print_exception=False) from None

    else:

        @wraps(handler)
        def guarded(*args, **kwargs):
            try:
                return handler(*args, **kwargs)
            except SystemExit as error:
                raise gr.Error(str(error), print_exception=False) from None

    return guarded


def serve(
    demo,
    host: str = "127.0.0.1",
    port: int | None = None,
    limits: Limits = LIMITS,
    uploads: bool = False,
    **launch,
) -> str:
    """Start a gr.Blocks in the background and return its address; `demo.close()` ends it.

    port: default the first free one from 7860. limits.body and uploads: for a page that takes
    files. launch: more arguments of gr.Blocks.launch (theme, css, ...). SystemExit when the port is
    taken.
    """
    from fastapi.exceptions import RequestValidationError

    @asynccontextmanager
    async def guarded(app):  # before a socket is open, and in front of Gradio's own CORS headers
        app.middleware_stack = PageGuard(app.middleware_stack, own_names(host), limits, uploads)
        yield

    for event in demo.fns.values():
        if event.fn:
            event.fn = surviving(event.fn)
    demo.api_open = False  # or run/predict takes events of the queue past it
    problems = {HTTPException: answer_problem}
    problems |= dict.fromkeys((RequestValidationError, KeyError), answer_misfit)
    settings = LAUNCH | {
        "server_name": host,
        "server_port": port,
        "max_file_size": limits.body,
        "app_kwargs": NO_API_PAGES | {"exception_handlers": problems, "lifespan": guarded},
    }
    try:
        _, url, _ = demo.launch(**settings | launch)
    except OSError as error:
        place = f"{host}:{port or '7860-7959'}"
        raise SystemExit(f"cannot serve on {place}: {error}; choose another --port") from None
    settings_of_uvicorn = demo.server.config
    settings_of_uvicorn.http_protocol_class = partial(Connection, limits=limits)
    settings_of_uvicorn.ws_protocol_class = None
    settings_of_uvicorn.timeout_keep_alive = limits.idle_seconds
    return url
