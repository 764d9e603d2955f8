"""HTTP by hand: requests as bytes, for clients that behave as no library would."""

from __future__ import annotations

import json
import socket
import struct
import time
from types import TracebackType
from typing import Any


def request_bytes(path: str, body: dict[str, Any] | bytes, *more: str) -> bytes:
    """A POST of JSON; ``more`` are further header lines."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = ["Host: localhost", "Content-Type: application/json", *more]
    head = "\r\n".join([f"POST {path} HTTP/1.1", *lines, f"Content-Length: {len(content)}"])
    return head.encode() + b"\r\n\r\n" + content


class Wire:
    """One connection to a port of this machine.

    Args:
        port: where.
        window: receive buffer in bytes, for a reader that soon stands in the way.
        timeout_s: of each read and write.
    """

    def __init__(self, port: int, *, window: int | None = None, timeout_s: float = 30.0) -> None:
        self.socket = socket.socket()
        if window is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self.socket.settimeout(timeout_s)
        self.socket.connect(("127.0.0.1", port))
        self.received = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.leave()

    def send(self, *parts: bytes, pause_s: float = 0.0) -> Wire:
        """Send bytes as they are; what the other side no longer takes is dropped."""
        try:
            for part in parts:
                self.socket.sendall(part)
                time.sleep(pause_s)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return self

    def until(self, mark: bytes, count: int = 1) -> bytes:
        """Read until ``mark`` has come so often; all that has come.

        Raises:
            AssertionError: the connection ended first.
        """
        while self.received.count(mark) < count:
            piece = self.socket.recv(1 << 16)
            assert piece, f"ended before {count} of {mark!r}: {self.received[-500:]!r}"
            self.received += piece
        return self.received

    def rest(self) -> bytes:
        """Read until the other side closes or falls silent; all that has come."""
        try:
            while piece := self.socket.recv(1 << 16):
                self.received += piece
        except (TimeoutError, ConnectionError):
            pass
        return self.received

    def leave(self, *, reset: bool = False) -> None:
        """Close, with a FIN or (``reset``) with a RST."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
