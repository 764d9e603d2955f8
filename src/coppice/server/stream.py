"""Server-sent events, and the watch for clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class ClientLeftError(Exception):
    """The client closed the connection; there is nobody to answer."""


def event(body: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


class EventStream(Response):
    """Sends events as they come, with a comment in long silences.

    Closing the iterator is how its owner learns of the end: it is closed when the client has
    left, when the client has not read for ``slow_reader_s``, and after the last event.

    Args:
        events: encoded events.
        headers: of the reply.
        ping_s: silence after which a comment is sent.
        slow_reader_s: how long one write may take. While it does, the iterator is not asked,
            so whatever it would yield is gathered there, not here.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        headers: Mapping[str, str],
        ping_s: float,
        slow_reader_s: float,
    ) -> None:
        super().__init__(
            headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._ping_s = ping_s
        self._slow_reader_s = slow_reader_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream (ASGI)."""
        pump = asyncio.create_task(self._pump(send))
        left = asyncio.create_task(client_leaves(receive))
        try:
            await asyncio.wait({pump, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not pump.done():
                pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pump

    async def _pump(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        following: asyncio.Task[bytes | None] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(_next(self._events))
                done, _ = await asyncio.wait({following}, timeout=self._ping_s)
                chunk: bytes | None = PING
                if done:
                    chunk, following = following.result(), None
                if chunk is None:
                    break
                async with asyncio.timeout(self._slow_reader_s):
                    await self._write(send, chunk)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return  # a reader that stands still; uvicorn closes the unfinished reply
        finally:
            if following is not None and not following.done():
                following.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await following
            await self._events.aclose()

    async def _write(self, send: Send, chunk: bytes) -> None:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)


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
