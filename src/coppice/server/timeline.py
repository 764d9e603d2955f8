"""The recent requests and how long each phase of theirs took; no text, no prompts."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coppice.server.calls import Call
    from coppice.server.ledger import Outcome

KEPT = 64
SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request, as far as it has come.

    Attributes:
        arrived_s: seconds on the server's monotonic clock.
        queue_s: from arrival until rows were first scheduled; ``None`` while unknown.
        ttft_s: from arrival to the first token; ``None`` before it.
        e2e_s: from arrival to the end; ``None`` while it runs.
        outcome: how it ended; ``None`` while it runs.
    """

    id: str
    route: str
    arrived_s: float
    queue_s: float | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    outcome: Outcome | None = None


class Timeline:
    """Follows live calls and remembers the last ended ones.

    Ended calls are kept as records only, so nothing of their text stays in memory.

    Args:
        kept: how many ended calls are remembered.
        clock: monotonic seconds, the clock of ``Call.arrived``.

    Invariant: holds at most ``kept`` ended records, and a call from `begin` to `end` only.
    """

    def __init__(self, kept: int = KEPT, clock: Any = time.monotonic) -> None:
        self._clock = clock
        self._live: dict[str, Call] = {}
        self._ended: deque[tuple[str, Record]] = deque(maxlen=kept)

    def begin(self, call: Call) -> None:
        """A call was accepted."""
        self._live[call.id] = call

    def end(self, call: Call, outcome: Outcome) -> None:
        """A call has ended; harmless when it was not begun or has ended before."""
        if self._live.pop(call.id, None) is not None:
            self._ended.append((call.key.tenant, self._record(call, outcome)))

    def view(self, tenant: str | None = None, shown: int = SHOWN) -> dict[str, Any]:
        """The newest requests as plain values, newest first, and the clock to read them by.

        Args:
            tenant: whose requests; ``None`` for everybody's (no keys are set).
            shown: at most how many.

        Returns:
            ``{"now_s": float, "requests": [fields of Record, ...]}``.
        """
        records = [record for owner, record in self._ended if tenant in (None, owner)]
        records += [
            self._record(call) for call in self._live.values() if tenant in (None, call.key.tenant)
        ]
        records.sort(key=lambda record: record.arrived_s, reverse=True)
        return {"now_s": self._clock(), "requests": [asdict(record) for record in records[:shown]]}

    def _record(self, call: Call, outcome: Outcome | None = None) -> Record:
        generation = call.generation
        ended_s = self._clock() - call.arrived if outcome is not None else None
        if generation is None:
            return Record(
                id=call.id, route=call.route, arrived_s=call.arrived, e2e_s=ended_s, outcome=outcome
            )
        first = generation.first_token_s
        return Record(
            id=call.id,
            route=call.route,
            arrived_s=call.arrived,
            queue_s=generation.queue_s,
            ttft_s=first - call.arrived if first is not None else None,
            e2e_s=ended_s,
            prompt_tokens=generation.prompt_tokens,
            cached_tokens=generation.cached_tokens,
            completion_tokens=generation.completion_tokens,
            outcome=outcome,
        )
