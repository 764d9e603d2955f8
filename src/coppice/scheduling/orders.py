"""Orders inside a tenant. Keys never change: ageing shows as the time of arrival in them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from coppice.scheduling.interfaces import Rank, SequenceView

MOST_SESSIONS = 4096
"""Sessions whose service is remembered; the one not heard of longest is forgotten first."""


@dataclass(frozen=True, slots=True)
class ByArrival:
    """First come first served within a priority, which is never overcome."""

    def key(self, sequence: SequenceView) -> Rank:
        """See `RequestOrder`."""
        return (sequence.priority, sequence.arrival)


@dataclass(frozen=True, slots=True)
class ByAgedPriority:
    """Priority, each level worth ``ageing_s`` seconds of waiting.

    The one whose ``level * ageing_s - waited`` is smallest comes first; all waits grow alike,
    so the order is that of ``level * ageing_s + arrival time`` and nobody starves.
    """

    ageing_s: float = 30.0

    def key(self, sequence: SequenceView) -> Rank:
        """See `RequestOrder`."""
        aged = sequence.submitted_s + sequence.priority * self.ageing_s
        return (aged, sequence.arrival)


@dataclass(frozen=True, slots=True)
class ShortestPrompt:
    """Shortest prompt first, each overtaken for ``patience`` times its own reading at most.

    Of two that came together the shorter goes first; one that comes later does so only within
    ``patience`` times what the other's prompt takes longer to read. So nobody starves, on a slow
    machine as on a quick one, and a short question does not wait for a long one's reading.

    Attributes:
        per_row_s: seconds a prompt token takes here and now; 0 while nobody knows, which is the
            order of arrival.
        patience: see above.

    Source: Nexus's prefill order, ``tokens - gamma * waited``, gamma as a share of the rate.
    """

    per_row_s: Callable[[], float]
    patience: float = 20.0

    def key(self, sequence: SequenceView) -> Rank:
        """See `RequestOrder`."""
        worth_s = self.patience * self.per_row_s() * sequence.num_prompt
        return (sequence.priority, sequence.submitted_s + worth_s, sequence.arrival)


@dataclass(frozen=True, slots=True)
class ByDeadline:
    """Earliest wish for a first token first; those without one come after, by arrival."""

    def key(self, sequence: SequenceView) -> Rank:
        """See `RequestOrder`."""
        wish = sequence.ttft_s
        due = inf if wish is None else sequence.submitted_s + wish
        return (sequence.priority, due, sequence.arrival)


@dataclass(slots=True)
class BySessionService:
    """Feedback levels by what a session has had, continuations first, waiting makes up for it.

    A session begins at level 0 and sinks by one when it had ``quantum * 2^level`` tokens there. A
    level is worth ``ageing_s`` seconds of waiting and a first turn half of that, so nobody
    starves: whoever has waited that much longer goes first. Requests of no session are first
    turns. Reorders inside a tenant only.

    Attributes:
        quantum: tokens, prompt and answer.
        ageing_s: see above.

    Source: MARS (2026), agent-centric order, after multi-level feedback queues.
    """

    quantum: int = 4096
    ageing_s: float = 10.0
    _sessions: OrderedDict[str, tuple[int, int]] = field(default_factory=OrderedDict)

    def key(self, sequence: SequenceView) -> Rank:
        """See `RequestOrder`."""
        behind = self._level(sequence)
        return (
            sequence.priority,
            sequence.submitted_s + behind * self.ageing_s,
            sequence.arrival,
        )

    def _level(self, sequence: SequenceView) -> float:
        session, tokens = sequence.session, sequence.num_prompt
        if not session:
            return 0.5
        known = self._sessions.pop(session, None)
        served, last = known or (0, 0)
        # What the prompt has more than the last one was computed since; a shorter one, anew.
        self._sessions[session] = (served + tokens - (last if tokens >= last else 0), tokens)
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return 0.5 if known is None else math.floor(math.log2(1 + served / self.quantum))
