"""Token trees and prompt lookup."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from coppice.kernels.sampling import RowParams
from coppice.speculation import ROOT, DraftTree, PromptLookup


@dataclass
class View:
    """A sequence for proposers."""

    tokens: list[int]
    arrival: int = 1
    room: int = 100
    scope: str = ""
    speculate: str = "auto"
    row: RowParams = field(default_factory=lambda: RowParams(vocab_size=50))


def test_a_tree_knows_children_and_depths() -> None:
    tree = DraftTree.chain("x", [5, 6])
    twin = tree.add(7, 0)
    assert (tree.child(ROOT, 5), tree.child(0, 6), tree.child(0, 7)) == (0, 1, twin)
    assert tree.child(ROOT, 6) is None
    assert tree.depths() == [1, 2, 2]


def test_equal_tokens_at_one_depth_stay_apart() -> None:
    tree = DraftTree("x")
    left, right = tree.add(1, ROOT), tree.add(2, ROOT)
    deep = tree.add(9, right)
    assert tree.child(left, 9) is None
    assert tree.child(right, 9) == deep


@pytest.mark.parametrize(
    "tree",
    [
        DraftTree("x", [50], [ROOT]),
        DraftTree("x", [-1], [ROOT]),
        DraftTree("x", [1, 1], [ROOT]),
        DraftTree("x", [1], [0]),
    ],
)
def test_garbage_is_not_sound(tree: DraftTree) -> None:
    assert not tree.is_sound(50)
    with pytest.raises(ValueError, match="parent"):
        DraftTree("x").add(1, 0)


def brute_force(tokens: list[int], longest: int, shortest: int, limit: int) -> list[int]:
    """Continuation of the latest earlier occurrence of the longest repeated n-gram."""
    for n in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) >= n and tokens[end - n : end] == tokens[-n:]:
                return tokens[end : end + limit]
    return []


def test_lookup_equals_brute_force_while_a_text_grows() -> None:
    rng = random.Random(4)
    lookup, view = PromptLookup(), View([])
    found = 0
    for _ in range(1500):
        view.tokens.extend(rng.randrange(4) for _ in range(rng.randint(1, 3)))
        [tree] = lookup.propose([view], [5])
        wanted = brute_force(view.tokens, 4, 2, 5)
        assert (tree.tokens if tree else []) == wanted
        found += bool(wanted)
        if rng.random() < 0.01:
            lookup.forget(view.arrival)
        if len(view.tokens) > 200:
            view.tokens = view.tokens[:20]
            lookup.forget(view.arrival)
    assert found > 1000


def test_lookup_keeps_sequences_apart() -> None:
    lookup = PromptLookup()
    lookup.propose([View([1, 2, 3, 1, 2], arrival=1)], [4])
    assert lookup.propose([View([1, 2], arrival=2)], [4]) == [None]
