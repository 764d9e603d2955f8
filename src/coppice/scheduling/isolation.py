"""Tenants within their share do not feel those beyond it, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from coppice.scheduling.flows import FairCounters
from coppice.scheduling.interfaces import Event, SequenceView, Turns
from coppice.scheduling.queue import FlowQueues

MEMORY_S = 20.0
"""Service fades by a factor e in so many seconds."""
OVER = 1.5
"""A tenant is beyond its share at so many times the mean of the tenants seen lately."""
RESERVE = 0.5
"""Part of the places that tenants beyond their share leave to others seen lately."""
FORGET = 1e-3
"""A tenant with less than this part of the mean left is not counted as seen lately."""


class IsolatedCounters:
    """Fair counters, and steps without rows of tenants beyond their share while others run.

    Fair counters decide who is *admitted*; on a machine whose steps take longer with every row
    a greedy tenant's admitted sequences still slow down everyone's. Here such a tenant's
    sequences keep their pages but sit out steps in which a tenant within its share has rows,
    and leave it places. The price: the batches are smaller, so the machine does less in all,
    and the decode gap of a tenant beyond its share is bounded by the others' work only.

    Args:
        counters: who is next, as before.
        memory_s: see `MEMORY_S`.
    """

    def __init__(self, counters: FairCounters, memory_s: float = MEMORY_S) -> None:
        self.counters = counters
        self._memory_s = memory_s
        self._recent: dict[str, float] = {}
        self._then = 0.0

    def enqueue(self, tenant: str, backlogged: Mapping[str, object], last: str) -> None:
        """See `FlowOrder`."""
        self.counters.enqueue(tenant, backlogged, last)

    def charge(self, sequence: SequenceView, event: Event, tokens: int, now: float) -> None:
        """See `FlowOrder`."""
        self.counters.charge(sequence, event, tokens, now)
        price = {"admitted": 1.0, "generated": 2.0, "ended": 0.0}[event] * tokens
        self._fade(now)
        tenant = sequence.tenant
        share = price / self.counters.weight(tenant)
        self._recent[tenant] = self._recent.get(tenant, 0.0) + share

    def turns(self, queues: FlowQueues, now: float) -> Turns:
        """See `FlowOrder`."""
        return self.counters.turns(queues, now)

    def over(self, tenants: Iterable[str]) -> set[str]:
        """Those of some tenants that are beyond their share, if any other is not."""
        names = set(tenants)
        recent = self._recent
        if len(recent) < 2:  # noqa: PLR2004 - alone, nobody is beyond a share
            return set()
        mean = sum(recent.values()) / len(recent)
        found = {name for name in names if recent.get(name, 0.0) > OVER * mean}
        return found if found != names else set()

    @property
    def has_others(self) -> bool:
        """Whether more than one tenant was seen lately, so that places are to be left."""
        return len(self._recent) > 1

    def is_over(self, tenant: str) -> bool:
        """Whether a tenant is beyond its share."""
        mean = sum(self._recent.values()) / max(1, len(self._recent))
        return self._recent.get(tenant, 0.0) > OVER * mean

    def _fade(self, now: float) -> None:
        passed = now - self._then
        if passed < 0.0:  # the clock went back: from here on again
            self._then = now
        if passed < self._memory_s / 50:
            return
        self._then = now
        factor = math.exp(-passed / self._memory_s)
        least = FORGET * sum(self._recent.values()) / max(1, len(self._recent))
        self._recent = {t: s * factor for t, s in self._recent.items() if s > least}
