"""How far off a moment is, whatever somebody does to the wall clock."""

from __future__ import annotations

import time

import msgspec
import pytest

from coppice.server import moments
from coppice.server.moments import Moment, moment

HOUR_S = 3600.0


def read_back(written: Moment) -> Moment:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(written), type=Moment)


@pytest.mark.parametrize("jump_s", [-HOUR_S, HOUR_S])
def test_within_a_boot_the_wall_clock_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    then = read_back(moment(60.0))
    wall = time.time()
    monkeypatch.setattr(time, "time", lambda: wall + jump_s)
    assert 59.0 < then.in_s <= 60.0
    assert -1.0 < read_back(moment()).in_s <= 0.0


def test_across_boots_the_wall_clock_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    then = read_back(moment(60.0))
    monkeypatch.setattr(moments, "boot_id", lambda: "another boot")
    assert 59.0 < then.in_s <= 60.0
    assert 59.0 < Moment("one boot", 1e9, time.time() + 60.0).in_s <= 60.0


def test_a_system_that_does_not_name_its_boots_has_the_wall_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moments, "boot_id", lambda: "")
    assert 59.0 < Moment("", 1e9, time.time() + 60.0).in_s <= 60.0
