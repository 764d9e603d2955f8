"""The one token tree: a speculated continuation of a sequence.

The root is the sequence's last committed token and is not stored. A chain is a thin tree;
no tree at all is ordinary decoding. Nodes come parents first, and the likeliest path first of
all: a node whose number equals its depth less one needs no copying when its path is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ROOT = -1


@dataclass(frozen=True, slots=True)
class Drawn:
    """How a node's children were drawn, where that is what verifies them.

    Attributes:
        tokens: the draws in order. Independent ones may repeat: a child stands for all.
        q: what they were drawn from, ``[vocab_size]`` float64.
        replaced: whether each was drawn from all of ``q``, or without those before it.
    """

    tokens: tuple[int, ...]
    q: NDArray[np.float64]
    replaced: bool


@dataclass(slots=True)
class DraftTree:
    """Struct of arrays; node ``i`` stands in row ``i + 1`` after the root's.

    Attributes:
        source: name of the proposer, for metrics and calibration.
        tokens: token ids.
        parents: number of each node's parent, below its own, or `ROOT`.
        logf: estimated log probability that a node's whole path is accepted, where the
            proposer has one: steers how much is verified and nothing else. All or none.
        drawn: by parent, how its children were drawn (see `coppice.speculation.verify`);
            they are matched where this does not say.
    """

    source: str
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    logf: list[float] = field(default_factory=list)
    drawn: dict[int, Drawn] = field(default_factory=dict)

    @classmethod
    def chain(cls, source: str, tokens: Iterable[int]) -> DraftTree:
        """A tree of width one."""
        listed = list(tokens)
        return cls(source, listed, list(range(-1, len(listed) - 1)))

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, logf: float | None = None) -> int:
        """Append a node and return its number."""
        if not ROOT <= parent < len(self.tokens):
            raise ValueError(f"node {len(self.tokens)} stands before its parent {parent}")
        self.tokens.append(token)
        self.parents.append(parent)
        if logf is not None:
            self.logf.append(logf)
        return len(self.tokens) - 1

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that holds ``token``, or None."""
        for i in range(node + 1, len(self.tokens)):
            if self.parents[i] == node and self.tokens[i] == token:
                return i
        return None

    def depths(self) -> list[int]:
        """Depth of each node; children of the root have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def best(self, num_nodes: int) -> DraftTree:
        """The ``num_nodes`` nodes most likely to be accepted, the likeliest path first.

        Chances fall along a path, so what is left is a tree.
        """
        return self.part(sorted(range(len(self)), key=lambda i: (-self.logf[i], i))[:num_nodes])

    def part(self, nodes: Collection[int]) -> DraftTree:
        """Some nodes, each with its parent among them, the likeliest path first.

        Draws of which some are taken away by their probability are draws no longer: `drawn`
        is dropped.
        """
        kept = sorted(nodes)
        if self.logf:
            kept.sort(key=lambda i: -self.logf[i])
        order: list[int] = []
        node = ROOT
        for i in kept:  # children in order of chance, so the first found is the best
            if self.parents[i] == node:
                order.append(i)
                node = i
        first = set(order)
        order += sorted(i for i in kept if i not in first)
        return self._in_order(order)[0]

    def is_sound(self, vocab_size: int) -> bool:
        """Whether arrays agree, parents come first, tokens are known and chances fall."""
        return (
            len(self.tokens) == len(self.parents)
            and len(self.logf) in (0, len(self.tokens))
            and all(type(t) is int and 0 <= t < vocab_size for t in self.tokens)
            and all(ROOT <= p < i for i, p in enumerate(self.parents))
            and all(ROOT <= node < len(self.tokens) for node in self.drawn)
            and all(self._has_draws(node, d, vocab_size) for node, d in self.drawn.items())
            and all(
                f <= (0.0 if p == ROOT else self.logf[p]) + 1e-6  # rounding
                for f, p in zip(self.logf, self.parents, strict=False)
            )
        )

    def _has_draws(self, node: int, drawn: Drawn, vocab_size: int) -> bool:
        children = {t for t, p in zip(self.tokens, self.parents, strict=True) if p == node}
        return len(drawn.q) == vocab_size and children == set(drawn.tokens)

    def depth_first(self) -> DraftTree:
        """The same tree, the chain of first children first."""
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            children.setdefault(parent, []).append(node)
        order: list[int] = []
        left = children.get(ROOT, [])[::-1]
        while left:
            order.append(left.pop())
            left.extend(children.get(order[-1], [])[::-1])
        tree, number = self._in_order(order)
        tree.drawn = {number[node]: drawn for node, drawn in self.drawn.items()}
        return tree

    def _in_order(self, order: list[int]) -> tuple[DraftTree, dict[int, int]]:
        """A copy of some nodes, parents first, without draws; new numbers by old ones."""
        number = {old: new for new, old in enumerate(order)} | {ROOT: ROOT}
        copy = DraftTree(
            self.source,
            [self.tokens[i] for i in order],
            [number[self.parents[i]] for i in order],
            [self.logf[i] for i in order] if self.logf else [],
        )
        return copy, number
