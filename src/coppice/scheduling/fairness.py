"""How unevenly tenants were served: the figures of the VTC paper."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

INPUT_PRICE, OUTPUT_PRICE = 1.0, 2.0
"""Service of a prompt token and of a generated one, as in the paper."""


@dataclass(slots=True)
class Account:
    """What one tenant asked for and got, over time."""

    asked: list[tuple[float, float]] = field(default_factory=list)
    served: list[tuple[float, float]] = field(default_factory=list)


class Accounts:
    """Service asked for and given, by tenant; times must not go back."""

    def __init__(self) -> None:
        self.tenants: dict[str, Account] = {}

    def ask(self, tenant: str, time_s: float, prompt: int, answer: int) -> None:
        """A request came."""
        service = INPUT_PRICE * prompt + OUTPUT_PRICE * answer
        self.tenants.setdefault(tenant, Account()).asked.append((time_s, service))

    def read(self, tenant: str, time_s: float, prompt: int) -> None:
        """A prompt was computed."""
        self._serve(tenant, time_s, INPUT_PRICE * prompt)

    def wrote(self, tenant: str, time_s: float, tokens: int = 1) -> None:
        """Tokens were generated."""
        self._serve(tenant, time_s, OUTPUT_PRICE * tokens)

    def _serve(self, tenant: str, time_s: float, service: float) -> None:
        served = self.tenants.setdefault(tenant, Account()).served
        if served and served[-1][0] == time_s:
            served[-1] = (time_s, served[-1][1] + service)
        else:
            served.append((time_s, service))


@dataclass(frozen=True, slots=True)
class Differences:
    """Windowed service differences: the largest and the mean over windows."""

    most: float
    mean: float


def service_differences(
    accounts: Accounts, *, window_s: float = 60.0, every_s: float = 5.0, until_s: float
) -> Differences:
    """The paper's measure: in each window, over tenants, ``min(W_max - W_i, |D_i - W_i|)`` summed.

    ``W_i`` is the service tenant ``i`` got in the window and ``D_i`` what it asked for in it,
    so that a tenant that wanted no more counts as treated well.

    Args:
        accounts: of one run.
        window_s: length of a window.
        every_s: how far windows are apart.
        until_s: the last window ends here: while requests still come.
    """
    steps = [
        (_Running(account.asked), _Running(account.served)) for account in accounts.tenants.values()
    ]
    sums: list[float] = []
    start = 0.0
    while start + window_s <= until_s + 1e-9 or not sums:
        end = start + window_s
        pairs = [(asked.between(start, end), served.between(start, end)) for asked, served in steps]
        most = max((served for _, served in pairs), default=0.0)
        sums.append(sum(min(most - served, abs(asked - served)) for asked, served in pairs))
        start += every_s
    return Differences(max(sums), sum(sums) / len(sums))


class _Running:
    """Sums of timed amounts between two times."""

    def __init__(self, events: Sequence[tuple[float, float]]) -> None:
        ordered = sorted(events)
        self._times = [time for time, _ in ordered]
        self._sums = [0.0, *accumulate(amount for _, amount in ordered)]

    def between(self, start: float, end: float) -> float:
        """Sum over ``[start, end)``."""
        return (
            self._sums[bisect_left(self._times, end)] - self._sums[bisect_left(self._times, start)]
        )
