"""The promise of the how-to: weights, KV pages and 350 MiB, whatever the clients do."""

from __future__ import annotations

import http.client
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.kits.memory import Watch, family
from tests.kits.server import ServerProcess
from tests.server.hostile import CHAT, TEXT, hostile_bodies

KV_MIB, BESIDES_MIB = 256, 350
CLIENTS = 64
VOCAB = 4000
WORDS = [f"{a}{b}" for a in ("sea", "oak", "red", "ten", "far") for b in ("man", "ly", "er", "s")]


def schema(rng: random.Random) -> dict[str, Any]:
    """An object schema nobody has sent before."""
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "minimum": rng.randrange(9)},
        {"type": "string", "maxLength": rng.randint(4, 40)},
        {"enum": rng.sample(WORDS, 5)},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    ]
    names = [f"{rng.choice(WORDS)}_{rng.randrange(10_000)}" for _ in range(rng.randint(2, 8))]
    return {
        "type": "object",
        "properties": {name: rng.choice(kinds) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def prose(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def mixed(number: int) -> tuple[str, dict[str, Any]]:
    """One of the things a client may ask for, the dear ones among them."""
    rng = random.Random(number)
    fields: dict[str, Any] = {"seed": number, "max_tokens": 64, "stream": number % 3 > 0}
    messages = [{"role": "user", "content": prose(rng, 40)}]
    tool = {"type": "function", "function": {"name": "note", "parameters": schema(rng)}}
    made: list[tuple[str, dict[str, Any]]] = [
        (TEXT, {"prompt": prose(rng, 300), "n": 4, "logprobs": 20, "ignore_eos": True}),
        (TEXT, {"prompt": [[rng.randrange(4, VOCAB) for _ in range(500)] for _ in range(3)]}),
        (TEXT, {"prompt": [rng.randrange(4, VOCAB) for _ in range(1800)], "max_tokens": 200}),
        (TEXT, {"prompt": prose(rng, 20), "regex": f"({'|'.join(WORDS[:6])})+ {number}"}),
        (CHAT, {"messages": messages, "response_format": {
            "type": "json_schema", "json_schema": {"name": "s", "schema": schema(rng)}}}),
        (CHAT, {"messages": messages, "tools": [tool], "tool_choice": "required"}),
        (CHAT, {"messages": messages * 8, "logprobs": True, "top_logprobs": 20, "n": 3,
                "frequency_penalty": 0.5, "ignore_eos": True}),
        (TEXT, {"prompt": prose(rng, 200), "max_tokens": 400, "stop": WORDS[:4]}),
    ]  # fmt: skip
    path, chosen = made[number % len(made)]
    return path, fields | chosen


class Client:
    """Sends bodies one after another over one connection and reads replies to their end."""

    def __init__(self, server: ServerProcess) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def post(self, path: str, content: bytes) -> int:
        headers = {"Content-Type": "application/json"}
        try:
            self._connection.request("POST", path, content, headers)
            reply = self._connection.getresponse()
            reply.read()
        except (ConnectionError, http.client.HTTPException):  # refused before it was read
            self._connection.close()
            return 0
        return reply.status


def send_all(server: ServerProcess, bodies: Iterator[tuple[str, bytes]]) -> Counter[int]:
    """Send everything from `CLIENTS` connections; how often each status came."""

    def work(_: int) -> Counter[int]:
        client, statuses = Client(server), Counter[int]()
        for path, content in iter(lambda: next(bodies, None), None):
            statuses[client.post(path, content)] += 1
        return statuses

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(work, range(CLIENTS)), Counter[int]())


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("bundled", start_timeout_s=90, engine={"kv_cache_mib": KV_MIB}) as server:
        yield server


def test_resident_memory_is_weights_pages_and_350_mib_under_any_load(server: ServerProcess) -> None:
    send_all(server, iter([(TEXT, b'{"prompt": "a", "max_tokens": 1}')]))
    info = server.wait_idle()
    engine = info["engine"]
    pids = family(server.process.pid)
    assert len(pids) == 2
    rng = random.Random(0)
    long_prompts = [
        (TEXT, {"prompt": [rng.randrange(4, VOCAB) for _ in range(2000)], "max_tokens": 1})
        for _ in range(engine["num_pages"] * 32 // 2000 + 8)
    ]
    with Watch(pids) as start:
        pass
    print("start", start.peak, start.of_peak)
    with Watch(pids) as full:
        statuses = send_all(server, ((p, json.dumps(f).encode()) for p, f in long_prompts))
    print("full", full.peak, full.of_peak, statuses, server.info()["engine"])
    asked = [(path, json.dumps(fields).encode()) for path, fields in map(mixed, range(200))]
    asked += [(path, content) for _, path, content in hostile_bodies()]
    rng.shuffle(asked)
    with Watch(pids) as load:
        statuses = send_all(server, iter(asked))
    print("load", load.peak, load.of_peak, statuses, server.info()["engine"])
    limit = info["model"]["weight_bytes"] / 2**20 + KV_MIB + BESIDES_MIB
    print(limit)
    assert load.peak["Rss"] < limit
