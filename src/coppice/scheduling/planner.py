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
        """See `Planner`. O(running log running + admitted)."""
        running = sorted(snapshot.running, key=order_key)
        grants = _share_rows(running, snapshot)
        available, preempted = _make_room(running, grants, snapshot)
        if preempted:
            return Plan(preempt=preempted, grants=list(grants.values()))
        admitted = _admit(grants, available, snapshot)
        return Plan(admit=admitted, grants=list(grants.values()))


def _share_rows(running: list[SequenceView], snapshot: Snapshot) -> dict[int, Grant]:
    """Rows for running work, keyed by arrival: decodes, then prompt chunks."""
    grants: dict[int, Grant] = {}
    left = snapshot.max_rows
    behind = [s for s in running if s.num_tokens - s.num_computed > 1]
    decode_cap = left - int(left * PREFILL_SHARE) if behind else left
    for sequence in running:
        if decode_cap and sequence.num_tokens - sequence.num_computed == 1:
            grants[sequence.arrival] = Grant(sequence, 1)
            decode_cap -= 1
            left -= 1
    for sequence in behind:
        rows = min(sequence.num_tokens - sequence.num_computed, snapshot.prefill_chunk, left)
        if rows <= 0:
            break
        grants[sequence.arrival] = Grant(sequence, rows)
        left -= rows
    return grants


def _new_pages(grant: Grant, page_size: int) -> int:
    sequence = grant.sequence
    end = sequence.num_computed + grant.num_rows
    return max(0, pages_for(end, page_size) - sequence.num_pages)


def _make_room(
    running: list[SequenceView], grants: dict[int, Grant], snapshot: Snapshot
) -> tuple[int, list[SequenceView]]:
    """Drop the last in order until what stays has its pages; pages left, and the dropped."""
    need = {key: _new_pages(grant, snapshot.page_size) for key, grant in grants.items()}
    missing = sum(need.values()) - snapshot.num_available
    preempted: list[SequenceView] = []
    for victim in reversed(running):
        if missing <= 0 or len(preempted) == len(running) - 1:
            break
        preempted.append(victim)
        missing -= victim.num_pages + need.get(victim.arrival, 0)
        grants.pop(victim.arrival, None)
    return -missing, preempted


def _admit(grants: dict[int, Grant], available: int, snapshot: Snapshot) -> list[SequenceView]:
    left = snapshot.max_rows - sum(grant.num_rows for grant in grants.values())
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
        grants[sequence.arrival] = Grant(sequence, rows)
        admitted.append(sequence)
        available -= pages
        headroom += 1
        left -= rows
    return admitted
