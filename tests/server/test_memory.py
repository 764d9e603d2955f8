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

KV_MIB, BESIDES_MIB = 64, 350
PROMPT_TOKENS, PROMPTS_AT_ONCE, CLIENTS = 1500, 30, 64
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


def send_all(server: ServerProcess, bodies: list[tuple[str, bytes]], clients: int) -> Counter[int]:
    """Send everything from so many connections; how often each status came."""
    left = iter(bodies)  # next() on a list's iterator is atomic

    def work(_: int) -> Counter[int]:
        client, statuses = Client(server), Counter[int]()
        for path, content in left:
            statuses[client.post(path, content)] += 1
        return statuses

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(work, range(clients)), Counter[int]())


def fill_every_page(server: ServerProcess, rng: random.Random) -> None:
    """Send prompts nobody has sent until the prefix cache has no page left to take."""
    for _ in range(20):
        engine = server.wait_idle(60)["engine"]
        if engine is not None and engine["pages_cached"] > 0.97 * engine["num_pages"]:
            return
        prompts = [
            [rng.randrange(4, VOCAB) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS_AT_ONCE)
        ]
        bodies = [
            (TEXT, json.dumps({"prompt": prompt, "max_tokens": 1}).encode()) for prompt in prompts
        ]
        send_all(server, bodies, PROMPTS_AT_ONCE)
    raise AssertionError(f"the pages did not fill: {engine}")


def some_hostile(rng: random.Random, count: int) -> list[tuple[str, bytes]]:
    """Half of them the largest, half any."""
    bodies = sorted(((path, body) for _, path, body in hostile_bodies()), key=lambda b: len(b[1]))
    largest = bodies[-count // 2 :]
    return largest + rng.sample(bodies[: -len(largest)], count - len(largest))


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("bundled", start_timeout_s=90, engine={"kv_cache_mib": KV_MIB}) as server:
        yield server


def test_resident_memory_is_weights_pages_and_350_mib_under_any_load(server: ServerProcess) -> None:
    rng = random.Random(0)
    fill_every_page(server, rng)
    send_all(
        server, [(path, json.dumps(fields).encode()) for path, fields in map(mixed, range(8))], 1
    )
    pids = family(server.process.pid)
    assert len(pids) == 4  # HTTP, engine, and the cells of templates and grammars
    load = [(path, json.dumps(fields).encode()) for path, fields in map(mixed, range(48))]
    load += some_hostile(rng, 100)
    rng.shuffle(load)
    with Watch(server.process.pid) as watch:
        statuses = send_all(server, load, CLIENTS)
    assert statuses[200] >= 32 and statuses[400] >= 50, statuses
    limit = server.info()["model"]["weight_bytes"] / 2**20 + KV_MIB + BESIDES_MIB
    assert watch.peak["Rss"] <= limit, watch.of_peak
