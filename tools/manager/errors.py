"""What a request cannot have, in one shape: {"error": {"message", "param"}}."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from common.demo import serve

WORDS = {
    400: "the request cannot be read",
    404: "nothing is there",
    405: "this path has other methods: see Allow",
}


class Problem(Exception):
    """A request that is refused; `message` says why and what helps.

    param: the field, flag or query that it is about.
    """

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> JSONResponse:
        body = {"error": {"message": self.message, "param": self.param}}
        return JSONResponse(body, self.status, self.headers)


def misfit(error: RequestValidationError) -> Problem:
    """What the first field that does not fit is, without what was in it."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    param = ".".join(where)[:200] or None
    told = first["msg"] if param is None else f"{param}: {first['msg']}"
    return Problem(400, told[:500], param)


def add_handlers(app: FastAPI) -> None:
    """Every answer to a mistake has the one shape."""

    @app.exception_handler(Problem)
    async def refuse(request: Request, error: Problem):
        return error.response()

    @app.exception_handler(serve.Refused)
    async def refuse_body(request: Request, error: serve.Refused):
        return Problem(error.status, error.text, **error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def refuse_misfit(request: Request, error: RequestValidationError):
        return misfit(error).response()

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException):
        told = WORDS.get(error.status_code, "this cannot be done")
        found = Problem(error.status_code, told)
        found.headers = dict(error.headers or {})
        return found.response()

    @app.exception_handler(Exception)
    async def tell_bug(request: Request, error: Exception):
        return Problem(500, "internal error; the manager's terminal says more").response()
