"""Overload: a burst is borne, a queue that stands is not."""

from __future__ import annotations

import msgspec
import pytest

from coppice.engine.request import Request, SamplingParams
from coppice.server.pressure import CALM_S, PATIENCE_S, Pressure
from coppice.server.replay import LiveRequest
from coppice.server.unread import Unread

RATE = 1000.0


class Queue:
    """Requests by arrival, a clock, and the pressure they make."""

    def __init__(self, wait_s: float = 0.25) -> None:
        self.now = 100.0
        self.pressure = Pressure(wait_s, lambda: self.now)
        self.live: list[LiveRequest] = []

    def arrive(self, prompt: int = 100) -> LiveRequest:
        sampling = SamplingParams(max_tokens=5, seed=1)
        request = Request(id=f"{len(self.live)}", prompt=[1] * prompt, sampling=sampling)
        made = LiveRequest(request, Unread(), given_s=self.now)
        self.live.append(made)
        return made

    def refuses(self, more: int = 100) -> bool:
        waiting = sum(len(r.request.prompt) for r in self.live if not r.started)
        return self.pressure.refuses(self.live, waiting=waiting, more=more, rate_tok_s=RATE)

    def pass_time(self, seconds: float, *, every: float = 0.1) -> list[bool]:
        """Somebody asks every so often; whether each was refused."""
        found = []
        for _ in range(round(seconds / every)):
            self.now += every
            found.append(self.refuses())
        return found


def test_a_burst_is_borne_for_a_while() -> None:
    queue = Queue()
    for _ in range(200):
        queue.arrive()
    assert not any(queue.pass_time(PATIENCE_S))
    assert all(queue.pass_time(3.0)[8:])


def test_a_burst_that_is_being_worked_off_is_borne_to_its_end() -> None:
    queue = Queue()
    late = [queue.arrive() for _ in range(200)]
    for one in late:  # 20 s of reading; everybody after the first few is late
        assert not queue.refuses()
        queue.now += 0.1
        one.started = True


def test_a_queue_that_only_keeps_its_length_is_not() -> None:
    queue = Queue()
    for _ in range(30):
        queue.arrive()
    refused = []
    for number in range(100):
        queue.now += 0.1
        refused.append(queue.refuses())
        for one in queue.live[number : number + 1]:
            one.started = True
        if not refused[-1]:
            queue.arrive()
    assert not any(refused[: int(PATIENCE_S / 0.1)]) and refused.count(True) > 20


def test_who_is_answered_in_time_lets_others_in_for_ever() -> None:
    queue = Queue()
    for _ in range(100):
        one = queue.arrive()
        assert not queue.refuses()
        queue.now += 0.4  # 0.25 s and twice the 0.1 s of reading are borne
        one.started = True


def test_strictness_ends_after_a_calm() -> None:
    queue = Queue()
    late = [queue.arrive() for _ in range(30)]
    queue.pass_time(PATIENCE_S + 1)
    assert queue.refuses()
    for one in late:
        one.started = True
    assert not queue.refuses(), "nobody waits"
    queue.now += CALM_S
    for _ in range(30):
        queue.arrive()
    assert not any(queue.pass_time(1.0)), "the calm was long enough: a burst is borne again"


def test_a_short_calm_leaves_it_strict() -> None:
    queue = Queue()
    late = [queue.arrive() for _ in range(30)]
    queue.pass_time(PATIENCE_S + 1)
    for one in late:
        one.started = True
    queue.now += CALM_S / 2
    assert not queue.refuses()
    for _ in range(10):
        queue.arrive()
    assert queue.refuses(), "a backlog of a second"


@pytest.mark.parametrize("prompt", [2000, 20_000])
def test_a_long_prompt_may_take_its_time(prompt: int) -> None:
    queue = Queue()
    one = queue.arrive(prompt)
    assert not any(queue.pass_time(2 * prompt / RATE, every=1.5))
    one.started = True


def test_lateness_between_two_looks_counts_from_when_it_began() -> None:
    queue = Queue()
    queue.arrive()
    assert not queue.refuses()
    queue.now += 1.0
    assert not queue.refuses()
    queue.now += 60.0
    assert queue.refuses(), "it has waited for a minute"


def test_no_wait_is_too_long_where_none_is_set() -> None:
    queue = Queue(wait_s=0.0)
    for _ in range(200):
        queue.arrive()
    assert not any(queue.pass_time(60.0))


def test_who_is_parked_for_a_slow_reader_is_not_late() -> None:
    queue = Queue()
    queue.arrive().parked = True
    queue.now += 60.0
    assert not queue.refuses(more=1)


def test_who_moves_to_another_engine_is_not_late_for_the_time_before() -> None:
    queue = Queue()
    moved = [queue.arrive() for _ in range(20)]
    for live in moved:
        live.started = True
    queue.now += 60.0
    for live in moved:  # as `Replay` does when an engine has gone and another has come
        live.started, live.given_s = False, queue.now
    queue.now += 0.2
    assert not queue.refuses()


def test_first_turns_of_sessions_that_wait_on_purpose_are_not_late() -> None:
    queue = Queue()
    for _ in range(50):
        live = queue.arrive()
        live.request = msgspec.structs.replace(live.request, session="default\nagent")
    assert not any(queue.pass_time(60.0)[:-1])
    queue.arrive()
    assert any(queue.pass_time(10.0)), "others are, as ever"
