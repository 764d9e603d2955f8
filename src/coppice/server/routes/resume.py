"""``GET /v1/requests/{id}/stream``: take a stream up where it was left."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response

from coppice.errors import CapacityError, NotFoundError
from coppice.server.calls import REQUEST_ID
from coppice.server.event_log import PLACE
from coppice.server.recovery import wake
from coppice.server.resumable import HEADER
from coppice.server.routes.documented import ERRORS, STREAMED
from coppice.server.routes.operate import tenant_of
from coppice.server.services import services_of
from coppice.server.stream import EventStream

router = APIRouter()
Place = Annotated[str | None, Query(pattern=PLACE, description="`id` of the last event seen.")]
LastEvent = Annotated[str | None, Header(pattern=PLACE, description="The same; `after` wins.")]


@router.get("/v1/requests/{request_id}/stream", response_class=Response,
            responses=ERRORS | STREAMED)  # fmt: skip
async def resume(
    request_id: str, request: Request, after: Place = None, last_event_id: LastEvent = None
) -> Response:
    """The events of a stream sent with `X-Resumable: true` that come after the last one seen."""
    services = services_of(request)
    services.require_text()
    if services.phase == "closed":
        raise CapacityError(
            "The server is shutting down; take the stream up when it is back.",
            retry_after_s=1.0, code="draining",
        )  # fmt: skip
    if not REQUEST_ID.fullmatch(request_id):
        raise NotFoundError("No stream has such an id.", param="request_id", code="not_resumable")
    streams = services.streams
    known = streams.find(request_id, tenant_of(request))
    events = wake(services, known)
    seen = events.place(after or last_event_id)
    streams.taken_up += 1
    return EventStream(
        streams.read(known, seen),
        headers={HEADER: "true"},
        ping_s=services.config.ping_s,
        slow_reader_s=services.config.slow_reader_s,
    )
