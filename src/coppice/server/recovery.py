"""From the journal's records to calls that run: what a restart of this process begins with."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from coppice.engine.messages import ModelFacts
from coppice.errors import EngineDeadError
from coppice.server import admission
from coppice.server.admission import Permit
from coppice.server.calls import Call
from coppice.server.errors import error_body
from coppice.server.event_log import EventLog
from coppice.server.generation import Generation
from coppice.server.journal import Accepted, Recorded
from coppice.server.keys import Key
from coppice.server.ledger import Ledger
from coppice.server.replies import Frame
from coppice.server.resumable import Resumable, slots_of, wants_usage
from coppice.server.routes import chat, completions
from coppice.server.services import Services
from coppice.server.serving import Route, events_of
from coppice.server.stream import CLOSING, DONE, Pieces, event
from coppice.server.text import TextService

log = logging.getLogger("coppice.server.journal")

Reframe = Callable[[dict[str, Any], Frame, Generation, TextService], Pieces]
_ROUTES: dict[str, tuple[Route, Reframe]] = {
    chat.ROUTE.path: (chat.ROUTE, chat.reframe),
    completions.ROUTE.path: (completions.ROUTE, completions.reframe),
}
_OTHER_MODEL = "The server came back with another model; send the request anew."


async def recover(services: Services, text: TextService, facts: ModelFacts) -> None:
    """Run on with what had not ended, and keep what had for late readers."""
    streams = services.streams
    if streams.journal is None:
        return
    unfinished = 0
    for recorded in await streams.journal.open():
        accepted, ended = recorded.accepted, recorded.ended
        key = services.keys.named(accepted.key)
        known = Resumable(accepted.call, accepted.request_id, accepted.tenant, recorded=recorded)
        if key is None or key.tenant != accepted.tenant:  # nobody may ask for this any more
            streams.journal.end(accepted.call, "cancelled")
            streams.journal.forget(accepted.call)
        elif ended is not None:
            known.ended = time.monotonic() + min(0.0, ended.at.in_s)
            streams.remember(known)
        elif accepted.fingerprint != facts.fingerprint or accepted.route not in _ROUTES:
            services.ledger.open().close("failed")
            streams.journal.end(accepted.call, "failed")
            streams.remember(known)
        else:
            unfinished += _run_on(services, text, recorded, key)
    if unfinished:
        log.warning("%d requests of the process before run on.", unfinished)
    streams.sweep()


def _run_on(services: Services, text: TextService, recorded: Recorded, key: Key) -> bool:
    """Whether a call that had not ended could be gone on with; the others must not suffer."""
    call = _call(services, recorded.accepted, key, counted=True)
    try:
        events, pieces = _events(services, text, recorded, call)
    except Exception:
        log.exception("%s could not be gone on with", call.id)
        call.entry.close("failed")
        services.calls.settle(call)
        assert services.streams.journal is not None
        services.streams.journal.end(call.id, "failed")
        services.streams.journal.forget(call.id)
        return False
    services.streams.run(call, events, pieces)
    return True


def wake(services: Services, known: Resumable) -> EventLog:
    """The events of a call, made again if only the journal has them."""
    if known.log is not None:
        return known.log
    assert known.recorded is not None
    accepted, facts, text = known.recorded.accepted, services.engine.facts, services.require_text()
    key = services.keys.named(accepted.key)
    if facts is None or accepted.fingerprint != facts.fingerprint or key is None:
        known.log = EventLog(slots_of(accepted))
        error = EngineDeadError(_OTHER_MODEL, code="model_changed")
        known.log.extend([(CLOSING, event(error_body(error, known.request_id), "error") + DONE)])
        known.log.end()
        return known.log
    call = _call(services, accepted, key, counted=False)
    known.log, pieces = _events(services, text, known.recorded, call)
    known.recorded = None
    known.log.take_all()  # all of it has been made before
    services.streams.fill(known, pieces)
    return known.log


def _call(services: Services, accepted: Accepted, key: Key, *, counted: bool) -> Call:
    """The call as it was; ``counted`` in the ledger and held, if it has not ended."""
    ledger = services.ledger if counted else Ledger()
    call = Call(
        id=accepted.call, request_id=accepted.request_id, route=accepted.route, key=key,
        entry=ledger.open(), deadline=time.monotonic() + _left_s(accepted),
        created=accepted.created,
    )  # fmt: skip
    if counted:
        services.calls.hold(call)
    return call


def _left_s(accepted: Accepted) -> float:
    return max(accepted.deadline.in_s, 1e-3)


def _events(
    services: Services, text: TextService, recorded: Recorded, call: Call
) -> tuple[EventLog, Pieces]:
    """Submit what has not ended, and make the events from the first token on."""
    accepted, facts = recorded.accepted, services.engine.facts
    assert facts is not None
    route, reframe = _ROUTES[accepted.route]
    requests = [replace(request, deadline_s=_left_s(accepted)) for request in accepted.requests]
    if call.entry.counted_by(services.ledger):
        load = admission.exact(requests, facts.page_size)
        services.admission.take(call.key.tenant, load)
        call.permit = Permit(services.admission, call.key.tenant, load)
    generation = call.generation = Generation(
        services.engine,
        requests,
        lambda request: text.assembler(request, continues_prompt=route.continues_prompt),
        deadline=call.deadline,
        heard=services.streams.hearer(call.id),
    )
    body = json.loads(accepted.body)
    frame = Frame(
        call, route.chunk_object, services.model_name or "", facts.fingerprint,
        tuple(accepted.warnings), wants_usage(body),
    )  # fmt: skip
    chunks = reframe(body, frame, generation, text)
    generation.submit(recorded.outputs())
    if call.permit is not None:
        call.permit.hand_over()
    return EventLog(slots_of(accepted)), events_of(services, call, chunks)
