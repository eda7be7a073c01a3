"""Between the requests (asyncio) and the model's thread: places in the queue, prompts, and the text
of several answers as they grow."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from engine.generation import MiniMindChatModel, Sampling
from server.asks import ChatAsk, TextAsk, refuse
from server.constraints import Grammars, call_grammar, json_grammar, strict_grammar
from server.measures import Measures
from server.parts import THOUGHT_BEGINS, THOUGHT_ENDS, Parts, Piece
from server.worker import Job, Scoring, Worker

from common.data.labels import encode_prompt
from common.demo.openai_request import Refusal, check_template
from common.demo.openai_server import Text, failures
from common.demo.serve import RETRY_SECONDS


@dataclass(frozen=True)
class Limits:
    """waiting: requests beyond the slots; seconds: of one request; new_tokens: of answers to
    requests that name no limit."""

    waiting: int = 256
    seconds: float = 600
    new_tokens: int = 2048


@dataclass(frozen=True)
class Chosen:
    """A generated token with its log-probability, and those of the likeliest beside it."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Step:
    """What a choice gained.

    reason: why it ended, "" while it goes on.
    """

    index: int
    pieces: list[Piece]
    chosen: list[Chosen]
    reason: str = ""


@dataclass
class Choice:
    """One of the answers to a request."""

    index: int
    text: Text
    parts: Parts
    job: Job
    count: int = 0
    reason: str = ""

    def take(self, chosen: Chosen, finished: str) -> Step:
        """finished: of the engine's request."""
        self.count += 1
        ended = chosen.token in self.job.sampling.ends
        text = self.text.add([] if ended else [chosen.token])
        if self.text.stopped or finished == "stop":
            self.reason = "stop"
        elif finished:
            self.reason = "length"
        if self.reason:
            text += self.text.add([], last=True)
            self.job.cancel()
        pieces = self.parts.add(text, last=bool(self.reason))
        if self.reason == "stop" and self.parts.called:
            self.reason = "tool_calls"
        return Step(self.index, pieces, [] if ended else [chosen], self.reason)


