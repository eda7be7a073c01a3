r"""OpenAI-compatible server for a trained model: a run's output folder, a model folder, a LoRA
adapter or a hub id.

    python chatglm_lora/api.py                          # what `bash chatglm_lora/train_zero2.sh` left in output/
    python chatglm_lora/api.py --model output/my_run --port 8000 --temperature 0.95 --top_p 0.7
    DANPU_API_KEY=... python chatglm_lora/api.py --host 0.0.0.0    # other machines too, with a key

    curl http://127.0.0.1:8000/v1/chat/completions \ -d '{"model": "chatglm_lora", "messages":
        [{"role": "user", "content": "你是谁？"}], "temperature": 0}'
    openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any").chat.completions.create(...,
    stream=True)

Model ids: the folder's name; where it is an adapter, `base` is the model without it. Prompts are
built from the chat template saved with the model, by the code that built the training rows
(common/data/labels.py). One answer at a time, the others wait in the order they came. What is not
supported is refused in OpenAI's error object, nothing is cut silently. Beside OpenAI's parameters:
top_k, repetition_penalty.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from common import cli, device  # noqa: I001  (device before torch and transformers)
from common.demo import serve
from common.demo.chat_model import ChatModel
from common.data.labels import encode_prompt

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import signal
import socket
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Literal

import torch
import uvicorn
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Route

import modeling_chatglm  # noqa: F401  (registers ChatGLM)

DEFAULT = HERE.parent / "output" / HERE.name
MAX_BODY = 1 << 20  # bytes
BODY_SECONDS, READ_SECONDS = (
    30,
    60,
)  # a body that takes longer, and an answer that is not read so long, is given up
PATHS = ("/v1/chat/completions", "/v1/models", "/health")
BASE = "base"  # the model id without the adapter
COLDEST = 0.01  # temperatures below it are greedy: logits divided by less overflow
# fields that would change the answer, with the only value that this server can do (or null)
ONLY = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "logprobs": False,
    "logit_bias": {},
    "modalities": ["text"],
    "tools": [],
    "functions": [],
}
MAX_HELD = 64  # tokens that wait for the last bytes of a character; after so many it is broken
NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
}  # as OpenAI's when nobody says


class Refusal(Exception):
    """An error for the client, in OpenAI's words."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ):
        self.status, self.headers = (
            status,
            {name.replace("_", "-"): value for name, value in headers.items()},
        )
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class Left(Exception):
    """The client has gone."""


# ---- the request ---------------------------------------------------------------------------------------------


def text_of(content):
    """A string, or the text of a list of text parts."""
    if not isinstance(content, list):
        return content
    if not all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
        for p in content
    ):
        raise ValueError('only parts like {"type": "text", "text": "..."} are supported')
    return "".join(part["text"] for part in content)


def role_of(role):
    return "system" if role == "developer" else role


def listed(stop):
    return [stop] if isinstance(stop, str) else stop or []


class Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(role_of)]
    content: Annotated[str, BeforeValidator(text_of)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class Ask(BaseModel):
    """Body of POST /v1/chat/completions; other fields than these and ONLY are ignored."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(listed)] = Field(
        [], max_length=4
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def sampling(self, defaults: dict) -> dict:
        """The arguments of generation: what the request says, else `defaults`."""
        said = {name: getattr(self, name) for name in defaults if getattr(self, name) is not None}
        chosen = defaults | said
        return chosen | {
            "temperature": chosen["temperature"] if chosen["temperature"] >= COLDEST else 0.0
        }


def parse(body: bytes) -> Ask:
    """The body of a request; Refusal 400 names every bad field."""
    try:
        ask = Ask.model_validate_json(body)
    except ValidationError as error:
        found = [
            (where(e["loc"]), e["msg"].removeprefix("Value error, "), e["type"])
            for e in error.errors()
        ]
        if found[0][2] == "json_invalid":
            raise Refusal(400, f"the body is not valid JSON in UTF-8: {found[0][1]}") from None
        told = "; ".join(f"{field or 'body'}: {message}" for field, message, _ in found[:8])
        raise Refusal(400, told, found[0][0] or None, "invalid_value") from None
    for name, only in ONLY.items():
        if ask.model_extra.get(name) not in (None, only):
            raise Refusal(
                400, f"{name}: only {json.dumps(only)} is supported here", name, "unsupported_value"
            )
    if ask.stream_options is not None and not ask.stream:
        raise Refusal(
            400,
            "stream_options: only allowed when stream is true",
            "stream_options",
            "invalid_value",
        )
    return ask


def where(loc: tuple) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


async def read_body(receive) -> bytes:
    """The body, also a chunked one. Of one that is too large some more is read, so that the client
    sees the answer."""
    body, size, more = bytearray(), 0, True
    while more and size <= 8 * MAX_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Left
        size, more = size + len(message["body"]), message["more_body"]
        body += message["body"] if size <= MAX_BODY else b""
    if size > MAX_BODY:
        raise Refusal(413, f"the body is larger than {MAX_BODY} bytes", connection="close")
    return bytes(body)


# ---- the answer ----------------------------------------------------------------------------------------------


class Text:
    """Growing token ids -> text in whole characters, up to the first stop string."""

    def __init__(self, tokenizer, stops: list[str]):
        self.decode = partial(tokenizer.decode, skip_special_tokens=True)
        self.stops, self.stopped = stops, False
        self.ids, self.start, self.told = (
            [],
            0,
            0,
        )  # ids[start:told] are decoded again: blanks depend on neighbours
        self.held = ""  # maybe the beginning of a stop string

    def add(self, ids: list[int], last: bool = False) -> str:
        """The text that is certain with these ids too; with `last` also what was waiting for
        more."""
        if self.stopped:
            return ""
        self.ids += ids
        old, all_ = (
            self.decode(self.ids[self.start : self.told]),
            self.decode(self.ids[self.start :]),
        )
        partial_character = len(all_) <= len(old) or all_.endswith("\ufffd")
        if partial_character and not last and len(self.ids) - self.told < MAX_HELD:
            return ""
        self.start, self.told = self.told, len(self.ids)
        text = self.held + all_[len(old) :]
        found = min((at for at in map(text.find, self.stops) if at >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            return text[:found]
        begun = (
            n
            for stop in self.stops
            for n in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:n])
        )
        cut = len(text) - (0 if last else max(begun, default=0))
        self.held = text[cut:]
        return text[:cut]


class Speaker(ChatModel):
    """A ChatModel that tells each piece of an answer at once, and why the answer ended."""

    def __init__(self, model: str | Path):
        super().__init__(model)
        if not self.tokenizer.chat_template:
            raise SystemExit(
                f"{model}: no chat template is saved with this model, so it cannot be asked in chats"
            )
        own = self.model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        self.ends = {self.tokenizer.eos_token_id, *ends}
        chosen = {
            name: getattr(own, name)
            for name in NEUTRAL
            if own.do_sample or name == "repetition_penalty"
        }
        self.defaults = NEUTRAL | {
            name: value for name, value in chosen.items() if value is not None
        }

    def answer(self, prompt, limit, tell, gone, use_adapter=True, stop=(), seed=None, **sampling):
        """Generate at most `limit` tokens after `prompt` [T]; returns ("stop" or "length" or None
        when gone, tokens).

        tell(text, tokens so far): called with each new piece. gone(): asked at each token, True
        ends the answer.
        """
        text, count, reason = Text(self.tokenizer, list(stop)), 0, None

        def heard(tokens, *_, **__):
            nonlocal count, reason
            new = tokens[0, len(prompt) + count :].tolist()
            count, ended = count + len(new), new[-1] in self.ends
            tell(text.add([] if ended else new), count)
            reason = "stop" if ended or text.stopped else reason
            return tokens.new_full((1,), reason == "stop" or gone()).bool()

        with (
            self.lock,
            contextlib.nullcontext()
            if use_adapter or not self.adapter
            else self.model.disable_adapter(),
        ):
            torch.seed() if seed is None else torch.manual_seed(seed)
            self._generate(prompt, limit, heard, **sampling)
        tell(text.add([], last=True), count)
        return "stop" if text.stopped else reason or ("length" if count >= limit else None), count


class Desk:
    """Takes one question at a time to the model; at most `max_waiting` more wait, in the order they
    came."""

    def __init__(self, speaker: Speaker, max_waiting: int):
        self.speaker, self.max_waiting = speaker, max_waiting
        self.present, self.closing, self.turn = 0, False, asyncio.Lock()
        self.reading, self.speaking = (
            ThreadPoolExecutor(1),
            ThreadPoolExecutor(1),
        )  # tokenizers take one at a time

    @contextlib.contextmanager
    def place(self):
        """A place in the queue; Refusal 429 when there is none, 503 when the server ends."""
        self.check_open()
        if self.present > self.max_waiting:
            raise Refusal(
                429, f"{self.max_waiting} requests wait already; try again later", code="queue_full"
            )
        self.present += 1
        try:
            yield
        finally:
            self.present -= 1

    def check_open(self):
        if self.closing:
            raise Refusal(503, "the server is shutting down", code="shutting_down")

    async def read(self, ask: Ask) -> list[int]:
        """The prompt's token ids; Refusal 400 when the template refuses the messages or they leave
        no room."""
        messages = [message.model_dump() for message in ask.messages]
        encode = partial(encode_prompt, self.speaker.tokenizer, messages)
        with failures():
            try:
                prompt = await asyncio.get_running_loop().run_in_executor(self.reading, encode)
            except ValueError as error:
                raise Refusal(400, str(error), "messages", "invalid_value") from None
        window, wanted = self.speaker.window, ask.limit or 1
        if len(prompt) + wanted > window:
            told = f"this model's maximum context length is {window} tokens; the messages have {len(prompt)}"
            told += (
                f" and max_tokens is {wanted}"
                if ask.limit
                else ", which leaves no room for an answer"
            )
            raise Refusal(400, told, "messages", "context_length_exceeded")
        return prompt

    async def speak(self, prompt: list[int], limit: int, **options):
        """Iterate over (text, tokens so far, None) and at last ("", tokens, finish_reason); leaving
        ends the answer."""
        loop, pieces, left = asyncio.get_running_loop(), asyncio.Queue(), []

        def tell(*piece):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        # a task of its own: whoever reads slowly does not keep the others waiting
        async def take_turn():
            async with self.turn:  # not the executor's own queue, which keeps those who have left
                self.check_open()
                with failures():
                    return await loop.run_in_executor(self.speaking, work)

        work = partial(
            self.speaker.answer, prompt, limit, tell, lambda: left or self.closing, **options
        )
        answer = asyncio.ensure_future(take_turn())
        answer.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while piece := await pieces.get():
                yield *piece, None
            reason, count = await answer
        finally:
            left.append(True)
            answer.cancel()
        if reason is None:
            self.check_open()
        yield "", count, reason or "length"


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
        raise Refusal(
            500, f"the model failed: {type(error).__name__}", code="generation_failed"
        ) from None


class Completions:
    """ASGI endpoint of POST /v1/chat/completions. `models`: id -> whether the adapter is on."""

    def __init__(self, desk: Desk, models: dict[str, bool], defaults: dict, max_new_tokens: int):
        """defaults: sampling of requests that do not name it; max_new_tokens: of those that name no
        limit."""
        self.desk, self.models, self.defaults, self.max_new_tokens = (
            desk,
            models,
            defaults,
            max_new_tokens,
        )

    async def __call__(self, scope, receive, send):
        try:
            body = await asyncio.wait_for(read_body(receive), BODY_SECONDS)
            ask = parse(body)
            known(ask.model, self.models)
            with self.desk.place():
                await unless_gone(receive, self.respond(ask, scope, receive, patient(send)))
        except asyncio.TimeoutError:
            raise Refusal(
                408, f"the body took more than {BODY_SECONDS} s", connection="close"
            ) from None
        except Left:
            scope["state"]["left"] = True

    async def respond(self, ask: Ask, scope, receive, send):
        prompt = await self.desk.read(ask)
        limit = ask.limit or min(self.max_new_tokens, self.desk.speaker.window - len(prompt))
        reply = Reply(ask, len(prompt), scope)
        options = ask.sampling(self.defaults) | {"stop": ask.stop, "seed": ask.seed}
        answer = self.desk.speak(prompt, limit, use_adapter=self.models[ask.model], **options)
        async with contextlib.aclosing(answer) as pieces:
            if ask.stream:
                await reply.stream(pieces, send)
            else:
                await JSONResponse(await reply.whole(pieces))(scope, receive, send)


class Reply:
    """One answer in OpenAI's objects."""

    def __init__(self, ask: Ask, prompt_tokens: int, scope):
        self.ask, self.state = ask, scope["state"]
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": ask.model,
        }
        self.usage(prompt_tokens, 0)

    def usage(self, prompt: int, completion: int) -> None:
        total = prompt + completion
        self.used = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": total,
        }
        self.state["tokens"] = f"{prompt}+{completion} tokens"

    async def told(self, pieces):
        async for text, count, reason in pieces:
            self.usage(self.used["prompt_tokens"], count)
            yield text, reason

    async def whole(self, pieces) -> dict:
        parts, reason = [], None
        async for text, reason in self.told(pieces):  # noqa: B007
            parts.append(text)
        message = {"role": "assistant", "content": "".join(parts), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self.head | {"object": "chat.completion", "choices": [choice], "usage": self.used}

    async def stream(self, pieces, send):
        wants = self.ask.stream_options is not None and self.ask.stream_options.include_usage

        async def chunk(choices, usage=None):
            body = self.head | {"object": "chat.completion.chunk", "choices": choices}
            await event(send, body | ({"usage": usage} if wants else {}))

        async def delta(reason=None, **said):
            await chunk([{"index": 0, "delta": said, "logprobs": None, "finish_reason": reason}])

        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        headers += [(b"x-accel-buffering", b"no")]  # nginx passes each event on
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await delta(role="assistant", content="")
            async for text, reason in self.told(pieces):
                if text:
                    await delta(content=text)
                if reason:
                    await delta(reason)
            if wants:
                await chunk([], self.used)
            await send_data(send, "[DONE]")
        except Refusal as error:  # too late for another status
            self.state["failed"] = error.status
            await event(send, error.body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def event(send, body: dict):
    lines = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}  # some clients end a line there
    await send_data(
        send, json.dumps(body, ensure_ascii=False, separators=(",", ":")).translate(lines)
    )


async def send_data(send, text: str):
    await send(
        {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}
    )


def patient(send):
    """`send` that takes a client who does not read for one who has left: his place is for
    others."""

    async def sending(message):
        task = asyncio.ensure_future(send(message))
        try:
            done, _ = await asyncio.wait(
                [task], timeout=READ_SECONDS
            )  # wait_for can lose a cancellation
        finally:
            task.cancel()
        if not done:
            raise Left
        task.result()

    return sending


async def unless_gone(receive, work):
    """Await `work`; when the client leaves first, cancel it and raise Left."""

    async def leaving():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Left
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ---- the server ----------------------------------------------------------------------------------------------


def known(model: str, models: dict) -> None:
    if model not in models:
        told = f"the model {model[:100]!r} does not exist; this server has {', '.join(models)}"
        raise Refusal(404, told, "model", "model_not_found")


class Keyed:
    """ASGI middleware: everything but /health needs the key."""

    def __init__(self, app, key: str | None):
        self.app, self.key = app, None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope, receive, send):
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.key is None or scope["path"] == "/health" or hmac.compare_digest(given, self.key):
            return await self.app(scope, receive, send)
        told = (
            "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
        )
        refusal = Refusal(401, told, code="invalid_api_key", www_authenticate="Bearer")
        await refusal.response()(scope, receive, send)


