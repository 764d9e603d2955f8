"""Draft tokens for those who need them to be on time, the rest where they yield most.

Every request offers draft tokens by falling probability of acceptance (a child is never likelier
than its parent, so any leading part of the offer is a tree). Each takes as many as it needs to
stay on its line of time per token; what is left of the step's rows goes to the likeliest tokens
of all.

Source: Li et al., AdaServe (EuroSys 2026), select for SLO, then for throughput.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from math import inf

from coppice.scheduling.interfaces import SequenceView


def tokens_needed(sequence: SequenceView, now: float, step_s: float) -> float:
    """Tokens the next step must bring for a sequence to be on its line of ``tpot_s``.

    ``(time since the first token + the step) / tpot_s - tokens after the first``; below 0 where
    it is ahead, minus infinity where it has no wish.

    Args:
        sequence: one that decodes.
        now: seconds.
        step_s: expected seconds of the step, prompts and drafting included.
    """
    if sequence.tpot_s is None or not sequence.first_token_s:
        return -inf
    later = sequence.num_tokens - sequence.num_prompt - 1
    return (now - sequence.first_token_s + step_s) / sequence.tpot_s - later


def select(
    offers: Sequence[Sequence[float]],
    needs: Sequence[float],
    budget: int,
    *,
    most: int = 1 << 30,
    step_s: Callable[[int], float] | None = None,
) -> list[int]:
    """How many tokens of each offer to verify.

    Args:
        offers: of each request, probabilities that its draft tokens are accepted, falling.
        needs: tokens each must get in expectation, the one a step brings anyway included.
        budget: draft tokens there are rows for.
        most: draft tokens a request may have for its need.
        step_s: seconds of the step with so many draft tokens; what needs leave is then spent
            only while it brings more tokens a second.

    Returns:
        A count for each request; their sum is at most ``budget``. Needs are met in the order of
        their size as far as the budget goes; those no offer could meet count as none.

    Cost: O((requests + budget) log requests).
    """
    counts = [0] * len(offers)
    for i in sorted(range(len(offers)), key=lambda i: -needs[i]):
        if budget <= 0 or needs[i] <= 1.0:
            break
        if needs[i] > 1.0 + sum(offers[i][:most]):
            continue
        expected = 1.0
        for chance in offers[i][:most]:
            if expected >= needs[i] or budget <= 0:
                break
            expected += chance
            counts[i] += 1
            budget -= 1
    heap = [(-offer[counts[i]], i) for i, offer in enumerate(offers) if counts[i] < len(offer)]
    heapq.heapify(heap)
    taken = sum(counts)
    expected = len(offers) + sum(sum(o[:n]) for o, n in zip(offers, counts, strict=True))
    while budget > 0 and heap:
        chance, i = heap[0]
        if step_s is not None:
            if (expected - chance) * step_s(taken) <= expected * step_s(taken + 1):
                break
            expected -= chance
            taken += 1
        counts[i] += 1
        budget -= 1
        if counts[i] < len(offers[i]):
            heapq.heapreplace(heap, (-offers[i][counts[i]], i))
        else:
            heapq.heappop(heap)
    return counts
