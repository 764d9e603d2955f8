"""Deny by default: a route nobody decided about fails here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi.routing import APIRoute
from starlette.routing import Mount

from coppice.server.admin import build_admin
from coppice.server.app import PAGE_PREFIX, build_app
from coppice.server.config import ServerConfig
from coppice.server.engine_client import AsyncEngine
from coppice.server.guard import ADMIN_POLICIES, POLICIES, Policy
from coppice.server.keys import KeyRing
from coppice.server.lifecycle import make_services

PAGE = {"/", PAGE_PREFIX.rstrip("/")}


def routes_of(app: Any) -> Iterator[Any]:
    """All routes, those of included routers too."""
    seen = list(app.routes)
    while seen:
        route = seen.pop()
        inner = getattr(route, "original_router", None)
        if inner is not None:
            seen += inner.routes
        else:
            yield route


def test_every_route_has_an_explicit_policy() -> None:
    app = build_app(make_services(ServerConfig(), KeyRing(), AsyncEngine(["true"])))
    paths = {getattr(route, "path", repr(route)) for route in routes_of(app)}
    assert {"/v1/chat/completions", "/metrics"} <= paths
    assert paths - PAGE == set(POLICIES)
    for route in routes_of(app):
        assert isinstance(route, APIRoute | Mount) or route.path == "/openapi.json"


def test_every_admin_route_has_one_too_and_no_route_is_on_both_sides() -> None:
    services = make_services(ServerConfig(), KeyRing(), AsyncEngine(["true"]))
    paths = {route.path for route in routes_of(build_admin(services, lambda: None))}
    assert paths == set(ADMIN_POLICIES) and set(ADMIN_POLICIES.values()) == {Policy.ADMIN}
    assert not paths & set(POLICIES) and Policy.ADMIN not in POLICIES.values()
    public = {getattr(route, "path", "") for route in routes_of(build_app(services))}
    assert not paths & public and not any("admin" in path for path in public)


def test_only_liveness_is_public() -> None:
    public = [path for path, policy in POLICIES.items() if policy is Policy.PUBLIC]
    assert public == ["/health/live"]
