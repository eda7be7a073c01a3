"""Answers in OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

from server.desk import Chosen, Step
from server.parts import Piece

from common.demo.openai_request import Refusal
from common.demo.openai_server import send_data, send_event

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on
]


class Tokens:
    """Tokens as OpenAI's log-probabilities show them."""

    def __init__(self, tokenizer, grammars):
        self.tokenizer = tokenizer
        self.grammars = grammars

    def text(self, token: int) -> str:
        """A part of a character is told by its bytes."""
        text = self.tokenizer.decode([token])
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token))

    def bytes(self, token: int) -> list[int]:
        return list(self.grammars.bytes_of(token))

    def entry(self, token: int, log_prob: float) -> dict:
        return {"token": self.text(token), "logprob": log_prob, "bytes": self.bytes(token)}

    def chat(self, chosen: list[Chosen]) -> dict:
        content = []
        for one in chosen:
            top = [self.entry(*pair) for pair in one.top]
            content.append(self.entry(one.token, one.log_prob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def by_text(self, pairs) -> dict[str, float]:
        """Of tokens that are shown alike the likelier counts."""
        found: dict[str, float] = {}
        for token, log_prob in pairs:
            text = self.text(token)
            found[text] = max(log_prob, found.get(text, log_prob))
        return found


class Reply(ABC):
    """What all replies have: an id, the usage, and a stream of events."""

    kind = ""  # of the whole object
    prefix = ""
    chunk_kind = ""

    def __init__(self, ask, prompt_tokens: int, scope, tokens: Tokens):
        self.ask = ask
        self.state = scope["state"]
        self.tokens = tokens
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": ask.model,
            "system_fingerprint": None,
        }
        self.usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
        self.count(0)

    def count(self, more: int) -> None:
        """Add tokens to the usage, in the reply and in the log."""
        self.usage["completion_tokens"] += more
        self.usage["total_tokens"] = self.usage["prompt_tokens"] + self.usage["completion_tokens"]
        self.state["tokens"] = "{prompt_tokens}+{completion_tokens} tokens".format(**self.usage)

    async def counted(self, steps: AsyncIterator[Step]) -> AsyncIterator[Step]:
        async for step in steps:
            self.count(1)
            yield step

    def body(self, choices: list[dict]) -> dict:
        return self.head | {"object": self.kind, "choices": choices, "usage": self.usage}

    async def stream(self, steps: AsyncIterator[Step], send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            await self.begin(send)
            async for step in self.counted(steps):
                for choice in self.choices_of(step):
                    await self.chunk(send, [choice])
            if self.ask.wants_usage:
                await self.chunk(send, [], self.usage)
            await send_data(send, "[DONE]")
        except Refusal as error:  # too late for another status
            self.state["failed"] = error.status
            await send_event(send, error.body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @abstractmethod
    async def begin(self, send) -> None:
        """Send what comes before the first token."""

    @abstractmethod
    def choices_of(self, step: Step) -> list[dict]:
        """A step -> the choices of the chunks that tell it."""

    async def chunk(self, send, choices: list[dict], usage: dict | None = None) -> None:
        body = self.head | {"object": self.chunk_kind, "choices": choices}
        if self.ask.wants_usage:
            body["usage"] = usage
        await send_event(send, body)


# ---- chats -------------------------------------------------------------------------------------


class ChatReply(Reply):
    kind = "chat.completion"
    prefix = "chatcmpl"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = [0] * self.ask.choices  # told so far, of each choice
        self.untold: list[list[Chosen]] = [[] for _ in self.calls]

    async def whole(self, steps: AsyncIterator[Step]) -> dict:
        messages = [Message() for _ in self.calls]
        async for step in self.counted(steps):
            messages[step.index].add(step, self)
        return self.body([message.choice(i, self) for i, message in enumerate(messages)])

    async def begin(self, send) -> None:
        for index in range(self.ask.choices):
            await self.chunk(send, [self.delta(index, {"role": "assistant", "content": ""})])

    def choices_of(self, step: Step) -> list[dict]:
        self.untold[step.index] += step.chosen
        told = [self.delta(step.index, self.said(step.index, piece)) for piece in step.pieces]
        if step.reason:
            told.append(self.delta(step.index, {}, step.reason))
        if told and self.ask.logprobs:
            told[0]["logprobs"] = self.tokens.chat(self.untold[step.index])
        if told:
            self.untold[step.index] = []
        return told

    def delta(self, index: int, said: dict, reason: str | None = None) -> dict:
        return {"index": index, "delta": said, "logprobs": None, "finish_reason": reason}

    def said(self, index: int, piece: Piece) -> dict:
        if piece.kind == "call":
            return {"tool_calls": [self.call(index, piece)]}
        return {"reasoning_content" if piece.kind == "reasoning" else "content": piece.text}

    def call(self, index: int, piece: Piece) -> dict:
        number = self.calls[index]
        self.calls[index] += 1
        function = {"name": piece.name, "arguments": piece.text}
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        return {"index": number, "id": call_id, "type": "function", "function": function}


class Message:
    """One choice of a whole answer as it grows."""

    def __init__(self):
        self.texts = {"content": "", "reasoning": ""}
        self.calls: list[dict] = []
        self.chosen: list[Chosen] = []
        self.reason = ""

    def add(self, step: Step, reply: ChatReply) -> None:
        self.chosen += step.chosen
        self.reason = step.reason
        for piece in step.pieces:
            if piece.kind == "call":
                call = reply.call(step.index, piece)
                del call["index"]  # only chunks have it
                self.calls.append(call)
            else:
                self.texts[piece.kind] += piece.text

    def choice(self, index: int, reply: ChatReply) -> dict:
        content = self.texts["content"]
        message = {"role": "assistant", "content": content, "refusal": None}
        if self.texts["reasoning"]:
            message["reasoning_content"] = self.texts["reasoning"]
        if self.calls:
            message |= {"content": content or None, "tool_calls": self.calls}
        logprobs = reply.tokens.chat(self.chosen) if reply.ask.logprobs else None
        told = {"index": index, "message": message, "logprobs": logprobs}
        return told | {"finish_reason": self.reason}


# ---- texts -------------------------------------------------------------------------------------


class TextReply(Reply):
    kind = "text_completion"
    prefix = "cmpl"
    chunk_kind = "text_completion"

    async def whole(self, steps: AsyncIterator[Step], texts: list[str], scored: list) -> dict:
        """texts and scored: of each choice, what an echo puts before it: its text, and its tokens
        as Chosen (without log-probability for the first); empty without."""
        said = list(texts)
        chosen = [list(one) for one in scored]
        reasons = ["length"] * len(texts)
        async for step in self.counted(steps):
            said[step.index] += text_of(step)
            chosen[step.index] += step.chosen
            reasons[step.index] = step.reason
        choices = []
        for index, text in enumerate(said):
            choice = self.choice(index, text, reasons[index])
            if self.ask.logprobs is not None:
                choice["logprobs"] = self.log_probs(chosen[index])
            choices.append(choice)
        return self.body(choices)

    async def begin(self, send) -> None:
        """Nothing: a text has no role."""

    def choices_of(self, step: Step) -> list[dict]:
        if not (step.pieces or step.reason or self.ask.logprobs is not None):
            return []
        choice = self.choice(step.index, text_of(step), step.reason or None)
        if self.ask.logprobs is not None:
            choice["logprobs"] = self.log_probs(step.chosen)
        return [choice]

    def choice(self, index: int, text: str, reason: str | None) -> dict:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def log_probs(self, chosen: list[Chosen]) -> dict:
        texts = [self.tokens.text(one.token) for one in chosen]
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        top = [self.tokens.by_text(one.top) if one.log_prob is not None else None for one in chosen]
        return {
            "tokens": texts,
            "token_logprobs": [one.log_prob for one in chosen],
            "top_logprobs": top,
            "text_offset": offsets[:-1],
        }


def text_of(step: Step) -> str:
    return "".join(piece.text for piece in step.pieces)