class Front(serve.Guard):
    """The guard of the pages, in OpenAI's words, and one log line for each request without anything
    of its text."""

    def __init__(self, app, hosts: set[str], origins: list[str]):
        super().__init__(app, hosts, MAX_BODY)
        self.origins = {origin.encode() for origin in origins}

    async def __call__(self, scope, receive, send):
        begun, status, app = time.perf_counter(), [], self.app

        async def noted(message):
            status.extend([message["status"]] if message["type"] == "http.response.start" else [])
            await send(message)

        headers = dict(scope["headers"])
        if b"*" in self.origins or headers.get(b"origin") in self.origins:
            headers.pop(b"origin", None)
        if refused := self.stranger(headers):
            app = Refusal(refused[0], refused[1].decode(), code="forbidden").response()
        try:
            await app(scope, receive, noted)
        finally:
            state = scope["state"]
            ended = state.get("failed") or (
                499 if state.get("left") else status[0] if status else 499
            )
            self.log(scope, ended, time.perf_counter() - begun)

    def log(self, scope, status: int, seconds: float) -> None:
        """status 499: the client left before the end."""
        path = next((path for path in PATHS if scope["path"].startswith(path)), "(unknown path)")
        facts = [time.strftime("%Y-%m-%d %H:%M:%S"), str(status), scope["method"], path]
        facts += [scope["state"].get("tokens"), f"{seconds:.2f} s"]
        with contextlib.suppress(OSError):  # whoever read the log has gone
            print(*filter(None, facts), flush=True)


