"""Growth by probability equals exact best-first search; shapes are filled as they say."""

from __future__ import annotations

import heapq
import math
import random

import numpy as np
import pytest

from coppice.speculation import ROOT
from coppice.speculation.growth import DECAY, BestFirst, Growth, Shaped
from coppice.speculation.shapes import SPECINFER, Shape
from coppice.speculation.tree import DraftTree

VOCAB = 12


def guesses(path: tuple[int, ...], width: int = VOCAB) -> tuple[list[int], list[float]]:
    """A made-up draft: next tokens after a path with log probabilities, best first."""
    rng = np.random.default_rng([7, *path])
    p = rng.dirichlet(np.full(VOCAB, 0.3))
    order = np.argsort(-p)[:width]
    return order.tolist(), np.log(p[order]).tolist()


def path_of(tree: DraftTree, node: int) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    while node != ROOT:
        tokens = (tree.tokens[node], *tokens)
        node = tree.parents[node]
    return tokens


def grow(growth: Growth) -> tuple[DraftTree, int]:
    """The tree, and the passes it took."""
    passes = 0
    while wants := growth.wants():
        passes += 1
        for node in wants:
            growth.extend(node, *guesses(path_of(growth.tree, node)))
    return growth.finish(), passes


def exact(limit: int, depth: int) -> tuple[set[tuple[int, ...]], float]:
    """The best ``limit`` paths one by one, and their mass."""
    heap: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    taken: list[tuple[float, tuple[int, ...]]] = []
    while heap and len(taken) <= limit:
        cost, path = heapq.heappop(heap)
        taken.append((cost, path))
        if len(path) < depth:
            for token, share in zip(*guesses(path), strict=True):
                heapq.heappush(heap, (cost - share - DECAY, (*path, token)))
    return {p for _, p in taken if p}, sum(math.exp(-c) for c, p in taken if p)


@pytest.mark.parametrize("limit", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_without_a_bound_on_beams_growth_is_exact(limit: int, depth: int) -> None:
    tree, _ = grow(BestFirst("x", limit, beams=10_000, depth=depth))
    assert {path_of(tree, i) for i in range(len(tree))} == exact(limit, depth)[0]


def test_few_beams_lose_little() -> None:
    masses = []
    for beams in (1, 4, 16):
        tree, passes = grow(BestFirst("x", 48, beams=beams, depth=8))
        masses.append(sum(map(math.exp, tree.logf)))
        assert passes <= 48
    wanted = exact(48, 8)[1]
    assert masses[2] >= 0.98 * wanted
    assert masses[1] >= 0.9 * wanted


def test_a_pass_that_promises_too_little_is_not_made() -> None:
    free, many = grow(BestFirst("x", 32, beams=4, depth=8))
    dear, few = grow(BestFirst("x", 32, beams=4, depth=8, least=0.5))
    assert few < many
    assert len(dear) <= len(free)


def test_the_likeliest_path_comes_first() -> None:
    tree, _ = grow(BestFirst("x", 24, beams=3, depth=6))
    node, chain = ROOT, []
    while True:
        children = [i for i in range(len(tree)) if tree.parents[i] == node]
        if not children:
            break
        node = max(children, key=lambda i: tree.logf[i])
        chain.append(node)
    assert chain == list(range(len(chain)))
    assert tree.is_sound(VOCAB)


def test_the_best_nodes_of_a_tree_are_a_tree() -> None:
    rng = random.Random(1)
    for _ in range(50):
        tree, _ = grow(BestFirst("x", rng.randint(2, 40), beams=4, depth=rng.randint(1, 6)))
        for count in range(1, len(tree) + 1):
            some = tree.best(count)
            assert len(some) == count
            assert some.is_sound(VOCAB)
            assert sorted(some.logf) == sorted(sorted(tree.logf)[-count:])


def test_a_shape_is_filled_with_the_first_choices() -> None:
    shape = Shape.expansion(SPECINFER)
    assert (len(shape), shape.levels()) == (20, 8)
    tree, passes = grow(Shaped("x", shape))
    assert (len(tree), passes, max(tree.depths())) == (20, 8, 8)
    for node in range(ROOT, len(tree)):
        children = [tree.tokens[i] for i in range(len(tree)) if tree.parents[i] == node]
        assert children == guesses(path_of(tree, node))[0][: len(children)]
    assert tree.depths()[:8] == list(range(1, 9))
