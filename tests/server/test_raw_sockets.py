"""Bytes no client library would send: each connection is answered or closed, nothing is lost."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kits.accounts import anonymous_mib, descriptors, require_idle_and_whole
from tests.kits.injector import seeded
from tests.kits.server import ServerProcess
from tests.kits.wire import Wire, request_bytes

PATH, CHAT = "/v1/completions", "/v1/chat/completions"
SAY = [{"role": "user", "content": "abc"}]
LONGEST_S = 10.0
TIMES = {"header_timeout_s": 1.0, "body_timeout_s": 2.0, "slow_reader_s": 2.0}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
JSON = POST + b"Content-Type: application/json\r\n"
CHUNKED = JSON + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
GOOD = request_bytes(PATH, {"prompt": "abc", "max_tokens": 3})
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2


@pytest.fixture(scope="module")
def server(fake_model: Path) -> Iterator[ServerProcess]:
    with ServerProcess(fake_model, fake={"step_s": 0.001}, server=TIMES) as made:
        with made.http() as http:  # the cell for templates may start only now
            http.post(CHAT, json={"messages": SAY}).raise_for_status()
        yield made
        assert made.stop() == 0, "".join(made.log)
    assert "Traceback" not in "".join(made.log)


@pytest.fixture(autouse=True)
def whole(server: ServerProcess) -> Iterator[None]:
    """After each test: alive, nothing held, no descriptor more."""
    with server.http() as http:
        http.post(PATH, json={"prompt": "a"}).raise_for_status()
    before = descriptors(server)
    yield
    require_idle_and_whole(server)
    after = descriptors(server)
    assert all(now <= was for now, was in zip(after, before, strict=True)), (after, before)
    with server.http() as http:
        assert http.post(PATH, json={"prompt": "a"}).status_code == 200


def endless(piece: bytes, times: int = 1 << 20) -> Iterator[bytes]:
    return (piece for _ in range(times))


def repeated(head: bytes, piece: bytes, count: int) -> list[bytes]:
    return [head, *(piece * 1000 for _ in range(count // 1000))]


LENGTHS = (
    b"5\r\nContent-Length: 7", b"5, 7", b"-1", b"+5", b"0x10", b"1e3", b"5 5", b"", b"9" * 400,
    b"\xb2", b"5\r\nTransfer-Encoding: chunked", b"5\r\nTransfer-Encoding: identity",
    b"5\r\nTransfer-Encoding: gzip, chunked", b"5\r\n Content-Length: 7",
)  # fmt: skip
REFUSED: dict[str, list[bytes]] = {
    "100,000 headers": repeated(POST, b"X: a\r\n", 100_000),
    "100,000 empty headers": repeated(POST, b"X:\r\n", 100_000),
    "a header of 10 MB": repeated(POST + b"X: ", b"a" * 10, 1_000_000),
    "a folded header without end": repeated(POST + b"X: a\r\n", b" a\r\n", 100_000),
    "a target of 10 MB": repeated(b"GET /", b"a" * 10, 1_000_000),
    "a method of 10 MB": repeated(b"", b"A" * 10, 1_000_000),
    "blank lines without end": repeated(b"", b"\r\n" * 10, 1_000_000),
    "endless chunks": [CHUNKED, *(b"400\r\n" + b"a" * 1024 + b"\r\n" for _ in range(10_000))],
    "a chunk size without end": repeated(CHUNKED, b"0" * 10, 1_000_000),
    "a chunk extension without end": repeated(CHUNKED + b"1;", b"a" * 10, 1_000_000),
    "a trailer without end": repeated(CHUNKED + b"0\r\n", b"X: a\r\n", 100_000),
    "a chunk larger than any": [CHUNKED, b"f" * 16 + b"\r\n" + b"a" * 1024],
    "a negative chunk": [CHUNKED, b"-1\r\na\r\n"],
    "TLS hello": [HELLO],
    "HTTP/2 preface": [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    "HTTP/0.9": [b"GET /\r\n\r\n"],
    "HTTP/9.9": [b"GET / HTTP/9.9\r\n\r\n"],
    "no host": [b"GET /health/live HTTP/1.1\r\n\r\n"],
    "two hosts": [b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nHost: b\r\n\r\n"],
    "NULs": [b"\x00" * 100_000],
    "bare LF and NUL": [b"GET / HTTP/1.1\nHost: a\x00b\n\n"],
    "space before the colon": [POST + b"Content-Length : 5\r\n\r\nabcde"],
    **{f"length {length[:50]!r}": [JSON + b"Content-Length: " + length + b"\r\n\r\n" + b"0\r\n\r\n"]
       for length in LENGTHS},
}  # fmt: skip


def test_what_is_no_request_is_refused_or_closed(server: ServerProcess) -> None:
    def one(name: str) -> str:
        began = time.monotonic()
        with Wire(server.port, timeout_s=LONGEST_S) as wire:
            received = wire.send(*REFUSED[name]).rest()
        took = time.monotonic() - began
        answered = not received or received.startswith(b"HTTP/1.1 4")
        return "" if answered and took < LONGEST_S else f"{name}: {took:.1f} s, {received[:200]!r}"

    memory = anonymous_mib(server)
    with ThreadPoolExecutor(8) as pool:
        wrong = [each for each in pool.map(one, REFUSED) if each]
    assert not wrong, wrong
    grown = anonymous_mib(server) - memory
    assert grown < 24, f"{grown:.1f} MiB more"


def test_pipelined_requests_are_answered_in_order(server: ServerProcess) -> None:
    with Wire(server.port) as wire:
        wire.send(GET * 500).until(b"HTTP/1.1 200 ", 500)
    prompts = [b"abc", b"bcd", b"cde"]
    many = b"".join(
        request_bytes(PATH, {"prompt": p.decode(), "max_tokens": 3, "ignore_eos": True})
        for p in prompts
    )
    with Wire(server.port) as wire:
        received = wire.send(many).until(b'"usage"', len(prompts))
    places = [received.index(b'"text":"' + prompt) for prompt in prompts]
    assert places == sorted(places)
    with Wire(server.port, timeout_s=2.0) as wire:  # behind a stream that nobody reads on
        wire.send(request_bytes(PATH, {"prompt": "abc", "stream": True}) + GOOD * 200)


def test_slow_headers_and_bodies_are_given_up(server: ServerProcess) -> None:
    def drip(whole: bytes) -> bytes:
        with Wire(server.port, timeout_s=LONGEST_S) as wire:
            return wire.send(*(whole[i : i + 1] for i in range(len(whole))), pause_s=0.1).rest()

    began = time.monotonic()
    body = request_bytes(PATH, {"prompt": "x" * 300})
    head, _, rest = body.partition(b"\r\n\r\n")
    with ThreadPoolExecutor(24) as pool:
        headers = [pool.submit(drip, GET) for _ in range(8)]
        bodies = [pool.submit(slow_body, server, head, rest) for _ in range(8)]
        assert all(b" 408 " in each.result()[:20] for each in [*headers, *bodies])
    assert time.monotonic() - began < LONGEST_S


def slow_body(server: ServerProcess, head: bytes, rest: bytes) -> bytes:
    with Wire(server.port, timeout_s=LONGEST_S) as wire:
        wire.send(head + b"\r\n\r\n")
        return wire.send(*(rest[i : i + 1] for i in range(30)), pause_s=0.1).rest()


def test_half_open_connections_are_let_go(server: ServerProcess) -> None:
    """Silent ones, and those whose other half has gone, before, in and behind a request."""
    cut = len(GOOD) - 5
    parts = (b"", GET[:20], GOOD[:cut], GOOD, request_bytes(PATH, {"prompt": "a", "stream": True}))
    held = []
    for part in parts:
        for half in (False, True) if part is not GOOD else (True,):
            wire = Wire(server.port, timeout_s=LONGEST_S).send(part)
            if half:
                wire.socket.shutdown(socket.SHUT_WR)
            held.append(wire)
    deadline = time.monotonic() + LONGEST_S
    for wire in held:
        wire.rest()
        wire.leave()
    assert time.monotonic() < deadline + 1, "some were held on to"


@pytest.mark.parametrize(
    "seconds", [5, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_random_bytes(server: ServerProcess, seconds: float) -> None:
    memory = anonymous_mib(server)
    with seeded() as rng:
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(4) as pool:
            sent = sum(pool.map(lambda r: noise(server, r, until), [spawn(rng) for _ in range(4)]))
        require_idle_and_whole(server)
        grown = anonymous_mib(server) - memory
        assert grown < 24, f"{grown:.1f} MiB more after {sent} connections"
    print(f"{sent} connections of noise; memory {grown:+.1f} MiB")


def spawn(rng: random.Random) -> random.Random:
    return random.Random(rng.randrange(1 << 30))


def noise(server: ServerProcess, rng: random.Random, until: float) -> int:
    """Connections of noise until then; each must be over before `LONGEST_S`."""
    count = 0
    while time.monotonic() < until:
        data = rng.choice(NOISES)(rng)
        began = time.monotonic()
        with Wire(server.port, timeout_s=LONGEST_S) as wire:
            wire.send(data)
            if rng.random() < 0.7:
                wire.socket.shutdown(socket.SHUT_WR)
                wire.rest()
                assert time.monotonic() - began < LONGEST_S, data[:500]
                assert b"HTTP/1.1 5" not in wire.received, (data[:500], wire.received[:500])
            wire.leave(reset=rng.random() < 0.5)
        count += 1
    return count


def any_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 4000))


def damaged(rng: random.Random) -> bytes:
    made = bytearray(rng.choice((GOOD, GET, CHUNKED + b"5\r\nabcde\r\n0\r\n\r\n")))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(made))
        made[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(made)


def spliced(rng: random.Random) -> bytes:
    parts = (b"\r\n", b":", b" ", b"\x00", POST, b"HTTP/1.1", b"Content-Length: 3\r\n", GET, HELLO,
             b"Transfer-Encoding: chunked\r\n", b"{", b'"', b"ffff\r\n", b"0\r\n\r\n")  # fmt: skip
    return b"".join(rng.choices(parts, k=rng.randint(1, 40)))


def frames(rng: random.Random) -> bytes:
    return struct.pack("<I", rng.randrange(1 << 32)) + rng.randbytes(300)


NOISES: tuple[Callable[[random.Random], bytes], ...] = (any_bytes, damaged, spliced, frames)
