"""A streaming HTTP client that costs next to nothing: it shares two cores with the server."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.workloads.azure import azure_lengths, text_tokens

Ending = Literal["finished", "refused", "failed", "left"]
TTFT_S, TPOT_S = 5.0, 0.2
"""What a request must meet to count as goodput."""
VOCAB, CONTEXT = 4000, 1900
REFUSED = (429, 503)


@dataclass(frozen=True)
class Ask:
    """One request, ready to be written: a POST to ``/v1/completions``.

    Attributes:
        data: head and body.
        prompt, answer: lengths in tokens.
    """

    data: bytes
    prompt: int
    answer: int


@dataclass(frozen=True)
class Told:
    """What became of a request; times are monotonic.

    Attributes:
        first_s: of the first token; ``None`` where none came.
        ended_s: of the last byte.
    """

    ask: Ask
    ending: Ending
    sent_s: float
    first_s: float | None
    ended_s: float
    why: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to the first token; infinite where none came."""
        return float("inf") if self.first_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first."""
        if self.first_s is None:
            return float("inf")
        return (self.ended_s - self.first_s) / max(1, self.ask.answer - 1)

    @property
    def good(self) -> bool:
        """Whether it counts as goodput."""
        return self.ending == "finished" and self.ttft_s <= TTFT_S and self.tpot_s <= TPOT_S


def make_ask(prompt: int, answer: int, number: int, **more: Any) -> Ask:
    """A request of these lengths that shares no prefix with another; ``more`` are fields."""
    body = json.dumps(
        {
            "prompt": text_tokens(prompt, VOCAB, number), "max_tokens": answer, "seed": number,
            "temperature": 0.7, "ignore_eos": True, "stream": True, "cache_prompt": False, **more,
        }
    ).encode()  # fmt: skip
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return Ask(head.encode() + body, prompt, answer)


def conversation(count: int, *, seed: int, divide: float = 4.0, first: int = 0) -> Iterator[Ask]:
    """Requests with lengths of the Azure conversation trace, divided so that they fit.

    Those of another ``first`` have the same lengths and other tokens.
    """
    lengths = azure_lengths(min(count, 2000), divide=divide, max_context=CONTEXT, seed=seed)
    for number in range(count):
        each = lengths[number % len(lengths)]
        yield make_ask(each.prompt, each.answer, seed * 100_000 + first + number)


async def send(port: int, ask: Ask, *, patience_s: float = 120.0, leave_after: int = 0) -> Told:
    """Send a request and read its answer.

    Args:
        port: of this machine.
        ask: the request.
        patience_s: after which the client gives up: ``failed``.
        leave_after: close the connection after so many events, 0 for never: ``left``.
    """
    sent_s = time.monotonic()
    reading = _Reading(leave_after)
    try:
        async with asyncio.timeout(patience_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(ask.data)
                await reading.read(reader)
            finally:
                writer.transport.abort() if leave_after else writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        reading.ending, reading.why = "failed", repr(error)
    return Told(ask, reading.ending, sent_s, reading.first_s, time.monotonic(), reading.why)


class _Reading:
    def __init__(self, leave_after: int) -> None:
        self.ending: Ending = "failed"
        self.first_s: float | None = None
        self.why = ""
        self._left = leave_after

    async def read(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status != 200:
            self.ending = "refused" if status in REFUSED else "failed"
            self.why = f"{status}: {(await reader.read(300))!r}"
            return
        last = b""
        while piece := await reader.read(1 << 16):
            if self.first_s is None and b"data: {" in piece:
                self.first_s = time.monotonic()
            last = last[-200:] + piece
            if self._left:
                self._left -= piece.count(b"data: {")
                if self._left <= 0:
                    self.ending = "left"
                    return
            if b"data: [DONE]" in last:
                break
        done = b"data: [DONE]" in last and b"event: error" not in last and self.first_s is not None
        self.ending = "finished" if done else "failed"
        self.why = "" if done else repr(last[-300:])


async def poisson(
    port: int, asks: Iterable[Ask], rate: float, *, seconds: float, seed: int
) -> list[Told]:
    """Requests at random moments, ``rate`` a second; returns when all have ended."""
    rng, sending = random.Random(seed), []
    began = at = time.monotonic()
    for ask in asks:
        at += rng.expovariate(rate)
        if at > began + seconds:
            break
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        sending.append(asyncio.create_task(send(port, ask)))
    return list(await asyncio.gather(*sending))


async def closed(port: int, asks: Iterable[Ask], clients: int, *, seconds: float) -> list[Told]:
    """So many clients, each with one request at a time, until the time is over.

    Who is refused asks the same again, a little later.
    """
    told: list[Told] = []
    until, rng = time.monotonic() + seconds, random.Random(clients)
    left = iter(asks)

    async def work() -> None:
        ask = next(left, None)
        while time.monotonic() < until and ask is not None:
            told.append(await send(port, ask))
            if told[-1].ending == "refused":
                await asyncio.sleep(rng.uniform(0.25, 1.0))
            else:
                ask = next(left, None)

    await asyncio.gather(*(work() for _ in range(clients)))
    return told


def goodput(told: Sequence[Told]) -> float:
    """Good requests a second, from the first one sent to the last one ended."""
    if not told:
        return 0.0
    seconds = max(t.ended_s for t in told) - min(t.sent_s for t in told)
    return sum(t.good for t in told) / seconds


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all lie at or below; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
