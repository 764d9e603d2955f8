"""The whole server with the bundled model: what only a real engine can show."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from typing import Any

import pytest

from tests.kits.server import ServerProcess

PROMPT = "It was the best of times, it was the worst of times,"
SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bundled() -> Iterator[ServerProcess]:
    with ServerProcess("bundled", start_timeout_s=90, engine={"kv_cache_mib": 64}) as server:
        yield server
        server.wait_idle()


def complete(server: ServerProcess, **fields: Any) -> Any:
    fields = {"prompt": PROMPT, "max_tokens": 24, "seed": 5} | fields
    return server.client().completions.create(model="bundled", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0}, {"n": 2}, {"stop": ["the", "\n"]}, {"logprobs": 3},
        {"frequency_penalty": 1.0, "presence_penalty": 0.5, "temperature": 0.7},
        {"extra_body": {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2}},
    ],
    ids=str,
)  # fmt: skip
def test_streamed_equals_unstreamed(bundled: ServerProcess, fields: dict[str, Any]) -> None:
    whole = complete(bundled, **fields)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in complete(bundled, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


def test_same_request_same_tokens_alone_and_in_a_crowd(bundled: ServerProcess) -> None:
    alone = complete(bundled).choices[0].text
    with ThreadPoolExecutor(6) as pool:
        crowd = list(pool.map(lambda i: complete(bundled, seed=5 if i % 2 else i), range(6)))
    assert {reply.choices[0].text for reply in crowd[1::2]} == {alone}


def test_a_repeated_prompt_is_read_from_the_cache(bundled: ServerProcess) -> None:
    prompt = PROMPT * 8
    complete(bundled, prompt=prompt, max_tokens=2)
    usage = complete(bundled, prompt=prompt, max_tokens=2).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    salted = complete(bundled, prompt=prompt, max_tokens=2, extra_body={"cache_salt": "mine"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_usage_by_tenant_is_in_the_metrics(bundled: ServerProcess) -> None:
    def generated() -> float:
        with bundled.http() as http:
            lines = http.get("/metrics").text.splitlines()
        start = 'coppice_tenant_tokens_total{key="anonymous",kind="generated",tenant="default"}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(start))

    complete(bundled, extra_body={"ignore_eos": True})
    bundled.wait_idle()
    before = generated()
    complete(bundled, extra_body={"ignore_eos": True, "ttft_s": 5.0, "tpot_s": 0.5})
    deadline = time.monotonic() + 5
    while generated() < before + 24 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert generated() == before + 24


def test_schema_is_obeyed(bundled: ServerProcess) -> None:
    reply = bundled.client().chat.completions.create(
        model="bundled",
        messages=[{"role": "user", "content": "Who?"}],
        max_tokens=200,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    )
    made = json.loads(reply.choices[0].message.content or "")
    assert set(made) == {"name", "age"} and isinstance(made["age"], int)


def test_a_required_tool_is_called(bundled: ServerProcess) -> None:
    function: Any = {"name": "greet", "parameters": SCHEMA, "strict": True}
    choice = bundled.client().chat.completions.create(
        model="bundled",
        messages=[{"role": "user", "content": "Greet."}],
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=250,
        seed=3,
    ).choices[0]  # fmt: skip
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "greet"
    assert set(json.loads(call.function.arguments)) == {"name", "age"}


def test_regex_is_obeyed(bundled: ServerProcess) -> None:
    text = complete(bundled, extra_body={"regex": "(yes|no), [0-9]{3}"}).choices[0].text
    assert text[:3] in ("yes", "no,") and text[-3:].isdigit()


def test_a_grammar_that_grows_too_complex_is_the_requests_own_fault(
    bundled: ServerProcess,
) -> None:
    body = {
        "prompt": PROMPT, "max_tokens": 600, "min_tokens": 599, "stream": False,
        "grammar": 'start: e\ne: e e | e e e | "a" | "b"',
    }  # fmt: skip
    with bundled.http() as http:
        whole = http.post("/v1/completions", json=body)
        assert whole.status_code == 400, whole.text
        assert whole.json()["error"]["code"] == "grammar_error"
        assert "too complex" in whole.json()["error"]["message"]
        streamed = http.post("/v1/completions", json=body | {"stream": True})
    assert streamed.status_code == 200 and '"grammar_error"' in streamed.text


def test_pages_return_when_clients_leave(bundled: ServerProcess) -> None:
    body = {"prompt": PROMPT * 20, "max_tokens": 1200, "ignore_eos": True, "stream": True}
    with bundled.http() as http:
        for wait_s in (0.0, 0.03, 0.15):
            with http.stream("POST", "/v1/completions", json=body):
                time.sleep(wait_s)
    info = bundled.wait_idle()
    assert info["engine"]["pages_used"] == 0
    assert info["outcomes"]["cancelled"] >= 3


def test_http_process_stays_small_and_free_of_torch(bundled: ServerProcess) -> None:
    import psutil

    process = psutil.Process(bundled.process.pid)
    maps = {entry.path for entry in process.memory_maps()}
    assert not [path for path in maps if "libtorch" in path]
    assert process.memory_info().rss < 250 << 20


def test_a_reader_that_stands_still_parks_its_request_and_loses_nothing(
    bundled: ServerProcess,
) -> None:
    body = {
        "model": "bundled", "prompt": PROMPT, "max_tokens": 1900, "seed": 5, "logprobs": 20,
        "n": 4, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    data = json.dumps(body).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data)
    )
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect(("127.0.0.1", bundled.port))
        before = bundled.wait_idle()["engine"]["generated_tokens"]
        client.sendall(head + data)
        bundled.wait_until(lambda info: info["engine"]["generated_tokens"] > before, 60)
        bundled.wait_until(
            lambda info: not (info["engine"]["running"] or info["engine"]["waiting"]), 60
        )
        held = bundled.info()
        assert held["outcomes"]["in_flight"] == 1, "it ended before it could be parked"
        assert held["engine"]["pages_used"] == 0
        reply = HTTPResponse(client)
        reply.begin()
        received = reply.read()
    texts = dict.fromkeys(range(4), "")
    for line in received.split(b"data: ")[1:]:
        event = line.split(b"\n\n")[0]
        if event != b"[DONE]":
            for choice in json.loads(event)["choices"]:
                texts[choice["index"]] += choice["text"]
    whole = complete(bundled, max_tokens=1900, n=4, extra_body={"ignore_eos": True})
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_only_what_a_client_asked_for_counts_as_a_deadline(bundled: ServerProcess) -> None:
    def ended_and_wished(info: dict[str, Any]) -> tuple[int, int]:
        usage = info["engine"]["usage"]
        wished = sum(u["deadlines_met"] + u["deadlines_missed"] for u in usage)
        return sum(u["sequences"] for u in usage), wished

    complete(bundled)
    bundled.wait_idle()
    ended, wished = ended_and_wished(bundled.info())
    complete(bundled)
    bundled.wait_until(lambda info: ended_and_wished(info) == (ended + 1, wished))
    complete(bundled, extra_body={"deadline_s": 60})
    bundled.wait_until(lambda info: ended_and_wished(info) == (ended + 2, wished + 1))
