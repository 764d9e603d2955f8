"""The small client against a scripted server on a loopback port."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from coppice.cli.remote import RemoteChat, RemoteError, sse_events

STREAM = (
    b": ping\n\n"
    b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "Hel"}}]}\r\n\r\n'
    b'data: {"choices": [{"delta": {"content": "lo"}}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
    b"data: [DONE]\n\n"
)


class Scripted(BaseHTTPRequestHandler):
    """Answers what its server's ``script`` says and records what it got."""

    server: Any

    def do_GET(self) -> None:
        self._reply(200, b'{"data": [{"id": "tiny"}]}')

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.got.append((dict(self.headers), json.loads(self.rfile.read(length))))
        self._reply(*self.server.script)

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[Any]:
    scripted: Any = HTTPServer(("127.0.0.1", 0), Scripted)
    scripted.got, scripted.script = [], (200, STREAM)
    thread = threading.Thread(target=scripted.serve_forever, args=(0.01,))
    thread.start()
    yield scripted
    scripted.shutdown()
    scripted.server_close()
    thread.join()


def url_of(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_streams_text_and_usage(server: Any) -> None:
    chat = RemoteChat(url_of(server) + "/v1/", api_key="k3y")
    pieces = list(chat.stream([{"role": "user", "content": "hi"}], {"max_tokens": 2, "seed": None}))
    assert "".join(pieces) == "Hello"
    assert chat.usage == {"completion_tokens": 2}
    headers, body = server.got[0]
    assert headers["Authorization"] == "Bearer k3y"
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_refusal_carries_the_servers_sentence(server: Any) -> None:
    server.script = (401, b'{"error": {"message": "Send a key.", "code": "unauthorized"}}')
    with pytest.raises(RemoteError, match="The server answered 401: Send a key"):
        list(RemoteChat(url_of(server)).stream([], {}))


def test_an_error_event_ends_the_stream(server: Any) -> None:
    server.script = (
        200,
        STREAM.split(b"data: [DONE]")[0] + b'data: {"error": {"message": "Engine gone."}}\n\n',
    )
    with pytest.raises(RemoteError, match="Engine gone"):
        list(RemoteChat(url_of(server)).stream([], {}))


def test_no_server_names_the_command_to_start_one() -> None:
    with pytest.raises(RemoteError, match="start one with: coppice serve"):
        list(RemoteChat("http://127.0.0.1:9").stream([], {}))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://"])
def test_only_http_urls_are_taken(url: str) -> None:
    with pytest.raises(RemoteError, match="--url must look like"):
        RemoteChat(url)


def test_events_may_span_lines_and_end_early() -> None:
    lines = [b'data: {"a":\n', b"data: 1}\n", b"\n", b'data: {"b": 2}\n']
    assert list(sse_events(lines)) == [{"a": 1}]
