"""A straight line through samples that a few of them cannot turn, and how sure its slope is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

TWO_SIGMA = 1.96


@dataclass(frozen=True)
class Slope:
    """Units per hour.

    Attributes:
        per_hour: the median of the slopes between all pairs of samples.
        uncertainty: half of its 95% interval.
        least_squares: beside it, what a single step turns.
    """

    per_hour: float
    uncertainty: float
    least_squares: float


def slope_per_hour(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """The trend of samples; infinite uncertainty of fewer than three.

    Memory rises in steps: Python takes a whole MiB from the system at a time, and a crowd larger
    than all before keeps what it touched. In half an hour one such step turns a line of least
    squares by 2 MiB an hour, and is no leak: a leak shows between most pairs of samples.

    Source: Theil (1950), Sen (1968); the interval after Kendall's variance.
    """
    n = len(seconds)
    if n < 3:
        return Slope(math.nan, math.inf, math.nan)
    points = sorted(zip(seconds, values, strict=True))
    slopes = sorted((y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in combinations(points, 2))
    far = TWO_SIGMA * math.sqrt(n * (n - 1) * (2 * n + 5) / 18) / 2
    low = slopes[max(0, math.floor(len(slopes) / 2 - far))]
    high = slopes[min(len(slopes) - 1, math.ceil(len(slopes) / 2 + far))]
    mean_x, mean_y = sum(seconds) / n, sum(values) / n
    spread = sum((x - mean_x) ** 2 for x in seconds)
    squares = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return Slope(3600 * statistics.median(slopes), 1800 * (high - low), 3600 * squares)
