"""Hostile bodies get a useful 4xx, and the streams beside them do not notice."""

from __future__ import annotations

import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.kits.server import ServerProcess
from tests.server.hostile import harmless_bodies, hostile_bodies
from tests.server.hostile_grid import ROUTES, Attack, edges, grid

JSON_TYPE = {"Content-Type": "application/json"}


def stream_text(server: ServerProcess, prompt: str, stop: threading.Event) -> list[str]:
    """Stream again and again until told to stop; the texts that came."""
    texts = []
    body = {"prompt": prompt, "max_tokens": 150, "ignore_eos": True, "stream": True}
    with server.http() as http:
        while not stop.is_set():
            text, done = "", False
            with http.stream("POST", "/v1/completions", json=body, timeout=60.0) as reply:
                for line in reply.iter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data: "):
                        text += json.loads(line[6:])["choices"][0]["text"]
            assert done
            texts.append(text)
    return texts


def test_hostile_bodies_get_4xx_while_streams_run_on(server: ServerProcess) -> None:
    stop = threading.Event()
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            results[number] = stream_text(server, f"stream {number} ", stop)
        except Exception as error:
            results[number] = error

    streams = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in streams:
        thread.start()
    wrong, count = [], 0
    with server.http(headers_more=JSON_TYPE) as http:
        for name, path, content in hostile_bodies():
            count += 1
            reply = http.post(path, content=content)
            if problem := complaint(reply):
                wrong.append((name, path, problem))
    stop.set()
    for thread in streams:
        thread.join()
    assert not wrong, f"{len(wrong)} of {count}: {wrong[:20]}"
    assert count >= 200
    for number in range(8):
        prompt = f"stream {number} "
        want = (prompt * 50)[:150]
        assert isinstance(results[number], list), results[number]
        assert results[number] and set(results[number]) == {want}


def complaint(reply: httpx.Response) -> str:
    """What is wrong with a refusal; empty when nothing is."""
    if not 400 <= reply.status_code < 500:
        return f"status {reply.status_code}: {reply.text[:200]}"
    body = reply.json()
    error = body["error"]
    if set(error) != {"message", "type", "param", "code"} or body["request_id"] == "":
        return f"shape {body}"
    message = error["message"]
    if not (15 <= len(message) <= 600 and message.endswith((".", ")"))):
        return f"message {message!r}"
    for leak in ("Traceback", "pydantic", "0x7f", "/src/", "errors.pydantic.dev", "Error("):
        if leak in message:
            return f"leaks {message!r}"
    return ""


def test_bodies_exactly_at_the_limits_are_served(server: ServerProcess) -> None:
    with server.http(headers_more=JSON_TYPE) as http:
        for name, path, content in harmless_bodies():
            reply = http.post(path, content=content)
            assert reply.status_code == 200, (name, reply.text[:300])


@pytest.mark.parametrize("share", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_thousand_hostile_bodies_for_each_route(server: ServerProcess, share: float) -> None:
    """No 5xx, none over 10 s; the fixture sees to the pages."""
    with server.http() as http:
        document = http.get("/openapi.json").json()
    made = [*grid(document), *edges(document)]
    seed = int(os.environ.get("TEST_SEED", "1"))
    attacks = random.Random(seed).sample(made, int(share * len(made)))
    for path in ROUTES:
        bodies = {attack.content for attack in attacks if attack.path == path}
        assert len(bodies) >= 1000
    wrong: list[str] = []
    left = iter(attacks)  # next() on a list's iterator is atomic

    def work(_: int) -> None:
        with server.http(headers_more=JSON_TYPE, timeout=10.0) as http:
            for attack in left:
                try:
                    problem = judgement(attack, http.post(attack.path, content=attack.content))
                except httpx.HTTPError as error:
                    problem = repr(error)
                if problem:
                    wrong.append(f"{attack.path} {attack.name}: {problem}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong, f"{len(wrong)} of {len(attacks)}, TEST_SEED={seed}: {wrong[:20]}"


def judgement(attack: Attack, reply: httpx.Response) -> str:
    """What is wrong with the reply; empty when nothing is."""
    if reply.status_code == 200:
        return "accepted" if attack.outside else ""
    return complaint(reply)
