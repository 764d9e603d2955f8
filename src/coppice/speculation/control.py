"""How much to speculate: the sizes that maximise expected tokens per second.

A chain of depth ``d`` whose tokens are each accepted with probability ``a`` yields
``1 + a + ... + a^d`` tokens a step. Over a batch the best sizes are found along one greedy
order: always the node most likely to be accepted next (the optimal connected set for every
size, since chances fall along a path), and the best point of that order by tokens over
seconds. Zero nodes is a point like any other.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coppice.speculation.calibration import Calibration
from coppice.speculation.tree import ROOT, DraftTree

PRIOR = 4.0
"""Tokens' worth of weight the proposer's average has in a new sequence's estimate."""
MEMORY = 0.95
"""Weight of the past at each observation: about twenty steps are remembered."""
RETRY_STEPS = 24
"""Steps after which a sequence that stopped speculating tries one token again, or more:"""
RETRY_SHARE = 0.02
"""the drafter's pass may take no more than this of the steps in between."""
WORTH = 1.02
"""Expected gain below which a step is not speculated: estimates are no better than that."""
FAR = 0.85
"""Share of the best rate at which a search along the greedy order ends."""


@dataclass(slots=True)
class Record:
    """Draft tokens verified and accepted, fading."""

    tried: float = 0.0
    accepted: float = 0.0

    def add(self, tried: int, accepted: int) -> None:
        """Learn from one verified tree."""
        self.tried = self.tried * MEMORY + tried
        self.accepted = self.accepted * MEMORY + accepted


@dataclass(slots=True)
class _Pace:
    """Seconds over expected seconds of one kind of step, smoothed."""

    ratio: float = 1.0
    known: int = 0

    def add(self, ratio: float) -> None:
        self.known += 1
        # A stall of the machine is no price of a step.
        self.ratio += max(0.05, 1.0 / self.known) * (min(ratio, 3.0 * self.ratio) - self.ratio)


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
        self.calibration = Calibration()
        self._plain, self._trees = _Pace(), _Pace()

    def token_s(self) -> float:
        """Seconds a token of the batch costs at present, as far as sizes were asked for."""
        return self._token_s

    @property
    def max_depth(self) -> int:
        """Most nodes for one sequence."""
        return self._max_depth

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
        every = max(RETRY_STEPS, pass_s / (RETRY_SHARE * self._step_s(rows)))
        return self._with_retries(arrivals, best, spare, every)

    def chances(self, tree: DraftTree, arrival: int) -> list[float]:
        """Estimated probability that each node's path is accepted."""
        if tree.logf:
            return self.calibration.chances(tree, arrival)
        each = self.chance(tree.source, arrival)
        return [each**depth for depth in tree.depths()]

    def gain(self, source: str, arrival: int, depth: int) -> float:
        """Expected tokens of a chain of so many."""
        each = self.chance(source, arrival)
        return sum(each**d for d in range(1, depth + 1))

    def select(
        self, trees: Mapping[int, DraftTree], *, sequences: int, rows: int, spare: int
    ) -> dict[int, DraftTree]:
        """What of some trees is worth verifying: the best connected parts, or nothing.

        Args:
            trees: by sequence; they have cost what they cost.
            sequences: how many get a token from the step in any case.
            rows: rows the step has without trees.
            spare: rows it may have more.
        """
        arrivals = list(trees)
        chances = [self.chances(trees[a], a) for a in arrivals]
        heap = [
            (-chances[s][i], s, i)
            for s, a in enumerate(arrivals)
            for i, parent in enumerate(trees[a].parents)
            if parent == ROOT
        ]
        heapq.heapify(heap)
        order: list[tuple[int, int]] = []
        expected = float(sequences)
        best_rate, best = WORTH * expected / self._step_s(rows), 0
        dearer = self._dearer()
        while heap and len(order) < spare:
            chance, s, i = heapq.heappop(heap)
            order.append((s, i))
            expected -= chance
            tree = trees[arrivals[s]]
            for child in range(i + 1, len(tree)):
                if tree.parents[child] == i:
                    heapq.heappush(heap, (-chances[s][child], s, child))
            rate = expected / (self._step_s(rows + len(order)) * dearer)
            if rate > best_rate:
                best_rate, best = rate, len(order)
            elif rate < FAR * best_rate and len(order) > 2 * len(arrivals):
                break
        kept: dict[int, list[int]] = {}
        for s, i in order[:best]:
            kept.setdefault(arrivals[s], []).append(i)
        return {arrival: trees[arrival].part(sorted(nodes)) for arrival, nodes in kept.items()}

    def step_took(self, rows: int, trees: int, seconds: float) -> None:
        """Learn what a step of so many rows with so many trees took."""
        (self._trees if trees else self._plain).add(seconds / self._step_s(rows))

    def plain_s(self, rows: int) -> float:
        """Seconds of a step of so many rows without trees, by those there were."""
        return self._step_s(rows) * self._plain.ratio

    def _dearer(self) -> float:
        """How much more a step with trees takes than its rows alone would let expect."""
        if not (self._trees.known and self._plain.known):
            return 1.0
        return min(2.0, max(0.8, self._trees.ratio / self._plain.ratio))

    def observe(self, source: str, arrival: int, drafted: int, accepted: int) -> None:
        """Learn what became of a chain: ``accepted`` of ``drafted``, the next one refused."""
        tried = min(accepted + 1, drafted)
        self._overall.setdefault(source, Record()).add(tried, accepted)
        self._records.setdefault((source, arrival), Record()).add(tried, accepted)

    def forget(self, arrival: int) -> None:
        """The sequence has ended."""
        self._idle.pop(arrival, None)
        self.calibration.forget(arrival)
        for source in self._overall:
            self._records.pop((source, arrival), None)

    def _with_retries(
        self, arrivals: Sequence[int], depths: list[int], spare: int, every: float
    ) -> list[int]:
        """Now and then one token where speculation is off, to see whether it would pay."""
        for i, arrival in enumerate(arrivals):
            idle = 0 if depths[i] else self._idle.get(arrival, 0) + 1
            if idle >= every and sum(depths) < spare:
                depths[i], idle = 1, 0
            self._idle[arrival] = idle
        return depths
