"""What a drafting pass takes by the sequences in it, learned from those that were made."""

from __future__ import annotations

SMOOTHING = 0.1
FIRST = 3
"""Passes of which the least counts: the first of a size makes buffers and reads cold weights."""


class PassPrice:
    """Seconds of a pass over so many sequences; each number has an average of its own."""

    def __init__(self) -> None:
        self._seconds: dict[int, tuple[float, int]] = {}

    def add(self, count: int, seconds: float) -> None:
        """A pass over ``count`` sequences took so long."""
        mean, seen = self._seconds.get(count, (seconds, 0))
        mean = min(mean, seconds) if seen < FIRST else mean + SMOOTHING * (seconds - mean)
        self._seconds[count] = mean, seen + 1

    def of(self, count: int) -> float:
        """Seconds to expect of a pass over ``count`` sequences; 0 while nothing is known.

        Between numbers that were seen it is on the line that joins them. Beyond the largest
        each sequence costs as much again, below the smallest a pass costs no less.
        """
        below = max((n for n in self._seconds if n <= count), default=0)
        above = min((n for n in self._seconds if n >= count), default=0)
        if below == above:
            return self._seconds[below][0] if below else 0.0
        if not (below and above):
            mean, _ = self._seconds[below or above]
            return mean * max(1.0, count / (below or above))
        low, high = self._seconds[below][0], self._seconds[above][0]
        return low + (high - low) * (count - below) / (above - below)
