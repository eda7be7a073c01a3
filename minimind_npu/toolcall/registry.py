"""Tools by name: a function, and the JSON schema that its arguments are checked against first.

    registry = Registry()
    registry.add(weather, {"type": "object", "properties": {"city": {"type": "string"}},
                           "required": ["city"]}, description="查天气")
    registry.call("weather", {"city": "北京"})      # -> text, whatever happens
    registry.schemas                                # for the chat template, and for rows' "tools"

A call may come from any thread. It runs in a thread of its own, so that a function that hangs is
left behind after its time (Python cannot end a thread: a tool with STUCK such calls is not called
any more); what it gives is cut to a size. That protects the loop that calls, not the machine: a
function you add can do whatever this process can. Code that a model wrote belongs in sandbox.py.
"""

from __future__ import annotations

import difflib
import inspect
import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import jsonschema
import referencing
from toolcall.calls import Call

STUCK = 4  # calls of one tool that may hang at a time
LARGEST = 20_000  # characters of the arguments of a call, as JSON
VALIDATOR = jsonschema.Draft202012Validator
FORMATS = VALIDATOR.FORMAT_CHECKER
# keywords that say something and check nothing
ANNOTATIONS = {
    "$anchor",
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "$vocabulary",
    "default",
    "definitions",
    "deprecated",
    "description",
    "else",
    "example",
    "examples",
    "maxContains",
    "minContains",
    "readOnly",
    "then",
    "title",
    "writeOnly",
}
KEYWORDS = ANNOTATIONS | set(VALIDATOR.VALIDATORS)
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTED = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = (
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)


@dataclass
class Tool:
    """seconds: how long a call may take; stuck: calls that still run after that time."""

    name: str
    description: str
    parameters: dict
    function: Callable
    seconds: float
    validator: jsonschema.Validator
    stuck: int = 0


class Registry:
    """seconds: of a call; characters: of what it gives back, the rest is cut off and counted."""

    def __init__(self, seconds: float = 5.0, characters: int = 2000):
        self.seconds = seconds
        self.characters = characters
        self.tools: dict[str, Tool] = {}
        self.lock = threading.Lock()

    def add(
        self,
        function: Callable,
        parameters: dict,
        description: str = "",
        name: str = "",
        seconds: float | None = None,
    ) -> None:
        """A tool; `name` and `description` are by default those of the function.

        function: called with the arguments by name; gives text, or what JSON can hold.
        parameters: a JSON schema (draft 2020-12) of an object.
        Raises ValueError for a name that is taken, a schema that is none, a keyword or format that
        would not be checked, and parameters that the function has not.
        """
        name = name or function.__name__
        description = description or inspect.getdoc(function) or ""
        if not name or not isinstance(name, str):
            raise ValueError("a tool needs a name")
        if name in self.tools:
            raise ValueError(f"{name}: there is a tool of that name already")
        check_schema(name, parameters)
        check_signature(name, function, parameters)
        # an empty registry: a schema never makes this process fetch another one
        validator = VALIDATOR(parameters, registry=referencing.Registry(), format_checker=FORMATS)
        seconds = self.seconds if seconds is None else seconds
        self.tools[name] = Tool(name, description, parameters, function, seconds, validator)

    @property
    def schemas(self) -> list[dict]:
        """The tools as chat templates and rows have them."""
        return [schema_of(tool) for tool in self.tools.values()]

    def problem(self, name: str, arguments: dict) -> str:
        """Why a call would not be made; "" where nothing speaks against it."""
        tool = self.tools.get(name) if isinstance(name, str) else None
        if tool is None:
            return f"no tool {short(name)}; there are: {', '.join(self.tools)}"
        if not isinstance(arguments, dict):
            return "arguments are not an object"
        try:
            if len(json.dumps(arguments, allow_nan=False)) > LARGEST:
                return f"arguments of more than {LARGEST:,} characters"
            error = jsonschema.exceptions.best_match(tool.validator.iter_errors(arguments))
        except Exception as error:  # a $ref that leads nowhere, a circle, no JSON
            return f"arguments cannot be checked: {short(error)}"
        if error is None:
            return ""
        where = ".".join(map(str, error.absolute_path))
        return short(f"{where}: {error.message}" if where else error.message)

    def call(self, name: str, arguments: dict) -> str:
        """What a tool gives, as text; {"error": …} where the call cannot be made, fails or takes
        too long. Never raises."""
        problem = self.problem(name, arguments)
        if problem:
            return error_text(problem)
        tool = self.tools[name]
        if tool.stuck >= STUCK:
            return error_text(f"{name}: {STUCK} calls of it hang; it is not called any more")
        copied = json.loads(json.dumps(arguments))
        answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        is_late = threading.Event()
        work = (tool, copied, answers, is_late)
        threading.Thread(target=self._work, args=work, daemon=True).start()
        try:
            return answers.get(timeout=tool.seconds)
        except queue.Empty:
            pass
        with self.lock:
            if not answers.empty():  # just in time
                return answers.get()
            is_late.set()
            tool.stuck += 1
        return error_text(f"{name}: took longer than {tool.seconds:g} seconds")

    def answer(self, call: Call) -> str:
        """What becomes of a call as a model wrote it."""
        return error_text(call.problem) if call.problem else self.call(call.name, call.arguments)

    def _work(self, tool: Tool, arguments: dict, answers: queue.SimpleQueue, is_late) -> None:
        try:
            text = self._as_text(tool.function(**arguments))
        except BaseException as error:  # a tool may also call exit()
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            text = error_text(kind + short(error))
        with self.lock:
            answers.put(text)
            if is_late.is_set():
                tool.stuck -= 1

    def _as_text(self, given) -> str:
        text = given
        if not isinstance(given, str):
            text = json.dumps(given, ensure_ascii=False, allow_nan=False)
        text = text.encode(errors="replace").decode()  # half of a surrogate pair is no text
        left_out = len(text) - self.characters
        return text if left_out <= 0 else f"{text[: self.characters]}… ({left_out:,} more)"


