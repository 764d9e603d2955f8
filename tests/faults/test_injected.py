"""Faults one after another, by a seed, under a mixed load whose every answer is known."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.kits.accounts import anonymous_mib, descriptors, require_idle_and_whole
from tests.kits.injector import Injector, SlowReaders, WrongClock, seeded
from tests.kits.leavers import PHASES, fill_pages, leave_together
from tests.kits.load import BODIES, Answer, Crowd, ask
from tests.kits.server import ServerProcess

ENGINE: dict[str, Any] = {"kv_cache_mib": 64, "speculate": "auto", "prefix_cache": True}
SETTINGS = {"engine_hang_s": 30.0}
HOUR_S = 3600.0
LONG: dict[str, Any] = {"prompt": "The sea", "max_tokens": 1500, "logprobs": 20, "ignore_eos": True}


class Harmed:
    """A server with a clock of its own, and what it answers undisturbed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = WrongClock(folder)
        for name, value in self.clock.environment.items():
            monkeypatch.setenv(name, value)
        self.server = ServerProcess("bundled", engine=ENGINE, server=SETTINGS, start_timeout_s=90)
        self.expected: list[Answer] = []

    def start(self) -> None:
        self.server.wait_ready()
        with self.server.http() as http:
            self.expected = [ask(http, body, stream=False) for body in BODIES]

    def crowd(self, seed: int, size: int = 4) -> Crowd:
        return Crowd(partial(self.server.http, timeout=200.0), self.expected, size=size, seed=seed)


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harmed]:
    with pytest.MonkeyPatch.context() as patched:
        made = Harmed(tmp_path_factory.mktemp("clock"), patched)
    try:
        made.start()
        yield made
    finally:
        made.server.stop()


def faults_of(harmed: Harmed, rng: random.Random) -> dict[str, Callable[[], None]]:
    injector = Injector(harmed.server, rng)

    def slow() -> None:
        bodies = [LONG | {"seed": rng.randrange(99)} for _ in range(5)]
        with SlowReaders(harmed.server.port, bodies):
            injector.wait(1.5)

    return {
        "killed": injector.kill,
        "stopped": lambda: injector.stand_still(rng.uniform(0.1, 1.5)),
        "left": lambda: leave_together(harmed.server, rng.choice(PHASES[1:]), 5, rng),
        "slow readers": slow,
        "clock": lambda: harmed.clock.shift(rng.choice((-1, 0, 1)) * HOUR_S),
    }


