"""One engine process and the Unix socket that leads to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from coppice.engine.messages import (
    STACKS_SIGNAL,
    Fatal,
    FromEngine,
    Shutdown,
    ToEngine,
    decode_from_engine,
    encode,
)
from coppice.errors import EngineDeadError

MAX_FRAME_BYTES = 64 << 20
HEAD_BYTES, READ_BYTES = 4, 256 << 10


class EngineProcess:
    """A running engine: a child process and a framed connection to it.

    The socket lies in a directory of mode 0700 and has mode 0600 itself; one connection is
    accepted, then the directory goes. The child gets its own session so that a Ctrl-C in the
    terminal reaches only the front end, which ends the child by `close` (or by its own death,
    which the child sees as the end of the stream).
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.fatal: Fatal | None = None
        self._frames = self._read()
        self._first: FromEngine | None = None
        self.left = False
        self.terminated = False

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> EngineProcess:
        """Start ``command --socket PATH`` and wait until it connects.

        Raises:
            EngineDeadError: the process ended before it connected.
        """
        folder = Path(tempfile.mkdtemp(prefix="coppice-"))  # mkdtemp makes it 0700
        path = folder / "engine.sock"
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.get_running_loop().create_future()
        )

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if connected.done():
                writer.close()
            else:
                connected.set_result((reader, writer))

        listener = await asyncio.start_unix_server(accept, path=path)
        try:
            path.chmod(0o600)
            process = await asyncio.create_subprocess_exec(
                *command,
                "--socket",
                str(path),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
            await _connected_or_dead(connected, process)
        finally:
            listener.close()
            shutil.rmtree(folder, ignore_errors=True)
        reader, writer = connected.result()
        return cls(process, reader, writer)

    @classmethod
    async def spawn_loaded(cls, command: Sequence[str]) -> EngineProcess:
        """The same, and wait for its first message, by which its model is loaded.

        Raises:
            EngineDeadError: it ended before that.
        """
        process = await cls.spawn(command)
        try:
            process._first = await anext(process._frames, None)
        except BaseException:
            process.kill()
            raise
        if process.fatal is not None or process._first is None:
            status = await process.close(grace_s=1.0)
            why = process.fatal.message if process.fatal else f"it ended with status {status}"
            raise EngineDeadError(why)
        return process

    def send(self, message: ToEngine) -> None:
        """Queue a message; lost without a word when the engine is already gone."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def messages(self) -> AsyncIterator[FromEngine]:
        """Yield messages until the engine closes its end, or `leave`."""
        if self._first is not None:
            yield self._first
        async for message in self._frames:
            yield message

    def leave(self) -> None:
        """Hear no more of it; it ends as it sees the end of the stream."""
        self.left = True
        self._writer.transport.abort()

    async def _read(self) -> AsyncGenerator[FromEngine, None]:
        buffer = bytearray()
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(READ_BYTES):
                buffer += data
                start = 0
                while len(buffer) - start >= HEAD_BYTES:
                    end = start + HEAD_BYTES
                    end += int.from_bytes(buffer[start:end], "little")
                    if end - start > MAX_FRAME_BYTES:
                        return
                    if end > len(buffer):
                        break
                    message = decode_from_engine(bytes(buffer[start + HEAD_BYTES : end]))
                    start = end
                    if isinstance(message, Fatal):
                        self.fatal = message
                    yield message
                del buffer[:start]

    async def close(self, grace_s: float = 5.0) -> int:
        """Ask it to leave, then terminate, then kill. Returns the exit status."""
        self.send(Shutdown())
        for stop, wait_s in ((None, grace_s), (self._process.terminate, 1.0)):
            if stop is not None:
                self.terminated = True
                with contextlib.suppress(ProcessLookupError):
                    stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), wait_s)
                break
        else:
            self.kill()
            await self._process.wait()
        self._writer.close()
        return self._process.returncode or 0

    def dump_stacks(self) -> None:
        """Have a loaded engine write the stacks of its threads to the log."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACKS_SIGNAL)

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


async def _connected_or_dead(
    connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]],
    process: asyncio.subprocess.Process,
) -> None:
    death = asyncio.ensure_future(process.wait())
    try:
        both: set[asyncio.Future[Any]] = {connected, death}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not connected.done():
            raise EngineDeadError(f"The engine process ended with status {death.result()}.")
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    finally:
        death.cancel()
