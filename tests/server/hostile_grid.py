"""Every field of the generation routes with every hostile value, made from the server's document.

`grid` yields bodies, none twice; `edges` those at each limit of the document and one to
either side of it, with whether they lie outside. Both are made, not listed: a field added to
the document is attacked from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.server.hostile import CHAT, GOOD, TEXT

ROUTES = (CHAT, TEXT)
MARK = '"@"'
DEEP, LONG = 10_000, 200_000


class Attack(NamedTuple):
    """A body, and whether only a refusal will do."""

    name: str
    path: str
    content: bytes
    outside: bool = False


def _values() -> dict[str, bytes]:
    """Hostile values as JSON text, or what passes for it."""
    numbers = {
        "minus one": b"-1", "zero": b"0", "minus zero": b"-0.0", "one": b"1", "half": b"0.5",
        "2^31": b"2147483648", "2^53+1": b"9007199254740993", "2^63-1": b"9223372036854775807",
        "2^63": b"9223372036854775808", "-2^63-1": b"-9223372036854775809",
        "10^20": b"1" + b"0" * 20,
        "tiny": b"5e-324", "huge": b"1.7e308", "overflow": b"1e999", "-overflow": b"-1e999",
        "NaN": b"NaN", "Infinity": b"Infinity", "-Infinity": b"-Infinity",
        "million digits": b"9" * 10**6, "million decimals": b"0." + b"3" * 10**6,
        "leading zero": b"007", "plus": b"+1", "hex": b"0x10", "long exponent": b"1e" + b"0" * 60,
    }  # fmt: skip
    texts = {
        "empty": b'""', "space": b'" "', "NUL": b'"\\u0000"', "raw NUL": b'"\x00"',
        "lone surrogate": b'"\\ud800"', "swapped surrogates": b'"\\udc00\\ud800"',
        "byte-order mark": b'"\xef\xbb\xbfa"', "not UTF-8": b'"\xff\xfe"',
        "overlong": b'"\xc0\xaf"', "newline": b'"a\nb"',
        "right to left": '"\u202eabc"'.encode(), "emoji": '"🙂"'.encode(),
        "digits": b'"1"', "path": b'"../../etc/passwd"', "template": b'"{{ 7 * 7 }}"',
        "format": b'"%s%n{0}"', "one character": b'"' + b"a" * LONG + b'"',
        "escapes": b'"' + b"\\u00e9" * 20_000 + b'"', "unclosed": b'"a',
        "marks": b'"' + "e\u0301".encode() * 20_000 + b'"',
    }  # fmt: skip
    others = {
        "null": b"null", "true": b"true", "false": b"false", "empty list": b"[]",
        "empty object": b"{}", "list of nothing": b"[null]", "list of lists": b"[[[]]]",
        "list of numbers": b"[-1,9223372036854775808]", "list of texts": b'["",""]',
        "object": b'{"a":1}', "object of nothing": b'{"":null}',
        "twice": b'{"a":1,"a":2}', "10,000 texts": b"[" + b'"s",' * 9_999 + b'"s"]',
        "10,000 numbers": b"[" + b"7," * 9_999 + b"7]",
        "10,000 names": b"{" + b",".join(b'"%d":1' % i for i in range(10_000)) + b"}",
        "nested 63": b"[" * 62 + b"]" * 62, "nested 65": b"[" * 65 + b"]" * 65,
        "nested 10,000": b"[" * DEEP + b"]" * DEEP,
        "objects 10,000": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "unclosed": b"[" * DEEP, "nothing": b"", "word": b"undefined", "two": b"1,2",
    }  # fmt: skip
    return {f"{kind} {name}": text for kind, values in (("number", numbers), ("text", texts),
            ("other", others)) for name, text in values.items()}  # fmt: skip


def fields_of(document: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """The fields of a route's body, by name, as the document describes them."""
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    return dict(_resolved(document, content["schema"])["properties"])


def grid(document: dict[str, Any]) -> Iterator[Attack]:
    """Each field times each value, on both routes."""
    values = _values()
    for path in ROUTES:
        for field in [*fields_of(document, path), "no such field"]:
            base = {"max_tokens": 1} | GOOD[path] | {field: "@"}
            before, after = json.dumps(base).encode().split(MARK.encode(), 1)
            for name, value in values.items():
                yield Attack(f"{field}: {name}", path, before + value + after)


def edges(document: dict[str, Any]) -> Iterator[Attack]:
    """Each limit, and one to either side; and lists and names at theirs."""
    for path in ROUTES:
        for field, schema in fields_of(document, path).items():
            for value, outside in _at_limits(document, schema):
                body = {"max_tokens": 1} | GOOD[path] | {field: value}
                where = "outside" if outside else "inside"
                name = f"{field}: {where}, {json.dumps(value)[:40]}"
                yield Attack(name, path, json.dumps(body).encode(), outside)


def _at_limits(document: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    """Values at the limits of a schema, each with whether it is outside all alternatives."""
    schema = _resolved(document, schema)
    alternatives = [_resolved(document, each) for each in schema.get("anyOf", [schema])]
    for each in alternatives:
        sole = sum(other.get("type") == each.get("type") for other in alternatives) == 1
        match each.get("type"):
            case "integer" | "number":
                yield from _number_limits(each, sole)
            case "string":
                for name, step in (("minLength", -1), ("maxLength", 1)):
                    if name in each:
                        yield "b" * each[name], False
                        if each[name] + step >= 0:
                            yield "b" * (each[name] + step), sole
            case "array":
                item = _an_item(document, each.get("items", {}))
                for name, step in (("minItems", -1), ("maxItems", 1)):
                    if name in each and item is not None:
                        yield [item] * each[name], False
                        yield [item] * (each[name] + step), sole


def _number_limits(schema: dict[str, Any], sole: bool) -> Iterator[tuple[Any, bool]]:
    step: float = 1 if schema["type"] == "integer" else 1e-6
    for name, sign in (("minimum", -1), ("maximum", 1)):
        if name in schema:
            limit = schema[name]
            yield limit, False
            yield limit - sign * step, False
            yield limit + sign * step, sole
        exclusive = f"exclusive{name.capitalize()}"
        if exclusive in schema:
            yield schema[exclusive], sole
            yield schema[exclusive] - sign * step, False


def _an_item(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    schema = _resolved(document, schema)
    return {"string": "b", "integer": 5, "number": 0.5}.get(str(schema.get("type")))


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        schema = document["components"]["schemas"][name]
    return schema
