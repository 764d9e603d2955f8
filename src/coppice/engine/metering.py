"""What every tenant and key used: tokens by kind, page-seconds, step-seconds.

Counts are exact. A step's time is shared out by the marginal price of each grant's rows and an
equal part of the step's base, scaled to the measured step, so that the shares of a step add up
to it and those of a run to its busy time (Σ tenants + idle = wall time).
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SeqOf
from pathlib import Path

import msgspec

from coppice.engine.flight import Ran
from coppice.engine.messages import Usage
from coppice.engine.sequence import Sequence
from coppice.scheduling.interfaces import CostModel

Owner = tuple[str, str]
"""Tenant and name of the API key."""


class Meter:
    """Charges steps and endings to their owners."""

    def __init__(self) -> None:
        self._usage: dict[Owner, Usage] = {}
        self._held: dict[Owner, int] = {}

    @property
    def usage(self) -> list[Usage]:
        """Totals, by tenant and key."""
        return [self._usage[owner] for owner in sorted(self._usage)]

    def hold(self, running: Iterable[Sequence]) -> None:
        """A step begins, for whose length these hold their pages."""
        held = self._held
        held.clear()
        for sequence in running:
            owner = _owner(sequence)
            held[owner] = held.get(owner, 0) + len(sequence.pages)

    def step(self, took: float) -> None:
        """That step ended after so many seconds."""
        for owner, pages in self._held.items():
            self._of(owner).page_s += took * pages

    def flight(self, ran: SeqOf[Ran], took: float, cost: CostModel) -> None:
        """A flight landed.

        Args:
            ran: who had how many rows.
            took: its seconds of the machine.
            cost: for the price of a row beside that of a step.
        """
        if not ran:
            return
        rows = sum(r.rows + r.guesses for r in ran)
        whole = max(cost.time(rows), 1e-9)
        base = min(cost.time(1), whole) / len(ran)
        per_row = max(0.0, whole - base * len(ran)) / rows
        scale = took / (base * len(ran) + per_row * rows)
        for sequence, end, own, guesses in ran:
            used = self._of(_owner(sequence))
            used.step_s += scale * (base + per_row * (own + guesses))
            used.computed_tokens += own
            if sequence.reached > end - own:
                used.recomputed_tokens += min(sequence.reached, end) - (end - own)
            sequence.reached = max(sequence.reached, end)

    def accepted(self, sequence: Sequence, *, first: bool) -> None:
        """A token of the answer was accepted."""
        used = self._of(_owner(sequence))
        used.generated_tokens += 1
        if first:
            used.prompt_tokens += sequence.num_prompt
            used.cached_tokens += sequence.cached_tokens

    def ended(self, sequence: Sequence, now: float) -> None:
        """A sequence ended, however."""
        used = self._of(_owner(sequence))
        used.sequences += 1
        used.drafted_tokens += sequence.drafted
        used.accepted_tokens += sequence.accepted
        met = _met(sequence, now)
        used.deadlines_met += met is True
        used.deadlines_missed += met is False

    def write_lines(self, path: Path) -> None:
        """Append the totals as JSON lines."""
        with path.open("ab") as file:
            for used in self.usage:
                file.write(msgspec.json.encode(used) + b"\n")

    def _of(self, owner: Owner) -> Usage:
        used = self._usage.get(owner)
        if used is None:
            used = self._usage[owner] = Usage(tenant=owner[0], key=owner[1])
        return used


def _owner(sequence: Sequence) -> Owner:
    return (sequence.request.tenant, sequence.request.key)


def _met(sequence: Sequence, now: float) -> bool | None:
    """Whether an ended sequence had what it wished for; None where that has no answer."""
    request = sequence.request
    deadline = request.deadline_s is not None and request.wants_deadline
    wishes = deadline, sequence.ttft_s is not None, sequence.tpot_s is not None
    if not any(wishes) or sequence.finish_reason in ("cancelled", "failed"):
        return None
    if sequence.finish_reason == "expired":
        return False
    waited = sequence.first_token_s - sequence.submitted_s
    later = len(sequence.tokens) - sequence.first_tokens
    begun_here = sequence.first_tokens <= sequence.num_prompt + 1  # else another engine knew
    in_time = sequence.ttft_s is None or not begun_here or waited <= sequence.ttft_s
    if sequence.tpot_s is None or later == 0:
        return in_time
    return in_time and (now - sequence.first_token_s) / later <= sequence.tpot_s
