"""What is kept of a request for an engine that comes after."""

from __future__ import annotations

import asyncio
import time

import pytest
from msgspec.structs import replace

from coppice.engine.messages import Output, ToEngine
from coppice.engine.request import Request, SamplingParams
from coppice.server import replay
from coppice.server.deaths import by_status
from coppice.server.replay import SUSPECT_AFTER, LiveRequest, Replay, _fingerprint
from coppice.server.unread import Unread

REQUEST = Request(id="r", prompt=[1, 2], sampling=SamplingParams(seed=1), deadline_s=0.001)


def test_a_deadline_that_has_passed_on_the_way_is_the_engines_to_tell() -> None:
    live = LiveRequest(REQUEST, Unread())
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


class Engine:
    """What a `Replay` tells its engine, and a way to answer."""

    def __init__(self) -> None:
        self.told: list[ToEngine] = []
        self.replay = Replay(self.told.append, self.route, lambda: None)
        self.ended: dict[str, Output] = {}

    def live(self, name: str) -> LiveRequest:
        """A request it has."""
        live = LiveRequest(replace(REQUEST, id=name, deadline_s=None), Unread())
        self.replay.live[name] = live
        self.replay.give(live)
        return live

    def route(self, output: Output) -> None:
        """As the front end does."""
        live = self.replay.live[output.request_id]
        live.take(output)
        if output.finish_reason is not None:
            del self.replay.live[output.request_id]
            self.ended[output.request_id] = output
        self.replay.moved(live)


def test_who_hangs_the_engine_is_found_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "PROBATION_S", 1.0)
    monkeypatch.setattr(replay, "GETS_ON_S", 0.3)
    monkeypatch.setattr(replay, "PROBATION_TOKENS", 10**6)
    hung = by_status(-9, hung=True, out_of_memory=False, worked=True)

    async def play() -> None:
        engine = Engine()
        hanger, other = engine.live("hanger"), engine.live("other")
        for _ in range(SUSPECT_AFTER):
            engine.replay.engine_died(hung)
            if hanger.crashes < SUSPECT_AFTER:
                engine.replay.give(hanger)
                engine.replay.give(other)
        engine.replay.engine_ready()
        assert engine.replay.alone is hanger
        engine.route(Output(request_id="hanger", index=0, tokens=[1]))  # and then nothing
        await asyncio.sleep(1.6)
        assert engine.replay.alone is hanger, "silence is not innocence"
        engine.replay.engine_died(hung)
        assert engine.ended["hanger"].error is not None
        assert engine.ended["hanger"].error[0] == "poisoned"
        engine.replay.engine_ready()
        assert engine.replay.alone is other
        for _ in range(500):  # slow, and alive
            await asyncio.sleep(0.02)
            engine.route(Output(request_id="other", index=0, tokens=[1]))
            if engine.replay.alone is None:
                break
        assert engine.replay.alone is None and other.crashes == 0

    asyncio.run(play())
