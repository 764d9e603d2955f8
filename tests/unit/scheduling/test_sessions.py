"""The window over sessions, levels by their service, what tools' times teach, pinned pages."""

from __future__ import annotations

import random

import pytest

from coppice.scheduling.orders import MOST_SESSIONS, BySessionService
from coppice.scheduling.retention import MOST_TOOLS, ByHazard, ToolTimes
from coppice.scheduling.virtual import VirtualSequence
from coppice.scheduling.virtual_pages import VirtualPages
from coppice.scheduling.window import SessionWindow


def turn(arrival: int, session: str = "", tokens: int = 100, at: float = 0.0) -> VirtualSequence:
    return VirtualSequence(
        arrival=arrival, num_prompt=tokens, num_answer=4, submitted_s=at, session=session
    )


def window_of(inside: int, pressure: float) -> SessionWindow:
    window = SessionWindow()
    assert all(window.gate(f"s{i}") for i in range(inside))
    window.feedback(pressure, 0.0, 0.0)
    return window


def test_the_window_is_open_until_something_runs_short() -> None:
    window = window_of(50, 0.9)
    assert window.size is None
    assert window.gate("another")


@pytest.mark.parametrize(("kv", "cpu"), [(2.0, 0.0), (0.0, 9.0)])
def test_either_pressure_closes_it_for_newcomers_only(kv: float, cpu: float) -> None:
    window = window_of(8, 0.1)
    window.feedback(kv, cpu, 0.0)
    assert window.size == 8
    assert not window.gate("new")
    assert window.gate("s3")
    assert window.gate("")
    window.leave("s3")
    assert window.gate("new")
    assert not window.gate("s3"), "one that left comes back as new"


def test_it_widens_by_one_and_narrows_by_a_factor_not_faster_than_two_turns_each() -> None:
    window = window_of(10, 2.0)
    for _ in range(19):
        window.feedback(2.0, 0.0, 0.0)
    assert window.size == 10
    window.feedback(2.0, 0.0, 0.0)
    assert window.size == 7
    for i in range(4):
        window.leave(f"s{i}")
    assert window.gate("new")
    assert not window.gate("late")
    for _ in range(13):
        window.feedback(0.7, 0.0, 0.0)
    assert window.size == 7
    window.feedback(0.7, 0.0, 0.0)
    assert window.size == 8
    for _ in range(14):
        window.feedback(0.7, 0.0, 0.0)
    assert window.size == 8, "nobody was turned away since"


def test_below_the_load_mark_it_is_open_again_and_never_shut_for_all() -> None:
    window = window_of(4, 2.0)
    for _ in range(200):
        window.feedback(2.0, 0.0, 0.0)
    assert window.size == 1
    for i in range(4):
        window.leave(f"s{i}")
    assert window.gate("a")
    window.leave("a")
    window.feedback(0.1, 0.1, 0.0)
    assert window.size is None


def test_sessions_sink_with_what_they_had_and_first_turns_wait_for_second_ones() -> None:
    order = BySessionService(quantum=1000, ageing_s=10.0)
    first = order.key(turn(0, "young", 100))
    assert order.key(turn(1, "young", 200)) < first
    tokens = 0
    seen = []
    for i in range(2, 10):
        tokens += 2000
        seen.append(order.key(turn(i, "old", tokens))[1])
    assert seen[1:] == sorted(seen[1:])
    assert seen[-1] > seen[1] >= 10.0
    assert order.key(turn(10, "young", 300)) < order.key(turn(11, "old", tokens))
    assert order.key(turn(12)) > order.key(turn(13, "young", 400))


def test_whoever_waited_long_enough_goes_first() -> None:
    order = BySessionService(quantum=1000, ageing_s=10.0)
    order.key(turn(0, "old", 7000))
    old = order.key(turn(1, "old", 7100, at=0.0))
    order.key(turn(2, "young", 10))
    assert order.key(turn(3, "young", 20, at=20.0)) < old
    assert old < order.key(turn(4, "young", 30, at=31.0))


def test_a_rewritten_history_counts_as_computed_anew() -> None:
    order = BySessionService(quantum=1000, ageing_s=1.0)
    for i in range(6):
        order.key(turn(i, "rewriter", 3000 - i))
    order.key(turn(6, "reader", 3000))
    assert order.key(turn(7, "reader", 3010)) < order.key(turn(8, "rewriter", 3010))


