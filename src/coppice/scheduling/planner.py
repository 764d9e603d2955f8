"""The step planner: priority, then arrival; victims before grants; chunked prefill."""

from __future__ import annotations

from coppice.scheduling.interfaces import Grant, Plan, SequenceView, Snapshot

PREFILL_SHARE = 0.1
"""Part of a step's rows decodes cannot take, so that neither side starves the other."""


def order_key(sequence: SequenceView) -> tuple[int, int]:
    """First come first served within a priority."""
    return (sequence.priority, sequence.arrival)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold ``num_tokens``."""
    return -(-num_tokens // page_size)


class StepPlanner:
    """Continuous batching with chunked prefill.

    Running sequences come first: those behind by one token (decodes), then prompts by order.
    What is left admits waiting sequences, each only when its whole current length fits, so
    that an admitted prompt is not thrown out half-way. When running work itself lacks pages,
    the last in order leave.
    """

    def plan(self, snapshot: Snapshot) -> Plan:
        """See `Planner`. O(running + admitted)."""
        grants = _share_rows(snapshot)
        if not snapshot.waiting and _most_new_pages(grants, snapshot) <= snapshot.num_available:
            return Plan(grants=grants)
        available, preempted = _make_room(grants, snapshot)
        if preempted:
            return Plan(preempt=preempted, grants=grants)
        return Plan(admit=_admit(grants, available, snapshot), grants=grants)


def _share_rows(snapshot: Snapshot) -> list[Grant]:
    """Rows for running work: decodes, then prompt chunks."""
    grants: list[Grant] = []
    behind: list[SequenceView] = []
    for sequence in snapshot.running:
        missing = sequence.num_tokens - sequence.num_computed
        if missing == 1:
            grants.append(Grant(sequence, 1))
        elif missing > 1:
            behind.append(sequence)
    left = snapshot.max_rows
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
    """Drop the last in order until what stays has its pages; pages left, and the dropped."""
    need = {id(g.sequence): _new_pages(g, snapshot.page_size) for g in grants}
    missing = sum(need.values()) - snapshot.num_available
    preempted: list[SequenceView] = []
    for victim in reversed(snapshot.running):
        if missing <= 0 or len(preempted) == len(snapshot.running) - 1:
            break
        preempted.append(victim)
        missing -= victim.num_pages + need.get(id(victim), 0)
    if preempted:
        gone = set(map(id, preempted))
        grants[:] = [grant for grant in grants if id(grant.sequence) not in gone]
    return -missing, preempted


def _admit(grants: list[Grant], available: int, snapshot: Snapshot) -> list[SequenceView]:
    left = snapshot.max_rows - sum(grant.num_rows for grant in grants)
    slots = snapshot.max_sequences - len(snapshot.running)
    headroom = len(grants)  # a page each for the decodes beside it, so as not to evict at once
    admitted: list[SequenceView] = []
    for sequence in snapshot.waiting:
        if left <= 0 or len(admitted) == slots:
            break
        pages = pages_for(sequence.num_tokens + 1, snapshot.page_size)
        spare = headroom if snapshot.running or admitted else 0
        if pages + spare > available:
            break
        rows = min(sequence.num_tokens - sequence.num_computed, snapshot.prefill_chunk, left)
        grants.append(Grant(sequence, rows))
        admitted.append(sequence)
        available -= pages
        headroom += 1
        left -= rows
    return admitted
