"""Serve a Gradio page: no foreign hosts or pages, no large bodies, nothing loaded from outside."""

from __future__ import annotations

from urllib.parse import urlsplit

MAX_BODY = 1 << 18  # bytes of one request; a page that takes files passes its own bound
# even if a model writes ![](http://...)
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
FOREIGN_HOST = (421, b"this host name is not served here")
FOREIGN_PAGE = (403, b"requests of other pages are refused")
TOO_LARGE = (413, b"too large, or of unknown length")
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


class Guard:
    """ASGI middleware around an app that answers any Host (DNS rebinding) and any Origin (another
    web page), as Gradio does."""

    def __init__(self, app, hosts: set[str], max_body: int):
        """hosts: names that may stand in the address, none for all; max_body: bytes."""
        self.app = app
        self.hosts = {name.encode() for name in hosts}
        self.max_body = max_body

    def stranger(self, headers: dict[bytes, bytes]) -> tuple[int, bytes] | None:
        """(status, text) for a foreign host name or a request of another page, else None."""
        host = headers.get(b"host", b"")
        origin = headers.get(b"origin")
        try:
            name = urlsplit(b"//" + host).hostname
            page = host if origin is None else urlsplit(origin).netloc
        except ValueError:  # brackets that are no IPv6 address
            return FOREIGN_HOST
        if self.hosts and name not in self.hosts:
            return FOREIGN_HOST
        if page != host:
            return FOREIGN_PAGE
        return None

    def refusal(self, method: str, headers: dict[bytes, bytes]) -> tuple[int, bytes] | None:
        """(status, text) for a request that is not meant for this page, else None."""
        refused = self.stranger(headers)
        if refused:
            return refused
        length = headers.get(b"content-length", b"")
        if method == "POST" and not (length.isdigit() and int(length) <= self.max_body):
            return TOO_LARGE
        return None

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        refused = None
        if scope["type"] == "http":
            refused = self.refusal(scope["method"], dict(scope["headers"]))
        if refused is None:
            return await self.app(scope, receive, send_with_policy)
        status, text = refused
        plain = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": status, "headers": plain})
        await send({"type": "http.response.body", "body": text})


def own_names(host: str) -> set[str]:
    """Names that may stand in the address of a server bound to `host`; none: any."""
    if host in ("0.0.0.0", "::"):
        return set()
    return {host.lower(), "127.0.0.1", "localhost"}


def serve(
    demo, host: str = "127.0.0.1", port: int | None = None, max_body: int = MAX_BODY, **launch
) -> str:
    """Start a gr.Blocks in the background and return its address; `demo.close()` ends it.

    port: default the first free one from 7860. launch: more arguments of gr.Blocks.launch (theme,
    css, ...). SystemExit when the port is taken.
    """
    from starlette.middleware import Middleware

    guard = Middleware(Guard, hosts=own_names(host), max_body=max_body)
    settings = LAUNCH | {
        "server_name": host,
        "server_port": port,
        "max_file_size": max_body,
        "app_kwargs": {"middleware": [guard]} | NO_API_PAGES,
    }
    try:
        _, url, _ = demo.launch(**settings | launch)
    except OSError as error:
        place = f"{host}:{port or '7860-7959'}"
        raise SystemExit(f"cannot serve on {place}: {error}; choose another --port") from None
    return url
