"""Bodies meant to hurt, each with the status it must get.

`hostile_bodies` yields ``(name, path, content)``; every one must be answered with a 4xx and a
useful message. `harmless_bodies` lie just inside the limits and must be served.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

CONTEXT = 2048
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
RENDER, END_SESSION = CHAT + "/render", "/v1/sessions/end"
ROUTES = (CHAT, TEXT, TOKENIZE, DETOKENIZE, RENDER, END_SESSION)
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    RENDER: {"messages": [{"role": "user", "content": "hi"}]},
    TEXT: {"prompt": "hi"},
    TOKENIZE: {"prompt": "hi"},
    DETOKENIZE: {"tokens": [1]},
    END_SESSION: {"session_id": "hi"},
}
Body = tuple[str, str, bytes]


def hostile_bodies() -> Iterator[Body]:
    """At least 200 of them."""
    for path in ROUTES:
        for name, content in _raw(path):
            yield name, path, content
    for path in (CHAT, TEXT):
        for name, fields in _fields():
            yield name, path, _with(path, **fields)
    for name, path, fields in _shapes():
        yield name, path, _with(path, **fields)


def _with(path: str, **fields: Any) -> bytes:
    return json.dumps(GOOD[path] | fields).encode()


def _raw(path: str) -> Iterator[tuple[str, bytes]]:
    """What is wrong before any field is looked at."""
    good = json.dumps(GOOD[path])
    field = next(iter(GOOD[path]))
    yield "empty", b""
    yield "spaces", b" \n\t " * 100
    yield "null", b"null"
    yield "list", b"[]"
    yield "empty object", b"{}"
    yield "string", b'"prompt"'
    yield "number", b"7"
    yield "raw NUL", b"\x00" + good.encode()
    yield "NULs", b"\x00" * 10_000
    yield "NUL in a string", good.replace("hi", "h\x00i").encode()[:-1] + b"\x00}"
    yield "byte-order mark", b"\xef\xbb\xbf" + good.encode()
    yield "UTF-16", good.encode("utf-16")
    yield "UTF-16 without mark", good.encode("utf-16-le")
    yield "UTF-32", good.encode("utf-32")
    yield "Latin-1", b'{"%s": "caf\xe9"}' % field.encode()
    yield "overlong UTF-8", b'{"%s": "\xc0\xaf"}' % field.encode()
    yield "encoded surrogate", b'{"%s": "\xed\xa0\x80"}' % field.encode()
    yield "cut UTF-8", b'{"%s": "\xf0\x9f\x99"}' % field.encode()
    yield "lone surrogate", b'{"%s": "\\ud800"}' % field.encode()
    yield "swapped surrogates", b'{"%s": "\\udc00\\ud800"}' % field.encode()
    yield "surrogate in a name", good.encode()[:-1] + b', "\\udfff": 1}'
    yield "nested lists", b'{"%s": %s}' % (field.encode(), b"[" * 10_000 + b"]" * 10_000)
    yield "nested objects", b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    yield "unclosed lists", b"[" * 1_000_000
    yield "unclosed objects", b'{"a":' * 200_000
    yield "closing only", b"]" * 100_000
    yield "mixed brackets", b"[{" * 50_000
    yield "nested beyond the limit", good.encode()[:-1] + b', "x": ' + b"[" * 64 + b"]" * 64 + b"}"
    yield "million digits", good.encode()[:-1] + b', "x": ' + b"9" * 1_000_000 + b"}"
    yield "million decimals", good.encode()[:-1] + b', "x": 0.' + b"1" * 1_000_000 + b"}"
    yield "huge exponent", good.encode()[:-1] + b', "x": 1e999999}'
    yield "minus huge exponent", good.encode()[:-1] + b', "x": -1e400}'
    yield "NaN", good.encode()[:-1] + b', "x": NaN}'
    yield "Infinity", good.encode()[:-1] + b', "x": Infinity}'
    yield "-Infinity", good.encode()[:-1] + b', "x": -Infinity}'
    yield "duplicate field", good.encode()[:-1] + b"," + good.encode()[1:]
    yield "duplicate nested", good.encode()[:-1] + b', "x": {"a": 1, "a": 2}}'
    yield "trailing comma", good.encode()[:-1] + b",}"
    yield "two documents", good.encode() * 2
    yield "single quotes", good.replace('"', "'").encode()
    yield "unclosed string of escapes", b'{"%s": "' % field.encode() + b'\\"' * 400_000
    yield "control character", b'{"%s": "a\nb"}' % field.encode()
    yield "hex number", good.encode()[:-1] + b', "x": 0x10}'
    yield "comment", good.encode()[:-1] + b" /* */}"
    yield "cut off", good.encode()[:-2]
    yield "form", b"prompt=hi&max_tokens=3"
    yield "wrong kind", json.dumps({field: 3}).encode()
    yield "null field", json.dumps({field: None}).encode()
    yield "object for field", json.dumps({field: {"a": 1}}).encode()
    yield "true for field", json.dumps({field: True}).encode()
    yield "unknown model", _with(path, model="other")
    yield "model with NUL", _with(path, model="fa\x00ke")
    yield "model as path", _with(path, model="../../etc/passwd")
    yield "model as number", _with(path, model=1)


def _fields() -> Iterator[tuple[str, dict[str, Any]]]:
    """Values out of range, for both generation routes."""
    ranges: dict[str, list[Any]] = {
        "n": [-1, 0, 17, 2**63, 1.5, "2", True, [1]],
        "max_tokens": [-1, 0, CONTEXT + 1, 2**31, 2**63, -(2**63), 1.5, "5", True],
        "min_tokens": [-1, 2**31, "1"],
        "temperature": [-1, -0.001, 101, 1e300, "1", True, [1]],
        "top_p": [-0.1, 0, 1.001, 1e300, "0.5"],
        "top_k": [-2, 2**31, 2**63, 0.5],
        "min_p": [-0.1, 1.1, "0"],
        "presence_penalty": [-2.1, 2.1, 1e300],
        "frequency_penalty": [-2.1, 2.1, "1"],
        "repetition_penalty": [0, -1, 101, 1e300],
        "seed": [2**63, -(2**63) - 1, 10**30, 1.5, "1"],
        "stop": ["", [""], ["a"] * 17, ["a"] * 10_000, "a" * 257, ["é" * 129], [1], {"a": 1}],
        "stop_token_ids": [[-1], [2**31], [2**63], [259], ["1"], [1] * 1025, 5],
        "logit_bias": [
            {"-1": 1}, {"a": 1}, {"1": 101}, {"1": -101}, {"1": "x"}, {"9999999999": 1}, {"259": 1},
            {"1.5": 1}, {"": 1}, {"٣": 1}, {str(i): 0 for i in range(1025)}, [1], {"1": 1e300},
        ],
        "logprobs": [-1, 21, 2**63, "1"],
        "stream": ["yes", 1, [True]],
        "stream_options": [True, {"include_usage": "yes"}],
        "priority": [2**31, -(2**31) - 1, "high", 0.5],
        "deadline_s": [0, -1, 86401, 1e300, "5"],
        "ttft_s": [0, -1, 86401, 1e300, "5"],
        "tpot_s": [0, -1, 86401, 1e300, "5"],
        "cache_salt": ["x" * 257, "a\x00b", 5],
        "user": ["x" * 257, "a\nb", {}],
        "speculate": ["on", "yes", True],
        "session_id": ["", "x" * 257, "a\nb", "a\x00b", 5, ["a"], {}],
        "session_tool": ["no session", "", "x" * 257, 5],
        "response_format": [
            "json", {"type": "xml"}, {"type": "json_schema"}, {},
            {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
            {"type": "json_schema", "json_schema": {"schema": _deep(33)}},
            {"type": "json_schema", "json_schema": {"schema": {"description": "x" * 70_000}}},
            {"type": "json_schema", "json_schema": {"schema": []}},
        ],
        "regex": ["", "(", "[z-a]", "(a{1000}){1000}{1000}", "(?<=a)b", "\\1", "x" * 65_537],
        "grammar": ["", "start: missing", "start: start", "root ::= x", "x" * 65_537],
        "best_of": [2],
        "echo": [True],
        "suffix": ["x"],
    }  # fmt: skip
    for field, values in ranges.items():
        for number, value in enumerate(values):
            yield f"{field} {number}", {field: value}


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def _shapes() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Limits of one route's own fields."""
    user = {"role": "user", "content": "a"}
    messages: dict[str, Any] = {
        "none": [],
        "too many": [user] * 2049,
        "no role": [{"content": "a"}],
        "unknown role": [{"role": "wizard", "content": "a"}],
        "no content": [{"role": "user"}],
        "null content": [{"role": "user", "content": None}],
        "content as number": [{"role": "user", "content": 5}],
        "content as object": [{"role": "user", "content": {"text": "a"}}],
        "image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "audio": [{"role": "user", "content": [{"type": "input_audio"}]}],
        "part without text": [{"role": "user", "content": [{"type": "text"}]}],
        "message as string": ["hi"],
        "messages as object": {"0": user},
        "user calls a tool": [{"role": "user", "tool_calls": [{
            "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}],
        "name with newline": [user | {"name": "a\nb"}],
        "too long": [{"role": "user", "content": "a" * (CONTEXT + 1)}],
        "far too long": [{"role": "user", "content": " " * (17 * CONTEXT)}],
        "one character": [{"role": "user", "content": "a" * 7_000_000}],
        "legacy function": [user | {"function_call": {"name": "f", "arguments": "{}"}}],
    }  # fmt: skip
    for name, value in messages.items():
        yield f"messages: {name}", CHAT, {"messages": value}
        if name != "too long":
            yield f"render messages: {name}", RENDER, {"messages": value}
    function = {"type": "function", "function": {"name": "f"}}
    tools: dict[str, dict[str, Any]] = {
        "too many": {"tools": [function | {"function": {"name": f"f{i}"}} for i in range(129)]},
        "no name": {"tools": [{"type": "function", "function": {}}]},
        "bad name": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "long name": {"tools": [{"type": "function", "function": {"name": "a" * 65}}]},
        "twice": {"tools": [function, function]},
        "choice unknown": {
            "tools": [function], "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
        "choice word": {"tools": [function], "tool_choice": "always"},
        "choice without tools": {"tool_choice": "required"},
        "with format": {"tools": [function], "response_format": {"type": "json_object"}},
        "parameters as list": {"tools": [function | {"function": {"name": "f", "parameters": []}}]},
        "functions": {"functions": [{"name": "f"}]},
        "logprobs missing": {"top_logprobs": 3},
        "top_logprobs 21": {"logprobs": True, "top_logprobs": 21},
        "both max": {"max_tokens": 3, "max_completion_tokens": 4},
        "template": {"chat_template": "{{ 1 }}"},
        "template option": {"chat_template_kwargs": {"messages": []}},
        "modalities": {"modalities": ["audio"]},
        "reasoning": {"reasoning_effort": "high"},
    }  # fmt: skip
    for name, fields in tools.items():
        yield f"chat: {name}", CHAT, fields
    prompts: dict[str, Any] = {
        "empty": "", "none": [], "empty inside": [[]], "empty text inside": ["a", ""],
        "too many": ["a"] * 129, "negative id": [-1], "id too large": [259], "huge id": [2**63],
        "mixed": ["a", 1], "nested": [[["a"]]], "floats": [1.5], "too long": "a" * CONTEXT,
        "far too long": "a" * (17 * CONTEXT), "one character": "a" * 7_000_000,
        "too many ids": [1] * CONTEXT, "lists too many": [[1]] * 129, "true": [True],
        "one too long of many": ["a"] * 5 + ["b" * CONTEXT],
    }  # fmt: skip
    for name, value in prompts.items():
        yield f"prompt: {name}", TEXT, {"prompt": value}
    yield "no room", TEXT, {"prompt": "a" * 2000, "max_tokens": 49}
    yield "min over max", TEXT, {"min_tokens": 5, "max_tokens": 4}
    yield "n times prompts", TEXT, {"prompt": ["a"] * 128, "n": 16}
    yield "tokenize far too long", TOKENIZE, {"prompt": " " * (17 * CONTEXT)}
    for number, ids in enumerate(([-1], [259], [2**63], ["a"], [1.5], "a", [[1]], [True])):
        yield f"detokenize {number}", DETOKENIZE, {"tokens": ids}


def harmless_bodies() -> Iterator[Body]:
    """Exactly at the limits."""
    edge: list[tuple[str, dict[str, Any]]] = [
        (TEXT, {"n": 16}),
        (TEXT, {"prompt": "a" * (CONTEXT - 1), "max_tokens": 1}),
        (TEXT, {"prompt": ["a"] * 128, "n": 1, "max_tokens": 1}),
        (TEXT, {"stop": ["b" * 256] * 16}),
        (TEXT, {"stop": ["é" * 128]}),
        (TEXT, {"logprobs": 20}),
        (TEXT, {"logit_bias": {str(i % 259).zfill(1 + i // 259): 1 for i in range(1024)}}),
        (TEXT, {"stop_token_ids": [258] * 1024}),
        (TEXT, {"seed": 2**63 - 1}),
        (TEXT, {"seed": -(2**63)}),
        (TEXT, {"temperature": 0}),
        (TEXT, {"temperature": 100, "top_p": 1e-9, "top_k": -1, "min_p": 1}),
        (TEXT, {"prompt": "nul \x00 inside"}),
        (TEXT, {"prompt": "\u202e\ufeff\uffff 🙂"}),
        (TEXT, {"cache_salt": "x" * 256, "user": "y" * 256}),
        (TEXT, {"session_id": "x" * 256, "session_tool": "../\u202e🙂"}),
        (TEXT, {"priority": -(2**31), "deadline_s": 86400}),
        (CHAT, {"messages": [{"role": "user", "content": ""}] * 60, "max_tokens": 1}),
        (CHAT, {"logprobs": True, "top_logprobs": 20}),
        (CHAT, {"tools": [
            {"type": "function", "function": {"name": f"f{i}"}} for i in range(10)
        ], "max_tokens": 2}),
        (CHAT, {"stop": [], "tools": [], "logit_bias": {}}),
        (TOKENIZE, {"prompt": ""}),
        (TOKENIZE, {"prompt": "a" * 16 * CONTEXT}),
        (DETOKENIZE, {"tokens": []}),
    ]  # fmt: skip
    for number, (path, fields) in enumerate(edge):
        yield f"edge {number}", path, _with(path, **fields)
    nested = json.dumps(GOOD[TEXT]).encode()[:-1] + b', "x": ' + b"[" * 63 + b"]" * 63 + b"}"
    yield "as deep as allowed", TEXT, nested
