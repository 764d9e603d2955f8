"""The front end's view of the engine, without an engine."""

from __future__ import annotations

import pytest

from coppice.engine.request import Request, SamplingParams
from coppice.errors import CapacityError
from coppice.server.engine_client import AsyncEngine, Silence

REQUEST = Request(id="r", prompt=[1, 2], sampling=SamplingParams(seed=1))


def silent(silence: Silence, ticks: int) -> bool:
    """Whether it became strange in so many ticks, after which a message comes."""
    for _ in range(ticks):
        silence.tick()
    strange = silence.strange
    silence.broken()
    return strange


def test_every_stop_of_an_engine_is_strange_not_only_the_first() -> None:
    silence = Silence()
    assert [silent(silence, 10) for _ in range(5)] == [True] * 5
    assert not silent(silence, Silence.NOTICED)


def test_an_engine_of_long_steps_is_not_strange_in_a_longer_one() -> None:
    silence = Silence()
    assert not any(silent(silence, 4) for _ in range(5))
    assert not silent(silence, 10)


def test_a_hiccup_is_soon_forgotten() -> None:
    silence = Silence()
    assert not silent(silence, 5)
    assert not silent(silence, 7)
    for _ in range(10):
        assert not silent(silence, 1)
    assert silent(silence, 6)


def test_what_was_still_made_ready_when_all_was_ended_is_refused() -> None:
    """Nobody would end it, and a resumable one would not be in the journal."""
    engine = AsyncEngine(["nothing"])
    engine.state = "ready"
    engine.require(REQUEST)
    engine.fail_all("The server is shutting down.")
    with pytest.raises(CapacityError) as caught:
        engine.require(REQUEST)
    assert caught.value.code == "draining"
