"""The step planner: decodes first, victims before grants, then turns of those that wait."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from coppice.scheduling.budget import rows_in_time
from coppice.scheduling.interfaces import (
    CostModel,
    Grant,
    Plan,
    SequenceView,
    Snapshot,
    Turns,
)
from coppice.scheduling.isolation import RESERVE, IsolatedCounters

PREFILL_SHARE = 0.1
"""Part of a step's rows decodes cannot take, so that neither side starves the other."""
MAX_OVERTAKEN = 8
"""How often one that does not fit is passed over before all wait for its pages."""


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold ``num_tokens``."""
    return -(-num_tokens // page_size)


class StepPlanner:
    """Continuous batching with chunked prefill, in the order of policies.

    Running sequences come first: those behind by one token (decodes), then prompts by rank,
    within the rows that end before the tightest token is due. When they lack pages, victims
    leave and nobody is admitted. What is left admits waiting sequences by turns, each only
    when its whole current length fits, so that an admitted prompt is not thrown out half-way.

    Args:
        cost: what steps take, for deadlines; without it they do not shorten steps.
        max_overtaken: see `MAX_OVERTAKEN`.
    """

    def __init__(
        self,
        cost: CostModel | None = None,
        *,
        max_overtaken: int = MAX_OVERTAKEN,
    ) -> None:
        self._cost = cost
        self._max_overtaken = max_overtaken

    def plan(self, snapshot: Snapshot) -> Plan:
        """See `Planner`. O(running + tenants + admitted x log tenants)."""
        rows = snapshot.max_rows
        if self._cost is not None:
            rows = rows_in_time(snapshot, self._cost, PREFILL_SHARE)
        flows = snapshot.waiting.flows
        guard = flows if isinstance(flows, IsolatedCounters) else None
        over = set() if guard is None else guard.over({s.tenant for s in snapshot.running})
        grants = _share_rows(snapshot, rows, over)
        if not snapshot.waiting and _most_new_pages(grants, snapshot) <= snapshot.num_available:
            return Plan(grants=grants)
        available, preempted = _make_room(grants, snapshot)
        if preempted:
            return Plan(preempt=preempted, grants=grants, why="no pages")
        if not snapshot.waiting:
            return Plan(grants=grants)
        turns = flows.turns(snapshot.waiting, snapshot.now)
        places = snapshot.max_sequences - len(snapshot.running)
        if guard is not None:
            places = _places(turns, guard, snapshot)
        hall = _Hall(snapshot, grants, Left(rows, places, available), self._max_overtaken)
        self._seat_urgent(hall, turns)
        hall.seat_by_turns(turns)
        return hall.plan()

    def _seat_urgent(self, hall: _Hall, turns: Turns) -> None:
        """Those whose first token is only just possible go before others' turns."""
        snapshot = hall.snapshot
        for due, _, sequence in snapshot.waiting.urgent:
            behind = min(sequence.num_tokens, snapshot.prefill_chunk)
            needs = 0.0 if self._cost is None else self._cost.time(behind)
            if due - 2 * needs > snapshot.now:
                return  # none of the later ones presses either, give or take their length
            if due < snapshot.now or not turns.may_jump(sequence):
                continue  # too late to help, or its tenant has jumped enough
            if hall.is_full or not hall.seat_before_turn(sequence, turns):
                return
            turns.took(sequence)


@dataclass(slots=True)
class _Seated:
    """How far a tenant's queue has been read, and who was passed over on the way."""

    at: int = 0
    passed: list[SequenceView] = field(default_factory=list)


class Left(NamedTuple):
    """What a step has for newcomers, and (``rows``) for all."""

    rows: int
    places: int
    pages: int


