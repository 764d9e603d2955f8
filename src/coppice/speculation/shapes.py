"""Shapes of token trees: expansion vectors, and the best shape for measured acceptance.

A shape says how many children each place has, before any token is known. Children are told
apart by rank, the order in which they are drawn or preferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coppice.speculation.tree import ROOT

SPECINFER = (1, 1, 3, 1, 1, 1, 1, 1)
"""SpecInfer's expansion: eight levels, three branches from the third on, 20 nodes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Places of a tree, parents first, siblings by rank.

    Attributes:
        parents: number of each place's parent, or `ROOT`.
    """

    parents: tuple[int, ...]

    @classmethod
    def expansion(cls, widths: Sequence[int]) -> Shape:
        """Every place of level ``i`` gets ``widths[i]`` children (SpecInfer, section 3)."""
        parents: list[int] = []
        level = [ROOT]
        for width in widths:
            start = len(parents)
            parents.extend(place for place in level for _ in range(width))
            level = list(range(start, len(parents)))
        return cls(tuple(parents))

    def __len__(self) -> int:
        return len(self.parents)

    def children(self) -> dict[int, list[int]]:
        """Places under each place, in order of rank; `ROOT` among the keys."""
        found: dict[int, list[int]] = {place: [] for place in range(ROOT, len(self.parents))}
        for place, parent in enumerate(self.parents):
            found[parent].append(place)
        return found

    def levels(self) -> int:
        """Depth of the deepest place; the root is no place."""
        depth = {ROOT: 0}
        for place, parent in enumerate(self.parents):
            depth[place] = depth[parent] + 1
        return max(depth.values())

    def value(self, accepted: Sequence[float]) -> float:
        """Expected tokens of a pass, the one beyond the draft included.

        Args:
            accepted: how often a node's child of each rank is the accepted one.
        """
        reached = {ROOT: 1.0}
        children = self.children()
        for place in range(ROOT, len(self.parents)):
            for rank, child in enumerate(children[place]):
                chance = accepted[rank] if rank < len(accepted) else 0.0
                reached[child] = reached[place] * chance
        return sum(reached.values())


class BestShapes:
    """The best shape of every size and depth, by dynamic programming.

    With ``p[i]`` the chance that the child of rank ``i`` is accepted, the value of a tree of
    ``m`` nodes and at most ``l`` levels, root included, whose root has exactly ``b`` children is
    ``T[m, l, b] = max over y of T[y, l, b - 1] + p[b] * max over b' of T[m - y, l - 1, b']``.
    Chen et al., Sequoia (NeurIPS 2024), section 4.1. The split ``y`` is searched as a vector.

    Args:
        accepted: ``p`` by rank; children beyond its length are never worth a node.
        num_nodes: largest tree, root included.
        levels: deepest tree, root included.
    """

    def __init__(self, accepted: Sequence[float], num_nodes: int, levels: int) -> None:
        self._p = list(accepted)
        ranks = min(len(self._p), num_nodes - 1)
        none = float("-inf")
        self._table: NDArray[np.float64] = np.full(
            (levels + 1, num_nodes + 1, ranks + 1), none, np.float64
        )
        self._split: NDArray[np.int64] = np.zeros(self._table.shape, np.int64)
        for level in range(1, levels + 1):
            self._fill(level, num_nodes, ranks)

    def value(self, num_nodes: int, levels: int) -> float:
        """Expected tokens a pass of the best tree: ``F*``; both counts include the root."""
        return float(self._table[levels, num_nodes].max())

    def shape(self, num_nodes: int, levels: int) -> Shape:
        """The best tree of at most ``levels`` levels; both counts include the root."""
        parents: list[int] = []
        self._build(num_nodes, levels, ROOT, parents)
        return Shape(tuple(parents))

    def _fill(self, level: int, num_nodes: int, ranks: int) -> None:
        table, split = self._table[level], self._split[level]
        table[1, 0] = 1.0
        if level == 1:
            return
        below = self._table[level - 1].max(axis=1)  # best of so many nodes, one level less
        for b in range(1, ranks + 1):
            for m in range(b + 1, num_nodes + 1):
                ys = np.arange(1, m)
                values = table[ys, b - 1] + self._p[b - 1] * below[m - ys]
                best = int(values.argmax())
                table[m, b], split[m, b] = values[best], ys[best]

    def _build(self, m: int, level: int, root: int, parents: list[int]) -> None:
        """Append the places under ``root`` of the best tree of ``m`` nodes."""
        b = int(self._table[level, m].argmax())
        sizes: list[int] = []
        while b > 0:
            y = int(self._split[level, m, b])
            sizes.append(m - y)
            m, b = y, b - 1
        for size in reversed(sizes):
            parents.append(root)
            self._build(size, level - 1, len(parents) - 1, parents)
