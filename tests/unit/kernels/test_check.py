"""The start-up check of instruction sets: passes on a sound machine, notices a wrong one."""

from __future__ import annotations

import logging

import pytest

from coppice.kernels import available_isas, native_available

pytestmark = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")


def test_the_best_instruction_set_agrees_with_the_portable_one() -> None:
    from coppice.kernels.native import check

    assert check.choose_isa() == available_isas()[0]


def test_a_wrong_instruction_set_gives_way_to_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from coppice.kernels import _native
    from coppice.kernels.native import check

    best = available_isas()[0]
    if best == available_isas()[-1]:
        pytest.skip("this machine has only the portable kernels")
    right = check._answers

    def wrong() -> list[object]:
        found = right()
        if _native.isa() == best:
            found[3][5, 7] += 0.1
        return found  # type: ignore[return-value]

    monkeypatch.setattr(check, "_answers", wrong)
    try:
        with caplog.at_level(logging.WARNING):
            assert check.choose_isa() == available_isas()[1]
        assert best in caplog.text
    finally:
        _native.set_isa(best)
