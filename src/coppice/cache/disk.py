"""The disk tier: a thread between the step loop and a `SegmentStore`.

The loop never waits for a disk. Pages to be written stand in a bounded queue, and those that
find it full are dropped; pages to be read are asked for ahead and taken when they are there.
The first error of the system turns the tier off for good, with one warning. A folder that
another process uses is no error of the system: the tier waits for its turn, as an engine does
that takes another's place.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

from coppice.cache.marks import SECRET_BYTES, PageKey
from coppice.cache.ram import PageBytes
from coppice.cache.segments import SegmentStore

_log = logging.getLogger(__name__)

QUEUE_BYTES = 32 << 20
"""Most bytes waiting to be written."""
STAGED_BYTES = 64 << 20
"""Most bytes asked for and not yet taken."""
RUN_BYTES = 4 << 20
"""Most bytes read at a time: a page that is waited for comes with those behind it."""
MOST_RUN = 256
"""Most pages read at a time; the system takes so many buffers in a call."""
GIVE_UP_S = 0.25
"""A disk that brings nothing for so long is waited for no longer: the pages are computed."""
EXPIRE_EVERY_S = 60.0
TURN_EVERY_S = 1.0
"""How often a folder that is in use is tried again."""


class DiskTier:
    """Pages on disk, written behind and read ahead.

    Args:
        make_store: gives the store, not opened, which belongs to this object's thread from then
            on. Where it raises `OSError` the tier is off from the start.
        page_bytes: of every page.
    """

    def __init__(self, make_store: Callable[[], SegmentStore], page_bytes: int) -> None:
        self._queue_pages = max(4, QUEUE_BYTES // page_bytes)
        self._staged_pages = max(4, STAGED_BYTES // page_bytes)
        self._run_pages = max(1, min(RUN_BYTES // page_bytes, MOST_RUN))
        self._spare: list[PageBytes] = []
        self._changed = threading.Condition()
        self._queue: OrderedDict[bytes, tuple[PageKey, PageBytes]] = OrderedDict()
        self._asked: OrderedDict[bytes, PageKey] = OrderedDict()
        self._staged: OrderedDict[bytes, tuple[PageKey, PageBytes]] = OrderedDict()
        self._moved_s = 0.0
        """When a page was read, taken, or asked for with nothing else to read."""
        self._closing = False
        self.why_off = ""
        """Empty while the tier works."""
        self.written = 0
        self.dropped = 0
        """Pages that found the queue full."""
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._store: SegmentStore | None = None
        self._thread: threading.Thread | None = None
        try:
            store = make_store()
            if not self._open(store):
                self.secret = store.secret or self.secret
                _log.warning("KV pages are not kept on disk for now: %s", self.why_off)
        except OSError as error:
            self._turn_off(error)
            return
        self._thread = threading.Thread(
            target=self._run, args=(store,), name="kv-disk", daemon=True
        )
        self._thread.start()

    @property
    def state(self) -> Literal["on", "off"]:
        """Whether it works."""
        return "off" if self.why_off else "on"

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return 0 if self._store is None else self._store.size_bytes

    @property
    def damaged(self) -> int:
        """Records that were not what they should be."""
        return 0 if self._store is None else self._store.damaged

    def __len__(self) -> int:
        return 0 if self._store is None else len(self._store)

    def __contains__(self, key: PageKey) -> bool:
        if self.why_off or self._store is None:
            return False
        return key in self._store or key.mark in self._queue or key.mark in self._staged

    def put(self, key: PageKey, data: PageBytes, *, timeout_s: float = 0.0) -> bool:
        """Have a page written; False when the queue stays full."""
        with self._changed:
            if self.why_off or key in self:
                return True
            if not self._changed.wait_for(lambda: len(self._queue) < self._queue_pages, timeout_s):
                self.dropped += 1
                return False
            self._queue[key.mark] = key, data
            self._changed.notify_all()
        return True

    def wants(self, key: PageKey) -> bool:
        """Whether `put` would do anything; a full queue is counted as a page dropped."""
        if self.why_off or key in self:
            return False
        if len(self._queue) < self._queue_pages:
            return True
        self.dropped += 1
        return False

    def ask(self, keys: Sequence[PageKey]) -> None:
        """Begin to read pages in order, as many as may be staged."""
        with self._changed:
            if self._full and not self._moves:  # of somebody who does not wait any more
                for mark in self._staged.keys() - {key.mark for key in keys}:
                    del self._staged[mark]
            for key in keys:
                if self._full:
                    break
                if key in self and key.mark not in self._staged and key.mark not in self._queue:
                    if not self._asked:
                        self._moved_s = time.monotonic()
                    self._asked.setdefault(key.mark, key)
            self._changed.notify_all()

    def reading(self, key: PageKey, wait_s: float) -> bool:
        """Whether a page may still come; asks for it if nobody has, and waits a little."""
        with self._changed:
            if key.mark not in self._asked and key.mark not in self._staged:
                self.ask([key])
                if self._full and key.mark not in self._asked and key.mark not in self._queue:
                    self._changed.wait(wait_s)
                    return key in self and self._moves  # after what others asked for
            if not self._changed.wait_for(lambda: key.mark not in self._asked, wait_s):
                return self._moves
        return False

    @property
    def _full(self) -> bool:
        return len(self._asked) + len(self._staged) >= self._staged_pages

    @property
    def _moves(self) -> bool:
        return time.monotonic() - self._moved_s < GIVE_UP_S

    def take(self, key: PageKey, use: Callable[[PageBytes], None]) -> bool:
        """Have a page used that was read, or still waits to be written; False without one."""
        with self._changed:
            staged = self._staged.pop(key.mark, None)
            if staged is not None:
                self._moved_s = time.monotonic()
            found = staged or self._queue.get(key.mark)
        if found is None or found[0] != key:
            return False
        use(found[1])
        if staged is not None and len(self._spare) < self._run_pages:
            self._spare.append(staged[1])
        return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is written; False when time or the disk ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, timeout_s) and not self.why_off

    def close(self, timeout_s: float = 1.0) -> None:
        """Stop, with what is in the queue lost; the folder is let go of."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    # -- the thread ------------------------------------------------------------------------

    def _open(self, store: SegmentStore) -> bool:
        """Open the store; False while another process has it."""
        try:
            store.open()
        except BlockingIOError as error:
            self.why_off = str(error)
            return False
        if self.why_off and store.secret != self.secret:
            raise OSError("pages were named by another key than the folder's")
        self.secret = store.secret
        self._store = store
        self.why_off = ""
        return True

    def _wait_for_turn(self, store: SegmentStore) -> None:
        while self.why_off and not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, TURN_EVERY_S)
            if not self._closing and self._open(store):
                _log.warning("KV pages are kept on disk from now on.")

    def _run(self, store: SegmentStore) -> None:
        try:
            self._wait_for_turn(store)
            while not self._closing:
                self._work(store)
        except Exception as error:  # supervises the tier: without it, answers only come later
            self._turn_off(error)
        try:
            store.close()
        except OSError as error:
            _log.warning("The KV disk tier was not closed cleanly: %s", error)

    def _work(self, store: SegmentStore) -> None:
        """Wait for something to do and do one piece of it, reading first."""
        with self._changed:
            self._changed.wait_for(
                lambda: bool(self._asked or self._queue or self._closing), EXPIRE_EVERY_S
            )
            asked = list(itertools.islice(self._asked.values(), self._run_pages))
            queued = next(iter(self._queue.values()), None)
        if self._closing:
            return
        if asked:
            self._read(store, asked)
        elif queued is not None:
            key, data = queued
            store.write(key, data)
            with self._changed:
                self.written += 1
                del self._queue[key.mark]
                self._changed.notify_all()
        else:
            store.expire()

    def _read(self, store: SegmentStore, keys: Sequence[PageKey]) -> None:
        pages = store.read(keys, self._spare)
        with self._changed:
            self._moved_s = time.monotonic()
            for key, data in zip(keys, pages, strict=False):
                self._asked.pop(key.mark, None)
                if data is not None:
                    self._staged[key.mark] = key, data
                while len(self._staged) > self._staged_pages:
                    self._staged.popitem(last=False)
            self._changed.notify_all()

    def _turn_off(self, error: Exception) -> None:
        with self._changed:
            self.why_off = f"{type(error).__name__}: {error}"
            self._queue.clear()
            self._asked.clear()
            self._staged.clear()
            self._changed.notify_all()
        _log.warning("KV pages are not kept on disk from now on: %s", self.why_off)
