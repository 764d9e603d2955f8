"""The controller's sizes, and what the speculator does with bad proposers."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest

from coppice.speculation import ROOT, Controller, DraftTree, DraftView, Speculator
from coppice.speculation.control import RETRY_STEPS, WORTH
from tests.unit.speculation.test_tree_and_lookup import View


def rate(
    depths: Sequence[int], chances: Sequence[float], step: Callable[[int], float], pass_s: float
) -> float:
    """Expected tokens a second."""
    tokens = sum(sum(c**i for i in range(d + 1)) for d, c in zip(depths, chances, strict=True))
    return tokens / (step(len(depths) + sum(depths)) + max(depths) * pass_s)


def test_depths_are_the_best_of_all() -> None:
    rng = random.Random(2)
    for _ in range(60):
        flat, price = rng.randint(1, 6), rng.uniform(0.05, 0.6)

        def step(rows: int, flat: int = flat, price: float = price) -> float:
            return 1.0 + price * max(0, rows - flat)

        controller, pass_s = Controller(step, max_depth=4), rng.uniform(0, 0.1)
        for arrival in range(3):
            for _ in range(30):
                controller.observe("x", arrival, 4, rng.randint(0, 4))
        chances = [controller.chance("x", a) for a in range(3)]
        found = controller.depths("x", [0, 1, 2], rows=3, spare=12, pass_s=pass_s)
        best = max(rate(d, chances, step, pass_s) for d in itertools.product(range(5), repeat=3))
        assert rate(found, chances, step, pass_s) >= 0.98 * best


def test_it_stops_when_nothing_is_accepted_and_tries_again() -> None:
    controller = Controller(lambda rows: 1.0 + 0.2 * rows, max_depth=4)
    for _ in range(50):
        controller.observe("x", 7, 4, 0)
    sizes = [controller.depths("x", [7], rows=1, spare=9, pass_s=0.0) for _ in range(RETRY_STEPS)]
    assert sizes[:-1] == [[0]] * (RETRY_STEPS - 1)
    assert sizes[-1] == [1]
    for _ in range(50):
        controller.observe("x", 7, 4, 4)
    assert controller.depths("x", [7], rows=1, spare=9, pass_s=0.0) != [0]


def test_a_dear_drafter_is_tried_again_less_often() -> None:
    controller = Controller(lambda rows: 1.0 + 0.2 * rows, max_depth=4)
    for _ in range(50):
        controller.observe("x", 7, 4, 0)
    asked = [controller.depths("x", [7], rows=1, spare=9, pass_s=2.4) != [0] for _ in range(300)]
    assert sum(asked) == 3


def test_no_spare_rows_no_speculation() -> None:
    controller = Controller(lambda rows: 1.0, max_depth=4)
    assert controller.depths("x", [1, 2], rows=2, spare=0, pass_s=0.0) == [0, 0]
    assert sum(controller.depths("x", [1, 2], rows=2, spare=5, pass_s=0.0)) == 5


class Bad:
    """A proposer with a fault."""

    name = "bad"
    pass_s = 0.0
    branches = False

    def __init__(self, answer: Callable[[], list[DraftTree | None]]) -> None:
        self.answer = answer
        self.forgotten: list[int] = []

    def propose(self, views: Sequence[DraftView], limits: Sequence[int]) -> list[DraftTree | None]:
        return self.answer()

    def forget(self, arrival: int) -> None:
        self.forgotten.append(arrival)


def explode() -> list[DraftTree | None]:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "answer",
    [
        explode,
        lambda: [],
        lambda: [DraftTree.chain("bad", [999])],
        lambda: [DraftTree.chain("bad", [1] * 9)],
        lambda: [DraftTree("bad", [1], [0])],
    ],
)
def test_a_bad_proposer_costs_no_request(answer: Callable[[], list[DraftTree | None]]) -> None:
    bad = Bad(answer)
    controller = Controller(lambda rows: 1.0, max_depth=4)
    speculator = Speculator([bad], controller, vocab_size=50)
    assert speculator.grow([View([1, 2, 3])], rows=1, spare=8) == {}
    assert speculator.totals["faults"] == 1
    assert bad.forgotten == [1]


def test_a_draft_never_reaches_beyond_the_end() -> None:
    sizes: list[int] = []

    class Eager(Bad):
        def propose(
            self, views: Sequence[DraftView], limits: Sequence[int]
        ) -> list[DraftTree | None]:
            sizes.extend(limits)
            return [None] * len(views)

    speculator = Speculator(
        [Eager(explode)], Controller(lambda rows: 1.0, max_depth=8), vocab_size=50
    )
    speculator.grow([View([1], room=3), View([1], arrival=2, room=1)], rows=2, spare=50)
    assert sizes == [2, 0]


def branchy(rng: random.Random, size: int) -> DraftTree:
    """A random tree whose estimates fall along its paths."""
    tree = DraftTree("x")
    for i in range(size):
        parent = rng.randrange(-1, i)
        above = 0.0 if parent < 0 else tree.logf[parent]
        tree.add(i, parent, above + math.log(rng.uniform(0.05, 0.95)))
    return tree


def test_the_selected_part_is_the_best_of_all() -> None:
    rng = random.Random(3)
    for _ in range(40):
        flat, price = rng.randint(1, 5), rng.uniform(0.05, 0.6)

        def step(rows: int, flat: int = flat, price: float = price) -> float:
            return 1.0 + price * max(0, rows - flat)

        trees = {1: branchy(rng, 4), 2: branchy(rng, 4)}
        controller = Controller(step, max_depth=8)
        kept = controller.select(trees, sequences=2, rows=2, spare=6)
        nodes = [(a, i) for a in trees for i in range(4)]
        value = {(a, i): math.exp(trees[a].logf[i]) for a, i in nodes}

        def rate(part: Sequence[tuple[int, int]], step: Callable[[int], float] = step) -> float:
            return (2.0 + sum(value[n] for n in part)) / step(2 + len(part))  # noqa: B023

        parts = [
            part
            for n in range(7)
            for part in itertools.combinations(nodes, n)
            if all(trees[a].parents[i] < 0 or (a, trees[a].parents[i]) in part for a, i in part)
        ]
        chosen = [
            (a, trees[a].tokens.index(token)) for a, tree in kept.items() for token in tree.tokens
        ]
        assert rate(chosen) >= max(map(rate, parts)) / WORTH - 1e-9
        assert all(tree.is_sound(50) for tree in kept.values())


def test_estimates_are_corrected_by_what_came_true() -> None:
    rng = random.Random(4)
    controller = Controller(lambda rows: 1.0, max_depth=8)
    tree = DraftTree("x", [1], [ROOT], [math.log(0.9)])
    modest = DraftTree("x", [1], [ROOT], [math.log(0.3)])
    for _ in range(600):  # says 0.9 and is right half the time; says 0.3 and is right
        controller.calibration.learn(tree, 1, [int(rng.random() < 0.5)])
        controller.calibration.learn(modest, 1, [int(rng.random() < 0.3)])
    assert controller.chances(tree, 2)[0] == pytest.approx(0.5, abs=0.08)
    assert controller.chances(modest, 2)[0] == pytest.approx(0.3, abs=0.08)
    for _ in range(30):  # and for a sequence on which it fails
        controller.calibration.learn(tree, 3, [7])
    assert controller.chances(tree, 3)[0] < 0.2


def test_steps_that_take_more_with_trees_are_paid_for() -> None:
    tree = DraftTree("x", [1], [ROOT], [math.log(0.5)])
    controller = Controller(lambda rows: 1.0, max_depth=8)
    assert controller.select({1: tree}, sequences=1, rows=1, spare=8)
    for _ in range(30):
        controller.step_took(1, 0, 1.0)
        controller.step_took(2, 1, 1.8)
    assert not controller.select({1: tree}, sequences=1, rows=1, spare=8)


def test_speculation_goes_off_and_on_again_without_verifying() -> None:
    class Steady(Bad):
        name = "x"

        def propose(
            self, views: Sequence[DraftView], limits: Sequence[int]
        ) -> list[DraftTree | None]:
            return [DraftTree("x", [5], [ROOT], [math.log(0.8)]) for _ in views]

    view = View([1, 2])
    speculator = Speculator(
        [Steady(explode)], Controller(lambda rows: 0.7 + 0.3 * rows, max_depth=4), vocab_size=50
    )

    def grown(token: int, steps: int) -> list[bool]:
        found = []
        for _ in range(steps):
            found.append(bool(speculator.grow([view], rows=1, spare=8)))
            view.tokens.append(token)
        return found

    assert grown(5, 3) == [True] * 3
    off = grown(9, 60)
    assert not any(off[-20:])
    assert grown(5, 200)[-1]


def test_trees_over_the_limit_and_unsound_estimates_are_dropped() -> None:
    for tree in (
        DraftTree("bad", list(range(9)), list(range(-1, 8)), [-0.1] * 9),
        DraftTree("bad", [1, 2], [-1, 0], [-0.1]),
        DraftTree("bad", [1], [-1], [math.nan]),
        DraftTree("bad", [1, 2], [-1, 0], [-0.5, -0.1]),
    ):
        speculator = Speculator(
            [Bad(lambda tree=tree: [tree])], Controller(lambda rows: 1.0, 4), vocab_size=50
        )
        assert speculator.grow([View([1, 2, 3])], rows=1, spare=8) == {}
        assert speculator.totals["faults"] == 1
