"""From exceptions to replies: the one place where an error becomes JSON."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from coppice.errors import (
    AuthenticationError,
    CapacityError,
    CoppiceError,
    EngineError,
    ForbiddenError,
    LimitError,
    NotFoundError,
    PoisonedError,
    RequestError,
)

log = logging.getLogger("coppice.server")

MAX_SHOWN_DIGITS = 60
_TYPES: tuple[tuple[type[CoppiceError], str], ...] = (
    (AuthenticationError, "authentication_error"),
    (ForbiddenError, "permission_error"),
    (NotFoundError, "not_found_error"),
    (RequestError, "invalid_request_error"),
    (CapacityError, "overloaded_error"),
    (EngineError, "server_error"),
)


class BodyProblem(HTTPException):
    """Carries a `CoppiceError` out of FastAPI's body parsing, which lets only this pass."""

    def __init__(self, error: CoppiceError) -> None:
        super().__init__(error.status, detail=error.message)
        self.error = error


def error_body(error: CoppiceError, request_id: str) -> dict[str, Any]:
    """The OpenAI error shape, with the request id beside it."""
    kind = next((name for cls, name in _TYPES if isinstance(error, cls)), "server_error")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        },
        "request_id": request_id,
    }


def error_reply(error: CoppiceError, request_id: str) -> Response:
    """A JSON reply with the status of the error tree."""
    headers = {}
    if isinstance(error, CapacityError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, PoisonedError):
        headers["X-Should-Retry"] = "false"  # OpenAI clients would send it twice more
    if isinstance(error, LimitError) or error.code in ("draining", "shutting_down"):
        # After a limit, part of the body may still be on its way.
        headers["Connection"] = "close"
    return JSONResponse(error_body(error, request_id), error.status, headers)


async def send_error(scope: Any, receive: Any, send: Any, error: CoppiceError) -> None:
    """Answer an ASGI call with an error, from middleware."""
    await error_reply(error, request_id_of(scope))(scope, receive, send)


def request_id_of(scope: Any) -> str:
    """The id `RequestIds` gave this HTTP request."""
    return str(scope.get("state", {}).get("request_id", ""))


def install_handlers(app: FastAPI) -> None:
    """Translate every exception once, here."""

    def coppice(request: Request, error: Exception) -> Response:
        assert isinstance(error, CoppiceError)
        if isinstance(error, EngineError):
            log.error("%s: %s (%s)", request_id_of(request.scope), error.message, error.code)
        return error_reply(error, request_id_of(request.scope))

    def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_reply(from_validation(error.errors()), request_id_of(request.scope))

    def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        reply = error_reply(_from_http(request, error), request_id_of(request.scope))
        reply.headers.update(error.headers or {})  # Allow, on a 405
        return reply

    def unexpected(request: Request, error: Exception) -> Response:
        # The text of a foreign exception may tell too much; it goes to the log only.
        log.exception("%s: unexpected error", request_id_of(request.scope), exc_info=error)
        wrapped = EngineError("Internal error; the server's log has the details.")
        return error_reply(wrapped, request_id_of(request.scope))

    app.add_exception_handler(CoppiceError, coppice)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _from_http(request: Request, error: StarletteHTTPException) -> CoppiceError:
    if isinstance(error, BodyProblem):
        return error.error
    path = request.url.path[:200]
    if error.status_code == 404:  # noqa: PLR2004
        return NotFoundError(f"There is no {path!r} here; GET /openapi.json lists what there is.")
    made: CoppiceError = RequestError(
        f"{request.method} is not possible on {path!r}; GET /openapi.json lists what is."
        if error.status_code == 405  # noqa: PLR2004
        else "The request could not be read.",
        code="method_not_allowed" if error.status_code == 405 else None,  # noqa: PLR2004
    )
    made.status = error.status_code
    return made


def from_validation(errors: Any) -> RequestError:
    """One sentence about the most specific of pydantic's complaints, a size before a type."""
    worst = max(errors, key=_weight) if errors else None
    if worst is None:
        return RequestError("The request is not valid.")
    if worst["loc"] == ("body",):
        return RequestError("The body must be a JSON object.", code="invalid_json")
    field = _field_path(worst["loc"])
    detail = str(worst["msg"]).rstrip(".")[:300]
    given = worst.get("input")
    shown = f", got {_short(given)}" if isinstance(given, str | int | float | bool) else ""
    return RequestError(f"{field}: {detail}{shown}.", param=field)


def _weight(item: Any) -> tuple[bool, int]:
    """What else could have been given (a list of something else) says less than its size."""
    return item["type"].endswith(("too_long", "too_short")), len(item["loc"])


def _field_path(loc: tuple[Any, ...]) -> str:
    path = ""
    for part in loc[1:] if loc and loc[0] in ("body", "query", "path") else loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif isinstance(part, str) and part.isidentifier() and not part[0].isupper():
            if part in _UNION_TAGS:
                continue
            path += f".{part}" if path else part
    return path[:200] or "body"


_UNION_TAGS = frozenset({"str", "int", "list", "dict", "none", "float"})


def _short(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value[:60])[:60]  # cut first: the whole may be megabytes
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN_DIGITS:
        return "a number of too many digits"  # writing it out takes quadratic time
    return json.dumps(value)[:60]
