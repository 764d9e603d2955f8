"""The one token tree: a speculated continuation of a sequence.

The root is the sequence's last committed token and is not stored. A chain is a thin tree;
no tree at all is ordinary decoding. Nodes come parents first, and among siblings the one
that is most likely to be accepted first: a node whose number equals its depth less one needs
no copying when its path is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

ROOT = -1


@dataclass(slots=True)
class DraftTree:
    """Struct of arrays; node ``i`` stands in row ``i + 1`` after the root's.

    Attributes:
        source: name of the proposer, for metrics and calibration.
        tokens: token ids.
        parents: number of each node's parent, below its own, or `ROOT`.
        logf: estimated log probability that a node's whole path is accepted, where the
            proposer has one: steers how much is verified and nothing else. All or none.
    """

    source: str
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    logf: list[float] = field(default_factory=list)

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

    def is_sound(self, vocab_size: int) -> bool:
        """Whether arrays agree, parents come first and every token is in the vocabulary."""
        return (
            len(self.tokens) == len(self.parents)
            and len(self.logf) in (0, len(self.tokens))
            and all(type(t) is int and 0 <= t < vocab_size for t in self.tokens)
            and all(ROOT <= p < i for i, p in enumerate(self.parents))
        )
