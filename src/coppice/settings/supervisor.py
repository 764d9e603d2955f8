"""What a service supervisor (systemd) tells a program through its environment."""

from __future__ import annotations

import os


def notify_socket() -> str | None:
    """The Unix socket that wants to hear of readiness; ``None`` without such a supervisor."""
    return os.environ.get("NOTIFY_SOCKET") or None


def watchdog_s() -> float | None:
    """Seconds within which this process must give a sign of life each time, if it must."""
    text = os.environ.get("WATCHDOG_USEC", "")
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(text) / 1e6 if text.isdecimal() and int(text) and meant else None
