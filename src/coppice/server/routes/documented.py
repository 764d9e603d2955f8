"""Replies that every route documents."""

from __future__ import annotations

from typing import Any

from coppice.server.protocol.common import ERROR_STATUSES, ErrorReply

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (*ERROR_STATUSES, 431)
}
_EVENT: dict[str, Any] = {
    "type": "object",
    "description": "With stream: one event per piece of text. `data` is a JSON chunk, or [DONE] "
    "at the end; an event named `error` carries an error body when the stream fails.",
    "properties": {"data": {"type": "string"}, "event": {"enum": ["message", "error"]}},
    "required": ["data"],
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": _EVENT}}}
}
