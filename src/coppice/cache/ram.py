"""Evicted pages kept in memory outside the pool: bytes for bytes, least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from coppice.cache.marks import PageKey

PageBytes = NDArray[np.uint8]


class RamTier:
    """Pages by mark, within a bound.

    Args:
        bound_bytes: most bytes of pages; what does not fit is not kept.
    """

    def __init__(self, bound_bytes: int) -> None:
        self._bound_bytes = bound_bytes
        self._pages: OrderedDict[bytes, tuple[PageKey, PageBytes]] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: PageKey) -> bool:
        found = self._pages.get(key.mark)
        return found is not None and found[0] == key

    def __iter__(self) -> Iterator[tuple[PageKey, PageBytes]]:
        return iter(self._pages.values())

    def put(self, key: PageKey, data: PageBytes) -> list[tuple[PageKey, PageBytes]]:
        """Keep a page that nobody will write to any more; what made room for it."""
        self.take(key)
        self._pages[key.mark] = key, data
        self.size_bytes += data.nbytes
        gone = []
        while self.size_bytes > self._bound_bytes:
            _, (other, old) = self._pages.popitem(last=False)
            self.size_bytes -= old.nbytes
            gone.append((other, old))
        return gone

    def touch(self, key: PageKey) -> bool:
        """Mark a page as just used; whether it is there."""
        if key not in self:
            return False
        self._pages.move_to_end(key.mark)
        return True

    def take(self, key: PageKey) -> PageBytes | None:
        """Remove a page and give it; it comes back when the pool evicts it again."""
        if key not in self:
            return None
        _, data = self._pages.pop(key.mark)
        self.size_bytes -= data.nbytes
        return data
