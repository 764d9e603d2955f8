"""Signs of life for systemd: ready, alive, stopping (the sd_notify protocol)."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from coppice.settings.supervisor import notify_socket, watchdog_s


class Supervisor:
    """Whoever started this process and wants to know how it is; nobody, mostly.

    The signs of life come from the event loop: they stop when it does.
    """

    def __init__(self) -> None:
        self._path = notify_socket()
        self._every_s = watchdog_s()
        self._beat: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Give signs of life from now on, where they are wanted."""
        if self._path is not None and self._every_s is not None:
            self._beat = asyncio.create_task(self._beats(self._every_s / 3), name="watchdog")

    def ready(self, status: str) -> None:
        """The server takes work."""
        self._say(f"READY=1\nSTATUS={status}")

    def stopping(self, most_s: float) -> None:
        """It drains, which may take that long."""
        self._say(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(most_s * 1e6)}\nSTATUS=draining")

    def close(self) -> None:
        """No more signs."""
        if self._beat is not None:
            self._beat.cancel()

    async def _beats(self, every_s: float) -> None:
        while True:
            self._say("WATCHDOG=1")
            await asyncio.sleep(every_s)

    def _say(self, text: str) -> None:
        if self._path is None:
            return
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as wire,
        ):
            wire.sendto(text.encode(), socket.MSG_DONTWAIT, address)
