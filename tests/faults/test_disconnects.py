"""Clients leave at five phases: pages come back within two steps and the accounts add up."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kits.accounts import anonymous_mib, descriptors, require_idle_and_whole
from tests.kits.injector import seeded
from tests.kits.leavers import PHASES, Neighbours, fill_pages, leave_together
from tests.kits.server import ServerProcess

AT_ONCE = 20
TWO_STEPS_S = 0.5
"""A step takes 0.25 s at most (`coppice.engine.engine.MAX_STEP_S`)."""
FLAT_MIB = 16.0
ENGINE: dict[str, Any] = {
    "kv_cache_mib": 64, "speculate": "auto", "prefix_cache": True, "prefill_chunk": 128,
    "stats_interval_s": 0.01, "history_mib": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[bool, ServerProcess]]:
    """By whether the engine is narrow, so that all but two requests are queued."""
    patient = {"overload_wait_s": 0.0, "max_waiting_s": 600.0}  # who leaves is to have come in
    wide, thin = (
        ServerProcess("bundled", engine=ENGINE | narrow, server=patient, start_timeout_s=90)
        for narrow in ({}, {"max_sequences": 2})
    )
    with wide, thin:
        yield {False: wide, True: thin}


def one_round(
    server: ServerProcess, phase: str, neighbours: int, rng: random.Random
) -> tuple[float, int]:
    """Seconds and steps from the last one's leaving until all of it was back."""
    leave_together(server, phase, AT_ONCE, rng)
    began, steps = time.monotonic(), None
    with server.http() as http:
        while True:
            info = http.get("/v1/coppice/info").json()
            engine, took = info["engine"], time.monotonic() - began
            steps = engine["steps"] if steps is None else steps
            if engine["running"] + engine["waiting"] <= neighbours:
                return took, engine["steps"] - steps
            assert took < 10, info


def warm_up(
    server: ServerProcess, phase: str, neighbours: int, rng: random.Random, rounds: int
) -> None:
    """What is made once is made now, and as much garbage as is ever collected at once."""
    fill_pages(server, rng)
    for number in range(max(8, rounds)):
        memory = anonymous_mib(server)
        one_round(server, phase, neighbours, rng)
        if number + 1 >= rounds and anonymous_mib(server) - memory < 1.0:
            return


@pytest.mark.parametrize(
    "rounds",
    [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
@pytest.mark.parametrize("phase", PHASES)
def test_clients_that_leave_give_everything_back(
    servers: dict[bool, ServerProcess], phase: str, rounds: int
) -> None:
    server = servers[phase == "queued"]
    beside = 2 if phase == "queued" else 1
    with seeded() as rng:
        with Neighbours(server, beside):
            warm_up(server, phase, beside, rng, rounds)
        before = require_idle_and_whole(server)["outcomes"]
        files, memory = descriptors(server), anonymous_mib(server)
        with Neighbours(server, beside) as neighbours:
            took = [one_round(server, phase, beside, rng) for _ in range(rounds)]
        after = require_idle_and_whole(server)["outcomes"]
        cancelled = 0 if phase == PHASES[-1] else rounds * AT_ONCE
        assert after["cancelled"] - before["cancelled"] == cancelled
        assert after["failed"] == after["expired"] == after["refused"] == 0
        assert neighbours.done and not neighbours.wrong, neighbours.wrong[:1]
        late = [each for each in took if each[0] > TWO_STEPS_S and each[1] > 2]
        assert not late, f"back after (s, steps): {late}"
        assert descriptors(server) == files
        grown = anonymous_mib(server) - memory
        assert grown < FLAT_MIB, f"memory grew by {grown:.1f} MiB"
    print(
        f"{phase}: {rounds * AT_ONCE} left; back in {max(took)[0]:.3f} s at most, "
        f"{max(steps for _, steps in took)} steps; memory {grown:+.1f} MiB"
    )
