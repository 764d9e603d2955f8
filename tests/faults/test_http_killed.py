"""The HTTP process is killed at random moments under a mixed load; nobody's tokens change."""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.kits.load import BODIES, Answer, Crew, ask
from tests.kits.memory import lives
from tests.kits.resuming import read_through
from tests.kits.server import ServerProcess

ENGINE: dict[str, Any] = {"kv_cache_mib": 64, "speculate": "auto", "prefix_cache": True}
GONE_S = 1.0
"""Within which the engine, and with it every page, must be gone."""


class Readers(Crew):
    """Closed-loop clients with resumable streams, over any number of server processes."""

    def __init__(self, url: str, expected: list[Answer], *, size: int, seed: int) -> None:
        super().__init__(size, seed)
        self._url, self._expected = url, expected
        self.wrong: list[str] = []
        self.done = self.cuts = self.tokens = 0

    def _connect(self) -> httpx.Client:
        return httpx.Client(base_url=self._url, timeout=30.0, verify=False)

    def _work(self, worker: int, rng: random.Random) -> None:
        for number in itertools.count():
            if self._stop.is_set():
                return
            index = rng.randrange(len(BODIES))
            cut_after = rng.choice((lambda: None, lambda: rng.randrange(1, 60)))
            try:
                reading = read_through(
                    self._connect, BODIES[index], f"r-{worker}-{number}",
                    cut_after=cut_after, give_up_s=60.0,
                )  # fmt: skip
            except Exception as error:
                self.wrong.append(f"{BODIES[index]}: {error!r}")
                return
            self.done += 1
            self.cuts += reading.cuts
            if reading.answer != self._expected[index] or len(reading.ids) != 1:
                self.wrong.append(f"{BODIES[index]}: {reading} != {self._expected[index]}")
            if reading.error is not None or len(set(reading.calls)) != len(reading.calls):
                self.wrong.append(f"{BODIES[index]}: {reading.error} {reading.calls}")


def kill_http(server: ServerProcess) -> float:
    """SIGKILL; returns the seconds until the engine was gone, too."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait()
    began = time.monotonic()
    while any(map(lives, children)):
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    return time.monotonic() - began


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(4, marks=pytest.mark.timeout(180)),
        pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_killed_at_random_moments_every_token_comes_once(kills: int, tmp_path: Path) -> None:
    seed = int(os.environ.get("TEST_SEED", "1"))
    rng = random.Random(seed)
    settings = {"journal": str(tmp_path / "journal"), "port": free_port(), "resume_s": 30.0}

    def start() -> ServerProcess:
        return ServerProcess("bundled", engine=ENGINE, server=settings, start_timeout_s=90)

    server, gone_s, run_on = start(), [], 0
    try:
        server.wait_ready()
        with server.http() as http:
            expected = [ask(http, body, stream=False) for body in BODIES]
        with Readers(server.url, expected, size=5, seed=seed) as readers:
            for _ in range(kills):
                time.sleep(rng.uniform(0.2, 2.0))
                gone_s.append(kill_http(server))
                server = start()
                if rng.random() < 0.2:  # perhaps while it starts
                    time.sleep(rng.uniform(0.2, 2.0))
                    gone_s.append(kill_http(server))
                    server = start()
                server.wait_ready()
                run_on += sum("run on" in line for line in server.log)
        assert not readers.wrong, (
            f"TEST_SEED={seed}: {len(readers.wrong)} wrong, {readers.wrong[0]}"
        )
        info = server.wait_idle(40.0)
    finally:
        server.stop()
    assert info["engine"]["pages_used"] == 0 and info["outcomes"]["failed"] == 0
    assert readers.done >= kills and readers.cuts >= kills and run_on >= kills // 2
    assert max(gone_s) <= GONE_S, f"TEST_SEED={seed}: an engine outlived its server: {gone_s}"
    print(
        f"{len(gone_s)} kills: {readers.done} answers alike over {readers.cuts} cuts; the engine "
        f"gone after {max(gone_s):.2f} s at most"
    )
