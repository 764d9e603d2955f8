"""Agents in the simulator: turns extend turns, tools share places, nothing is lost or leaks."""

from __future__ import annotations

import random
import statistics

import pytest

from coppice.scheduling.agents import Agent, AgentDriver, Turn
from coppice.scheduling.flows import FairCounters, InOrder
from coppice.scheduling.interfaces import Retention
from coppice.scheduling.orders import ByArrival, BySessionService
from coppice.scheduling.planner import StepPlanner
from coppice.scheduling.policy import Policy
from coppice.scheduling.retention import AlwaysDrop, AlwaysKeep, ByHazard
from coppice.scheduling.sessions import IDLE_S
from coppice.scheduling.virtual import Sizes, VirtualEngine
from coppice.scheduling.window import SessionWindow
from tests.kits.schedule import CheckedPlanner

PAGE = 16


def step_time(rows: int, keys: int, sequences: int) -> float:
    del keys, sequences
    return 0.02 + 0.0005 * rows if rows else 0.0


def rebuild_s(pages: int) -> float:
    return 0.0005 * pages * PAGE


def engine_of(policy: Policy, num_pages: int = 400) -> VirtualEngine:
    return VirtualEngine(
        step_time,
        Sizes(
            num_pages=num_pages, page_size=PAGE, max_rows=128, prefill_chunk=128,
            max_sequences=32, block_tokens=PAGE,
        ),
        policy,
    )  # fmt: skip


def all_of_it(retention: Retention | None = None) -> Policy:
    return Policy(InOrder(), BySessionService(), SessionWindow(), retention or ByHazard(rebuild_s))


def crowd(count: int, rate: float, seed: int = 3) -> list[Agent]:
    rng = random.Random(seed)
    now, made = 0.0, []
    for index in range(count):
        now += rng.expovariate(rate)
        turns = [
            Turn(rng.randint(40, 160), rng.randint(5, 20), rng.choice(["look", "test"]),
                 rng.lognormvariate(0, 1), on_cpu=rng.random() < 0.7)
            for _ in range(rng.randint(4, 9))
        ]  # fmt: skip
        made.append(Agent(index=index, begins_s=now, turns=turns, shared_tokens=64))
    return made


def mean_latency(policy: Policy, rate: float, count: int = 60) -> float:
    agents = crowd(count, rate)
    AgentDriver(engine_of(policy), agents, places=16).run()
    return statistics.mean(agent.latency_s for agent in agents)


def test_a_turn_extends_the_last_and_finds_its_pages() -> None:
    engine = engine_of(all_of_it())
    turns = [Turn(100, 10, "look", 2.0), Turn(30, 10, "look", 3.0), Turn(30, 5)]
    agent = Agent(index=0, begins_s=1.0, turns=turns)
    AgentDriver(engine, [agent]).run()
    first, second, third = agent.sequences
    assert [s.num_prompt for s in agent.sequences] == [100, 140, 180]
    assert second.cached_tokens == 109 // PAGE * PAGE  # the last answered token has no KV yet
    assert third.cached_tokens == 149 // PAGE * PAGE
    assert second.submitted_s == pytest.approx(first.ended_s + 2.0)
    assert agent.latency_s == pytest.approx(third.ended_s - 1.0)
    assert engine.sessions.num_inside == engine.sessions.num_paused == 0
    assert engine.pages.num_kept == 0


def test_no_more_tools_run_than_there_are_places() -> None:
    agents = [
        Agent(index=i, begins_s=0.0, turns=[Turn(20, 2, "look", 5.0), Turn(5, 2)])
        for i in range(10)
    ]
    driver = AgentDriver(engine_of(Policy()), agents, places=3)
    driver.run()
    assert driver.peak == 3
    assert driver.busy == 0
    assert max(agent.ended_s for agent in agents) > 20.0  # four rounds of five seconds


def test_under_load_sessions_end_sooner_and_at_light_load_no_later() -> None:
    plain = Policy
    assert mean_latency(plain(), 2.0) > 1.4 * mean_latency(all_of_it(), 2.0)
    assert mean_latency(all_of_it(), 0.05, 20) <= 1.02 * mean_latency(plain(), 0.05, 20)


@pytest.mark.parametrize("retention", [AlwaysKeep, AlwaysDrop, lambda: ByHazard(rebuild_s)])
def test_every_retention_ends_every_session(retention: type[AlwaysKeep]) -> None:
    agents = crowd(40, 5.0)
    engine = engine_of(Policy(retention=retention()), 120)
    AgentDriver(engine, agents, places=4).run()
    assert all(agent.ended_s > agent.begins_s for agent in agents)
    engine.pages.check(engine.running)
    assert engine.pages.num_available == engine.pages.num_pages


