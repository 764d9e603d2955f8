"""ASGI middleware: when there is no place at all, say so before the body is even read."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from coppice.errors import CapacityError
from coppice.server.errors import send_error
from coppice.server.services import Services

GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class EarlyRefusal:
    """Refuses generation calls that no reading could let in: a full or closing server.

    Under overload most of the work is refusals, so they must cost next to nothing.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on (ASGI)."""
        if scope["type"] == "http" and self._concerns(scope):
            key = scope["state"]["key"]
            try:
                self._services.require_open()
                self._services.admission.require_place(key.tenant, share=key.share)
            except CapacityError as error:
                self._services.ledger.open().close("refused", error.code)
                await send_error(scope, receive, send, error)
                return
        await self._app(scope, receive, send)

    def _concerns(self, scope: Scope) -> bool:
        return scope["path"] in GENERATION_PATHS and scope["method"] == "POST"
