"""How a tree grows from a model's guesses: freely by probability, or in a fixed shape.

A growth names the nodes whose next tokens it wants to know, is told them, and goes on until
it wants no more. It knows nothing of models, rows or pages; `coppice.speculation.draft` asks
one model for the wants of many growths at once.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from coppice.speculation.shapes import Shape
from coppice.speculation.tree import ROOT, DraftTree, Drawn

DECAY = -1e-4
"""What a level takes from a node's estimate: among equals, parents and shallow nodes come first.

SpecExec takes log 0.95 because drafts are too sure of themselves; here shares come calibrated.
"""


class Growth(Protocol):
    """One tree in the making."""

    tree: DraftTree

    def wants(self) -> list[int]:
        """Nodes whose next tokens are wanted now, ascending; none when the tree is done."""
        ...

    def extend(self, node: int, tokens: Sequence[int], shares: Sequence[float]) -> None:
        """Tell a node's next tokens, best first, with log probabilities; -1 ends the list."""
        ...

    def finish(self) -> DraftTree:
        """The tree, within its limit."""
        ...


class BestFirst:
    """Always the node most likely to be accepted next, several of them a pass.

    The best tree of so many nodes under the draft's own probabilities, exactly so where
    ``beams`` is no limit. Svirschevski et al., SpecExec (NeurIPS 2024), algorithm 1.

    Args:
        source: name of the proposer.
        limit: nodes the tree may have.
        beams: nodes extended in one pass of the draft model.
        depth: levels.
        least: a pass that promises fewer accepted tokens than this is not made.
    """

    def __init__(
        self, source: str, limit: int, *, beams: int, depth: int, least: float = 0.0
    ) -> None:
        self.tree = DraftTree(source)
        self._limit = limit
        self._beams = beams
        self._max_depth = depth
        self._least = least
        self._depths: list[int] = []
        self._open = [ROOT]

    def wants(self) -> list[int]:
        """See `Growth`."""
        if self._open == [ROOT]:
            return [ROOT]
        bar = self._bar()
        logf = self.tree.logf
        # A child is never likelier than its parent: one that only equals the bar cannot enter.
        able = [i for i in self._open if logf[i] > bar and self._depths[i] < self._max_depth]
        best = heapq.nlargest(self._beams, able, key=lambda i: (logf[i], -i))
        if sum(math.exp(logf[i]) for i in best) < self._least:
            return []
        return sorted(best)

    def extend(self, node: int, tokens: Sequence[int], shares: Sequence[float]) -> None:
        """See `Growth`."""
        self._open.remove(node)
        before = DECAY + (0.0 if node == ROOT else self.tree.logf[node])
        depth = 1 if node == ROOT else self._depths[node] + 1
        bar = self._bar()
        for token, share in zip(tokens, shares, strict=True):
            logf = before + min(share, 0.0)
            if token < 0 or logf <= bar:
                break
            self._open.append(self.tree.add(token, node, logf))
            self._depths.append(depth)

    def finish(self) -> DraftTree:
        """See `Growth`."""
        return self.tree.best(self._limit)

    def _bar(self) -> float:
        """What a newcomer must be likelier than: the last of the nodes there is room for."""
        if len(self.tree) < self._limit:
            return float("-inf")
        return heapq.nlargest(self._limit, self.tree.logf)[-1]


class Shaped:
    """A tree of a shape known beforehand, its children a model's first choices or draws.

    Args:
        source: name of the proposer.
        shape: which node has how many children.
        draw: draws children, given the node, its depth and their number; None takes the best.
    """

    def __init__(
        self, source: str, shape: Shape, draw: Callable[[int, int, int], Drawn] | None = None
    ) -> None:
        self.tree = DraftTree(source)
        self._children = shape.children()
        self._draw = draw
        self._place_of = {ROOT: ROOT}  # in the shape
        self._level = [ROOT]
        self._depth = {ROOT: 0}

    def wants(self) -> list[int]:
        """See `Growth`."""
        return [n for n in self._level if self._children[self._place_of[n]]]

    def extend(self, node: int, tokens: Sequence[int], shares: Sequence[float]) -> None:
        """See `Growth`; the shares say nothing here."""
        self._level.remove(node)
        places = self._children[self._place_of[node]]
        if self._draw is not None:
            drawn = self._draw(node, self._depth[node], len(places))
            self.tree.drawn[node] = drawn
            tokens = drawn.tokens
        seen: set[int] = set()
        for place, token in zip(places, tokens, strict=False):
            if token < 0 or token in seen:  # a repeated draw: its branch is not grown twice
                continue
            seen.add(token)
            child = self.tree.add(token, node)
            self._place_of[child] = place
            self._depth[child] = self._depth[node] + 1
            self._level.append(child)

    def finish(self) -> DraftTree:
        """See `Growth`."""
        return self.tree.depth_first()
