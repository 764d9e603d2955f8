"""What is kept of a request for an engine that comes after."""

from __future__ import annotations

import asyncio
import time

from msgspec.structs import replace

from coppice.engine.messages import Output
from coppice.engine.request import Request, SamplingParams
from coppice.server.deaths import by_status
from coppice.server.replay import LiveRequest, _fingerprint

REQUEST = Request(id="r", prompt=[1, 2], sampling=SamplingParams(seed=1), deadline_s=0.001)


def test_a_deadline_that_has_passed_on_the_way_is_the_engines_to_tell() -> None:
    live = LiveRequest(REQUEST, asyncio.Queue())
    time.sleep(0.005)
    assert live.left_s is not None and live.left_s < 0
    assert (live.message().request.deadline_s or 0.0) > 0
    live.take(Output(request_id="r", index=0, tokens=[7]))
    again = live.message()
    assert (again.request.deadline_s or 0.0) > 0 and again.progress[0].tokens == [7]


def test_a_poison_is_known_again_whatever_seed_it_was_given() -> None:
    def sent(seed: int, prompt: list[int]) -> Request:
        return replace(REQUEST, prompt=prompt, sampling=SamplingParams(seed=seed, temperature=0.5))

    assert _fingerprint(sent(1, [1, 2])) == _fingerprint(sent(2, [1, 2]))
    assert _fingerprint(sent(1, [1, 2])) != _fingerprint(sent(1, [1, 3]))


def test_who_is_to_blame_for_a_death() -> None:
    def blames(status: int, *, out_of_memory: bool = False) -> bool:
        death = by_status(status, hung=False, out_of_memory=out_of_memory, worked=True)
        return death.own_doing

    assert blames(-11) and blames(1) and blames(-35), "a crash, an exit, a real-time signal"
    assert not blames(-9) and not blames(-15)
    assert blames(-9, out_of_memory=True)
    assert not blames(-15, out_of_memory=True), "somebody else's memory ran out meanwhile"
