"""The OpenAPI document, made to say exactly what the server does."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_CANCEL_LINK = {
    "operationId": "cancel",
    "parameters": {"request_id": "$response.body#/id"},
    "description": "End the call while it runs.",
}
_LINKS: dict[tuple[str, str], dict[str, Any]] = {
    ("/v1/completions", "post"): {"cancel": _CANCEL_LINK},
    ("/v1/chat/completions", "post"): {"cancel": _CANCEL_LINK},
    ("/v1/models", "get"): {
        "show": {
            "operationId": "show_model",
            "parameters": {"model_id": "$response.body#/data/0/id"},
        }
    },
    ("/tokenize", "post"): {
        "back": {
            "operationId": "detokenize",
            "requestBody": {"tokens": "$response.body#/tokens"},
        }
    },
}
_NO_BODY_ERRORS = ("408", "413", "415")


def install_document(app: FastAPI, *, keys_required: bool) -> None:
    """Serve our document instead of FastAPI's."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = _corrected(made, keys_required)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _corrected(document: dict[str, Any], keys_required: bool) -> dict[str, Any]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            # FastAPI announces 422 of its own; here every wrong field is a 400.
            operation["responses"].pop("422", None)
            if links := _LINKS.get((path, method)):
                operation["responses"]["200"]["links"] = links
            if method == "get":
                for status in _NO_BODY_ERRORS:
                    operation["responses"].pop(status, None)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if keys_required:
        document["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"}
        }
        document["security"] = [{"key": []}]
        document["paths"]["/health/live"]["get"]["security"] = []
    return document
