"""The events of one streamed reply, kept for a reader who leaves and comes back.

A choice's events follow from its tokens alone, so the n-th event of a choice is the same
however often it is computed; how the choices' events mix is not. A reader's place is
therefore a count per choice, written with dots: ``57``, or ``12.0.31`` for three choices.

Of what a reader was sent the last `KEPT_BYTES` are kept, for what the connection lost; of what
nobody has read no more than that is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

from coppice.errors import NotFoundError, RequestError, TakenOverError
from coppice.server.stream import CLOSING, Piece

PLACE = r"^([0-9]{1,9}(\.[0-9]{1,9}){0,2999})?$"
CHUNK_BYTES = 64 << 10
KEPT_BYTES = 4 << 20
LOOK_S = 0.5
"""How often a log that nobody reads is asked whether it is over."""


class EventLog:
    """Events as they are made; one reader at a time, a later one takes over.

    Args:
        slots: how many counts a place has: one a choice, one more if usage was asked for.

    Invariant: whatever places its readers come with, each is sent exactly the events its
    place does not count, in an order in which every choice's events follow each other.
    """

    def __init__(self, slots: int) -> None:
        self._events: list[_Event] = []
        self._first = 0
        self._counts: Counter[int] = Counter()
        self._dropped: Counter[int] = Counter()
        self._slots = slots
        self._news = asyncio.Event()
        self._reader: object | None = None
        self._was_read = asyncio.Event()
        self._made_bytes = self._read_bytes = self._dropped_bytes = 0
        self._bounded = True
        self.ended = False

    @property
    def size_bytes(self) -> int:
        """Of the events it holds."""
        return self._made_bytes - self._dropped_bytes

    @property
    def read_by_somebody(self) -> bool:
        """Whether there is a reader."""
        return self._reader is not None

    def extend(self, pieces: Iterable[Piece]) -> None:
        """Add what was made."""
        for slot, data in pieces:
            self._counts[slot] += 1
            self._made_bytes += len(data)
            self._events.append(_Event(slot, self._counts[slot], data, self._made_bytes))
        self._news.set()

    async def room(self, over: Callable[[], bool]) -> None:
        """Wait until more may be made, or nothing but the end is to come."""
        while self._bounded and self._made_bytes - self._read_bytes > KEPT_BYTES and not over():
            self._was_read.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._was_read.wait(), LOOK_S)

    def take_all(self) -> None:
        """Wait for readers no longer: what comes now is the end."""
        self._bounded = False
        self._was_read.set()

    def end(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self._news.set()

    def place(self, text: str | None) -> list[int]:
        """Read a place; none is the beginning.

        Raises:
            RequestError: it is no place in this stream.
            NotFoundError: it is so far back that what follows is no longer held.
        """
        place = self._read_place(text) if text else [0] * self._slots
        if self.ended and any(place[slot] > self._counts[slot] for slot in range(self._slots)):
            raise _no_place(text)
        self._require_held(place)
        return place

    def _require_held(self, place: Sequence[int]) -> None:
        if any(place[slot] < dropped for slot, dropped in self._dropped.items()):
            raise NotFoundError(
                f"Of what was sent, the last {KEPT_BYTES >> 20} MiB are kept, and this place is "
                "before them. Send the request anew.", param="after", code="not_resumable",
            )  # fmt: skip

    def _read_place(self, text: str) -> list[int]:
        if re.fullmatch(PLACE, text) is None or text.count(".") != self._slots - 1:
            raise _no_place(text)
        return list(map(int, text.split(".")))

    async def read(self, seen: list[int]) -> AsyncGenerator[bytes, None]:
        """Yield what ``seen`` does not count, each event with the place after it.

        Raises:
            TakenOverError: another reader came.
            NotFoundError: what follows was dropped since the place was read.
        """
        self._require_held(seen)
        me = self._reader = object()
        self._news.set()  # wakes the one before
        at = self._first
        try:
            while True:
                if self._reader is not me:
                    raise TakenOverError("Another reader has taken the stream over.")
                self._news.clear()
                out, at = self._unseen(at, seen)
                if out:
                    yield out
                elif self.ended and at == self._first + len(self._events):
                    return
                else:
                    await self._news.wait()
        finally:
            if self._reader is me:
                self._reader = None

    def _unseen(self, at: int, seen: list[int]) -> tuple[bytes, int]:
        """A chunk of events from ``at`` on, and where it ends; counts them in ``seen``."""
        out = bytearray()
        held = self._events
        while at - self._first < len(held) and len(out) < CHUNK_BYTES:
            slot, number, data, self._read_bytes = held[at - self._first]
            at += 1
            if slot == CLOSING:
                out += data
            elif number > seen[slot]:
                seen[slot] = number
                out += b"id: " + ".".join(map(str, seen)).encode() + b"\n" + data
        self._was_read.set()
        if self._read_bytes - self._dropped_bytes > 2 * KEPT_BYTES:
            self._drop(self._read_bytes - KEPT_BYTES)
        return bytes(out), at

    def _drop(self, until_bytes: int) -> None:
        many = bisect_right(self._events, until_bytes, key=attrgetter("end"))
        for dropped in self._events[:many]:
            self._dropped_bytes = dropped.end
            if dropped.slot != CLOSING:
                self._dropped[dropped.slot] = dropped.number
        del self._events[:many]
        self._first += many


class _Event(NamedTuple):
    slot: int
    number: int
    data: bytes
    end: int
    """Bytes of all events up to here."""


def _no_place(text: str | None) -> RequestError:
    return RequestError(
        f"{(text or '')[:40]!r} is no place in this stream; send the id of the last event you "
        "saw, or nothing to begin anew.", param="after",
    )  # fmt: skip