class _Hall:
    """Admission in one plan: rows, slots and pages that are left."""

    def __init__(
        self, snapshot: Snapshot, grants: list[Grant], left: Left, max_overtaken: int
    ) -> None:
        self.snapshot = snapshot
        self._grants = grants
        self._rows = left.rows - sum(grant.num_rows for grant in grants)
        self._slots = left.places
        # Where nothing runs, what is kept for others is for the taking: somebody gets on.
        self._available = left.pages - (snapshot.kept if snapshot.running else 0)
        # A page each for the decodes beside it, so as not to evict at once.
        self._headroom = len(grants)
        self._max_overtaken = max_overtaken
        self._admitted: list[SequenceView] = []
        self._ids: set[int] = set()
        self._overtaken: Counter[int] = Counter()
        self._passed: dict[int, SequenceView] = {}
        self._why = ""

    @property
    def is_full(self) -> bool:
        """Whether nobody more fits, however small."""
        return self._rows <= 0 or self._slots <= 0

    def seat(self, sequence: SequenceView) -> bool:
        """Admit it if its whole length fits."""
        snapshot = self.snapshot
        pages = pages_for(sequence.num_tokens + 1, snapshot.page_size)
        spare = self._headroom if snapshot.running or self._admitted else 0
        if pages + spare > self._available:
            return False
        rows = min(sequence.num_tokens - sequence.num_computed, snapshot.prefill_chunk, self._rows)
        self._grants.append(Grant(sequence, rows))
        self._admitted.append(sequence)
        self._ids.add(id(sequence))
        self._available -= pages
        self._headroom += 1
        self._rows -= rows
        self._slots -= 1
        return True

    def seat_before_turn(self, sequence: SequenceView, turns: Turns) -> bool:
        """Admit it although another is in turn, which is passed over: boundedly often."""
        tenant = turns.tenant()
        queue = () if tenant is None else self.snapshot.waiting.tenants[tenant]
        first = next((s for s in queue if id(s) not in self._ids), sequence)
        passed = [] if first is sequence else [first]
        if not self._may_pass(passed) or not self.seat(sequence):
            return False
        self._overtake(passed)
        return True

    def seat_by_turns(self, turns: Turns) -> None:
        """Admit in turn until the step is full or the one in turn must wait for pages.

        A tenant's request that does not fit may be passed over by a later one of the same
        tenant, a limited number of times; never by another tenant's, so that fair shares hold.
        """
        queues = self.snapshot.waiting.tenants
        read: dict[str, _Seated] = {}
        while True:
            tenant = turns.tenant()
            if tenant is None:
                return
            if self.is_full:
                self._why = "batch is full"
                return
            queue = queues[tenant]
            place = read.setdefault(tenant, _Seated())
            if place.at >= len(queue):
                if place.passed:
                    return
                turns.done(tenant)
                continue
            sequence = queue[place.at]
            place.at += 1
            if id(sequence) in self._ids:
                continue
            if not self._may_pass(place.passed):
                return
            if self.seat(sequence):
                turns.took(sequence)
                self._overtake(place.passed)
                continue
            self._why = "no pages"
            place.passed.append(sequence)

    def plan(self) -> Plan:
        """What came of it."""
        passed = [s for key, s in self._passed.items() for _ in range(self._overtaken[key])]
        if not self._why and len(self._admitted) < len(self.snapshot.waiting):
            self._why = "tenant over its share"
        return Plan(admit=self._admitted, grants=self._grants, overtaken=passed, why=self._why)

    def _may_pass(self, passed: list[SequenceView]) -> bool:
        most = self._max_overtaken
        return len(passed) <= most and all(
            s.overtaken + self._overtaken[s.arrival] < most for s in passed
        )

    def _overtake(self, passed: list[SequenceView]) -> None:
        for sequence in passed:
            self._overtaken[sequence.arrival] += 1
            self._passed[sequence.arrival] = sequence


def _places(turns: Turns, guard: IsolatedCounters, snapshot: Snapshot) -> int:
    """Places that may be taken; tenants beyond their share get none beside others' work."""
    free = snapshot.max_sequences - len(snapshot.running)
    if not guard.has_others:
        return free
    greedy = {tenant for tenant in snapshot.waiting.tenants if guard.is_over(tenant)}
    taken = sum(guard.is_over(sequence.tenant) for sequence in snapshot.running)
    others = len(greedy) < len(snapshot.waiting.tenants) or taken < len(snapshot.running)
    left = max(1, int((1 - RESERVE) * snapshot.max_sequences)) - taken
    if others or left <= 0:
        for tenant in greedy:
            turns.done(tenant)
        return free
    return min(free, left)


def _share_rows(snapshot: Snapshot, max_rows: int, over: set[str]) -> list[Grant]:
    """Rows for running work: decodes, then prompt chunks; none for tenants ``over`` a share."""
    grants: list[Grant] = []
    behind: list[SequenceView] = []
    for sequence in snapshot.running:
        if over and sequence.tenant in over:
            continue
        missing = sequence.num_tokens - sequence.num_computed
        if missing == 1:
            grants.append(Grant(sequence, 1))
        elif missing > 1:
            behind.append(sequence)
    left = max_rows
    del grants[left - int(left * PREFILL_SHARE) if behind else left :]
    left -= len(grants)
    for sequence in behind:
        rows = min(sequence.num_tokens - sequence.num_computed, snapshot.prefill_chunk, left)
        if rows <= 0:
            break
        grants.append(Grant(sequence, rows))
        left -= rows
    return grants


def _most_new_pages(grants: list[Grant], snapshot: Snapshot) -> int:
    """Pages that suffice for the grants, whatever the sequences hold: one for a decode."""
    return sum(1 + rows // snapshot.page_size for _, rows in grants)


def _new_pages(grant: Grant, page_size: int) -> int:
    sequence = grant.sequence
    end = sequence.num_computed + grant.num_rows
    return max(0, pages_for(end, page_size) - sequence.num_pages)


def _make_room(grants: list[Grant], snapshot: Snapshot) -> tuple[int, list[SequenceView]]:
    """Drop victims until what stays has its pages; pages left, and the victims.

    The lowest band goes first, in it the one with least to recompute for a page it frees, of
    equals the last in order. The first in order that has rows always stays: somebody gets on.
    """
    need = {id(g.sequence): _new_pages(g, snapshot.page_size) for g in grants}
    missing = sum(need.values()) - snapshot.num_available
    if missing <= 0:
        return -missing, []
    first = next(s for s in snapshot.running if id(s) in need)
    order = sorted((s for s in snapshot.running if s is not first), key=_loss)
    preempted: list[SequenceView] = []
    for victim in order:
        if missing <= 0:
            break
        preempted.append(victim)
        missing -= victim.num_pages + need.get(id(victim), 0)
    gone = set(map(id, preempted))
    grants[:] = [grant for grant in grants if id(grant.sequence) not in gone]
    return -missing, preempted


def _loss(sequence: SequenceView) -> tuple[float, float, float]:
    """Smallest is the best victim: band, tokens to recompute for a page, place from the end.

    The first tokens of a page come free with it, so a page is counted as full or not begun:
    only pages held beyond what is computed make a victim cheaper than its neighbours.
    """
    held = sequence.num_pages
    if not held:
        return (-sequence.priority, inf, 0.0)
    cost = round(sequence.num_computed / held / 8)
    return (-sequence.priority, cost, -sequence.rank[-1])
