"""Prompt lookup: what followed the last tokens the last time they were seen.

Saxena, Prompt Lookup Decoding (2023); the same as n-gram speculation elsewhere. The index of
a sequence holds, for each n-gram, where it last ended before now; it grows with the sequence
and is looked up from the longest n-gram down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coppice.speculation.interfaces import DraftView
from coppice.speculation.tree import DraftTree


@dataclass(slots=True)
class _Index:
    """Where each n-gram of one sequence last ended; ``read`` tokens are in it."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    read: int = 0


class PromptLookup:
    """Proposes the continuation of the longest repeated n-gram as a chain.

    Args:
        shortest: fewest tokens that must repeat.
        longest: most tokens compared.
    """

    name = "lookup"
    pass_s = 0.0
    branches = False

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-grams of {shortest} to {longest} tokens make no sense")
        self._lengths = range(longest, shortest - 1, -1)
        self._indexes: dict[int, _Index] = {}

    def propose(self, views: Sequence[DraftView], limits: Sequence[int]) -> list[DraftTree | None]:
        """See `Proposer`."""
        return [self._one(v, limit) for v, limit in zip(views, limits, strict=True)]

    def forget(self, arrival: int) -> None:
        """See `Proposer`."""
        self._indexes.pop(arrival, None)

    def _one(self, view: DraftView, limit: int) -> DraftTree | None:
        tokens = view.tokens
        index = self._indexes.setdefault(view.arrival, _Index())
        if index.read > len(tokens):
            index.ends.clear()
            index.read = 0
        # The n-grams that end with the last token are what is asked for: they enter later.
        for end in range(index.read + 1, len(tokens)):
            for n in self._lengths:
                if n <= end:
                    index.ends[tuple(tokens[end - n : end])] = end
        index.read = max(index.read, len(tokens) - 1)
        for n in self._lengths:
            found = index.ends.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if found is not None and limit > 0:
                return DraftTree.chain(self.name, tokens[found : found + limit])
        return None
