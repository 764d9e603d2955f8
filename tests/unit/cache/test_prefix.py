"""Pages and prefix tree against naive models: same answers, nothing lost."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from coppice.cache import OutOfPagesError, PageAllocator, PrefixTree
from coppice.errors import EngineError

PAGE = 4


def naive_match(sealed: set[tuple[int, ...]], tokens: list[int]) -> int:
    """Longest cached prefix in tokens, by brute force over every sealed run."""
    best = 0
    for run in sealed:
        shared = 0
        for a, b in zip(run, tokens, strict=False):
            if a != b:
                break
            shared += 1
        best = max(best, shared)
    return best


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, share, grow, seal and go; every page is always accounted for."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(24)
        self.tree = PrefixTree(self.allocator, PAGE)
        self.held: list[list[int]] = []

    @rule(target=holders, tokens=st.lists(st.integers(0, 2), min_size=1, max_size=24))
    def start(self, tokens):  # type: ignore[no-untyped-def]
        match = self.tree.match(tokens)
        pages = list(match.pages)
        for page in pages:
            self.allocator.retain(page)
        self.held.append(pages)
        node, full = match.node, len(tokens) // PAGE
        need = full - len(pages)
        short = need - self.allocator.num_free
        if short > 0 and self.tree.evict(short) < short:
            self._drop(pages)
            return multiple()
        for i in range(len(pages), full):
            pages.append(self.allocator.alloc())
            node = self.tree.seal(node, tokens[i * PAGE : (i + 1) * PAGE], pages[i])
            pages[i] = node.page
        return pages

    @rule(pages=consumes(holders))
    def finish(self, pages: list[int]) -> None:
        self._drop(pages)

    @rule(n=st.integers(1, 6))
    def evict(self, n: int) -> None:
        idle = self.allocator.num_idle
        assert self.tree.evict(n) == min(n, idle)

    def _drop(self, pages: list[int]) -> None:
        self.held = [p for p in self.held if p is not pages]
        for page in pages:
            self.allocator.release(page)

    @invariant()
    def conserved(self) -> None:
        self.allocator.check([*self.tree.pages(), *(p for pages in self.held for p in pages)])


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCache = CacheMachine.TestCase


def test_match_equals_brute_force() -> None:
    rng = random.Random(7)
    allocator = PageAllocator(4000)
    tree = PrefixTree(allocator, PAGE)
    sealed: set[tuple[int, ...]] = set()
    for _ in range(400):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
        match = tree.match(tokens)
        found = len(match.pages) * PAGE + match.tail_tokens
        assert found == naive_match(sealed, tokens)
        node = match.node
        for i in range(len(match.pages), len(tokens) // PAGE):
            node = tree.seal(node, tokens[i * PAGE : (i + 1) * PAGE], allocator.alloc())
            sealed.add(tuple(tokens[: (i + 1) * PAGE]))


def test_same_run_computed_twice_is_given_one_page() -> None:
    allocator = PageAllocator(8)
    tree = PrefixTree(allocator, PAGE)
    tokens = [1, 2, 3, 4]
    first, second = tree.match(tokens), tree.match(tokens)
    a, b = allocator.alloc(), allocator.alloc()
    assert tree.seal(first.node, tokens, a).page == a
    assert tree.seal(second.node, tokens, b).page == a
    assert allocator.num_free == 7
    assert allocator.refs(a) == 3


def test_scopes_never_share() -> None:
    allocator = PageAllocator(8)
    tree = PrefixTree(allocator, PAGE)
    tokens = [1, 2, 3, 4]
    tree.seal(tree.match(tokens, "alice").node, tokens, allocator.alloc())
    assert tree.match(tokens, "alice").pages
    assert not tree.match(tokens, "bob").pages


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    allocator = PageAllocator(2)
    tree = PrefixTree(allocator, PAGE)
    runs = [[1] * PAGE, [2] * PAGE]
    for run in runs:
        page = allocator.alloc()
        tree.seal(tree.match(run).node, run, page)
        allocator.release(page)
    tree.match(runs[0])
    assert tree.evict(1) == 1
    assert tree.match(runs[0]).pages
    assert not tree.match(runs[1]).pages


def test_a_scope_leaves_nothing_behind_when_its_pages_are_gone() -> None:
    allocator = PageAllocator(4)
    tree = PrefixTree(allocator, PAGE)
    for i in range(50):
        match = tree.match([1] * PAGE, f"salt-{i}")
        page = allocator.alloc()
        tree.seal(match.node, [1] * PAGE, page)
        allocator.release(page)
        tree.evict(1)
    assert len(tree._roots) == 0


def test_allocator_refuses_double_release_and_reports_a_leak() -> None:
    allocator = PageAllocator(1)
    page = allocator.alloc()
    with pytest.raises(OutOfPagesError):
        allocator.alloc()
    with pytest.raises(EngineError):
        allocator.check([])
    allocator.release(page)
    with pytest.raises(EngineError):
        allocator.release(page)
