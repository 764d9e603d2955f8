"""Checks of bad input: refused as the client's fault, in the error shape, and still alive."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx

from benchmarks.scorecard.answers import CHAT, COMPLETE, SAY
from benchmarks.scorecard.check import check, expect
from benchmarks.scorecard.subjects import Running

JSON = {"Content-Type": "application/json"}
LIMIT_S = 10.0
Statuses = tuple[int, ...]


def refused(
    server: Running,
    path: str,
    body: bytes,
    *,
    headers: dict[str, str] | None = None,
    statuses: Statuses = (400, 413, 422),
) -> None:
    """The body is refused within `LIMIT_S` with one of the statuses, and the server lives."""
    try:
        with server.client(LIMIT_S) as http:
            reply = http.post(path, content=body, headers=JSON | (headers or {}))
    except httpx.TimeoutException:
        alive = server.works()
        raise AssertionError(f"no answer in {LIMIT_S:g} s; alive after it: {alive}") from None
    except httpx.WriteError:
        expect(server.works(), "dead after it")  # refused while the body was on its way
        return
    expect(server.works(), "dead after it")
    expect(reply.status_code in statuses, f"answered {reply.status_code}: {reply.text[:80]}")
    error = reply.json().get("error")
    expect(isinstance(error, dict) and bool(error.get("message")), f"said {reply.text[:80]}")


def completion(**fields: Any) -> bytes:
    """A completion's body, right but for the fields."""
    return json.dumps({"prompt": "a", "max_tokens": 4} | fields).encode()


BODIES: dict[str, tuple[str, bytes]] = {
    "what is no JSON": (COMPLETE, b'{"prompt": "a",'),
    "JSON nested 10,000 deep": (
        COMPLETE, b'{"prompt":"a","x":' + b"[" * 10000 + b"]" * 10000 + b"}",
    ),
    "a number of a million digits": (
        COMPLETE, b'{"prompt":"a","max_tokens":' + b"9" * 10**6 + b"}",
    ),
    "NaN as a number": (COMPLETE, b'{"prompt":"a","max_tokens":4,"temperature":NaN}'),
    "no prompt": (COMPLETE, b'{"max_tokens":4}'),
    "max_tokens that is text": (COMPLETE, completion(max_tokens="many")),
    "max_tokens of -5": (COMPLETE, completion(max_tokens=-5)),
    "temperature of -1": (COMPLETE, completion(temperature=-1)),
    "top_p of 7": (COMPLETE, completion(top_p=7)),
    "n of 0": (COMPLETE, completion(n=0)),
    "n of a billion": (COMPLETE, completion(n=10**9)),
    "logprobs of a million": (COMPLETE, completion(logprobs=10**6)),
    "10,000 stop strings": (COMPLETE, completion(stop=[f"s{i}" for i in range(10000)])),
    "a logit bias for what is no token": (COMPLETE, completion(logit_bias={"not a token": 5})),
    "a prompt longer than the context": (COMPLETE, completion(prompt="word " * 40000)),
    "no messages": (CHAT, b'{"messages":[],"max_tokens":4}'),
    "a role nobody knows": (CHAT, b'{"messages":[{"role":"king","content":"a"}],"max_tokens":4}'),
    "a schema of a type nobody knows": (
        CHAT,
        json.dumps(
            {
                "messages": SAY, "max_tokens": 4,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": {"type": "tree"}},
                },
            }
        ).encode(),
    ),
    "a schema that refers to itself without end": (
        CHAT,
        json.dumps(
            {
                "messages": SAY, "max_tokens": 4,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "s",
                        "schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
                    },
                },
            }
        ).encode(),
    ),
}  # fmt: skip


def _register(name: str, path: str, body: bytes) -> None:
    @check("bad input", f"refuses {name}")
    def ask(server: Running) -> None:
        refused(server, path, body)


for _name, (_path, _body) in BODIES.items():
    _register(_name, _path, _body)


@check("bad input", "refuses a body of 64 MiB")
def _large(server: Running) -> None:
    refused(server, COMPLETE, completion(prompt="a" * (64 << 20)), statuses=(400, 413))


@check("bad input", "refuses a compressed body it does not unpack")
def _compressed(server: Running) -> None:
    body = gzip.compress(completion())
    refused(server, COMPLETE, body, headers={"Content-Encoding": "gzip"}, statuses=(400, 415))


@check("bad input", "an unknown route is 404 in the error shape")
def _route(server: Running) -> None:
    refused(server, "/v1/nothing", completion(), statuses=(404,))


@check("bad input", "lone surrogates and NULs bring no 5xx")
def _surrogates(server: Running) -> None:
    with server.client(LIMIT_S) as http:
        for prompt in (b'"\\ud800 a"', b'"a\\u0000b"', b'"\xff\xfe"'):
            body = b'{"prompt":' + prompt + b',"max_tokens":2}'
            reply = http.post(COMPLETE, content=body, headers=JSON)
            expect(reply.status_code < 500, f"{prompt!r}: {reply.status_code} {reply.text[:80]}")
    expect(server.works(), "dead after it")
