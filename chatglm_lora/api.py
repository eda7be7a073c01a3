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
from common import cli  # noqa: I001  (device before torch and transformers)

import argparse
import asyncio
import contextlib
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import modeling_chatglm  # noqa: F401  (registers ChatGLM)
from common.data.labels import encode_prompt
from common.demo import openai_server, serve
from common.demo.chat_model import ChatModel
from common.demo.openai_request import Ask, Refusal, check_template, parse
from common.demo.openai_server import (
    COMPLETIONS,
    Text,
    check_model,
    failures,
    send_data,
    send_event,
    unless_gone,
)
from common.runs.generate import end_token_ids

DEFAULT = HERE.parent / "output" / HERE.name
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}  # as OpenAI's


# ---- the answer --------------------------------------------------------------------------------


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

    def close(self) -> None:
        """End the answers under way; no more are begun."""
        self.closing = True

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


# ---- the server --------------------------------------------------------------------------------


def build_app(
    desk: Desk, models: dict[str, bool], defaults: dict, max_new_tokens: int, key=None, origins=()
):
    """The ASGI application without its Front.

    models: id -> whether the adapter is on; key: None for none.
    """
    completions = Completions(desk, models, defaults, max_new_tokens)
    routes = [Route(COMPLETIONS, completions, methods=["POST"])]
    return openai_server.build_app(routes, list(models), HERE.name, key, origins)


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    openai_server.add_arguments(parser, DEFAULT)
    args = parser.parse_args()
    openai_server.check_arguments(args, parser)
    return args


def main() -> None:
    args = arguments()
    sock = openai_server.bind(args.host, args.port)
    chat_model = ServedChatModel(args.model)
    models = openai_server.model_ids(str(args.model), args.name, chat_model.adapter)
    defaults = openai_server.sampling_of(args, chat_model.defaults)
    desk = Desk(chat_model, args.max_waiting)
    app = build_app(desk, models, defaults, args.max_new_tokens, args.api_key, args.allow_origin)
    openai_server.run(app, sock, args, models, desk.close)


if __name__ == "__main__":
    cli.run(main)
