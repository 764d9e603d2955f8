"""Streams that outlive their connection and, with the journal, this process.

A client asks for it with ``X-Resumable: true``. Its call then runs in a task of its own,
whose events are kept. When the client is gone it runs on for ``resume_s``; who comes back in
that time, or within `KEPT_S` of the end, is sent what it has not seen.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from coppice.engine.messages import Output
from coppice.errors import (
    CapacityError,
    EngineError,
    NameInUseError,
    NotFoundError,
    TakenOverError,
)
from coppice.server.calls import Call
from coppice.server.errors import error_body
from coppice.server.event_log import EventLog
from coppice.server.journal import Accepted, Journal, Recorded
from coppice.server.stream import CLOSING, DONE, Pieces, event

log = logging.getLogger("coppice.server")

HEADER = "X-Resumable"
KEPT_S, KEPT_BYTES = 600.0, 32 << 20
"""How long ended calls can be taken up, and what they may take together."""
SWEEP_S = 30.0


@dataclass(slots=True)
class Resumable:
    """A call that can be taken up.

    Attributes:
        call: id of its reply; ``request_id`` of the HTTP request that brought it.
        log: its events; ``None`` while there is but the journal's record of it.
        running: the call, until it has ended.
        ended: monotonic time.
        leaving: cancels it for want of a reader.
    """

    call: str
    request_id: str
    tenant: str
    log: EventLog | None = None
    recorded: Recorded | None = None
    running: Call | None = None
    ended: float | None = None
    leaving: asyncio.TimerHandle | None = None

    def is_over(self) -> bool:
        """Whether it was ended, or its time is up: nobody is waited for then."""
        call = self.running
        return call is None or call.cancelled is not None or time.monotonic() >= call.deadline

    @property
    def size_bytes(self) -> int:
        """What it takes, in memory or in the journal."""
        held = self.log or self.recorded
        return held.size_bytes if held is not None else 0


class Resumables:
    """The calls that can be taken up.

    Args:
        journal: where they are written down; without it there are none.
        resume_s: how long a call runs without a reader.

    Invariant: a call runs for at most ``resume_s`` without a reader; ended ones are kept for at
    most `KEPT_S` and in at most `KEPT_BYTES`.
    """

    def __init__(self, journal: Journal | None, resume_s: float) -> None:
        self.journal = journal
        self.resume_s = resume_s
        self._known: dict[str, Resumable] = {}
        self._ended: OrderedDict[str, int] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self.taken_up = 0

    @property
    def on(self) -> bool:
        """Whether new calls may be made resumable."""
        return self.journal is not None and self.journal.on

    @property
    def waiting(self) -> int:
        """Calls that run without a reader."""
        return sum(known.leaving is not None for known in self._known.values())

    def hearer(self, call: str) -> Callable[[Output], None]:
        """Writes down what the engine says of a call."""
        assert self.journal is not None
        return partial(self.journal.hear, call)

    def accept(
        self, accepted: Accepted, pieces: Pieces, call: Call
    ) -> tuple[Resumable, asyncio.Future[None]]:
        """Run a new call; nothing of it may be sent before the future is done.

        Raises:
            CapacityError: it is too late: the next process would not know of it.
        """
        assert self.journal is not None
        if self.journal.frozen:
            raise CapacityError(
                "The server is shutting down; send the request again when it is back.",
                retry_after_s=1.0, code="draining",
            )  # fmt: skip
        written = self.journal.accept(accepted)
        return self.run(call, EventLog(slots_of(accepted)), pieces), written

    def run(self, call: Call, events: EventLog, pieces: Pieces) -> Resumable:
        """Run a call; it waits ``resume_s`` for its reader."""
        known = Resumable(call.id, call.request_id, call.key.tenant, events, running=call)
        self._known[call.id] = known
        self._left(known)
        self.fill(known, pieces)
        return known

    def remember(self, known: Resumable) -> None:
        """Keep a call that has ended, for late readers."""
        known.running, known.ended = None, known.ended or time.monotonic()
        if known.leaving is not None:
            known.leaving.cancel()
            known.leaving = None
        self._known[known.call] = known
        self._ended[known.call] = known.size_bytes
        self._trim()

    def fill(self, known: Resumable, pieces: Pieces) -> None:
        """Make its events, in a task."""
        task = asyncio.create_task(self._fill(known, pieces), name=f"call-{known.call}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def require_free(self, request_id: str, tenant: str, live: Iterable[Call]) -> None:
        """Refuse a second call under the name of one that runs: one of them could not be found.

        Args:
            request_id: the name.
            tenant: whose.
            live: all calls, also those that have yet to be let in.

        Raises:
            RequestError: 409, there is one.
        """
        names = {(c.request_id, c.key.tenant) for c in live if c.resumable}
        names |= {(k.request_id, k.tenant) for k in self._known.values() if k.running is not None}
        if (request_id, tenant) in names:
            raise NameInUseError(
                f"A stream named {request_id} runs already; take it up, or send another "
                "X-Request-Id.", param="X-Request-Id",
            )  # fmt: skip

    def find(self, request_id: str, tenant: str | None) -> Resumable:
        """The newest call of this id that belongs to the tenant; any, if that is ``None``.

        Raises:
            NotFoundError: there is none.
        """
        for known in reversed(self._known.values()):
            if request_id in (known.call, known.request_id) and tenant in (None, known.tenant):
                return known
        if self.journal is None:
            raise NotFoundError(
                "This server keeps no journal, so that no stream can be taken up; start it with "
                "--journal DIR.", param="request_id", code="not_resumable",
            )  # fmt: skip
        raise NotFoundError(
            f"No stream of that id can be taken up: it was not sent with {HEADER}: true, was not "
            f"accepted, or ended more than {KEPT_S / 60:.0f} minutes ago. Send the request anew.",
            param="request_id", code="not_resumable",
        )  # fmt: skip

    async def read(
        self, known: Resumable, seen: list[int] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """What a reader with this place has not seen, until the end or until another comes."""
        assert known.log is not None
        seen = known.log.place(None) if seen is None else seen
        if known.leaving is not None:
            known.leaving.cancel()
            known.leaving = None
        try:
            async with aclosing(known.log.read(seen)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (NotFoundError, TakenOverError) as error:
            yield event(error_body(error, known.request_id), "error") + DONE
        finally:
            if not known.log.read_by_somebody:
                self._left(known)

    def freeze(self) -> None:
        """What has not ended now stays in the journal, for the next process."""
        if self.journal is not None:
            self.journal.freeze()

    async def close(self) -> None:
        """Forget all; the journal keeps what it has."""
        self.freeze()
        for known in self._known.values():
            if known.leaving is not None:
                known.leaving.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.journal is not None:
            await self.journal.close()

    def sweep(self) -> None:
        """Forget what ended too long ago, now and from time to time."""
        self._trim()
        asyncio.get_running_loop().call_later(SWEEP_S, self.sweep)

    def _left(self, known: Resumable) -> None:
        if known.running is not None and known.leaving is None:
            loop = asyncio.get_running_loop()
            known.leaving = loop.call_later(self.resume_s, self._give_up, known)

    @staticmethod
    def _give_up(known: Resumable) -> None:
        assert known.log is not None
        assert known.running is not None
        known.running.cancel()
        known.log.take_all()

    async def _fill(self, known: Resumable, pieces: Pieces) -> None:
        assert known.log is not None
        try:
            async with aclosing(pieces):
                async for batch in pieces:
                    known.log.extend(batch)
                    await known.log.room(known.is_over)
        except Exception:
            log.exception("%s: its events could not be made", known.call)
            error = EngineError("The answer could not be made; the server's log says why.")
            known.log.extend([(CLOSING, event(error_body(error, known.request_id), "error"))])
        finally:
            known.log.end()
            if self.journal is not None and known.running is not None:
                self.journal.end(known.call, known.running.entry.outcome or "failed")
            self.remember(known)

    def _trim(self) -> None:
        oldest_s = time.monotonic() - KEPT_S
        total = sum(self._ended.values())
        for call in list(self._ended):
            known = self._known[call]
            if total <= KEPT_BYTES and (known.ended or 0.0) > oldest_s:
                break
            if known.log is not None and known.log.read_by_somebody:
                continue
            total -= self._ended.pop(call)
            del self._known[call]
            if self.journal is not None:
                self.journal.forget(call)


def slots_of(accepted: Accepted) -> int:
    """Counts in a place of its stream: one a choice, one more for the usage if asked for."""
    choices = sum(request.sampling.n for request in accepted.requests)
    return choices + wants_usage(json.loads(accepted.body))


def wants_usage(body: dict[str, Any]) -> bool:
    """Whether a JSON body asks for a usage chunk."""
    return bool((body.get("stream_options") or {}).get("include_usage"))
