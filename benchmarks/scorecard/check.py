"""What a check is: a name, a server it may ask, and an `AssertionError` with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.scorecard.subjects import Running

Body = Callable[[Running], None]


@dataclass(frozen=True)
class Check:
    """One question.

    Attributes:
        name: what is expected, as a sentence.
        ask: raises where the expectation is not met.
        fresh: it kills, stops or floods the server, so it gets one of its own.
        key: that server asks for a key.
    """

    group: str
    name: str
    ask: Body
    fresh: bool = False
    key: bool = False


CHECKS: list[Check] = []


def check(
    group: str, name: str, *, fresh: bool = False, key: bool = False
) -> Callable[[Body], Body]:
    """Register a check."""

    def register(ask: Body) -> Body:
        CHECKS.append(Check(group, name, ask, fresh, key))
        return ask

    return register


def expect(met: bool, why: str) -> None:
    """Raise unless met.

    Raises:
        AssertionError: with the reason.
    """
    if not met:
        raise AssertionError(why)
