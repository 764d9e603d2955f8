"""Whether a server lost anything: pages, places, descriptors, memory, calls.

Descriptors and memory are those of the front end and the engine; cells come and go.
"""

from __future__ import annotations

import time
from typing import Any

import psutil

from tests.kits.injector import engines
from tests.kits.memory import memory_mib
from tests.kits.server import ServerProcess

ENDS = ("finished", "cancelled", "expired", "refused", "failed")


def descriptors(server: ServerProcess) -> list[int]:
    """Open files and sockets of each of its processes, once closed connections are gone."""
    processes = _both(server)
    counts = [process.num_fds() for process in processes]
    for _ in range(10):
        time.sleep(0.05)
        counts = [min(n, each.num_fds()) for n, each in zip(counts, processes, strict=True)]
    return counts


def anonymous_mib(server: ServerProcess) -> float:
    """Memory of its processes that no file stands behind, MiB."""
    return sum(memory_mib(process.pid)["Anonymous"] for process in _both(server))


def _both(server: ServerProcess) -> list[psutil.Process]:
    return [psutil.Process(server.process.pid), *engines(server)]


def require_idle_and_whole(server: ServerProcess, timeout_s: float = 20.0) -> dict[str, Any]:
    """Wait for idleness; nothing may be held or missing then.

    Returns:
        ``/v1/coppice/info``.
    """
    info = server.wait_idle(timeout_s)
    outcomes = info["outcomes"]
    assert outcomes["in_flight"] == 0
    assert outcomes["accepted"] == sum(outcomes[name] for name in ENDS), outcomes
    assert info["engine"]["pages_used"] == 0, info["engine"]
    assert info["promised"] == {"sequences": 0, "prompt_tokens": 0, "pages": 0}
    return info
