"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from coppice.errors import RequestError
from coppice.server import convert
from coppice.server.fields import review
from coppice.server.json_body import BoundedRoute
from coppice.server.protocol.text import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
)
from coppice.server.routes.documented import ERRORS
from coppice.server.services import services_of

router = APIRouter(route_class=BoundedRoute)


@router.post("/tokenize", response_model=TokenizeReply, responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text."""
    services = services_of(request)
    text, facts = services.require_open()
    services.require_model(body.model)
    warnings = review(body, strict=services.config.strict_fields)
    convert.check_characters(len(body.prompt), facts.context_length)
    ids = await text.encode(
        body.prompt, add_special_tokens=body.add_special_tokens, context=facts.context_length
    )
    reply: dict[str, Any] = {
        "tokens": ids, "count": len(ids), "max_model_len": facts.context_length,
    }  # fmt: skip
    return JSONResponse(reply | ({"warnings": warnings} if warnings else {}))


@router.post("/detokenize", response_model=DetokenizeReply, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Text of token ids."""
    services = services_of(request)
    text, facts = services.require_open()
    services.require_model(body.model)
    warnings = review(body, strict=services.config.strict_fields)
    highest = max(body.tokens, default=0)
    if highest >= facts.vocab_size:
        raise RequestError(
            f"tokens names {highest}, but the vocabulary ends at {facts.vocab_size - 1}.",
            param="tokens",
        )
    reply: dict[str, Any] = {"prompt": await text.decode(body.tokens)}
    return JSONResponse(reply | ({"warnings": warnings} if warnings else {}))
