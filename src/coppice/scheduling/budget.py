"""How long a step may take so that no running sequence's tokens are late.

Source: the time budget of SLO-aware chunked prefill (Agrawal et al., Sarathi-Serve, OSDI 2024),
with the tokens that guesses bring (Li et al., AdaServe, EuroSys 2026).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from coppice.scheduling.interfaces import CostModel, SequenceView, Snapshot
from coppice.scheduling.slo import next_token_due, tokens_a_step

LATE_IS_LOST = 2.0
"""A sequence behind its line by more than so many token times does not shorten steps: it
could only be helped at the price of everybody's throughput."""
ROWS_A_GUESS = 1.5
"""Rows that a guess which comes true takes: some do not."""


def rows_in_time(snapshot: Snapshot, cost: CostModel, prefill_share: float) -> int:
    """Rows of the step without guesses: ``max_rows``, or fewer where tokens would be late.

    A sequence that gets several tokens from a step can wait for it longer. Never fewer than a row
    for every running sequence and the share of prompts.
    """
    due = inf
    for sequence in snapshot.running:
        if sequence.tpot_s is not None:
            last = next_token_due(sequence) + sequence.tpot_s * (tokens_a_step(sequence) - 1)
            if last + LATE_IS_LOST * sequence.tpot_s > snapshot.now:
                due = min(due, last)
    if due == inf:
        return snapshot.max_rows
    rows = cost.rows_within(max(0.0, due - snapshot.now), snapshot.max_rows)
    rows -= rows_of_guesses(snapshot.running)
    least = len(snapshot.running) + max(1, int(prefill_share * snapshot.max_rows))
    return min(snapshot.max_rows, max(rows, least))


def rows_of_guesses(sequences: Iterable[SequenceView]) -> int:
    """Rows that guesses for these will take in a step, by those there were."""
    return round(ROWS_A_GUESS * sum(tokens_a_step(s) - 1.0 for s in sequences))
