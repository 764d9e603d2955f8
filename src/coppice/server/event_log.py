"""The events of one streamed reply, kept for a reader who leaves and comes back.

A choice's events follow from its tokens alone, so the n-th event of a choice is the same
however often it is computed; how the choices' events mix is not. A reader's place is
therefore a count per choice, written with dots: ``57``, or ``12.0.31`` for three choices.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Iterable

from coppice.errors import RequestError, TakenOverError
from coppice.server.stream import CLOSING, Piece

PLACE = r"^([0-9]{1,9}(\.[0-9]{1,9}){0,2999})?$"
CHUNK_BYTES = 64 << 10


class EventLog:
    """Events as they are made; one reader at a time, a later one takes over.

    Args:
        slots: how many counts a place has: one a choice, one more if usage was asked for.

    Invariant: whatever places its readers come with, each is sent exactly the events its
    place does not count, in an order in which every choice's events follow each other.
    """

    def __init__(self, slots: int) -> None:
        self._events: list[tuple[int, int, bytes]] = []
        self._counts: Counter[int] = Counter()
        self._slots = slots
        self._news = asyncio.Event()
        self._reader: object | None = None
        self.size_bytes = 0
        self.ended = False

    @property
    def read_by_somebody(self) -> bool:
        """Whether there is a reader."""
        return self._reader is not None

    def extend(self, pieces: Iterable[Piece]) -> None:
        """Add what was made."""
        for slot, data in pieces:
            self._counts[slot] += 1
            self._events.append((slot, self._counts[slot], data))
            self.size_bytes += len(data)
        self._news.set()

    def end(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self._news.set()

    def place(self, text: str | None) -> list[int]:
        """Read a place; none is the beginning.

        Raises:
            RequestError: it is no place in this stream.
        """
        if not text:
            return [0] * self._slots
        if re.fullmatch(PLACE, text) is None or text.count(".") != self._slots - 1:
            raise RequestError(
                f"{text[:40]!r} is no place in this stream; send the id of the last event you "
                "saw, or nothing to begin anew.", param="after",
            )  # fmt: skip
        return list(map(int, text.split(".")))

    async def read(self, seen: list[int]) -> AsyncGenerator[bytes, None]:
        """Yield what ``seen`` does not count, each event with the place after it.

        Raises:
            TakenOverError: another reader came.
        """
        me = self._reader = object()
        self._news.set()  # wakes the one before
        at = 0
        try:
            while True:
                if self._reader is not me:
                    raise TakenOverError("Another reader has taken the stream over.")
                self._news.clear()
                out, at = self._unseen(at, seen)
                if out:
                    yield out
                elif self.ended and at == len(self._events):
                    return
                else:
                    await self._news.wait()
        finally:
            if self._reader is me:
                self._reader = None

    def _unseen(self, at: int, seen: list[int]) -> tuple[bytes, int]:
        """A chunk of events from ``at`` on, and where it ends; counts them in ``seen``."""
        out = bytearray()
        while at < len(self._events) and len(out) < CHUNK_BYTES:
            slot, number, data = self._events[at]
            at += 1
            if slot == CLOSING:
                out += data
            elif number > seen[slot]:
                seen[slot] = number
                out += b"id: " + ".".join(map(str, seen)).encode() + b"\n" + data
        return bytes(out), at
