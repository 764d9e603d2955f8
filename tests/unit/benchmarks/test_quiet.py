"""Other programs beside a measurement are waited for, and noticed."""

from __future__ import annotations

import pytest

from benchmarks import quiet
from benchmarks.decode import contest as module
from benchmarks.decode.contest import COPPICE, Case, Contest, Tokens
from benchmarks.probe import Limits


def test_busy_time_is_everything_but_idling_and_waiting():
    text = "cpu  100 20 30 9999 888 4 6 50 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert quiet.busy_ticks(text) == 100 + 20 + 30 + 4 + 6


def test_a_spinning_process_is_seen():
    ticks = iter(["cpu 0 0 0 0 0 0 0", "cpu 30 0 0 0 0 0 0"])

    class Stat:
        exists = staticmethod(lambda: True)
        read_text = staticmethod(lambda: next(ticks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quiet, "STAT", Stat)
        patch.setattr(quiet.os, "sysconf", lambda _: 100)
        assert quiet.busy_cores(0.1) == pytest.approx(3.0, rel=0.3)  # 0.3 s of work in 0.1 s


def test_waiting_ends_when_it_is_quiet_or_patience_is_over():
    loads = iter([2.0, 1.0, 0.1, 2.0])
    assert quiet.wait_until_quiet(lambda: next(loads), patience_s=60)
    assert next(loads) == 2.0  # it stopped at the first quiet moment
    assert not quiet.wait_until_quiet(lambda: 2.0, patience_s=0.0)


def test_a_disturbed_figure_is_marked(monkeypatch):
    class Session:
        measure = staticmethod(lambda task, limit_s: 5.0)

    answers = iter([True, False])
    monkeypatch.setattr(module, "wait_until_quiet", lambda **_: next(answers))
    case = Case("m", "bf16")
    contest = Contest(threads=1, tokens=lambda _: Tokens(), limits=lambda: Limits(1.0, 1.0, 1.0))
    contest._measure(Session(), case, COPPICE, "decode1")
    assert contest.figures[case, "coppice", "decode1"].disturbed == 1
