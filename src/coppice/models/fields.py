"""Checked reading of a checkpoint's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coppice.errors import CheckpointError, UnsupportedModelError

MAX_DIM = 1 << 24
"""No dimension of a real model is larger; anything above is a damaged or hostile file."""

MAX_LAYERS = 1024

MAX_NUMBER = 1e30


class Fields:
    """A JSON object read key by key, remembering which keys were used.

    A key that is absent falls back to ``defaults``; JSON ``null`` counts as absent.

    Args:
        raw: the parsed object.
        defaults: what the architecture assumes where the file says nothing.
        where: how to call this object in error messages.
    """

    def __init__(
        self, raw: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, where: str = ""
    ) -> None:
        self.raw = raw
        self.used: set[str] = set()
        self.where = where or "config.json"
        self._defaults = defaults or {}

    def replaced(self, **values: Any) -> Fields:
        """The same object with some values replaced; what either uses counts for both."""
        other = Fields({**self.raw, **values}, self._defaults, self.where)
        other.used = self.used
        return other

    def value(self, key: str, default: Any = None) -> Any:
        """The raw value of ``key``, or the architecture's default, or ``default``."""
        self.used.add(key)
        found = self.raw.get(key)
        if found is None:
            found = self._defaults.get(key)
        return default if found is None else found

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """An integer in ``low..MAX_DIM``.

        Raises:
            CheckpointError: absent without default, not an integer, or out of range.
        """
        found = self.value(key, default)
        if found is None:
            raise CheckpointError(f"{self.where} lacks {key!r}; the checkpoint is incomplete.")
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, int):
            raise self.wrong(key, found, "an integer")
        if not low <= found <= MAX_DIM:
            raise self.wrong(key, found, f"between {low} and {MAX_DIM}")
        return found

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number, above zero unless ``positive`` is false.

        Raises:
            CheckpointError: absent without default, not a number, or out of range.
        """
        found = self.value(key, default)
        if found is None:
            raise CheckpointError(f"{self.where} lacks {key!r}; the checkpoint is incomplete.")
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise self.wrong(key, found, "a number")
        if not abs(found) <= MAX_NUMBER or (positive and found <= 0):  # NaN compares false
            raise self.wrong(key, found, "a finite number above 0" if positive else "finite")
        return float(found)

    def optional_number(self, key: str, absent: float = 0.0) -> float:
        """A positive number; 0.0 where the key is null, ``absent`` where there is no key."""
        if key not in self.raw:
            self.used.add(key)
            return absent
        return 0.0 if self.value(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean.

        Raises:
            CheckpointError: neither true nor false.
        """
        found = self.value(key, default)
        if not isinstance(found, bool):
            raise self.wrong(key, found, "true or false")
        return found

    def choice(self, key: str, options: Mapping[str, Any], default: str | None = None) -> Any:
        """``options[value]`` for a string value.

        Raises:
            UnsupportedModelError: the value is not among ``options``.
        """
        found = self.value(key, default)
        if not isinstance(found, str) or found not in options:
            known = ", ".join(options)
            raise UnsupportedModelError(
                f"{self.where} sets {key!r} to {short(found)}; supported are: {known}."
            )
        return options[found]

    def choice_of(self, key: str, options: tuple[int, ...]) -> int:
        """One of a few whole numbers.

        Raises:
            UnsupportedModelError: another one, or none.
        """
        found = self.value(key)
        if type(found) is not int or found not in options:
            known = " and ".join(map(str, options))
            raise UnsupportedModelError(
                f"{self.where} sets {key!r} to {short(found)}; supported: {known}."
            )
        return found

    def sequence(self, key: str, length: int | None = None) -> list[Any] | None:
        """A JSON list, checked for ``length`` where one is given; None where absent.

        Raises:
            CheckpointError: not a list, or of another length.
        """
        found = self.value(key)
        if found is None:
            return None
        if not isinstance(found, list):
            raise self.wrong(key, found, "a list")
        if length is not None and len(found) != length:
            raise CheckpointError(
                f"{self.where} lists {len(found)} entries in {key!r} but has {length} layers."
            )
        return found

    def wrong(self, key: str, found: Any, wanted: str) -> CheckpointError:
        """The error for a value that is not what the key asks for."""
        return CheckpointError(f"{self.where} sets {key!r} to {short(found)}; it must be {wanted}.")


def short(value: Any, limit: int = 80) -> str:
    """``repr(value)`` cut to ``limit`` characters, for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
