"""Pinned prefixes: evicted last, a session's end first, and never out of reach."""

from __future__ import annotations

import random

import pytest

from coppice.cache import Node, PageAllocator, PrefixTree
from coppice.cache.pins import Pins

PAGE = 4


class Cache:
    def __init__(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.tree = PrefixTree(self.allocator, PAGE)
        self.pins = Pins(self.allocator, self.tree)

    def compute(self, tokens: list[int]) -> tuple[Node, list[int]]:
        """What a sequence does: match, take pages, seal."""
        match = self.tree.match(tokens)
        pages, node = list(match.pages), match.node
        for page in pages:
            self.allocator.retain(page)
        for at in range(len(pages) * PAGE, len(tokens), PAGE):
            if not self.allocator.num_free:
                assert self.tree.evict(1) == 1
            pages.append(self.allocator.alloc())
            node = self.tree.seal(node, tokens[at : at + PAGE], pages[-1])
        return node, pages

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.allocator.release(page)

    def cached(self, tokens: list[int]) -> int:
        return len(self.tree.match(tokens).pages)

    def check(self, *held: list[int]) -> None:
        self.allocator.check([*self.tree.pages(), *(page for pages in held for page in pages)])


def tokens(start: int, pages: int) -> list[int]:
    return [start * 1000 + i for i in range(pages * PAGE)]


def keep(cache: Cache, session: str, run: list[int]) -> int:
    node, pages = cache.compute(run)
    alone = cache.pins.pin(session, node)
    cache.release(pages)
    return alone


def test_pinned_pages_outlive_those_used_later() -> None:
    cache = Cache(10)
    assert keep(cache, "s", tokens(1, 4)) == 4
    for other in range(2, 9):
        cache.release(cache.compute(tokens(other, 3))[1])
        cache.check()
    assert cache.cached(tokens(1, 4)) == 4
    assert cache.allocator.num_kept == 4
    assert cache.allocator.num_available == 10


def test_they_are_revoked_from_the_end_when_nothing_else_is_left() -> None:
    cache = Cache(10)
    keep(cache, "first", tokens(1, 3))
    keep(cache, "second", tokens(2, 4))
    cache.pins.victims = lambda pinned: sorted(pinned, reverse=True)
    _, pages = cache.compute(tokens(3, 6))
    cache.check(pages)
    assert cache.cached(tokens(1, 3)) == 3
    assert cache.cached(tokens(2, 4)) == 1
    assert cache.allocator.num_kept == 4
    assert cache.pins.num_revoked == 3
    cache.release(pages)
    _, pages = cache.compute(tokens(4, 10))
    assert len(cache.pins) == cache.allocator.num_kept == 0
    cache.check(pages)


def test_a_prefix_two_sessions_pinned_stays_with_either() -> None:
    cache = Cache(10)
    shared = tokens(1, 2)
    assert keep(cache, "one", [*shared, *tokens(2, 1)]) == 3
    assert keep(cache, "two", [*shared, *tokens(3, 1)]) == 1
    assert cache.allocator.num_kept == 4
    cache.pins.unpin("one")
    assert cache.allocator.num_kept == 3
    cache.pins.unpin("one")
    cache.pins.unpin("stranger")
    cache.pins.unpin("two")
    assert cache.allocator.num_kept == 0
    assert cache.tree.evict(10) == 4
    cache.check()


def test_forgotten_pages_go_first() -> None:
    cache = Cache(10)
    cache.release(cache.compute(tokens(1, 3))[1])
    node, pages = cache.compute(tokens(2, 3))
    cache.release(pages)
    cache.tree.forget(node)
    assert cache.tree.evict(3) == 3
    assert cache.cached(tokens(1, 3)) == 3
    assert cache.cached(tokens(2, 3)) == 0


def test_what_a_sequence_holds_is_never_evicted_by_revoking() -> None:
    cache = Cache(6)
    node, held = cache.compute(tokens(1, 4))
    cache.pins.pin("s", node)
    assert cache.tree.evict(6) == 0
    assert len(cache.pins) == 0, "it had nothing to give, and lost its pin all the same"
    cache.check(held)
    cache.release(held)
    assert cache.tree.evict(6) == 4


@pytest.mark.parametrize("seed", range(8))
def test_random_pins_lose_no_page(seed: int) -> None:
    rng = random.Random(seed)
    cache = Cache(24)
    running: list[list[int]] = []
    for _ in range(400):
        match rng.randrange(5):
            case 0 | 1 if cache.allocator.num_available >= 6:
                run = [rng.randrange(3) for _ in range(PAGE * rng.randint(1, 6))]
                node, pages = cache.compute(run)
                if rng.random() < 0.7:
                    cache.pins.pin(f"s{rng.randrange(6)}", node)
                running.append(pages)
            case 2 if running:
                cache.release(running.pop(rng.randrange(len(running))))
            case 3:
                cache.pins.unpin(f"s{rng.randrange(6)}")
            case 4:
                cache.tree.evict(rng.randint(1, 4))
        cache.check(*running)
    for pages in running:
        cache.release(pages)
    cache.tree.evict(24)
    assert cache.allocator.num_free == 24
    assert cache.allocator.num_kept == len(cache.pins) == 0
