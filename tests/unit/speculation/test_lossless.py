"""Rules keep the target's distribution: exactly by enumeration, and in draws of the real code.

Numbers in names are those of the losslessness tests of the speculation brief. Biased variants
stand beside the rules: a test that would not reject them would prove nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from coppice.speculation import DraftTree, Drawn
from coppice.speculation.verify import PositionChance, Rule, draw_children, next_token, race

F64 = NDArray[np.float64]
Step = Callable[[F64, Drawn, "Replay"], int]
VOCAB = 5


@dataclass
class Replay:
    """Decisions in order from a list; beyond its end the first way, noted with its chance."""

    given: list[int]
    made: list[tuple[int, list[float]]] = field(default_factory=list)

    def accepts(self, probability: float) -> bool:
        return self._decide([1.0 - probability, probability]) == 1

    def picks(self, p: F64) -> int:
        return self._decide(p.tolist())

    def _decide(self, ways: list[float]) -> int:
        at = len(self.made)
        able = [i for i, w in enumerate(ways) if w > 0.0]
        way = self.given[at] if at < len(self.given) else able[0]
        self.made.append((way, ways))
        return way


def outcomes(run: Callable[[Replay], int], size: int = VOCAB) -> F64:
    """The exact distribution of what ``run`` returns, over all its decisions."""
    found: F64 = np.zeros(size)
    given: list[int] | None = []
    while given is not None:
        replay = Replay(given)
        token = run(replay)
        found[token] += np.prod([ways[way] for way, ways in replay.made])
        given = None
        for at in range(len(replay.made) - 1, -1, -1):
            way, ways = replay.made[at]
            later = [i for i in range(way + 1, len(ways)) if ways[i] > 0.0]
            if later:
                given = [w for w, _ in replay.made[:at]] + [later[0]]
                break
    return found


def pairs(count: int, seed: int = 0) -> list[tuple[F64, F64]]:
    """Target and draft distributions that resemble each other, some without full support."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        p = rng.dirichlet(np.full(VOCAB, 0.7))
        q = 0.5 * p + 0.5 * rng.dirichlet(np.full(VOCAB, 0.7))
        if i % 3 == 0:
            q[rng.integers(VOCAB)] = 0.0
        if i % 5 == 0:
            p[rng.integers(VOCAB)] = 0.0
        found.append((p / p.sum(), q / q.sum()))
    return found


def children(q: F64, rule: Rule, count: int) -> list[tuple[float, Drawn]]:
    """All ways ``count`` children may be drawn, with their chances."""
    if rule == "chain":
        count = 1
    ways: list[tuple[float, Drawn]] = []
    for draws in itertools.product(np.flatnonzero(q > 0).tolist(), repeat=count):
        if rule == "mss":
            ways.append((float(np.prod(q[list(draws)])), Drawn(draws, q, replaced=True)))
            continue
        if len(set(draws)) < count:
            continue
        chance, rest = 1.0, 1.0
        for token in draws:
            chance *= q[token] / rest
            rest -= q[token]
        ways.append((chance, Drawn(draws, q, replaced=False)))
    return ways


def one_level(p: F64, q: F64, rule: Rule, count: int, step: Step = next_token) -> F64:
    """The distribution of the token after a node."""
    total: F64 = np.zeros(VOCAB)
    for chance, drawn in children(q, rule, count):
        total += chance * outcomes(lambda r, d=drawn: step(p, d, r))  # type: ignore[misc]
    return total


def distance(a: F64, b: F64) -> float:
    """Total variation."""
    return float(np.abs(a - b).sum() / 2)


RULES: list[tuple[Rule, int]] = [("chain", 1), ("mss", 2), ("mss", 3), ("swor", 2), ("swor", 3)]


@pytest.mark.parametrize(("rule", "count"), RULES)
def test_1_one_level_is_exact(rule: Rule, count: int) -> None:
    worst = max(distance(one_level(p, q, rule, count), p) for p, q in pairs(100))
    assert worst < 1e-12


def test_1_a_draft_with_fewer_tokens_than_children_is_exact() -> None:
    p = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    q = np.array([0.0, 0.6, 0.4, 0.0, 0.0])
    total: F64 = np.zeros(VOCAB)
    for draws, chance in (((1, 2), 0.6), ((2, 1), 0.4)):
        drawn = Drawn(draws, q, replaced=False)
        total += chance * outcomes(lambda r, d=drawn: next_token(p, d, r))  # type: ignore[misc]
    assert distance(total, p) < 1e-12
    assert len(draw_children(q, 4, "swor", seed=3, position=8).tokens) == 2


