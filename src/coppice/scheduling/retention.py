"""Whose KV pages stay while a tool runs: by how soon it ends and what a rebuild would take."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

PRIOR_LOG_MEAN, PRIOR_LOG_VARIANCE, PRIOR_WEIGHT = 0.0, 2.0, 2.0
"""A tool nobody has seen: a second, give or take a factor of four; worth two observations."""
LEAST_S, MOST_S = 1e-3, 3600.0
"""Durations are taken as within these: one lost session must not teach patience."""
MOST_TOOLS = 1024
LEAST_RATE = 1e-9
FARTHEST = 1e4
"""Medians ahead that are looked at."""


@dataclass(slots=True)
class LogTimes:
    """Mean and variance of the logarithm of durations, as they come in."""

    count: float = PRIOR_WEIGHT
    mean: float = PRIOR_LOG_MEAN
    spread: float = PRIOR_WEIGHT * PRIOR_LOG_VARIANCE

    def learn(self, seconds: float) -> None:
        """A tool took so long."""
        value = math.log(min(max(seconds, LEAST_S), MOST_S))
        self.count += 1
        off = value - self.mean
        self.mean += off / self.count
        self.spread += off * (value - self.mean)

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm."""
        return max(0.1, math.sqrt(self.spread / self.count))


@dataclass(slots=True)
class ToolTimes:
    """Log-normal durations, learned for each tool; an unknown one is like all together."""

    tools: dict[str, LogTimes] = field(default_factory=dict)
    overall: LogTimes = field(default_factory=LogTimes)

    def learn(self, tool: str, seconds: float) -> None:
        """A tool took so long. The first `MOST_TOOLS` names are told apart."""
        self.overall.learn(seconds)
        if tool not in self.tools and len(self.tools) < MOST_TOOLS:
            known = self.overall
            self.tools[tool] = LogTimes(1.0, known.mean, known.spread / known.count)
        if tool in self.tools:
            self.tools[tool].learn(seconds)

    def rate(self, tool: str, elapsed_s: float) -> float:
        """Returns to expect per second of further waiting, after ``elapsed_s``.

        The hazard, averaged over the time for which waiting pays best: a log-normal's own
        hazard is 0 at first, when most tools are just about to return.
        """
        times = self.tools.get(tool, self.overall)
        scale = math.exp(times.mean)
        age = math.log(max(elapsed_s, LEAST_S) / scale)
        return _rate(round(4 * times.sigma) / 4 or 0.25, round(4 * age) / 4) / scale


@functools.lru_cache(maxsize=4096)
def _rate(sigma: float, log_age: float) -> float:
    """`ToolTimes.rate` of the log-normal of median 1: the Gittins index of a wait.

    The largest over ``t`` of ``P(back within t) / E[min(rest, t)]``.
    """
    age = math.exp(log_age)
    alive = _survival(sigma, age)
    if alive < LEAST_RATE:
        return LEAST_RATE
    best = waited = 0.0
    at, left = age, alive
    step = min(0.05, age)
    while step < FARTHEST:
        later = _survival(sigma, at + step)
        waited += step * (left + later) / 2
        best = max(best, (alive - later) / waited)
        at, left, step = at + step, later, step * 1.3
    return best


def _survival(sigma: float, seconds: float) -> float:
    return 0.5 * math.erfc(math.log(seconds) / sigma / math.sqrt(2))


class _Wait(NamedTuple):
    tool: str
    pages: int
    began_s: float


class ByHazard:
    """Keeps what is expected back soonest, for the seconds a rebuild would take, a page.

    The worth of a page kept for a second is ``rate x rebuild / pages``; whether that is enough
    is for who wants the pages to say. Nothing is refused at the start of a pause: what is worth
    least goes first anyhow, when somebody wants pages.

    Args:
        rebuild_s: seconds lost when so many pages are to be computed anew.
        times: of tools, to begin with what is known.

    Source: MARS (2026), state retention; the closed form is ours.
    """

    def __init__(self, rebuild_s: Callable[[int], float], times: ToolTimes | None = None) -> None:
        self._rebuild_s = rebuild_s
        self.times = times or ToolTimes()
        self._waits: dict[str, _Wait] = {}

    def on_pause(self, session: str, tool: str, pages: int, now: float) -> bool:
        """See `Retention`."""
        if pages <= 0:
            return False
        self._waits[session] = _Wait(tool, pages, now)
        return True

    def on_end(self, session: str, now: float, *, returned: bool) -> None:
        """See `Retention`. Those that never came back teach nothing."""
        wait = self._waits.pop(session, None)
        if wait is not None and returned:
            self.times.learn(wait.tool, now - wait.began_s)

    def rank(self, session: str, now: float) -> float:
        """See `Retention`."""
        wait = self._waits.get(session)
        if wait is None:
            return 0.0
        rate = self.times.rate(wait.tool, now - wait.began_s)
        return rate * self._rebuild_s(wait.pages) / wait.pages


class AlwaysKeep:
    """A baseline: paused sessions give way only to what already runs."""

    def on_pause(self, session: str, tool: str, pages: int, now: float) -> bool:
        """See `Retention`."""
        del session, tool, now
        return pages > 0

    def on_end(self, session: str, now: float, *, returned: bool) -> None:
        """See `Retention`."""

    def rank(self, session: str, now: float) -> float:
        """See `Retention`."""
        del session, now
        return math.inf


class AlwaysDrop(AlwaysKeep):
    """A baseline: every turn computes the whole conversation anew."""

    def on_pause(self, session: str, tool: str, pages: int, now: float) -> bool:
        """See `Retention`."""
        del session, tool, pages, now
        return False
