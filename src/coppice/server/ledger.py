"""Every accepted call ends once: the outcomes ledger."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Literal, get_args

from coppice.errors import CapacityError, RequestError

Outcome = Literal["finished", "cancelled", "expired", "refused", "failed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Ledger:
    """Counts calls by how they ended.

    Invariant: ``accepted == sum(outcomes) + in_flight`` whenever no method runs.
    """

    def __init__(self) -> None:
        self.accepted = 0
        self.in_flight = 0
        self.outcomes: Counter[Outcome] = Counter({outcome: 0 for outcome in OUTCOMES})
        self.refusals: Counter[str] = Counter()

    def open(self) -> Entry:
        """A well-formed call arrived."""
        self.accepted += 1
        self.in_flight += 1
        return Entry(self)


class Entry:
    """One call's line in the ledger; the first `close` counts, later ones do nothing."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.outcome: Outcome | None = None

    def counted_by(self, ledger: Ledger) -> bool:
        """Whether it is a line of this ledger."""
        return self._ledger is ledger

    def close(self, outcome: Outcome, code: str = "") -> None:
        """Record how the call ended; ``code`` says why it was refused."""
        if self.outcome is not None:
            return
        self.outcome = outcome
        self._ledger.in_flight -= 1
        self._ledger.outcomes[outcome] += 1
        if outcome == "refused":
            self._ledger.refusals[code] += 1

    def close_by_error(self, error: BaseException) -> None:
        """Record the outcome an exception means."""
        if isinstance(error, RequestError | CapacityError):
            self.close("refused", error.code)
        elif isinstance(error, asyncio.CancelledError):  # the server gave the call up
            self.close("cancelled")
        else:
            self.close("failed")
