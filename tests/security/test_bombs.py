"""Templates and grammars that never end, over HTTP: who sent them gets 400, all others tokens."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.kits.fake_model import write_fake_model
from tests.kits.memory import Peaks, command_of, family, lives
from tests.kits.server import ServerProcess

BOMBS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "wide": "{{ 'a' * 9999999999 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}{{ n.x }}",
    "padding": "{{ '%999999999d' % 1 }}{{ 'a'.format(1) }}{{ '{:>999999999}'.format(1) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "joining": "{{ range(99999) | list | join('a' * 99999) }}",
    "replacing": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
}
TEMPLATE = "".join(
    f"{{% if messages[0].content == '{name}' %}}{text}{{% endif %}}" for name, text in BOMBS.items()
)
CAP_S = 1.0
CAP_MIB, FRESH_MIB = 256, 64
"""What a job may take, and what a cell holds before its first, at most."""
CHAT = "/v1/chat/completions"


def cell_pids(server: ServerProcess) -> list[int]:
    pids = family(server.process.pid)
    return [pid for pid in pids if b"coppice.engine.cell" in command_of(pid)]


def require_small(peaks: Peaks) -> None:
    """Each cell, those that had to end too, held no more than it may at any moment."""
    assert peaks.most, "there was a cell"
    for pid, most in peaks.most.items():
        assert most < peaks.before.get(pid, FRESH_MIB) + CAP_MIB, (peaks.before, peaks.most)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_fake_model(tmp_path_factory.mktemp("bombs") / "fake", template=TEMPLATE + "hi")
    with ServerProcess(folder, fake={"step_s": 0.002}) as made:
        ask(made, CHAT, {"messages": [{"role": "user", "content": "warm up"}]})
        yield made


def ask(server: ServerProcess, path: str, body: dict[str, Any]) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    with server.http() as http:
        reply = http.post(path, json={"max_tokens": 4} | body)
    return reply, time.monotonic() - began


class Neighbours(threading.Thread):
    """Asks for completions all the time, and how long the longest answer took."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(daemon=True)
        self._server, self._done = server, threading.Event()
        self.longest_s, self.answered, self.failed = 0.0, 0, 0

    def run(self) -> None:
        while not self._done.is_set():
            reply, took_s = ask(self._server, "/v1/completions", {"prompt": "hello"})
            self.longest_s = max(self.longest_s, took_s)
            self.answered += 1
            self.failed += reply.status_code != 200

    def __enter__(self) -> Neighbours:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_bomb_ends_in_400_and_neighbours_are_answered(
    server: ServerProcess, name: str
) -> None:
    with Neighbours(server) as neighbours, Peaks(lambda: cell_pids(server)) as peaks:
        reply, took_s = ask(server, CHAT, {"messages": [{"role": "user", "content": name}]})
        time.sleep(0.05)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["code"] == "template_error"
    assert took_s < CAP_S + 0.5
    require_small(peaks)
    assert neighbours.answered and not neighbours.failed and neighbours.longest_s < CAP_S


def test_grammars_without_end_are_refused_and_neighbours_are_answered(
    server: ServerProcess,
) -> None:
    bombs: list[dict[str, Any]] = [
        {"regex": "((a{1,900}){1,900}){1,900}x{5,900}(.*y.{300}){9}" + str(number)}
        for number in range(3)
    ]
    bombs += [{"grammar": "start: " + "(" * number + '"a"' + "~1..9999)" * number}
              for number in (20, 60)]  # fmt: skip
    many = {f"p{i}": {"type": "string", "pattern": f"(a|b){{{i},900}}.*"} for i in range(150)}
    schema = {"type": "object", "properties": many}
    bombs += [{"response_format": {"type": "json_schema",
                                   "json_schema": {"name": "s", "schema": schema}}}]  # fmt: skip
    with (
        Neighbours(server) as neighbours,
        Peaks(lambda: cell_pids(server)) as peaks,
        ThreadPoolExecutor(3) as pool,
    ):
        replies = list(pool.map(lambda b: ask(server, "/v1/completions", {"prompt": "a"} | b),
                                bombs))  # fmt: skip
    for reply, took_s in replies:
        assert reply.status_code in (200, 400), reply.text
        assert took_s < len(bombs) * 2.0 + 1
    assert any(reply.status_code == 400 for reply, _ in replies)
    require_small(peaks)
    assert neighbours.answered and not neighbours.failed and neighbours.longest_s < CAP_S


def test_a_renderer_that_hangs_costs_its_own_request_only(server: ServerProcess) -> None:
    """What no meter sees: the process stands still in foreign code."""
    fine = {"messages": [{"role": "user", "content": "fine"}]}
    ask(server, CHAT, fine)  # the one before may have been ended over a bomb
    (pid, *_) = cell_pids(server)
    os.kill(pid, signal.SIGSTOP)
    with Neighbours(server) as neighbours:
        reply, took_s = ask(server, CHAT, {"messages": [{"role": "user", "content": "odd"}]})
        after, _ = ask(server, CHAT, fine)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "template_error")
    assert CAP_S <= took_s < CAP_S + 0.5
    assert after.status_code == 200
    assert neighbours.answered and not neighbours.failed and neighbours.longest_s < CAP_S / 2
    assert pid not in cell_pids(server)


def test_a_renderer_ended_by_the_system_is_nobodys_error(server: ServerProcess) -> None:
    for pid in cell_pids(server):
        os.kill(pid, signal.SIGKILL)
    reply, _ = ask(server, CHAT, {"messages": [{"role": "user", "content": "fine"}]})
    assert reply.status_code == 200
    with server.http() as http:
        made = http.post(CHAT + "/render", content=json.dumps(
            {"messages": [{"role": "user", "content": "fine"}]}),
            headers={"Content-Type": "application/json"})  # fmt: skip
    assert made.json()["prompt"] == "hi"


def test_no_cell_outlives_its_server(tmp_path: Path) -> None:
    for end in (signal.SIGTERM, signal.SIGKILL):
        server = ServerProcess(write_fake_model(tmp_path / end.name), fake={})
        server.wait_ready()
        ask(server, CHAT, {"messages": [{"role": "user", "content": "x"}]})
        ask(server, "/v1/completions", {"prompt": "a", "regex": "a+"})
        cells = [psutil.Process(pid) for pid in cell_pids(server)]
        assert len(cells) == 2
        server.process.send_signal(end)
        server.process.wait(10)
        deadline = time.monotonic() + 2
        while any(map(lives, cells)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
