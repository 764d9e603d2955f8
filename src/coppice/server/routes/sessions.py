"""``POST /v1/sessions/end``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from coppice.engine.messages import EndSession
from coppice.server import convert
from coppice.server.fields import review
from coppice.server.json_body import BoundedRoute
from coppice.server.protocol.facts import EndSessionReply, EndSessionRequest
from coppice.server.routes.documented import ERRORS
from coppice.server.services import caller_of, services_of

router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/sessions/end", response_model=EndSessionReply, responses=ERRORS)
async def end_session(body: EndSessionRequest, request: Request) -> Response:
    """Say that a session of yours is over, so that its KV pages and place go to others at once."""
    services = services_of(request)
    services.require_model(body.model)
    warnings = review(body, strict=services.config.strict_fields) + services.session_warnings()
    name = convert.session_of(caller_of(request).tenant, body.session_id)
    services.engine.tell_session(EndSession(name))
    reply = {"session_id": body.session_id}
    return JSONResponse(reply | ({"warnings": warnings} if warnings else {}))
