"""Which draft tokens are worth their rows: those needed to be on time, then the likeliest.

Every request offers draft tokens by falling probability of acceptance (a child is never likelier
than its parent, so any leading part of the offer is a tree). Each takes as many as it needs to
stay on its line of time per token; what is left of the step's rows goes to the likeliest tokens
of all, as long as that brings more tokens a second.

Source: Li et al., AdaServe (EuroSys 2026), select for SLO, then for throughput; the order is the
optimal connected set for every size (Sequoia, Chen et al., NeurIPS 2024).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from coppice.speculation.tree import ROOT

LEAST_CHANCE = 0.1
"""Guesses less likely than this bring nobody who is late back on time."""
FAR = 0.85
"""Share of the best rate at which a search along the order ends."""


def best_first(parents: Sequence[int], chances: Sequence[float]) -> tuple[list[int], list[float]]:
    """A tree's offer: its nodes by falling chance, and the chances.

    Args:
        parents: of each node, before it in the sequence, or `ROOT`.
        chances: that each node's path is accepted; no child counts for more than its parent.
    """
    held: list[float] = []
    for parent, chance in zip(parents, chances, strict=True):
        held.append(chance if parent == ROOT else min(chance, held[parent]))
    order = sorted(range(len(held)), key=lambda i: -held[i])
    return order, [held[i] for i in order]


def select(
    offers: Sequence[Sequence[float]],
    needs: Sequence[float],
    budget: int,
    *,
    most: int = 1 << 30,
    step_s: Callable[[int], float] | None = None,
    others: int = 0,
) -> list[int]:
    """How many tokens of each offer to verify.

    Args:
        offers: of each request, probabilities that its draft tokens are accepted, falling.
        needs: tokens each must get in expectation, the one a step brings anyway included.
        budget: draft tokens there are rows for.
        most: draft tokens a request may have for its need.
        step_s: seconds of the step with so many draft tokens; what needs leave is then spent
            only as far as it brings more tokens a second. All of it without.
        others: requests that get a token from the step and offer nothing.

    Returns:
        A count for each request; their sum is at most ``budget``. Needs are met in the order of
        their size as far as offers and budget go.

    Cost: O((requests + budget) log requests), and a copy of the counts at each improvement.
    """
    counts = _for_needs(offers, needs, budget, most)
    taken = sum(counts)
    expected = others + len(offers) + sum(sum(o[:n]) for o, n in zip(offers, counts, strict=True))
    best, best_taken = list(counts), taken
    best_rate = 0.0 if step_s is None else expected / step_s(taken)
    heap = [(-offer[n], i) for i, (offer, n) in enumerate(zip(offers, counts, strict=True))
            if n < len(offer)]  # fmt: skip
    heapq.heapify(heap)
    while taken < budget and heap:
        chance, i = heap[0]
        expected, taken = expected - chance, taken + 1
        counts[i] += 1
        if counts[i] < len(offers[i]):
            heapq.heapreplace(heap, (-offers[i][counts[i]], i))
        else:
            heapq.heappop(heap)
        if step_s is None:
            continue
        rate = expected / step_s(taken)
        if rate > best_rate:
            best_rate, best, best_taken = rate, list(counts), taken
        elif rate < FAR * best_rate and taken > best_taken + 2 * len(offers):
            break
    return counts if step_s is None else best


def needed_depth(chance: float, need: float, most: int) -> int:
    """Fewest tokens of a chain that bring ``need`` in expectation, or as much as they can.

    Args:
        chance: that a token is accepted where the one before was.
        need: as for `select`.
        most: longest chain.
    """
    expected, depth = 1.0, 0
    while expected < need and depth < most:
        gain = chance ** (depth + 1)
        if gain < LEAST_CHANCE:
            break
        depth, expected = depth + 1, expected + gain
    return depth


def _for_needs(
    offers: Sequence[Sequence[float]], needs: Sequence[float], budget: int, most: int
) -> list[int]:
    counts = [0] * len(offers)
    for i in sorted(range(len(offers)), key=lambda i: -needs[i]):
        if budget <= 0 or needs[i] <= 1.0:
            break
        expected = 1.0
        for chance in offers[i][:most]:
            if expected >= needs[i] or budget <= 0 or chance < LEAST_CHANCE:
                break
            expected += chance
            counts[i] += 1
            budget -= 1
    return counts