def test_lost_sessions_hold_neither_pages_nor_places_for_ever() -> None:
    window = SessionWindow(size=2, idle=0.0)
    engine = engine_of(Policy(admission=window, retention=ByHazard(rebuild_s)), 60)
    agents = [
        Agent(index=i, begins_s=0.0, turns=[Turn(300, 5, "look", 1.0), Turn(5, 2)], lost_after=1)
        for i in range(2)
    ]
    late = [Agent(index=2, begins_s=1.0, turns=[Turn(600, 5)])]
    AgentDriver(engine, [*agents, *late]).run()
    assert late[0].latency_s < IDLE_S + 5.0, "the machine had nothing else to do"
    assert engine.sessions.num_inside == 2
    engine.now += 600.0
    engine.let_in()
    assert engine.sessions.num_inside == engine.pages.num_kept == 0
    assert engine.sessions.given_up == 2


def test_pages_of_the_paused_give_way_to_what_is_let_in() -> None:
    engine = engine_of(Policy(retention=AlwaysKeep()), 60)
    lost = [
        Agent(index=i, begins_s=0.0, turns=[Turn(300, 5, "look", 1.0), Turn(5, 2)], lost_after=1)
        for i in range(3)
    ]
    big = [Agent(index=9, begins_s=50.0, turns=[Turn(900, 5)])]
    AgentDriver(engine, [*lost, *big]).run()
    assert big[0].latency_s < 5.0
    assert engine.sessions.num_paused == 3
    engine.pages.check(engine.running)


def test_a_cancelled_turn_leaves_its_session_time_to_come_back() -> None:
    engine = engine_of(all_of_it())
    turns = [Turn(100, 10, "look", 1.0), Turn(30, 50)]
    agent = Agent(index=0, begins_s=0.0, turns=turns)
    driver = AgentDriver(engine, [agent])
    engine.on_end = None
    driver._send(agent)
    engine.step()
    engine.cancel(agent.sequences[0])
    assert engine.sessions.num_inside == engine.sessions.num_paused == 1
    assert engine.pages.num_used == 0
    engine.now = engine.sessions.next_change_s()
    engine.let_in()
    assert engine.sessions.num_inside == engine.sessions.num_paused == 0
    engine.end_session("agent-0")
    engine.end_session("never heard of")


@pytest.mark.parametrize("seed", range(6))
def test_random_pauses_cancels_and_losses_leak_no_page(seed: int) -> None:
    rng = random.Random(seed)
    retention = [lambda: ByHazard(rebuild_s), AlwaysKeep, AlwaysDrop, lambda: None][seed % 4]()
    flows = FairCounters({}) if seed % 2 else InOrder()
    order = BySessionService() if seed % 3 else ByArrival()
    engine = engine_of(Policy(flows, order, SessionWindow(), retention), 90)
    engine.planner = CheckedPlanner(StepPlanner(), conserves=False)
    agents = crowd(30, 3.0, seed)
    for agent in agents:
        agent.tenant = f"tenant-{rng.randrange(3)}"
        if rng.random() < 0.2:
            agent.lost_after = rng.randint(1, len(agent.turns) - 1)
    driver = AgentDriver(engine, agents, places=2)
    step = engine.step

    def disturbed() -> float:
        if rng.random() < 0.02:
            agent = rng.choice(agents)
            if agent.sequences:
                engine.cancel(agent.sequences[-1])
        if rng.random() < 0.01:
            engine.end_session(rng.choice(agents).session)
        took = step()
        engine.pages.check(engine.running)
        return took

    engine.step = disturbed  # type: ignore[method-assign]
    driver.run()
    for agent in agents:
        engine.end_session(agent.session)
    engine.pages.check(engine.running)
    assert engine.pages.num_kept == 0
    assert engine.pages.num_used == 0
    assert not engine.running
    assert not engine.waiting
    assert not engine.sessions.outside
    assert engine.sessions.num_inside == 0
    assert engine.sessions.kv_pressure == 0
    fates = [s.fate for agent in agents for s in agent.sequences]
    assert "cancelled" in fates
    assert set(fates) <= {"finished", "cancelled"}


def test_an_idle_machine_takes_one_more_whatever_the_window_says() -> None:
    window = SessionWindow(size=1, idle=0.0, low=0.0)
    engine = engine_of(Policy(admission=window))
    slow = Agent(index=0, begins_s=0.0, turns=[Turn(100, 5, "look", 100.0), Turn(5, 2)])
    others = [Agent(index=i, begins_s=1.0, turns=[Turn(100, 5)]) for i in (1, 2)]
    AgentDriver(engine, [slow, *others]).run()
    assert [round(other.latency_s / IDLE_S) for other in others] == [1, 2]
    assert engine.sessions.num_inside == 0
