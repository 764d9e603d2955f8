"""The life of one generation call: ledger, places, deadline, cancellation, log line."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from coppice.engine.messages import CancelReason
from coppice.server.admission import Permit
from coppice.server.generation import Delta, Generation
from coppice.server.keys import Key
from coppice.server.ledger import Entry, Outcome
from coppice.server.timeline import Timeline

log = logging.getLogger("coppice.server.calls")
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass(slots=True)
class Call:
    """One accepted generation call.

    Attributes:
        id: of the reply (``chatcmpl-…``, ``cmpl-…``).
        request_id: of the HTTP request; also names it for cancellation.
        deadline: monotonic time.
        permit: its place, once admitted.
        generation: once submitted.
        resumable: its stream can be taken up.
    """

    id: str
    request_id: str
    route: str
    key: Key
    entry: Entry
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    permit: Permit | None = None
    generation: Generation | None = None
    cancelled: CancelReason | None = None
    resumable: bool = False

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        """End it now; its reply holds what there is."""
        self.cancelled = reason
        if self.generation is not None:
            self.generation.cancel(reason)


class Calls:
    """All live calls; a call is held from arrival to end and leaves one log line."""

    def __init__(self, observe: Observer) -> None:
        self._live: dict[str, Call] = {}
        self.timeline = Timeline()
        self._observe = observe

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[Call]:
        """Those that run, oldest first."""
        return list(self._live.values())

    def hold(self, call: Call) -> None:
        """Begin a call that `settle` ends."""
        self._live[call.id] = call
        self.timeline.begin(call)

    def settle(self, call: Call) -> None:
        """Give back the place, count the outcome and write the line; once."""
        if self._live.pop(call.id, None) is None:
            return
        if call.generation is not None:
            call.generation.abandon()  # its deltas may never have been asked for
        if call.permit is not None:
            call.permit.release()
        call.entry.close("cancelled")  # unless it was closed by how it ended
        assert call.entry.outcome is not None
        self._observe.call_ended(call, call.entry.outcome)
        self.timeline.end(call, call.entry.outcome)
        _write_line(call, call.entry.outcome)

    def cancel(self, request_id: str, tenant: str | None) -> int:
        """Cancel the calls of this id that belong to the tenant; returns how many."""
        found = [
            call
            for call in self._live.values()
            if request_id in (call.id, call.request_id)
            and (tenant is None or call.key.tenant == tenant)
        ]
        for call in found:
            call.cancel()
        return len(found)


class Observer(Protocol):
    """Told when a call has ended; metrics implement it."""

    def call_ended(self, call: Call, outcome: Outcome) -> None:
        """Count a call."""
        ...


async def run(call: Call) -> AsyncGenerator[list[Delta], None]:
    """The call's deltas; closes its ledger entry by how it ended.

    Raises:
        EngineError: the engine failed it.
    """
    assert call.generation is not None
    with accounted(call):
        async with aclosing(call.generation.deltas()) as batches:
            async for batch in batches:
                yield batch


@contextmanager
def accounted(call: Call) -> Iterator[None]:
    """Close the ledger entry by how the work on an admitted call's answer ends."""
    assert call.generation is not None
    try:
        yield
    except Exception:  # whatever it is: it had been let in
        call.entry.close("failed")
        raise
    call.entry.close(call.generation.ending)


def new_id(prefix: str) -> str:
    """An id nobody can guess, so that nobody can cancel it by guessing."""
    return f"{prefix}-{secrets.token_hex(12)}"


def _write_line(call: Call, outcome: Outcome) -> None:
    generation, now = call.generation, time.monotonic()
    if generation is None:
        log.info("%s %s %s key=%s outcome=%s e2e_s=%.3f", call.request_id, call.id, call.route,
                 call.key.name, outcome, now - call.arrived)  # fmt: skip
        return
    first = generation.first_token_s
    log.info(
        "%s %s %s key=%s outcome=%s prompt=%d cached=%d completion=%d ttft_s=%.3f e2e_s=%.3f",
        call.request_id, call.id, call.route, call.key.name, outcome, generation.prompt_tokens,
        generation.cached_tokens, generation.completion_tokens,
        first - call.arrived if first else float("nan"), now - call.arrived,
    )  # fmt: skip
