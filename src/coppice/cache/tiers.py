"""Where sealed pages go when the pool has no room for them, and how they come back.

    pool  --evicted-->  RAM  --made room-->  disk        bytes for bytes, so nothing changes
    pool  --sealed----------------------->  disk        behind the steps, on a thread
    pool  <--brought back, in order, before a prompt's first step--  RAM, disk

A page goes to disk as soon as it is sealed, so that it outlives an engine that dies; the RAM
tier holds only pages the pool has given up.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

from coppice.cache.disk import DiskTier
from coppice.cache.marks import Marks, PageKey
from coppice.cache.prefix import Node
from coppice.cache.ram import PageBytes, RamTier


class PageStore(Protocol):
    """What tiers need of the pool."""

    def read_page(self, page: int) -> PageBytes:
        """A copy of every byte of a page."""
        ...

    def write_page(self, page: int, data: PageBytes) -> None:
        """Fill a page with what `read_page` gave."""
        ...


class Tiers:
    """RAM and disk behind the prefix tree; implements `coppice.cache.prefix.PageKeeper`.

    Args:
        pool: the pages' bytes.
        marks: names pages.
        ram: None keeps none in memory.
        disk: None keeps none on disk.
    """

    def __init__(
        self, pool: PageStore, marks: Marks, *, ram: RamTier | None, disk: DiskTier | None
    ) -> None:
        self._pool = pool
        self._marks = marks
        self.ram = ram
        self.disk = disk
        self.hits = {"ram": 0, "disk": 0}
        self.misses = {"ram": 0, "disk": 0}
        """Pages brought back, and looked for in vain, by tier."""

    # -- pages leave -----------------------------------------------------------------------

    def sealed(self, node: Node) -> None:
        """See `PageKeeper`."""
        if self.disk is not None and self.disk.wants(key := self._key(node)):
            self.disk.put(key, self._pool.read_page(node.page))

    def evicted(self, node: Node) -> None:
        """See `PageKeeper`."""
        key = self._key(node)
        if self.ram is not None:
            for other, data in self.ram.put(key, self._pool.read_page(node.page)):
                if self.disk is not None:
                    self.disk.put(other, data)
        elif self.disk is not None and self.disk.wants(key):
            self.disk.put(key, self._pool.read_page(node.page))

    def close(self, nodes: Iterator[Node], timeout_s: float) -> None:
        """Write what is not on disk yet, ``nodes`` of the tree first, and stop.

        Args:
            nodes: those whose pages are in the pool, parents before children.
            timeout_s: for all of it.
        """
        if self.disk is None:
            return
        if self.disk.why_off:
            self.disk.close()
            return
        deadline = time.monotonic() + timeout_s
        disk = self.disk
        pooled = ((node, key) for node in nodes if (key := self._key(node)) not in disk)
        pages = ((key, self._pool.read_page(node.page)) for node, key in pooled)
        for key, data in itertools.chain(pages, self.ram or ()):
            if not disk.put(key, data, timeout_s=max(0.0, deadline - time.monotonic())):
                break
        self.disk.flush(max(0.0, deadline - time.monotonic()))
        self.disk.close(max(0.05, deadline - time.monotonic()))

    # -- pages come back -------------------------------------------------------------------

    def chain(self, node: Node, tokens: Sequence[int], page_size: int) -> list[PageKey]:
        """The pages of ``tokens`` after ``node`` that some tier has, in order, being read ahead."""
        found: list[PageKey] = []
        parent = self._mark(node)
        for at in range(0, len(tokens) - page_size + 1, page_size):
            key = self._marks.child(parent, tokens[at : at + page_size])
            if not (self._in_ram(key) or (self.disk is not None and key in self.disk)):
                break
            found.append(key)
            parent = key.mark
        # Backwards, so that room made in RAM meanwhile is not made of what is needed first.
        missing = [key for key in reversed(found) if not self._in_ram(key)]
        if self.disk is not None:
            self.disk.ask(missing[::-1])
        return found

    def coming(self, key: PageKey, wait_s: float) -> bool:
        """Whether a page of a `chain` is still being read; waits for it a little."""
        if self.disk is None or self._in_ram(key):
            return False
        return self.disk.reading(key, wait_s)

    def bring(self, key: PageKey, page: int) -> bool:
        """Fill a page of the pool; False when no tier has it after all."""
        fill = partial(self._pool.write_page, page)
        if self.ram is not None and (data := self.ram.take(key)) is not None:
            fill(data)
            self.hits["ram"] += 1
            return True
        if self.disk is None or not self.disk.take(key, fill):
            return False
        self.hits["disk"] += 1
        self.misses["ram"] += 1
        return True

    def missed(self, num_pages: int) -> None:
        """Count pages that have to be computed."""
        for tier in self.misses:
            self.misses[tier] += num_pages

    def _in_ram(self, key: PageKey) -> bool:
        return self.ram is not None and self.ram.touch(key)

    def _key(self, node: Node) -> PageKey:
        assert node.parent is not None
        key = self._marks.child(self._mark(node.parent), node.key)
        node.mark = key.mark
        return key

    def _mark(self, node: Node) -> bytes:
        """A node's mark, worked out once; a long prompt may have thousands above it."""
        unmarked, at = [], node
        while not at.mark and at.parent is not None:
            unmarked.append(at)
            at = at.parent
        if not at.mark:
            at.mark = self._marks.root(at.scope)
        for each in reversed(unmarked):
            self._key(each)
        return node.mark
