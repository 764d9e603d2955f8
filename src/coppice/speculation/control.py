"""How much to speculate: the sizes that maximise expected tokens per second.

A chain of depth ``d`` whose tokens are each accepted with probability ``a`` yields
``1 + a + ... + a^d`` tokens a step. Over a batch the best sizes are found along one greedy
order: always the node most likely to be accepted next (the optimal connected set for every
size, since chances fall along a path), and the best point of that order by tokens over
seconds. Zero nodes is a point like any other.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coppice.speculation.tree import DraftTree

PRIOR = 4.0
"""Tokens' worth of weight the proposer's average has in a new sequence's estimate."""
MEMORY = 0.95
"""Weight of the past at each observation: about twenty steps are remembered."""
RETRY_STEPS = 24
"""Steps after which a sequence that stopped speculating tries one token again."""


@dataclass(slots=True)
class Record:
    """Draft tokens verified and accepted, fading."""

    tried: float = 0.0
    accepted: float = 0.0

    def add(self, tried: int, accepted: int) -> None:
        """Learn from one verified tree."""
        self.tried = self.tried * MEMORY + tried
        self.accepted = self.accepted * MEMORY + accepted


class Controller:
    """Chooses depths from live acceptance and the cost model.

    Args:
        step_s: expected seconds of a target step of so many rows.
        max_depth: deepest chain.
    """

    def __init__(self, step_s: Callable[[int], float], max_depth: int) -> None:
        self._step_s = step_s
        self._max_depth = max_depth
        self._overall: dict[str, Record] = {}
        self._records: dict[tuple[str, int], Record] = {}
        self._idle: dict[int, int] = {}
        self._token_s = 0.0

    def token_s(self) -> float:
        """Seconds a token of the batch costs at present, as far as sizes were asked for."""
        return self._token_s

    def trim(
        self, trees: Sequence[DraftTree | None], *, rows: int, spare: int
    ) -> list[DraftTree | None]:
        """Of trees with chances, the nodes worth a row: none, if none is.

        Nodes enter in order of their chances, which fall along a path; the best point of that
        order by expected tokens over seconds is kept. What growing took is spent already.

        Args:
            trees: all of `DraftTree.logf`.
            rows: rows the step has without them.
            spare: rows it may have more.
        """
        nodes = [(f, i) for i, tree in enumerate(trees) if tree is not None for f in tree.logf]
        nodes.sort(key=lambda node: -node[0])
        expected = float(len(trees))
        best_rate, best = expected / self._step_s(rows), 0
        for taken, (logf, _) in enumerate(nodes[:spare], start=1):
            expected += math.exp(logf)
            rate = expected / self._step_s(rows + taken)
            if rate > best_rate:
                best_rate, best = rate, taken
        counts = Counter(i for _, i in nodes[:best])
        return [
            tree.best(counts[i]) if tree is not None and counts[i] else None
            for i, tree in enumerate(trees)
        ]

    def chance(self, source: str, arrival: int) -> float:
        """Estimated probability that this proposer's next token for a sequence is accepted."""
        overall = self._overall.get(source, Record())
        mean = (overall.accepted + 0.7 * PRIOR) / (overall.tried + PRIOR)
        own = self._records.get((source, arrival), Record())
        return min(0.99, (own.accepted + mean * PRIOR) / (own.tried + PRIOR))

    def depths(
        self, source: str, arrivals: Sequence[int], *, rows: int, spare: int, pass_s: float
    ) -> list[int]:
        """Draft tokens worth verifying for each sequence.

        Args:
            source: who would draft.
            arrivals: the sequences that decode in this step.
            rows: rows the step has without speculation.
            spare: rows it may have more.
            pass_s: seconds the drafter takes for one token of every sequence.
        """
        chances = [self.chance(source, arrival) for arrival in arrivals]
        depths = [0] * len(chances)
        heap = [(-c, i) for i, c in enumerate(chances)]
        heapq.heapify(heap)
        expected, deepest = float(len(chances)), 0
        best_rate, best = expected / self._step_s(rows), list(depths)
        for taken in range(1, spare + 1):
            if not heap:
                break
            chance, i = heapq.heappop(heap)
            expected -= chance
            depths[i] += 1
            deepest = max(deepest, depths[i])
            if depths[i] < self._max_depth:
                heapq.heappush(heap, (chance * chances[i], i))
            rate = expected / (self._step_s(rows + taken) + deepest * pass_s)
            if rate > best_rate:
                best_rate, best = rate, list(depths)
        self._token_s = 1.0 / best_rate
        return self._with_retries(arrivals, best, spare)

    def observe(self, source: str, arrival: int, drafted: int, accepted: int) -> None:
        """Learn what became of a chain: ``accepted`` of ``drafted``, the next one refused."""
        tried = min(accepted + 1, drafted)
        self._overall.setdefault(source, Record()).add(tried, accepted)
        self._records.setdefault((source, arrival), Record()).add(tried, accepted)

    def forget(self, arrival: int) -> None:
        """The sequence has ended."""
        self._idle.pop(arrival, None)
        for source in self._overall:
            self._records.pop((source, arrival), None)

    def _with_retries(self, arrivals: Sequence[int], depths: list[int], spare: int) -> list[int]:
        """Now and then one token where speculation is off, to see whether it would pay."""
        for i, arrival in enumerate(arrivals):
            idle = 0 if depths[i] else self._idle.get(arrival, 0) + 1
            if idle >= RETRY_STEPS and sum(depths) < spare:
                depths[i], idle = 1, 0
            self._idle[arrival] = idle
        return depths
