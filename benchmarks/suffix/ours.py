"""Coppice's proposers as contenders: the code the engine runs, without the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coppice.kernels.sampling import RowParams
from coppice.speculation import (
    Controller,
    History,
    PromptLookup,
    Proposer,
    Speculator,
    SuffixProposer,
)

VOCAB = 4096


@dataclass
class View:
    """A sequence as proposers see it."""

    arrival: int
    tokens: list[int]
    room: int = 1 << 20
    scope: str = ""
    speculate: str = "auto"
    row: RowParams = field(default_factory=lambda: RowParams(vocab_size=VOCAB))


class Fixed:
    """A proposer that always gives as much as it may."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self._view = View(0, [])
        self._num_prompt = 0

    def start(self, prompt: list[int]) -> None:
        """See `Contender`."""
        self._view = View(self._view.arrival + 1, list(prompt))
        self._num_prompt = len(prompt)

    def propose(self, limit: int) -> tuple[list[int], list[int]]:
        """See `Contender`."""
        [tree] = self.proposer.propose([self._view], [limit])
        return (tree.tokens, tree.parents) if tree else ([], [])

    def accept(self, tokens: list[int]) -> None:
        """See `Contender`."""
        self._view.tokens += tokens

    def end(self) -> None:
        """See `Contender`."""
        if isinstance(self.proposer, SuffixProposer):
            self.proposer.learn(self._view, self._num_prompt)
        self.proposer.forget(self._view.arrival)


class Controlled(Fixed):
    """The suffix proposer as the engine drives it: the controller picks the size."""

    def __init__(self, step_s: Callable[[int], float], most: int) -> None:
        super().__init__(SuffixProposer(History(64 << 20)))
        self._speculator = Speculator([self.proposer], Controller(step_s, most), VOCAB)

    def propose(self, limit: int) -> tuple[list[int], list[int]]:
        """See `Contender`."""
        self._view.room = limit + 1
        tree = self._speculator.grow([self._view], rows=1, spare=limit).get(self._view.arrival)
        return (tree.tokens, tree.parents) if tree else ([], [])

    def end(self) -> None:
        """See `Contender`."""
        super().end()
        self._speculator.forget(self._view.arrival)


def suffix() -> Fixed:
    """Suffix decoding over the request and what was answered before."""
    return Fixed(SuffixProposer(History(64 << 20)))


def lookup() -> Fixed:
    """Plain prompt lookup."""
    return Fixed(PromptLookup())
