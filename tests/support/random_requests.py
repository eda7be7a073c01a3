"""Requests made from an OpenAPI schema, most of them wrong in some place, and an ASGI client that leaves when it has
waited for long enough."""

from __future__ import annotations

import asyncio
import json
import random
from urllib.parse import quote, urlencode

RARE = [
    None, True, False, 0, -1, 1, 2**63, -(2**63), 1e308, 0.5, "", " ", "\0", "\n", "../../etc/passwd", "..", "/",
    "/etc/passwd", "~", "%2e%2e%2f", "a" * 5000, "丹谱", "\u202e", "; rm -rf /", "$(id)", "`id`", "| cat", "--output_dir",
    "<script>", [], {}, [[]], [None], {"": None}, {"a": {"b": [1]}}, "0001", "tiny", "stub", "train.py", "1e999", "NaN",
]  # fmt: skip
BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"NaN",
    b'{"a": NaN}',
    b"\xff\xfe",
    b'{"a": "\\ud800"}',
    b"[" * 5000,
    b"\0" * 100,
]


def described(endpoints: dict[str, type], reads: tuple[str, ...]) -> dict:
    """An OpenAPI schema of endpoints that are posted to, by the pydantic models of their bodies, and of those that are
    only read."""
    schemas = {}
    paths: dict[str, dict] = {path: {"get": {}} for path in reads}
    for path, kind in endpoints.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        paths[path] = {
            "post": {"requestBody": {"content": {"application/json": {"schema": schema}}}}
        }
    return {"paths": paths, "components": {"schemas": schemas}}


class Maker:
    """known: name of a field or parameter -> values that mean something to the app; of an object without known names
    the names themselves. odd: share of values that do not fit; optional: of fields that need not be there, but for those
    in `always`."""

    def __init__(
        self,
        schema: dict,
        seed: int,
        known: dict[str, list],
        odd: float = 0.08,
        optional: float = 0.4,
        always: tuple[str, ...] = (),
    ):
        self.schema = schema
        self.random = random.Random(seed)
        self.known = known
        self.odd = odd
        self.optional = optional
        self.always = always
        self.operations = [
            (method, path, what)
            for path, methods in schema["paths"].items()
            for method, what in methods.items()
            for _ in range(4 if "requestBody" in what else 1)  # where most can be wrong
        ]

    def request(self) -> tuple[str, str, dict, bytes]:
        """(method, path with its query, headers, body)."""
        method, path, what = self.random.choice(self.operations)
        query = {}
        headers = {"host": "127.0.0.1", "content-type": "application/json"}
        for one in what.get("parameters", []):
            value = self.value(one.get("schema", {}), one["name"])
            if one["in"] == "path":
                path = path.replace(f"{{{one['name']}}}", quote(str(value), safe=""))
            elif one["in"] == "query" and (one.get("required") or self.chance(0.5)):
                query[one["name"]] = value
            elif one["in"] == "header" and self.chance(0.5):
                headers[one["name"]] = quote(str(value))
        if self.chance(0.1):
            query[str(self.random.choice(RARE))] = self.random.choice(RARE)
        for name in [name for name in query if self.chance(0.05)]:
            del query[name]
        if self.chance(0.05):
            method = self.random.choice(
                ["get", "post", "delete", "put", "options", "head", "patch"]
            )
        if self.chance(0.03):
            path = path + self.random.choice(["/", "/..", "//", "/%00", "?", "/x"])
        text = urlencode(query, errors="replace")
        return method.upper(), f"{path}?{text}" if text else path, headers, self.body(what)

    def body(self, what: dict) -> bytes:
        if "requestBody" not in what:
            return self.random.choice(BODIES) if self.chance(0.2) else b""
        if self.chance(self.odd):
            return self.random.choice(BODIES)
        content = next(iter(what["requestBody"]["content"].values()))
        return json.dumps(self.value(content["schema"])).encode()

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def value(self, schema: dict, name: str = "", depth: int = 0):
        """One that fits, unless it does not."""
        if self.chance(self.odd) or depth > 6:
            return self.random.choice(RARE)
        known = self.known.get(name)
        if known and schema.get("type") not in ("array", "object"):
            return self.random.choice(known)
        if "$ref" in schema:
            found = self.schema
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            return self.value(found, name, depth)
        for several in ("anyOf", "oneOf", "allOf"):
            if several in schema:
                return self.value(self.random.choice(schema[several]), name, depth)
        if "enum" in schema or "const" in schema:
            return self.random.choice(schema.get("enum") or [schema["const"]])
        kind = schema.get("type")
        if kind == "object":
            return self.object(schema, name, depth)
        if kind == "array":
            count = self.random.randint(schema.get("minItems", 0), 3)
            return [self.value(schema.get("items", {}), name, depth + 1) for _ in range(count)]
        plain = {
            "integer": lambda: self.random.choice([0, 1, 2, 5, 100]),
            "number": lambda: self.random.choice([0, 0.5, 1, 3.7]),
            "boolean": lambda: self.chance(0.5),
            "null": lambda: None,
        }
        if kind in plain:
            return plain[kind]()
        return self.random.choice(RARE)

    def wanted(self, field: str, needed: list[str]) -> float:
        if field in needed:
            return 0.97
        return 0.9 if field in self.always else self.optional

    def object(self, schema: dict, name: str, depth: int) -> dict:
        needed = schema.get("required", [])
        found = {
            field: self.value(one, field, depth + 1)
            for field, one in schema.get("properties", {}).items()
            if self.chance(self.wanted(field, needed))
        }
        if schema.get("additionalProperties") and self.chance(0.7):
            for _ in range(self.random.randrange(3)):
                field = str(self.random.choice(self.known.get(name, RARE)))
                found[field] = self.value({}, field, depth + 1)
        elif self.chance(0.05):
            found["surplus"] = self.random.choice(RARE)
        return found


async def call(
    app, method: str, target: str, headers: dict, body: bytes, patience: float = 0.3
) -> int:
    """The status of an ASGI app's answer, 0 where the client left before; it leaves after `patience`
    seconds without a new piece of the answer."""
    path, _, query = target.partition("?")
    head = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    if body:
        head.append((b"content-length", b"%d" % len(body)))
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": decoded(path), "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": head, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    given = [{"type": "http.request", "body": body, "more_body": False}]
    status = 0
    now = asyncio.get_running_loop().time
    heard = now()

    async def receive():
        if given:
            return given.pop()
        while now() - heard < patience:
            await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message):
        nonlocal status, heard
        heard = now()
        if message["type"] == "http.response.start":
            status = message["status"]

    await app(scope, receive, send)
    return status


def decoded(path: str) -> str:
    from urllib.parse import unquote

    return unquote(path)


def ask_many(
    app, maker: Maker, count: int, patience: float = 0.3, together: int = 8
) -> list[tuple[int, tuple]]:
    """(status, request) of `count` random requests, some at a time; an exception of the app is one here."""

    async def all_of_them():
        found = []
        left = [maker.request() for _ in range(count)]

        async def work():
            while left:
                request = left.pop()
                status = await asyncio.wait_for(call(app, *request, patience=patience), 60)
                found.append((status, request))

        await asyncio.gather(*(work() for _ in range(together)))
        return found

    return asyncio.run(all_of_them())
