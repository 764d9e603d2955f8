"""When memory runs short: what can be computed again goes, newcomers wait, what runs goes on.

The kernel ends a process without a word where the machine or its container has nothing left.
Before that, cached prefixes leave, and while that is not enough the front end lets nobody in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

Level = Literal["none", "tight", "short"]

LOOK_S = 0.5
"""Between two looks; each reads two or three small files."""
TIGHT = 2.0
"""Cached prefixes go below so many times the reserve, and newcomers come again above it."""


class Shortage:
    """Compares the room there is with a reserve.

    Args:
        reserve_mib: below it memory is short; 0 never looks.
        room: MiB this process may still take.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        reserve_mib: float,
        room: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reserve_mib = reserve_mib
        self._room = room or room_mib
        self._clock = clock
        self._looked_s = -LOOK_S
        self.level: Level = "none"

    def look(self) -> bool:
        """Whether to give back now: a look was due and found the room tight.

        Once short, it stays so until the room is no longer tight.
        """
        now = self._clock()
        if not self._reserve_mib or now - self._looked_s < LOOK_S:
            return False
        self._looked_s = now
        room = self._room()
        if room >= TIGHT * self._reserve_mib:
            self.level = "none"
        elif room < self._reserve_mib or self.level == "short":
            self.level = "short"
        else:
            self.level = "tight"
        return self.level != "none"


def room_mib(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """MiB the machine has left, or the tightest of this process's control groups.

    Memory of files counts as left, since the kernel takes it back first. Infinite where none of
    this can be read.
    """
    machine = _field(proc / "meminfo", "MemAvailable:") * 1024  # KiB there
    return min(machine, *_of_groups(proc, cgroups), float("inf")) / (1 << 20)


def _of_groups(proc: Path, cgroups: Path) -> Iterator[float]:
    """Bytes left in each group with a limit, from this process's own up to the root."""
    name = next((line[3:] for line in _lines(proc / "self/cgroup") if line[:3] == "0::"), "/")
    group = cgroups / name.lstrip("/")
    for folder in (group, *group.parents):
        limit = "".join(_lines(folder / "memory.max"))
        if limit.isdigit():
            used = float("".join(_lines(folder / "memory.current")) or 0)
            files = _field(folder / "memory.stat", "file", missing=0.0)
            shared = _field(folder / "memory.stat", "shmem", missing=0.0)
            yield float(limit) - used + files - shared
        if folder == cgroups:
            break


def _field(path: Path, name: str, missing: float = float("inf")) -> float:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name:
            return float(value.split()[0])
    return missing


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
