"""Checks of who may come in, and of what is done to connections rather than said on them."""

from __future__ import annotations

import contextlib
import socket
import time

from benchmarks.scorecard.answers import COMPLETE, GREEDY
from benchmarks.scorecard.check import check, expect
from benchmarks.scorecard.subjects import KEY, Running

LONG = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True}


@check("doors", "no key, no answer", key=True)
def _no_key(server: Running) -> None:
    with server.client() as http:
        reply = http.post(COMPLETE, json=GREEDY, headers={"Authorization": ""})
    expect(reply.status_code == 401, f"answered {reply.status_code}")


@check("doors", "a wrong key, no answer", key=True)
def _wrong_key(server: Running) -> None:
    with server.client(key=KEY[:-1] + "x") as http:
        reply = http.post(COMPLETE, json=GREEDY)
    expect(reply.status_code == 401, f"answered {reply.status_code}")


@check("doors", "the key opens; no route but liveness says anything without it", key=True)
def _closed(server: Running) -> None:
    with server.client() as http:
        expect(http.post(COMPLETE, json=GREEDY).status_code == 200, "the key does not open")
        http.headers.pop("Authorization")
        for path in ("/v1/models", "/models", "/props", "/slots", "/metrics", "/v1/coppice/info"):
            status = http.get(path).status_code
            expect(status in (401, 403, 404, 501), f"{path} answers {status} without the key")


@check("doors", "a page of another name does not reach it (DNS rebinding)")
def _host(server: Running) -> None:
    with server.client() as http:
        reply = http.post(COMPLETE, json=GREEDY, headers={"Host": "evil.example"})
    expect(reply.status_code in (400, 403, 421), f"answered {reply.status_code}")


@check("doors", "a page of another origin may not read its answers")
def _origin(server: Running) -> None:
    with server.client() as http:
        reply = http.post(COMPLETE, json=GREEDY, headers={"Origin": "http://evil.example"})
    allowed = reply.headers.get("access-control-allow-origin")
    expect(allowed not in ("*", "http://evil.example"), f"it allows {allowed}")


@check("connections", "conflicting lengths are refused")
def _lengths(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
    back = server.raw(head + b"Content-Length: 50\r\n\r\nabcde", timeout_s=8.0)
    expect(back is not None, "it waits for more")
    expect(b" 400 " in (back or b"")[:20] or back == b"", f"answered {(back or b'')[:40]!r}")
    expect(server.works(), "dead after it")


@check("connections", "100,000 headers are refused")
def _headers(server: Running) -> None:
    lines = b"".join(b"X-%d: y\r\n" % i for i in range(100_000))
    back = server.raw(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n" + lines, timeout_s=10.0)
    expect(back is not None, "it waits for more")
    expect(b" 200 " not in (back or b"")[:20], "answered 200")
    expect(server.works(), "dead after it")


@check("connections", "a client that sends its headers byte by byte is let go within 20 s")
def _slow_headers(server: Running) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=1.0) as raw:
        raw.sendall(b"GET /v1/models HTTP/1.1\r\nX: ")
        while time.monotonic() - began < 20:
            try:
                raw.sendall(b"y")
                if raw.recv(1) is not None:
                    return  # answered (408) or closed
            except TimeoutError:
                continue
            except OSError:
                return
    raise AssertionError("it is still listened to after 20 s")


@check("connections", "200 connections that say nothing keep nobody else out")
def _idle(server: Running) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5.0))
        began = time.monotonic()
        expect(server.works(), "no answer beside them")
        expect(time.monotonic() - began < 5, "a short answer took over 5 s beside them")


def _leave(server: Running, *, stream: bool) -> None:
    """Sixteen long answers whose clients leave do not keep a short one waiting."""
    import json

    body = json.dumps(LONG | {"stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    began = time.monotonic()
    server.post(COMPLETE, prompt="a", max_tokens=4)
    alone_s = time.monotonic() - began
    for _ in range(16):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(0.05)
    time.sleep(1.0)
    began = time.monotonic()
    expect(server.works(), "no answer after they left")
    took_s = time.monotonic() - began
    expect(took_s < 1.0 + 3 * alone_s, f"{took_s:.1f} s after they left, {alone_s:.1f} s alone")


@check("connections", "streams whose clients leave are given up")
def _leave_stream(server: Running) -> None:
    _leave(server, stream=True)


@check("connections", "whole answers whose clients leave are given up")
def _leave_whole(server: Running) -> None:
    _leave(server, stream=False)
