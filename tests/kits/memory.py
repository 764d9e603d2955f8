"""What a server's processes hold of the machine's memory, now and at most."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

INTERVAL_S = 0.1
SUMMED = ("Rss", "Pss", "Anonymous")
VANISHED = (FileNotFoundError, ProcessLookupError)
"""What reading /proc says of a process that has ended meanwhile."""


def memory_mib(pid: int) -> dict[str, float]:
    """``Rss``, ``Pss`` and ``Anonymous`` of one process, in MiB (/proc/PID/smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return {name: kib[name] / 1024 for name in SUMMED}


def memory_of(pids: Iterable[int]) -> list[dict[str, float]]:
    """The same of each that has not ended meanwhile."""
    found = []
    for pid in pids:
        with suppress(*VANISHED):
            found.append(memory_mib(pid))
    return found


def family(pid: int) -> list[int]:
    """A process and its children, and theirs, as far as they have not ended meanwhile.

    A child that runs its parent's command yet shares all its memory, too (vfork): it does
    not count before it has become another program.
    """
    with suppress(*VANISHED):
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        command = command_of(pid)
        others = [child for child in children if command_of(child) not in (command, b"")]
        return [pid, *(each for child in others for each in family(child))]
    return []


def command_of(pid: int) -> bytes:
    """Its command line, NULs between; empty once it has ended."""
    with suppress(*VANISHED):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def lives(process: psutil.Process) -> bool:
    """Whether it has memory yet; who reaps it, and when, is not our affair."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Watch:
    """Samples the memory of a process and its family while it is entered.

    Args:
        root: the process; those below it are looked up for every sample.

    Attributes:
        peak: the largest sum of each figure over all processes, MiB.
        of_peak: the ``Rss`` of each process when their sum was largest, MiB.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak = dict.fromkeys(SUMMED, 0.0)
        self.of_peak: list[float] = []

    def __enter__(self) -> Watch:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._sample()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        each = memory_of(family(self._root))
        for name in SUMMED:
            total = sum(one[name] for one in each)
            if total > self.peak[name]:
                self.peak[name] = total
                if name == "Rss":
                    self.of_peak = [one["Rss"] for one in each]
