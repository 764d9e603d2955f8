"""Brings pages of a prompt back from the tiers before the sequence's first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from coppice.cache.pages import PageAllocator
from coppice.cache.prefix import Match, PrefixTree
from coppice.cache.tiers import Tiers

STEP_S = 0.02
"""Most time of all calls before one step: rows of others wait for it."""
WAIT_S = 0.002
"""How long a call waits for a page that is being read."""


class Restorer:
    """Makes pages of a tier pages of the tree.

    Args:
        allocator: of the pool's pages.
        tree: gets them.
        tiers: have them.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        tree: PrefixTree,
        tiers: Tiers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allocator = allocator
        self._tree = tree
        self._tiers = tiers
        self._clock = clock
        self._until = clock() + STEP_S

    def begin_step(self) -> None:
        """The calls that follow are before the same step."""
        self._until = self._clock() + STEP_S

    def restore(self, match: Match, tokens: Sequence[int], page_size: int) -> bool:
        """Bring back the pages of ``tokens`` after what the tree matched.

        Returns:
            False when there is more to come: call again after the next step. What has been
            brought back is in the tree by then.
        """
        rest = tokens[len(match.pages) * page_size :]
        keys = self._tiers.chain(match.node, rest, page_size)
        node, held = match.node, list(match.pages)
        for page in held:  # making room must not evict what the new pages follow
            self._allocator.retain(page)
        done = True
        try:
            for key in keys:
                if self._clock() > self._until or self._tiers.coming(key, WAIT_S):
                    done = False
                    break
                if not self._allocator.num_free and not self._tree.evict(1):
                    break
                page = self._allocator.alloc()
                if not self._tiers.bring(key, page):
                    self._allocator.release(page)
                    break
                node = self._tree.seal(node, key.tokens, page)
                held.append(node.page)
        finally:
            for page in held:
                self._allocator.release(page)
        if done:
            self._tiers.missed(len(rest) // page_size - (len(held) - len(match.pages)))
        return done
