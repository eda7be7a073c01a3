"""A model behind an OpenAI-compatible server (ours, vLLM's, ...), asked as one in this process."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import requests
from toolcall.calls import CLOSED, OPENED

LOCAL = ("127.0.0.1", "localhost", "::1")
CONNECTS = 10  # seconds
ANSWERS = 600  # seconds that a server may take to the next piece of an answer
NEUTRAL = {"temperature": 0.7, "top_p": 1, "top_k": 0, "repetition_penalty": 1}


class ServedModel:
    """What chat.py and the page ask of a ChatModel.

    sampling_defaults: where the page's controls stand; the server's own settings are not told.
    """

    adapter = False
    chats = True
    can_think = True
    takes_system = True
    takes_tools = True
    window = 8192  # bounds the page's slider alone; the server has its own

    def __init__(self, base_url: str, name: str = ""):
        """base_url: http://HOST:PORT/v1; name: a model id of the server, unset its first.

        The key is taken from DANPU_API_KEY. SystemExit where no such server answers.
        """
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SystemExit(f"--base_url {base_url}: expected http://HOST:PORT/v1")
        self.url = base_url.rstrip("/")
        self.session = requests.Session()
        self.session.trust_env = parts.hostname not in LOCAL  # no proxy stands between
        key = os.environ.get("DANPU_API_KEY", "").strip()
        if key:
            self.session.headers["authorization"] = f"Bearer {key}"
        known = self.models()
        self.name = name or known[0]
        if self.name not in known:
            told = ", ".join(known)
            raise SystemExit(f"--model {name}: the server at {base_url} has {told}")

    def models(self) -> list[str]:
        try:
            answer = self.session.get(f"{self.url}/models", timeout=CONNECTS)
            known = [one["id"] for one in answer.json().get("data", [])]
        except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError):
            raise SystemExit(
                f"--base_url {self.url}: no OpenAI-compatible server answers; "
                "serve_openai_api.py starts one"
            ) from None
        if not known:
            raise SystemExit(f"--base_url {self.url}: {refusal(answer)}")
        return known

    def described(self) -> list[str]:
        return [self.url]

    def sampling_defaults(self) -> dict[str, float]:
        return dict(NEUTRAL)

    def stream(
        self,
        messages: list[dict],
        stop: threading.Event | None = None,
        use_adapter: bool = True,
        thinking: bool = False,
        max_new_tokens: int = 512,
        tools: list[dict] | None = None,
        **sampling,
    ) -> Iterator[tuple[str, int]]:
        """As ChatModel.stream: (answer so far, its pieces) while it grows; calls of tools come at
        its end. ValueError for what the server refuses."""
        asked = {
            "model": self.name,
            "messages": with_call_ids(messages),
            "max_tokens": int(max_new_tokens),
            "stream": True,
            **sampling,
        }
        if tools:
            asked["tools"] = tools
        if thinking:
            asked["chat_template_kwargs"] = {"enable_thinking": True}
        stop = stop or threading.Event()
        thought = ""
        said = ""
        calls: dict[int, dict] = {}
        count = 0
        for piece in self.pieces(asked):
            if stop.is_set():
                return
            thought += piece.get("reasoning_content") or ""
            said += piece.get("content") or ""
            for call in piece.get("tool_calls") or []:
                add_call(calls, call)
            count += 1
            yield joined(thought, said), count
        yield joined(thought, said) + "".join(map(written_call, calls.values())), count

    def pieces(self, asked: dict) -> Iterator[dict]:
        """The deltas of a streamed answer; leaving the iteration ends the answer at the server."""
        try:
            answer = self.session.post(
                f"{self.url}/chat/completions",
                json=asked,
                stream=True,
                timeout=(CONNECTS, ANSWERS),
            )
            with answer:
                if answer.status_code != 200:
                    raise ValueError(refusal(answer))
                for line in answer.iter_lines(chunk_size=1):
                    text = line.decode("utf-8", "replace").removeprefix("data: ")
                    if not line.startswith(b"data: ") or text == "[DONE]":
                        continue
                    event = json.loads(text)
                    if "error" in event:
                        raise ValueError(event["error"].get("message", "the server failed"))
                    for choice in event.get("choices", []):
                        yield choice.get("delta", {})
        except requests.RequestException as error:
            raise ValueError(f"the server has gone: {type(error).__name__}") from None


def joined(thought: str, said: str) -> str:
    """As a model writes it."""
    if not thought:
        return said
    return f"<think>{thought}</think>{said}" if said else f"<think>{thought}"


def with_call_ids(messages: list[dict]) -> list[dict]:
    """Calls and their results as OpenAI's interface has them: matched by ids, arguments as text."""
    found = []
    waiting: list[str] = []
    for number, message in enumerate(messages):
        message = dict(message)
        calls = message.pop("tool_calls", [])
        if calls:
            waiting = [f"call_{number}_{i}" for i in range(len(calls))]
            message["tool_calls"] = [
                call | {"id": name, "function": with_text_arguments(call["function"])}
                for name, call in zip(waiting, calls, strict=True)
            ]
        elif message["role"] == "tool" and waiting:
            message["tool_call_id"] = waiting.pop(0)
        elif message["role"] == "tool":  # the call was none, so it has no id
            message["role"] = "user"
        found.append(message)
    return found


def with_text_arguments(function: dict) -> dict:
    return function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def add_call(calls: dict[int, dict], piece: dict) -> None:
    """A call comes whole or in pieces, each with its number."""
    call = calls.setdefault(piece.get("index", len(calls)), {"name": "", "arguments": ""})
    function = piece.get("function") or {}
    for name in call:
        call[name] += function.get(name) or ""


def written_call(call: dict) -> str:
    """As a model writes it."""
    name = json.dumps(call["name"], ensure_ascii=False)
    arguments = call["arguments"] or "{}"
    return f'\n{OPENED}\n{{"name": {name}, "arguments": {arguments}}}\n{CLOSED}'


def refusal(answer: requests.Response) -> str:
    """What an answer that is none says."""
    try:
        return answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answers {answer.status_code}"
