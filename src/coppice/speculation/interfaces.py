"""What a proposer sees of a sequence, and what it must do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from coppice.cache.pool import KVPool
from coppice.kernels.sampling import RowParams
from coppice.speculation.tree import DraftTree


class DraftView(Protocol):
    """The read-only side of a sequence that is about to decode.

    ``tokens`` holds committed tokens only and grows between calls; a proposer remembers how
    far it has read.
    """

    @property
    def arrival(self) -> int:
        """Unique number of the sequence."""
        ...

    @property
    def tokens(self) -> list[int]:
        """Prompt and committed tokens."""
        ...

    @property
    def room(self) -> int:
        """Tokens that may still follow."""
        ...

    @property
    def scope(self) -> str:
        """Tenant and cache salt: whose history the sequence may draw on."""
        ...

    @property
    def speculate(self) -> str:
        """Name of the only proposer wanted for it, or ``auto``."""
        ...

    @property
    def row(self) -> RowParams:
        """Its sampling parameters: seed, temperature, cuts, penalties."""
        ...


class Proposer(Protocol):
    """Grows token trees. Whatever it returns, no output changes: only time does."""

    name: str
    pass_s: float
    """Seconds it takes for one more token of every sequence; 0 where that is next to nothing."""
    branches: bool
    """Whether it makes use of more nodes than a chain would have."""

    def propose(self, views: Sequence[DraftView], limits: Sequence[int]) -> list[DraftTree | None]:
        """One tree for each view, of at most so many nodes; None for no proposal."""
        ...

    def forget(self, arrival: int) -> None:
        """The sequence has ended or lost its pages; unknown numbers are no error."""
        ...


@runtime_checkable
class Priced(Protocol):
    """A proposer whose passes cost more the more sequences are in them."""

    def price(self, sequences: int) -> float:
        """`Proposer.pass_s` for so many sequences; 0 while nothing is known."""
        ...


class TargetPages(Protocol):
    """The target's KV pages, for a proposer that drafts in them.

    Of a sequence that is about to decode all tokens but the last are in its pages. What is
    written behind them counts for nothing: the step overwrites it before it reads it, and
    only pages full of what a step wrote are ever shared or kept.
    """

    @property
    def pool(self) -> KVPool:
        """Where the pages are."""
        ...

    def reserve(self, view: DraftView, num_tokens: int) -> Sequence[int] | None:
        """A sequence's pages, enough for so many tokens; None where there are not as many."""
        ...


@runtime_checkable
class Sharer(Protocol):
    """A proposer that drafts in the target's own KV pages."""

    def share(self, pages: TargetPages) -> None:
        """These they are; called before anything is proposed."""
        ...


@runtime_checkable
class Learner(Protocol):
    """A proposer that remembers answers for later requests."""

    @property
    def size_bytes(self) -> int:
        """Memory it takes."""
        ...

    @property
    def evicted(self) -> int:
        """Scopes dropped so far to make room for others."""
        ...

    def learn(self, view: DraftView, num_prompt: int) -> None:
        """An answer is complete: what stands after the first ``num_prompt`` tokens."""
        ...

    def close(self) -> None:
        """The engine ends: keep what is to be kept."""
        ...
