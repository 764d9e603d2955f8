"""Waiting sequences: one sorted list a tenant, and the urgent ones by their deadline."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

from coppice.scheduling.interfaces import FlowOrder, SequenceView

_rank = attrgetter("rank")

Urgent = tuple[float, int, SequenceView]
"""When the first token is due, arrival, sequence."""


class FlowQueues:
    """Who waits, by tenant.

    Nothing here walks a queue: putting in and taking out costs O(log n) comparisons, and a
    plan looks at the heads it can use.

    Args:
        flows: told when a tenant's queue stops being empty.
    """

    def __init__(self, flows: FlowOrder) -> None:
        self.flows = flows
        self._queues: dict[str, list[SequenceView]] = {}
        self._urgent: list[Urgent] = []
        self._last_emptied = ""
        self._count = 0
        self.num_tokens = 0
        """Tokens of all that wait."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SequenceView]:
        for queue in self._queues.values():
            yield from queue

    @property
    def tenants(self) -> Mapping[str, Sequence[SequenceView]]:
        """Queues that are not empty, each by rank."""
        return self._queues

    @property
    def urgent(self) -> Sequence[Urgent]:
        """Those with a wish for their first token, soonest first."""
        return self._urgent

    def push(self, sequence: SequenceView) -> None:
        """Put in, at its rank."""
        queue = self._queues.get(sequence.tenant)
        if queue is None:
            self.flows.enqueue(sequence.tenant, self._queues, self._last_emptied)
            queue = self._queues[sequence.tenant] = []
        insort(queue, sequence, key=_rank)
        self._count += 1
        self.num_tokens += sequence.num_tokens
        due = _due(sequence)
        if due is not None:
            insort(self._urgent, due)

    def remove(self, sequence: SequenceView) -> None:
        """Take out one that is in.

        Raises:
            KeyError: it is not.
        """
        queue = self._queues[sequence.tenant]
        at = _place(queue, sequence)
        if at is None:
            raise KeyError(f"sequence {sequence.arrival} does not wait")
        del queue[at]
        if not queue:
            del self._queues[sequence.tenant]
            self._last_emptied = sequence.tenant
        self._count -= 1
        self.num_tokens -= sequence.num_tokens
        due = _due(sequence)
        if due is not None:
            del self._urgent[bisect_left(self._urgent, due)]

    def __contains__(self, sequence: SequenceView) -> bool:
        queue = self._queues.get(sequence.tenant)
        return queue is not None and _place(queue, sequence) is not None


def _place(queue: Sequence[SequenceView], sequence: SequenceView) -> int | None:
    at = bisect_left(queue, sequence.rank, key=_rank)
    return at if at < len(queue) and queue[at] is sequence else None


def _due(sequence: SequenceView) -> Urgent | None:
    if sequence.ttft_s is None or sequence.first_token_s:
        return None
    return (sequence.submitted_s + sequence.ttft_s, sequence.arrival, sequence)
