"""Faults by a seed: what is killed, stopped, left, read slowly, or told a wrong time, and when.

    with seeded() as rng:
        harm = Injector(server, rng)
        harm.kill()

A check that fails inside `seeded` says the seed; ``TEST_SEED`` repeats it. Works on any
server; `tests.kits.allocations` makes allocations fail inside an engine.
"""

from __future__ import annotations

import os
import random
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.kits.server import ServerProcess
from tests.kits.wire import Wire, request_bytes

CLOCK_SHIM = Path(__file__).parent / "clock"


@contextmanager
def seeded() -> Iterator[random.Random]:
    """The test's random numbers; what fails inside says their seed."""
    seed = int(os.environ.get("TEST_SEED", "1"))
    try:
        yield random.Random(seed)
    except BaseException as error:
        error.add_note(f"repeat it with TEST_SEED={seed}")
        raise


def engines(server: ServerProcess) -> list[psutil.Process]:
    """The engine process, if there is one; the front end has other children, too."""
    found = []
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if {"coppice.engine.process", "tests.kits.fake_engine"} & set(child.cmdline()):
                found.append(child)
    return found


def kill_engine(server: ServerProcess) -> set[int]:
    """SIGKILL, whether it has loaded its model already or not; whom it hit.

    Returns when the server has noticed: what it says of its state is no longer of before.
    """
    hit = set()
    for child in engines(server):
        with suppress(psutil.NoSuchProcess):
            child.kill()
            hit.add(child.pid)
    server.wait_until(lambda info: info["engine_pid"] not in hit)
    return hit


class Injector:
    """Harms the engine process of a server."""

    def __init__(self, server: ServerProcess, rng: random.Random) -> None:
        self._server = server
        self._rng = rng

    def kill(self) -> None:
        """See `kill_engine`."""
        kill_engine(self._server)

    def stand_still(self, seconds: float) -> None:
        """See `stopped`, for so long."""
        with self.stopped():
            time.sleep(seconds)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP, in the end SIGCONT; if none runs, the next one."""
        pid = self._server.wait_until(lambda info: info["engine_pid"] is not None)["engine_pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def wait(self, longest_s: float) -> None:
        """A random moment passes."""
        time.sleep(self._rng.uniform(0.0, longest_s))


class WrongClock:
    """The wall clock of a server's processes, moved while they run.

    Args:
        folder: where the shift is told to them.

    Start the server with `environment`; its monotonic clocks stay right, as the system's do.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "shift"
        self.shift(0.0)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the server's process."""
        path = os.pathsep.join([str(CLOCK_SHIM), os.environ.get("PYTHONPATH", "")])
        return {"PYTHONPATH": path, "TEST_CLOCK_SHIFT": str(self._file)}

    def shift(self, seconds: float) -> None:
        """From now on the wall clock is off by so much."""
        made = self._file.with_suffix(".new")
        made.write_bytes(struct.pack("d", seconds))
        made.replace(self._file)


class SlowReaders:
    """Streams that are read at so many bytes a second each, until left.

    Args:
        port: the server's.
        bodies: one stream each, of ``/v1/completions``.
        bytes_s: of each.
    """

    def __init__(self, port: int, bodies: list[dict[str, Any]], *, bytes_s: float = 1.0) -> None:
        self._wires = [Wire(port, window=2048) for _ in bodies]
        for wire, body in zip(self._wires, bodies, strict=True):
            wire.send(request_bytes("/v1/completions", body | {"stream": True}))
        self._pause_s = 1.0 / bytes_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.received = 0

    def __enter__(self) -> SlowReaders:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for wire in self._wires:
            wire.leave()

    def _run(self) -> None:
        with selectors.DefaultSelector() as ready:
            for wire in self._wires:
                ready.register(wire.socket, selectors.EVENT_READ)
            while not self._stop.wait(self._pause_s):
                for key, _ in ready.select(0):
                    assert isinstance(key.fileobj, socket.socket)
                    with suppress(OSError):
                        self.received += len(key.fileobj.recv(1))