def test_sessions_that_never_return_are_forgotten() -> None:
    order = BySessionService()
    for i in range(MOST_SESSIONS + 50):
        order.key(turn(i, f"s{i}"))
    assert len(order._sessions) == MOST_SESSIONS
    fresh = order.key(turn(0, "s0", 100))
    assert fresh[1] == order.ageing_s / 2


def test_tool_times_are_learned_by_tool() -> None:
    times, rng = ToolTimes(), random.Random(1)
    for _ in range(200):
        times.learn("quick", rng.lognormvariate(-2, 0.5))
        times.learn("slow", rng.lognormvariate(3, 0.5))
    assert times.tools["quick"].mean == pytest.approx(-2, abs=0.15)
    assert times.tools["slow"].sigma == pytest.approx(0.5, abs=0.1)
    assert times.rate("quick", 0.0) > 50 * times.rate("slow", 0.0)
    assert times.rate("quick", 60.0) < times.rate("quick", 0.0) / 20, "lost, most likely"
    for age in (0.0, 1e-9, 1e9):
        assert 0 < times.rate("slow", age) < 1e3
    assert times.rate("quick", 0.0) > times.rate("never seen", 0.0) > times.rate("slow", 0.0)


@pytest.mark.parametrize("seconds", [0.0, -5.0, 1e12])
def test_clock_jumps_teach_within_bounds(seconds: float) -> None:
    times = ToolTimes()
    times.learn("tool", seconds)
    assert abs(times.overall.mean) < 10
    assert times.rate("tool", seconds) > 0


def test_names_of_tools_do_not_pile_up() -> None:
    times = ToolTimes()
    for i in range(MOST_TOOLS + 10):
        times.learn(f"tool-{i}", 1.0)
    assert len(times.tools) == MOST_TOOLS


def test_what_comes_back_soon_is_worth_more_and_the_lost_teach_nothing() -> None:
    retention = ByHazard(lambda pages: 0.01 * pages)
    for i in range(50):
        for tool, seconds in (("quick", 0.5), ("slow", 30.0)):
            assert retention.on_pause(f"{tool}{i}", tool, 8, 0.0)
            retention.on_end(f"{tool}{i}", seconds, returned=True)
    retention.on_pause("a", "quick", 8, 100.0)
    retention.on_pause("b", "slow", 8, 100.0)
    assert retention.rank("a", 100.1) > retention.rank("b", 100.1)
    assert retention.rank("a", 140.0) < retention.rank("b", 140.0), "overdue by far"
    known = retention.times.tools["quick"].count
    retention.on_end("a", 1000.0, returned=False)
    assert retention.times.tools["quick"].count == known
    assert retention.rank("a", 1000.0) == retention.rank("stranger", 0.0) == 0.0
    assert not retention.on_pause("empty", "quick", 0, 0.0)


def holder(pages: VirtualPages, blocks: tuple[int, ...]) -> VirtualSequence:
    sequence = turn(0, "s", 16 * len(blocks))
    sequence.blocks = blocks
    assert pages.attach(sequence, use_cache=True)
    sequence.num_computed = sequence.num_tokens
    pages.share(sequence)
    return sequence


def test_pinned_blocks_go_last_the_end_of_a_session_first() -> None:
    pages = VirtualPages(10, 16, 16)
    kept, idle = holder(pages, (1, 2, 3, 4)), holder(pages, (8, 9))
    assert pages.pin("s", kept) == 4
    pages.release(kept)
    pages.release(idle)
    assert pages.num_available == 10
    assert pages.num_kept == 4
    other = holder(pages, (20, 21, 22, 23, 24, 25, 26))
    pages.check([other])
    assert pages.num_kept == 3
    again = turn(1, "s", 80)
    again.blocks = (1, 2, 3, 4)
    pages.release(other)
    assert pages.attach(again, use_cache=True)
    assert again.num_computed == 48
    pages.unpin("s")
    pages.release(again)
    pages.check([])
    assert pages.num_kept == 0
    assert pages.num_available == 10


def test_a_prefix_two_sessions_pinned_stays_with_either() -> None:
    pages = VirtualPages(10, 16, 16)
    one, two = holder(pages, (1, 2, 3)), holder(pages, (1, 2, 7))
    assert pages.pin("one", one) == 1
    assert pages.pin("two", two) == 1
    pages.release(one)
    pages.release(two)
    assert pages.num_kept == 4
    pages.unpin("one")
    assert pages.num_kept == 3
    pages.check([])
