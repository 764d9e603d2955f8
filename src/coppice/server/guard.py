"""ASGI middleware before any route: ids, hosts, keys, and which route needs what."""

from __future__ import annotations

import time
from enum import Enum

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coppice.errors import CapacityError, CoppiceError, ForbiddenError, RequestError
from coppice.server.calls import REQUEST_ID, new_id
from coppice.server.config import ServerConfig, is_loopback
from coppice.server.errors import send_error
from coppice.server.keys import ANONYMOUS, KeyRing
from coppice.server.metrics import Metrics


class Policy(Enum):
    """Who may use a route."""

    PUBLIC = "public"
    """Anybody: says nothing about the model, its users or its load."""
    KEY = "key"
    """Any valid key, when keys are set."""
    ADMIN = "admin"
    """Whoever may open the admin socket's file; not there on the public port."""


POLICIES: dict[str, Policy] = {
    "/health/live": Policy.PUBLIC,
    "/health/ready": Policy.KEY,
    "/health": Policy.KEY,
    "/metrics": Policy.KEY,
    "/openapi.json": Policy.KEY,
    "/v1/models": Policy.KEY,
    "/v1/models/{model_id:path}": Policy.KEY,
    "/v1/chat/completions": Policy.KEY,
    "/v1/chat/completions/render": Policy.KEY,
    "/v1/completions": Policy.KEY,
    "/tokenize": Policy.KEY,
    "/detokenize": Policy.KEY,
    "/v1/coppice/info": Policy.KEY,
    "/v1/requests/{request_id}/cancel": Policy.KEY,
    "/v1/requests/{request_id}/stream": Policy.KEY,
    "/v1/sessions/end": Policy.KEY,
}
"""Every route by its path template. What is not listed needs a key (and a test fails)."""

ADMIN_POLICIES: dict[str, Policy] = {
    "/admin/state": Policy.ADMIN,
    "/admin/drain": Policy.ADMIN,
    "/admin/requests/{request_id}/cancel": Policy.ADMIN,
    "/admin/dump": Policy.ADMIN,
    "/admin/replace": Policy.ADMIN,
}
"""Every route of the admin socket."""


class RequestIds:
    """Gives each HTTP request an id, echoes it, and counts the reply."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        valid = given is None or REQUEST_ID.fullmatch(given)
        request_id = given if given is not None and valid else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()

        async def echo(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode("ascii")),
                ]
                self._metrics.replied(scope, message["status"], time.monotonic() - started)
            await send(message)

        if not valid:
            problem = RequestError(
                "X-Request-Id must be 1 to 128 letters, digits or ._:- characters.",
                param="X-Request-Id",
            )
            await send_error(scope, receive, echo, problem)
            return
        await self._app(scope, receive, echo)


class Guard:
    """Checks Host and Origin, then the key.

    The Host check stops pages that point a name of theirs at this machine (DNS rebinding).
    A server open to other machines has keys, which such a page lacks, so there any name is
    accepted unless names are configured.
    """

    def __init__(
        self, app: ASGIApp, config: ServerConfig, keys: KeyRing, public_prefix: str | None = None
    ) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._public_prefix = public_prefix
        known = {"localhost", "127.0.0.1", "[::1]", config.host, f"[{config.host}]"}
        self._hosts = known | {name.lower() for name in config.allowed_hosts}
        self._any_host = not is_loopback(config.host) and not config.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with ``scope["state"]["key"]`` set (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        key = ANONYMOUS
        try:
            self._check_host(scope)
            if not self._is_public(scope):
                key = self._keys.identify(header(scope, b"authorization"))
            if (
                self._keys.required
                and self._keys.busy[key.name] >= self._config.connections_per_key
            ):
                raise CapacityError(
                    f"The key has {self._config.connections_per_key} requests open already.",
                    status=429, code="too_many_connections",
                )  # fmt: skip
        except CoppiceError as error:
            await send_error(scope, receive, send, error)
            return
        scope["state"]["key"] = key
        self._keys.busy[key.name] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._keys.busy[key.name] -= 1

    def _check_host(self, scope: Scope) -> None:
        if self._any_host:
            return
        host = header(scope, b"host")
        if host is None or host_name(host) not in self._hosts:
            raise ForbiddenError(
                "This Host is not served here; name it in allowed_hosts if it should be.",
                code="unknown_host",
            )
        origin = header(scope, b"origin")
        if origin is not None:
            name = host_name(origin.partition("://")[2])
            if name not in self._hosts:
                raise ForbiddenError("Pages of other origins may not call this server.",
                                     code="unknown_origin")  # fmt: skip

    def _is_public(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if POLICIES.get(path) is Policy.PUBLIC:
            return True
        if self._public_prefix is None or scope["method"] not in ("GET", "HEAD"):
            return False
        return path == "/" or path.startswith(self._public_prefix)


def header(scope: Scope, name: bytes) -> str | None:
    """A header's value; the first of several."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for key, value in headers:
        if key == name:
            return value.decode("latin-1")
    return None


def host_name(host: str) -> str:
    """A Host header without its port, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
