"""How long a step may take so that no running sequence's next token is late."""

from __future__ import annotations

from math import inf

from coppice.scheduling.interfaces import CostModel, Snapshot
from coppice.scheduling.slo import next_token_due

LATE_IS_LOST = 2.0
"""A sequence behind its line by more than so many token times does not shorten steps: it
could only be helped at the price of everybody's throughput."""


def rows_in_time(snapshot: Snapshot, cost: CostModel, prefill_share: float) -> int:
    """Rows of the step: ``max_rows``, or fewer where a token is due before those would end.

    Never fewer than a row for every running sequence and the share of prompts.
    """
    due = inf
    for sequence in snapshot.running:
        if sequence.tpot_s is not None:
            slack = next_token_due(sequence)
            if slack + LATE_IS_LOST * sequence.tpot_s > snapshot.now:
                due = min(due, slack)
    if due == inf:
        return snapshot.max_rows
    rows = cost.rows_within(max(0.0, due - snapshot.now), snapshot.max_rows)
    least = len(snapshot.running) + max(1, int(prefill_share * snapshot.max_rows))
    return min(snapshot.max_rows, max(rows, least))
