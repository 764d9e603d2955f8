"""Lanes: which an engine gets, how threads are split, and what waits for a flight to land."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from coppice.cost import StepCost, StepCurve
from coppice.engine.config import EngineConfig, LaneChoice
from coppice.engine.engine import Engine
from coppice.engine.lanes import OneLane, TwoLanes, _threads_for_prompts
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.errors import ConfigError
from coppice.kernels import native_available, num_threads, set_num_threads
from coppice.models.decoder import Decoder
from coppice.scheduling.partition import PhaseSplit
from tests.kits.models import SMALL

pytestmark = pytest.mark.skipif(not native_available(), reason="the extension is not built")

CONFIG = EngineConfig(model=SMALL, dtype="float32", page_size=16, prefill_chunk=32)


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    set_num_threads(2)
    yield
    set_num_threads()


# -- which lanes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lanes", "threads", "kind"),
    [
        ("one", 8, OneLane),
        ("two", 2, TwoLanes),
        ("two", 8, TwoLanes),
        ("auto", 1, OneLane),
        ("auto", 3, OneLane),
        ("auto", 4, TwoLanes),
    ],
)
def test_lanes_by_setting_and_threads(
    model: EngineModel, lanes: LaneChoice, threads: int, kind: type
) -> None:
    set_num_threads(threads)
    engine = Engine(model, replace(CONFIG, lanes=lanes))
    assert type(engine.lanes) is kind
    engine.close()


def test_two_lanes_of_one_thread_are_refused(model: EngineModel) -> None:
    set_num_threads(1)
    with pytest.raises(ConfigError, match="two threads or more") as caught:
        Engine(model, replace(CONFIG, lanes="two"))
    assert caught.value.param == "lanes"


def test_a_model_without_a_program_has_one_lane(
    model: EngineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the reference kernels, and with mixtures of experts."""
    set_num_threads(8)
    monkeypatch.setattr(Decoder, "program", None)
    with pytest.raises(ConfigError, match="native kernels, and a model that these run as one"):
        Engine(model, replace(CONFIG, lanes="two"))
    assert type(Engine(model, replace(CONFIG, lanes="auto")).lanes) is OneLane


def pages_with(available: int) -> Any:
    return SimpleNamespace(allocator=SimpleNamespace(num_available=available), num_pages=100)


def test_threads_follow_measured_times_and_pages_in_use() -> None:
    """Prompts get what decodes can spare; once pages run short, decodes what prompts can."""
    measured = StepCost(StepCurve((1, 64, 512), (0.01, 0.05, 0.33), 0.0))
    plenty = _threads_for_prompts(PhaseSplit(16), measured, pages_with(90), 512, 8)
    short = _threads_for_prompts(PhaseSplit(16), measured, pages_with(5), 512, 8)
    assert 8 < short < plenty < 16


def test_each_lane_has_a_thread_whatever_is_known_of_times() -> None:
    for units in range(2, 9):
        assert 0 < _threads_for_prompts(PhaseSplit(units), StepCost(), pages_with(9), 9, 9) < units


# -- while prompts are in flight -----------------------------------------------------------


class Held:
    """An engine in two lanes, with a prompt in flight that lands when it is told to."""

    def __init__(self, model: EngineModel, clock: Any = None) -> None:
        extra = {} if clock is None else {"clock": clock}
        self.engine = Engine(model, replace(CONFIG, lanes="two"), **extra)
        assert isinstance(self.engine.lanes, TwoLanes)
        prompts: Any = self.engine.lanes._prompts
        compute, self._may_land = prompts.compute, Event()

        def wait_and_compute(flight: Any) -> None:
            assert self._may_land.wait(30)
            compute(flight)

        prompts.compute = wait_and_compute
        self.submit("decodes", [5, 6, 7])
        self.engine.step()
        self.submit("flies", list(range(5, 95)), deadline_s=50.0)
        self.engine.step()
        (self.flying,) = self.engine._requests["flies"]
        assert self.engine.lanes.holds(self.flying)

    def submit(self, name: str, prompt: list[int], **extra: Any) -> None:
        params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        self.engine.submit(Request(id=name, prompt=prompt, sampling=params, **extra))

    def land(self) -> None:
        self._may_land.set()
        lanes: Any = self.engine.lanes
        lanes._computed.result()
        self.engine.step()
        self.engine.check_pages()

    def finish(self) -> None:
        self._may_land.set()
        self.engine.cancel("decodes")
        self.engine.cancel("flies")
        while self.engine.has_work:
            self.engine.step()
        self.engine.check_pages()
        assert self.engine.stats().pages_used == 0
        self.engine.close()


