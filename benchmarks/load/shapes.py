"""The loads: saturation, burst, crowd, slow readers, idle connections."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import httpx
import psutil

from benchmarks.load.client import (
    Ask,
    Ending,
    Told,
    closed,
    conversation,
    goodput,
    make_ask,
    percentile,
    poisson,
    send,
)
from benchmarks.scorecard.subjects import Running

FACTORS = (0.7, 1.0, 1.5, 3.0)
CLIENTS = 32
CLASSES = (16, 64, 256, 1024, 1800)
BURST = 1000
SETTLE_S = 6.0
"""Of each level of saturation nothing is counted that was sent earlier: a standing queue is
borne for two seconds and drained after that."""
LET_IN_S = 300.0
"""For a hundred long streams."""
OK = b"HTTP/1.1 200"


@dataclass(frozen=True)
class Level:
    """One level of saturation.

    Attributes:
        factor: offered load, in capacities.
        refusal_s: time until a refusal was read, at p99; NaN without one.
    """

    factor: float
    goodput: float
    ttft_p50_s: float
    ttft_p99_s: float
    refusal_s: float
    endings: dict[str, int] = field(default_factory=dict)
    why: str = ""


def capacity(server: Running, seconds: float) -> float:
    """Good requests a second of a crowd that always has the next one ready."""
    warm_up_s = min(4.0, seconds)
    asyncio.run(closed(server.port, conversation(4000, seed=11), CLIENTS, seconds=warm_up_s))
    told = asyncio.run(closed(server.port, conversation(4000, seed=1), CLIENTS, seconds=seconds))
    return goodput(told)


def saturation(server: Running, at_capacity: float, seconds: float) -> list[Level]:
    """Poisson arrivals at each of `FACTORS`."""
    levels = []
    for number, factor in enumerate(FACTORS):
        rate = factor * at_capacity
        asks = list(conversation(int(1.3 * rate * seconds) + 50, seed=2 + number))
        told = asyncio.run(poisson(server.port, asks, rate, seconds=seconds, seed=number))
        from_s = min(t.sent_s for t in told) + SETTLE_S
        levels.append(level(factor, [t for t in told if t.sent_s >= from_s]))
    return levels


def level(factor: float, told: Sequence[Told]) -> Level:
    """The figures of one level."""
    admitted = [t for t in told if t.ending == "finished"]
    refused = [t.ended_s - t.sent_s for t in told if t.ending == "refused"]
    return Level(
        factor,
        goodput(told),
        percentile([t.ttft_s for t in admitted], 0.5),
        percentile([t.ttft_s for t in admitted], 0.99),
        percentile(refused, 0.99),
        _count(told),
        next((t.why for t in told if t.ending == "failed"), ""),
    )


def _count(told: Sequence[Told]) -> dict[str, int]:
    """How many ended in which way, every way named."""
    counts = Counter(t.ending for t in told)
    return {ending: counts[ending] for ending in get_args(Ending)}


@dataclass(frozen=True)
class Burst:
    """A thousand requests in a second, then silence.

    Attributes:
        empty_s: until the last one ended, from the first one's sending.
        predicted_s: those admitted over the capacity.
    """

    endings: dict[str, int]
    empty_s: float
    predicted_s: float


def burst(server: Running, at_capacity: float, *, patience_s: float) -> Burst:
    """`BURST` requests at random moments of one second."""
    asks, rng = list(conversation(BURST, seed=9)), random.Random(9)

    async def one(ask: Ask, wait_s: float) -> Told:
        await asyncio.sleep(wait_s)
        return await send(server.port, ask, patience_s=patience_s)

    async def all_() -> list[Told]:
        return list(await asyncio.gather(*(one(ask, rng.random()) for ask in asks)))

    began = time.monotonic()
    told = asyncio.run(all_())
    finished = sum(t.ending == "finished" for t in told)
    empty_s = max(t.ended_s for t in told) - began
    return Burst(_count(told), empty_s, finished / at_capacity)


@dataclass(frozen=True)
class Crowd:
    """Closed-loop clients with prompts from short to long; times by prompt length.

    Attributes:
        refused: attempts.
        waits_s: longest time to a first token of those that were let in.
        asked_s: the same from a request's first attempt, refusals and pauses included.
    """

    endings: dict[str, int]
    refused: dict[int, int]
    waits_s: dict[int, float]
    asked_s: dict[int, float]
    goodput: float


def solo(server: Running) -> float:
    """Seconds that the shortest class of a crowd takes alone, from sending to the last byte."""
    told = [asyncio.run(send(server.port, make_ask(CLASSES[0], 32, 7 + i))) for i in range(5)]
    return statistics.median(t.ended_s - t.sent_s for t in told)


def crowd(server: Running, seconds: float, clients: int = 64) -> Crowd:
    """64 clients; each of `CLASSES` is asked for equally often."""
    rng = random.Random(4)
    asks = (make_ask(rng.choice(CLASSES), 32, 10_000 + i) for i in range(100_000))
    told = asyncio.run(closed(server.port, asks, clients, seconds=seconds))
    first: dict[Ask, float] = {}
    for t in told:
        first.setdefault(t.ask, t.sent_s)
    waits_s, asked_s = dict.fromkeys(CLASSES, 0.0), dict.fromkeys(CLASSES, 0.0)
    for t in told:
        if t.first_s is not None:
            length = t.ask.prompt
            waits_s[length] = max(waits_s[length], t.ttft_s)
            asked_s[length] = max(asked_s[length], t.first_s - first[t.ask])
    refused = Counter(t.ask.prompt for t in told if t.ending == "refused")
    return Crowd(_count(told), dict(refused), waits_s, asked_s, goodput(told))


@dataclass(frozen=True)
class Slow:
    """Clients that read one byte a second, beside others.

    Attributes:
        readers: slow ones that had been let in when the others were measured beside them.
        alone, beside: tokens a second of the normal ones, without (before and after, the mean)
            and with them.
        grown_mib: memory the server took for them, at most.
        failed: normal ones.
    """

    readers: int
    alone: float
    beside: float
    grown_mib: float
    failed: int


def slow_readers(server: Running, seconds: float, *, slow: int = 100, normal: int = 16) -> Slow:
    """Normal clients before and while ``slow`` long streams are hardly read.

    They are measured when the server computes for the slow ones no longer: because those wait
    for their readers, or because their answers are whole and lie in its memory.
    """
    windows = [conversation(10_000, seed=12, first=20_000 * number) for number in range(4)]
    asyncio.run(closed(server.port, windows[3], normal, seconds=2.0))
    first = asyncio.run(closed(server.port, windows[0], normal, seconds=seconds))
    before = anonymous_mib(server.family())

    async def both() -> tuple[int, list[Told], float]:
        stop, let_in = asyncio.Event(), set[int]()
        watch = asyncio.create_task(_watch(server, stop))
        readers = [asyncio.create_task(_read_slowly(server.port, i, let_in)) for i in range(slow)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LET_IN_S):
                while len(let_in) < slow or await asyncio.to_thread(_busy, server):
                    await asyncio.sleep(0.5)
        count = len(let_in)
        told = await closed(server.port, windows[1], normal, seconds=seconds)
        stop.set()
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        return count, told, await watch

    count, second, peak = asyncio.run(both())
    third = asyncio.run(closed(server.port, windows[2], normal, seconds=seconds))
    failed = sum(t.ending == "failed" for t in [*first, *second, *third])
    alone = (_tokens_s(first) + _tokens_s(third)) / 2
    return Slow(count, alone, _tokens_s(second), peak - before, failed)


def fill_pages(server: Running) -> None:
    """Long prompts until Coppice's prefix cache has touched (nearly) every page."""
    url = f"http://127.0.0.1:{server.port}/v1/coppice/info"
    for number in range(200):
        engine = httpx.get(url).json()["engine"]
        if engine and engine["pages_cached"] > 0.95 * engine["num_pages"]:
            return
        asyncio.run(send(server.port, make_ask(1800, 2, 90_000_000 + number)))