def schema_of(tool: Tool) -> dict:
    described = {"description": tool.description} if tool.description else {}
    function = {"name": tool.name, **described, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def are_known(tools: list[dict], schemas: list[dict]) -> bool:
    """Whether all tools of a row are among the schemas of a registry, with the same parameters."""
    ours = [(s["function"]["name"], s["function"]["parameters"]) for s in schemas]
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, dict):
            return False
        if (function.get("name"), function.get("parameters")) not in ours:
            return False
    return True


def error_text(problem: str) -> str:
    return json.dumps({"error": problem}, ensure_ascii=False)


def is_error(text: str) -> bool:
    """Whether what a call gave is an error: no tool of yours should begin its text like that."""
    return text.startswith('{"error": ')


def short(thing) -> str:
    text = " ".join(str(thing).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


# ---- schemas -------------------------------------------------------------------------------------


def check_schema(name: str, parameters: dict) -> None:
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise ValueError(f'{name}: parameters have to be a JSON schema of "type": "object"')
    try:
        VALIDATOR.check_schema(parameters)
    except jsonschema.SchemaError as error:
        where = ".".join(map(str, error.absolute_path))
        raise ValueError(f"{name}: no JSON schema: {where}: {short(error.message)}") from None
    for schema in subschemas(parameters):
        check_keywords(name, schema)


def subschemas(schema):
    """A schema and all that stand in it."""
    if not isinstance(schema, dict):
        return
    yield schema
    inner = [schema[key] for key in SINGLE if key in schema]
    for key in LISTED:
        inner += schema.get(key, [])
    for key in NAMED:
        inner += schema.get(key, {}).values()
    for one in inner:
        yield from subschemas(one)


def check_keywords(name: str, schema: dict) -> None:
    """ValueError for what a validator would pass over in silence."""
    for keyword in schema:
        if keyword not in KEYWORDS:
            near = difflib.get_close_matches(keyword, KEYWORDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name}: {keyword!r} is no keyword of JSON schema{hint}")
    form = schema.get("format")
    if form is not None and form not in FORMATS.checkers:
        raise ValueError(
            f"{name}: format {form!r} cannot be checked here; known: {', '.join(FORMATS.checkers)}"
        )


def check_signature(name: str, function: Callable, parameters: dict) -> None:
    """ValueError where the function cannot be called with what the schema allows."""
    names = parameters.get("properties", {})
    required = parameters.get("required", [])
    try:
        signature = inspect.signature(function)
        signature.bind(**dict.fromkeys(names))
        signature.bind(**dict.fromkeys(required))
    except TypeError as error:
        raise ValueError(f"{name}: function and schema do not fit: {error}") from None