def test_decodes_go_on_beside_a_flight_and_the_prompt_behind_it_waits(model: EngineModel) -> None:
    held = Held(model)
    held.submit("waits", [8, 9])
    for _ in range(3):
        assert [output.request_id for output in held.engine.step()] == ["decodes"]
    assert held.engine.stats().waiting == 1
    assert held.flying.num_computed == 0
    held.land()
    assert held.flying.num_computed == 32
    assert held.engine.stats().waiting == 0
    held.finish()


def test_a_cancel_is_told_at_once_and_frees_pages_on_landing(model: EngineModel) -> None:
    held = Held(model)
    pages = list(held.flying.pages)
    assert [o.finish_reason for o in held.engine.cancel("flies")] == ["cancelled"]
    held.engine.step()
    held.engine.check_pages()
    assert held.flying.pages == pages
    held.land()
    assert not held.flying.pages
    assert held.engine.outcomes == {"cancelled": 1}
    held.finish()


def test_an_id_may_be_used_again_before_its_flight_has_landed(model: EngineModel) -> None:
    held = Held(model)
    held.engine.cancel("flies")
    held.submit("flies", [5, 6])
    held.land()
    while not any(output.request_id == "flies" for output in held.engine.step()):
        assert held.engine.has_work
    held.finish()


def test_a_deadline_passes_in_flight(model: EngineModel) -> None:
    now = [0.0]
    held = Held(model, clock=lambda: now[0])
    now[0] = 60.0
    ended = [o for o in held.engine.step() if o.finish_reason]
    assert [(o.request_id, o.finish_reason) for o in ended] == [("flies", "expired")]
    held.land()
    held.finish()


def test_a_parked_prompt_gives_its_pages_back_when_it_lands(model: EngineModel) -> None:
    held = Held(model)
    held.engine.park("flies", True)
    assert held.flying.pages
    held.land()
    assert not held.flying.pages
    held.engine.park("flies", False)
    held.engine.step()
    assert held.flying.num_pages
    held.finish()


def test_one_that_goes_on_before_it_lands_was_never_parked(model: EngineModel) -> None:
    held = Held(model)
    held.engine.park("flies", True)
    held.engine.park("flies", False)
    held.land()
    assert held.flying.num_computed == 32
    assert held.engine.stats().waiting == 0
    held.finish()


def test_where_nothing_decodes_any_more_the_engine_waits_for_the_flight(model: EngineModel) -> None:
    held = Held(model)
    held.engine.cancel("decodes")
    assert held.engine.has_work
    held.land()
    assert held.flying.num_computed >= 32
    held.finish()


def test_an_engine_closes_in_flight(model: EngineModel) -> None:
    held = Held(model)
    held._may_land.set()
    held.engine.close()
    held.engine.check_pages()


def test_a_step_is_charged_to_those_in_flight_by_their_threads(model: EngineModel) -> None:
    held = Held(model)
    for _ in range(3):
        held.engine.step()
    held.land()
    held.finish()
    (used,) = held.engine.meter.usage
    stats = held.engine.stats()
    total = stats.model_s + stats.draft_s + stats.other_s
    assert used.step_s == pytest.approx(total, rel=0.2)
    assert num_threads() == 2
