"""Sessions on the engine: first turns wait, pages of the paused outlive others, none is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

import coppice.scheduling.sessions as rules
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.loop import EngineLoop
from coppice.engine.messages import EndSession, Output, Progress, Shutdown, Submit, ToolCalled
from coppice.engine.request import Request, SamplingParams
from coppice.errors import ConfigError
from coppice.scheduling import Policy
from coppice.scheduling.orders import BySessionService
from coppice.scheduling.retention import AlwaysDrop, AlwaysKeep, ByHazard
from coppice.scheduling.sessions import IDLE_S, LOST_AFTER_S
from coppice.scheduling.window import SessionWindow
from tests.kits.models import SMALL

CONFIG = EngineConfig(model=SMALL, page_size=16, kv_cache_mib=1, order="sessions")
PROMPT = 160


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 1e-4  # a step takes some time
        return self.now


def engine_of(model: EngineModel, policy: Policy | None = None, **settings: object) -> Engine:
    return Engine(model, replace(CONFIG, **settings), policy=policy, clock=Clock())  # type: ignore[arg-type]


def narrow(size: int = 1) -> Policy:
    """A window that stays as it is."""
    window = SessionWindow(size=size, idle=0.0, low=0.0)
    return Policy(order=BySessionService(), admission=window)


def turn(
    name: str, session: str = "", tokens: int = PROMPT, start: int = 1, **more: int
) -> Request:
    params = SamplingParams(
        max_tokens=more.get("answer", 8), temperature=0.0, ignore_eos=True, seed=1,
        n=more.get("n", 1),
    )  # fmt: skip
    prompt = [1 + (start * 31 + i * 7) % 200 for i in range(tokens)]
    return Request(id=name, prompt=prompt, sampling=params, session=session, session_tool="look")


def finish(engine: Engine) -> dict[str, list[Output]]:
    found: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
        engine.check_pages()
    return found


def crowd(engine: Engine, count: int = 12) -> None:
    """Others, one after the other, together more than the pool holds."""
    for i in range(count):
        engine.submit(turn(f"crowd{i}", start=100 + i, tokens=engine.num_pages * 4))
        finish(engine)


def sessions(engine: Engine) -> tuple[int, int, int]:
    found = engine.stats().sessions
    return found.open, found.paused, found.waiting


@pytest.mark.parametrize(("order", "finds"), [("arrival", False), ("sessions", True)])
def test_pages_outlive_those_of_others_while_a_tool_runs(
    model: EngineModel, order: str, finds: bool
) -> None:
    engine = engine_of(model, order=order)
    engine.submit(turn("one", "s"))
    answer = [t for output in finish(engine)["one"] for t in output.tokens]
    crowd(engine)
    again = turn("two", "s")
    engine.submit(msgspec.structs.replace(again, prompt=[*again.prompt, *answer, 5, 6, 7]))
    cached = finish(engine)["two"][0].cached_tokens
    assert cached == (160 if finds else 0)
    stats = engine.stats()
    assert stats.pages_used == 0
    assert (stats.sessions.kept_pages > 0) is finds
    engine.sessions.end("s", 0.0)
    assert engine.stats().sessions.kept_pages == 0


def test_kept_pages_give_way_to_what_runs(model: EngineModel) -> None:
    policy = Policy(order=BySessionService(), retention=AlwaysKeep())
    engine = engine_of(model, policy)
    for i in range(3):
        engine.submit(turn(f"t{i}", f"s{i}", start=i))
        finish(engine)
    kept = engine.stats().sessions.kept_pages
    assert kept == 3 * (PROMPT // 16)
    everything = engine.num_pages * 16 - 16
    engine.submit(turn("big", tokens=min(everything, engine.context_length - 8), start=77))
    assert finish(engine)["big"][-1].finish_reason == "length"
    found = engine.stats().sessions
    assert found.revoked_pages == kept - found.kept_pages > 0
    assert found.paused == 3


def test_first_turns_wait_outside_continuations_do_not(model: EngineModel) -> None:
    engine = engine_of(model, narrow())
    engine.submit(turn("a1", "a", answer=4))
    engine.submit(turn("b1", "b", start=2))
    engine.submit(turn("free", start=3))
    assert sessions(engine) == (1, 0, 1)
    assert engine.stats().waiting == 3
    assert {"a1", "free"} == set(finish(engine))
    assert sessions(engine) == (1, 1, 1)
    engine.submit(turn("a2", "a", tokens=PROMPT + 20))
    assert engine.attend() == []
    assert set(finish(engine)) == {"a2"}
    engine.sessions.end("a", 0.0)
    engine.sessions.end("a", 0.0)
    engine.attend()
    assert sessions(engine) == (1, 0, 0)
    assert set(finish(engine)) == {"b1"}


def test_an_idle_engine_lets_one_in_at_a_time(model: EngineModel) -> None:
    engine = engine_of(model, narrow())
    clock = engine.clock
    assert isinstance(clock, Clock)
    engine.submit(turn("lost", "lost", answer=2))
    finish(engine)
    for name in ("b", "c"):
        engine.submit(turn(name, name, start=5))
    engine.attend()
    assert sessions(engine) == (1, 1, 2), "a moment without work is none to lose a window for"
    clock.now += IDLE_S
    engine.attend()
    assert sessions(engine) == (2, 1, 1)
    clock.now += IDLE_S
    assert set(finish(engine)) == {"b"}, "it was not idle any more"
    engine.attend()
    clock.now += IDLE_S
    engine.attend()
    assert set(finish(engine)) == {"c"}


def test_a_session_that_never_comes_back_is_given_up(model: EngineModel) -> None:
    engine = engine_of(model)
    clock = engine.clock
    assert isinstance(clock, Clock)
    engine.submit(turn("one", "s"))
    finish(engine)
    clock.now += LOST_AFTER_S - 1.0
    engine.attend()
    assert sessions(engine) == (1, 1, 0)
    clock.now += 2.0
    engine.attend()
    found = engine.stats().sessions
    assert (found.open, found.given_up, found.kept_pages) == (0, 1, 0)
    assert engine.stats().pages_cached > 0, "as any prefix, for as long as there is room"


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_clock_jumps_end_no_answer(model: EngineModel, jump_s: float) -> None:
    engine = engine_of(model)
    clock = engine.clock
    assert isinstance(clock, Clock)
    engine.submit(turn("one", "s"))
    finish(engine)
    clock.now += jump_s
    engine.submit(turn("two", "s", tokens=PROMPT + 10))
    assert finish(engine)["two"][-1].finish_reason == "length"
    assert sessions(engine) == (1, 1, 0)


def test_whoever_waits_outside_can_be_cancelled_parked_and_expire(model: EngineModel) -> None:
    engine = engine_of(model, narrow())
    clock = engine.clock
    assert isinstance(clock, Clock)
    engine.submit(turn("in", "in"))
    engine.submit(msgspec.structs.replace(turn("late", "late"), deadline_s=5.0))
    for name in ("gone", "parked", "n"):
        engine.submit(turn(name, name, n=2 if name == "n" else 1))
    assert sessions(engine) == (1, 0, 4)
    engine.park("parked", on=True)
    engine.park("parked", on=True)
    assert [output.finish_reason for output in engine.cancel("gone", "stop")] == ["stop"]
    assert len(engine.cancel("n")) == 2
    assert sessions(engine) == (1, 0, 1)
    clock.now += 6.0
    assert [output.finish_reason for output in engine.attend()] == ["expired"]
    engine.park("parked", on=False)
    assert sessions(engine) == (1, 0, 1)
    engine.sessions.end("in", clock.now)
    assert set(finish(engine)) == {"in", "parked"}
    assert sessions(engine) == (1, 1, 0)


def test_a_session_ended_while_its_turn_runs_keeps_nothing(model: EngineModel) -> None:
    engine = engine_of(model)
    engine.submit(turn("one", "s"))
    engine.step()
    engine.sessions.end("s", 0.0)
    finish(engine)
    found = engine.stats().sessions
    assert (found.open, found.paused, found.kept_pages) == (0, 0, 0)


def test_a_turn_another_engine_began_goes_on(model: EngineModel) -> None:
    engine = engine_of(model)
    engine.submit(turn("whole", "x", answer=12))
    tokens = [t for output in finish(engine)["whole"] for t in output.tokens]
    fresh = engine_of(model)
    fresh.submit(turn("rest", "x", answer=12), [Progress(0, tokens[:5])])
    assert [t for output in finish(fresh)["rest"] for t in output.tokens] == tokens[5:]
    assert sessions(fresh) == (1, 1, 0)


def test_names_are_told_apart_and_their_number_is_bounded(
    model: EngineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "MOST_PAUSED", 8)
    engine = engine_of(model)
    for name in ("t\na", "t\nb", "u\na", "../../x", "x" * 300, "\x00", "🙂", " "):
        engine.submit(turn(f"r{name!r}", name, tokens=20))
    finish(engine)
    assert sessions(engine) == (8, 8, 0)
    for i in range(20):
        engine.submit(turn(f"m{i}", f"more{i}", tokens=20))
        finish(engine)
    assert sessions(engine) == (8, 8, 0)
    assert engine.stats().sessions.given_up == 20
    assert len(engine.pages.pins) <= 8


def test_without_the_order_sessions_are_not_kept_in_mind(model: EngineModel) -> None:
    engine = engine_of(model, order="arrival")
    for i in range(5):
        engine.submit(turn(f"r{i}", f"s{i}"))
    finish(engine)
    assert sessions(engine) == (0, 0, 0)
    assert engine.facts().knows_sessions is False
    assert engine_of(model).facts().knows_sessions is True


def test_the_order_needs_the_prefix_cache() -> None:
    with pytest.raises(ConfigError, match="prefix_cache"):
        EngineConfig(order="sessions", prefix_cache=False)


def test_the_loop_takes_tools_and_ends(model: EngineModel) -> None:
    engine = Engine(model, CONFIG)
    outputs: list[object] = []
    loop = EngineLoop(engine, outputs.extend)
    loop.inbox.put(Submit(turn("one", "s")))
    while not any(isinstance(o, Output) and o.finish_reason for o in outputs):
        loop._round()
    loop.inbox.put(ToolCalled("s", "test"))
    loop.inbox.put(ToolCalled("never heard of", "test"))
    loop.inbox.put(Submit(turn("two", "s", tokens=PROMPT + 5)))
    loop.inbox.put(EndSession("never heard of"))
    loop._round()
    retention = engine.policy.retention
    assert isinstance(retention, ByHazard)
    assert list(retention.times.tools) == ["test"], "not what was expected, but what was called"
    loop.inbox.put(EndSession("s"))
    loop.inbox.put(EndSession("s"))
    loop._round()
    assert engine.sessions.num_inside == 0
    loop.inbox.put(Shutdown())
    loop.run()


RETENTIONS: list[Callable[[], AlwaysKeep | ByHazard | None]] = [
    lambda: ByHazard(lambda pages: 0.01 * pages), AlwaysKeep, AlwaysDrop, lambda: None,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_random_turns_cancels_parks_and_ends_leak_no_page(model: EngineModel, seed: int) -> None:
    rng = random.Random(seed)
    retention = RETENTIONS[seed % 4]()
    policy = Policy(order=BySessionService(), admission=SessionWindow(), retention=retention)
    engine = engine_of(model, policy, speculate="lookup" if seed % 3 == 0 else "off")
    clock = engine.clock
    assert isinstance(clock, Clock)
    lengths = dict.fromkeys(map(str, range(12)), 100)
    live: list[str] = []
    for i in range(150):
        clock.now += rng.choice((0.01, 0.5, 90.0))
        name = rng.choice(list(lengths))
        match rng.randrange(6):
            case 0 | 1 | 2 if engine.stats().running + engine.stats().waiting < 12:
                lengths[name] = min(lengths[name] + rng.randint(10, 80), 900)
                engine.submit(turn(
                    f"r{i}", name, tokens=lengths[name], start=int(name), n=rng.choice((1, 1, 2)),
                ))  # fmt: skip
                live.append(f"r{i}")
            case 3 if live:
                engine.cancel(rng.choice(live[-8:]), rng.choice(("cancelled", "stop")))
            case 4 if live:
                engine.park(rng.choice(live[-8:]), on=rng.random() < 0.5)
            case 5:
                engine.sessions.end(name, clock.now)
        for _ in range(rng.randint(1, 4)):
            engine.step()
            engine.check_pages()
    for name in live:
        engine.park(name, on=False)
    while engine.has_work or engine.sessions.outside:
        clock.now += 1.0
        engine.step()
        engine.check_pages()
    assert sum(engine.outcomes.values()) == len(live) > 30
    for name in lengths:
        engine.sessions.end(name, clock.now)
    stats = engine.stats()
    assert stats.pages_used == stats.sessions.open == stats.sessions.kept_pages == 0
    assert engine.sessions.kv_pressure == 0
    assert len(engine.pages.pins) == 0
