"""The soak's slope: a leak shows, a step and noise do not."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.soak.slope import slope_per_hour

SECONDS = [90.0 * i for i in range(8, 31)]


def noisy(per_hour: float, *, step: float = 0.0, after: float = 0.0) -> list[float]:
    rng = random.Random(7)
    return [
        490 + per_hour * s / 3600 + step * (s > after) + rng.uniform(-0.03, 0.03) for s in SECONDS
    ]


@pytest.mark.parametrize("after", [800.0, 1500.0, 2600.0])
def test_a_leak_shows_whether_there_is_a_step_or_not(after: float) -> None:
    for step in (0.0, 1.5):
        found = slope_per_hour(SECONDS, noisy(1.6, step=step, after=after))
        assert found.per_hour - found.uncertainty > 1.0


def test_a_single_step_is_no_leak_though_least_squares_say_so() -> None:
    for after in (1000.0, 2000.0, 2600.0):
        found = slope_per_hour(SECONDS, noisy(0.0, step=1.5, after=after))
        assert abs(found.per_hour) < 1.0
    middle = slope_per_hour(SECONDS, noisy(0.0, step=1.5, after=1700.0))
    assert middle.least_squares > 2.0


def test_a_straight_line_is_found_exactly_and_two_samples_say_nothing() -> None:
    found = slope_per_hour(SECONDS, [5 + 3 * s / 3600 for s in SECONDS])
    assert math.isclose(found.per_hour, 3) and math.isclose(found.least_squares, 3)
    assert found.uncertainty < 1e-9
    assert slope_per_hour([1, 2], [1, 2]).uncertainty == math.inf
