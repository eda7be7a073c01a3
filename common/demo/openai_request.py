"""The body of a request for an answer: what of OpenAI's form is read, and refused by name."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from starlette.responses import JSONResponse

from common.demo.openai_fields import HARMLESS, IN_A_MESSAGE, INSTEAD, NO_VARIABLES, ONLY

PLAIN = re.compile(r"\w{1,40}", re.ASCII)  # names of fields; anything else is the client's text
COLDEST = 0.01  # temperatures below it are greedy: logits divided by less overflow


class Refusal(Exception):
    """An error for the client, in OpenAI's words."""

    KINDS = {401: "authentication_error", 429: "rate_limit_error"}

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ):
        """headers: of the answer, with _ for -."""
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        kind = self.KINDS.get(status, "invalid_request_error")
        if status >= 500:
            kind = "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def text_of(content):
    """A string, or the text of a list of text parts."""
    if not isinstance(content, list):
        return content
    if not all(is_text_part(part) for part in content):
        raise ValueError('only parts like {"type": "text", "text": "..."} are supported')
    return "".join(part["text"] for part in content)


def is_text_part(part) -> bool:
    if not isinstance(part, dict) or part.get("type") != "text":
        return False
    return isinstance(part.get("text"), str)


def role_of(role):
    return "system" if role == "developer" else role


def listed(stop):
    return [stop] if isinstance(stop, str) else stop or []


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(role_of)]
    content: Annotated[str, BeforeValidator(text_of)]
    reasoning_content: str | None = None

    def for_template(self) -> dict:
        said = {"role": self.role, "content": self.content}
        if self.reasoning_content:
            said["reasoning_content"] = self.reasoning_content
        return said


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


StopString = Annotated[str, Field(min_length=1)]


class Sampled(BaseModel):
    """What every request for an answer may say; fields that are neither here nor in ONLY are
    ignored, and named in the log."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopString], BeforeValidator(listed)] = Field([], max_length=4)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def ignored(self) -> list[str]:
        """Names of the fields that nobody here knows."""
        unknown = self.model_extra.keys() - ONLY.keys() - set(HARMLESS)
        return sorted(name for name in unknown if self.model_extra[name] is not None)

    def sampling(self, defaults: dict) -> dict:
        """The arguments of generation: what the request says, else `defaults`."""
        said = {name: getattr(self, name) for name in defaults}
        chosen = defaults | {name: value for name, value in said.items() if value is not None}
        if chosen["temperature"] < COLDEST:
            chosen["temperature"] = 0.0
        if chosen.get("top_p") == 0:  # the likeliest token alone
            chosen |= {"temperature": 0.0, "top_p": 1.0}
        return chosen


class Ask(Sampled):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, JsonValue] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def ignored(self) -> list[str]:
        named = {"name"} if any(one.model_extra.get("name") for one in self.messages) else set()
        return sorted(named.union(super().ignored))


def parse(body: bytes, kind: type[Sampled] = Ask) -> Sampled:
    """The body of a request, a `kind`; Refusal 400 names every bad field."""
    try:
        ask = kind.model_validate_json(body)
    except ValidationError as error:
        raise refusal_of(error) from None
    check_neutral(ask.model_extra, ONLY)
    for number, message in enumerate(getattr(ask, "messages", ())):
        check_neutral(message.model_extra, IN_A_MESSAGE, f"messages[{number}].")
    if ask.wants_usage and not ask.stream:
        told = "stream_options: only allowed when stream is true"
        raise Refusal(400, told, "stream_options", "invalid_value")
    return ask


def check_neutral(given: dict, only: dict[str, tuple], where: str = "") -> None:
    """Refusal 400 for the first field with a value that would change the answer."""
    for name, neutral in only.items():
        value = given.get(name)
        if value is None or value in neutral:
            continue
        can = " or ".join(json.dumps(one) for one in neutral)
        told = f"only {can} is supported here" if neutral else "not supported here"
        if name in INSTEAD:
            told += f"; {INSTEAD[name]}"
        raise Refusal(400, f"{where}{name}: {told}", where + name, "unsupported_value")


def refusal_of(error: ValidationError) -> Refusal:
    """All fields that are wrong (at most 8), in one message."""
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return Refusal(400, f"the body is not valid JSON in UTF-8: {errors[0]['msg']}")
    fields = [where(e["loc"]) for e in errors]
    reasons = [e["msg"].removeprefix("Value error, ") for e in errors]
    told = [f"{field or 'body'}: {why}" for field, why in zip(fields, reasons, strict=True)]
    return Refusal(400, "; ".join(told[:8]), fields[0] or None, "invalid_value")


def where(loc: tuple) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in loc)
    return path.lstrip(".")


def shown(name: str) -> str:
    return name if PLAIN.fullmatch(name) else "?"


def check_template(template: str, messages: list[dict], variables: dict) -> None:
    """Refusal 400 for what the template would leave out: thoughts, and variables that it does not
    have (null and false say no more than their absence)."""
    for number, message in enumerate(messages):
        if "reasoning_content" in message and "reasoning_content" not in template:
            where = f"messages[{number}].reasoning_content"
            told = f"{where}: this model's chat template has no place for it"
            raise Refusal(400, told, where, "unsupported_value")
    for name, value in variables.items():
        where = f"chat_template_kwargs.{shown(name)}"
        if name in NO_VARIABLES:
            raise Refusal(400, f"{where}: the server sets it", where, "unsupported_value")
        knows = re.search(rf"\b{re.escape(name)}\b", template)
        if value not in (None, False) and not knows:
            told = f"{where}: this model's chat template does not know it"
            raise Refusal(400, told, where, "unsupported_value")
