"""``GET /v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from coppice.errors import NotFoundError
from coppice.server.protocol.facts import ModelCard, ModelList
from coppice.server.routes.documented import ERRORS
from coppice.server.services import Services, services_of

router = APIRouter()


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def list_models(request: Request) -> Response:
    """The models there are; none while the first is loading."""
    return JSONResponse({"object": "list", "data": _cards(services_of(request))})


@router.get("/v1/models/{model_id:path}", response_model=ModelCard, responses=ERRORS)
async def show_model(model_id: str, request: Request) -> Response:
    """One model."""
    for card in _cards(services_of(request)):
        if card["id"] == model_id:
            return JSONResponse(card)
    raise NotFoundError(f"There is no model {model_id[:80]!r} here; GET /v1/models lists them.",
                        param="model", code="model_not_found")  # fmt: skip


def _cards(services: Services) -> list[dict[str, Any]]:
    facts = services.engine.facts
    if facts is None:
        return []
    return [
        {
            "id": services.model_name,
            "object": "model",
            "created": services.started_unix,
            "owned_by": "coppice",
            "max_model_len": facts.context_length,
            "weight_format": facts.weight_format,
            "kv_format": facts.kv_format,
        }
    ]
