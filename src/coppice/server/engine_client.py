"""The front end's view of the engine: submit, listen, cancel; notice its death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from coppice.engine.messages import (
    Cancel,
    CancelReason,
    FromEngine,
    ModelFacts,
    Output,
    Park,
    Ready,
    StepStats,
    Submit,
)
from coppice.engine.request import Request
from coppice.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    CoppiceError,
    EngineDeadError,
    UnsupportedModelError,
)
from coppice.server.engine_process import EngineProcess

log = logging.getLogger("coppice.server.engine")

State = Literal["loading", "ready", "restarting", "failed", "stopped"]
_OPERATORS_FAULT = frozenset(
    error.code for error in (ConfigError, CheckpointError, UnsupportedModelError)
)
MAX_UNREAD = 1024
"""Outputs a reader may lag behind before its request is parked in the engine."""
BACKOFF_FIRST_S, BACKOFF_LAST_S, HEALTHY_S = 0.5, 30.0, 60.0


@dataclass(slots=True)
class LiveRequest:
    """A request the engine works on, with all it has accepted so far.

    The accepted tokens are what a restarted engine would be given to continue from.
    """

    request: Request
    queue: asyncio.Queue[Output]
    accepted: list[list[int]]
    open: set[int]
    submitted_s: float = field(default_factory=time.monotonic)
    started: bool = False
    parked: bool = False

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens still to be read: all until the first output, then none."""
        return 0 if self.started else len(self.request.prompt)


class AsyncEngine:
    """Spawns and supervises the engine process and routes its outputs.

    Args:
        command: the engine's command line without ``--socket``.
        on_output: called with each output, before it is queued (metrics).

    Invariant: every submitted request gets, for each of its choices, exactly one output
    with a ``finish_reason``, whatever happens to the process.
    """

    def __init__(
        self, command: Sequence[str], *, on_output: Callable[[Output], None] | None = None
    ) -> None:
        self._command = list(command)
        self._on_output = on_output
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first_ready: asyncio.Future[ModelFacts] | None = None
        self.live: dict[str, LiveRequest] = {}
        self.state: State = "loading"
        self.facts: ModelFacts | None = None
        self.stats: StepStats | None = None
        self.restarts = 0
        self.last_message_s = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Process id of the engine, if one runs."""
        return self._process.pid if self._process else None

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

    def submit(self, request: Request, queue: asyncio.Queue[Output]) -> None:
        """Hand over a request; its outputs arrive on ``queue``.

        Raises:
            CapacityError: the engine is not ready.
        """
        if self.state != "ready" or self._process is None:
            raise CapacityError(
                f"The engine is {self.state}; try again soon.", retry_after_s=2.0,
                code=f"engine_{self.state}",
            )  # fmt: skip
        n = request.sampling.n
        self.live[request.id] = LiveRequest(
            request, queue, accepted=[[] for _ in range(n)], open=set(range(n))
        )
        self._process.send(Submit(request))

    def cancel(
        self, request_id: str, reason: CancelReason = "cancelled", index: int | None = None
    ) -> None:
        """End a request, or one choice of it; harmless when it has ended already."""
        live = self.live.get(request_id)
        if live is None or (index is not None and index not in live.open):
            return
        if self._process is not None:
            self._process.send(Cancel(request_id, reason, index))

    def caught_up(self, request_id: str) -> None:
        """The queue was read to its end: a request parked for its slow reader goes on."""
        live = self.live.get(request_id)
        if live is not None and live.parked:
            self._park(live, False)

    def forget(self, request_id: str) -> None:
        """Cancel what is still open and route no more of its outputs."""
        if request_id in self.live:
            self.cancel(request_id)
            del self.live[request_id]

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop supervising and end the engine process."""
        self.state = "stopped"
        if self._process is not None:
            await self._process.close(grace_s)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self.fail_all("The server stopped.")

    def fail_all(self, message: str) -> None:
        """End every live request with ``shutting_down``."""
        for request_id in list(self.live):
            self.cancel(request_id)
        self._fail_live(message, "shutting_down")

    def kill(self) -> None:
        """End the engine process at once (second SIGTERM)."""
        self.state = "stopped"
        if self._process is not None:
            self._process.kill()

    async def _supervise(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        while True:
            started = time.monotonic()
            problem = await self._run_once()
            self._process = self.stats = None
            stopped = self.state == "stopped"
            self._fail_live(problem.message, problem.code)
            if self._first_ready is not None and not self._first_ready.done():
                self.state = "failed"
                self._first_ready.set_exception(problem)
                return
            if stopped:
                return
            self.state = "restarting"
            if time.monotonic() - started > HEALTHY_S:
                backoff_s = BACKOFF_FIRST_S
            log.error("%s Starting it again in %.1f s.", problem.message, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_LAST_S)
            self.restarts += 1

    async def _run_once(self) -> CoppiceError:
        """One life of the engine process; returns why it ended."""
        try:
            self._process = await EngineProcess.spawn(self._command)
        except (EngineDeadError, OSError) as error:
            return EngineDeadError(f"The engine did not start: {error}.")
        process = self._process
        try:
            async for message in process.messages():
                self.last_message_s = time.monotonic()
                self._take(message)
            status = await process.close(grace_s=1.0)
        finally:
            process.kill()
        if process.fatal is not None and process.fatal.code in _OPERATORS_FAULT:
            return ConfigError(process.fatal.message, code=process.fatal.code)
        if process.fatal is not None:
            return EngineDeadError(process.fatal.message, code=process.fatal.code)
        return EngineDeadError(f"The engine process died (status {status}).")

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Output):
            self._route(message)
        elif isinstance(message, StepStats):
            self.stats = message
        elif isinstance(message, Ready):
            self.facts = message.facts
            if self.state != "stopped":
                self.state = "ready"
            if self._first_ready is not None and not self._first_ready.done():
                self._first_ready.set_result(message.facts)

    def _route(self, output: Output) -> None:
        live = self.live.get(output.request_id)
        if live is None or output.index not in live.open:
            return
        live.started = True
        live.accepted[output.index].extend(output.tokens)
        if self._on_output is not None:
            self._on_output(output)
        if output.finish_reason is not None:
            live.open.discard(output.index)
            if not live.open:
                del self.live[output.request_id]
        live.queue.put_nowait(output)
        if live.queue.qsize() >= MAX_UNREAD and not live.parked:
            self._park(live, True)

    def _park(self, live: LiveRequest, on: bool) -> None:
        live.parked = on
        if self._process is not None:
            self._process.send(Park(live.request.id, on))

    def _fail_live(self, message: str, code: str) -> None:
        code = code if code == "shutting_down" else "engine_dead"
        for request_id, live in list(self.live.items()):
            for index in sorted(live.open):
                self._route(
                    Output(
                        request_id=request_id, index=index,
                        finish_reason="failed", error=(code, message),
                    )
                )  # fmt: skip
