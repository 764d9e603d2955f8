"""Prefixes that are kept for somebody who is expected back: the last to go, never safe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from coppice.cache.pages import PageAllocator
from coppice.cache.prefix import Node, PrefixTree, path

TREE_AND_ONE = 2
"""Holders of a page that one sequence uses."""


class Pins:
    """Pins of sessions on the prefix tree.

    A pin is no hold: a pinned page counts as available, and is evicted when nothing else is
    left, the last page first of the session that `victims` names first.

    Args:
        allocator: of the tree's pages.
        tree: asks `revoke` here from now on.
    """

    def __init__(self, allocator: PageAllocator, tree: PrefixTree) -> None:
        self._allocator = allocator
        self._tree = tree
        self._ends: dict[str, Node] = {}
        self.num_revoked = 0
        """Pins taken away for want of pages, in pages."""
        self.victims: Callable[[Collection[str]], Iterable[str]] = list
        """Of these sessions, in the order in which they lose what they pinned."""
        tree.revoke = self.revoke

    def __len__(self) -> int:
        return len(self._ends)

    def pin(self, session: str, node: Node) -> int:
        """Pin all pages up to ``node``, which one sequence still holds.

        Returns:
            Pages that neither another sequence holds nor another session has pinned.
        """
        self.unpin(session)
        alone = 0
        for each in path(node):
            page = each.page
            shared = self._allocator.refs(page) > TREE_AND_ONE or self._allocator.is_pinned(page)
            alone += not shared
            self._allocator.pin(page)
            self._ends[session] = node
        return alone

    def unpin(self, session: str) -> None:
        """What nobody else pins may be evicted as any prefix may."""
        node = self._ends.pop(session, None)
        for each in () if node is None else path(node):
            self._let_go(each)

    def revoke(self) -> Iterator[int]:
        """Unpin pages one by one, for as long as somebody asks for more."""
        for session in list(self.victims(self._ends.keys())):
            node = self._ends.get(session)
            for each in () if node is None else path(node):
                before = each.parent
                if before is not None and before.parent is not None:
                    self._ends[session] = before
                else:
                    del self._ends[session]
                self._let_go(each)
                self.num_revoked += 1
                yield each.page

    def _let_go(self, node: Node) -> None:
        self._allocator.unpin(node.page)
        if not self._allocator.is_pinned(node.page):
            self._tree.offer(node)
