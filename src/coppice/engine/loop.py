"""The engine's thread: an inbox of messages, an outbox of messages, steps in between."""

from __future__ import annotations

import faulthandler
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from coppice.engine.engine import Engine
from coppice.engine.faults import describe
from coppice.engine.memory import give_back_heap
from coppice.engine.messages import (
    Cancel,
    EndSession,
    FromEngine,
    Output,
    Park,
    Shutdown,
    Submit,
    ToEngine,
    ToolCalled,
)
from coppice.engine.shortage import Shortage

USAGE_EVERY_S = 60.0
IDLE_STATS_S = 1.0
"""How often an idle engine says that it lives."""


class EngineLoop:
    """Runs an engine until told to stop.

    Args:
        engine: owned by this thread from now on.
        send: takes the messages of one step, in order; called from the loop's thread.
        shortage: what to look at for memory; by ``config.memory_reserve_mib`` when omitted.
    """

    def __init__(
        self,
        engine: Engine,
        send: Callable[[Sequence[FromEngine]], None],
        shortage: Shortage | None = None,
    ) -> None:
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._engine = engine
        self._send = send
        self._shortage = shortage or Shortage(engine.config.memory_reserve_mib)
        self._stopping = self._warm = False
        self._last_stats = 0.0
        self._last_beat = self._last_usage = time.monotonic()

    def run(self) -> None:
        """Take messages and step until `Shutdown`."""
        _Watchdog(self, self._engine.config.watchdog_s).start()
        try:
            while not self._stopping:
                self._round()
        finally:
            self._write_usage()

    def _round(self) -> None:
        self._last_beat = time.monotonic()
        messages: list[FromEngine] = []
        if not self._engine.has_work:
            messages.extend(self._engine.attend())
        self._take_messages(messages)
        if self._shortage.look():
            self._engine.pages.give_back()
            give_back_heap()
        if self._engine.has_work and not self._stopping:
            self._warm = True
            messages.extend(self._engine.step())
        self._add_stats(messages)
        if messages:
            self._send(messages)
        if self._last_beat - self._last_usage >= USAGE_EVERY_S:
            self._write_usage()

    def _write_usage(self) -> None:
        """Append the totals to ``usage_file``; a full disk stops nobody's answer."""
        self._last_usage = time.monotonic()
        path = self._engine.config.usage_file
        if path is not None:
            try:
                self._engine.meter.write_lines(Path(path))
            except OSError as error:
                print(f"usage was not written to {path}: {error}", file=sys.stderr)

    @property
    def beat_age_s(self) -> float:
        """Seconds since the loop last went round."""
        return time.monotonic() - self._last_beat

    def _take_messages(self, messages: list[FromEngine]) -> None:
        """Everything in the inbox; waits for something when there is no work."""
        wait = not self._engine.has_work and not messages
        while True:
            if not wait and self.inbox.empty():
                return
            try:
                message = self.inbox.get(wait, IDLE_STATS_S)
            except queue.Empty:
                if wait and self._warm:
                    self._warm = False
                    give_back_heap()
                return
            wait = False
            match message:
                case Submit(request, progress):
                    try:
                        self._engine.submit(request, progress)
                    except BaseException as error:  # `describe` raises what is not the request's
                        refusal = describe(error, "The engine")
                        choices = [p.index for p in progress] or range(request.sampling.n)
                        messages.extend(
                            Output(
                                request_id=request.id,
                                index=index,
                                finish_reason="failed",
                                error=refusal,
                            )
                            for index in choices
                        )
                case Cancel(request_id, reason, index):
                    messages.extend(self._engine.cancel(request_id, reason, index))
                case Park(request_id, on):
                    self._engine.park(request_id, on)
                case ToolCalled(session, tool):
                    self._engine.sessions.called(session, tool)
                case EndSession(session):
                    self._engine.sessions.end(session, self._engine.clock())
                case Shutdown():
                    self._stopping = True
                    return

    def _add_stats(self, messages: list[FromEngine]) -> None:
        now = time.monotonic()
        busy = self._engine.has_work
        every = self._engine.config.stats_interval_s if busy else IDLE_STATS_S
        ended = any(isinstance(m, Output) and m.finish_reason for m in messages)
        if ended or now - self._last_stats >= every:
            self._last_stats = now
            short = self._shortage.level == "short"
            messages.append(msgspec.structs.replace(self._engine.stats(), short_of_memory=short))


class _Watchdog(threading.Thread):
    """Writes all stacks to stderr when a step takes longer than ``limit_s``."""

    def __init__(self, loop: EngineLoop, limit_s: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._loop = loop
        self._limit_s = limit_s

    def run(self) -> None:
        warned = False
        while True:
            time.sleep(self._limit_s / 4)
            stalled = self._loop.beat_age_s > self._limit_s + IDLE_STATS_S
            if stalled and not warned:
                print(f"engine stalled for {self._loop.beat_age_s:.0f} s", file=sys.stderr)
                faulthandler.dump_traceback(sys.stderr)
            warned = stalled