def problem(request, error: HTTPException):
    told = {
        404: f"unknown path; this server has {', '.join(PATHS)}",
        405: "this path has other methods: see Allow",
    }
    refusal = Refusal(error.status_code, told.get(error.status_code, error.detail))
    refusal.headers |= error.headers or {}
    return refusal.response()


def build_app(
    desk: Desk, models: dict[str, bool], defaults: dict, max_new_tokens: int, key=None, origins=()
):
    """The ASGI application without its Front. models: id -> whether the adapter is on; key: None
    for none."""
    begun = int(time.time())

    def card(name: str) -> dict:
        return {"id": name, "object": "model", "created": begun, "owned_by": HERE.name}

    async def all_models(request):
        return JSONResponse({"object": "list", "data": [card(name) for name in models]})

    async def one_model(request):
        known(request.path_params["name"], models)
        return JSONResponse(card(request.path_params["name"]))

    async def health(request):
        return JSONResponse({"status": "ok"})

    routes = [
        Route(PATHS[0], Completions(desk, models, defaults, max_new_tokens), methods=["POST"]),
        Route(PATHS[1], all_models),
        Route(PATHS[1] + "/{name:path}", one_model),
        Route(PATHS[2], health),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    handlers = {
        Refusal: lambda request, error: error.response(),
        HTTPException: problem,
        Exception: lambda request, error: Refusal(500, "internal error").response(),
    }
    middleware = [cors] * bool(origins) + [Middleware(Keyed, key=key)]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class Server(uvicorn.Server):
    """uvicorn that says when it can be asked, and whose signals end the answers under way."""

    def __init__(self, app, desk: Desk, ready: str):
        settings = {
            "loop": "asyncio",
            "http": "h11",
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
        }
        settings |= {
            "access_log": False,
            "log_level": "warning",
            "server_header": False,
            "proxy_headers": False,
        }
        super().__init__(
            uvicorn.Config(app, timeout_keep_alive=75, timeout_graceful_shutdown=10, **settings)
        )
        self.desk, self.ready = desk, ready

    async def startup(self, sockets=None):
        try:
            await super().startup(sockets=sockets)
        except OSError as error:  # another process was quicker
            raise SystemExit(f"cannot serve: {error.strerror}; choose another --port") from None
        print(self.ready, flush=True)

    def handle_exit(self, sig, frame):
        self.desk.closing = True
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet; taken before the model loads, which takes longer than to
    find it taken."""
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise SystemExit(
            f"cannot serve on {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from None
    return sock


def model_ids(model: str, name: str | None, adapter: bool) -> dict[str, bool]:
    """id -> whether the adapter is on: the name, else the folder's (a run's, for its final/), and
    `base`."""
    folder = Path(model).resolve()
    own = folder.parent.name if folder.name == "final" else folder.name
    name = name or (own if folder.is_dir() else model)
    if adapter and name == BASE:
        raise SystemExit(
            f"the model id {BASE} means the model without its adapter; choose another --name"
        )
    return {name: True} | ({BASE: False} if adapter else {})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL", DEFAULT),
        help="folder of a run, model or adapter",
    )
    parser.add_argument("--name", help="model id; default: the folder's name")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines ask it")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument(
        "--api_key", help="default: DANPU_API_KEY, which others cannot see in the list of processes"
    )
    parser.add_argument(
        "--allow_origin",
        nargs="+",
        default=[],
        help="web pages that may ask it: https://my.site, or *",
    )
    parser.add_argument(
        "--max_waiting", type=int, default=16, help="requests that wait for the one being answered"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=2048, help="for requests without max_tokens"
    )
    parser.add_argument(
        "--temperature", type=float, help="for requests without; default: the model's own, else 1"
    )
    parser.add_argument(
        "--top_p", type=float, help="for requests without; default: the model's own, else 1"
    )
    args = parser.parse_args()
    if args.api_key is not None and not args.api_key.strip():
        parser.error("--api_key is empty")  # an unset variable must not open the server
    args.api_key = (args.api_key or os.environ.get("DANPU_API_KEY", "")).strip() or None
    if args.api_key and not args.api_key.isascii():
        parser.error(
            "--api_key (DANPU_API_KEY) has other characters than ASCII, which clients cannot send"
        )
    if not 0 <= (args.temperature or 0) <= 2 or not 0 <= (args.top_p or 0) <= 1:
        parser.error("--temperature is from 0 to 2, --top_p from 0 to 1")
    if not 0 <= args.port < 1 << 16:
        parser.error("--port is from 0 to 65535")
    if args.max_waiting < 0 or args.max_new_tokens < 1:
        parser.error("--max_waiting is at least 0, --max_new_tokens at least 1")
    return args


def main() -> None:
    args = arguments()
    sock = bind(args.host, args.port)
    speaker = Speaker(args.model)
    models, desk = (
        model_ids(str(args.model), args.name, speaker.adapter),
        Desk(speaker, args.max_waiting),
    )
    said = {
        name: getattr(args, name)
        for name in ("temperature", "top_p")
        if getattr(args, name) is not None
    }
    app = build_app(
        desk, models, speaker.defaults | said, args.max_new_tokens, args.api_key, args.allow_origin
    )
    host, port = sock.getsockname()[:2]
    if not args.api_key and host not in ("127.0.0.1", "::1"):
        print("warning: no --api_key: whoever reaches this port can use the model", flush=True)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    ready = f"serving {', '.join(models)} on {device.name()}: {url}  (Ctrl-C ends)"
    server = Server(Front(app, serve.own_names(args.host), args.allow_origin), desk, ready)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)  # uvicorn raises them once more after a clean end
    server.run(sockets=[sock])
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a second Ctrl-C does not wait for the token under way


if __name__ == "__main__":
    cli.run(main)
