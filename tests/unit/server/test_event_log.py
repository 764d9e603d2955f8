"""Readers come and go with places; every event reaches them once."""

from __future__ import annotations

import asyncio
import random
import re

import pytest

from coppice.errors import NotFoundError, RequestError, TakenOverError
from coppice.server import event_log
from coppice.server.event_log import EventLog
from coppice.server.stream import CLOSING

Events = list[tuple[int, bytes]]


def mixed(counts: list[int], rng: random.Random) -> Events:
    """The choices' events, each choice's in order, mixed at random."""
    order = [slot for slot, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(order)
    said = [0] * len(counts)
    made: Events = []
    for slot in order:
        said[slot] += 1
        made.append((slot, f"data: {slot}/{said[slot]}\n\n".encode()))
    return [*made, (CLOSING, b"data: [DONE]\n\n")]


async def gather(log: EventLog, place: str | None, most: int | None) -> list[str]:
    """Events as (place, data) lines; at most ``most`` of them, then the reader leaves."""
    text = b""
    async for chunk in log.read(log.place(place)):
        text += chunk
    found = re.findall(r"id: (\S+)\ndata: (\S+)", text.decode())
    assert text.endswith(b"data: [DONE]\n\n")
    return [f"{at} {data}" for at, data in found][:most]


@pytest.mark.parametrize("seed", range(30))
def test_every_event_comes_once_over_cuts_and_other_mixes(seed: int) -> None:
    rng = random.Random(seed)
    counts = [rng.randrange(1, 12) for _ in range(rng.randrange(1, 5))]

    async def play() -> list[str]:
        place, seen = None, []
        while True:
            log = EventLog(len(counts))  # a new process: the same events, mixed anew
            log.extend(mixed(counts, rng))
            log.end()
            got = await gather(log, place, rng.randrange(1, 8))
            if not got:
                return seen
            place = got[-1].split()[0]
            seen += [line.split()[1] for line in got]

    seen = asyncio.run(play())
    assert sorted(seen) == sorted(
        f"{slot}/{n + 1}" for slot, count in enumerate(counts) for n in range(count)
    )
    for slot in range(len(counts)):
        mine = [int(line.split("/")[1]) for line in seen if line.startswith(f"{slot}/")]
        assert mine == sorted(mine)


def test_a_second_reader_takes_over_from_one_that_waits_or_writes() -> None:
    async def play() -> None:
        log = EventLog(1)
        log.extend([(0, b"data: a\n\n")])
        first = log.read([0])
        assert await anext(first) == b"id: 1\ndata: a\n\n"
        waits = asyncio.ensure_future(anext(first))
        await asyncio.sleep(0)
        second = log.read([0])
        assert await anext(second) == b"id: 1\ndata: a\n\n"
        with pytest.raises(TakenOverError):
            await waits
        assert log.read_by_somebody
        log.extend([(0, b"data: b\n\n")])
        third = log.read([1])
        assert await anext(third) == b"id: 2\ndata: b\n\n"
        with pytest.raises(TakenOverError):
            await anext(second)
        await third.aclose()
        assert not log.read_by_somebody

    asyncio.run(play())


@pytest.mark.parametrize(
    "text", ["x", "1", "1.2.3", "1.", "-1.0", "1.2 ", "\uff11.2", "9" * 10 + ".1"]
)
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="no place"):
        EventLog(2).place(text)
    assert EventLog(2).place("") == EventLog(2).place(None) == [0, 0]


def test_a_place_may_be_ahead_of_a_stream_that_is_made_again_but_not_of_a_whole_one() -> None:
    log = EventLog(2)
    log.extend([(0, b"a"), (1, b"b")])
    assert log.place("7.1") == [7, 1]
    log.end()
    assert log.place("1.1") == [1, 1]
    with pytest.raises(RequestError, match="no place"):
        log.place("2.1")


def test_a_long_stream_is_held_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "KEPT_BYTES", 1000)
    monkeypatch.setattr(event_log, "CHUNK_BYTES", 100)

    async def play() -> None:
        log = EventLog(1)

        async def fill() -> None:
            for number in range(2000):
                log.extend([(0, f"data: {number}\n\n".encode())])
                await log.room(lambda: False)
            log.end()

        filling = asyncio.create_task(fill())
        await asyncio.sleep(0)
        assert 1000 < log.size_bytes < 1100, "nobody reads: no more is made"
        got, sizes = b"", []
        async for chunk in log.read(log.place(None)):
            got += chunk
            sizes.append(log.size_bytes)
            await asyncio.sleep(0)
        assert re.findall(rb"data: (\d+)", got) == [b"%d" % n for n in range(2000)]
        assert max(sizes) < 4000
        with pytest.raises(NotFoundError, match="kept"):
            log.place("100")
        with pytest.raises(NotFoundError):
            log.place(None)
        last = b"".join([chunk async for chunk in log.read(log.place("1950"))])
        assert re.findall(rb"data: (\d+)", last) == [b"%d" % n for n in range(1950, 2000)]
        await filling

    asyncio.run(asyncio.wait_for(play(), 10))


def test_who_is_given_up_need_not_wait_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "KEPT_BYTES", 10)

    async def play() -> None:
        log = EventLog(1)
        log.extend([(0, b"x" * 20)])
        waiting = asyncio.create_task(log.room(lambda: False))
        await asyncio.sleep(0)
        assert not waiting.done()
        log.take_all()
        await waiting
        log.extend([(0, b"x" * 20)])
        await log.room(lambda: False)

    asyncio.run(asyncio.wait_for(play(), 10))


def test_what_is_over_waits_for_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "KEPT_BYTES", 10)
    monkeypatch.setattr(event_log, "LOOK_S", 0.01)

    async def play() -> None:
        log, over = EventLog(1), asyncio.Event()
        log.extend([(0, b"x" * 20)])
        waiting = asyncio.create_task(log.room(over.is_set))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        over.set()
        await waiting

    asyncio.run(asyncio.wait_for(play(), 10))


def test_a_place_that_is_dropped_before_it_is_read_is_an_error_and_no_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_log, "KEPT_BYTES", 100)

    async def play() -> None:
        log = EventLog(1)
        log.extend([(0, b"x" * 20)] * 50)
        log.end()
        late = log.read(log.place("1"))
        async for _ in log.read(log.place(None)):
            pass
        with pytest.raises(NotFoundError):
            await anext(late)

    asyncio.run(asyncio.wait_for(play(), 10))
