"""The suffix index: native where it was built, Python elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from coppice.kernels import Backend

BYTES_PER_TOKEN = 76
"""Of a full native index: the token, and on each of nine levels a table entry and a link."""
LAST = 0xFFFF_FFF0
"""Positions a native index counts before it numbers its tokens anew."""


class SuffixIndex(Protocol):
    """A text and where its tokens were seen before.

    Of the trie of all n-grams only some levels are kept; a node of a level is found by the
    hash of its path and knows its occurrences, newest first. Oliaro et al., SuffixDecoding
    (2024) keep counts in a trie of all depths instead: there one token costs an update a depth
    and forgetting a text visits all its suffixes; here both cost one entry a level.
    """

    def __len__(self) -> int:
        """Tokens held, borders between texts included."""
        ...

    @property
    def size_bytes(self) -> int:
        """Memory taken."""
        ...

    def extend(self, tokens: Sequence[int], /) -> None:
        """Append to the current text; a full index forgets its oldest tokens."""
        ...

    def end_text(self) -> None:
        """What follows is another text: no match reaches over the border."""
        ...

    def tokens(self) -> list[int]:
        """All tokens held, oldest first; -1 stands between texts."""
        ...

    def propose(self, history: Self | None, limit: int) -> tuple[list[int], list[int], list[float]]:
        """What may follow the current text, by its own past and a history's.

        Args:
            history: another index of the same kind, or None.
            limit: most nodes.

        Returns:
            Tokens, parents (-1 for the root) and estimated log chances of the paths, best first.
        """
        ...


def make_index(
    most_tokens: int, *, backend: Backend | None = None, last: int = LAST
) -> SuffixIndex:
    """An empty index.

    Args:
        most_tokens: tokens it may hold; rounded down to a power of two, at least 64.
        backend: by default native where it was built.
        last: for tests: where the native one begins to count anew.
    """
    from coppice.kernels.sampling import native_module

    most = 1 << max(6, most_tokens.bit_length() - 1)
    native = None if backend == "reference" else native_module()
    if native is not None and hasattr(native, "SuffixIndex"):
        index: SuffixIndex = native.SuffixIndex(most, last)
        return index
    from coppice.kernels.suffix_reference import SuffixIndex as Reference

    return Reference(most)
