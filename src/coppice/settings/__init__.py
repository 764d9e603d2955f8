"""Settings: one frozen dataclass per room, resolved once, each value with its origin.

A room declares its settings as a `RoomConfig` subclass whose fields are made by `setting`.
From those fields come the command-line flag, the ``COPPICE_*`` variable, the key in the
YAML file and the reference page; nothing is written twice. It refuses names nobody
declared, offering the nearest match.

Invariant: this is the only room that reads the process environment, and what it read
does not change afterwards.
"""

from coppice.settings.declare import RoomConfig, Setting, setting, settings_of
from coppice.settings.folders import cache_root
from coppice.settings.resolve import (
    FILE_VARIABLE,
    Origin,
    Resolved,
    Sources,
    load_sources,
    resolve,
)

__all__ = [
    "FILE_VARIABLE",
    "Origin",
    "Resolved",
    "RoomConfig",
    "Setting",
    "Sources",
    "cache_root",
    "load_sources",
    "resolve",
    "setting",
    "settings_of",
]
