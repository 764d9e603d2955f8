"""Pages in a folder of append-only segment files, found again after a restart.

One thread at a time uses a store. `OSError` means that the folder cannot be used any more;
everything else that can be wrong with a file makes its pages unknown and no more than that.
The bounds are kept by dropping the oldest segments whole, whichever model's they are.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from coppice.cache.files import Files
from coppice.cache.marks import SECRET_BYTES, PageKey
from coppice.cache.ram import PageBytes
from coppice.cache.segment import HEAD_BYTES, SegmentForm, read_head

FOLDER = "coppice-kv"
_NAME = re.compile(r"(\d{20})\.kv")


@dataclass(slots=True, eq=False)
class _Segment:
    """A file; ``form`` is None for other models' pages."""

    path: Path
    created_ns: int
    size_bytes: int
    form: SegmentForm | None
    used: int = 0
    marks: set[bytes] = field(default_factory=set)


class SegmentStore:
    """Writes, finds and drops pages.

    Args:
        folder: the store makes a folder of its own in it, of mode 0700.
        form: what segments look like.
        bound_bytes: most bytes of all segments.
        max_age_s: segments go this long after they were begun.
        files: system calls.
        now: seconds since 1970.

    Attributes:
        secret: key of the folder's marks, empty until `open` has found it.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        form: SegmentForm,
        *,
        bound_bytes: int,
        max_age_s: float,
        files: Files | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._files = files or Files()
        self._folder = folder / FOLDER
        self._form = form
        self._bound_bytes = bound_bytes
        self._max_age_s = max_age_s
        self._now = now
        self._segments: list[_Segment] = []
        self._index: dict[bytes, tuple[_Segment, int]] = {}
        self._writing: tuple[_Segment, int] | None = None
        self._reading: tuple[_Segment, int] | None = None
        self.damaged = 0
        """Records that were not what they should be."""
        self._files.make_folder(self._folder)
        self._lock: int | None = None
        self.secret = b""

    def open(self) -> Self:
        """Make the folder ours and learn what is there; to be called before anything else.

        Raises:
            BlockingIOError: another process uses it; it may be tried again. ``secret`` is known,
                unless that process makes it just now.
            OSError: it cannot be used.
        """
        lock = self._files.open(self._folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            self._files.lock(lock)
            secret = self._read_secret() or self._make_secret()
            if self.secret not in (b"", secret):
                raise OSError(f"the key in {self._folder} has changed")
            self.secret = secret
            self._scan()
        except BaseException as error:
            self._files.close(lock)
            if isinstance(error, BlockingIOError):
                self.secret = self.secret or self._read_secret()
                raise BlockingIOError(f"another server uses {self._folder}") from None
            raise
        self._lock = lock
        return self

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: PageKey) -> bool:
        return key.mark in self._index

    @property
    def size_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size_bytes for segment in self._segments)

    def write(self, key: PageKey, page: PageBytes) -> None:
        """Append a page; nothing when it is there already."""
        if key in self:
            return
        segment, file = self._room()
        slot = segment.used
        view = page.data
        self._write_all(file, view, self._form.page_at(slot))
        self._write_all(file, memoryview(self._form.header(key, view)), self._form.header_at(slot))
        segment.used = slot + 1
        segment.size_bytes = self._form.page_at(slot + 1)
        self._put(key.mark, segment, slot)

    def read(
        self, keys: Sequence[PageKey], spare: list[PageBytes] | None = None
    ) -> list[PageBytes | None]:
        """The first page and those behind it that lie behind it in the file, too.

        Args:
            keys: at least one.
            spare: arrays to fill, taken from its end: touching new memory costs more than
                reading a file that is cached.

        Returns:
            Pages by key, at least one; None for those that are not there whole and the same.
        """
        segment, first = self._index.get(keys[0].mark, (None, 0))
        if segment is None or segment.form is None:
            return [None]
        run = 1
        while run < len(keys) and self._index.get(keys[run].mark) == (segment, first + run):
            run += 1
        form = segment.form
        pages = [spare.pop() if spare else np.empty(form.page_bytes, np.uint8) for _ in range(run)]
        headers = memoryview(bytearray(run * form.header_bytes))
        try:
            file = self._open_for_reading(segment)
        except FileNotFoundError:  # somebody deleted it
            self._drop(segment)
            self.damaged += run
            return [None] * run
        whole = self._read_all(file, [headers], form.header_at(first))
        whole = whole and self._read_all(file, [p.data for p in pages], form.page_at(first))
        if not whole and run > 1:  # the file ends somewhere in between
            return self.read(keys[:1], spare)
        found: list[PageBytes | None] = []
        for i, key in enumerate(keys[:run]):
            header = headers[i * form.header_bytes : (i + 1) * form.header_bytes]
            if whole and form.header(key, pages[i].data) == header:
                found.append(pages[i])
                continue
            found.append(None)
            self.damaged += 1
            segment.marks.discard(key.mark)
            del self._index[key.mark]
        return found

    def expire(self) -> None:
        """Drop the segments that are too old."""
        oldest_ns = int((self._now() - self._max_age_s) * 1e9)
        for segment in [s for s in self._segments if s.created_ns < oldest_ns]:
            self._drop(segment)

    def close(self) -> None:
        """Let go of the folder."""
        self._close_reader()
        self._close_writer()
        if self._lock is not None:
            self._files.close(self._lock)
            self._lock = None

    # -- segments --------------------------------------------------------------------------

    def _scan(self) -> None:
        """Learn from the tables what there is; later segments win."""
        for name in sorted(self._files.names(self._folder)):
            if found := _NAME.fullmatch(name):
                self._scan_one(self._folder / name, int(found[1]))
        self.expire()
        self._make_room(0)

    def _scan_one(self, path: Path, created_ns: int) -> None:
        file = self._files.open(path, os.O_RDONLY)
        try:
            size = self._files.size(file)
            head = bytearray(HEAD_BYTES)
            form = None
            if self._read_all(file, [memoryview(head)], 0):
                form = read_head(bytes(head), self._form)
            segment = _Segment(path, created_ns, size, form)
            self._segments.append(segment)
            if form is None:
                return
            slots = min(form.slots, max(0, size - form.pages_at) // form.page_bytes)
            table = bytearray(slots * form.header_bytes)
            if self._read_all(file, [memoryview(table)], form.table_at):
                for slot, mark in enumerate(form.marks(bytes(table))):
                    self._put(mark, segment, slot)
        finally:
            self._files.close(file)

    def _put(self, mark: bytes, segment: _Segment, slot: int) -> None:
        if (before := self._index.get(mark)) is not None:
            before[0].marks.discard(mark)
        segment.marks.add(mark)
        self._index[mark] = segment, slot

    def _room(self) -> tuple[_Segment, int]:
        """The segment to write to, a new one when the last is full or old."""
        self.expire()
        if self._writing is not None:
            segment, _ = self._writing
            old = self._now() - segment.created_ns / 1e9 > self._max_age_s / 8
            if segment.used < self._form.slots and not old:
                return self._writing
            self._close_writer()
        self._make_room(self._form.file_bytes)
        last = self._segments[-1].created_ns if self._segments else 0
        created_ns = max(int(self._now() * 1e9), last + 1)
        path = self._folder / f"{created_ns:020d}.kv"
        file = self._files.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        segment = _Segment(path, created_ns, 0, self._form)
        self._segments.append(segment)
        self._writing = segment, file
        self._write_all(file, memoryview(self._form.head(created_ns)), 0)
        return self._writing

    def _make_room(self, needed: int) -> None:
        while self._segments and self.size_bytes + needed > self._bound_bytes:
            self._drop(self._segments[0])

    def _drop(self, segment: _Segment) -> None:
        self._forget(segment)
        self._segments.remove(segment)
        if self._writing is not None and self._writing[0] is segment:
            self._close_writer()
        self._files.unlink(segment.path)

    def _forget(self, segment: _Segment) -> None:
        """Its pages are not there any more."""
        for mark in segment.marks:
            del self._index[mark]
        segment.marks.clear()
        if self._reading is not None and self._reading[0] is segment:
            self._close_reader()

    # -- bytes -----------------------------------------------------------------------------

    def _open_for_reading(self, segment: _Segment) -> int:
        if self._reading is not None and self._reading[0] is segment:
            return self._reading[1]
        self._close_reader()
        file = self._files.open(segment.path, os.O_RDONLY)
        self._reading = segment, file
        return file

    def _close_reader(self) -> None:
        if self._reading is not None:
            file, self._reading = self._reading[1], None
            self._files.close(file)

    def _close_writer(self) -> None:
        if self._writing is not None:
            file, self._writing = self._writing[1], None
            self._files.close(file)

    def _read_all(self, file: int, views: list[memoryview], at: int) -> bool:
        """Fill buffers one after the other; False where the file ends before."""
        while views:
            read = self._files.read(file, views, at)
            if read == 0:
                return False
            at += read
            while views and read >= len(views[0]):
                read -= len(views[0])
                views = views[1:]
            if views:
                views = [views[0][read:], *views[1:]]
        return True

    def _write_all(self, file: int, view: memoryview, at: int) -> None:
        done = 0
        while done < len(view):
            done += self._files.write(file, view[done:], at + done)

    def _read_secret(self) -> bytes:
        """The key of this folder's marks; empty where there is none yet."""
        file = self._files.open(self._folder / "secret", os.O_RDWR | os.O_CREAT)
        try:
            secret = bytearray(SECRET_BYTES)
            whole = self._read_all(file, [memoryview(secret)], 0)
            return bytes(secret) if whole else b""
        finally:
            self._files.close(file)

    def _make_secret(self) -> bytes:
        """A key for a new folder; only who has the lock may make one."""
        secret = secrets.token_bytes(SECRET_BYTES)
        file = self._files.open(self._folder / "secret", os.O_RDWR | os.O_CREAT)
        try:
            self._write_all(file, memoryview(secret), 0)
        finally:
            self._files.close(file)
        return secret
