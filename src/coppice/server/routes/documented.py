"""Replies that every route documents."""

from __future__ import annotations

from typing import Any

from coppice.server.protocol.common import ERROR_STATUSES, ErrorReply

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (*ERROR_STATUSES, 431)
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
