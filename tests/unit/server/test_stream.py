"""A stream that cannot even begin is over all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import Message

from coppice.server.stream import EventStream


async def nothing() -> AsyncGenerator[bytes, None]:
    yield b""


def test_its_owner_is_told_where_not_even_the_head_can_be_written() -> None:
    told: list[bool] = []

    async def play() -> None:
        async def blocked(message: Message) -> None:
            del message
            await asyncio.Event().wait()

        async def silent() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        stream = EventStream(
            nothing(), headers={}, ping_s=1.0, slow_reader_s=0.05, closed=lambda: told.append(True)
        )
        await asyncio.wait_for(stream({"type": "http"}, silent, blocked), 5)

    asyncio.run(play())
    assert told == [True]
