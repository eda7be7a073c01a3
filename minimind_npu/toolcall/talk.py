"""One conversation with tools, as it grows: what the model writes, what its calls give, how it goes
on. For the terminal and the page; many conversations at once: play.py.

    for parts, count in with_tools(chat_model, messages, registry, stop, thinking=False):
        print(parts[-1].text)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from toolcall.calls import CLOSED, OPENED, Call, parse_calls
from toolcall.play import message_of
from toolcall.registry import Registry

from common.demo.chat_model import split_thought

MAX_TURNS = 8  # answers to one question; the calls of the last one are not run


@dataclass
class Part:
    """role: "assistant" or "tool"; text: as the model wrote it, thought and calls included, or what
    a tool gave; calls: those of the text that are run, the parts after it are their results."""

    role: str
    text: str = ""
    calls: list[Call] = field(default_factory=list)

    @property
    def message(self) -> dict:
        """The same for the chat template."""
        if self.role == "tool":
            return {"role": "tool", "content": self.text}
        thought, said, _ = split_thought(self.text)
        return message_of(said, self.calls) | {"reasoning_content": thought}

    @property
    def is_cut(self) -> bool:
        """Whether it ends in the middle of a call."""
        return OPENED in self.text.rpartition(CLOSED)[2]


def with_tools(
    chat_model,
    messages: list[dict],
    registry: Registry | None,
    stop: threading.Event,
    max_turns: int = MAX_TURNS,
    **options,
) -> Iterator[tuple[list[Part], int]]:
    """(the parts so far, the tokens of all of them) while the answer to `messages` grows. A call is
    run when the text that makes it is complete; then the model goes on.

    chat_model: a ChatModel, or what streams like one. registry: the tools that it may call, None
    for none. options: of ChatModel.stream.
    """
    tools = {"tools": registry.schemas} if registry else {}
    parts: list[Part] = []
    before = 0
    for turn in range(max_turns):
        asked = [*messages, *(part.message for part in parts)]
        written = Part("assistant")
        parts.append(written)
        count = 0
        for written.text, count in chat_model.stream(asked, stop, **tools, **options):
            yield parts, before + count
        before += count
        calls = parse_calls(written.text) if registry else []
        if not calls or written.is_cut or stop.is_set() or turn + 1 == max_turns:
            return
        written.calls = calls
        for call in calls:
            parts.append(Part("tool", registry.answer(call)))
            yield parts, before
