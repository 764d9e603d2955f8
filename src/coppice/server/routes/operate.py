"""``GET /v1/coppice/info`` and ``POST /v1/requests/{id}/cancel``."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

import coppice
from coppice.engine.messages import StepStats
from coppice.errors import NotFoundError
from coppice.server.calls import REQUEST_ID
from coppice.server.protocol.facts import CancelReply, Info
from coppice.server.routes.documented import ERRORS
from coppice.server.services import caller_of, services_of

router = APIRouter()


@router.get("/v1/coppice/info", response_model=Info, responses=ERRORS)
async def info(request: Request) -> Response:
    """What the server is, holds and has done."""
    services = services_of(request)
    engine, admission, ledger = services.engine, services.admission, services.ledger
    config = services.config
    return JSONResponse(
        {
            "version": coppice.__version__,
            "state": services.state,
            "uptime_s": time.monotonic() - services.started,
            "model": msgspec.to_builtins(engine.facts) if engine.facts else None,
            "limits": {
                "max_in_flight": config.max_in_flight,
                "max_waiting_tokens": admission.max_waiting_tokens(),
                "max_pages_promised": admission.max_pages(),
                "request_timeout_s": config.request_timeout_s,
                "max_body_bytes": config.max_body_bytes,
            },
            "outcomes": {
                "accepted": ledger.accepted,
                "in_flight": ledger.in_flight,
                **ledger.outcomes,
            },
            "promised": msgspec.to_builtins(admission.promised),
            "engine": _figures(engine.stats, tenant_of(request)) if engine.stats else None,
            "engine_restarts": engine.restarts,
            "engine_pid": engine.pid,
            "engine_start_s": engine.start_took_s,
            "requests_replayed": engine.replayed,
            "timeline": services.calls.timeline.view(tenant_of(request)),
        }
    )


def _figures(stats: StepStats, tenant: str | None) -> dict[str, Any]:
    """The engine's figures, with what each tenant used only for the tenant that asks."""
    figures: dict[str, Any] = msgspec.to_builtins(stats)
    figures["usage"] = [u for u in figures["usage"] if tenant in (None, u["tenant"])]
    return figures


@router.post("/v1/requests/{request_id}/cancel", response_model=CancelReply, responses=ERRORS)
async def cancel(request_id: str, request: Request) -> Response:
    """End your calls of this id (of the reply, or the ``X-Request-Id`` you sent)."""
    services = services_of(request)
    valid = REQUEST_ID.fullmatch(request_id)
    count = services.calls.cancel(request_id, tenant_of(request)) if valid else 0
    if not count:
        raise NotFoundError("No request of that id is running.", param="request_id")
    return JSONResponse({"id": request_id, "cancelled": count})


def tenant_of(request: Request) -> str | None:
    """Whose calls the caller may see and end; ``None``: all, as no keys are set."""
    return caller_of(request).tenant if services_of(request).keys.required else None
