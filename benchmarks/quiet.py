"""Waits until nothing else runs: engines whose threads spin collapse beside other programs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

WINDOW_S, PATIENCE_S = 0.3, 20.0
BUSY_CORES = 0.25
STAT = Path("/proc/stat")


def busy_ticks(text: str) -> int:
    """Clock ticks all cores together were busy, from the text of ``/proc/stat``."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, text.split("\n", 1)[0].split()[1:]
    )
    return user + nice + system + irq + softirq


def busy_cores(window_s: float = WINDOW_S) -> float:
    """Cores that were busy, by whatever, while this process slept; 0 where unknown."""
    if not STAT.exists():
        time.sleep(window_s)
        return 0.0
    before, began = busy_ticks(STAT.read_text()), time.perf_counter()
    time.sleep(window_s)
    ticks = busy_ticks(STAT.read_text()) - before
    return ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - began)


def wait_until_quiet(
    busy: Callable[[], float] = busy_cores, patience_s: float = PATIENCE_S
) -> bool:
    """Return once the cores are idle; ``False`` if they were not within ``patience_s``."""
    end = time.monotonic() + patience_s
    while busy() > BUSY_CORES:
        if time.monotonic() > end:
            return False
    return True