@pytest.mark.parametrize(
    "count", [8, pytest.param(150, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_any_faults_in_any_order_change_no_answer(harmed: Harmed, count: int) -> None:
    done: Counter[str] = Counter()
    before = require_idle_and_whole(harmed.server)["outcomes"]
    with seeded() as rng:
        faults = faults_of(harmed, rng)
        names = [*faults, *rng.choices([*faults], k=count - len(faults))]
        rng.shuffle(names)
        with harmed.crowd(seed=rng.randrange(1000)) as crowd:
            for name in names:
                wait_ready(harmed.server)
                time.sleep(rng.uniform(0.0, 0.6))
                faults[name]()
                done[name] += 1
            wait_ready(harmed.server)
        harmed.clock.shift(0.0)
        assert not crowd.wrong, f"{len(crowd.wrong)} wrong after {names}: {crowd.wrong[0]}"
        after = require_idle_and_whole(harmed.server)["outcomes"]
        assert after["failed"] == before["failed"] and after["expired"] == before["expired"]
        assert crowd.done >= count
    print(f"{dict(done)}: {crowd.done} answers alike, {crowd.refused} refused meanwhile")


def wait_ready(server: ServerProcess, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    with server.http() as http:
        while http.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline, "".join(server.log)[-3000:]
            time.sleep(0.02)


@pytest.mark.parametrize(
    "jumps", [4, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_a_clock_that_jumps_by_an_hour_ends_nothing(harmed: Harmed, jumps: int) -> None:
    server, restarts = harmed.server, harmed.server.info()["engine_restarts"]
    before = require_idle_and_whole(server)["outcomes"]
    fields = {"prompt": "A ship", "max_tokens": 40, "seed": 1, "deadline_s": 60, "ttft_s": 30}
    with seeded() as rng, server.http() as http:
        expected = http.post("/v1/completions", json=fields).json()
        with harmed.crowd(seed=rng.randrange(1000)) as crowd:
            for number in range(jumps):
                harmed.clock.shift(HOUR_S if number % 2 == 0 else -HOUR_S)
                reply = http.post("/v1/completions", json=fields).json()
                off = reply["created"] - time.time()
                assert abs(abs(off) - HOUR_S) < 60, "the clock did not jump: it tested nothing"
                assert reply["choices"] == expected["choices"]
                assert http.get("/health/ready").status_code == 200
                time.sleep(rng.uniform(0.0, 0.5))
        harmed.clock.shift(0.0)
        assert not crowd.wrong and not crowd.refused, crowd.wrong[:1]
    after = require_idle_and_whole(server)
    assert after["engine_restarts"] == restarts
    for name in ("expired", "cancelled", "failed", "refused"):
        assert after["outcomes"][name] == before[name]


def unready_after(server: ServerProcess, seconds: float) -> float:
    """When readiness was false; asked for so long, it stays so, and liveness is always true."""
    began, unready_s = time.monotonic(), 0.0
    with server.http() as http:
        while (now := time.monotonic() - began) < seconds:
            assert http.get("/health/live").status_code == 200
            ready = http.get("/health/ready")
            if ready.status_code == 503:
                assert ready.json() == {"status": "stalled"}
                unready_s = unready_s or now
            else:
                assert not unready_s, "ready again, and it stands still"
            time.sleep(0.1)
    assert unready_s, f"ready for {seconds:g} s, and it stands still"
    return unready_s


@pytest.mark.parametrize(
    ("stops", "seconds"),
    [(1, 7.5), pytest.param(50, 10.0, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_an_engine_that_stands_still_is_not_ready_and_loses_nothing(
    harmed: Harmed, stops: int, seconds: float
) -> None:
    server, unready_s = harmed.server, []
    restarts = server.info()["engine_restarts"]
    with seeded() as rng, harmed.crowd(seed=rng.randrange(1000)) as crowd:
        for _ in range(stops):
            time.sleep(rng.uniform(0.0, 0.5))
            with Injector(server, rng).stopped():
                unready_s.append(unready_after(server, seconds))
            wait_ready(server, 5.0)
    assert not crowd.wrong and crowd.done, crowd.wrong[:1]
    assert require_idle_and_whole(server)["engine_restarts"] == restarts
    assert max(unready_s) < 7.0, f"it looked ready for {max(unready_s):.1f} s"
    print(
        f"{stops} stops of {seconds:g} s: not ready after {max(unready_s):.1f} s at most, alive "
        f"throughout, {crowd.done} answers alike"
    )


@pytest.mark.parametrize(
    ("slow", "normal", "seconds"),
    [(20, 4, 3.0), pytest.param(100, 16, 30.0, marks=pytest.mark.slow)],
)
def test_slow_readers_take_little_memory_and_their_neighbours_are_answered(
    harmed: Harmed, slow: int, normal: int, seconds: float
) -> None:
    server = harmed.server
    bodies = [LONG | {"seed": number} for number in range(slow)]
    with seeded() as rng:
        fill_pages(server, rng)
        require_idle_and_whole(server)
        files, memory, grown = descriptors(server), anonymous_mib(server), 0.0
    with (
        seeded() as rng,
        harmed.crowd(seed=rng.randrange(1000), size=normal) as crowd,
        SlowReaders(server.port, bodies) as readers,
    ):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.25)
            grown = max(grown, anonymous_mib(server) - memory)
    assert not crowd.wrong and crowd.done >= normal, crowd.wrong[:1]
    assert slow <= readers.received < slow * (seconds + 10)
    require_idle_and_whole(server)
    assert all(now <= was for now, was in zip(descriptors(server), files, strict=True))
    print(f"{slow} slow readers beside {normal}: {crowd.done} answers, memory {grown:+.1f} MiB")
    assert grown < 64, f"{grown:.1f} MiB more"
