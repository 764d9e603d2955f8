"""What a process keeps resident: an allocator that gives back, and pages nobody needs again.

A server lives long and its load comes in bursts, so memory a burst took must go back to the
system. All of this is glibc's and Linux's; elsewhere the functions do nothing.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ (\d+)")


def tune_allocator(*, mmap_threshold: int) -> None:
    """Few arenas, and buffers of ``mmap_threshold`` bytes or more unmapped when freed.

    glibc gives each of the first threads an arena of its own and raises the threshold to the
    largest buffer ever freed; either keeps what a burst took for good. Call it before there
    are threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 2)
        mallopt(M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(M_TRIM_THRESHOLD, mmap_threshold)


def give_back_heap() -> None:
    """Return what a burst took and nobody holds; milliseconds, so for moments without work."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back() -> None:
    """Return freed heap and the code that only start-up ran; what is needed faults in again.

    Most of what libraries this large execute is their initialisers. Their pages are clean
    copies of files, which the system keeps cached.
    """
    give_back_heap()
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        for start, size in _clean_mappings():
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED)


def _clean_mappings(smaps: Path = Path("/proc/self/smaps")) -> Iterator[tuple[int, int]]:
    """Address and size of read-only private file mappings without a page of our own."""
    try:
        lines = smaps.read_text().splitlines()
    except OSError:
        return
    found: tuple[int, int] | None = None
    for line in lines:
        if mapping := _MAPPING.match(line):
            start, end = int(mapping[1], 16), int(mapping[2], 16)
            read_only_file = mapping[3] in ("r--p", "r-xp") and mapping[4] != "0"
            found = (start, end - start) if read_only_file else None
        elif found is not None and line.startswith("Anonymous:"):
            if line.split()[1] == "0":
                yield found
            found = None
