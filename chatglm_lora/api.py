r"""OpenAI-compatible server for a trained model: a run's output folder, a model folder, a LoRA
adapter or a hub id.

    python chatglm_lora/api.py         # what `bash chatglm_lora/train_zero2.sh` left in output/
    python chatglm_lora/api.py --model output/my_run --port 8000 --temperature 0.95 --top_p 0.7
    DANPU_API_KEY=... python chatglm_lora/api.py --host 0.0.0.0    # other machines too, with a key

    curl http://127.0.0.1:8000/v1/chat/completions \
        -d '{"model": "chatglm_lora", "messages": [{"role": "user", "content": "你是谁？"}]}'
    openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any")

Model ids: the folder's name; where it is an adapter, `base` is the model without it. Prompts are
built from the chat template saved with the model, by the code that built the training rows
(common/data/labels.py). One answer at a time, the others wait in the order they came. What is not
supported is refused in OpenAI's error object, nothing is cut silently. Beside OpenAI's parameters:
top_k, repetition_penalty, chat_template_kwargs (variables of the chat template).
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the files beside this one
from common import cli, device  # noqa: I001  (device before torch and transformers)

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
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import modeling_chatglm  # noqa: F401  (registers ChatGLM)
from common.data.labels import encode_prompt
from common.demo import serve
from common.demo.chat_model import ChatModel
from common.runs.generate import BROKEN, end_token_ids
from openai_request import Ask, Refusal, check_template, parse

DEFAULT = HERE.parent / "output" / HERE.name
COMPLETIONS = "/v1/chat/completions"
MODELS = "/v1/models"
HEALTH = "/health"
PATHS = (COMPLETIONS, MODELS, HEALTH)
LIMITS = serve.Limits(body=1 << 20)
CLIENT_LEFT = 499  # in the log
BASE = "base"  # the model id without the adapter
NAME = re.compile(r"[A-Za-z_]{1,40}")  # of a field, in the log
MAX_HELD = 64  # tokens that wait for the last bytes of a character; after so many it is broken
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}  # as OpenAI's


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


class ServedChatModel(ChatModel):
    """A ChatModel that tells each piece of an answer at once, and why the answer ended."""

    def __init__(self, model: str | Path):
        super().__init__(model)
        if not self.chats:
            told = "no chat template is saved with this model, so it cannot be asked in chats"
            raise SystemExit(f"{model}: {told}")
        self.ends = end_token_ids(self.model, self.tokenizer)
        self.defaults = self.sampling_defaults()
        if not self.defaults["temperature"]:  # it says nothing about drawing
            penalty = self.defaults["repetition_penalty"]
            self.defaults = NEUTRAL | {"repetition_penalty": penalty}

    def answer(self, prompt, limit, tell, gone, use_adapter=True, stop=(), seed=None, **sampling):
        """Generate at most `limit` tokens after `prompt` [T].

        Args:
            tell: called with (text, tokens so far) for each new piece.
            gone: asked at each token; True ends the answer.
        Returns:
            ("stop" or "length", or None when gone; tokens)
        """
        text = Text(self.tokenizer, list(stop))
        count = 0
        reason = None

        def heard(tokens, *_, **__):
            nonlocal count, reason
            new = tokens[0, len(prompt) + count :].tolist()
            count += len(new)
            ended = new[-1] in self.ends
            tell(text.add([] if ended else new), count)
            if ended or text.stopped:
                reason = "stop"
            return tokens.new_full((1,), reason == "stop" or gone()).bool()

        with self.turn(use_adapter):
            if seed is None:
                torch.seed()
            else:
                torch.manual_seed(seed)
            self._generate(prompt, limit, heard, **sampling)
        tell(text.add([], last=True), count)
        if text.stopped:
            reason = "stop"
        elif reason is None and count >= limit:
            reason = "length"
        return reason, count


class Desk:
    """Takes one question at a time to the model; at most `max_waiting` more wait, in the order they
    came."""

    def __init__(self, chat_model: ServedChatModel, max_waiting: int):
        self.chat_model = chat_model
        self.max_waiting = max_waiting
        self.present = 0
        self.closing = False
        self.turn = asyncio.Lock()
        self.reading = ThreadPoolExecutor(1)  # a tokenizer takes one text at a time
        self.answering = ThreadPoolExecutor(1)

    @contextlib.contextmanager
    def place(self):
        """A place in the queue; Refusal 503 when there is none, or the server ends."""
        self.check_open()
        if self.present > self.max_waiting:
            told = f"{self.max_waiting} requests wait already; try again later"
            raise Refusal(503, told, code="queue_full")
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
        messages = [message.for_template() for message in ask.messages]
        variables = ask.chat_template_kwargs or {}
        check_template(str(self.chat_model.tokenizer.chat_template), messages, variables)
        encode = partial(encode_prompt, self.chat_model.tokenizer, messages, **variables)
        with failures():
            try:
                prompt = await asyncio.get_running_loop().run_in_executor(self.reading, encode)
            except ValueError as error:
                raise Refusal(400, str(error), "messages", "invalid_value") from None
        window = self.chat_model.window
        if len(prompt) + (ask.limit or 1) > window:
            told = f"this model's maximum context length is {window} tokens; "
            told += f"the messages have {len(prompt)}"
            if ask.limit:
                told += f" and max_tokens is {ask.limit}"
            else:
                told += ", which leaves no room for an answer"
            raise Refusal(400, told, "messages", "context_length_exceeded")
        return prompt

    async def answer(self, prompt: list[int], limit: int, **options):
        """Iterate over (text, tokens so far, None) and at last ("", tokens, finish_reason).

        Leaving the iteration ends the answer.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue = asyncio.Queue()
        left = False

        def tell(*piece):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def gone():
            return left or self.closing

        # a task of its own: whoever reads slowly does not keep the others waiting
        async def take_turn():
            work = partial(self.chat_model.answer, prompt, limit, tell, gone, **options)
            async with self.turn:  # not the executor's own queue, which keeps those who have left
                self.check_open()
                with failures():
                    return await loop.run_in_executor(self.answering, work)

        task = asyncio.ensure_future(take_turn())
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while piece := await pieces.get():
                yield *piece, None
            reason, count = await task
        finally:
            left = True
            task.cancel()
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
        told = f"the model failed: {type(error).__name__}"
        raise Refusal(500, told, code="generation_failed") from None


