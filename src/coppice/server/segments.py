"""Append-only files of checksummed records: what the journal is written to.

A file begins with `MAGIC`; each record is its length and CRC-32, four little-endian bytes
each, and its body. A record that was not written to its end, and all after it, do not count.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coppice.errors import ConfigError

log = logging.getLogger("coppice.server.journal")

MAGIC = b"coppice journal 2\n"
HEAD = struct.Struct("<II")
SEGMENT_BYTES = 4 << 20


def framed(body: bytes) -> bytes:
    """A record as it lies in the file."""
    return HEAD.pack(len(body), zlib.crc32(body)) + body


@dataclass(slots=True)
class Segment:
    """One file: its records' bytes by who owns them."""

    path: Path
    size: int = len(MAGIC)
    owners: Counter[str] = field(default_factory=Counter)

    def mostly_dead(self, kept: Container[str]) -> bool:
        """Whether less than half of it belongs to owners that are kept."""
        live = sum(size for owner, size in self.owners.items() if owner in kept)
        return self.size > len(MAGIC) and 2 * live < self.size


class Segments:
    """The files of one folder, for one process at a time and one thread at a time.

    Args:
        folder: made if missing, mode 0700; the files have 0600.
        owner: whose record a body is; records of owners no longer kept are left out when a
            file is tidied.
        segment_bytes: size at which a new file is begun.

    Invariant: a file that was not begun by this object is never written to.

    Raises:
        ConfigError: the folder cannot be had, or another process has it.
    """

    def __init__(
        self, folder: Path, owner: Callable[[bytes], str], *, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._folder = folder
        self._owner = owner
        self._segment_bytes = segment_bytes
        self._file = -1
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._old = [Segment(path) for path in sorted(folder.glob("segment-*"))]
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(
                f"Another server writes the journal in {folder}; give each its own folder.",
                param="journal",
            ) from None
        except OSError as error:
            raise ConfigError(
                f"Cannot use {folder} for the journal ({error.strerror}); name a folder this "
                "user may write.", param="journal",
            ) from error  # fmt: skip
        self._current: Segment | None = None
        self._next = 1 + max((int(s.path.name.rpartition("-")[2]) for s in self._old), default=0)

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(s.size for s in self._old) + (self._current.size if self._current else 0)

    def read(self) -> Iterator[bytes]:
        """Every whole record of earlier processes, oldest first; to be called once."""
        for segment in self._old:
            for body in _bodies(segment.path):
                size = HEAD.size + len(body)
                segment.size += size
                segment.owners[self._owner(body)] += size
                yield body

    def append(self, bodies: list[bytes]) -> bool:
        """Write records; true when a new file was begun, so that `tidy` may be worth it."""
        begun = self._current is None or self._current.size >= self._segment_bytes
        current = self._current if self._current is not None and not begun else self._begin()
        frames = [framed(body) for body in bodies]
        _write(self._file, b"".join(frames))
        for body, frame in zip(bodies, frames, strict=True):
            current.size += len(frame)
            current.owners[self._owner(body)] += len(frame)
        return begun

    def sync(self) -> None:
        """Wait until all that was appended is on the disk."""
        if self._file >= 0:
            os.fsync(self._file)

    def tidy(self, kept: Container[str]) -> None:
        """Drop files that are mostly dead, after copying what is kept from them."""
        if self._current is not None and self._current.mostly_dead(kept):
            self._begin()
        for segment in [s for s in self._old if s.size == len(MAGIC) or s.mostly_dead(kept)]:
            alive = [body for body in _bodies(segment.path) if self._owner(body) in kept]
            if alive:
                self.append(alive)
                self.sync()
            segment.path.unlink(missing_ok=True)
            self._old.remove(segment)

    def close(self) -> None:
        """Sync and let go of the folder."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1
        os.close(self._lock)

    def _begin(self) -> Segment:
        if self._current is not None:
            self.sync()
            os.close(self._file)
            self._file = -1
            self._old.append(self._current)
        path = self._folder / f"segment-{self._next:08d}"
        self._next += 1
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _write(self._file, MAGIC)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._current = Segment(path)
        return self._current


def _bodies(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        if MAGIC.startswith(data):  # its process died as it began it
            return
        raise ConfigError(
            f"{path} was not written by this version; move it away to begin a new journal.",
            param="journal",
        )
    start = len(MAGIC)
    while start < len(data):
        body_at = start + HEAD.size
        size, checksum = HEAD.unpack(data[start:body_at]) if body_at <= len(data) else (0, -1)
        body = data[body_at : body_at + size]
        if len(body) < size or zlib.crc32(body) != checksum:
            log.warning("%s: cut at byte %d of %d, what follows was not written whole.",
                        path.name, start, len(data))  # fmt: skip
            return
        yield body
        start = body_at + size


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
