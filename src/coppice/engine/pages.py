"""A sequence's pages: attach a cached prefix, grow, seal, release."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from coppice.cache import Match, PageAllocator, PrefixTree
from coppice.cache.pins import Pins
from coppice.cache.pool import KVPool
from coppice.cache.restore import Restorer
from coppice.cache.tiers import Tiers
from coppice.engine.sequence import Sequence

Attached = Literal["held", "coming", "full"]
FLUSH_S = 0.8
"""How long a stop may write pages to disk: an engine whose front end died is gone within 1 s."""


class SequencePages:
    """The page operations of the step, over one pool.

    Args:
        pool: the storage.
        prefix_cache: keep finished and shared prefixes for reuse.
        tiers: where prefixes go that the pool has no room for, and come back from.
    """

    def __init__(
        self, pool: KVPool, *, prefix_cache: bool = True, tiers: Tiers | None = None
    ) -> None:
        self._pool = pool
        self._page_size = pool.layout.page_size
        self._prefix_cache = prefix_cache
        self.num_pages = pool.num_pages
        self.allocator = PageAllocator(pool.num_pages)
        self.tree = PrefixTree(self.allocator, self._page_size, tiers)
        self.pins = Pins(self.allocator, self.tree)
        self.tiers = tiers
        self._restorer = None if tiers is None else Restorer(self.allocator, self.tree, tiers)
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def num_kept(self) -> int:
        """See `coppice.scheduling.sessions.PinnedPages`."""
        return self.allocator.num_kept

    def begin_step(self) -> None:
        """The sequences attached from now on have their pages brought back before one step."""
        if self._restorer is not None:
            self._restorer.begin_step()

    def attach(self, sequence: Sequence) -> Attached:
        """Take what the prefix tree has of the sequence and pages for its whole length.

        The last token is always left to compute: its logits are wanted.

        Returns:
            ``full`` when there are not enough pages, ``coming`` while a tier still brings
            some; nothing is held then.
        """
        known = len(sequence.tokens) - 1
        if self._prefix_cache:
            match = self._match(sequence.tokens[:known], sequence.request.cache_salt)
            if match is None:
                return "coming"
            sequence.pages = list(match.pages)
            sequence.node = match.node
            sequence.num_sealed = len(match.pages)
            for page in match.pages:
                self.allocator.retain(page)
            sequence.num_computed = len(match.pages) * self._page_size
            if match.tail_tokens:
                self._copy_tail(sequence, match.tail_page, match.tail_tokens)
            if not self.grow(sequence, len(sequence.tokens)):
                self.release(sequence)
                return "full"
            self.queried_tokens += known
            self.hit_tokens += sequence.num_computed
            return "held"
        if not self.grow(sequence, len(sequence.tokens)):
            self.release(sequence)
            return "full"
        return "held"

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence pages for ``num_tokens``, evicting cached prefixes if need be."""
        missing = -(-num_tokens // self._page_size) - len(sequence.pages)
        if missing <= 0:
            return True
        short = missing - self.allocator.num_free
        if short > 0 and self.tree.evict(short) < short:
            return False
        sequence.pages.extend(self.allocator.alloc() for _ in range(missing))
        return True

    def seal(self, sequence: Sequence) -> bool:
        """Offer newly full pages to the prefix tree.

        Returns:
            Whether there were any: ``sequence.pages`` may have changed from ``num_sealed`` on.
        """
        size = self._page_size
        first = sequence.num_sealed
        while sequence.node is not None and (sequence.num_sealed + 1) * size <= (
            sequence.num_computed
        ):
            i = sequence.num_sealed
            tokens = sequence.tokens[i * size : (i + 1) * size]
            sequence.node = self.tree.seal(sequence.node, tokens, sequence.pages[i])
            sequence.pages[i] = sequence.node.page
            sequence.num_sealed = i + 1
        return sequence.num_sealed > first

    def release(self, sequence: Sequence) -> None:
        """Give every page back; what is sealed stays findable in the prefix tree."""
        for page in sequence.pages:
            self.allocator.release(page)
        sequence.pages = []
        sequence.node = None
        sequence.num_sealed = 0
        sequence.num_computed = 0

    def give_back(self) -> None:
        """Let go of every prefix nobody uses, and of the memory of all free pages."""
        self.tree.evict(self.allocator.num_idle)
        self._pool.give_back(self.allocator.free)

    def pin(self, session: str, sequence: Sequence) -> int:
        """Keep what is sealed of a sequence longer than other prefixes; pages only it has."""
        return 0 if sequence.node is None else self.pins.pin(session, sequence.node)

    def unpin(self, session: str) -> None:
        """Keep it no longer than other prefixes."""
        self.pins.unpin(session)

    def drop(self, sequence: Sequence) -> None:
        """Give every page back, those nobody else holds to be evicted first."""
        node = sequence.node
        self.release(sequence)
        if node is not None:
            self.tree.forget(node)

    def close(self) -> None:
        """The last call: pages go to disk where that is wanted."""
        if self.tiers is not None:
            self.tiers.close(self.tree.nodes(), FLUSH_S)

    def check(self, running: Iterator[Sequence]) -> None:
        """Verify that every page is accounted for (`PageAllocator.check`)."""
        holders = list(self.tree.pages())
        for sequence in running:
            holders.extend(sequence.pages)
        self.allocator.check(holders)

    def _match(self, tokens: list[int], scope: str) -> Match | None:
        """What the tree has of the tokens once the tiers have given theirs; None until then."""
        match = self.tree.match(tokens, scope)
        if self._restorer is None:
            return match
        if not self._restorer.restore(match, tokens, self._page_size):
            return None
        return self.tree.match(tokens, scope)

    def _copy_tail(self, sequence: Sequence, page: int, num_tokens: int) -> None:
        """Copy-on-write of a page whose first ``num_tokens`` tokens are ours too."""
        self.allocator.retain(page)  # eviction must not take it before it is copied
        if self.grow(sequence, sequence.num_computed + num_tokens):
            self._pool.copy_page(page, sequence.pages[-1])
            sequence.num_computed += num_tokens
        self.allocator.release(page)
