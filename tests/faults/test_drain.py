"""SIGTERM under a mixed load: the drain keeps its times, and what it could not finish goes on."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kits.accounts import require_idle_and_whole
from tests.kits.injector import seeded
from tests.kits.load import BODIES, COMPLETE, STORY, Answer, Body, Crew, ErrorEventError, ask
from tests.kits.resuming import Readers, free_port
from tests.kits.server import ServerProcess

ENGINE: dict[str, Any] = {"kv_cache_mib": 64, "speculate": "auto", "prefix_cache": True}
ANNOUNCE_S, DRAIN_S = 0.6, 0.6
LATE_S = 1.0
"""The contract holds to the second."""
MIX = BODIES[::5]
LONG: Body = (COMPLETE, {"prompt": STORY, "max_tokens": 800, "seed": 1, "ignore_eos": True})
"""Outlasts a drain; every life of the server reads it again before it goes on."""
ANSWER_S = 240.0
"""For one of those: between drains there are two seconds, and they follow each other."""
ENDLESS: Body = (
    COMPLETE,
    {"prompt": STORY, "max_tokens": 1900, "ignore_eos": True, "speculate": "off"},
)
"""Never ends within the seconds a server lives here, whatever the engine could guess of it."""


class Callers(Crew):
    """Closed-loop clients of ordinary streams and whole answers; one of them asks for `ENDLESS`.

    Attributes:
        right: answers that were as expected.
        ended: when a drain ended one, and with which code.
        refused: codes of refusals.
        wrong: everything that must not be.
    """

    def __init__(
        self, connect: Callable[[], httpx.Client], expected: list[Answer], *, size: int, seed: int
    ) -> None:
        super().__init__(size, seed)
        self._connect, self._expected = connect, expected
        self.right = 0
        self.ended: list[tuple[float, str]] = []
        self.refused: Counter[str] = Counter()
        self.cut: list[float] = []
        self.wrong: list[str] = []

    def _work(self, worker: int, rng: random.Random) -> None:
        with self._connect() as http:
            while not self._stop.is_set():
                index = rng.randrange(len(MIX)) if worker else None
                body = ENDLESS if index is None else MIX[index]
                try:
                    answer = ask(http, body, stream=index is None or rng.random() < 0.6)
                except httpx.ConnectError:
                    return  # it has gone
                except httpx.TransportError:
                    self.cut.append(time.monotonic())
                except ErrorEventError as error:
                    self.ended.append((time.monotonic(), error.code))
                except httpx.HTTPStatusError as error:
                    self._told(error.response)
                except Exception as error:
                    self.wrong.append(f"{body}: {error!r}")
                else:
                    self.right += 1
                    if index is None or answer != self._expected[index]:
                        self.wrong.append(f"{body}: {answer} is not as expected")

    def _told(self, reply: httpx.Response) -> None:
        code = reply.json()["error"]["code"]
        if reply.status_code != 503 or reply.headers.get("connection") != "close":
            self.wrong.append(f"{reply.status_code} {reply.headers} {reply.text}")
        elif code == "shutting_down":  # a whole answer that was not whole in time
            self.ended.append((time.monotonic(), code))
        else:
            self.refused[code] += 1
            time.sleep(0.02)


@dataclass
class Probe:
    """What a stranger sees of a server that was told to end, each in seconds after that.

    Attributes:
        unready_s: when readiness was first seen false.
        accepted: when each request was sent that was let in.
        refused: when each refusal had come.
        exit_s: when the process had ended.
        second_s: when it was told again.
    """

    unready_s: float | None = None
    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    exit_s: float = 0.0
    second_s: float | None = None


def probe(server: ServerProcess, second_s: float | None) -> Probe:
    """Tell it to end, again after ``second_s``, and look at it until it has."""
    seen, began = Probe(), time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    while server.process.poll() is None:
        now = time.monotonic() - began
        assert now < 30, "".join(server.log)
        if second_s is not None and seen.second_s is None and now >= second_s:
            server.wait_log("stopping: ")  # two signals at once are one
            seen.second_s = time.monotonic() - began
            server.process.send_signal(signal.SIGTERM)
        with suppress(httpx.TransportError), server.http(timeout=5.0) as http:
            _look(http, seen, began)
        time.sleep(0.01)
    seen.exit_s = time.monotonic() - began
    return seen


def _look(http: httpx.Client, seen: Probe, began: float) -> None:
    sent = time.monotonic() - began
    ready = http.get("/health/ready")
    if ready.status_code == 503:
        assert ready.json() == {"status": "draining"}
        seen.unready_s = seen.unready_s or time.monotonic() - began
    else:
        assert seen.unready_s is None and sent < LATE_S, "ready again"
    assert http.get("/health/live").status_code == 200
    sent = time.monotonic() - began
    body = {"prompt": "a", "max_tokens": 1, "stream": True}
    with http.stream("POST", COMPLETE, json=body) as reply:
        if reply.status_code == 200:
            seen.accepted.append(sent)
            return
        reply.read()
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "draining", reply.text
    assert reply.headers["connection"] == "close" and int(reply.headers["retry-after"]) >= 1
    seen.refused.append(time.monotonic() - began)


def check_times(server: ServerProcess, seen: Probe, callers: Callers, began: float) -> None:
    """Hold what was seen against the contract."""
    assert server.exited(1) == 0
    assert seen.unready_s is not None and seen.unready_s < LATE_S
    assert not callers.wrong, callers.wrong[0]
    assert set(callers.refused) <= {"draining"}, callers.refused
    assert {code for _, code in callers.ended} <= {"shutting_down"}
    if seen.second_s is not None:
        assert seen.exit_s - seen.second_s <= LATE_S, seen
        return
    end_s = ANNOUNCE_S + DRAIN_S
    assert min(seen.refused, default=end_s) >= ANNOUNCE_S, "refused while it was announced"
    assert max(seen.accepted, default=0.0) <= ANNOUNCE_S + LATE_S, "let in for too long"
    assert callers.ended, "nothing outlasted the drain: it tested nothing"
    assert min(at for at, _ in callers.ended) - began >= end_s, "ended before its time"
    assert all(at - began >= end_s for at in callers.cut), "cut before its time"
    assert end_s <= seen.exit_s <= end_s + LATE_S, seen


@pytest.mark.parametrize(
    "drains",
    [
        pytest.param(2, marks=pytest.mark.timeout(120)),
        pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_a_drain_keeps_its_times_and_what_it_cannot_finish_goes_on(
    drains: int, tmp_path: Path
) -> None:
    settings = {
        "journal": str(tmp_path), "port": free_port(), "resume_s": 30.0,
        "drain_announce_s": ANNOUNCE_S, "drain_s": DRAIN_S,
    }  # fmt: skip

    def start() -> ServerProcess:
        return ServerProcess("bundled", engine=ENGINE, server=settings, start_timeout_s=90)

    server, seen, right, ended = start(), [], 0, 0
    try:
        server.wait_ready()
        with server.http() as http:
            expected = [ask(http, body, stream=False) for body in (*MIX, LONG)]

        def drain(rng: random.Random, second_s: float | None) -> None:
            nonlocal right, ended
            seed = rng.randrange(1000)
            with Callers(server.http, expected, size=3, seed=seed) as callers:
                time.sleep(rng.uniform(0.2, 0.8))
                began = time.monotonic()
                seen.append(probe(server, second_s))
            check_times(server, seen[-1], callers, began)
            right, ended = right + callers.right, ended + len(callers.ended)

        with seeded() as rng:
            twice = [number % 2 == 1 for number in range(drains)]
            rng.shuffle(twice)
            seed = rng.randrange(1000)
            with Readers(
                server.url, [LONG], expected[-1:], size=3, seed=seed, give_up_s=ANSWER_S
            ) as readers:
                for again in twice:
                    drain(rng, rng.uniform(0.0, ANNOUNCE_S + DRAIN_S - 0.1) if again else None)
                    server = start()
                    server.wait_ready()
            assert not readers.wrong, f"{len(readers.wrong)} wrong, {readers.wrong[0]}"
            assert readers.done and readers.drains
        require_idle_and_whole(server, 40.0)
    finally:
        server.stop()
    once = [each for each in seen if each.second_s is None]
    again = [each for each in seen if each.second_s is not None]
    let_in, refused = (sum(map(len, lists)) for lists in zip(*map(_asked, once), strict=True))
    assert let_in >= len(once) and refused >= len(once)
    unready_s = max(each.unready_s or 0.0 for each in seen)
    late_s = max(each.exit_s for each in once) - ANNOUNCE_S - DRAIN_S
    stop_s = max(each.exit_s - (each.second_s or 0.0) for each in again)
    print(
        f"{len(once)} drains: readiness false after {unready_s:.2f} s at most; {let_in} let in "
        f"while it was announced, {refused} refused after that; exit {late_s:.2f} s after the time "
        f"at most. {len(again)} told twice: exit after {stop_s:.2f} s at most. {right} answers "
        f"alike, {ended} ended with an error event, {readers.done} taken up alike over "
        f"{readers.drains} shutdowns"
    )


def _asked(seen: Probe) -> tuple[list[float], list[float]]:
    return seen.accepted, seen.refused
