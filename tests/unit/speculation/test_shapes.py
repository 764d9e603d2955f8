"""Best shapes against brute force over all trees, the heap and the recurrence's own words."""

from __future__ import annotations

import functools
import heapq
import random
from collections.abc import Sequence

import pytest

from coppice.speculation.shapes import SPECINFER, BestShapes, Shape

Nested = tuple[object, ...]
"""A node as the tuple of its children."""


@functools.cache
def ordered_trees(num_nodes: int) -> list[Nested]:
    """Every ordered tree of so many nodes."""
    return list(_forests(num_nodes - 1))


@functools.cache
def _forests(num_nodes: int) -> tuple[Nested, ...]:
    if num_nodes == 0:
        return ((),)
    found: list[Nested] = []
    for first in range(1, num_nodes + 1):
        for tree in _forests(first - 1):
            found.extend((tree, *rest) for rest in _forests(num_nodes - first))
    return tuple(found)


def value_of(tree: Nested, p: Sequence[float]) -> float:
    """Expected tokens, straight from the definition."""
    total = 1.0
    for rank, child in enumerate(tree):
        if rank >= len(p):
            return float("-inf")
        assert isinstance(child, tuple)
        total += p[rank] * value_of(child, p)
    return total


def levels_of(tree: Nested) -> int:
    return 1 + max((levels_of(c) for c in tree if isinstance(c, tuple)), default=0)


def by_heap(p: Sequence[float], num_nodes: int, levels: int) -> float:
    """The best value where ``p`` never rises: always the likeliest node next."""
    heap = [(-1.0, 1)]
    total = 0.0
    for _ in range(num_nodes):
        chance, level = heapq.heappop(heap)
        total -= chance
        if level < levels:
            for share in p:
                heapq.heappush(heap, (chance * share, level + 1))
    return total


def random_p(rng: random.Random, *, falling: bool) -> list[float]:
    cuts = sorted(rng.random() for _ in range(4))
    p = [b - a for a, b in zip([0.0, *cuts], cuts, strict=False)]
    return sorted(p, reverse=True) if falling else p


@pytest.mark.parametrize("falling", [True, False])
def test_the_best_shape_equals_brute_force(falling: bool) -> None:
    rng = random.Random(3)
    for num_nodes in range(2, 10):
        for levels in (2, 3, 5, num_nodes):
            p = random_p(rng, falling=falling)
            best = max(value_of(t, p) for t in ordered_trees(num_nodes) if levels_of(t) <= levels)
            shapes = BestShapes(p, num_nodes, levels)
            if best == float("-inf"):
                assert shapes.value(num_nodes, levels) == best
                continue
            assert shapes.value(num_nodes, levels) == pytest.approx(best, abs=1e-12)
            shape = shapes.shape(num_nodes, levels)
            assert len(shape) == num_nodes - 1
            assert shape.levels() < levels
            assert shape.value(p) == pytest.approx(best, abs=1e-12)


def test_it_equals_the_published_recurrence_in_its_own_words() -> None:
    p = [0.5, 0.2, 0.15, 0.05]
    none = float("-inf")

    @functools.cache
    def t(m: int, level: int, b: int) -> float:
        if level < 1:
            return none
        if b == 0:
            return 1.0 if m == 1 else none
        if m < 2:
            return none
        best = none
        for y in range(1, m):
            below = max(t(m - y, level - 1, c) for c in range(len(p) + 1))
            best = max(best, t(y, level, b - 1) + p[b - 1] * below)
        return best

    shapes = BestShapes(p, 20, 6)
    for num_nodes in range(1, 21):
        for levels in range(1, 7):
            wanted = max(t(num_nodes, levels, b) for b in range(len(p) + 1))
            assert shapes.value(num_nodes, levels) == pytest.approx(wanted)


def test_the_heap_finds_the_same_where_chances_fall() -> None:
    rng = random.Random(8)
    for _ in range(40):
        p = random_p(rng, falling=True)
        levels, num_nodes = rng.randint(3, 8), rng.randint(2, 24)
        if num_nodes > sum(len(p) ** i for i in range(levels)):
            continue
        found = BestShapes(p, num_nodes, levels).value(num_nodes, levels)
        assert found == pytest.approx(by_heap(p, num_nodes, levels))


def test_the_best_tree_beats_chains() -> None:
    p = (0.6, 0.16, 0.07, 0.04)
    best = BestShapes(p, 21, 9)
    chain = Shape.expansion([1] * 16)
    assert best.value(17, 9) >= 1.1 * chain.value(p)
    assert best.value(21, 9) >= Shape.expansion(SPECINFER).value(p)


def test_large_trees_take_no_minute() -> None:
    shape = BestShapes((0.6, 0.16, 0.07, 0.04), 257, 17).shape(257, 17)
    assert len(shape) == 256
    chain, place = [], -1
    children = shape.children()
    while children[place]:
        place = children[place][0]
        chain.append(place)
    assert chain == list(range(len(chain)))
