"""What a server's processes hold of the machine's memory, now and at most."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

INTERVAL_S = 0.1
SUMMED = ("Rss", "Pss", "Anonymous")


def memory_mib(pid: int) -> dict[str, float]:
    """``Rss``, ``Pss`` and ``Anonymous`` of one process, in MiB (/proc/PID/smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return {name: kib[name] / 1024 for name in SUMMED}


def family(pid: int) -> list[int]:
    """A process and its children, and theirs."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in family(int(child)))]


class Watch:
    """Samples the memory of some processes while it is entered.

    Attributes:
        peak: the largest sum of each figure over all processes, MiB.
        of_peak: the ``Rss`` of each process when their sum was largest, MiB.
    """

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
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
        each = [memory_mib(pid) for pid in self._pids]
        for name in SUMMED:
            total = sum(one[name] for one in each)
            if total > self.peak[name]:
                self.peak[name] = total
                if name == "Rss":
                    self.of_peak = [one["Rss"] for one in each]
