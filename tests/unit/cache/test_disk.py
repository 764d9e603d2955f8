"""Two prompts whose pages are read from disk at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from coppice.cache import disk as room
from coppice.cache.disk import DiskTier
from coppice.cache.marks import Marks, PageKey
from coppice.cache.segment import SegmentForm
from coppice.cache.segments import SegmentStore

FORM = SegmentForm(b"f" * 32, page_size=1, page_bytes=1000, slots=8)
MARKS = Marks(b"s" * 32, b"model")


def chain(tenant: str, length: int) -> list[PageKey]:
    keys, parent = [], MARKS.root(tenant)
    for token in range(length):
        keys.append(MARKS.child(parent, [token]))
        parent = keys[-1].mark
    return keys


def wait(for_it: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not for_it():
        assert time.monotonic() < end
        time.sleep(0.001)


def taken(tier: DiskTier, keys: Sequence[PageKey]) -> int:
    return sum(tier.take(key, lambda _: None) for key in keys)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The tier's clock: it goes when a test says so."""
    clock = [100.0]
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: list[float]) -> DiskTier:
    del now
    monkeypatch.setattr(room, "STAGED_BYTES", 4 * FORM.page_bytes)
    store = SegmentStore(tmp_path, FORM, bound_bytes=1 << 20, max_age_s=60.0)
    tier = DiskTier(lambda: store, FORM.page_bytes)
    for tenant in "ab":
        for key in chain(tenant, 4):
            assert tier.put(key, np.zeros(1000, np.uint8), timeout_s=5.0)
    assert tier.flush(5.0)
    return tier


def test_the_second_prompt_waits_for_the_first_and_takes_nothing_from_it(tier: DiskTier) -> None:
    first, second = chain("a", 4), chain("b", 4)
    tier.ask(first)
    wait(lambda: not tier.reading(first[-1], 0.01))
    tier.ask(second)
    assert tier.reading(second[0], 0.0), "it is in the store, so it is worth waiting for"
    assert taken(tier, first) == 4
    tier.ask(second)
    wait(lambda: not tier.reading(second[-1], 0.01))
    assert taken(tier, second) == 4
    tier.close()


def test_what_nobody_takes_makes_room(tier: DiskTier, now: list[float]) -> None:
    first, second = chain("a", 4), chain("b", 4)
    tier.ask(first)
    wait(lambda: not tier.reading(first[-1], 0.01))
    assert tier.reading(second[0], 0.0)
    now[0] += 1.0
    tier.ask(second)
    wait(lambda: not tier.reading(second[-1], 0.01))
    assert taken(tier, second) == 4
    tier.close()
