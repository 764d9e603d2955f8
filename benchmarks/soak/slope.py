"""A straight line through samples, and how sure its slope is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TWO_SIGMA = 1.96


@dataclass(frozen=True)
class Slope:
    """Units per hour; ``uncertainty`` is half of the 95% interval."""

    per_hour: float
    uncertainty: float


def slope_per_hour(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """Least squares; infinite uncertainty of fewer than three samples."""
    n = len(seconds)
    if n < 3:
        return Slope(math.nan, math.inf)
    mean_x, mean_y = sum(seconds) / n, sum(values) / n
    spread = sum((x - mean_x) ** 2 for x in seconds)
    slope = sum((x - mean_x) * y for x, y in zip(seconds, values, strict=True)) / spread
    errors = [y - mean_y - slope * (x - mean_x) for x, y in zip(seconds, values, strict=True)]
    error = math.sqrt(sum(e * e for e in errors) / (n - 2) / spread)
    return Slope(3600 * slope, 3600 * TWO_SIGMA * error)
