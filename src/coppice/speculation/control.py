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
from coppice.speculation.select import best_first, needed_depth, select
from coppice.speculation.tree import DraftTree

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
NO_NEEDS: Mapping[int, float] = {}


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
        self,
        source: str,
        arrivals: Sequence[int],
        *,
        rows: int,
        spare: int,
        pass_s: float,
        needs: Mapping[int, float] = NO_NEEDS,
    ) -> list[int]:
        """Draft tokens worth verifying for each sequence.

        Args:
            source: who would draft.
            arrivals: the sequences that decode in this step.
            rows: rows the step has without speculation.
            spare: rows it may have more.
            pass_s: seconds the drafter takes for one token of every sequence.
            needs: see `select`.
        """
        chances = [self.chance(source, arrival) for arrival in arrivals]
        depths = self._needed([needs.get(a, 0.0) for a in arrivals], chances, spare)
        heap = [(-(c ** (d + 1)), i) for i, (c, d) in enumerate(zip(chances, depths, strict=True))
                if d < self._max_depth]  # fmt: skip
        heapq.heapify(heap)
        expected = sum(
            sum(c**k for k in range(d + 1)) for c, d in zip(chances, depths, strict=True)
        )
        deepest, needed = max(depths, default=0), sum(depths)
        others_s = self._others_s(rows, len(arrivals))
        best_rate = expected / (self._step_s(rows + needed) - others_s + deepest * pass_s)
        best = list(depths)
        for taken in range(needed + 1, spare + 1):
            if not heap:
                break
            chance, i = heapq.heappop(heap)
            expected -= chance
            depths[i] += 1
            deepest = max(deepest, depths[i])
            if depths[i] < self._max_depth:
                heapq.heappush(heap, (chance * chances[i], i))
            rate = expected / (self._step_s(rows + taken) - others_s + deepest * pass_s)
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
        self,
        trees: Mapping[int, DraftTree],
        *,
        sequences: int,
        rows: int,
        spare: int,
        needs: Mapping[int, float] = NO_NEEDS,
    ) -> dict[int, DraftTree]:
        """What of some trees is worth verifying: the best connected parts, or nothing.

        Args:
            trees: by sequence; they have cost what they cost.
            sequences: how many get a token from the step in any case.
            rows: rows the step has without trees.
            spare: rows it may have more.
            needs: tokens sequences must get from the step to be on time, in expectation.
        """
        if not trees:
            return {}
        ordered = [best_first(t.parents, self.chances(t, a)) for a, t in trees.items()]
        dearer, others_s = self._dearer(), self._others_s(rows, sequences)
        plain_s = (self._step_s(rows) - others_s) / WORTH
        counts = select(
            [chances for _, chances in ordered],
            [needs.get(arrival, 0.0) for arrival in trees],
            spare,
            most=self._max_depth,
            step_s=lambda n: (self._step_s(rows + n) - others_s) * dearer if n else plain_s,
            others=sequences - len(trees),
        )
        return {
            arrival: tree.part(sorted(nodes[:count]))
            for (arrival, tree), (nodes, _), count in zip(
                trees.items(), ordered, counts, strict=True
            )
            if count
        }

    def _others_s(self, rows: int, sequences: int) -> float:
        """Seconds of a step that prompts take: they bring no tokens, and are worth them.

        Counted as the price of this step's tokens, they would make any guess look cheap.
        """
        return self._step_s(rows) - self._step_s(min(rows, sequences))

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

    def _needed(self, needs: Sequence[float], chances: Sequence[float], spare: int) -> list[int]:
        """Depths that meet the needs as far as they can be met, the largest first."""
        depths = [0] * len(needs)
        for i in sorted(range(len(needs)), key=lambda i: -needs[i]):
            depths[i] = min(spare, needed_depth(chances[i], needs[i], self._max_depth))
            spare -= depths[i]
        return depths

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
