"""The select step against brute force, and offers of trees."""

from __future__ import annotations

import itertools
import random
from math import inf

import pytest

from coppice.speculation import ROOT, Controller, DraftTree
from coppice.speculation.select import LEAST_CHANCE, best_first, needed_depth, select


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
            sorted((rng.uniform(LEAST_CHANCE, 1.0) for _ in range(rng.randint(0, 6))), reverse=True)
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
    assert select([[0.5] * 8, [0.8] * 8], [9.0, 1.0], 4, most=2) == [2, 2], "it gets what it can"
    assert select([[0.05] * 8, [0.8] * 8], [9.0, 1.0], 4, most=2) == [0, 4], "it helps nobody"


def test_what_is_left_is_spent_only_where_it_pays() -> None:
    offers = [[0.9, 0.5, 0.1]]
    assert select(offers, [0.0], 9, step_s=lambda n: 1.0) == [3]
    assert select(offers, [0.0], 9, step_s=lambda n: 1.0 + 0.5 * n) == [1]
    assert select(offers, [0.0], 9, step_s=lambda n: 1.0 + n) == [0]
    assert select(offers, [1.5], 9, step_s=lambda n: 1.0 + n) == [1]


def test_the_best_size_is_found_behind_a_plateau() -> None:
    def seconds(drafts: int) -> float:  # four rows for the price of one, twice
        return 1.0 + 0.6 * ((drafts + 3) // 4)

    assert select([[0.9] * 8], [0.0], 8, step_s=seconds) == [8]
    assert select([[0.1] * 8], [0.0], 8, step_s=seconds) == [0]


def test_any_leading_part_of_an_offer_is_a_tree() -> None:
    rng = random.Random(3)
    for _ in range(300):
        parents = [rng.choice((ROOT, *range(i))) for i in range(rng.randint(1, 12))]
        nodes, chances = best_first(parents, [rng.random() for _ in parents])
        assert chances == sorted(chances, reverse=True)
        for i, node in enumerate(nodes):
            assert parents[node] in (ROOT, *nodes[:i])


def test_a_chain_is_as_deep_as_a_need_asks_for() -> None:
    assert [needed_depth(0.5, need, 8) for need in (-inf, 1.0, 1.4, 1.6, 1.85, 2.0)] == [
        0, 0, 1, 2, 3, 3
    ]  # fmt: skip
    assert needed_depth(0.9, 2.5, 1) == 1


def test_who_is_late_speculates_where_it_does_not_pay_and_no_further() -> None:
    controller = Controller(float, max_depth=4)  # a row costs a step
    trees = {a: DraftTree.chain("x", range(4)) for a in (7, 8)}
    each = controller.chance("x", 7)
    assert controller.select(trees, sequences=2, rows=2, spare=20) == {}
    for need, length in ((1.0 + each, 1), (1.0 + each + each**2, 2), (1.0 + 0.5 * each, 1)):
        found = controller.select(trees, sequences=2, rows=2, spare=20, needs={7: need})
        assert {a: len(t) for a, t in found.items()} == {7: length}
        depths = controller.depths("x", [7, 8], rows=2, spare=20, pass_s=0.1, needs={7: need})
        assert depths == [length, 0]
    late = controller.select(trees, sequences=2, rows=2, spare=20, needs={7: 9.0})
    assert len(late[7]) == 4, "as much as it can get"


def test_prompts_in_the_step_make_no_guess_cheaper() -> None:
    controller = Controller(lambda rows: 1.0 + 0.2 * rows, max_depth=8)
    trees = {7: DraftTree.chain("x", range(8))}
    alone = controller.select(trees, sequences=1, rows=1, spare=100)
    beside = controller.select(trees, sequences=1, rows=300, spare=100)
    assert 0 < len(alone[7]) == len(beside[7]) < 8
    depths = [controller.depths("x", [7], rows=rows, spare=100, pass_s=0.0) for rows in (1, 300)]
    assert depths[0] == depths[1] and 0 < depths[0][0] < 8


@pytest.mark.parametrize("dearer", [0.8, 0.9, 1.3])
def test_however_dear_steps_with_trees_are_prompts_do_not_decide(dearer: float) -> None:
    controller = Controller(lambda rows: 1.0 + 0.2 * rows, max_depth=8)
    for _ in range(400):
        controller.step_took(4, 0, controller.plain_s(4) if _ == 0 else 1.8)
        controller.step_took(4, 2, 1.8 * dearer)
    trees = {7: DraftTree.chain("x", range(8))}
    alone = controller.select(trees, sequences=1, rows=1, spare=100)
    beside = controller.select(trees, sequences=1, rows=300, spare=100)
    assert {a: len(t) for a, t in alone.items()} == {a: len(t) for a, t in beside.items()}
