"""Checks of answers: the protocol's promises, and the same request giving the same answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.scorecard.check import check, expect
from benchmarks.scorecard.subjects import Running

STORY = "It was the best of times, it was the worst of times, it was the age of wisdom, "
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
SAY = [{"role": "user", "content": "Tell me about the sea."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GREEDY: dict[str, Any] = {"prompt": STORY, "max_tokens": 32, "temperature": 0}
SAMPLED: dict[str, Any] = {"prompt": STORY, "max_tokens": 32, "temperature": 1.0, "seed": 7}


def ok(server: Running, path: str, **fields: Any) -> dict[str, Any]:
    """The body of a 200."""
    reply = server.post(path, **fields)
    expect(reply.status_code == 200, f"answered {reply.status_code}: {reply.text[:120]}")
    body: dict[str, Any] = reply.json()
    return body


def text(server: Running, **fields: Any) -> str:
    """A completion's text."""
    return str(ok(server, COMPLETE, **fields)["choices"][0]["text"])


def events(server: Running, path: str, **fields: Any) -> list[str]:
    """Data of a stream's events."""
    with (
        server.client() as http,
        http.stream("POST", path, json=fields | {"stream": True}) as reply,
    ):
        expect(reply.status_code == 200, f"answered {reply.status_code}")
        return [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]


def streamed(server: Running, path: str, **fields: Any) -> str:
    """A stream's text put together."""
    parts = []
    for data in events(server, path, **fields):
        if data != "[DONE]":
            for choice in json.loads(data)["choices"]:
                parts.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
    return "".join(parts)


@check("protocol", "/v1/models names a model")
def _models(server: Running) -> None:
    with server.client() as http:
        body = http.get("/v1/models").json()
    expect(body["object"] == "list" and bool(body["data"][0]["id"]), str(body)[:120])


@check("protocol", "a completion has text, a finish reason and usage that adds up")
def _completion(server: Running) -> None:
    body = ok(server, COMPLETE, **GREEDY, ignore_eos=True)
    usage = body["usage"]
    expect(body["choices"][0]["finish_reason"] == "length", "finish_reason is not length")
    expect(usage["completion_tokens"] == 32, f"usage says {usage}")
    expect(usage["total_tokens"] == usage["prompt_tokens"] + 32, f"usage says {usage}")


@check("protocol", "a chat reply is an assistant's message")
def _chat(server: Running) -> None:
    choice = ok(server, CHAT, messages=SAY, max_tokens=16)["choices"][0]
    expect(choice["message"]["role"] == "assistant", str(choice)[:120])
    expect(isinstance(choice["message"]["content"], str), "no content")


@check("protocol", "a streamed completion says what the whole one says")
def _stream(server: Running) -> None:
    expect(streamed(server, COMPLETE, **GREEDY) == text(server, **GREEDY), "texts differ")


@check("protocol", "a streamed sampled chat says what the whole one says")
def _stream_chat(server: Running) -> None:
    fields = {"messages": SAY, "max_tokens": 32, "seed": 3, "temperature": 0.9}
    whole = ok(server, CHAT, **fields)["choices"][0]["message"]["content"]
    expect(streamed(server, CHAT, **fields) == whole, "texts differ")


@check("protocol", "a stream ends with [DONE] after one finish reason")
def _done(server: Running) -> None:
    data = events(server, CHAT, messages=SAY, max_tokens=8)
    expect(data[-1] == "[DONE]", f"ends with {data[-1][:60]}")
    reasons = [c["finish_reason"] for d in data[:-1] for c in json.loads(d)["choices"]]
    expect(len([r for r in reasons if r]) == 1, f"finish reasons {reasons}")


@check("protocol", "include_usage brings usage in the last event, with no choices")
def _usage(server: Running) -> None:
    data = events(
        server, COMPLETE, **GREEDY, ignore_eos=True, stream_options={"include_usage": True}
    )
    last = json.loads(data[-2])
    expect(last["choices"] == [] and last["usage"]["completion_tokens"] == 32, data[-2][:120])


