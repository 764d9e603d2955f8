"""The HTTP process is killed or told to end under a mixed load; nobody's tokens change."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kits.load import BODIES, ask
from tests.kits.memory import lives
from tests.kits.resuming import Readers, free_port
from tests.kits.server import ServerProcess

ENGINE: dict[str, Any] = {"kv_cache_mib": 64, "speculate": "auto", "prefix_cache": True}
GONE_S = 1.0
"""Within which the engine, and with it every page, must be gone."""
ANSWER_S = 240.0
"""Over any number of lives: a server lives for two seconds, and is back after three to eight."""


def end_http(server: ServerProcess, number: int) -> float:
    """Send a signal that ends it; returns the seconds until the engine was gone, too."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(number)
    server.process.wait(20)
    began = time.monotonic()
    while any(map(lives, children)):
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("kills", "drains"),
    [
        pytest.param(4, 2, marks=pytest.mark.timeout(180)),
        pytest.param(50, 25, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_killed_or_drained_at_random_moments_every_token_comes_once(
    kills: int, drains: int, tmp_path: Path
) -> None:
    seed = int(os.environ.get("TEST_SEED", "1"))
    rng = random.Random(seed)
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * drains
    rng.shuffle(signals)
    settings = {
        "journal": str(tmp_path / "journal"), "port": free_port(), "resume_s": 30.0,
        "drain_s": 0.0,
    }  # fmt: skip

    def start() -> ServerProcess:
        return ServerProcess("bundled", engine=ENGINE, server=settings, start_timeout_s=90)

    server, gone_s, run_on = start(), [], 0
    try:
        server.wait_ready()
        with server.http() as http:
            expected = [ask(http, body, stream=False) for body in BODIES]
        with Readers(
            server.url, BODIES, expected, size=5, seed=seed, give_up_s=ANSWER_S
        ) as readers:
            for number in signals:
                time.sleep(rng.uniform(0.2, 2.0))
                gone_s.append(end_http(server, number))
                assert server.process.returncode == (-number if number == signal.SIGKILL else 0)
                server = start()
                if rng.random() < 0.2:  # perhaps while it starts
                    time.sleep(rng.uniform(0.2, 2.0))
                    gone_s.append(end_http(server, number))
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
    assert readers.done >= kills and readers.cuts >= kills
    assert run_on >= len(signals) // 2 and readers.drains > 0
    readers.saved.require_both()
    assert max(gone_s) <= GONE_S, f"TEST_SEED={seed}: an engine outlived its server: {gone_s}"
    print(
        f"{kills} kills and {drains} drains of {len(gone_s)} starts: {readers.done} answers alike "
        f"over {readers.cuts} cuts, {readers.drains} of them drains; the engine gone after "
        f"{max(gone_s):.2f} s at most; {readers.saved}"
    )
