"""Every room that has settings; a variable or a key outside these is a typing error."""

from __future__ import annotations

from coppice.cli.config import AnswerConfig
from coppice.engine.config import EngineConfig
from coppice.server.config import ServerConfig
from coppice.settings import RoomConfig

ROOMS: tuple[type[RoomConfig], ...] = (EngineConfig, ServerConfig, AnswerConfig)
