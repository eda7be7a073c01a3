"""Serve a Gradio page: no foreign hosts or pages, no large bodies, nothing loaded from
elsewhere."""

from __future__ import annotations

from urllib.parse import urlsplit

MAX_BODY = 1 << 18  # bytes of one request; a page that takes files passes its own bound
# even if a model writes ![](http://...)
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


class Guard:
    """ASGI middleware around Gradio, which answers any Host (DNS rebinding) and any Origin (another
    web page)."""

    def __init__(self, app, hosts: set[str], max_body: int):
        """hosts: names that may stand in the address, none for all; max_body: bytes."""
        self.app, self.hosts, self.max_body = app, hosts, max_body

    def stranger(self, headers: dict[bytes, bytes]) -> tuple[int, bytes] | None:
        """(status, text) for a foreign host name or a request of another page, else None."""
        host, origin = headers.get(b"host", b""), headers.get(b"origin")
        try:
            name, page = (
                urlsplit(b"//" + host).hostname,
                None if origin is None else urlsplit(origin).netloc,
            )
        except ValueError:  # brackets that are no IPv6 address
            return 421, b"this host name is not served here"
        if self.hosts and name not in {name.encode() for name in self.hosts}:
            return 421, b"this host name is not served here"
        if origin is not None and page != host:
            return 403, b"requests of other pages are refused"
        return None

    def refusal(self, method: str, headers: dict[bytes, bytes]) -> tuple[int, bytes] | None:
        """(status, text) for a request that is not meant for this page, else None."""
        if refused := self.stranger(headers):
            return refused
        length = headers.get(b"content-length", b"")
        if method == "POST" and not (length.isdigit() and int(length) <= self.max_body):
            return 413, b"too large, or of unknown length"
        return None

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        refused = (
            self.refusal(scope["method"], dict(scope["headers"]))
            if scope["type"] == "http"
            else None
        )
        if refused is None:
            return await self.app(scope, receive, with_policy)
        plain = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": refused[0], "headers": plain})
        await send({"type": "http.response.body", "body": refused[1]})


def own_names(host: str) -> set[str]:
    """Names that may stand in the address of a server bound to `host`; none: any."""
    return set() if host in ("0.0.0.0", "::") else {host.lower(), "127.0.0.1", "localhost"}


def serve(
    demo, host: str = "127.0.0.1", port: int | None = None, max_body: int = MAX_BODY, **launch
) -> str:
    """Start a gr.Blocks in the background and return its address; `demo.close()` ends it.

    port: default the first free one from 7860. launch: more arguments of gr.Blocks.launch (theme,
    css, ...). SystemExit when the port is taken.
    """
    from starlette.middleware import Middleware

    guard = Middleware(Guard, hosts=own_names(host), max_body=max_body)
    settings = {
        "share": False,
        "quiet": True,
        "show_error": True,
        "inbrowser": False,
        "footer_links": [],
    }
    settings |= {
        "pwa": False,
        "ssr_mode": False,
        "mcp_server": False,
        "max_file_size": max_body,
        "allowed_paths": [],
    }
    settings |= {
        "app_kwargs": {
            "middleware": [guard],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        }
    }
    try:
        _, url, _ = demo.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, **settings | launch
        )
    except OSError as error:
        raise SystemExit(
            f"cannot serve on {host}:{port or '7860-7959'}: {error}; choose another --port"
        ) from None
    return url
