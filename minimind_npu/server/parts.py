"""A growing answer -> its parts: the thought, what is said, and calls of tools."""

from __future__ import annotations

import json
from dataclasses import dataclass

from common.demo.openai_server import overlap

THOUGHT_BEGINS = "<think>"
THOUGHT_ENDS = "</think>"
CALL_BEGINS = "<tool_call>"
CALL_ENDS = "</tool_call>"


@dataclass(frozen=True)
class Piece:
    """kind: "reasoning", "content" or "call"; a call has its name, and text is its arguments in
    JSON."""

    kind: str
    text: str
    name: str = ""


class Parts:
    """Splits the text of one answer as it comes; tags that may still become whole wait.

    A call that is no JSON object with a name and arguments is told as content: nothing is lost.
    """

    def __init__(self, thinking: bool, thought_is_open: bool, calls: bool):
        """thinking: <think> has a meaning; thought_is_open: the prompt opened one; calls: the
        request offered tools."""
        self.kind = "reasoning" if thought_is_open else "content"
        self.calls = calls
        self.thinking = thinking
        self.held = ""
        self.begun = False  # something of this kind was told
        self.called = False

    def add(self, text: str, last: bool = False) -> list[Piece]:
        """What is certain with this text too; with `last` all that was held."""
        self.held += text
        found: list[Piece] = []
        while self._step(found):
            pass
        if last:
            self._end(found)
        return [piece for piece in found if piece.text or piece.kind == "call"]

    def _tags(self) -> list[str]:
        """The tags that end what is being read."""
        if self.kind == "reasoning":
            return [THOUGHT_ENDS]
        if self.kind == "call":
            return [CALL_ENDS]
        tags = []
        if self.thinking and not self.begun:
            tags.append(THOUGHT_BEGINS)
        if self.calls:
            tags.append(CALL_BEGINS)
        return tags

    def _step(self, found: list[Piece]) -> bool:
        """Take what stands before the next tag; whether there was one."""
        tags = self._tags()
        places = [(self.held.find(tag), tag) for tag in tags if tag in self.held]
        if not places:
            self._tell_certain(found, tags)
            return False
        place, tag = min(places)
        before = self.held[:place]
        self.held = self.held[place + len(tag) :]
        self._close(found, before, tag)
        return True

    def _tell_certain(self, found: list[Piece], tags: list[str]) -> None:
        """All but what may be the beginning of a tag, or blanks before one; a call waits for its
        end."""
        if self.kind == "call":
            return
        sure = len(self.held) - max((overlap(self.held, tag) for tag in tags), default=0)
        sure = len(self.held[:sure].rstrip()) if tags else sure
        self._tell(found, self.held[:sure])
        self.held = self.held[sure:]

    def _tell(self, found: list[Piece], text: str) -> None:
        if not self.begun:
            text = text.lstrip()  # blanks after a tag
        if text:
            self.begun = True
            found.append(Piece(self.kind, text))

    def _close(self, found: list[Piece], before: str, tag: str) -> None:
        if self.kind == "call":
            found.append(read_call(before))
            self.called |= found[-1].kind == "call"
        else:
            self._tell(found, before.rstrip())
        kinds = {THOUGHT_BEGINS: "reasoning", CALL_BEGINS: "call"}
        self.kind = kinds.get(tag, "content")
        if tag != CALL_ENDS:
            self.begun = False

    def _end(self, found: list[Piece]) -> None:
        text = self.held
        self.held = ""
        if self.kind == "call":  # it never ended
            self.kind = "content"
            text = CALL_BEGINS + text
        self._tell(found, text.rstrip() if self.called else text)


def read_call(text: str) -> Piece:
    """What stands between the tags -> the call, or content where it is none."""
    try:
        call = json.loads(text)
        name = call["name"]
        arguments = call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Piece("content", f"{CALL_BEGINS}{text}{CALL_ENDS}")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Piece("content", f"{CALL_BEGINS}{text}{CALL_ENDS}")
    return Piece("call", json.dumps(arguments, ensure_ascii=False), name)
