"""The engine as a process: ``python -m coppice.engine.process --socket PATH --config JSON``.

Connects to the front end's Unix socket, loads the model, says `Ready`, then serves until
`Shutdown`, end of file on the socket, or SIGTERM. Signals meant for the front end (Ctrl-C in
a terminal reaches both) are ignored here: the front end decides when to stop.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from coppice.engine.config import EngineConfig
from coppice.engine.memory import give_back, tune_allocator
from coppice.engine.messages import (
    STACKS_SIGNAL,
    Fatal,
    FromEngine,
    Ready,
    Shutdown,
    decode_to_engine,
    encode,
)
from coppice.engine.quick_torch import import_torch
from coppice.engine.start import begin_reading
from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from coppice.engine.loop import EngineLoop

HEAD_BYTES = 4
MAX_FRAME = 256 << 20
MMAP_THRESHOLD = 8 << 20
"""Activations of a step stay on the heap, where the next step finds them mapped."""


def main() -> int:
    """Run the engine process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="coppice.engine.process")
    parser.add_argument("--socket", required=True, help="Unix socket of the front end")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    args = parser.parse_args()
    gc.disable()  # a start makes much and drops little; `_serve` switches it on again
    tune_allocator(mmap_threshold=MMAP_THRESHOLD)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()  # a crash in native code says where
    faulthandler.register(STACKS_SIGNAL)
    die_with_parent(on=True)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(args.socket)
    with connection:
        try:
            config = msgspec.json.decode(args.config, type=EngineConfig)
            return _serve(connection, config)
        except CoppiceError as error:
            connection.sendall(encode(Fatal(error.code, error.message)))
            return error.exit_code
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the front end is gone, and with it everyone who waited


def die_with_parent(*, on: bool) -> None:
    """Have the system end this process with its parent: who loads a model hears nothing else."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # noqa: N806
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL) if on else 0)


def _serve(connection: socket.socket, config: EngineConfig) -> int:
    early = begin_reading(config) if config.keep_packed else None
    import_torch()
    from coppice.engine.engine import Engine
    from coppice.engine.loading import load_engine_model
    from coppice.engine.loop import EngineLoop

    engine = Engine(load_engine_model(config, early), config)
    gc.freeze()  # what is loaded now stays: no collection needs to look at it again
    gc.enable()
    give_back()

    def send(messages: Sequence[FromEngine]) -> None:
        connection.sendall(b"".join(map(encode, messages)))

    loop = EngineLoop(engine, send)
    told = threading.Event()

    def stop(*_: object) -> None:
        told.set()
        loop.inbox.put(Shutdown())

    signal.signal(signal.SIGTERM, stop)
    send([Ready(engine.facts())])
    die_with_parent(on=False)  # from here on the reader sees its end, and what is kept is written
    threading.Thread(target=_read, args=(connection, loop), name="reader", daemon=True).start()
    try:
        loop.run()
    finally:  # also where the front end went away in mid-step
        engine.close()
    if told.is_set():  # the exit status says that others ended it, and no request did
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    return 0


def _read(connection: socket.socket, loop: EngineLoop) -> None:
    """Put incoming messages into the inbox; end of file means the front end is gone.

    So does a reset, which is what there is when it died with something of ours unread.
    """
    try:
        with contextlib.suppress(OSError), connection.makefile("rb") as stream:
            while True:
                head = stream.read(HEAD_BYTES)
                if len(head) < HEAD_BYTES:
                    break
                size = int.from_bytes(head, "little")
                body = stream.read(size) if size <= MAX_FRAME else b""
                if len(body) < size:
                    break
                loop.inbox.put(decode_to_engine(body))
    finally:  # a message that cannot be read leaves no deaf engine behind
        loop.inbox.put(Shutdown())


if __name__ == "__main__":
    os._exit(main())  # skip interpreter teardown: threads of native libraries may still spin
