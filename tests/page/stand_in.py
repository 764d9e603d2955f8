"""A stand-in server for what a real one does rarely: locked, full, cut off, failing.

It serves the real page and speaks the same HTTP; its words come from a list.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "src/coppice/server/page"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
KEY = "open-sesame"
PAGES = 96
STEP_S = 0.01


class State:
    """What the server is up to, and how it shall behave.

    Attributes:
        answer: the pieces of an answer, or ``None`` for words without end.
        refusal: ``(status, code, message)`` to refuse chats with.
        locked: ask for `KEY`.
        breaks_after: cut the connection after so many pieces.
        fails_after: send an error event after so many pieces.
        heeds_cancel: whether a cancel call ends a stream.
        bodies: the chat bodies received.
        tree: the token tree of the last step.
        usage: what each tenant and key used.
        waiting_for: why one request waits; empty for none that does.
    """

    def __init__(self) -> None:
        self.answer: list[str] | None = None
        self.refusal: tuple[int, str, str] | None = None
        self.locked = False
        self.breaks_after: int | None = None
        self.fails_after: int | None = None
        self.heeds_cancel = True
        self.bodies: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.left: list[str] = []
        self.running: dict[str, dict[str, Any]] = {}
        self.ended: list[dict[str, Any]] = []
        self.generated = 0
        self.tree: dict[str, Any] | None = None
        self.usage: list[dict[str, Any]] = []
        self.waiting_for = ""
        self.started = time.monotonic()

    def info(self) -> dict[str, Any]:
        used = sum(1 + record["completion_tokens"] // 4 for record in self.running.values())
        return {
            "version": "0.0", "state": "ok", "uptime_s": time.monotonic() - self.started,
            "model": {
                "name": "stand-in", "architecture": "none", "context_length": 2048,
                "vocab_size": 4096, "num_params": 12_000_000, "weight_bytes": 0,
                "weight_format": "bf16", "fingerprint": "fp_0", "page_size": 16,
                "num_pages": PAGES, "kernels": "reference", "num_threads": 2,
            },
            "outcomes": {"accepted": 0, "in_flight": len(self.running)},
            "engine": {
                "running": len(self.running), "waiting": int(bool(self.waiting_for)),
                "waiting_tokens": 0, "waiting_for": self.waiting_for, "usage": self.usage,
                "pages_used": min(used, PAGES), "pages_cached": min(len(self.ended), 8),
                "num_pages": PAGES, "generated_tokens": self.generated, "prompt_tokens": 0,
                "preemptions": 0, "model_s": 0.95 * self.generated,
                "other_s": 0.05 * self.generated, "tree": self.tree,
                "drafted": 40, "accepted": 10,
            },
            "timeline": {
                "now_s": time.monotonic(), "requests": [*self.running.values(), *self.ended],
            },
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/" or path.startswith("/page/"):
            file = PAGE / ("index.html" if path == "/" else path.removeprefix("/page/"))
            self._reply(200, file.read_bytes(), TYPES[file.suffix])
        elif self._unlocked():
            if path == "/v1/models":
                self._json(200, {"object": "list", "data": [{"id": "stand-in"}]})
            elif path == "/v1/coppice/info":
                self._json(200, self.server.state.info())
            else:
                self._json(404, {"error": {"message": "not here", "code": "not_found"}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._unlocked():
            return
        state = self.server.state
        if self.path.endswith("/cancel"):
            request_id = self.path.split("/")[3]
            if state.heeds_cancel:
                state.cancelled.append(request_id)
            self._json(200, {"id": request_id, "cancelled": 1})
            return
        state.bodies.append(json.loads(body))
        if state.refusal is not None:
            status, code, message = state.refusal
            self._json(status, {"error": {"message": message, "code": code}}, {"Retry-After": "7"})
            return
        self._stream(self.headers["X-Request-Id"])

    def _unlocked(self) -> bool:
        if not self.server.state.locked or self.headers["Authorization"] == f"Bearer {KEY}":
            return True
        message = "Send your API key as 'Authorization: Bearer KEY'."
        self._json(401, {"error": {"message": message, "code": "unauthorized"}})
        return False

    def _stream(self, request_id: str) -> None:
        state, now = self.server.state, time.monotonic()
        record = state.running[request_id] = {
            "id": request_id, "arrived_s": now, "queue_s": 0.0, "ttft_s": 0.05, "e2e_s": None,
            "prompt_tokens": 9, "cached_tokens": 0, "completion_tokens": 0, "outcome": None,
        }  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        outcome = "finished"
        try:
            outcome = self._pieces(request_id, record)
        except OSError:
            outcome = "cancelled"
            state.left.append(request_id)
        finally:
            self.close_connection = True
            del state.running[request_id]
            state.ended.append(record | {"outcome": outcome, "e2e_s": time.monotonic() - now})

    def _pieces(self, request_id: str, record: dict[str, Any]) -> str:
        state = self.server.state
        endless = (f"word{number} " for number in itertools.count())
        reason = "stop"
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number, piece in enumerate(state.answer if state.answer is not None else endless):
            if request_id in state.cancelled:
                reason = "length"
                break
            if number == state.breaks_after:
                return "failed"
            if number == state.fails_after:
                self._event(
                    {"error": {"message": "The engine process died.", "code": "engine_dead"}}
                )
                self._raw(b"data: [DONE]\n\n")
                return "failed"
            self._event({"choices": [{"index": 0, "delta": {"content": piece}}]})
            record["completion_tokens"] += 1
            state.generated += 1
            time.sleep(STEP_S)
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        usage = {"prompt_tokens": 9, "completion_tokens": record["completion_tokens"]}
        self._event({"choices": [], "usage": usage})
        self._raw(b"data: [DONE]\n\n")
        return "cancelled" if reason == "length" else "finished"

    def _event(self, body: dict[str, Any]) -> None:
        self._raw(b": a comment\n\ndata: " + json.dumps(body).encode() + b"\n\n")

    def _raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._reply(status, json.dumps(body).encode(), "application/json", headers)

    def _reply(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        all_headers = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (all_headers | HEADERS | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class StandIn(ThreadingHTTPServer):
    """Runs on a free loopback port until closed."""

    daemon_threads = True

    def __init__(self) -> None:
        self._connections: list[socket.socket] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = State()
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, and remember it so that `close` can end it."""
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def close(self) -> None:
        """Stop serving, and drop every connection as a process that dies does."""
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