class Completions:
    """ASGI endpoint of POST /v1/chat/completions."""

    def __init__(self, desk: Desk, models: dict[str, bool], defaults: dict, max_new_tokens: int):
        """models: id -> whether the adapter is on; defaults: sampling of requests that do not name
        it; max_new_tokens: of those that name no limit."""
        self.desk = desk
        self.models = models
        self.defaults = defaults
        self.max_new_tokens = max_new_tokens

    async def __call__(self, scope, receive, send):
        try:
            ask = parse(await Request(scope, receive).body())
            scope["state"]["ignored"] = ask.ignored
            check_model(ask.model, self.models)
            with self.desk.place():
                await unless_gone(receive, self.respond(ask, scope, receive, send))
        except serve.Left:
            scope["state"]["left"] = True

    async def respond(self, ask: Ask, scope, receive, send):
        prompt = await self.desk.read(ask)
        room = self.desk.chat_model.window - len(prompt)
        limit = ask.limit or min(self.max_new_tokens, room)
        reply = Reply(ask, len(prompt), scope)
        options = ask.sampling(self.defaults) | {"stop": ask.stop, "seed": ask.seed}
        answer = self.desk.answer(prompt, limit, use_adapter=self.models[ask.model], **options)
        async with contextlib.aclosing(answer) as pieces:
            if ask.stream:
                await reply.stream(pieces, send)
            else:
                await JSONResponse(await reply.whole(pieces))(scope, receive, send)


