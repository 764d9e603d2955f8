"""What a server's processes hold of the machine's memory, now and at most."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

INTERVAL_S, PEAK_INTERVAL_S = 0.1, 0.005
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


class Peaks(threading.Thread):
    """The most memory each of some processes holds while it is entered, as the kernel counts it.

    No short-lived peak is missed, but for the last moments of one that ends.

    Args:
        pids: says which processes; asked again and again, as they come and go.

    Attributes:
        before: resident memory at the beginning by process id, MiB.
        most: the most since then; of those that came later, too.
    """

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        super().__init__(daemon=True)
        self._pids, self._over = pids, threading.Event()
        self.before: dict[int, float] = {}
        self.most: dict[int, float] = {}

    def __enter__(self) -> Peaks:
        for pid in self._pids():
            self.before[pid] = memory_mib(pid)["Rss"]
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # forgets the peak so far
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        self._sample()

    def run(self) -> None:
        """Sample until it is left."""
        while not self._over.wait(PEAK_INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        for pid in self._pids():
            with suppress(*VANISHED):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                peak = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")]
                self.most[pid] = max([self.most.get(pid, 0.0), *peak])


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
