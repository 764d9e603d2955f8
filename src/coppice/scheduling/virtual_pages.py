"""Pages as numbers: who holds how many, and which prefixes are kept for reuse."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from coppice.scheduling.planner import pages_for

if TYPE_CHECKING:
    from coppice.scheduling.virtual import VirtualSequence

BLOCK_TOKENS = 512
"""Tokens behind one block name, as in the Mooncake traces; a multiple of the page size."""


class VirtualPages:
    """A pool with a prefix cache over block names, least recently used out first.

    A sequence's ``blocks`` name the first ``block_tokens * len(blocks)`` of its tokens; equal
    leading names are equal prefixes, as the traces define them. Blocks of paused sessions may
    be pinned: they are taken only when nothing idle is left, the last block of a session first.

    Args:
        num_pages: there are.
        page_size: tokens a page.
        block_tokens: tokens behind one name, a multiple of the page size.
    """

    def __init__(self, num_pages: int, page_size: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.num_pages = num_pages
        self._page_size = page_size
        self._block_tokens = max(page_size, block_tokens)
        self._block_pages = self._block_tokens // page_size
        self._free = num_pages
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._pins: dict[str, list[int]] = {}
        self._pinned: dict[int, int] = {}
        self._num_revocable = 0
        self.victims: Callable[[], Iterable[str]] = self._pins.copy
        """Sessions in the order in which they lose what they pinned."""
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def num_available(self) -> int:
        """Pages free now or after evicting kept prefixes, pinned ones included."""
        return self._free + self.num_kept + len(self._idle) * self._block_pages

    @property
    def num_kept(self) -> int:
        """Pages only pins hold."""
        return self._num_revocable * self._block_pages

    @property
    def num_used(self) -> int:
        """Pages sequences hold."""
        return self.num_pages - self.num_available

    def attach(self, sequence: VirtualSequence, *, use_cache: bool) -> bool:
        """Take the kept prefix and pages for the whole length; False, with nothing held."""
        held: list[int] = []
        if use_cache:
            for name in sequence.blocks:
                if (
                    not self._knows(name)
                    or (len(held) + 1) * self._block_tokens >= sequence.num_tokens
                ):
                    break
                held.append(name)
                self._retain(name)
        sequence.held = held
        sequence.num_pages = len(held) * self._block_pages
        sequence.num_computed = len(held) * self._block_tokens
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
            self._revoke(missing)
        if self._free < missing:
            return False
        self._free -= missing
        sequence.num_pages += missing
        return True

    def share(self, sequence: VirtualSequence) -> None:
        """Name the blocks that are computed by now, so that others find them."""
        held = sequence.held
        whole = min(len(sequence.blocks), sequence.num_computed // self._block_tokens)
        for name in sequence.blocks[len(held) : whole]:
            if self._knows(name):  # computed twice: keep the first
                self._free += self._block_pages
            self._retain(name)
            held.append(name)

    def release(self, sequence: VirtualSequence) -> None:
        """Give all back; named blocks nobody else holds stay findable, the first longest."""
        for name in reversed(sequence.held):
            self._users[name] -= 1
            if self._users[name]:
                continue
            del self._users[name]
            if name in self._pinned:
                self._num_revocable += 1
            else:
                self._idle[name] = None
        self._free += sequence.num_pages - len(sequence.held) * self._block_pages
        sequence.held = []
        sequence.num_pages = 0
        sequence.num_computed = 0

    def pin(self, session: str, sequence: VirtualSequence) -> int:
        """Keep a sequence's named blocks for its session; pages nobody else has a use for."""
        self.unpin(session)
        names = self._pins[session] = list(sequence.held)
        alone = 0
        for name in names:
            alone += name not in self._pinned and self._users[name] == 1
            self._pinned[name] = self._pinned.get(name, 0) + 1
        return alone * self._block_pages

    def unpin(self, session: str) -> None:
        """Stop keeping; what nobody holds stays findable as any idle block."""
        for name in reversed(self._pins.pop(session, [])):
            if self._let_go(name):
                self._idle[name] = None

    def drop(self, sequence: VirtualSequence) -> None:
        """Give all back and forget the blocks nobody else holds."""
        names = list(sequence.held)
        self.release(sequence)
        for name in names:
            if name in self._idle:
                del self._idle[name]
                self._free += self._block_pages

    def check(self, holders: Iterable[VirtualSequence]) -> None:
        """Raise `AssertionError` where pages were lost or made up; ``holders`` have them all."""
        users: Counter[int] = Counter()
        own = 0
        for sequence in holders:
            users.update(sequence.held)
            own += sequence.num_pages - len(sequence.held) * self._block_pages
        blocks = (len(users) + len(self._idle) + self._num_revocable) * self._block_pages
        assert users == self._users, "a block is held by nobody, or by one that does not know"
        assert self._free >= 0
        assert self._free + blocks + own == self.num_pages
        assert self._num_revocable == sum(name not in self._users for name in self._pinned)
        assert Counter(n for names in self._pins.values() for n in names) == self._pinned
        assert not self._pinned.keys() & self._idle.keys()

    def _revoke(self, missing: int) -> None:
        for session in self.victims():
            names = self._pins.get(session, [])
            while names and self._free < missing:
                if self._let_go(names.pop()):
                    self._free += self._block_pages
            if self._free >= missing:
                return

    def _let_go(self, name: int) -> bool:
        """One pin less; whether nobody holds the block any more."""
        self._pinned[name] -= 1
        if self._pinned[name]:
            return False
        del self._pinned[name]
        if name in self._users:
            return False
        self._num_revocable -= 1
        return True

    def _knows(self, name: int) -> bool:
        return name in self._users or name in self._idle or name in self._pinned

    def _retain(self, name: int) -> None:
        self._idle.pop(name, None)
        if name in self._pinned and name not in self._users:
            self._num_revocable -= 1
        self._users[name] = self._users.get(name, 0) + 1
