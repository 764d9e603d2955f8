"""Proposers for tests: trees that mix the truth with lies."""

from __future__ import annotations

import random
from collections.abc import Sequence

from coppice.cost import StepCost
from coppice.speculation import ROOT, Controller, DraftTree, DraftView, Speculator


class FreeRows(StepCost):
    """Steps that take a second, however many rows they have."""

    def time(self, num_rows: int) -> float:
        """Always 1."""
        return 1.0


class Gossip:
    """Knows the answers, and hides them among wrong branches in random order.

    Args:
        answers: whole token sequences (prompt and answer).
        seed: of the lies.
        vocab_size: tokens to lie with.
    """

    name = "gossip"
    pass_s = 0.0
    branches = False

    def __init__(self, answers: Sequence[Sequence[int]], seed: int, vocab_size: int) -> None:
        self._answers = [list(a) for a in answers]
        self._random = random.Random(seed)
        self._vocab_size = vocab_size

    def propose(self, views: Sequence[DraftView], limits: Sequence[int]) -> list[DraftTree | None]:
        """Trees with up to three branches a level, one of them often true."""
        return [self._tree(v, limit) for v, limit in zip(views, limits, strict=True)]

    def forget(self, arrival: int) -> None:
        """Nothing is kept."""

    def _tree(self, view: DraftView, limit: int) -> DraftTree | None:
        here = len(view.tokens)
        future = next((a[here:] for a in self._answers if a[:here] == view.tokens), [])
        tree, parent = DraftTree(self.name), ROOT
        for truth in [*future, -1][: self._random.randint(0, 6)]:
            level = [self._random.randrange(self._vocab_size) for _ in range(3)]
            if truth >= 0 and self._random.random() < 0.85:
                level[self._random.randrange(3)] = truth
            nodes = [tree.add(t, parent) for t in level if len(tree) < limit]
            right = [n for n in nodes if tree.tokens[n] == truth]
            if not nodes:
                break
            parent = right[0] if right else self._random.choice(nodes)
        return tree


def gossiper(answers: Sequence[Sequence[int]], seed: int, vocab_size: int) -> Speculator:
    """A speculator that always asks for much of it: rows cost nothing."""
    controller = Controller(lambda _rows: 1.0, max_depth=20)
    return Speculator([Gossip(answers, seed, vocab_size)], controller, vocab_size)
