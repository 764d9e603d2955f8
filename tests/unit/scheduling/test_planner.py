"""The planner's invariants on random snapshots."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from coppice.scheduling import Snapshot, StepPlanner
from coppice.scheduling.planner import order_key, pages_for


@dataclass(eq=False)
class View:
    num_tokens: int
    num_computed: int
    num_pages: int
    priority: int
    arrival: int
    tenant: str = "t"


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    page_size = draw(st.sampled_from([4, 16]))
    arrivals = iter(draw(st.permutations(range(40))))
    running = []
    for _ in range(draw(st.integers(0, 12))):
        computed = draw(st.integers(0, 60))
        tokens = computed + draw(st.one_of(st.just(1), st.integers(1, 80)))
        held = max(1, pages_for(computed, page_size))
        running.append(View(tokens, computed, held, draw(st.integers(0, 2)), next(arrivals)))
    waiting = [
        View(draw(st.integers(1, 120)), 0, 0, draw(st.integers(0, 2)), next(arrivals))
        for _ in range(draw(st.integers(0, 12)))
    ]
    return Snapshot(
        running=sorted(running, key=order_key),
        waiting=sorted(waiting, key=order_key),
        num_available=draw(st.integers(0, 30)),
        page_size=page_size,
        max_rows=draw(st.integers(len(running) + 1, 128)),
        max_sequences=draw(st.integers(max(1, len(running)), 16)),
        prefill_chunk=draw(st.integers(1, 64)),
    )


@given(snapshots())
@settings(max_examples=600, deadline=None)
def test_plan_keeps_its_invariants(snapshot: Snapshot) -> None:
    plan = StepPlanner().plan(snapshot)
    granted = [g.sequence for g in plan.grants]
    assert len(set(map(id, granted))) == len(granted), "a sequence twice in one plan"
    assert sum(g.num_rows for g in plan.grants) <= snapshot.max_rows
    for grant in plan.grants:
        behind = grant.sequence.num_tokens - grant.sequence.num_computed
        assert 1 <= grant.num_rows <= min(behind, snapshot.prefill_chunk)
    assert not set(map(id, plan.preempt)) & set(map(id, granted)), "victim granted rows"
    assert set(map(id, plan.preempt)) <= set(map(id, snapshot.running))
    assert set(map(id, plan.admit)) <= set(map(id, snapshot.waiting))
    assert not (plan.preempt and plan.admit), "admits while it preempts"
    assert len(snapshot.running) + len(plan.admit) <= snapshot.max_sequences
    order = [id(s) for s in snapshot.waiting]
    assert [id(s) for s in plan.admit] == order[: len(plan.admit)], "a waiter was overtaken"
    need = sum(
        max(
            0,
            pages_for(g.sequence.num_computed + g.num_rows, snapshot.page_size)
            - g.sequence.num_pages,
        )
        for g in plan.grants
    )
    kept = len(snapshot.running) - len(plan.preempt)
    if kept > 1 or plan.admit:
        freed = sum(s.num_pages for s in plan.preempt)
        assert need <= snapshot.num_available + freed, "pages granted that are not there"


@given(snapshots())
@settings(max_examples=200, deadline=None)
def test_some_running_sequence_always_gets_rows(snapshot: Snapshot) -> None:
    if snapshot.running:
        assert StepPlanner().plan(snapshot).grants


def test_victims_are_the_last_in_order() -> None:
    running = [View(33, 32, 2, 0, i) for i in range(4)]
    plan = StepPlanner().plan(
        Snapshot(
            running=running,
            waiting=[],
            num_available=0,
            page_size=16,
            max_rows=64,
            max_sequences=8,
            prefill_chunk=64,
        )
    )
    assert [s.arrival for s in plan.preempt] == [3, 2]
    assert [g.sequence.arrival for g in plan.grants] == [0, 1]


def test_every_decode_runs_beside_a_long_prompt() -> None:
    running = [View(2000, 0, 1, 0, 0), *(View(33, 32, 3, 0, i) for i in range(1, 20))]
    plan = StepPlanner().plan(
        Snapshot(
            running=running,
            waiting=[],
            num_available=1000,
            page_size=16,
            max_rows=64,
            max_sequences=32,
            prefill_chunk=512,
        )
    )
    assert len(plan.grants) == 20
    assert sum(g.num_rows for g in plan.grants) == 64


def test_planning_stays_quick_at_scale() -> None:
    """At most 1 ms at 256 running and 1,000 waiting (median of 20; generous on a busy box)."""
    running = [View(33, 32, 3, 0, i) for i in range(256)]
    waiting = [View(100, 0, 0, 0, 256 + i) for i in range(1000)]
    snapshot = Snapshot(
        running=running,
        waiting=waiting,
        num_available=10_000,
        page_size=16,
        max_rows=512,
        max_sequences=300,
        prefill_chunk=256,
    )
    times = []
    for _ in range(20):
        began = time.perf_counter()
        StepPlanner().plan(snapshot)
        times.append(time.perf_counter() - began)
    assert sorted(times)[0] < 1e-3
