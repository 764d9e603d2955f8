"""The planner's invariants, over random steps of a virtual engine and on single snapshots."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

import pytest

from coppice.scheduling import FlowQueues, Plan, Policy, Snapshot, StepPlanner, make_policy
from coppice.scheduling.flows import InOrder
from coppice.scheduling.isolation import IsolatedCounters
from coppice.scheduling.planner import MAX_OVERTAKEN, pages_for
from coppice.scheduling.policy import OrderName, PolicyName
from coppice.scheduling.virtual import Sizes, VirtualEngine, VirtualSequence

POLICIES: list[tuple[PolicyName, OrderName]] = [
    ("fcfs", "arrival"),
    ("fcfs", "aged"),
    ("fair", "arrival"),
    ("fair", "deadline"),
    ("fair-predicted", "shortest"),
    ("isolated", "arrival"),
    ("rpm", "arrival"),
    ("round-robin", "aged"),
]


WISHES = (None, None, 0.05, 0.5)


def step_time(rows: int, keys: int, sequences: int) -> float:
    return 0.002 + 1e-4 * rows + 1e-8 * keys + 1e-5 * sequences


def view(
    tokens: int, computed: int, pages: int, arrival: int, priority: int = 0
) -> VirtualSequence:
    made = VirtualSequence(
        arrival=arrival, num_prompt=tokens, num_answer=1, submitted_s=0.0, priority=priority
    )
    made.num_computed, made.num_pages = computed, pages
    made.rank = (priority, arrival)
    return made


def snapshot(
    running: list[VirtualSequence],
    waiting: Iterable[VirtualSequence] = (),
    *,
    available: int,
    max_rows: int = 64,
    max_sequences: int = 32,
    chunk: int = 64,
    policy: Policy | None = None,
) -> Snapshot:
    queues = FlowQueues((policy or Policy()).flows)
    for sequence in waiting:
        queues.push(sequence)
    return Snapshot(
        running=running,
        waiting=queues,
        now=0.0,
        num_available=available,
        page_size=16,
        max_rows=max_rows,
        max_sequences=max_sequences,
        prefill_chunk=chunk,
    )


class CheckedPlanner:
    """Checks every plan against its snapshot, and that planning changes nothing."""

    def __init__(self, inner: StepPlanner, *, in_order: bool) -> None:
        self._inner = inner
        self._in_order = in_order
        self.gaps: dict[int, int] = {}
        self.widest_gap = 0

    def plan(self, snapshot: Snapshot) -> Plan:
        plan = self._inner.plan(snapshot)
        again = self._inner.plan(snapshot)
        assert [(id(g.sequence), g.num_rows) for g in plan.grants] == [
            (id(g.sequence), g.num_rows) for g in again.grants
        ], "planning is not pure"
        assert again.admit == plan.admit
        assert again.preempt == plan.preempt
        self._check(snapshot, plan)
        return plan

    def _check(self, snapshot: Snapshot, plan: Plan) -> None:
        granted = [id(g.sequence) for g in plan.grants]
        assert len(set(granted)) == len(granted), "a sequence twice in one plan"
        assert sum(g.num_rows for g in plan.grants) <= snapshot.max_rows
        for grant in plan.grants:
            behind = grant.sequence.num_tokens - grant.sequence.num_computed
            assert 1 <= grant.num_rows <= min(behind, snapshot.prefill_chunk)
        preempted = set(map(id, plan.preempt))
        assert not preempted & set(granted), "victim granted rows"
        assert preempted <= set(map(id, snapshot.running))
        assert all(s in snapshot.waiting for s in plan.admit)
        assert not (plan.preempt and plan.admit), "admits while it preempts"
        assert len(snapshot.running) + len(plan.admit) <= snapshot.max_sequences
        if snapshot.running:
            assert plan.grants, "nobody gets on"
            assert id(snapshot.running[0]) not in preempted, "the first in order must stay"
        size = snapshot.page_size
        new = set(map(id, plan.admit))
        need = sum(pages_for(s.num_tokens, size) for s in plan.admit)
        for grant in plan.grants:
            if id(grant.sequence) not in new:
                end = grant.sequence.num_computed + grant.num_rows
                need += max(0, pages_for(end, size) - grant.sequence.num_pages)
        kept = len(snapshot.running) - len(plan.preempt)
        if kept > 1 or plan.admit:
            freed = sum(s.num_pages for s in plan.preempt)
            assert need <= snapshot.num_available + freed, "pages granted that are not there"
        self._check_gaps(snapshot, plan, set(granted) | preempted)
        self._check_order(snapshot, plan)
        self._check_conservation(snapshot, plan)

    def _check_gaps(self, snapshot: Snapshot, plan: Plan, served: set[int]) -> None:
        """A decode that keeps its pages waits for no more than one step."""
        flows = snapshot.waiting.flows
        over = set()
        if isinstance(flows, IsolatedCounters):
            over = flows.over({s.tenant for s in snapshot.running})
        gaps = {}
        for s in snapshot.running:
            if s.tenant in over:
                assert id(s) not in served or s in plan.preempt
            elif s.num_tokens - s.num_computed == 1 and id(s) not in served:
                gaps[s.arrival] = self.gaps.get(s.arrival, 0) + 1
        self.gaps = gaps
        self.widest_gap = max(self.widest_gap, *gaps.values(), 0)
        assert self.widest_gap < 2, "a decode was left out twice"

    def _check_order(self, snapshot: Snapshot, plan: Plan) -> None:
        """Inside a tenant only those that do not fit are passed over, boundedly often."""
        assert all(s.overtaken < MAX_OVERTAKEN for s in plan.overtaken)
        passed = {s.arrival for s in plan.overtaken}
        if snapshot.waiting.urgent:
            return  # a pressing deadline goes first
        for tenant, queue in snapshot.waiting.tenants.items():
            taken = {s.arrival for s in plan.admit if s.tenant == tenant}
            seen = 0
            for s in queue:
                if seen == len(taken):
                    break
                if s.arrival in taken:
                    seen += 1
                else:
                    assert s.arrival in passed, "passed over in silence"

    def _check_conservation(self, snapshot: Snapshot, plan: Plan) -> None:
        """Where rows, places and pages are left, nobody waits (but for a limit a minute)."""
        if not self._in_order or plan.preempt or not snapshot.waiting or plan.overtaken:
            return
        left = snapshot.max_rows - sum(g.num_rows for g in plan.grants)
        slots = snapshot.max_sequences - len(snapshot.running) - len(plan.admit)
        waiting = len(snapshot.waiting) - len(plan.admit)
        if waiting and left > 0 and slots > 0:
            assert plan.why == "no pages"


def fuzz(policy: tuple[PolicyName, OrderName], steps: int, seed: int) -> VirtualEngine:
    """Random work in a pool that is too small: cancels, deadlines, priorities, shared prefixes."""
    rng = random.Random(seed)
    page = 16
    sizes = Sizes(
        num_pages=160,
        page_size=page,
        max_rows=rng.choice((24, 48, 96)),
        max_sequences=16,
        prefill_chunk=rng.choice((7, 32, 64)),
    )
    planner = CheckedPlanner(StepPlanner(), in_order=policy[0] == "fcfs")
    made = make_policy(*policy, limit=40, pool_tokens=sizes.num_pages * page)
    engine = VirtualEngine(step_time, sizes, made, planner=planner)
    live: list[VirtualSequence] = []
    count = 0
    while engine.steps < steps:
        burst = rng.random() < 0.1
        while len(engine.waiting) < 30 and (burst or not engine.has_work):
            count += 1
            prompt = rng.choice((1, 15, 16, 17, 100, 700, 1500))
            made_here = VirtualSequence(
                arrival=count,
                num_prompt=prompt,
                num_answer=rng.choice((1, 5, 40, 300)),
                submitted_s=engine.now,
                tenant=f"t{rng.randrange(4)}",
                priority=rng.choice((0, 0, 1)),
                ttft_s=rng.choice(WISHES) if policy[1] in ("aged", "deadline") else None,
                tpot_s=rng.choice((None, 0.004, 0.02)),
                deadline_s=rng.choice((None, None, 0.3, 3.0)),
                blocks=tuple(rng.randrange(3) + 10 * i for i in range(prompt // 512)),
            )
            engine.submit(made_here)
            live.append(made_here)
            burst = burst and rng.random() < 0.8
        if rng.random() < 0.02 and live:
            engine.cancel(rng.choice(live))
        engine.step()
        if engine.steps % 64 == 0:
            engine.pages.check()
            live = [s for s in live if not s.fate]
    while engine.has_work:
        if engine.step() == step_time(0, 0, 0):
            engine.now += 1.0
    engine.pages.check()
    assert engine.pages.num_used == 0, "pages leaked"
    assert engine.preemptions > 0, "the pool was never short: the test tested nothing"
    assert len(engine.waiting) == engine.waiting.num_tokens == len(engine.waiting.urgent) == 0
    return engine


@pytest.mark.parametrize("policy", POLICIES, ids="-".join)
def test_every_plan_keeps_its_invariants(policy: tuple[PolicyName, OrderName]) -> None:
    fuzz(policy, 10_000 // len(POLICIES) + 1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids="-".join)
def test_every_plan_keeps_its_invariants_for_long(policy: tuple[PolicyName, OrderName]) -> None:
    for seed in range(10):
        fuzz(policy, 10_000 // len(POLICIES) + 1, seed=2 + seed)


def test_of_equal_victims_the_last_in_order_leave() -> None:
    running = [view(33, 32, 2, i) for i in range(4)]
    plan = StepPlanner().plan(snapshot(running, available=0))
    assert [s.arrival for s in plan.preempt] == [3, 2]
    assert [g.sequence.arrival for g in plan.grants] == [0, 1]


def test_victims_are_of_the_lowest_band_then_with_least_to_recompute() -> None:
    running = [view(33, 32, 2, 0), view(64, 0, 4, 1), view(33, 32, 2, 2), view(33, 32, 2, 3, 1)]
    plan = StepPlanner().plan(snapshot(running, available=0))
    assert [s.arrival for s in plan.preempt] == [3]
    running = running[:3]
    plan = StepPlanner().plan(snapshot(running, available=0))
    assert [s.arrival for s in plan.preempt] == [1]


def test_every_decode_runs_beside_a_long_prompt() -> None:
    running = [view(2000, 0, 1, 0), *(view(33, 32, 3, i) for i in range(1, 20))]
    plan = StepPlanner().plan(snapshot(running, available=1000, chunk=512))
    assert len(plan.grants) == 20
    assert sum(g.num_rows for g in plan.grants) == 64


def test_one_that_does_not_fit_is_passed_over_until_it_has_waited_enough() -> None:
    big = view(1600, 0, 0, 0)
    admitted = 0
    for arrival in range(1, 2 * MAX_OVERTAKEN):
        waiting = [big, view(16, 0, 0, arrival)]
        plan = StepPlanner().plan(snapshot([], waiting, available=50))
        admitted += len(plan.admit)
        for sequence in plan.overtaken:
            assert sequence is big
            big.overtaken += 1
        assert plan.why == "no pages"
    assert admitted == MAX_OVERTAKEN == big.overtaken


def test_another_tenant_is_no_way_round_one_that_does_not_fit() -> None:
    policy = make_policy("fair")
    big, small = view(1600, 0, 0, 0), view(16, 0, 0, 1)
    small.tenant = "other"
    for sequence in (big, small):
        sequence.rank = (0, sequence.arrival)
    plan = StepPlanner().plan(snapshot([], [big, small], available=50, policy=policy))
    assert plan.admit == []
    assert plan.why == "no pages"


@pytest.mark.parametrize("tenants", [1, 40, 1000])
@pytest.mark.parametrize("name", ["fcfs", "fair"])
def test_planning_stays_quick_at_scale(tenants: int, name: PolicyName) -> None:
    """At most 1 ms at 256 running and 1,000 waiting (the best of 30 on a busy machine)."""
    policy = make_policy(name)
    running = [view(33, 32, 3, i) for i in range(256)]
    waiting = [view(100, 0, 0, 256 + i) for i in range(1000)]
    for i, sequence in enumerate(waiting):
        sequence.tenant = f"t{i % tenants}"
        sequence.ttft_s = 1.0
    at_scale = snapshot(
        running, waiting, available=10_000, max_rows=512, max_sequences=300, policy=policy
    )
    times = []
    for _ in range(30):
        began = time.perf_counter()
        plan = StepPlanner().plan(at_scale)
        times.append(time.perf_counter() - began)
    assert plan.admit
    assert min(times) < 1e-3


def test_queues_know_what_is_in_them() -> None:
    queues = FlowQueues(InOrder())
    one, two = view(5, 0, 0, 1), view(7, 0, 0, 2)
    queues.push(two)
    queues.push(one)
    assert [s.arrival for s in queues] == [1, 2]
    assert (len(queues), queues.num_tokens) == (2, 12)
    queues.remove(one)
    assert one not in queues
    assert two in queues
    with pytest.raises(KeyError):
        queues.remove(one)
