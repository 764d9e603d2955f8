"""The engine is given notice under a mixed load: another takes over, and no token changes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.kits.load import BODIES, STORY, Crowd, ask
from tests.kits.server import ServerProcess

ENGINE: dict[str, Any] = {"kv_cache_mib": 64, "speculate": "auto", "prefix_cache": True}


class Pauses:
    """Reads one long stream after another and remembers the longest silence within one."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.longest_s = 0.0

    def __enter__(self) -> Pauses:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        body = {"prompt": STORY, "max_tokens": 600, "ignore_eos": True, "stream": True}
        while not self._stop.is_set():
            with (
                self._server.http(timeout=60.0) as http,
                http.stream("POST", "/v1/completions", json=body) as reply,
            ):
                last = None
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        now = time.monotonic()
                        self.longest_s = max(self.longest_s, now - (last or now))
                        last = now
                    if self._stop.is_set():
                        break


def engines(server: ServerProcess) -> list[int]:
    """Process ids of the engines that run."""
    found = []
    for child in psutil.Process(server.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if {"coppice.engine.process", "tests.kits.fake_engine"} & set(child.cmdline()):
                found.append(child.pid)
    return found


def preempt(server: ServerProcess, notice_s: float) -> float:
    """Give notice; seconds until another engine has taken over."""
    before, began = server.info()["engine_pid"], time.monotonic()
    server.process.send_signal(signal.SIGUSR1)
    while True:
        info = server.info()
        if info["engine_pid"] not in (None, before) and info["state"] == "ok":
            return time.monotonic() - began
        assert time.monotonic() - began < notice_s + 30, "".join(server.log)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("notice_s", "times"),
    [
        (0.0, 2),
        (5.0, 2),
        *(pytest.param(s, 20, marks=pytest.mark.slow) for s in (0.0, 0.3, 5.0, 30.0)),
    ],
)
@pytest.mark.timeout(600)
def test_with_notice_every_request_gets_its_tokens(notice_s: float, times: int) -> None:
    seed = int(os.environ.get("TEST_SEED", "1"))
    rng = random.Random(seed)
    settings = {"preempt_notice_s": notice_s}
    with ServerProcess("bundled", engine=ENGINE, server=settings, start_timeout_s=90) as server:
        with server.http() as http:
            expected = [ask(http, body, stream=False) for body in BODIES]
        connect = partial(server.http, timeout=200.0)
        with (
            Crowd(connect, expected, size=4, seed=seed) as crowd,
            Pauses(server) as pauses,
        ):
            time.sleep(1.0)
            calm_s, pauses.longest_s = pauses.longest_s, 0.0
            took = []
            for _ in range(times):
                time.sleep(rng.uniform(0.2, 1.0))
                took.append(preempt(server, notice_s))
            time.sleep(1.0)
        assert not crowd.wrong, f"TEST_SEED={seed}: {len(crowd.wrong)} wrong, {crowd.wrong[0]}"
        info = server.wait_idle(30.0)
        time.sleep(1.5)
        assert len(engines(server)) == 1, "the one before has ended"
    assert crowd.done >= times and info["requests_replayed"] >= times
    assert info["outcomes"]["failed"] == 0 and info["engine"]["pages_used"] == 0
    crowd.saved.require_both()
    if notice_s >= 5.0:
        assert info["engine_restarts"] == 0 and crowd.refused == 0
        assert pauses.longest_s <= 3.0, "the other engine was there in time"
    print(
        f"{notice_s:g} s notice, {times} times: {crowd.done} answers alike, "
        f"{info['requests_replayed']} moved; another engine had them after {max(took):.2f} s at "
        f"most; longest pause of a stream {pauses.longest_s:.2f} s ({calm_s:.2f} s before); "
        f"{crowd.saved}"
    )


def test_an_engine_that_cannot_be_replaced_serves_on(fake_model: Path) -> None:
    """The other engine dies while it loads; nobody is told, and a second notice works."""
    fake = {"step_s": 0.01, "load_s": 1.0}
    body = {"prompt": "abcdefg", "max_tokens": 300, "ignore_eos": True}
    with ServerProcess(fake_model, fake=fake) as server, server.http() as http:
        expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(http.post("/v1/completions", json=body))
        )
        asking.start()
        old = server.info()["engine_pid"]
        server.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        (other,) = set(engines(server)) - {old}
        server.process.send_signal(signal.SIGUSR1)  # a second notice changes nothing
        os.kill(other, signal.SIGKILL)
        asking.join()
        assert answers[0].json()["choices"][0]["text"] == expected
        assert server.info()["engine_pid"] == old
        assert "".join(server.log).count("was not replaced") == 2
        assert preempt(server, 30.0) < 10
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
