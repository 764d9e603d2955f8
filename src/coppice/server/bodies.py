"""How much of the memory request bodies may take together."""

from __future__ import annotations

import asyncio

from coppice.errors import CapacityError


class BodyBudget:
    """Bounds what bodies take together, in reading, in parsing and while their calls run.

    Args:
        limit_bytes: for all counted bodies at once; short ones need not be counted.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self.parsing = asyncio.Lock()
        """Held while a long body is parsed, which takes several times its size."""

    def take(self, size_bytes: int) -> None:
        """Count bytes in.

        Raises:
            CapacityError: they would be too many.
        """
        if self._held_bytes + size_bytes > self._limit_bytes:
            raise CapacityError(
                "The server holds as many bytes of long bodies as it may; try again soon.",
                retry_after_s=1.0, code="too_many_long_bodies",
            )  # fmt: skip
        self._held_bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        """Count bytes out."""
        self._held_bytes -= size_bytes
