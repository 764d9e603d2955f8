"""Cells from outside: jobs one after another, in a process that is ended when one goes wrong.

The worst a job can do is to take its time limit and to cost a new start of the process. Who
waits behind it is somebody of the same tenant, or waits for one job of each other tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256

import msgspec

from coppice.engine.cell_jobs import (
    HEAD_BYTES,
    MAX_FRAME_BYTES,
    MEMORY_MIB,
    Answer,
    Job,
    Refused,
    Reply,
    Setup,
    decode_reply,
    encode,
    framed,
    timed,
)
from coppice.errors import (
    CapacityError,
    ContextOverflowError,
    CoppiceError,
    EngineError,
    GrammarError,
    RequestError,
    TemplateError,
)

log = logging.getLogger("coppice.server.cells")

MAX_WAITING = 1024
WAIT_S = 20.0
"""Longest wait for a turn; then there are too many jobs for one process."""
START_S, STARTS_IN_VAIN = 30.0, 3
"""How long a start may take, and how many may fail before those who wait are told."""
REMEMBER_S, MAX_REMEMBERED = 60.0, 256
"""A job that had to be ended is refused unseen for a while: sent again, it costs nothing."""
_ERRORS = {
    cls.code: cls for cls in (RequestError, ContextOverflowError, TemplateError, GrammarError)
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a cell is for.

    Attributes:
        name: for the log.
        cap_s: how long a job may take.
        error: what a job that had to be ended is refused with.
        subject: what took too much, as a sentence's subject.
    """

    name: str
    cap_s: float
    error: type[RequestError]
    subject: str


@dataclass(slots=True, eq=False)
class _Ask:
    job: bytes
    mark: bytes
    left_s: float
    done: asyncio.Future[Answer]
    deaths: int = 0


