"""ASGI middleware: how large a body may be, how it is labelled, how long it may take."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coppice.errors import LimitError
from coppice.server.config import ServerConfig
from coppice.server.errors import BodyProblem, send_error
from coppice.server.guard import header
from coppice.server.http_protocol import MAX_HEADER_BYTES

MAX_HEADER_LINES = 100
MIN_RATE_BYTES_S = 1024
RATE_GRACE_S = 5.0
DISCARD_S = 1.0
_BODY_METHODS = ("POST", "PUT", "PATCH")


class BodyLimits:
    """Counts body bytes as they come; refuses what is too large, too slow or not JSON."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._max_bytes = config.max_body_bytes
        self._timeout_s = config.body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with a counted ``receive`` (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
        except LimitError as error:
            await _discard(receive, self._max_bytes)
            await send_error(scope, receive, send, error)
            return
        await self._app(scope, _Counted(receive, self._max_bytes, self._timeout_s), send)

    def _check_headers(self, scope: Scope) -> None:
        headers = scope["headers"]
        # The parser bounds headers that are still coming; these came in one piece.
        if sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES:
            raise LimitError(
                f"Headers exceed {MAX_HEADER_BYTES} bytes.", status=431, code="headers_too_large"
            )
        if len(headers) > MAX_HEADER_LINES:
            raise LimitError(f"More than {MAX_HEADER_LINES} header lines.", status=431,
                             code="headers_too_large")  # fmt: skip
        encoding = header(scope, b"content-encoding")
        if encoding is not None and encoding.strip().lower() != "identity":
            raise LimitError("Send the body without Content-Encoding.", status=415,
                             param="Content-Encoding", code="unsupported_encoding")  # fmt: skip
        length = header(scope, b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > self._max_bytes:
            raise self._too_large()
        has_body = (length or "0").strip() != "0" or header(scope, b"transfer-encoding")
        if scope["method"] in _BODY_METHODS and has_body:
            kind = (header(scope, b"content-type") or "").partition(";")
            charset = kind[2].strip().lower().removeprefix("charset=").strip('"')
            if kind[0].strip().lower() != "application/json" or charset not in ("", "utf-8"):
                raise LimitError("Send JSON with Content-Type: application/json, in UTF-8.",
                                 status=415, param="Content-Type",
                                 code="unsupported_media_type")  # fmt: skip

    def _too_large(self) -> LimitError:
        return LimitError(
            f"The body is larger than {self._max_bytes} bytes.", code="body_too_large"
        )


class _Counted:
    """``receive`` with a bound on bytes and on the time until the body is complete."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._started = time.monotonic()
        self._size = 0
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._patience_s()):
                message = await self._receive()
        except TimeoutError:
            raise BodyProblem(
                LimitError("The body came too slowly.", status=408, code="body_timeout")
            ) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._size > self._max_bytes:
                if not self._complete:
                    await _discard(self._receive, self._max_bytes)
                raise BodyProblem(
                    LimitError(
                        f"The body is larger than {self._max_bytes} bytes.", code="body_too_large"
                    )
                )
        return message

    def _patience_s(self) -> float:
        """Time until the total limit or the lowest allowed rate is passed."""
        by_rate = RATE_GRACE_S + self._size / MIN_RATE_BYTES_S
        return max(0.0, self._started + min(self._timeout_s, by_rate) - time.monotonic())


async def _discard(receive: Receive, max_bytes: int) -> None:
    """Read some of a body nobody wants, so that its sender gets to read the refusal.

    A socket closed with unread bytes is reset, and the reply lost on the way.
    """
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while size <= max_bytes:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
