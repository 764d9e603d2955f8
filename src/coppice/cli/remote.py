"""A small client of a running server: one streamed chat answer at a time.

Only the standard library: the runtime has no HTTP client of its own to lend.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterable, Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any, cast

from coppice.errors import CoppiceError

CONNECT_TIMEOUT_S = 300.0
"""A queued request may wait long for its first byte; the server sends comments meanwhile."""


class RemoteError(CoppiceError):
    """The server answered with an error, or did not answer."""

    code = "remote_error"


class RemoteChat:
    """Chats with the server at ``url`` (with or without ``/v1``).

    Args:
        url: ``http://host:port``.
        api_key: sent as a bearer token when given.
        model: the model to ask for; the server's first one when omitted.
    """

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RemoteError(f"--url must look like http://127.0.0.1:8000, got {url!r}.")
        self._base = url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._model = model
        self.usage: Mapping[str, Any] = {}
        """Token counts of the last answer."""

    @property
    def model(self) -> str:
        """The model's name, asked for on first use."""
        if self._model is None:
            with self._open("/v1/models", None) as reply:
                listed = _json_object(reply.read()).get("data") or [{}]
            self._model = str(listed[0].get("id", ""))
        return self._model

    def stream(self, messages: list[dict[str, str]], fields: Mapping[str, Any]) -> Generator[str]:
        """Pieces of the answer's text; closing the iterator closes the connection.

        Raises:
            RemoteError: the server refused, failed midway or went away.
        """
        body = {key: value for key, value in fields.items() if value not in (None, ())}
        body |= {"model": self.model, "messages": messages, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with self._open("/v1/chat/completions", body) as reply:
            try:
                for event in sse_events(reply):
                    if "error" in event:
                        raise RemoteError(str(event["error"].get("message", event["error"])))
                    self.usage = event.get("usage") or self.usage
                    for choice in event.get("choices", []):
                        yield choice.get("delta", {}).get("content") or ""
            except (OSError, HTTPException) as error:
                raise RemoteError(f"The stream broke off: {error}; send it again.") from error

    def _open(self, path: str, body: Mapping[str, Any] | None) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, headers=headers)
        try:
            reply = urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT_S)
            return cast("HTTPResponse", reply)
        except urllib.error.HTTPError as error:
            detail = _json_object(error.read()).get("error") or {}
            said = detail.get("message", error.reason) if isinstance(detail, dict) else detail
            raise RemoteError(f"The server answered {error.code}: {said}") from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RemoteError(
                f"No server answers at {self._base} ({reason}); start one with: coppice serve"
            ) from error


def sse_events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """JSON objects of a server-sent event stream, up to ``[DONE]``; comments are skipped."""
    data: list[str] = []
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            text = "\n".join(data)
            data.clear()
            if text == "[DONE]":
                return
            yield _json_object(text)


def _json_object(text: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise RemoteError("The server sent something that is not JSON; check --url.") from error
    return value if isinstance(value, dict) else {}
