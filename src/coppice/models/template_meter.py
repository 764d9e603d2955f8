"""Fuel, size and time of one template rendering.

A chat template comes with a checkpoint, so it is someone else's program. Every loop turn,
call, filter and operator pays fuel in proportion to the data it touches; no value may grow
beyond a cap; and the clock is read every few payments. Fuel is deterministic: the same
template and messages always end the same way. The clock is the last resort.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from coppice.errors import TemplateError

DEFAULT_FUEL = 500_000
DEFAULT_TIMEOUT_S = 1.0
MAX_CALL_DEPTH = 40
MAX_INT_BITS = 4_096
MIN_WORKING_CHARS = 1 << 20
_CHARS_PER_FUEL = 64
_CHARS_PER_ELEMENT = 16
_CLOCK_EVERY = 64


class Meter:
    """What one rendering may still spend.

    Args:
        max_chars: the longest prompt it may make. Texts and structures on the way may be as
            long, or `MIN_WORKING_CHARS` when that is more; an element counts as 16 characters.
        fuel: operations, where 64 characters touched count as one.
        timeout_s: wall-clock seconds.

    Raises:
        TemplateError: from every method, when a cap is passed.
    """

    __slots__ = ("_deadline", "_until_clock", "depth", "fuel", "max_chars", "max_working")

    def __init__(self, max_chars: int, fuel: int, timeout_s: float) -> None:
        self.max_chars = max_chars
        self.max_working = max(max_chars, MIN_WORKING_CHARS)
        self.fuel = fuel
        self.depth = 0
        self._deadline = time.monotonic() + timeout_s
        self._until_clock = _CLOCK_EVERY

    def pay(self, chars: int = 0) -> None:
        """Pay for one operation that touches ``chars`` characters or elements."""
        self.fuel -= 1 + chars // _CHARS_PER_FUEL
        if self.fuel < 0:
            raise TemplateError(
                "The chat template ran over its operation limit; shorten the conversation or "
                "use a template without runaway loops."
            )
        self._until_clock -= 1
        if self._until_clock <= 0:
            self._until_clock = _CLOCK_EVERY
            if time.monotonic() > self._deadline:
                raise TemplateError(
                    "The chat template ran over its time limit; shorten the conversation or "
                    "use a simpler template."
                )

    def require_size(self, size: int) -> None:
        """Refuse a working value of more characters than the cap."""
        if size > self.max_working:
            raise TemplateError(
                f"The chat template makes a value of more than {self.max_working} characters; "
                "shorten the conversation."
            )

    def require_prompt(self, size: int) -> None:
        """Refuse a prompt of more than ``max_chars`` characters."""
        if size > self.max_chars:
            raise TemplateError(
                f"The chat template makes a prompt of more than {self.max_chars} characters; "
                "shorten the conversation."
            )

    def weigh(self, value: Any) -> Any:
        """Pay for reading ``value`` once and hand it on."""
        self.pay(len(value) if isinstance(value, (str, list, tuple, dict)) else 0)
        return value

    def check(self, value: Any) -> Any:
        """Pay for a freshly made value by its expanded size, and hand it on.

        Since every container is checked when made and none can be changed afterwards, no
        value a template holds can be larger than the cap when written out.
        """
        if isinstance(value, str):
            self.require_size(len(value))
            self.pay(len(value))
        elif isinstance(value, (list, tuple, dict)):
            size = self.expanded(value)
            self.pay(size)
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise TemplateError("The chat template computes with numbers beyond the limit.")
        else:
            self.pay()
        return value

    def expanded(self, value: Any) -> int:
        """Characters of ``value`` written out, elements included; refused beyond the cap."""
        so_far, pending = 0, [value]
        while pending:
            item = pending.pop()
            so_far += _CHARS_PER_ELEMENT
            if isinstance(item, str):
                so_far += len(item)
            elif isinstance(item, dict):
                pending.extend(item.values())
                pending.extend(item)
            elif isinstance(item, (list, tuple)):
                pending.extend(item)
            self.require_size(so_far + _CHARS_PER_ELEMENT * len(pending))
        return so_far


_current: ContextVar[Meter] = ContextVar("coppice_template_meter")


def meter() -> Meter:
    """The meter of the rendering in progress in this thread."""
    return _current.get()


@contextmanager
def metered(new: Meter) -> Iterator[Meter]:
    """Make ``new`` the current meter."""
    token = _current.set(new)
    try:
        yield new
    finally:
        _current.reset(token)
