"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from coppice.cost.topology import read_cpus

T = TypeVar("T")


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may run on, within its cgroup's CPU quota; at least 1.

    Two hardware threads of one core share its multipliers, so they count once.
    """
    if not hasattr(os, "sched_getaffinity"):
        return max(1, os.cpu_count() or 1)
    cpus = os.sched_getaffinity(0)
    cores = len({cpu.core for cpu in read_cpus(root, cpus)}) or len(cpus)
    quota = _cgroup_quota(root)
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def _cgroup_quota(root: Path) -> float | None:
    """CPUs' worth of time the cgroup allows (version 2, then 1), or None for no limit."""
    line = _read(root / "sys/fs/cgroup/cpu.max", str)
    if line is not None:
        quota, _, period = line.partition(" ")
        return None if quota == "max" or not period else int(quota) / int(period)
    quota_us = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", int)
    period_us = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us", int)
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _read(path: Path, parse: Callable[[str], T]) -> T | None:
    """The file's content, or None where it is absent or unreadable."""
    try:
        return parse(path.read_text().strip())
    except (OSError, ValueError):
        return None
