"""Server-sent events, and the watch for clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
PART_BYTES = 4 << 10
"""Of one write: how long that takes says whether the reader reads at all."""
T = TypeVar("T")
Piece = tuple[int, bytes]
"""An encoded event and the index of the choice it is about, or `CLOSING`."""
Pieces = AsyncGenerator[list[Piece], None]
CLOSING = -1
"""For the events that end a stream: they go to every reader."""


class ClientLeftError(Exception):
    """The client closed the connection; there is nobody to answer."""


def event(body: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


async def joined(pieces: Pieces) -> AsyncGenerator[bytes, None]:
    """The events alone, what comes together written together."""
    async with contextlib.aclosing(pieces):
        async for batch in pieces:
            yield b"".join(data for _, data in batch)


class EventStream(Response):
    """Sends events as they come, with a comment in long silences.

    Closing the iterator is how its owner learns of the end: it is closed when the client has
    left, when the client has not read for ``slow_reader_s``, and after the last event.

    Args:
        events: encoded events.
        headers: of the reply.
        ping_s: silence after which a comment is sent.
        slow_reader_s: how long one write of `PART_BYTES` may take. While it does, the iterator
            is not asked, so whatever it would yield is gathered there, not here.
        closed: called when the stream is over, also if it never began.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        headers: Mapping[str, str],
        ping_s: float,
        slow_reader_s: float,
        closed: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(
            headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._ping_s = ping_s
        self._slow_reader_s = slow_reader_s
        self._closed = closed
        self._writing_since: float | None = None
        self._written = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream (ASGI)."""
        pump = asyncio.create_task(self._pump(send))
        others = {
            asyncio.create_task(client_leaves(receive)),
            asyncio.create_task(self._watch(send)),
        }
        try:
            await asyncio.wait({pump, *others}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in others:
                task.cancel()
            if not pump.done():
                pump.cancel()
            try:
                with contextlib.suppress(asyncio.CancelledError):
                    await pump
            finally:
                if self._closed is not None:
                    self._closed()

    async def _pump(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        self._writing_since = time.monotonic()
        await send(start)
        self._writing_since = None
        try:
            async for chunk in self._events:
                await self._write(send, chunk)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()

    async def _watch(self, send: Send) -> None:
        """Break silences; return when the reader has stood still for too long.

        One timer per stream, not one per event, which would cost more than the event.
        """
        while True:
            now = time.monotonic()
            if self._writing_since is not None:
                left = self._writing_since + self._slow_reader_s - now
                if left <= 0:
                    return  # uvicorn closes a reply that was begun
                await asyncio.sleep(min(left, 1.0))
            elif now - self._written < self._ping_s:
                await asyncio.sleep(min(self._written + self._ping_s - now, 1.0))
            else:
                try:
                    async with asyncio.timeout(self._slow_reader_s):
                        await self._write(send, PING)
                except TimeoutError:
                    return

    async def _write(self, send: Send, chunk: bytes) -> None:
        for start in range(0, len(chunk), PART_BYTES):
            self._writing_since = time.monotonic()
            part = chunk[start : start + PART_BYTES]
            await send({"type": "http.response.body", "body": part, "more_body": True})
        self._writing_since = None
        self._written = time.monotonic()


async def client_leaves(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` and cancel it when the client leaves before it is done.

    Raises:
        ClientLeftError: it left; ``work`` was cancelled and has ended.
    """
    running = asyncio.ensure_future(work)
    left = asyncio.ensure_future(client_leaves(receive))
    waiting: set[asyncio.Future[Any]] = {running, left}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise ClientLeftError
    finally:
        left.cancel()
        if not running.done():
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
