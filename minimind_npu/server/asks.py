"""Bodies of the server's two endpoints, beyond what every OpenAI-compatible server here reads."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from common.demo.openai_request import Ask, Message, Refusal, Sampled, role_of, text_of

MOST_CHOICES = 16
MOST_TOOLS = 128
MOST_PROMPTS = 256
MOST_ALTERNATIVES = 20
FUNCTION_NAME = r"^[A-Za-z0-9_-]{1,64}$"

Name = Annotated[str, Field(pattern=FUNCTION_NAME)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


# ---- tools -------------------------------------------------------------------------------------


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class CalledFunction(Strict):
    name: Name
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChosenFunction(Strict):
    name: Name


class ChosenTool(Strict):
    type: Literal["function"]
    function: ChosenFunction


# ---- the form of the answer --------------------------------------------------------------------


class JsonSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def schema_is_there(self):
        if (self.type == "json_schema") != bool(self.json_schema and self.json_schema.schema_):
            raise ValueError(
                "json_schema with a schema belongs to type json_schema, and only there"
            )
        return self

    def schema_of_answer(self) -> dict | None:
        """The JSON schema that the answer follows; None: any text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}


# ---- chats -------------------------------------------------------------------------------------


def text_or_none(content):
    return None if content is None else text_of(content)


class ChatMessage(Message):
    role: Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(role_of)]
    content: Annotated[str | None, BeforeValidator(text_or_none)] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def says_something(self):
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id belongs to messages of role tool, and only there")
        return self

    def for_template(self) -> dict:
        said = super().for_template()
        said["content"] = self.content or ""
        if self.tool_calls:
            said["tool_calls"] = [call_for_template(call) for call in self.tool_calls]
        return said


def call_for_template(call: ToolCall) -> dict:
    """As transformers' templates expect it: arguments are an object, not its text."""
    function = {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
    return {"type": "function", "function": function}


class ChatAsk(Ask):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    response_format: ResponseFormat | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def alternatives(self) -> int | None:
        """Tokens that are told beside each chosen one; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict]:
        """The tools that the template shows the model."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []]

    @property
    def demanded_tools(self) -> list[Tool]:
        """Tools of which the answer has to call one; none when it may answer in words."""
        if self.tool_choice == "required":
            return self.tools or []
        if isinstance(self.tool_choice, ChosenTool):
            wanted = self.tool_choice.function.name
            return [tool for tool in self.tools or [] if tool.function.name == wanted]
        return []

    @property
    def strict_tools(self) -> bool:
        """Whether calls have to keep to the schemas though the answer may be in words."""
        return bool(self.offered_tools) and any(tool.function.strict for tool in self.tools)

    @property
    def schema(self) -> dict | None:
        """The JSON schema that the answer follows; None: any text."""
        return self.response_format.schema_of_answer() if self.response_format else None

    def check(self) -> None:
        """Refusal 400 for what fields say against each other."""
        if self.top_logprobs and not self.logprobs:
            refuse("top_logprobs", "only allowed when logprobs is true")
        if self.tool_choice not in (None, "none", "auto") and not self.demanded_tools:
            refuse("tool_choice", "names a tool that tools does not have")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            refuse("tools", "two of them have one name")
        if self.demanded_tools and self.schema is not None:
            refuse("response_format", "a demanded tool call has its own form")
        self.check_calls()

    def check_calls(self) -> None:
        """Refusal 400 for results of calls that nobody made, and for arguments that are no JSON."""
        made = set()
        for number, message in enumerate(self.messages):
            for call in message.tool_calls or []:
                made.add(call.id)
                if not is_json_object(call.function.arguments):
                    refuse(f"messages[{number}].tool_calls", "arguments is no JSON object")
            if message.role == "tool" and message.tool_call_id not in made:
                refuse(f"messages[{number}].tool_call_id", "no call before it has this id")


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def refuse(where: str, why: str) -> None:
    raise Refusal(400, f"{where}: {why}", where, "invalid_value")


# ---- texts -------------------------------------------------------------------------------------

TokenId = Annotated[int, Field(ge=0)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


def listed_prompts(prompt: Any):
    """One prompt, or several -> several, each a text or token ids."""
    one = isinstance(prompt, str)
    one |= isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
    return [prompt] if one else prompt


class TextAsk(Sampled):
    """Body of POST /v1/completions, in the shapes of lm-evaluation-harness too."""

    prompt: Annotated[list[str] | list[Ids], BeforeValidator(listed_prompts)] = Field(
        min_length=1, max_length=MOST_PROMPTS
    )
    max_tokens: int | None = Field(16, ge=0)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def check(self) -> None:
        """Refusal 400 for what fields say against each other."""
        if not self.limit and not self.echo:
            refuse("max_tokens", "0 only with echo: there would be nothing to answer")
        if self.echo and self.stream:
            refuse("echo", "not together with stream")
        if self.choices * len(self.prompt) > MOST_PROMPTS:
            refuse("n", f"at most {MOST_PROMPTS} answers to one request")