class _Turns:
    """What waits, by tenant; one of each tenant in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[_Ask]] = OrderedDict()
        self._some = asyncio.Event()
        self.length = 0

    def put(self, tenant: str, ask: _Ask) -> None:
        self._waiting.setdefault(tenant, deque()).append(ask)
        self.length += 1
        self._some.set()

    async def next(self) -> _Ask:
        """The next that somebody still waits for."""
        while True:
            while not self._waiting:
                self._some.clear()
                await self._some.wait()
            tenant, asks = self._waiting.popitem(last=False)
            ask = asks.popleft()
            self.length -= 1
            if asks:
                self._waiting[tenant] = asks
            if not ask.done.done():
                return ask

    def drain(self) -> list[_Ask]:
        """Everything, taken out."""
        asks = [ask for waiting in self._waiting.values() for ask in waiting]
        self._waiting.clear()
        self.length = 0
        return asks


class Cells:
    """A cell that is always there: started when first needed, again whenever it has ended.

    Args:
        kind: what it is for.
        setup: makes what a new process is told first; called in a thread, once.

    Invariant: a job is answered, refused or cancelled; never is its answer given to another.
    """

    def __init__(self, kind: Kind, setup: Callable[[], Setup]) -> None:
        self._kind = kind
        self._make_setup = setup
        self._setup: bytes | None = None
        self._turns = _Turns()
        self._refused: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._process: _Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the cell, if one runs."""
        return self._process.pid if self._process else None

    def begin(self) -> None:
        """Start the process now, so that the first job need not wait for it."""
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep(), name=f"{self._kind.name}-cell")

    async def ask(self, job: Job, tenant: str = "") -> Answer:
        """Have a job done.

        Raises:
            RequestError: the job's own error, or it took too long or too much.
            CapacityError: too many jobs wait, or no process can be started.
        """
        body = encode(job)
        mark = sha256(body).digest()
        self._refuse_known(mark)
        self.begin()
        if self._turns.length >= MAX_WAITING:
            raise _busy(self._kind)
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._turns.put(tenant, _Ask(body, mark, self._kind.cap_s, done))
        try:
            async with asyncio.timeout(WAIT_S):
                answer = await done
        except TimeoutError:
            raise _busy(self._kind) from None
        if isinstance(answer, Refused):
            if not answer.code:
                raise self._kind.error(f"{self._kind.subject} cannot be used: {answer.message}")
            raise _ERRORS.get(answer.code, EngineError)(answer.message, param=answer.param)
        return answer

    async def close(self) -> None:
        """End the process; what waits is refused."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._keeper
        self._fail_waiting()

    async def _keep(self) -> None:
        """Have a process, and do one job after another in it."""
        again: _Ask | None = None
        in_vain = 0
        try:
            while True:
                if self._process is None:
                    try:
                        await self._start()
                    except (OSError, EOFError, TimeoutError, msgspec.MsgspecError) as error:
                        await self._stop()
                        in_vain += 1
                        if in_vain < STARTS_IN_VAIN:  # it may have been ended from outside
                            continue
                        log.error("The %s cell does not start: %r", self._kind.name, error)
                        in_vain = 0
                        self._fail_waiting(again)
                        again = None
                        await asyncio.sleep(1.0)
                        continue
                    in_vain = 0
                ask = again or await self._turns.next()
                again = ask if await self._do(ask) else None
        finally:
            await self._stop()

    async def _do(self, ask: _Ask) -> bool:
        """Do a job; true where it must be done again, as somebody else may have ended the cell."""
        assert self._process is not None
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(ask.left_s):
                reply = await self._process.exchange(timed(ask.job, datetime.now()))
        except TimeoutError:
            self._refuse(ask, f"takes more than {self._kind.cap_s:g} s")
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            took_s = time.monotonic() - began_s
            log.warning("The %s cell ended over a job after %.2f s (%r)", self._kind.name, took_s,
                        error)  # fmt: skip
            ask.deaths, ask.left_s = ask.deaths + 1, max(0.01, ask.left_s - took_s)
            if ask.deaths > 1:
                self._refuse(ask, f"takes more than {MEMORY_MIB} MiB of memory, or worse")
        else:
            if not ask.done.done():
                ask.done.set_result(reply.answer)
            if not reply.worn:
                return False
        await self._stop()
        return not ask.done.done()

    async def _start(self) -> None:
        if self._setup is None:
            setup = await asyncio.get_running_loop().run_in_executor(None, self._make_setup)
            self._setup = encode(setup)
        self.starts += 1
        self._process = await _Process.spawn()
        async with asyncio.timeout(START_S):
            await self._process.exchange(self._setup)

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.kill()

    def _fail_waiting(self, *more: _Ask | None) -> None:
        for ask in [*self._turns.drain(), *more]:
            if ask is not None and not ask.done.done():
                ask.done.set_exception(_busy(self._kind))

    def _refuse(self, ask: _Ask, reason: str) -> None:
        self._refused[ask.mark] = time.monotonic() + REMEMBER_S, reason
        if len(self._refused) > MAX_REMEMBERED:
            self._refused.popitem(last=False)
        if not ask.done.done():
            ask.done.set_exception(self._error(reason))

    def _refuse_known(self, mark: bytes) -> None:
        until, reason = self._refused.get(mark, (0.0, ""))
        if until > time.monotonic():
            raise self._error(reason)

    def _error(self, reason: str) -> CoppiceError:
        return self._kind.error(f"{self._kind.subject} {reason}; make it simpler.")


def _busy(kind: Kind) -> CapacityError:
    return CapacityError(
        f"The process for {kind.name} has too much to do; try again soon.",
        retry_after_s=2.0, code="cell_busy",
    )  # fmt: skip


class _Wire(asyncio.Protocol):
    """Our end of the socket pair: one frame out, one frame in."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[bytes] | None = None
        self._ended: Exception | None = None

    async def exchange(self, body: bytes) -> bytes:
        """Send a frame; the body of the one that answers it."""
        if self._ended is not None or self.transport is None:
            raise EOFError(f"the process has ended: {self._ended}")
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(framed(body))
        return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ours (asyncio)."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Some of an answer came (asyncio)."""
        self._buffer += data
        size = int.from_bytes(self._buffer[:HEAD_BYTES], "little")
        if size > MAX_FRAME_BYTES:
            self.connection_lost(EOFError(f"an answer of {size} bytes"))
        elif len(self._buffer) >= HEAD_BYTES + size and len(self._buffer) >= HEAD_BYTES:
            body = bytes(memoryview(self._buffer)[HEAD_BYTES : HEAD_BYTES + size])
            self._buffer.clear()
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(body)

    def connection_lost(self, error: Exception | None) -> None:
        """The process has ended (asyncio)."""
        self._ended = error or EOFError("end of the stream")
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._ended)


class _Process:
    """One life of a cell, and the socket pair that leads to it."""

    def __init__(self, process: asyncio.subprocess.Process, wire: _Wire) -> None:
        self._process = process
        self._wire = wire
        self.pid = process.pid

    @classmethod
    async def spawn(cls) -> _Process:
        """Start the program. It inherits the socket and the way to our modules, nothing more."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                paths = os.pathsep.join(path for path in sys.path if path)
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-X", "utf8", "-m", "coppice.engine.cell",
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),), env={"PYTHONPATH": paths},
                    start_new_session=True,
                )  # fmt: skip
            loop = asyncio.get_running_loop()
            _, wire = await loop.create_unix_connection(_Wire, sock=ours)
        except BaseException:
            ours.close()
            raise
        return cls(process, wire)

    async def exchange(self, body: bytes) -> Reply:
        """Send one frame and wait for the one that answers it.

        Raises:
            OSError, EOFError, msgspec.MsgspecError: the process has ended, or lost its mind.
        """
        return decode_reply(await self._wire.exchange(body))

    async def kill(self) -> None:
        """End it, and wait for its end."""
        if self._wire.transport is not None:
            self._wire.transport.abort()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # Popen's kill would look for its status, too
        await self._process.wait()
