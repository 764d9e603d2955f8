"""The engine is killed at random moments under a mixed load; nobody's tokens change."""

from __future__ import annotations

import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.kits.injector import kill_engine
from tests.kits.load import BODIES, Crowd, ask
from tests.kits.server import ServerProcess

ENGINE: dict[str, Any] = {"kv_cache_mib": 64, "speculate": "auto", "prefix_cache": True}


def wait_ready(server: ServerProcess, timeout_s: float = 60.0) -> float:
    began = time.monotonic()
    with server.http() as http:
        while http.get("/health/ready").status_code != 200:
            assert time.monotonic() - began < timeout_s, "".join(server.log)
            time.sleep(0.02)
    return time.monotonic() - began


def disk_hits(server: ServerProcess) -> int:
    """KV pages that the engine which runs now has read from the disk."""
    engine = server.info()["engine"]
    return 0 if engine is None else int(engine["tiers"][0]["hits"])


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(20, marks=pytest.mark.timeout(240)),
        pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_killed_at_random_moments_every_request_gets_its_tokens(kills: int, tmp_path: Path) -> None:
    seed = int(os.environ.get("TEST_SEED", "1"))
    rng = random.Random(seed)
    engine = ENGINE | {"kv_disk_dir": str(tmp_path)}
    with ServerProcess("bundled", engine=engine, start_timeout_s=90) as server:
        with server.http() as http:
            expected = [ask(http, body, stream=False) for body in BODIES]
        waits: list[float] = []
        starts: list[float] = []
        from_disk: list[int] = []
        with Crowd(partial(server.http, timeout=200.0), expected, size=6, seed=seed) as crowd:
            killed: set[int] = set()
            while len(killed) < kills:
                if rng.random() < 0.5:  # perhaps while it starts
                    time.sleep(rng.uniform(0.0, 1.0))
                    killed |= kill_engine(server)
                    continue
                wait_ready(server)
                time.sleep(rng.uniform(0.0, 0.8))
                from_disk.append(disk_hits(server))
                began = time.monotonic()
                killed |= kill_engine(server)
                wait_ready(server)
                starts.append(server.info()["engine_start_s"])
                waits.append(time.monotonic() - began - starts[-1])
            wait_ready(server)
            time.sleep(0.5)
        assert not crowd.wrong, f"TEST_SEED={seed}: {len(crowd.wrong)} wrong, {crowd.wrong[0]}"
        info = server.wait_idle()
    assert crowd.done >= kills // 2
    assert info["engine_restarts"] == kills and info["requests_replayed"] > kills
    assert info["outcomes"]["failed"] == info["outcomes"]["cancelled"] == 0
    assert info["engine"]["pages_used"] == 0
    crowd.saved.require_both()
    assert sum(from_disk[1:]) > 0, "no page of an earlier life was read from the disk"
    assert max(waits) <= 3.0, f"TEST_SEED={seed}: back after {max(waits):.1f} s + load time"
    print(
        f"{kills} kills: {crowd.done} answers alike, {info['requests_replayed']} replays, "
        f"{crowd.refused} refused meanwhile; back in {max(waits):.2f} s + load time "
        f"({sum(starts) / len(starts):.2f} s) at most; {sum(from_disk[1:])} pages from disk in "
        f"{sum(map(bool, from_disk[1:]))} of {len(from_disk) - 1} lives; {crowd.saved}"
    )