class Desk:
    """Takes requests to the worker, at most `limits.waiting` beyond what has a slot."""

    def __init__(self, chat_model: MiniMindChatModel, worker: Worker, limits: Limits):
        self.chat_model = chat_model
        self.tokenizer = chat_model.tokenizer
        self.worker = worker
        self.limits = limits
        self.window = worker.max_length
        self.measures = Measures(worker)
        self.grammars = Grammars(self.tokenizer, chat_model.model.config.vocab_size)
        self.reading = ThreadPoolExecutor(1)  # a tokenizer takes one text at a time
        self.present = 0
        template = str(self.tokenizer.chat_template)
        self.knows_tools = "tools" in template
        self.knows_thoughts = THOUGHT_ENDS in template

    @contextmanager
    def place(self):
        """A place in the queue; Refusal 429 when there is none, 503 when the server ends."""
        if self.worker.closing:
            raise Refusal(503, "the server is shutting down", code="shutting_down")
        if self.present >= self.worker.slots + self.limits.waiting:
            told = f"{self.limits.waiting} requests wait already; try again later"
            raise Refusal(429, told, code="queue_full", retry_after=str(RETRY_SECONDS))
        self.present += 1
        try:
            yield
        finally:
            self.present -= 1

    # ---- prompts ----

    async def in_reader(self, work):
        return await asyncio.get_running_loop().run_in_executor(self.reading, work)

    async def read_chat(self, ask: ChatAsk) -> list[int]:
        """The prompt's token ids; Refusal 400 when the template refuses the messages or they leave
        no room."""
        if not self.chat_model.chats:
            told = "this model continues texts: no chat template belongs to it; use /v1/completions"
            raise Refusal(400, told, "messages", "invalid_value")
        messages = [message.for_template() for message in ask.messages]
        variables = ask.chat_template_kwargs or {}
        check_template(str(self.tokenizer.chat_template), messages, variables)
        tools = ask.offered_tools or None
        if tools and not self.knows_tools:
            refuse("tools", "this model's chat template has no place for them")
        encode = partial(encode_prompt, self.tokenizer, messages, tools, **variables)
        with failures():
            try:
                prompt = await self.in_reader(encode)
            except ValueError as error:
                raise Refusal(400, str(error), "messages", "invalid_value") from None
        self.check_room(len(prompt), ask.limit or 1, "messages")
        return prompt

    async def read_texts(self, ask: TextAsk) -> list[list[int]]:
        """Token ids of each prompt; Refusal 400 where one leaves no room."""
        found = []
        for prompt in ask.prompt:
            if isinstance(prompt, str):
                with failures():
                    prompt = await self.in_reader(partial(self.chat_model.text_prompt, prompt))
            elif max(prompt) >= self.chat_model.model.config.vocab_size:
                refuse("prompt", "a token id that this model does not have")
            if not prompt:
                refuse("prompt", "an empty text, and this model has no token that begins one")
            self.check_room(len(prompt), ask.limit, "prompt")
            found.append(prompt)
        return found

    def check_room(self, length: int, limit: int, where: str) -> None:
        if length + limit <= self.window:
            return
        told = f"this model's maximum context length is {self.window} tokens; "
        told += f"the prompt has {length}, the answer at least {limit}"
        raise Refusal(400, told, where, "context_length_exceeded")

    def constraint(self, ask: ChatAsk, thought_is_open: bool):
        """A new Constraint of what the request demands of its answers' form, or None."""
        if ask.demanded_tools:
            grammar = call_grammar(self.tokenizer, ask.demanded_tools, thought_is_open)
            return self.grammars.constraint(grammar, "tools")
        if ask.schema is None and ask.strict_tools:
            grammar = strict_grammar(self.tokenizer, ask.tools)
            return self.grammars.constraint(grammar, "tools")
        if ask.schema is None:
            return None
        grammar = json_grammar(self.tokenizer, ask.schema, thought_is_open)
        return self.grammars.constraint(grammar, "response_format")

    def thought_is_open(self, prompt: list[int]) -> bool:
        return self.tokenizer.decode(prompt[-8:]).rstrip().endswith(THOUGHT_BEGINS)

    # ---- answers ----

    async def chat(self, ask: ChatAsk, model: str, prompt: list[int], defaults: dict):
        """Iterate over the Steps of all choices; leaving the iteration ends them."""
        is_open = self.thought_is_open(prompt)
        calls = bool(ask.offered_tools) and ask.schema is None
        limit = ask.limit or min(self.limits.new_tokens, self.window - len(prompt))
        choices = []
        for index in range(ask.choices):
            parts = Parts(self.knows_thoughts, is_open, calls)
            constraint = self.constraint(ask, is_open)
            sampling = self.sampling(ask, limit, defaults, index, ask.alternatives)
            choices.append(self.choice(index, ask.stop, parts, model, prompt, sampling, constraint))
        async for step in self.steps(choices):
            yield step

    async def texts(self, ask: TextAsk, model: str, prompts: list[list[int]], defaults: dict):
        """The same for prompts that are continued; choices of one prompt stand side by side."""
        if not ask.limit:  # only an echo is wanted
            return
        choices = []
        for index in range(len(prompts) * ask.choices):
            parts = Parts(thinking=False, thought_is_open=False, calls=False)
            parts.begun = True  # blanks at the beginning belong to a text
            sampling = self.sampling(ask, ask.limit, defaults, index, ask.logprobs)
            prompt = prompts[index // ask.choices]
            choices.append(self.choice(index, ask.stop, parts, model, prompt, sampling))
        async for step in self.steps(choices):
            yield step

    def sampling(self, ask, limit: int, defaults: dict, index: int, top: int | None) -> Sampling:
        seed = random.getrandbits(32) if ask.seed is None else ask.seed
        return Sampling(
            max_new_tokens=limit,
            seed=f"{seed}:{index}",
            ends=self.chat_model.ends,
            top_log_probs=top,
            **ask.sampling(defaults),
        )

    def choice(self, index, stop, parts, model, prompt, sampling, constraint=None) -> Choice:
        job = Job(model, prompt, sampling, constraint=constraint)
        return Choice(index, Text(self.tokenizer, stop), parts, job)

    async def steps(self, choices: list[Choice]) -> AsyncIterator[Step]:
        """Step by step until all choices have ended; Refusal 504 after too long."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue = asyncio.Queue()
        began = time.perf_counter()

        def hear(choice: Choice, *what) -> None:  # in the worker's thread
            loop.call_soon_threadsafe(arrived.put_nowait, (choice, *what))

        for choice in choices:
            choice.job.on_token = partial(_tell_token, hear, choice)
            choice.job.on_failure = partial(hear, choice)
            self.worker.submit(choice.job)
        first = True
        try:
            while not all(choice.reason for choice in choices):
                left = began + self.limits.seconds - time.perf_counter()
                choice, *what = await asyncio.wait_for(arrived.get(), left)
                if isinstance(what[0], Refusal):
                    raise what[0]
                if choice.reason:
                    continue  # a token more than its stop string needed
                if first:
                    self.measures.first.observe(time.perf_counter() - began)
                    first = False
                self.measures.new_tokens.inc()
                yield choice.take(*what)
        except asyncio.TimeoutError:
            told = f"no end of the answer within {self.limits.seconds:g} s"
            raise Refusal(504, told, code="timeout") from None
        finally:
            for choice in choices:
                choice.job.cancel()

    async def score(self, model: str, ids: list[int], top: int) -> tuple[list, list]:
        """See worker.score."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future = loop.create_future()

        def tell(setter, value) -> None:
            loop.call_soon_threadsafe(lambda: done.done() or setter(value))

        scoring = Scoring(
            model,
            ids,
            top,
            on_done=lambda *found: tell(done.set_result, found),
            on_failure=lambda refusal: tell(done.set_exception, refusal),
        )
        self.worker.submit(scoring)
        try:
            return await asyncio.wait_for(done, self.limits.seconds)
        except asyncio.TimeoutError:
            raise Refusal(504, "the prompt took too long", code="timeout") from None
        finally:
            scoring.cancel()


def _tell_token(hear, choice: Choice, request) -> None:
    token = request.tokens[-1]
    chosen = Chosen(token, 0.0)
    if request.top_log_probs:
        log_prob, top = request.top_log_probs[-1]
        chosen = Chosen(token, log_prob, tuple(top))
    hear(choice, chosen, request.finished)
