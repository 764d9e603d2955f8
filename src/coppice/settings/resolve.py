"""Resolving settings: flag, then variable, then file, then default, each with its origin."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from coppice.errors import ConfigError
from coppice.settings.declare import PREFIX, RoomConfig, Setting, nearest, settings_of

FILE_VARIABLE = "COPPICE_CONFIG"
"""Names the YAML file when ``--config`` is not given; the one variable that is no field."""

C = TypeVar("C", bound=RoomConfig)
OriginKind = Literal["flag", "variable", "file", "default"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: its kind and the flag, variable or file at fault."""

    kind: OriginKind
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".strip()


@dataclass(frozen=True, slots=True)
class Resolved(Generic[C]):
    """A room's config and the origin of each of its values."""

    config: C
    origins: Mapping[str, Origin]


@dataclass(frozen=True, slots=True)
class Sources:
    """What was read from outside: the ``COPPICE_*`` variables and the YAML file."""

    variables: Mapping[str, str] = field(default_factory=dict)
    file: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    path: Path | None = None


def load_sources(
    rooms: Iterable[type[RoomConfig]],
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Sources:
    """Read the environment and the YAML file, and refuse names that no room declares.

    Args:
        rooms: every room there is, so that one command's file may hold another's settings.
        config: the file of ``--config``; ``None`` looks at ``COPPICE_CONFIG``.
        environ: the environment to read, the process's own by default.

    Raises:
        ConfigError: an unknown name, or a file that is missing, too large or not YAML.
    """
    environ = os.environ if environ is None else environ
    known = {room.ROOM: {item.name for item in settings_of(room)} for room in rooms}
    allowed = {PREFIX + name.upper() for names in known.values() for name in names}
    variables = {name: text for name, text in environ.items() if name.startswith(PREFIX)}
    path = variables.pop(FILE_VARIABLE, None)
    for name in variables:
        if name not in allowed:
            hint = nearest(name, allowed)
            raise ConfigError(f"Unknown variable {name}{hint}; unset or rename it.", param=name)
    config = Path(path) if config is None and path else config
    return Sources(variables, _read_file(config, known) if config else {}, config)


def _read_file(path: Path, known: Mapping[str, set[str]]) -> dict[str, dict[str, object]]:
    from coppice.settings.yaml_file import read_yaml  # PyYAML is loaded only for a file

    sections = read_yaml(path)
    for room, values in sections.items():
        if room not in known:
            hint = nearest(str(room), known)
            raise ConfigError(f"{path}: unknown section {room!r}{hint}.", param=str(room))
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: section {room!r} must hold 'name: value' lines.")
        for name in values:
            if name not in known[room]:
                hint = nearest(str(name), known[room])
                raise ConfigError(f"{path}: unknown key '{room}.{name}'{hint}.", param=str(name))
    return sections


def resolve(
    room: type[C], flags: Mapping[str, object] | None = None, sources: Sources | None = None
) -> Resolved[C]:
    """Build a room's config from flags (or Python arguments), then sources, then defaults.

    Args:
        room: the config class.
        flags: values by field name, as text or typed; ``None`` counts as not given.
        sources: see `load_sources`; nothing outside is read without it.

    Raises:
        ConfigError: a value is wrong or a flag is not declared by ``room``.
    """
    flags = flags or {}
    sources = sources or Sources()
    items = settings_of(room)
    values: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    origins: dict[str, Origin] = {}
    for item in items:
        values[item.name], origins[item.name] = _look_up(item, flags, sources)
    return Resolved(room.from_values(**values), origins)


def _look_up(item: Setting, flags: Mapping[str, object], sources: Sources) -> tuple[object, Origin]:
    given = flags.get(item.name)
    if given is not None:
        return _read(item, given, item.flag), Origin("flag", item.flag)
    text = sources.variables.get(item.variable)
    if text is not None:
        return item.parse(text, item.variable), Origin("variable", item.variable)
    section = sources.file.get(item.room, {})
    if item.name in section:
        return item.check(section[item.name], str(sources.path)), Origin("file", str(sources.path))
    return item.default, Origin("default")


def _read(item: Setting, value: object, source: str) -> object:
    return item.parse(value, source) if isinstance(value, str) else item.check(value, source)
