"""uvicorn's HTTP/1.1 protocol with bounds on headers, their arrival and connections."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from coppice.server.config import ServerConfig

MAX_HEADER_BYTES = 64 << 10
HIGH_BYTES, LOW_BYTES = 8 << 10, 2 << 10
"""Of a reply, waiting here for the system to take it: more must wait, until it is this little."""


def protocol_class(settings: ServerConfig) -> type[H11Protocol]:
    """The protocol with this server's limits."""

    class BoundedProtocol(H11Protocol):
        """Answers 431, 408 or 503 and closes, before any application code runs."""

        def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self._header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Begin a connection unless there are too many."""
            super().connection_made(transport)
            transport.set_write_buffer_limits(HIGH_BYTES, LOW_BYTES)
            if len(self.connections) > settings.max_connections:
                self._refuse(503, "too_many_connections", "Too many connections; try again later.")
                return
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            """Forget the timer with the connection."""
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Feed the parser; wrong or oversized headers end the connection."""
            if self.transport.is_closing():
                return
            waits = self.conn.their_state is h11.IDLE
            if waits and self._header_timer is None:
                self._await_headers()  # the next request of a kept connection
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_timer()

        def send_400_response(self, msg: str) -> None:
            """Answer what the parser could not read: 431 when it was too long, else 400."""
            self._stop_timer()
            if self.cycle is not None and not self.cycle.response_complete:
                self.transport.close()  # garbage after a good request; its reply cannot be told
                return
            buffered, _ = self.conn.trailing_data
            if len(buffered) > MAX_HEADER_BYTES:
                self._refuse(431, "headers_too_large", f"Headers exceed {MAX_HEADER_BYTES} bytes.")
            else:
                self._refuse(400, "invalid_http", "This is not a valid HTTP/1.1 request.")

        def _await_headers(self) -> None:
            self._stop_timer()
            self._header_timer = self.loop.call_later(settings.header_timeout_s, self._headers_late)

        def _headers_late(self) -> None:
            self._header_timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                buffered, _ = self.conn.trailing_data
                if buffered:
                    self._refuse(408, "header_timeout", "The headers came too slowly.")
                else:
                    self.transport.close()  # said nothing at all

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _refuse(self, status: int, code: str, message: str) -> None:
            kind = "overloaded_error" if status == 503 else "invalid_request_error"  # noqa: PLR2004
            error = {"message": message, "type": kind, "param": None, "code": code}
            body = json.dumps({"error": error, "request_id": ""}).encode()
            retry = "Retry-After: 1\r\n" if status == 503 else ""  # noqa: PLR2004
            head = (
                f"HTTP/1.1 {status} {_PHRASES[status]}\r\nContent-Type: application/json\r\n"
                f"{retry}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return BoundedProtocol


_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
