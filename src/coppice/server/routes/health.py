"""Liveness, readiness and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from coppice.server.protocol.facts import Health
from coppice.server.routes.documented import ERRORS
from coppice.server.services import services_of

router = APIRouter()
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Health}}


@router.get("/health/live", response_model=Health)
async def live() -> Response:
    """The process answers; it says nothing about load or the engine."""
    return JSONResponse({"status": "ok"})


@router.get("/health/ready", response_model=Health, responses=ERRORS | NOT_READY)
@router.get(
    "/health", response_model=Health, responses=ERRORS | NOT_READY, operation_id="ready_alias"
)
async def ready(request: Request) -> Response:
    """200 when new work is welcome; 503 while loading, restarting, stalled or draining."""
    state = services_of(request).state
    return JSONResponse({"status": state}, 200 if state == "ok" else 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses=ERRORS | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    text = services_of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
