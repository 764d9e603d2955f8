"""Step time against rows and context, as measured on one machine with one model."""

from __future__ import annotations

import itertools
import json
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from coppice.errors import ConfigError


class Sample(NamedTuple):
    """One timed forward pass.

    Attributes:
        rows: rows of the step.
        keys: cached tokens its rows attended to, summed over rows.
        seconds: how long it took.
    """

    rows: int
    keys: int
    seconds: float


def rows_within(time: Callable[[int], float], seconds: float, most: int) -> int:
    """The largest number of rows, 1 to ``most``, whose step ends within ``seconds``.

    Args:
        time: seconds of a step of so many rows; never falls.
        seconds: what it may take.
        most: rows, at most; one is always allowed.
    """
    low, high = 1, max(1, most)
    while low < high:
        middle = (low + high + 1) // 2
        if time(middle) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True, slots=True)
class StepCurve:
    """``time(rows, keys)``: straight lines between measured row counts, plus attention.

    Attributes:
        rows: measured row counts, ascending; at least one.
        seconds: step time at each of them without context, never falling.
        per_key_s: seconds per attended key, see `Sample`.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    per_key_s: float

    def time(self, rows: int, keys: int = 0) -> float:
        """Expected seconds of a step; beyond the last measured count the last slope holds."""
        return self._at(rows) + keys * self.per_key_s

    def rows_within(self, seconds: float, most: int) -> int:
        """The largest step without context that ends within ``seconds``: 1 to ``most``."""
        return rows_within(self._at, seconds, most)

    def _at(self, rows: int) -> float:
        if len(self.rows) == 1 or rows <= self.rows[0]:
            return self.seconds[0] * max(1.0, rows / self.rows[0])
        i = min(bisect_right(self.rows, rows), len(self.rows) - 1)
        (x0, x1), (y0, y1) = self.rows[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)


def fit(samples: Iterable[Sample]) -> StepCurve:
    """The curve through the medians of some samples.

    Row counts that were timed without keys carry the curve; the others tell the price of a
    key, as the median over what they took longer.

    Raises:
        ConfigError: no sample is without keys.
    """
    ordered = sorted(samples)
    plain = {
        rows: statistics.median(s.seconds for s in group)
        for rows, group in itertools.groupby((s for s in ordered if s.keys == 0), lambda s: s.rows)
    }
    if not plain:
        raise ConfigError("A step curve needs samples without context; calibrate again.")
    risen = tuple(itertools.accumulate(plain.values(), max))
    bare = StepCurve(tuple(plain), risen, 0.0)
    prices = [(s.seconds - bare.time(s.rows)) / s.keys for s in ordered if s.keys]
    return StepCurve(bare.rows, bare.seconds, max(0.0, statistics.median(prices or [0.0])))


def save_curve(curve: StepCurve, path: Path) -> None:
    """Write a curve as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f"{path.suffix}.partial")
    partial.write_text(json.dumps(asdict(curve)))
    partial.replace(path)


def read_curve(path: Path) -> StepCurve | None:
    """A saved curve, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
        curve = StepCurve(
            tuple(int(n) for n in found["rows"]),
            tuple(float(s) for s in found["seconds"]),
            float(found["per_key_s"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fine = curve.rows and len(curve.rows) == len(curve.seconds)
    rising = list(curve.rows) == sorted(set(curve.rows)) and min(curve.seconds, default=0) > 0
    return curve if fine and rising and curve.rows[0] > 0 else None
