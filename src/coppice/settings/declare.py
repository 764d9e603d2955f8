"""Declaring settings: what a field is called, what it accepts, how its text is read."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeVar

from coppice.errors import ConfigError

PREFIX = "COPPICE_"

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})

T = TypeVar("T")


def setting(
    default: T,
    sentence: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    secret: bool = False,
) -> T:
    """Declare one field of a `RoomConfig`.

    Args:
        default: used when no flag, variable or file sets it.
        sentence: what it does, for ``--help`` and the reference; ends with a full stop.
        minimum: smallest number allowed, inclusive.
        maximum: largest number allowed, inclusive.
        secret: never printed; ``coppice doctor`` shows only whether it is set.
    """
    facts = {"sentence": sentence, "minimum": minimum, "maximum": maximum, "secret": secret}
    made: T = field(default=default, metadata=facts)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One declared setting and how its value is read.

    Attributes:
        name: the field's name, unit included (``kv_cache_mib``).
        room: the section of the YAML file it lives in.
        kind: ``str``, ``int``, ``float``, ``bool`` or ``tuple`` (of strings).
        optional: whether ``none`` is a value.
        choices: the allowed strings, when there are only a few.
    """

    name: str
    room: str
    kind: type
    optional: bool
    default: object
    sentence: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    secret: bool = False

    @property
    def flag(self) -> str:
        """``--kv-cache-mib``."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """``COPPICE_KV_CACHE_MIB``."""
        return PREFIX + self.name.upper()

    @property
    def key(self) -> str:
        """``engine.kv_cache_mib``, as written in the YAML file (section, then key)."""
        return f"{self.room}.{self.name}"

    @property
    def type_name(self) -> str:
        """The type for a reader: ``int``, ``int or none``, ``auto | float32``, ``list``."""
        name = " | ".join(self.choices) or {"tuple": "list", "str": "text"}.get(
            self.kind.__name__, self.kind.__name__
        )
        return f"{name} or none" if self.optional else name

    def show(self, value: object) -> str:
        """The value as a reader should see it; secrets only as set or not set."""
        if value is None or value == ():
            return "none"
        if self.secret:
            return "(set)"
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return ",".join(value)
        return f"{value:g}" if isinstance(value, float) else str(value)

    def parse(self, text: str, source: str) -> object:
        """Read a value typed as text (flag or variable); lists are comma-separated."""
        if self.optional and text.strip().lower() in ("", "none"):
            return None
        if self.kind is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if self.kind is bool:
            word = text.strip().lower()
            if word not in _TRUE | _FALSE:
                raise self._refuse("true or false", text, source)
            return word in _TRUE
        try:
            return self.check(self.kind(text), source)
        except ValueError:
            expected = "a whole number" if self.kind is int else "a number"
            raise self._refuse(expected, text, source) from None

    def check(self, value: object, source: str) -> object:
        """Accept a typed value (file or Python) or raise `ConfigError` saying what is allowed."""
        if value is None and self.optional:
            return None
        if self.kind is tuple and isinstance(value, list | tuple):
            if not all(isinstance(item, str) for item in value):
                raise self._refuse("a list of text", value, source)
            return tuple(value)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        is_bool_as_int = isinstance(value, bool) and self.kind is not bool
        if not isinstance(value, self.kind) or is_bool_as_int:
            raise self._refuse(self.type_name, value, source)
        if self.choices and value not in self.choices:
            hint = nearest(str(value), self.choices)
            raise self._refuse(f"one of {', '.join(self.choices)}", value, source, hint or ".")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._refuse("a finite number", value, source)
        if isinstance(value, int | float):
            if self.minimum is not None and value < self.minimum:
                raise self._refuse(f"at least {self.minimum:g}", value, source)
            if self.maximum is not None and value > self.maximum:
                raise self._refuse(f"at most {self.maximum:g}", value, source)
        return value

    def _refuse(self, expected: str, value: object, source: str, end: str = ".") -> ConfigError:
        got = "the given value" if self.secret else repr(value)
        return ConfigError(
            f"{self.name} must be {expected}, got {got} from {source}{end}", param=self.name
        )


class RoomConfig:
    """Base of each room's config: ``@dataclass(frozen=True, kw_only=True)`` subclasses only.

    Raises:
        ConfigError: a field has the wrong type or is out of range.
    """

    ROOM: ClassVar[str]

    @classmethod
    def from_values(cls, **values: object) -> Self:
        """Build from Python arguments; an unknown name is a `ConfigError` with the nearest."""
        names = [item.name for item in settings_of(cls)]
        for name in values:
            if name not in names:
                hint = nearest(name, names)
                raise ConfigError(f"Unknown {cls.ROOM} setting {name!r}{hint}.", param=name)
        return cls(**values)

    def __post_init__(self) -> None:
        for item in settings_of(type(self)):
            item.check(getattr(self, item.name), "Python")


def settings_of(room: type[RoomConfig]) -> tuple[Setting, ...]:
    """The settings a room declares, in the order of its fields."""
    hints = typing.get_type_hints(room)
    declared = dataclasses.fields(typing.cast("Any", room))
    return tuple(_read_field(room.ROOM, item, hints[item.name]) for item in declared)


def _read_field(room: str, item: dataclasses.Field[Any], hint: Any) -> Setting:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        hint = members[0]
    choices: tuple[str, ...] = ()
    if typing.get_origin(hint) is Literal:
        choices, hint = typing.get_args(hint), str
    kind = typing.get_origin(hint) or hint
    if kind not in (str, int, float, bool, tuple):
        raise TypeError(f"{room}.{item.name}: settings of type {hint} are not supported")
    return Setting(
        name=item.name,
        room=room,
        kind=kind,
        optional=optional,
        default=item.default,
        choices=choices,
        **item.metadata,
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'page_size'?"`` when a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
