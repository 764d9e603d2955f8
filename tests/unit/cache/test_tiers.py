"""Pages that leave the pool for RAM, and come back, by name."""

from __future__ import annotations

import numpy as np
import pytest

from coppice.cache import PageAllocator, PrefixTree
from coppice.cache.marks import SECRET_BYTES, Marks
from coppice.cache.prefix import Node
from coppice.cache.ram import PageBytes, RamTier
from coppice.cache.tiers import Tiers

PAGE_BYTES = 64


class Store:
    """Pages of nothing."""

    def read_page(self, page: int) -> PageBytes:
        return np.full(PAGE_BYTES, page % 251, np.uint8)

    def write_page(self, page: int, data: PageBytes) -> None:
        pass


def filled(num_pages: int, *, room: int) -> tuple[PrefixTree, Tiers, Node]:
    """A tree with one prompt of so many one-token pages, a RAM tier with room, and its leaf."""
    allocator = PageAllocator(num_pages + 1)
    marks = Marks(bytes(SECRET_BYTES), b"")
    tiers = Tiers(Store(), marks, ram=RamTier(room * PAGE_BYTES), disk=None)
    tree = PrefixTree(allocator, 1, tiers)
    node = tree.match([], "somebody\n").node
    for token in range(num_pages):
        page = allocator.alloc()
        node = tree.seal(node, [token], page)
        allocator.release(page)
    return tree, tiers, node


def test_a_prompt_of_thousands_of_pages_is_named_all_the_way() -> None:
    tree, tiers, leaf = filled(3000, room=3000)
    assert tiers.chain(leaf, [1, 2, 3], 1) == []
    assert tree.evict(3000) == 3000
    root = tree.match([], "somebody\n").node
    assert len(tiers.chain(root, range(3000), 1)) == 3000


@pytest.mark.parametrize("more", [1, 2])
def test_room_in_ram_is_not_made_of_what_is_brought_back_first(more: int) -> None:
    tree, tiers, _ = filled(4, room=4)
    tree.evict(4)
    root = tree.match([], "somebody\n").node
    found = tiers.chain(root, range(4), 1)
    assert len(found) == 4 and tiers.ram is not None
    stranger = Marks(bytes(SECRET_BYTES), b"other")
    for token in range(more):
        tiers.ram.put(stranger.child(stranger.root(""), [token]), Store().read_page(0))
    assert [tiers.bring(key, 0) for key in found] == [True] * (4 - more) + [False] * more
