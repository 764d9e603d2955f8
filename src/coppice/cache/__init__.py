"""The KV cache: fixed-size pages, reference counts and a prefix tree.

Owns which page holds what and who may read it; refuses to know about requests or models.
Invariant: every page is free, or held exactly as often as its count says
(`PageAllocator.check`).
"""

from coppice.cache.pages import OutOfPagesError, PageAllocator
from coppice.cache.prefix import Match, Node, PrefixTree

__all__ = ["Match", "Node", "OutOfPagesError", "PageAllocator", "PrefixTree"]