def _tokens_s(told: Sequence[Told]) -> float:
    seconds = max(t.ended_s for t in told) - min(t.sent_s for t in told)
    return sum(t.ask.prompt + t.ask.answer for t in told if t.ending == "finished") / seconds


async def _read_slowly(port: int, number: int, let_in: set[int]) -> None:
    """Ask for a long stream until it is let in, then read a byte a second."""
    loop = asyncio.get_running_loop()
    ask = make_ask(100, 1500, 50_000 + number, logprobs=1)
    while number not in let_in:
        with contextlib.suppress(ConnectionError), _small_window() as raw:
            raw.setblocking(False)
            await loop.sock_connect(raw, ("127.0.0.1", port))
            await loop.sock_sendall(raw, ask.data)
            head = b""
            while len(head) < len(OK) and (piece := await loop.sock_recv(raw, len(OK) - len(head))):
                head += piece
            if head == OK:
                let_in.add(number)
                while await loop.sock_recv(raw, 1):
                    await asyncio.sleep(1.0)
        await asyncio.sleep(1.0)


async def _watch(server: Running, stop: asyncio.Event) -> float:
    peak = 0.0
    while not stop.is_set():
        peak = max(peak, await asyncio.to_thread(anonymous_mib, server.family()))
        await asyncio.sleep(0.25)
    return peak


