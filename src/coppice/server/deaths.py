"""Why an engine process ended, whether its requests are to blame, and when to start another."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from pathlib import Path

from coppice.errors import CoppiceError, EngineDeadError

BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.5, 30.0
_SIGNALS = {int(number): number.name for number in signal.Signals}
SENT_BY_OTHERS = frozenset(
    -int(number) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
)
"""Exit statuses of a process that was told to end; a fault of its own has another."""


@dataclass(frozen=True, slots=True)
class Death:
    """The end of one life of the engine process.

    Attributes:
        error: for the log, and for those who cannot be helped.
        own_doing: it crashed, hung or ran out of memory, so that a request may be the cause;
            false where another process ended it.
        worked: it had loaded its model and answered something.
        lasting: starting it again will not help; the operator must.
        replaced: no death at all: it was told to make room for another.
    """

    error: CoppiceError
    own_doing: bool = True
    worked: bool = False
    lasting: bool = False
    replaced: bool = False


def by_status(status: int, *, hung: bool, out_of_memory: bool, worked: bool) -> Death:
    """What an exit status means.

    Args:
        status: as the system gave it; negative for a signal.
        hung: we ended it, for its silence.
        out_of_memory: the kernel killed some process for memory at that time.
        worked: see `Death`.
    """
    if hung:
        return Death(EngineDeadError("The engine stood still and was ended."), worked=worked)
    how = f"signal {_SIGNALS.get(-status, -status)}" if status < 0 else f"status {status}"
    out_of_memory = out_of_memory and status == -signal.SIGKILL
    if out_of_memory:
        how += ", out of memory"
    return Death(
        EngineDeadError(f"The engine process died ({how})."),
        own_doing=status not in SENT_BY_OTHERS or out_of_memory,
        worked=worked,
    )


def memory_kills() -> int:
    """How many processes this machine's kernel has ended for want of memory."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


class Backoff:
    """How long to wait before the next start: longer each time the last one was in vain.

    A life that answered something, or was ended from outside, is followed by the shortest
    wait; the others double it. Every wait is cut by up to half at random, so that servers
    that died together do not come back together.
    """

    def __init__(self, random_: random.Random | None = None) -> None:
        self._random = random_ or random.Random()
        self.in_vain = 0

    def after(self, death: Death) -> float:
        """Seconds to wait, given the latest death."""
        self.in_vain = 0 if death.worked or not death.own_doing else self.in_vain + 1
        wait_s: float = min(BACKOFF_FIRST_S * 2.0 ** min(self.in_vain, 10), BACKOFF_LAST_S)
        return wait_s * self._random.uniform(0.5, 1.0)