@pytest.mark.parametrize(("rule", "count"), [("chain", 1), ("mss", 2), ("swor", 2)])
def test_1_two_levels_are_exact(rule: Rule, count: int) -> None:
    """The joint distribution of two tokens, the second's distributions known by the first."""
    seconds = pairs(VOCAB, seed=2)
    for p, q in pairs(5, seed=1):
        joint: F64 = np.zeros((VOCAB, VOCAB))
        for chance, drawn in children(q, rule, count):
            first = outcomes(lambda r, d=drawn, t=p: next_token(t, d, r))  # type: ignore[misc]
            for token in np.flatnonzero(first):
                follow, their_q = seconds[token]
                # A node that the tree holds has drawn children; any other is sampled plainly.
                inner = follow
                if int(token) in drawn.tokens:
                    inner = one_level(follow, their_q, rule, count)
                joint[token] += chance * first[token] * inner
        wanted = p[:, None] * np.stack([follow for follow, _ in seconds])
        assert np.abs(joint - wanted).sum() / 2 < 1e-12


def top_children(p: F64, drawn: Drawn, chance: Replay) -> int:
    """Biased: the draft's likeliest tokens under the rule for draws without replacement."""
    best = tuple(int(t) for t in np.argsort(-drawn.q, kind="stable")[: len(drawn.tokens)])
    return next_token(p, replace(drawn, tokens=best), chance)


def q_not_updated(p: F64, drawn: Drawn, chance: Replay) -> int:
    """Biased: draws without replacement verified as if they were independent."""
    return next_token(p, replace(drawn, replaced=True), chance)


def duplicates_merged(p: F64, drawn: Drawn, chance: Replay) -> int:
    """Biased: equal independent draws tried once."""
    return next_token(p, replace(drawn, tokens=tuple(dict.fromkeys(drawn.tokens))), chance)


def pruned(p: F64, drawn: Drawn, chance: Replay) -> int:
    """Biased: of the draws only the likelier ones are kept, in their order."""
    floor = sorted(drawn.q[list(drawn.tokens)])[-2] if len(drawn.tokens) > 1 else 0.0
    kept = tuple(t for t in drawn.tokens if drawn.q[t] >= floor)
    return next_token(p, replace(drawn, tokens=kept), chance)


def wrong_row(p: F64, drawn: Drawn, chance: Replay) -> int:
    """Biased: the correction is drawn from another row of logits."""
    for token in drawn.tokens[:1]:
        if chance.accepts(min(1.0, float(p[token] / drawn.q[token]))):
            return token
    return chance.picks(np.roll(p, 1))


BIASED: list[tuple[Rule, int, Step]] = [
    ("swor", 3, top_children),
    ("swor", 3, q_not_updated),
    ("mss", 3, duplicates_merged),
    ("swor", 3, pruned),
    ("chain", 1, wrong_row),
]


@pytest.mark.parametrize(("rule", "count", "step"), BIASED)
def test_1_biased_variants_are_seen(rule: Rule, count: int, step: Step) -> None:
    assert max(distance(one_level(p, q, rule, count, step), p) for p, q in pairs(40)) > 0.02


def test_truncation_by_draw_order_stays_exact() -> None:
    def shortened(p: F64, drawn: Drawn, chance: Replay) -> int:
        return next_token(p, replace(drawn, tokens=drawn.tokens[:2]), chance)

    assert max(distance(one_level(p, q, "swor", 3, shortened), p) for p, q in pairs(40)) < 1e-12


def test_more_children_are_accepted_more_often() -> None:
    """One level: ``swor`` at least as often as ``mss``, both more often than one child."""

    def accepted(p: F64, q: F64, rule: Rule, count: int) -> float:
        total = 0.0
        for chance, drawn in children(q, rule, count):
            found = outcomes(lambda r, d=drawn: next_token(p, d, r))  # type: ignore[misc]
            total += chance * found[list(set(drawn.tokens))].sum()
        return total

    rates = np.array(
        [
            [accepted(p, q, rule, n) for rule, n in (("chain", 1), ("mss", 3), ("swor", 3))]  # type: ignore[arg-type]
            for p, q in pairs(60, seed=5)
        ]
    )
    chain, mss, swor = rates.mean(0)
    assert chain + 0.03 < mss < swor
    assert (rates[:, 2] >= rates[:, 1] - 1e-9).mean() > 0.9


def chi_square(counts: NDArray[np.int64], p: F64) -> float:
    """The p-value of counts under ``p`` (Wilson and Hilferty's normal approximation)."""
    some = p > 0
    if counts[~some].sum():
        return 0.0
    expected = counts.sum() * p[some]
    statistic = float(((counts[some] - expected) ** 2 / expected).sum())
    freedom = int(some.sum()) - 1
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
    return float(0.5 * math.erfc(z / 2**0.5))


