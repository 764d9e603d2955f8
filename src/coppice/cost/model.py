"""A live estimate of step time, refreshed from every step."""

from __future__ import annotations

from coppice.cost.curve import StepCurve

DECAY = 0.98
"""Weight of what was known before a new step; about fifty steps of memory."""


class StepCost:
    """How long a step of so many rows takes, here and now.

    With a calibrated curve its shape is kept and its height follows the live steps (another
    process on the machine, a slower memory state). Without one a line
    ``time(rows) = base + per_row * rows`` is fitted by exponentially weighted least squares.
    Used for refusal times and to keep a step under its time bound, never for results.

    Args:
        curve: from ``coppice doctor --calibrate``, if there is one for this model here.
    """

    def __init__(self, curve: StepCurve | None = None) -> None:
        self._curve = curve
        self._expected = self._seen = 0.0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learn from one finished step."""
        x = float(num_rows)
        self._n = self._n * DECAY + 1.0
        self._x = self._x * DECAY + x
        self._y = self._y * DECAY + seconds
        self._xx = self._xx * DECAY + x * x
        self._xy = self._xy * DECAY + x * seconds
        if self._curve is not None:
            self._expected = self._expected * DECAY + self._curve.time(num_rows)
            self._seen = self._seen * DECAY + seconds

    @property
    def scale(self) -> float:
        """Live seconds over calibrated seconds; 1 before the first step."""
        return self._seen / self._expected if self._expected and self._seen else 1.0

    @property
    def per_row_s(self) -> float:
        """Marginal seconds of a row; the mean over rows while all steps look alike."""
        if self._curve is not None:
            far = 2 * self._curve.rows[-1]
            return self.scale * (self._curve.time(far) - self._curve.time(1)) / (far - 1)
        if self._n == 0.0:
            return 0.0
        spread = self._n * self._xx - self._x * self._x
        mean = self._y / self._x
        if spread <= 1e-6 * self._n * self._xx:
            return mean
        slope = (self._n * self._xy - self._x * self._y) / spread
        return min(max(slope, 0.0), mean) or mean

    @property
    def base_s(self) -> float:
        """Seconds of a step with no rows."""
        if self._n == 0.0:
            return 0.0
        return max(0.0, (self._y - self.per_row_s * self._x) / self._n)

    def time(self, num_rows: int) -> float:
        """Expected seconds of a step of so many rows."""
        if self._curve is not None:
            return self.scale * self._curve.time(num_rows)
        return self.base_s + self.per_row_s * num_rows

    def rows_within(self, seconds: float, most: int) -> int:
        """Rows a step may have to end within ``seconds``; at least 1, at most ``most``."""
        if self._curve is not None:
            return self._curve.rows_within(seconds / self.scale, most)
        per_row = self.per_row_s
        if per_row <= 0.0:
            return most
        return max(1, min(most, int((seconds - self.base_s) / per_row)))
