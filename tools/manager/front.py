"""What stands in front of the manager: the guard of every server here, the token, and a policy that
lets a page load nothing from outside."""

from __future__ import annotations

import asyncio
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from pydantic_core import from_json
from starlette.responses import JSONResponse, RedirectResponse

from common.demo import serve
from tools.manager.errors import Problem

COOKIE = "danpu_token"
UPLOAD = "/api/datasets/upload"
POLICY = b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
LIMITS = serve.Limits(body=1 << 20)


class Front(serve.Guard):
    """ASGI middleware in front of the app. An upload is not held in memory: the app reads it piece
    by piece, within the same limits of time."""

    def __init__(
        self,
        app,
        hosts: set[str],
        token: str | None = None,
        max_upload: int = 200 << 20,
        limits: serve.Limits = LIMITS,
    ):
        """hosts: names that may stand in the address, none for all; max_upload: bytes."""
        super().__init__(app, hosts, limits)
        self.token = token
        self.max_upload = max_upload

    def check(self, scope, headers: dict[bytes, bytes]) -> None:
        super().check(scope, headers)
        is_open = not scope["path"].startswith("/api/")  # the page itself says nothing
        if self.token and not is_open and not self.knows(headers):
            told = "a token is needed: open the address that the manager has printed"
            raise serve.Refused(401, told, www_authenticate="Bearer")

    def knows(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and self.equals(given.strip()):
            return True
        try:
            cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return False
        return COOKIE in cookies and self.equals(cookies[COOKIE].value.encode("utf-8", "replace"))

    def equals(self, given: bytes) -> bool:
        return hmac.compare_digest(given, self.token.encode())

    def check_body(self, headers: dict[bytes, bytes], body: bytes) -> None:
        """JSON without NaN and half characters, which an answer could not repeat."""
        if not body:
            return
        try:
            from_json(body, allow_inf_nan=False)
        except ValueError:
            raise serve.Refused(400, "the body is not valid JSON in UTF-8") from None

    def more_headers(self, status: int) -> list[tuple[bytes, bytes]]:
        return [*super().more_headers(status), *HEADERS]

    def response(self, refused: serve.Refused) -> JSONResponse:
        return Problem(refused.status, refused.text, **refused.headers).response()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        if self.token and scope["path"] == "/" and self.asks_for_cookie(scope):
            return await self.give_cookie()(scope, receive, send)
        if scope["path"] != UPLOAD or scope["method"] != "POST":
            return await super().__call__(scope, receive, send)
        headers = dict(scope["headers"])
        bare = dict(scope)  # for the guard a request without a body
        bare["headers"] = [
            (name, value)
            for name, value in scope["headers"]
            if name not in (b"content-length", b"transfer-encoding")
        ]
        length = int(headers.get(b"content-length", b"0"))
        counted = self.counted(receive, length)
        await super().__call__(bare, counted, send)

    def asks_for_cookie(self, scope) -> bool:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
        return self.equals(given[0].encode("utf-8", "replace"))

    def give_cookie(self) -> RedirectResponse:
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
        return answer

    def counted(self, receive, length: int):
        """`receive` of an upload; Refused 413 beyond the limit, 408 where nothing comes."""
        most = self.max_upload + (1 << 16)  # and the words around the file
        size = 0

        async def piece():
            try:
                return await asyncio.wait_for(receive(), self.limits.body_seconds)
            except asyncio.TimeoutError:
                raise serve.Refused(408, "the upload stands still", connection="close") from None

        async def receiving():
            nonlocal size
            message = await piece()
            size += len(message.get("body", b""))
            if size <= most and length <= most:
                return message
            dropped = 0  # read, so that its client sees the answer
            while message.get("more_body") and dropped < serve.DRAINED:
                message = await piece()
                dropped += len(message.get("body", b""))
            raise self.too_large()

        return receiving

    def too_large(self) -> serve.Refused:
        told = f"a file may have {self.max_upload >> 20} MiB (--max_upload_mb)"
        return serve.Refused(413, told, connection="close")