class Reply:
    """One answer in OpenAI's objects."""

    def __init__(self, ask: Ask, prompt_tokens: int, scope):
        self.ask = ask
        self.state = scope["state"]
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": ask.model,
        }
        self.prompt_tokens = prompt_tokens
        self.count(0)

    def count(self, completion_tokens: int) -> None:
        """Set the usage, in the reply and in the log."""
        self.usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }
        self.state["tokens"] = f"{self.prompt_tokens}+{completion_tokens} tokens"

    async def counted(self, pieces):
        async for text, tokens, reason in pieces:
            self.count(tokens)
            yield text, reason

    async def whole(self, pieces) -> dict:
        parts = []
        reason = None
        async for text, reason in self.counted(pieces):  # noqa: B007
            parts.append(text)
        message = {"role": "assistant", "content": "".join(parts), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self.head | {"object": "chat.completion", "choices": [choice], "usage": self.usage}

    async def stream(self, pieces, send):
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx passes each event on
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await self.delta(send, role="assistant", content="")
            async for text, reason in self.counted(pieces):
                if text:
                    await self.delta(send, content=text)
                if reason:
                    await self.delta(send, reason)
            if self.ask.wants_usage:
                await self.chunk(send, [], self.usage)
            await send_data(send, "[DONE]")
        except Refusal as error:  # too late for another status
            self.state["failed"] = error.status
            await send_event(send, error.body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def delta(self, send, reason: str | None = None, **said):
        choice = {"index": 0, "delta": said, "logprobs": None, "finish_reason": reason}
        await self.chunk(send, [choice])

    async def chunk(self, send, choices: list[dict], usage: dict | None = None):
        body = self.head | {"object": "chat.completion.chunk", "choices": choices}
        if self.ask.wants_usage:
            body["usage"] = usage
        await send_event(send, body)


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


def check_model(model: str, models: dict[str, bool]) -> None:
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

    def __init__(self, app, hosts: set[str], origins: list[str], limits: serve.Limits = LIMITS):
        super().__init__(app, hosts, limits)
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
        path = next((path for path in PATHS if scope["path"].startswith(path)), "(unknown path)")
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


def answer_problem(request, error: HTTPException):
    """What Starlette refuses, in OpenAI's words."""
    told = {
        404: f"unknown path; this server has {', '.join(PATHS)}",
        405: "this path has other methods: see Allow",
    }
    refusal = Refusal(error.status_code, told.get(error.status_code, error.detail))
    refusal.headers |= error.headers or {}
    return refusal.response()


def answer_bug(request, error: Exception):
    return Refusal(500, "internal error").response()


def build_app(
    desk: Desk, models: dict[str, bool], defaults: dict, max_new_tokens: int, key=None, origins=()
):
    """The ASGI application without its Front.

    models: id -> whether the adapter is on; key: None for none.
    """
    began = int(time.time())

    def card(name: str) -> dict:
        return {"id": name, "object": "model", "created": began, "owned_by": HERE.name}

    async def all_models(request):
        return JSONResponse({"object": "list", "data": [card(name) for name in models]})

    async def one_model(request):
        name = request.path_params["name"]
        check_model(name, models)
        return JSONResponse(card(name))

    async def health(request):
        return JSONResponse({"status": "ok"})

    completions = Completions(desk, models, defaults, max_new_tokens)
    routes = [
        Route(COMPLETIONS, completions, methods=["POST"]),
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
    handlers = {Refusal: answer_refusal, HTTPException: answer_problem, Exception: answer_bug}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class Server(uvicorn.Server):
    """uvicorn that says when it can be asked, and whose signals end the answers under way."""

    def __init__(self, app: Front, desk: Desk, ready: str):
        super().__init__(serve.config(app, app.limits))
        self.desk = desk
        self.ready = ready

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


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    default = os.environ.get("MODEL", DEFAULT)
    add("--model", default=default, help="folder of a run, model or adapter")
    add("--name", help="model id; default: the folder's name")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines ask it")
    add("--port", type=int, default=8000, help="0: any free one")
    add("--api_key", help="default: DANPU_API_KEY, which no list of processes shows")
    add("--allow_origin", nargs="+", default=[], help="web pages that may ask: https://my.site, *")
    add("--max_waiting", type=int, default=16, help="requests that wait for the one being answered")
    add("--max_new_tokens", type=int, default=2048, help="for requests without max_tokens")
    unsaid = "for requests without; default: the model's own, else 1"
    add("--temperature", type=float, help=unsaid)
    add("--top_p", type=float, help=unsaid)
    args = parser.parse_args()
    if args.api_key is not None and not args.api_key.strip():
        parser.error("--api_key is empty")  # an unset variable must not open the server
    args.api_key = (args.api_key or os.environ.get("DANPU_API_KEY", "")).strip() or None
    check_arguments(args, parser)
    return args


def check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.api_key and not args.api_key.isascii():
        told = "has other characters than ASCII, which clients cannot send"
        parser.error(f"--api_key (DANPU_API_KEY) {told}")
    if not 0 <= (args.temperature or 0) <= 2 or not 0 <= (args.top_p or 0) <= 1:
        parser.error("--temperature is from 0 to 2, --top_p from 0 to 1")
    if not 0 <= args.port < 1 << 16:
        parser.error("--port is from 0 to 65535")
    if args.max_waiting < 0 or args.max_new_tokens < 1:
        parser.error("--max_waiting is at least 0, --max_new_tokens at least 1")


def main() -> None:
    args = arguments()
    sock = bind(args.host, args.port)
    chat_model = ServedChatModel(args.model)
    models = model_ids(str(args.model), args.name, chat_model.adapter)
    defaults = dict(chat_model.defaults)
    if args.temperature is not None:
        defaults["temperature"] = args.temperature
    if args.top_p is not None:
        defaults["top_p"] = args.top_p
    desk = Desk(chat_model, args.max_waiting)
    app = build_app(desk, models, defaults, args.max_new_tokens, args.api_key, args.allow_origin)
    host, port = sock.getsockname()[:2]
    if not args.api_key and host not in ("127.0.0.1", "::1"):
        print("warning: no --api_key: whoever reaches this port can use the model", flush=True)
    place = f"[{host}]" if ":" in host else host
    url = f"http://{place}:{port}/v1"
    ready = f"serving {', '.join(models)} on {device.name()}: {url}  (Ctrl-C ends)"
    server = Server(Front(app, serve.own_names(args.host), args.allow_origin), desk, ready)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)  # uvicorn raises them once more after a clean end
    server.run(sockets=[sock])
    # a second Ctrl-C does not wait for the token under way
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    cli.run(main)
