"""A model behind an OpenAI-compatible server (ours, vLLM's, ...), asked as one in this process."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import requests

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
        **sampling,
    ) -> Iterator[tuple[str, int]]:
        """As ChatModel.stream: (answer so far, its pieces) while it grows. ValueError for what the
        server refuses."""
        asked = {
            "model": self.name,
            "messages": messages,
            "max_tokens": int(max_new_tokens),
            "stream": True,
            **sampling,
        }
        if thinking:
            asked["chat_template_kwargs"] = {"enable_thinking": True}
        stop = stop or threading.Event()
        thought = ""
        said = ""
        count = 0
        for piece in self.pieces(asked):
            if stop.is_set():
                return
            thought += piece.get("reasoning_content") or ""
            said += piece.get("content") or ""
            count += 1
            yield joined(thought, said), count
        yield joined(thought, said), count

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


def refusal(answer: requests.Response) -> str:
    """What an answer that is none says."""
    try:
        return answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answers {answer.status_code}"
