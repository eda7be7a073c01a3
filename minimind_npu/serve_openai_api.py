r"""OpenAI-compatible server with continuous batching, for any causal language model.

    python minimind_npu/serve_openai_api.py                        # the newest run that answers
    python minimind_npu/serve_openai_api.py --model output/train_qwen --slots 32 --max_length 8192
    python minimind_npu/serve_openai_api.py --model BASE --adapters law=output/law med=output/med
    DANPU_API_KEY=... python minimind_npu/serve_openai_api.py --host 0.0.0.0      # with a key

    curl http://127.0.0.1:8998/v1/chat/completions \
        -d '{"model": "minimind", "messages": [{"role": "user", "content": "你是谁？"}]}'
    openai.OpenAI(base_url="http://127.0.0.1:8998/v1", api_key="any")

Requests join and leave a running batch; a prompt that several share is computed once. Endpoints:
/v1/chat/completions and /v1/completions (whole and streamed), /v1/models, /health, /metrics
(Prometheus). Tools, JSON by schema, log-probabilities, several choices, thoughts as
reasoning_content; what is not supported is refused by name. Beside OpenAI's parameters: top_k,
repetition_penalty, chat_template_kwargs.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli, device  # noqa: I001  (device before torch and transformers)

import argparse
import contextlib
import time
from abc import ABC, abstractmethod
from itertools import chain

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from common.convert import adapter
from common.demo import openai_server, serve
from common.demo.chat_model import find_model
from common.demo.openai_request import Refusal, parse
from engine.generation import OUTPUT, MiniMindChatModel, newest
from server.asks import ChatAsk, TextAsk
from server.desk import Chosen, Desk, Limits
from server.replies import ChatReply, TextReply, Tokens
from server.worker import Worker

TEXTS = "/v1/completions"
METRICS = "/metrics"
PORT = 8998


class Endpoint(ABC):
    """ASGI endpoint: reads a request, has it answered, and lets it go when its client leaves."""

    path = ""
    kind: type = ChatAsk

    def __init__(self, desk: Desk, models: list[str], defaults: dict):
        """models: ids; defaults: sampling of requests that do not name it."""
        self.desk = desk
        self.models = models
        self.defaults = defaults
        self.tokens = Tokens(desk.tokenizer, desk.grammars)

    async def __call__(self, scope, receive, send):
        began = time.perf_counter()
        state = scope["state"]
        status = 200
        try:
            ask = parse(await Request(scope, receive).body(), self.kind)
            state["ignored"] = ask.ignored
            openai_server.check_model(ask.model, self.models)
            ask.check()
            with self.desk.place():
                await openai_server.unless_gone(receive, self.respond(ask, scope, receive, send))
        except serve.Left:
            state["left"] = True
            status = openai_server.CLIENT_LEFT
        except Refusal as refusal:
            status = refusal.status
            raise
        finally:
            measures = self.desk.measures
            measures.requests.labels(self.path, str(state.get("failed", status))).inc()
            measures.whole.observe(time.perf_counter() - began)

    @abstractmethod
    async def respond(self, ask, scope, receive, send) -> None:
        """Answer `ask`, which is a `kind`."""


class Chats(Endpoint):
    path = openai_server.COMPLETIONS
    kind = ChatAsk

    async def respond(self, ask: ChatAsk, scope, receive, send) -> None:
        prompt = await self.desk.read_chat(ask)
        self.desk.measures.prompt_tokens.inc(len(prompt))
        reply = ChatReply(ask, len(prompt), scope, self.tokens)
        steps = self.desk.chat(ask, ask.model, prompt, self.defaults)
        async with contextlib.aclosing(steps):
            if ask.stream:
                await reply.stream(steps, send)
            else:
                await JSONResponse(await reply.whole(steps))(scope, receive, send)


class Texts(Endpoint):
    path = TEXTS
    kind = TextAsk

    async def respond(self, ask: TextAsk, scope, receive, send) -> None:
        prompts = await self.desk.read_texts(ask)
        length = sum(map(len, prompts))
        self.desk.measures.prompt_tokens.inc(length)
        reply = TextReply(ask, length, scope, self.tokens)
        steps = self.desk.texts(ask, ask.model, prompts, self.defaults)
        async with contextlib.aclosing(steps):
            if ask.stream:
                await reply.stream(steps, send)
                return
            echoes = [await self.echo(ask, prompt) for prompt in prompts]
            repeated = list(chain.from_iterable([echo] * ask.choices for echo in echoes))
            texts = [text for text, _ in repeated]
            scored = [chosen for _, chosen in repeated]
            whole = await reply.whole(steps, texts, scored)
            await JSONResponse(whole)(scope, receive, send)

    async def echo(self, ask: TextAsk, prompt: list[int]) -> tuple[str, list[Chosen]]:
        """The text of a prompt and its tokens, as far as the request asks for them."""
        if not ask.echo:
            return "", []
        text = self.desk.tokenizer.decode(prompt, skip_special_tokens=True)
        if ask.logprobs is None:
            return text, []
        chosen = [Chosen(prompt[0], None)]
        if len(prompt) > 1:
            found, top = await self.desk.score(ask.model, prompt, ask.logprobs)
            for token, log_prob, best in zip(prompt[1:], found, top, strict=True):
                chosen.append(Chosen(token, log_prob, tuple(best)))
        return text, chosen


def build_app(desk: Desk, models: list[str], defaults: dict, key=None, origins=()):
    """The ASGI application without its Front. models: ids; key: None for none."""
    routes = [
        Route(Chats.path, Chats(desk, models, defaults), methods=["POST"]),
        Route(Texts.path, Texts(desk, models, defaults), methods=["POST"]),
        Route(METRICS, desk.measures.tell),
    ]
    return openai_server.build_app(routes, models, HERE.name, key, origins)


# ---- the start ---------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    openai_server.add_arguments(parser, "", PORT)
    parser.set_defaults(max_waiting=Limits.waiting, max_new_tokens=Limits.new_tokens)
    add = parser.add_argument
    add("--adapters", nargs="+", default=[], help="LoRA adapters of the model: ID=FOLDER ...")
    add("--slots", type=int, default=16, help="answers in one batch; more take more memory")
    add("--max_length", type=int, default=4096, help="tokens of prompt and answer together")
    add("--max_seconds", type=float, default=Limits.seconds, help="a request may take")
    args = parser.parse_args()
    openai_server.check_arguments(args, parser)
    if args.slots < 1 or args.max_length < 2:
        parser.error("--slots is at least 1, --max_length at least 2")
    if args.max_seconds <= 0:
        parser.error("--max_seconds is above 0")
    args.adapters = adapters_by_id(args.adapters, parser)
    return args


def adapters_by_id(given: list[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    """ID=FOLDER ... -> id -> folder."""
    found = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not name or not equals or not folder:
            parser.error(f"--adapters {word}: expected ID=FOLDER")
        if name in found or name == openai_server.BASE:
            parser.error(f"--adapters {word}: the id {name} is taken")
        found[name] = folder
    return found


def load_adapters(chat_model: MiniMindChatModel, folders: dict[str, str]) -> dict[str, str]:
    """Put the adapters on the model; -> model id -> the adapter's name within it."""
    found = {}
    for number, (name, folder) in enumerate(folders.items()):
        folder = find_model(folder)
        adapter.check_base(folder, chat_model.path)
        inner = f"adapter_{number}"
        chat_model.model = adapter.put_on(chat_model.model, folder, inner)
        found[name] = inner
    chat_model.model.eval()
    return found


def main() -> None:
    args = arguments()
    sock = openai_server.bind(args.host, args.port)
    cli.quiet_libraries()
    device.training_defaults(set())
    model = str(args.model) or newest(OUTPUT)
    chat_model = MiniMindChatModel(model)
    if chat_model.adapter and args.adapters:
        raise SystemExit("--adapters are put on a whole model; --model is an adapter itself")
    ids = openai_server.model_ids(model, args.name, chat_model.adapter)
    inner = "default" if chat_model.adapter else None
    adapters = {name: inner if on else None for name, on in ids.items()}
    adapters |= load_adapters(chat_model, args.adapters)
    worker = Worker(chat_model.model, adapters, args.slots, args.max_length)
    limits = Limits(args.max_waiting, args.max_seconds, args.max_new_tokens)
    desk = Desk(chat_model, worker, limits)
    defaults = openai_server.sampling_of(args, chat_model.sampling_defaults())
    app = build_app(desk, list(adapters), defaults, args.api_key, args.allow_origin)
    worker.start()
    openai_server.run(app, sock, args, list(adapters), worker.close)


if __name__ == "__main__":
    cli.run(main)
