"""Rules that keep a sampled request's distribution instead of its path.

By default a tree is matched: the next token is drawn as without a tree, with the request's
own noise, and looked for among the children. The rules here accept children that were drawn
from the draft's distribution ``q`` so often that what comes out is distributed exactly as
the target's ``p``; which tokens come out then depends on the tree. All take the target's
distribution after every step of sampling, and the very ``q`` that was drawn from.

- ``chain``: one child, kept with ``min(1, p / q)``, else a token of ``norm(max(p - q, 0))``.
  Leviathan et al., ICML 2023; Chen et al., 2023.
- ``mss``: independent children, each tried against what the ones before left of ``p``.
  Miao et al., SpecInfer (ASPLOS 2024), algorithm 2.
- ``swor``: children drawn without replacement, ``q`` losing each one that was refused.
  Chen et al., Sequoia (NeurIPS 2024), algorithm 2.

Children must be drawn, not chosen: a tree pruned by token or probability is biased under
these rules and has to be matched. ``tests/unit/speculation/test_lossless.py`` shows both.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from coppice.kernels.noise import words
from coppice.kernels.ranking import gumbel
from coppice.speculation.tree import Drawn

Rule = Literal["match", "chain", "mss", "swor"]
F64 = NDArray[np.float64]

_DRAFT, _ACCEPT, _REST = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Seeds of three noises that have nothing to do with each other or the request's own."""


class Chance(Protocol):
    """Where a rule's decisions come from."""

    def accepts(self, probability: float) -> bool:
        """True with this probability, anew for each call."""
        ...

    def picks(self, p: F64) -> int:
        """A token drawn from ``p``."""
        ...


class PositionChance:
    """Decisions as a function of (seed, position) and their order.

    Args:
        seed: the request's noise key.
        position: of the token that is decided.
    """

    def __init__(self, seed: int, position: int) -> None:
        self._seed, self._position = seed, position
        self._asked = 0

    def accepts(self, probability: float) -> bool:
        """See `Chance`."""
        word = int(words(self._seed ^ _ACCEPT, self._position, self._asked + 1)[-1])
        self._asked += 1
        return (word >> 1) + 0.5 < probability * 2.0**31

    def picks(self, p: F64) -> int:
        """See `Chance`: the first arrival of exponential clocks that run at the rates ``p``."""
        return race(p, self._seed ^ _REST, self._position, 1)[0]


def race(q: F64, seed: int, position: int, count: int) -> list[int]:
    """Up to ``count`` different tokens drawn from ``q`` without replacement, in order."""
    able = np.flatnonzero(q > 0.0)
    # A clock of rate q rings at e^-noise / q: the largest sum rings first.
    rings = np.log(q[able]) + gumbel(seed, position, len(q))[able]
    return [int(t) for t in able[np.argsort(-rings, kind="stable")[:count]]]


def draw_children(q: F64, count: int, rule: Rule, *, seed: int, position: int) -> Drawn:
    """Draw what `next_token` can verify.

    Args:
        q: the draft's distribution after every step of sampling, ``[vocab_size]``.
        count: draws; ``chain`` makes one, and ``swor`` no more than ``q`` holds.
        rule: any but ``match``.
        seed: the request's noise key.
        position: of the drawn tokens.
    """
    key = seed ^ _DRAFT
    if rule == "mss":
        # The draws of one position differ in the high half of its counter.
        draws = [race(q, key, position + (i << 32), 1)[0] for i in range(count)]
        return Drawn(tuple(draws), q, replaced=True)
    return Drawn(tuple(race(q, key, position, 1 if rule == "chain" else count)), q, replaced=False)


def next_token(p: F64, drawn: Drawn, chance: Chance) -> int:
    """The token after a node: one of the children drawn, or one of what they left of ``p``.

    ``chain`` is the case of one child. Children are tried in the order of their draws, which
    for independent ones is as random as any.

    Args:
        p: the target's distribution after every step of sampling, ``[V]`` float64, sum 1.
        drawn: the children.
        chance: the decisions.
    """
    q = drawn.q
    for token in drawn.tokens:
        if q[token] > 0.0 and chance.accepts(min(1.0, float(p[token] / q[token]))):
            return token
        left = np.maximum(p - q, 0.0)
        total = left.sum()
        if total <= 0.0:  # p and q are equal but for rounding: a refusal means nothing
            return token
        p = left / total
        if not drawn.replaced:
            q = q.copy()
            q[token] = 0.0
            rest = q.sum()
            if rest <= 0.0:
                break
            q /= rest
    return chance.picks(p)
