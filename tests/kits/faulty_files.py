"""The disk tier's system calls with faults put in: a full disk, read errors, short reads, rot."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coppice.cache.files import Files


class FaultyFiles(Files):
    """Real files, with faults.

    Args:
        seed: of everything random.
        room_bytes: writes beyond this many bytes find the disk full.
        fail: calls (``open``, ``read``, ``write``, ``unlink``, ``names``) that fail with EIO,
            from the call of that number on.
        rot: share of reads that come back with a flipped bit, a few bytes short, or split.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        room_bytes: int = 1 << 62,
        fail: dict[str, int] | None = None,
        rot: float = 0.0,
    ) -> None:
        self._random = random.Random(seed)
        self._room_bytes = room_bytes
        self._fail = fail or {}
        self._rot = rot
        self.calls: dict[str, int] = {}
        self.faults = 0

    def names(self, folder: Path) -> list[str]:
        self._call("names", folder)
        return super().names(folder)

    def open(self, path: Path, flags: int) -> int:
        self._call("open", path)
        return super().open(path, flags)

    def read(self, file: int, buffers: Sequence[Any], at: int) -> int:
        self._call("read", file)
        read = super().read(file, buffers, at)
        if read and self._random.random() < self._rot:
            self.faults += 1
            view = memoryview(buffers[0]).cast("B")
            if self._random.random() < 0.5:
                view[self._random.randrange(min(read, len(view)))] ^= 1 << self._random.randrange(8)
            else:
                return 0
        elif read > 1 and self._rot:
            return self._random.randint(1, read)  # no fault: the caller must go on reading
        return read

    def write(self, file: int, data: Any, at: int) -> int:
        self._call("write", file)
        if self._room_bytes <= 0:
            self.faults += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(file, data[: max(1, self._room_bytes)], at)
        self._room_bytes -= written
        return written

    def unlink(self, path: Path) -> None:
        self._call("unlink", path)
        super().unlink(path)

    def _call(self, name: str, _what: object) -> None:
        count = self.calls[name] = self.calls.get(name, 0) + 1
        if name in self._fail and count > self._fail[name]:
            self.faults += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