@check("protocol", "a stop string ends the text and is not in it")
def _stop(server: Running) -> None:
    whole = text(server, **GREEDY)
    stop = whole[len(whole) // 2 :][:4]
    body = ok(server, COMPLETE, **GREEDY, stop=[stop])["choices"][0]
    expect(body["text"] == whole[: whole.index(stop)], f"{body['text']!r} of {whole!r}")
    expect(body["finish_reason"] == "stop", "finish_reason is not stop")


@check("protocol", "n=3 brings three different choices")
def _n(server: Running) -> None:
    choices = ok(server, COMPLETE, **SAMPLED, n=3)["choices"]
    expect(len({c["text"] for c in choices}) == 3, f"{len(choices)} choices")
    expect([c["index"] for c in choices] == [0, 1, 2], "wrong indices")


@check("protocol", "a list of prompts brings a choice for each")
def _prompts(server: Running) -> None:
    choices = ok(server, COMPLETE, **GREEDY | {"prompt": ["Red", "Green"]})["choices"]
    expect([c["index"] for c in choices] == [0, 1], f"{len(choices)} choices")


@check("protocol", "chat logprobs: one entry a token, the chosen one among the top")
def _logprobs(server: Running) -> None:
    fields = {"messages": SAY, "max_tokens": 8, "temperature": 0}
    choice = ok(server, CHAT, **fields, logprobs=True, top_logprobs=3)["choices"][0]
    entries = choice["logprobs"]["content"]
    expect(1 <= len(entries) <= 8, f"{len(entries)} entries")
    for entry in entries:
        top = [t["token"] for t in entry["top_logprobs"]]
        expect(entry["logprob"] <= 0 and entry["token"] in top, str(entry)[:120])


@check("protocol", "a JSON schema is obeyed")
def _schema(server: Running) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    body = ok(server, CHAT, messages=SAY, max_tokens=200, seed=3, response_format=wanted)
    made = json.loads(body["choices"][0]["message"]["content"])
    expect(set(made) == {"name", "age"} and isinstance(made["age"], int), str(made))


@check("protocol", "a required tool is called with arguments of its schema")
def _tool(server: Running) -> None:
    tool = {"type": "function", "function": {"name": "greet", "parameters": SCHEMA}}
    body = ok(server, CHAT, messages=SAY, max_tokens=250, seed=3, tools=[tool],
              tool_choice="required", parallel_tool_calls=False)  # fmt: skip
    calls = body["choices"][0]["message"].get("tool_calls") or []
    expect(len(calls) == 1 and calls[0]["function"]["name"] == "greet", str(body)[:160])
    expect("age" in json.loads(calls[0]["function"]["arguments"]), "wrong arguments")


def crowd(server: Running, fields: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ask all at once; bodies in order."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda f: ok(server, COMPLETE, **f), fields))


def _alike(server: Running, fields: dict[str, Any]) -> None:
    """The same choices alone, and among seven others of other lengths, three times."""
    alone = ok(server, COMPLETE, **fields)["choices"]
    others = [{"prompt": "A ship " * (5 + 9 * i), "max_tokens": 24, "seed": i} for i in range(7)]
    for _ in range(3):
        found = crowd(server, [fields, *others])[0]["choices"]
        expect(found == alone, f"{str(found)[:100]} was {str(alone)[:100]} alone")


@check("same answer", "sampled twice with one seed")
def _seed(server: Running) -> None:
    expect(text(server, **SAMPLED) == text(server, **SAMPLED), "texts differ")


@check("same answer", "greedy, alone and among others")
def _greedy(server: Running) -> None:
    _alike(server, GREEDY | {"max_tokens": 64})


@check("same answer", "sampled, alone and among others")
def _sampled(server: Running) -> None:
    _alike(server, SAMPLED | {"max_tokens": 64})


@check("same answer", "log-probabilities to the last bit, alone and among others")
def _bits(server: Running) -> None:
    _alike(server, SAMPLED | {"logprobs": 3})


@check("same answer", "log-probabilities to the last bit, on a cold and on a cached prompt")
def _cached(server: Running) -> None:
    fields = SAMPLED | {"prompt": "Never seen before: " + STORY * 12, "logprobs": 2}
    cold, warm = (ok(server, COMPLETE, **fields)["choices"] for _ in range(2))
    expect(cold == warm, f"{str(warm)[:100]} was {str(cold)[:100]}")