class Tables:
    """A target and a draft that know the last two tokens: eight tokens, sharpened at will."""

    size = 8

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.p = rng.dirichlet(np.full(self.size, 0.6), size=(self.size, self.size))
        noise = rng.dirichlet(np.full(self.size, 0.6), size=(self.size, self.size))
        self.q = 0.6 * self.p + 0.4 * noise

    def sequences(self, length: int = 3) -> F64:
        """The exact distribution of outputs after two zeros."""
        found: F64 = np.zeros((self.size,) * length)
        for tokens in itertools.product(range(self.size), repeat=length):
            path, chance = (0, 0, *tokens), 1.0
            for i in range(length):
                chance *= self.p[path[i], path[i + 1], path[i + 2]]
            found[tokens] = chance
        return found.reshape(-1)


RealStep = Callable[[F64, Drawn, PositionChance], int]


def speculate(
    tables: Tables, seed: int, rule: Rule, widths: Sequence[int], step: RealStep = next_token
) -> tuple[int, ...]:
    """Three tokens by steps of drafted trees, with the draws and decisions of the engine."""
    path, position = [0, 0], 2
    while len(path) < 5:
        tree = DraftTree("tables")
        level: list[tuple[int, tuple[int, int]]] = [(-1, (path[-2], path[-1]))]
        for depth, width in enumerate(widths):
            following = []
            for node, (a, b) in level:
                drawn = draw_children(
                    tables.q[a, b], width, rule, seed=seed, position=position + depth
                )
                tree.drawn[node] = drawn
                for token in dict.fromkeys(drawn.tokens):
                    following.append((tree.add(token, node), (b, token)))
            level = following
        node: int | None = -1
        while node is not None and len(path) < 5:
            p = tables.p[path[-2], path[-1]]
            drawn_here = tree.drawn.get(node)
            chance = PositionChance(seed, position)
            if drawn_here is None:
                token = race(p, seed, position, 1)[0]
            else:
                token = step(p, drawn_here, chance)
            path.append(token)
            position += 1
            node = tree.child(node, token)
    return tuple(path[2:])


def histogram(
    tables: Tables, runs: int, rule: Rule, widths: Sequence[int], step: RealStep = next_token
) -> NDArray[np.int64]:
    counts = np.zeros((tables.size,) * 3, np.int64)
    for seed in range(runs):
        counts[speculate(tables, seed * 7919 + 13, rule, widths, step)] += 1
    return counts.reshape(-1)


def merged(counts: NDArray[np.int64], p: F64, least: float = 5.0) -> tuple[NDArray[np.int64], F64]:
    """Cells too rare for a chi-square put together."""
    rare = p * counts.sum() < least
    if not rare.any():
        return counts, p
    return (
        np.append(counts[~rare], counts[rare].sum()),
        np.append(p[~rare], p[rare].sum()),
    )


QUICK: list[tuple[Rule, tuple[int, ...]]] = [("chain", (1, 1)), ("mss", (2, 2)), ("swor", (3, 2))]


@pytest.mark.parametrize(("rule", "widths"), QUICK)
def test_2_draws_of_three_tokens_follow_the_target(rule: Rule, widths: tuple[int, ...]) -> None:
    tables = Tables(4)
    counts = histogram(tables, 1500, rule, widths)
    assert chi_square(*merged(counts, tables.sequences())) > 0.001


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "widths"), [*QUICK, ("mss", (3, 1, 1)), ("swor", (2, 2, 2))])
def test_2_many_draws_follow_the_target(rule: Rule, widths: tuple[int, ...]) -> None:
    tables = Tables(4)
    counts = histogram(tables, 50_000, rule, widths)
    assert chi_square(*merged(counts, tables.sequences())) > 0.001


@pytest.mark.parametrize(
    ("rule", "widths", "step"),
    [
        ("swor", (3, 2), top_children),
        ("swor", (3, 2), q_not_updated),
        ("mss", (3, 2), duplicates_merged),
        ("swor", (3, 2), pruned),
        ("chain", (1, 1), wrong_row),
    ],
)
@pytest.mark.slow
def test_2_biased_variants_are_rejected(
    rule: Rule, widths: tuple[int, ...], step: RealStep
) -> None:
    tables = Tables(4)
    counts = histogram(tables, 50_000, rule, widths, step)
    assert chi_square(*merged(counts, tables.sequences())) < 1e-6


def test_2_a_biased_variant_is_rejected_quickly() -> None:
    tables = Tables(4)
    counts = histogram(tables, 1500, "swor", (3, 2), top_children)  # type: ignore[arg-type]
    assert chi_square(*merged(counts, tables.sequences())) < 1e-6


@pytest.mark.parametrize("rule", ["mss", "swor", "chain"])
def test_draws_do_not_depend_on_anything_but_seed_and_position(rule: Rule) -> None:
    q = np.random.default_rng(1).dirichlet(np.ones(40))
    one = draw_children(q, 4, rule, seed=9, position=100)
    assert one.tokens == draw_children(q, 4, rule, seed=9, position=100).tokens
    others = {draw_children(q, 4, rule, seed=9, position=n).tokens for n in range(50)}
    assert len(others) > 10
    if rule == "swor":
        assert len(set(one.tokens)) == 4
