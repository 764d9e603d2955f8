"""The planner's invariants, checked on every plan and step of a virtual engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from coppice.scheduling import Plan, SequenceView, Snapshot, StepPlanner
from coppice.scheduling.interfaces import Event
from coppice.scheduling.isolation import IsolatedCounters
from coppice.scheduling.planner import MAX_OVERTAKEN, pages_for
from coppice.scheduling.virtual import Batch, VirtualEngine, VirtualSequence


@dataclass(slots=True)
class Wait:
    """One that waits: how many it had to wait for, and how many passed it."""

    sequence: SequenceView
    ahead: int
    jumped: int = 0


def later(one: SequenceView, other: SequenceView) -> bool:
    """Whether, inside a tenant, one comes after the other."""
    return one.tenant == other.tenant and one.rank > other.rank


class CheckedPlanner:
    """Checks every plan against its snapshot, and that planning changes nothing.

    Args:
        inner: plans.
        conserves: whether the policy lets nobody wait while there is room.
    """

    def __init__(self, inner: StepPlanner, *, conserves: bool) -> None:
        self._inner = inner
        self._conserves = conserves
        self._gaps: dict[int, int] = {}
        self._waits: dict[int, Wait] = {}
        self.crowded = 0
        """Plans that left somebody waiting although rows and places were left."""

    def plan(self, snapshot: Snapshot) -> Plan:
        """See `Planner`."""
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
        flows, over = snapshot.waiting.flows, set[str]()
        if isinstance(flows, IsolatedCounters):
            over = flows.over({s.tenant for s in snapshot.running})
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
        assert len(set(map(id, plan.admit))) == len(plan.admit), "admitted twice"
        assert not (plan.preempt and plan.admit), "admits while it preempts"
        assert len(snapshot.running) + len(plan.admit) <= snapshot.max_sequences
        if snapshot.running:
            assert plan.grants, "nobody gets on"
            first = next(s for s in snapshot.running if s.tenant not in over)
            assert id(first) not in preempted, "the first in order must stay"
        left = self._check_pages(snapshot, plan)
        self._check_gaps(snapshot, over, set(granted), preempted)
        self._check_waits(snapshot, plan)
        self._check_conservation(snapshot, plan, left)

    def _check_pages(self, snapshot: Snapshot, plan: Plan) -> int:
        """Every grant has its pages; those that are left."""
        size = snapshot.page_size
        new = set(map(id, plan.admit))
        need = sum(pages_for(s.num_tokens + 1, size) for s in plan.admit)
        for grant in plan.grants:
            if id(grant.sequence) not in new:
                end = grant.sequence.num_computed + grant.num_rows
                need += max(0, pages_for(end, size) - grant.sequence.num_pages)
        left = snapshot.num_available + sum(s.num_pages for s in plan.preempt) - need
        kept = len(snapshot.running) - len(plan.preempt)
        if kept > 1 or plan.admit:
            assert left >= 0, "pages granted that are not there"
        return left

    def _check_gaps(
        self, snapshot: Snapshot, over: set[str], granted: set[int], preempted: set[int]
    ) -> None:
        """A decode that keeps its pages waits for no more than one step, if not over a share."""
        gaps = {}
        for s in snapshot.running:
            if s.tenant in over:
                assert id(s) not in granted
            elif s.num_tokens - s.num_computed == 1 and id(s) not in granted | preempted:
                gaps[s.arrival] = self._gaps.get(s.arrival, 0) + 1
        self._gaps = gaps
        assert max(gaps.values(), default=0) < 2, "a decode was left out twice"

    def _check_waits(self, snapshot: Snapshot, plan: Plan) -> None:
        """The wait is bounded: by those ahead, and by so many that pass each of them."""
        waiting = {s.arrival: s for s in snapshot.waiting}
        for s in (s for arrival, s in waiting.items() if arrival not in self._waits):
            for wait in self._waits.values():
                wait.ahead += not later(s, wait.sequence)
            ahead = sum(not later(other, s) for other in waiting.values()) - 1
            self._waits[s.arrival] = Wait(s, ahead)
        taken = {s.arrival for s in plan.admit}
        self._waits = {
            arrival: wait
            for arrival, wait in self._waits.items()
            if arrival in waiting and arrival not in taken
        }
        for wait in self._waits.values():
            wait.jumped += sum(later(s, wait.sequence) for s in plan.admit)
            assert wait.jumped <= MAX_OVERTAKEN * (1 + wait.ahead), "passed over without end"
            assert wait.sequence.overtaken <= MAX_OVERTAKEN

    def _check_conservation(self, snapshot: Snapshot, plan: Plan, pages: int) -> None:
        """Where rows and places are left, whoever waits does so for pages."""
        rows = snapshot.max_rows - sum(g.num_rows for g in plan.grants)
        places = snapshot.max_sequences - len(snapshot.running) - len(plan.admit)
        taken = set(map(id, plan.admit))
        left = [s for s in snapshot.waiting if id(s) not in taken]
        if not left or rows <= 0 or places <= 0 or plan.preempt or not self._conserves:
            return
        if plan.why == "batch is full" and any(s.tpot_s for s in snapshot.running):
            return  # the step was made short for somebody's next token
        self.crowded += 1
        spare = len(plan.grants)
        assert plan.why == "no pages"
        assert any(pages_for(s.num_tokens + 1, snapshot.page_size) + spare > pages for s in left), (
            "room is left and nobody lacks pages"
        )


class CheckedEngine(VirtualEngine):
    """Keeps an account of every token computed, delivered and charged, and of every page."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, on_token=self._delivered, **kwargs)
        self.ended: list[VirtualSequence] = []
        self._computed = self._given_up = 0
        self._tokens: Counter[int] = Counter()
        self._charged: Counter[tuple[int, Event]] = Counter()
        self._times: Counter[tuple[int, Event]] = Counter()
        flows = self.policy.flows
        charge = flows.charge

        def counted(s: SequenceView, event: Event, tokens: int, now: float) -> None:
            self._charged[s.arrival, event] += tokens
            self._times[s.arrival, event] += 1
            charge(s, event, tokens, now)

        flows.charge = counted  # type: ignore[method-assign]

    def commit(self, batch: Batch) -> None:
        """See `VirtualEngine`."""
        self._computed += sum(end - s.num_computed for s, end in batch)
        super().commit(batch)

    def check(self) -> None:
        """Raise `AssertionError` where tokens or pages were lost or made up."""
        self.pages.check(self.running)
        held = sum(s.num_computed for s in self.running)
        assert self._computed + self.pages.hit_tokens == self._given_up + held
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting)
        assert self.waiting.num_tokens == sum(s.num_tokens for s in waiting)
        assert all(s.num_pages == s.num_computed == 0 for s in waiting)

    def check_ends(self) -> None:
        """Every answer has its length, every token was delivered and charged once."""
        for s in self.ended:
            assert s.num_generated == s.num_answer or s.fate != "finished"
            assert self._tokens[s.arrival] == s.num_generated
            assert self._charged[s.arrival, "generated"] == s.num_generated
            assert self._times[s.arrival, "ended"] == 1
            admitted = self._times[s.arrival, "admitted"]
            assert admitted == (1 if s.scheduled_s else 0), "charged twice for its prompt"
            assert self._charged[s.arrival, "admitted"] == admitted * s.num_prompt

    def _delivered(self, sequence: VirtualSequence, now: float) -> None:
        self._tokens[sequence.arrival] += 1

    def _leave(self, sequence: VirtualSequence) -> None:
        self._given_up += sequence.num_computed
        super()._leave(sequence)

    def _end(self, sequence: VirtualSequence, fate: str) -> None:
        super()._end(sequence, fate)
        self.ended.append(sequence)
