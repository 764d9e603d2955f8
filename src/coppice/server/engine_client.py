"""The front end's view of the engine: submit, listen, cancel; start it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from coppice.engine.messages import (
    CancelReason,
    EndSession,
    FromEngine,
    ModelFacts,
    Output,
    Park,
    Ready,
    StepStats,
    ToEngine,
    ToolCalled,
)
from coppice.engine.request import Request
from coppice.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    UnsupportedModelError,
)
from coppice.server.deaths import Backoff, Death, by_status, memory_kills
from coppice.server.dumps import Dumps
from coppice.server.engine_process import EngineProcess
from coppice.server.replay import LiveRequest, Replay
from coppice.server.unread import Unread

log = logging.getLogger("coppice.server.engine")

State = Literal["loading", "ready", "restarting", "failed", "stopped"]
_OPERATORS_FAULT = frozenset(
    error.code for error in (ConfigError, CheckpointError, UnsupportedModelError)
)
GIVE_UP_AFTER = 5
"""Starts in vain after which live requests are failed; new starts go on."""
TICK_S = 1.0
MEMORY_TICKS = 3
"""Ticks a process may take to give its memory back, from the kernel's counting it as killed for
want of memory to the end of its socket."""
STACKS_S = 0.5
"""Time an engine that hangs gets to write down where."""


class AsyncEngine:
    """Spawns and supervises the engine process and routes its outputs.

    Args:
        command: the engine's command line without ``--socket``.
        hang_s: silence after which a loaded engine is ended and started again; 0 is never.
        on_output: called with each output, once it is queued (metrics).
        dumps: where to write what was in an engine that died.

    Invariant: every submitted request gets, for each of its choices, exactly one output
    with a ``finish_reason``, and each of its tokens once, however often the process dies.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        hang_s: float = 60.0,
        on_output: Callable[[Output], None] | None = None,
        dumps: Dumps | None = None,
    ) -> None:
        self._command = list(command)
        self._hang_s = hang_s
        self._on_output = on_output
        self._dumps = dumps
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._successor: asyncio.Task[EngineProcess] | None = None
        self._leaving: set[asyncio.Task[int]] = set()
        self._first_ready: asyncio.Future[ModelFacts] | None = None
        self._replay = Replay(self._tell, self._route, self._all_back)
        self.live = self._replay.live
        self.state: State = "loading"
        self.facts: ModelFacts | None = None
        self.stats: StepStats | None = None
        self.restarts = 0
        self.replacements = 0
        self.silence = Silence()
        self._loaded = self._worked = False
        self._memory_kills: deque[int] = deque(maxlen=MEMORY_TICKS)
        self._began_s: float | None = None
        self.start_took_s = 1.0
        """Seconds from the last start of the process to a loaded model."""

    @property
    def pid(self) -> int | None:
        """Process id of the engine, if one runs."""
        return self._process.pid if self._process else None

    @property
    def replayed(self) -> int:
        """Times a live request was given to a new engine process."""
        return self._replay.replayed

    @property
    def back_in_s(self) -> float:
        """Estimated seconds until an engine that is restarting takes new work again."""
        begun_s = 0.0 if self._began_s is None else time.monotonic() - self._began_s
        return max(1.0, self.start_took_s - begun_s)

    def begin(self) -> None:
        """Start the engine; `ready` tells when its model is loaded."""
        self._first_ready = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def ready(self) -> ModelFacts:
        """Wait until the model is loaded for the first time.

        Raises:
            CoppiceError: the engine ended before that; the code and message are its own.
        """
        assert self._first_ready is not None
        return await asyncio.shield(self._first_ready)

    def require(self, request: Request) -> None:
        """Say whether `submit` would take a request.

        Raises:
            CapacityError: the engine has not begun, or is gone for good.
            PoisonedError: the engine died of the same request before.
        """
        if self.state == "stopped":  # while the request was made ready for it
            raise CapacityError(
                "The server is shutting down; ask another one.", retry_after_s=5.0,
                code="draining",
            )  # fmt: skip
        if self.state not in ("ready", "restarting"):
            raise CapacityError(
                f"The engine is {self.state}; try again soon.", retry_after_s=2.0,
                code=f"engine_{self.state}",
            )  # fmt: skip
        self._replay.require_harmless(request)

    def submit(self, request: Request, queue: Unread, known: Sequence[Output] = ()) -> None:
        """Hand over a request; its outputs arrive on ``queue``.

        While the engine is being started again the request waits for it.

        Args:
            request: what is wanted.
            queue: where its outputs go.
            known: what was heard of it before; it goes on from there.

        Raises:
            CoppiceError: as `require` does.
        """
        self.require(request)
        live = LiveRequest(request, queue)
        for output in known:
            live.take(output)
        live.started = False
        if not live.open:
            return
        self.live[request.id] = live
        if self.state == "ready":
            self._replay.give(live)

    def cancel(
        self, request_id: str, reason: CancelReason = "cancelled", index: int | None = None
    ) -> None:
        """End a request, or one choice of it; harmless when it has ended already."""
        live = self.live.get(request_id)
        if live is not None and (index is None or index in live.open):
            self._replay.cancel(live, reason, index)

    def tell_session(self, message: ToolCalled | EndSession) -> None:
        """Say something of a session; an engine that is being started again knows of none."""
        if self.state == "ready":
            self._tell(message)

    def caught_up(self, request_id: str) -> None:
        """The queue was read to its end: a request parked for its slow reader goes on."""
        live = self.live.get(request_id)
        if live is not None and live.parked:
            self._park(live, False)

    def forget(self, request_id: str) -> None:
        """Cancel what is still open and route no more of its outputs."""
        if request_id in self.live:
            self.cancel(request_id)
        live = self.live.pop(request_id, None)
        if live is not None:
            live.open.clear()
            self._replay.moved(live)  # nobody is on probation who is gone

    async def replace(self, notice_s: float) -> float:
        """Another engine process takes this one's place; it, or its memory, goes away.

        The other is started beside it while it goes on to serve. When that is ready, or the
        notice is over, live requests go on in the other from their tokens, as after a death.

        Returns:
            Seconds until the other had them.

        Raises:
            CapacityError: the engine is not ready, or is being replaced already.
            EngineDeadError: the other did not start within the notice; all is as before.
        """
        if self.state != "ready" or self._process is None or self._successor is not None:
            raise CapacityError(
                "The engine is not ready, or is being replaced already; wait for that.",
                retry_after_s=self.back_in_s, code="engine_restarting",
            )  # fmt: skip
        began_s, old = time.monotonic(), self._process
        log.warning("The engine (process %d) is replaced within %g s.", old.pid, notice_s)
        coming = self._successor = asyncio.create_task(
            EngineProcess.spawn_loaded(self._command), name="engine-successor"
        )
        await asyncio.wait({coming}, timeout=max(0.0, notice_s))
        if coming.done() and (error := coming.exception()) is not None:
            self._successor = None
            raise EngineDeadError(f"Another engine did not start: {error}.") from error
        if self._process is old:  # it may have died meanwhile; then the supervisor has moved on
            old.leave()
        while not self._taken_over(old):
            await asyncio.sleep(0.01)
        self.replacements += 1
        return time.monotonic() - began_s

    def dump_stacks(self) -> bool:
        """Have the engine write its stacks to the log; false where none is loaded."""
        if self._process is None or not self._loaded:
            return False
        self._process.dump_stacks()
        return True

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop supervising and end the engine process."""
        self.state = "stopped"
        if self._successor is not None:
            self._successor.cancel()
            await asyncio.wait({self._successor})
            if not self._successor.cancelled() and self._successor.exception() is None:
                await self._successor.result().close(grace_s=0.0)
        if self._process is not None:
            await self._process.close(grace_s)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await asyncio.gather(*self._leaving, return_exceptions=True)
        self.fail_all("The server stopped.")

    def fail_all(self, message: str) -> None:
        """End every live request with ``shutting_down``, and take no more."""
        self.state = "stopped"
        self._replay.fail(message, "shutting_down")

    def kill(self) -> None:
        """End the engine process at once (second SIGTERM)."""
        self.state = "stopped"
        if self._process is not None:
            self._process.kill()

    async def _supervise(self) -> None:
        backoff = Backoff()
        while True:
            self._began_s = time.monotonic()
            death = await self._run_once()
            self._process = self.stats = None
            if self._first_ready is not None and not self._first_ready.done():
                self.state = "failed"
                self._replay.fail(death.error.message, EngineDeadError.code)
                self._first_ready.set_exception(death.error)
                return
            if self.state == "stopped":
                self._replay.fail("The server stopped.", "shutting_down")
                return
            self.state = "restarting"
            if self._dumps is not None and (not death.replaced):
                inside = [live for live in self.live.values() if live.given]
                self._dumps.engine_died(death, inside, self._replay.alone, self.restarts)
            lost = self._replay.engine_died(death)
            if self._successor is not None:
                log.warning("%d requests move to the engine that takes over.", len(lost))
                continue
            wait_s = backoff.after(death)
            log.error("%s %d requests were in it. Starting it again in %.1f s.",
                      death.error.message, len(lost), wait_s)  # fmt: skip
            if death.lasting or backoff.in_vain >= GIVE_UP_AFTER:
                self._replay.fail(death.error.message, EngineDeadError.code)
            await asyncio.sleep(wait_s)
            self.restarts += 1

    def _taken_over(self, old: EngineProcess) -> bool:
        return self.state == "stopped" or (self._process is not old and self.state == "ready")

    async def _run_once(self) -> Death:
        """One life of the engine process; returns how it ended."""
        self._loaded = self._worked = False
        self._memory_kills.clear()
        self._memory_kills.append(memory_kills())
        try:
            if self._successor is not None:
                coming, self._successor = self._successor, None
                self._process = await coming
                self._began_s = None
            else:
                self._process = await EngineProcess.spawn(self._command)
        except (EngineDeadError, OSError) as error:
            return Death(EngineDeadError(f"The engine did not start: {error}."))
        process = self._process
        self.silence = Silence()
        watch = asyncio.create_task(self._watch(process, self.silence), name="engine-watch")
        try:
            async for message in process.messages():
                self.silence.broken()
                self._take(message)
        except Exception:  # a bug on either side, or a damaged message: replay helps with both
            log.exception("A message of the engine could not be taken; ending it.")
        if process.left:
            watch.cancel()
            leaving = asyncio.create_task(process.close(grace_s=1.0), name="engine-leaves")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            why = EngineDeadError("The engine was replaced.")
            return Death(why, own_doing=False, worked=True, replaced=True)
        try:
            status = await process.close(grace_s=1.0)
        finally:
            watch.cancel()
            process.kill()
        if process.fatal is not None:
            if process.fatal.code in _OPERATORS_FAULT:
                refused = ConfigError(process.fatal.message, code=process.fatal.code)
                return Death(refused, lasting=True)
            return Death(EngineDeadError(process.fatal.message, code=process.fatal.code))
        if process.terminated and status == -signal.SIGTERM:
            status = 0  # that was us, and not why it stopped talking
        return by_status(
            status,
            hung=self.silence.hung,
            out_of_memory=memory_kills() > self._memory_kills[0],
            worked=self._worked,
        )

    async def _watch(self, process: EngineProcess, silence: Silence) -> None:
        """End an engine that has stood still for too long."""
        while True:
            await asyncio.sleep(TICK_S)
            silence.tick()
            self._memory_kills.append(memory_kills())  # those long before are somebody else's
            if self._loaded and 0 < self._hang_s <= silence.ticks * TICK_S:
                silence.hung = True
                log.error("The engine has said nothing for %.0f s; ending it. Its stacks:",
                          self._hang_s)  # fmt: skip
                process.dump_stacks()
                await asyncio.sleep(STACKS_S)
                process.kill()
                return

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Output):
            self._worked = True
            self._route(message)
        elif isinstance(message, StepStats):
            self.stats = message
        elif isinstance(message, Ready):
            self._take_ready(message.facts)

    def _take_ready(self, facts: ModelFacts) -> None:
        self._loaded = True
        if self._began_s is not None:  # a successor was started beside the one before
            self.start_took_s = time.monotonic() - self._began_s
        if self.facts is not None and self.facts.fingerprint != facts.fingerprint:
            # What was begun with other weights cannot be gone on with.
            self._replay.fail("The engine came back with another model.", EngineDeadError.code)
        self.facts = facts
        if self.state != "stopped":
            self._replay.engine_ready()
        if self._first_ready is not None and not self._first_ready.done():
            self._first_ready.set_result(facts)

    def _all_back(self) -> None:
        self.state = "ready"

    def _tell(self, message: ToEngine) -> None:
        if self._process is not None:
            self._process.send(message)

    def _route(self, output: Output) -> None:
        live = self.live.get(output.request_id)
        if live is None or not live.take(output):
            return
        if not live.open:
            del self.live[output.request_id]
        live.queue.put_nowait(output)
        if live.queue.too_many and not live.parked:
            self._park(live, True)
        if self.state == "restarting":
            self._replay.moved(live)
        if self._on_output is not None:
            self._on_output(output)

    def _park(self, live: LiveRequest, on: bool) -> None:
        live.parked = on
        if self.state == "ready":
            self._tell(Park(live.request.id, on))


class Silence:
    """How long the engine has said nothing, in ticks of our own event loop.

    Counted, not measured: where this process itself stood still, or the machine slept, the
    engine is not to blame. Longer steps may take longer; what was told of as strange is not
    learned, so that an engine that stood still is told of the next time, too.
    """

    NOTICED = 5
    """Ticks after which a silence is worth telling; a step takes a quarter of one."""

    def __init__(self) -> None:
        self.ticks = 0
        self.longest = 1.0
        self.hung = False

    def broken(self) -> None:
        """A message came."""
        if self.ticks:
            if not self.strange:
                self.longest = max(float(self.ticks), self.longest)
            self.ticks = 0

    def tick(self) -> None:
        """A tick went by; those that were not silent make for shorter silences."""
        if not self.ticks:
            self.longest = max(1.0, 0.8 * self.longest)
        self.ticks += 1

    @property
    def strange(self) -> bool:
        """Whether the engine is silent for longer than it has been of late."""
        return self.ticks > max(self.NOTICED, 4 * self.longest)
