"""What a drafting pass is expected to take."""

from __future__ import annotations

import pytest

from coppice.speculation.price import PassPrice


def test_nothing_is_known_at_first() -> None:
    assert PassPrice().of(3) == 0.0


def test_numbers_in_between_lie_on_the_line() -> None:
    price = PassPrice()
    price.add(2, 1.0)
    price.add(6, 3.0)
    assert price.of(3) == pytest.approx(1.5)
    assert price.of(6) == 3.0


def test_beyond_what_was_seen_no_pass_is_expected_to_be_cheap() -> None:
    price = PassPrice()
    price.add(4, 1.0)
    assert price.of(8) == pytest.approx(2.0)
    assert price.of(1) == 1.0


def test_a_slow_first_pass_is_forgotten_and_later_ones_are_smoothed() -> None:
    price = PassPrice()
    for seconds in (9.0, 1.0, 1.0, 1.0):
        price.add(1, seconds)
    assert price.of(1) == 1.0
    price.add(1, 2.0)
    assert price.of(1) == pytest.approx(1.1)
