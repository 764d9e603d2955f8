"""The select step against brute force, and the line a sequence must stay on."""

from __future__ import annotations

import itertools
import random
from math import inf

import pytest

from coppice.scheduling.slo import select, tokens_needed
from coppice.scheduling.virtual import VirtualSequence


def brute_force(offers: list[list[float]], needs: list[float], budget: int) -> float | None:
    """The best total in expectation that meets every need; None where none does."""
    best = None
    for counts in itertools.product(*(range(len(o) + 1) for o in offers)):
        totals = [1 + sum(o[:n]) for o, n in zip(offers, counts, strict=True)]
        if sum(counts) <= budget and all(t >= n for t, n in zip(totals, needs, strict=True)):
            best = max(best or 0.0, sum(totals))
    return best


def test_select_equals_brute_force_and_fails_only_where_it_must() -> None:
    rng = random.Random(1)
    met = 0
    for _ in range(1000):
        offers = [
            sorted((rng.random() for _ in range(rng.randint(0, 6))), reverse=True)
            for _ in range(rng.randint(1, 3))
        ]
        needs = [rng.choice((-inf, 0.5, 1.0, 1.7, 2.5)) for _ in offers]
        budget = rng.randint(0, 10)
        counts = select(offers, needs, budget)
        assert sum(counts) <= budget
        totals = [1 + sum(o[:n]) for o, n in zip(offers, counts, strict=True)]
        best = brute_force(offers, needs, budget)
        feasible = all(t >= n for t, n in zip(totals, needs, strict=True))
        assert feasible == (best is not None)
        if best is not None:
            assert sum(totals) == pytest.approx(best)
            met += 1
    assert 100 < met < 1000


def test_a_request_takes_no_more_than_its_limit_for_its_need() -> None:
    assert select([[0.5] * 8, [0.8] * 8], [2.0, 1.0], 4, most=2) == [2, 2]
    assert select([[0.5] * 8, [0.8] * 8], [2.4, 1.0], 4, most=2) == [0, 4], "it cannot be met"


def test_what_is_left_is_spent_only_where_it_pays() -> None:
    offers = [[0.9, 0.5, 0.1]]
    assert select(offers, [0.0], 9, step_s=lambda n: 1.0) == [3]
    assert select(offers, [0.0], 9, step_s=lambda n: 1.0 + 0.5 * n) == [1]
    assert select(offers, [0.0], 9, step_s=lambda n: 1.0 + n) == [0]
    assert select(offers, [1.5], 9, step_s=lambda n: 1.0 + n) == [1]


def test_what_a_sequence_needs() -> None:
    s = VirtualSequence(arrival=0, num_prompt=5, num_answer=9, submitted_s=0.0, tpot_s=0.1)
    assert tokens_needed(s, 1.0, 0.1) == -inf, "its first token has another wish"
    s.first_token_s, s.num_tokens = 1.0, 5 + 3
    assert tokens_needed(s, 1.4, 0.1) == pytest.approx(3.0)
    assert tokens_needed(s, 1.0, 0.1) == pytest.approx(-1.0)
    s.tpot_s = None
    assert tokens_needed(s, 1.0, 0.1) == -inf
