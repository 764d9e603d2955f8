"""Reference-counted pages. Pure bookkeeping: no tensor is touched here."""

from __future__ import annotations

from collections.abc import Iterable

from coppice.errors import EngineError


class OutOfPagesError(EngineError):
    """No free page is left. Handled by the engine: it evicts, then preempts."""

    code = "out_of_pages"


class PageAllocator:
    """Hands out page ids ``0 .. num_pages - 1`` and counts who holds each.

    Args:
        num_pages: how many pages exist.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_idle = 0
        """Pages whose only holder is the prefix tree: one eviction away from free."""
        self.num_kept = 0
        """Idle pages that are pinned: to be evicted last."""
        self._refs = [0] * num_pages
        self._pins = [0] * num_pages
        self._cached = [False] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages free now or after eviction."""
        return len(self._free) + self.num_idle

    @property
    def free(self) -> list[int]:
        """Pages nobody holds, ascending."""
        return sorted(self._free)

    def refs(self, page: int) -> int:
        """How many hold ``page``."""
        return self._refs[page]

    def alloc(self) -> int:
        """One page with a count of 1.

        Raises:
            OutOfPagesError: none is free.
        """
        if not self._free:
            raise OutOfPagesError("No KV page is free; evict cached prefixes or preempt.")
        page = self._free.pop()
        self._refs[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One more holder of a page that is already held."""
        count = self._refs[page]
        if count <= 0:
            raise EngineError(f"page {page} retained while free: a bug in the cache's owner.")
        self._refs[page] = count + 1
        if count == 1 and self._cached[page]:
            self.num_idle -= 1
            self.num_kept -= self._pins[page] > 0

    def release(self, page: int) -> None:
        """One holder less; the last one frees the page."""
        count = self._refs[page] - 1
        if count < 0:
            raise EngineError(f"page {page} released twice: a bug in the cache's owner.")
        self._refs[page] = count
        if count == 0:
            self._free.append(page)
        elif count == 1 and self._cached[page]:
            self.num_idle += 1
            self.num_kept += self._pins[page] > 0

    def adopt(self, page: int) -> None:
        """The prefix tree becomes one more holder of a page someone holds."""
        self.retain(page)
        self._cached[page] = True

    def is_pinned(self, page: int) -> bool:
        """Whether somebody wants it evicted last."""
        return self._pins[page] > 0

    def pin(self, page: int) -> None:
        """One more who wants a page of the prefix tree evicted last."""
        self._pins[page] += 1
        if self._pins[page] == 1 and self._refs[page] == 1:
            self.num_kept += 1

    def unpin(self, page: int) -> None:
        """One less."""
        self._pins[page] -= 1
        if self._pins[page] == 0 and self._refs[page] == 1:
            self.num_kept -= 1

    def evict(self, page: int) -> None:
        """The prefix tree lets go of a page."""
        if self._refs[page] == 1:
            self.num_idle -= 1
        self._cached[page] = False
        self.release(page)

    def check(self, holders: Iterable[int]) -> None:
        """Verify conservation against the page ids of all holders, with repetition.

        Raises:
            EngineError: a page is lost, leaked or held a wrong number of times.
        """
        counts = [0] * self.num_pages
        for page in holders:
            counts[page] += 1
        wrong = [p for p in range(self.num_pages) if counts[p] != self._refs[p]]
        idle = sum(c == 1 and cached for c, cached in zip(counts, self._cached, strict=True))
        kept = sum(c == 1 and pins > 0 for c, pins in zip(counts, self._pins, strict=True))
        unheld = [p for p in range(self.num_pages) if counts[p] == 0]
        counted = (idle, kept) == (self.num_idle, self.num_kept)
        if wrong or sorted(self._free) != unheld or not counted:
            raise EngineError(f"KV pages are not conserved: wrong counts at pages {wrong[:8]}.")
