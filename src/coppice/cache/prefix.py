"""A radix tree over page-aligned token runs: which pages already hold a prompt's prefix.

One node is one full page of committed tokens under one scope (adapter, tenant salt); the
tree holds one reference to its page. KV is a function of the tokens before it, bit for bit,
so a sequence that computed a page the tree already has is given the tree's copy. Hence a
sequence's sealed pages are always the tree's own, a node in use is never evicted, and a
sequence may keep its node as a cursor.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from coppice.cache.pages import PageAllocator

Key = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Node:
    """One full page of tokens after its parent's; the root of a scope has page -1.

    ``mark`` is its keeper's (`coppice.cache.marks`).
    """

    key: Key
    page: int
    parent: Node | None
    children: dict[Key, Node] = field(default_factory=dict)
    scope: str = ""
    mark: bytes = b""
    last_use: int = 0
    queued: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """What the tree holds of a token run.

    Attributes:
        node: where the match ends; later pages are sealed under it.
        pages: full pages, in order; the caller retains those it uses.
        tail_page: a page whose first ``tail_tokens`` tokens match too, to be copied.
        tail_tokens: 0 when there is no such page.
    """

    node: Node
    pages: list[int]
    tail_page: int = -1
    tail_tokens: int = 0


class PageKeeper(Protocol):
    """Whoever keeps pages beyond the tree's own time."""

    def sealed(self, node: Node) -> None:
        """A page has become part of the tree."""
        ...

    def evicted(self, node: Node) -> None:
        """A page is about to leave the tree; its bytes are still there."""
        ...


class PrefixTree:
    """Finds, keeps and evicts shared prefix pages.

    Args:
        allocator: owns the reference counts.
        page_size: tokens a page.
        keeper: told of every page that comes and goes.
    """

    def __init__(
        self, allocator: PageAllocator, page_size: int, keeper: PageKeeper | None = None
    ) -> None:
        self._allocator = allocator
        self._keeper = keeper
        self._page_size = page_size
        self.revoke: Callable[[], Iterator[int]] = _nothing
        """Unpins pages, one at each ``next``, for when only pinned ones are left."""
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._queue: list[tuple[int, int, Node]] = []
        self._pushes = 0

    def match(self, tokens: Sequence[int], scope: str = "") -> Match:
        """Longest cached prefix of ``tokens``, marked as just used."""
        node = self._roots.get(scope)
        if node is None:  # registered by the first page sealed under it, not by a look-up
            return Match(Node((), -1, None, scope=scope), [])
        self._clock += 1
        pages: list[int] = []
        size = self._page_size
        at = 0
        while at + size <= len(tokens):
            child = node.children.get(tuple(tokens[at : at + size]))
            if child is None:
                break
            child.last_use = self._clock
            pages.append(child.page)
            node = child
            at += size
        tail, shared = _longest_shared(node, tokens[at : at + size])
        return Match(node, pages, tail, shared)

    def seal(self, parent: Node, tokens: Sequence[int], page: int) -> Node:
        """Offer one full, committed page after ``parent``; the node to go on from.

        Args:
            parent: the node of the page before, or of the match this one follows.
            tokens: the page's ``page_size`` tokens.
            page: held by the caller. When the tree already has this run, the caller's
                reference moves to the tree's page: read it from ``node.page``.
        """
        self._clock += 1
        if parent.parent is None:
            parent = self._roots.setdefault(parent.scope, parent)
        key = tuple(tokens)
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, page, parent)
            self._allocator.adopt(page)
            self._enqueue(node)
            if self._keeper is not None:
                self._keeper.sealed(node)
        elif node.page != page:
            self._allocator.retain(node.page)
            self._allocator.release(page)
        node.last_use = self._clock
        return node

    def evict(self, num_pages: int) -> int:
        """Free up to ``num_pages`` pages nobody else holds, least recently used leaves first.

        Pinned ones go after all others, in the order in which they are revoked.

        Returns:
            How many became free.
        """
        freed = 0
        in_use: list[Node] = []
        revoked = self.revoke()
        while freed < num_pages:
            if not self._queue:
                if next(revoked, None) is None:
                    break
                continue
            last_use, _, node = heapq.heappop(self._queue)
            node.queued = False
            if node.children or self._allocator.is_pinned(node.page):
                continue
            if node.last_use != last_use:
                self._enqueue(node)
            elif self._allocator.refs(node.page) > 1:
                in_use.append(node)
            else:
                self._remove(node)
                freed += 1
        for node in in_use:
            self._enqueue(node)
        return freed

    def offer(self, node: Node) -> None:
        """A page is no longer pinned: it may be evicted like any other."""
        if not node.children:
            self._enqueue(node)

    def forget(self, node: Node) -> None:
        """What nobody holds of the path to ``node`` goes before all others."""
        for each in path(node):
            if self._allocator.refs(each.page) == 1:
                each.last_use = 0

    def nodes(self) -> Iterator[Node]:
        """Every page's node, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.page >= 0:
                yield node
            stack.extend(node.children.values())

    def pages(self) -> Iterator[int]:
        """Every page the tree holds, once."""
        return (node.page for node in self.nodes())

    def _enqueue(self, node: Node) -> None:
        if not node.queued:
            node.queued = True
            self._pushes += 1
            heapq.heappush(self._queue, (node.last_use, self._pushes, node))

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        if self._keeper is not None:
            self._keeper.evicted(node)
        del parent.children[node.key]
        self._allocator.evict(node.page)
        if parent.children:
            return
        if parent.parent is None:
            del self._roots[parent.scope]
        else:
            self._enqueue(parent)


def path(node: Node) -> Iterator[Node]:
    """The pages up to ``node``, the last one first."""
    at: Node | None = node
    while at is not None and at.parent is not None:
        yield at
        at = at.parent


def _nothing() -> Iterator[int]:
    return iter(())


def _longest_shared(node: Node, rest: Sequence[int]) -> tuple[int, int]:
    """The child page sharing most leading tokens with ``rest``: ``(page, tokens)``."""
    best, most = -1, 0
    if not rest:
        return best, most
    for key, child in node.children.items():
        if key[0] != rest[0]:
            continue
        shared = 1
        for a, b in zip(key[1:], rest[1:], strict=False):
            if a != b:
                break
            shared += 1
        if shared > most:
            best, most = child.page, shared
    return best, most
