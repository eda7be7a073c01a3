"""Answers that follow a grammar: JSON of a schema, or a call of one of the tools (llguidance)."""

from __future__ import annotations

import json
import threading

import torch
from llguidance import LLMatcher, hf
from server.asks import Tool
from server.parts import CALL_BEGINS, CALL_ENDS, THOUGHT_BEGINS, THOUGHT_ENDS
from torch import Tensor

from common.demo.openai_request import Refusal

ANY_OBJECT = {"type": "object"}
TOKEN = "<["  # how a token by its id begins in Lark text
# as json.dumps writes it: a weak model would fill its answer with the blanks that JSON allows
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes constraints for one tokenizer, which is read once, when the first one is asked for."""

    def __init__(self, tokenizer, vocabulary: int):
        """vocabulary: columns of the model's logits."""
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.lock = threading.Lock()
        self.known = None

    def constraint(self, grammar: str, where: str) -> Constraint:
        """Refusal 400 that names the field `where` for a grammar that cannot be followed."""
        matcher = LLMatcher(self._tokens(), grammar)
        error = matcher.get_error()
        if error:
            raise Refusal(400, f"{where}: {first_line(error)}", where, "invalid_value")
        return Constraint(matcher, self.vocabulary)

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text; a special token its name."""
        return self._tokens().decode_bytes([token])

    def _tokens(self):
        with self.lock:
            if self.known is None:
                self.known = hf.from_tokenizer(self.tokenizer, n_vocab=self.vocabulary)
            return self.known


class Constraint:
    """Which tokens may come next in one answer."""

    def __init__(self, matcher: LLMatcher, vocabulary: int):
        self.matcher = matcher
        self.vocabulary = vocabulary

    @property
    def done(self) -> bool:
        return self.matcher.is_stopped()

    def allowed(self) -> Tensor:
        """bool [V], on the CPU."""
        # little-endian: token 0 is the lowest bit of byte 0
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        places = torch.arange(8, dtype=torch.uint8)
        return ((bits[:, None] >> places) & 1).bool().flatten()[: self.vocabulary]

    def take(self, token: int) -> None:
        self.matcher.consume_token(token)


def first_line(error: str) -> str:
    return error.strip().splitlines()[0][:200]


def json_grammar(tokenizer, schema: dict, thought_is_open: bool) -> str:
    """Lark text of an answer that is JSON of `schema`."""
    return _lark(tokenizer, _json(schema), thought_is_open)


def call_grammar(tokenizer, tools: list[Tool], thought_is_open: bool) -> str:
    """Lark text of an answer that calls one of `tools` as the chat templates write it."""
    call, rule = _call(tokenizer, tools)
    return _lark(tokenizer, call, thought_is_open, rule)


def strict_grammar(tokenizer, tools: list[Tool]) -> str:
    """Lark text of an answer in words, thoughts and calls of `tools`, as many as it likes, whose
    arguments keep to their schemas.

    Refusal 400 for a model whose tags are no tokens: then words could spell a call.
    """
    if not _tag(tokenizer, CALL_BEGINS).startswith(TOKEN):
        told = "tools: strict needs tags that are tokens of the model; demand a call by tool_choice"
        raise Refusal(400, told, "tools", "unsupported_value")
    call, rule = _call(tokenizer, tools)
    marks = [_tag(tokenizer, tag) for tag in (THOUGHT_BEGINS, THOUGHT_ENDS)]
    parts = ["call_of_a_tool", *(mark for mark in marks if mark.startswith(TOKEN))]
    start = f"start: WORDS (({' | '.join(parts)}) WORDS)*"
    return "\n".join([start, r"WORDS: /(.|\n)*/", f"call_of_a_tool: {call}", rule])


def _call(tokenizer, tools: list[Tool]) -> tuple[str, str]:
    """The body of a call of one of `tools`, and the rule that it needs."""
    calls = []
    for tool in tools:
        properties = {
            "name": {"const": tool.function.name},
            "arguments": tool.function.parameters or ANY_OBJECT,
        }
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    begins = _tag(tokenizer, CALL_BEGINS)
    ends = _tag(tokenizer, CALL_ENDS)
    return rf'{begins} "\n" call "\n" {ends}', f"call: {_json(schema)}"


def _json(schema: dict) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': LAYOUT})}"


def _tag(tokenizer, tag: str) -> str:
    """A tag as its token where it is one (which is no text for the grammar), else as text."""
    token = tokenizer.get_added_vocab().get(tag)
    return json.dumps(tag) if token is None else f"{TOKEN}{token}]>"


def _lark(tokenizer, body: str, thought_is_open: bool, *rules: str) -> str:
    if not thought_is_open:
        return "\n".join([f"start: {body}", *rules])
    ends = _tag(tokenizer, THOUGHT_ENDS)
    thought = r"thought[lazy]: /(.|\n)*<\/think>/"
    if ends.startswith(TOKEN):
        thought = rf"thought: /(.|\n)*/ {ends}"
    return "\n".join(["start: thought /\\n*/ body", thought, f"body: {body}", *rules])
