"""What proposers' estimates were worth: predicted chances against what came true.

A node's estimate says how likely it is once its parent was right. Estimates of about the same
size share a bucket; what share of them came true is what they count from then on. On top of
that each sequence has a factor of its own, for texts that are easier or harder than most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coppice.speculation.tree import ROOT, DraftTree

BUCKETS = 12
PRIOR = 6.0
"""Nodes' worth of weight the proposer's own word has in a bucket, and 1 in a sequence."""
LONG, SHORT = 0.998, 0.93
"""Weight of the past at each observation, in buckets and in sequences."""
SURE = 0.99
"""No token is certain."""


@dataclass(slots=True)
class Tally:
    """What was expected to come true and what did, fading."""

    tried: float = 0.0
    expected: float = 0.0
    came: float = 0.0

    def add(self, expected: float, came: bool, memory: float) -> None:
        """Learn from one node."""
        self.tried = self.tried * memory + 1.0
        self.expected = self.expected * memory + expected
        self.came = self.came * memory + came


class Calibration:
    """Turns estimates into chances, by proposer and sequence."""

    def __init__(self) -> None:
        self._buckets: dict[str, list[Tally]] = {}
        self._sequences: dict[tuple[str, int], Tally] = {}

    def chances(self, tree: DraftTree, arrival: int) -> list[float]:
        """Probability that each node's whole path is accepted; falls along every path."""
        buckets = self._buckets.get(tree.source)
        factor = self._factor(tree.source, arrival)
        chances: list[float] = []
        for i, parent in enumerate(tree.parents):
            above = 0.0 if parent == ROOT else tree.logf[parent]
            share = _share(tree.logf[i] - above)
            before = 1.0 if parent == ROOT else chances[parent]
            chances.append(before * min(SURE, factor * _chance(buckets, share)))
        return chances

    def learn(self, tree: DraftTree, arrival: int, committed: Sequence[int]) -> int:
        """The tokens that followed a tree's root, whether its nodes were verified or not.

        Returns:
            How many levels of the tree they follow.
        """
        buckets = self._buckets.setdefault(tree.source, [Tally() for _ in range(BUCKETS)])
        own = self._sequences.setdefault((tree.source, arrival), Tally())
        node, above, start, level = ROOT, 0.0, 0, 0
        for token in committed:
            found = None
            for i in range(start, len(tree)):
                if tree.parents[i] == node:
                    share = _share(tree.logf[i] - above)
                    came = tree.tokens[i] == token
                    own.add(_chance(buckets, share), came, SHORT)
                    buckets[_bucket(share)].add(share, came, LONG)
                    found = i if came else found
            if found is None:
                break
            node, above, start, level = found, tree.logf[found], found + 1, level + 1
        return level

    def forget(self, arrival: int) -> None:
        """The sequence has ended."""
        for source in self._buckets:
            self._sequences.pop((source, arrival), None)

    def _factor(self, source: str, arrival: int) -> float:
        own = self._sequences.get((source, arrival))
        return 1.0 if own is None else min(1.5, (own.came + 1.0) / (own.expected + 1.0))


def _share(log: float) -> float:
    return math.exp(min(0.0, log))


def _bucket(share: float) -> int:
    return min(BUCKETS - 1, int(share * BUCKETS))


def _chance(buckets: list[Tally] | None, share: float) -> float:
    """What estimates of this size were worth so far."""
    if buckets is None:
        return share
    tally = buckets[_bucket(share)]
    # The bucket's excess is shared by its estimates in proportion, so that larger stay larger.
    worth = (tally.came + PRIOR * share) / (tally.expected + PRIOR * share)
    return min(SURE, share * worth)
