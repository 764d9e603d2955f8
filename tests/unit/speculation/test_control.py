"""The controller's sizes, and what the speculator does with bad proposers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from coppice.speculation import Controller, DraftTree, DraftView, Speculator
from coppice.speculation.control import RETRY_STEPS
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
