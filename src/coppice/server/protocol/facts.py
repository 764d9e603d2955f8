"""Models, health, info and cancel."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from coppice.server.protocol.common import Fields, Label, Name


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    weight_format: str
    kv_format: str


class ModelList(BaseModel):
    """All models (one, today)."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """``status``: ``ok``, ``loading``, ``restarting``, ``stalled``, ``draining``, ``failed``."""

    status: str


class Info(BaseModel):
    """What the server is, holds and has done."""

    version: str
    state: str
    uptime_s: float
    model: dict[str, Any] | None
    limits: dict[str, Any]
    outcomes: dict[str, int]
    engine: dict[str, Any] | None
    engine_restarts: int
    engine_pid: int | None
    engine_start_s: float
    requests_replayed: int
    timeline: dict[str, Any]


class CancelReply(BaseModel):
    """How many calls were told to end."""

    id: str
    cancelled: int


class EndSessionRequest(Fields):
    """Which session is over."""

    model: Label | None = None
    session_id: Name


class EndSessionReply(BaseModel):
    """It is over, whether or not it was known."""

    session_id: str
    warnings: list[str] | None = None
