"""Orders inside a tenant. Keys never change: ageing shows as the time of arrival in them."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from coppice.scheduling.interfaces import Rank, SequenceView


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
    """Shortest prompt first; a second of waiting is worth ``tokens_per_s`` tokens.

    Source: Nexus's prefill order, ``tokens - gamma * waited``.
    """

    tokens_per_s: float = 200.0

    def key(self, sequence: SequenceView) -> Rank:
        """See `RequestOrder`."""
        aged = sequence.num_prompt + self.tokens_per_s * sequence.submitted_s
        return (sequence.priority, aged, sequence.arrival)


@dataclass(frozen=True, slots=True)
class ByDeadline:
    """Earliest wish for a first token first; those without one come after, by arrival."""

    def key(self, sequence: SequenceView) -> Rank:
        """See `RequestOrder`."""
        wish = sequence.ttft_s
        due = inf if wish is None else sequence.submitted_s + wish
        return (sequence.priority, due, sequence.arrival)
