"""The OpenAPI document, made to say exactly what the server does."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from coppice.engine.messages import ModelFacts
from coppice.server.protocol.common import TOKEN_ID_LIMIT, TOKEN_ID_TITLE
from coppice.server.services import Services

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
GENERATING = ("ChatRequest", "CompletionRequest")
_NO_BODY_ERRORS = ("408", "413", "415")


def install_document(app: FastAPI, services: Services) -> None:
    """Serve our document instead of FastAPI's; once the model is known, with its bounds."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _correct(made, services.keys.required)
            facts = services.engine.facts
            if facts is None:
                return made
            _bound(made, services.model_name or "", facts)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _bound(document: dict[str, Any], model: str, facts: ModelFacts) -> None:
    """Say which model there is and how long its texts may be."""
    schemas = document["components"]["schemas"]
    for name in (*GENERATING, "TokenizeRequest", "DetokenizeRequest", "EndSessionRequest"):
        fields = schemas[name]["properties"]
        fields["model"] = {"anyOf": [{"type": "string", "enum": [model]}, {"type": "null"}]}
        for field in ("max_tokens", "max_completion_tokens", "min_tokens"):
            for choice in fields.get(field, {}).get("anyOf", ()):
                if choice.get("type") == "integer":
                    choice.pop("exclusiveMaximum", None)
                    choice["maximum"] = facts.context_length - 1
    _bound_ids(schemas, facts.vocab_size)
    examples = _examples(model)
    for path, example in examples.items():
        body = document["paths"][path]["post"]["requestBody"]
        body["content"]["application/json"]["examples"] = example


def _bound_ids(node: Any, vocab_size: int) -> None:
    """Put the vocabulary's size where token ids are described."""
    if isinstance(node, dict):
        if node.get("exclusiveMaximum") == TOKEN_ID_LIMIT and node.get("title") == TOKEN_ID_TITLE:
            node["exclusiveMaximum"] = vocab_size
        for item in node.values():
            _bound_ids(item, vocab_size)
    elif isinstance(node, list):
        for item in node:
            _bound_ids(item, vocab_size)


def _examples(model: str) -> dict[str, dict[str, Any]]:
    user = {"role": "user", "content": "Say hello."}
    tool = {"type": "function", "function": {"name": "now", "description": "The time."}}
    chat: dict[str, Any] = {"model": model, "messages": [user], "max_tokens": 16}
    text: dict[str, Any] = {"model": model, "prompt": "Once upon", "max_tokens": 8}
    return {
        "/v1/chat/completions": {
            "plain": {"value": chat},
            "streamed": {"value": chat | {"stream": True}},
            "choices": {"value": chat | {"n": 2, "temperature": 0.8, "seed": 7}},
            "logprobs": {"value": chat | {"logprobs": True, "top_logprobs": 3}},
            "tools": {"value": chat | {"tools": [tool], "tool_choice": "auto"}},
        },
        "/v1/chat/completions/render": {"plain": {"value": {"messages": [user]}}},
        "/v1/completions": {
            "plain": {"value": text},
            "several": {"value": text | {"prompt": ["One", "Two"], "logprobs": 2}},
            "ids": {"value": text | {"prompt": [1, 2, 3], "stop": ["."], "top_k": 5}},
        },
        "/v1/sessions/end": {"plain": {"value": {"session_id": "agent-1"}}},
        "/tokenize": {"plain": {"value": {"prompt": "Once upon a time"}}},
        "/detokenize": {"plain": {"value": {"tokens": [1, 2, 3]}}},
    }


def _correct(document: dict[str, Any], keys_required: bool) -> None:
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
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        document["paths"]["/health/live"]["get"]["security"] = []