def _busy(server: Running) -> bool:
    """Whether the server computes: its processes take more than half a core."""
    before = _cpu_s(server)
    time.sleep(0.5)
    return _cpu_s(server) - before > 0.25


def _cpu_s(server: Running) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in server.family())


def anonymous_mib(processes: Iterable[psutil.Process]) -> float:
    """Memory of these processes that no file stands behind."""
    total = 0
    for process in processes:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                total += int(line.split()[1])
    return total / 1024


@dataclass(frozen=True)
class Idle:
    """Connections that are held open and say nothing.

    Attributes:
        streams: that were let in, most of them to wait, and are not read.
        connections: that had one answer and were kept for a next request.
        open: of these, how many the server had not closed when the streams had been sent.
        grown_mib: memory the server took from then until it was quiet, at most.
        answered_s: until another request was answered that came after the streams.
    """

    streams: int
    connections: int
    open: int
    grown_mib: float
    answered_s: float


def idle_connections(server: Running, *, streams: int = 200, others: int = 800) -> Idle:
    """Idle streams and idle connections; one request among them."""
    before, held = anonymous_mib(server.family()), []
    live = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    try:
        kept = [_ask_and_hold(server.port, live) for _ in range(others)]
        held += kept
        well = sum(_begins_well(raw, timeout_s=20.0) for raw in kept)
        for number in range(streams):
            ask = make_ask(100, 200, 60_000 + number).data
            held.append(_ask_and_hold(server.port, ask))
        time.sleep(0.5)
        peak, still = anonymous_mib(server.family()), sum(map(_is_open, kept))
        told = asyncio.run(send(server.port, make_ask(16, 8, 3), patience_s=60.0))
        give_up = time.monotonic() + LET_IN_S
        while _busy(server) and time.monotonic() < give_up:
            peak = max(peak, anonymous_mib(server.family()))
        begun = sum(_begins_well(raw, timeout_s=120.0) for raw in held[others:])
    finally:
        for raw in held:
            raw.close()
    answered_s = told.ended_s - told.sent_s if told.ending == "finished" else float("inf")
    return Idle(begun, well, still, peak - before, answered_s)


def _small_window() -> socket.socket:
    """A socket whose system reads ahead as little as it can."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    return raw


def _ask_and_hold(port: int, data: bytes) -> socket.socket:
    """A connection with a small window on which something was asked."""
    raw = _small_window()
    raw.settimeout(20.0)
    raw.connect(("127.0.0.1", port))
    raw.sendall(data)
    return raw


def _begins_well(raw: socket.socket, *, timeout_s: float) -> bool:
    """Whether the answer's head says 200; little else is read."""
    raw.settimeout(timeout_s)
    try:
        return raw.recv(64).startswith(OK)
    except (TimeoutError, ConnectionError):
        return False


def _is_open(raw: socket.socket) -> bool:
    """Whether there is more to read, or nothing yet, and no end."""
    raw.setblocking(False)
    try:
        while raw.recv(1 << 16):
            pass
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    return False
