"""Suffix decoding: what followed the same tokens before, here or in earlier answers.

Oliaro et al., SuffixDecoding (2024). Occurrences of the last tokens, in the request itself
and in its tenant's history, vote for what comes next: longer matches count more, and the
votes make one tree with a chance for each path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coppice.kernels.suffix import SuffixIndex, make_index
from coppice.speculation.history import History
from coppice.speculation.interfaces import DraftView
from coppice.speculation.tree import DraftTree

LEAD = 32
"""Prompt tokens remembered before an answer, so that its first tokens can be found."""
MOST_TOKENS = 1 << 16
"""Tokens of one request that are searched: its last ones."""

SAVE_S = 300.0
"""Seconds between two savings of the history; a crash loses no more than that."""


@dataclass(slots=True)
class _Reader:
    """A request's own text; ``read`` of its tokens are in the index."""

    index: SuffixIndex
    read: int = 0


class SuffixProposer:
    """Proposes trees of what followed the last tokens before.

    Args:
        history: earlier answers; None looks at the request alone.
        clock: monotonic seconds.
    """

    name = "suffix"
    pass_s = 0.0
    branches = True

    def __init__(
        self, history: History | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.history = history
        self._clock = clock
        self._saved_s = clock()
        self._readers: dict[int, _Reader] = {}

    @property
    def size_bytes(self) -> int:
        """Memory of the history and of the requests that run."""
        own = sum(reader.index.size_bytes for reader in self._readers.values())
        return own + (0 if self.history is None else self.history.size_bytes)

    @property
    def evicted(self) -> int:
        """See `Learner`."""
        return 0 if self.history is None else self.history.evicted

    def propose(self, views: Sequence[DraftView], limits: Sequence[int]) -> list[DraftTree | None]:
        """See `Proposer`."""
        return [
            self._one(v, limit) if limit > 0 else None
            for v, limit in zip(views, limits, strict=True)
        ]

    def forget(self, arrival: int) -> None:
        """See `Proposer`."""
        self._readers.pop(arrival, None)

    def learn(self, view: DraftView, num_prompt: int) -> None:
        """See `Learner`: the answer and a little of what led to it are remembered."""
        if self.history is not None and len(view.tokens) > num_prompt:
            self.history.add(view.scope, view.tokens[max(0, num_prompt - LEAD) :])
            if self._clock() - self._saved_s > SAVE_S:
                self.close()

    def close(self) -> None:
        """See `Learner`: the history is written, where it is to be kept."""
        if self.history is not None:
            self.history.save()
        self._saved_s = self._clock()

    def _one(self, view: DraftView, limit: int) -> DraftTree | None:
        reader = self._readers.get(view.arrival)
        if reader is None or reader.read > len(view.tokens):
            reader = self._readers[view.arrival] = _Reader(make_index(MOST_TOKENS))
        reader.index.extend(view.tokens[reader.read :])
        reader.read = len(view.tokens)
        history = None if self.history is None else self.history.of(view.scope)
        tokens, parents, logf = reader.index.propose(history, limit)
        return DraftTree(self.name, tokens, parents, logf) if tokens else None
