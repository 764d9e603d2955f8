"""Pages as numbers: who holds how many, and which prefixes are kept for reuse."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from coppice.scheduling.planner import pages_for

if TYPE_CHECKING:
    from coppice.scheduling.virtual import VirtualSequence

BLOCK_TOKENS = 512
"""Tokens behind one block name, as in the Mooncake traces; a multiple of the page size."""


class VirtualPages:
    """A pool with a prefix cache over block names, least recently used out first.

    A sequence's ``blocks`` name the first ``BLOCK_TOKENS * len(blocks)`` tokens of its prompt;
    equal leading names are equal prefixes, as the traces define them.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self._page_size = page_size
        self._block_pages = max(1, BLOCK_TOKENS // page_size)
        self._free = num_pages
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def num_available(self) -> int:
        """Pages free now or after evicting kept prefixes."""
        return self._free + len(self._idle) * self._block_pages

    @property
    def num_used(self) -> int:
        """Pages sequences hold."""
        return self.num_pages - self.num_available

    def attach(self, sequence: VirtualSequence, *, use_cache: bool) -> bool:
        """Take the kept prefix and pages for the whole length; False, with nothing held."""
        held: list[int] = []
        if use_cache:
            for name in sequence.blocks:
                known = name in self._users or name in self._idle
                if not known or (len(held) + 1) * BLOCK_TOKENS >= sequence.num_tokens:
                    break
                held.append(name)
                self._retain(name)
        sequence.held = held
        sequence.num_pages = len(held) * self._block_pages
        sequence.num_computed = len(held) * BLOCK_TOKENS
        if not self.grow(sequence, sequence.num_tokens):
            self.release(sequence)
            return False
        self.queried_tokens += sequence.num_tokens
        self.hit_tokens += sequence.num_computed
        return True

    def grow(self, sequence: VirtualSequence, num_tokens: int) -> bool:
        """Pages for so many tokens, if they are there."""
        missing = pages_for(num_tokens, self._page_size) - sequence.num_pages
        if missing <= 0:
            return True
        while self._free < missing and self._idle:
            self._idle.popitem(last=False)
            self._free += self._block_pages
        if self._free < missing:
            return False
        self._free -= missing
        sequence.num_pages += missing
        return True

    def share(self, sequence: VirtualSequence) -> None:
        """Name the blocks that are computed by now, so that others find them."""
        held = sequence.held
        whole = min(len(sequence.blocks), sequence.num_computed // BLOCK_TOKENS)
        for name in sequence.blocks[len(held) : whole]:
            if name in self._users or name in self._idle:  # computed twice: keep the first
                self._free += self._block_pages
            self._retain(name)
            held.append(name)

    def release(self, sequence: VirtualSequence) -> None:
        """Give all back; named blocks nobody else holds stay findable."""
        for name in sequence.held:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                self._idle[name] = None
        self._free += sequence.num_pages - len(sequence.held) * self._block_pages
        sequence.held = []
        sequence.num_pages = 0
        sequence.num_computed = 0

    def check(self, holders: Iterable[VirtualSequence]) -> None:
        """Raise `AssertionError` where pages were lost or made up; ``holders`` have them all."""
        users: Counter[int] = Counter()
        own = 0
        for sequence in holders:
            users.update(sequence.held)
            own += sequence.num_pages - len(sequence.held) * self._block_pages
        blocks = (len(users) + len(self._idle)) * self._block_pages
        assert users == self._users, "a block is held by nobody, or by one that does not know"
        assert self._free >= 0
        assert self._free + blocks + own == self.num_pages

    def _retain(self, name: int) -> None:
        self._idle.pop(name, None)
        self._users[name] = self._users.get(name, 0) + 1
