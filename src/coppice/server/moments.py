"""Moments written down for another process, which no step of the wall clock moves.

Within one boot of the machine the time since that boot tells how far off a moment is, and nobody
can set it. Only across boots, where it begins anew, does the wall clock have to tell.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import msgspec

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SINCE_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Moment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A moment by both clocks.

    Attributes:
        boot: id of the boot it was written in; empty where the system does not tell.
        boot_s: seconds since that boot, sleep included.
        unix_s: seconds since 1970.
    """

    boot: str
    boot_s: float
    unix_s: float

    @property
    def in_s(self) -> float:
        """Seconds from now to then; negative once it has passed."""
        if self.boot and self.boot == boot_id():
            return self.boot_s - time.clock_gettime(_SINCE_BOOT)
        return self.unix_s - time.time()


def moment(in_s: float = 0.0) -> Moment:
    """The moment so many seconds from now."""
    return Moment(boot_id(), time.clock_gettime(_SINCE_BOOT) + in_s, time.time() + in_s)


@cache
def boot_id() -> str:
    """What the system calls this boot; empty where it does not tell."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
