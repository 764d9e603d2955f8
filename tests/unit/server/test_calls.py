"""How a call that was let in ends in the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from coppice.errors import GrammarError
from coppice.server.calls import Call, accounted, run
from coppice.server.generation import Delta
from coppice.server.keys import ANONYMOUS
from coppice.server.ledger import Ledger
from coppice.server.serving import events_of
from coppice.server.stream import Pieces


def call_of(deltas: AsyncGenerator[list[Delta], None]) -> Call:
    generation: Any = SimpleNamespace(deltas=lambda: deltas)
    entry = Ledger().open()
    return Call("c", "r", "completions", ANONYMOUS, entry, deadline=0.0, generation=generation)


def test_what_goes_wrong_after_admission_is_no_refusal() -> None:
    async def deltas() -> AsyncGenerator[list[Delta], None]:
        raise GrammarError("It grows too complex.")
        yield []

    call = call_of(deltas())

    async def play() -> None:
        async for _ in run(call):
            pass

    with pytest.raises(GrammarError):
        asyncio.run(play())
    assert call.entry.outcome == "failed"


def test_a_stream_whose_events_cannot_be_made_says_so_and_has_failed() -> None:
    async def deltas() -> AsyncGenerator[list[Delta], None]:
        yield []

    call = call_of(deltas())
    settled: list[Call] = []
    services: Any = SimpleNamespace(calls=SimpleNamespace(settle=settled.append))

    async def chunks() -> Pieces:
        async for _ in run(call):
            raise ZeroDivisionError
        yield []

    async def play() -> bytes:
        return b"".join([data async for batch in events_of(services, call, chunks())
                         for _, data in batch])  # fmt: skip

    said = asyncio.run(play())
    assert b"log says why" in said and said.endswith(b"[DONE]\n\n")
    assert call.entry.outcome == "failed" and settled == [call]


def test_an_answer_that_is_there_but_cannot_be_told_has_failed() -> None:
    async def deltas() -> AsyncGenerator[list[Delta], None]:
        yield []

    call = call_of(deltas())
    with pytest.raises(ZeroDivisionError), accounted(call):
        raise ZeroDivisionError
    assert call.entry.outcome == "failed"


def test_a_librarys_panic_is_a_failure_and_what_the_server_gives_up_is_cancelled() -> None:
    class PanicError(BaseException):
        pass

    for error, outcome in ((PanicError(), "failed"), (asyncio.CancelledError(), "cancelled")):
        entry = Ledger().open()
        entry.close_by_error(error)
        assert entry.outcome == outcome
