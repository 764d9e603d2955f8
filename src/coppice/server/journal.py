"""The write-ahead journal: live requests and their tokens, written down.

What `coppice.server.replay` keeps in memory so that the engine process may die, this keeps
in files so that the HTTP process may die too. An accepted request is on the disk before the
first byte of its answer goes out. Its tokens follow without that wait, and may even be left
out: seed and position say what they are, so a lost one is computed again, alike.

Nothing here blocks the event loop: records gather while a thread writes the ones before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from coppice.engine.messages import FinishReason, Output, TokenLogprob
from coppice.engine.request import Request
from coppice.errors import ConfigError
from coppice.server.moments import Moment, moment
from coppice.server.segments import SEGMENT_BYTES, Segments

log = logging.getLogger("coppice.server.journal")

GATHER_S = 0.05
"""How long tokens wait for others before they are written together."""
BACKLOG_BYTES = 16 << 20
"""Records waiting for a slow disk; beyond it tokens are left out."""


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag="a", kw_only=True):
    """A call that was let in: enough to run it again and to frame its reply.

    Attributes:
        call: id of the reply.
        request_id: of the HTTP request.
        key: name of the key it came with, never the secret.
        created: unix seconds, as the reply says it.
        deadline: when it expires.
        fingerprint: of the model that answers it.
        requests: with their seeds.
        body: the JSON body without its prompt; says how the reply is framed.
        warnings: what its first event says of the body.
    """

    call: str
    request_id: str
    route: str
    key: str
    tenant: str
    created: int
    deadline: Moment
    fingerprint: str
    requests: list[Request]
    body: bytes
    warnings: list[str] = []


class Heard(msgspec.Struct, frozen=True, array_like=True, tag="h", gc=False):
    """One output of the engine; ``number`` of its request, ``start`` tokens came before it."""

    call: str
    number: int
    index: int
    start: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    error: tuple[str, str] | None = None
    drafted: int = 0
    accepted: int = 0


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="e", gc=False):
    """A call that is over, since ``at``."""

    call: str
    outcome: str
    at: Moment


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Accepted | Heard | Ended).decode
_elements = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


def call_of(body: bytes) -> str:
    """Whose record it is."""
    return msgspec.msgpack.decode(_elements(body)[1], type=str)


@dataclass(slots=True)
class Recorded:
    """What a journal knows of a call."""

    accepted: Accepted
    heard: list[Heard] = field(default_factory=list)
    ended: Ended | None = None
    size_bytes: int = 0

    def outputs(self) -> list[Output]:
        """What the engine said, without repetitions and up to the first gap of each choice."""
        made: list[Output] = []
        reached: dict[tuple[int, int], int] = {}
        for heard in sorted(
            self.heard, key=lambda h: (h.number, h.index, h.start, h.finish_reason is not None)
        ):
            choice = heard.number, heard.index
            if reached.get(choice, 0) != heard.start:
                continue
            ended = heard.finish_reason is not None
            reached[choice] = -1 if ended else heard.start + len(heard.tokens)
            made.append(
                Output(
                    request_id=self.accepted.requests[heard.number].id, index=heard.index,
                    tokens=heard.tokens, logprobs=heard.logprobs,
                    finish_reason=heard.finish_reason, stop_token=heard.stop_token,
                    cached_tokens=heard.cached_tokens, error=heard.error,
                    drafted=heard.drafted, accepted=heard.accepted,
                )
            )  # fmt: skip
        return made


class Journal:
    """Takes records on the event loop; a thread of its own writes and syncs them.

    A disk that is full or fails ends the journal, not the server: `on` turns false, a warning
    is logged once, and who waits goes on.

    Args:
        folder: where the files lie; one server at a time.
    """

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._segments: Segments | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._flusher: asyncio.Task[None] | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._news, self._urgent = asyncio.Event(), asyncio.Event()
        self._kept: dict[str, Counter[tuple[int, int]]] = {}
        self._untidy = False
        self.on = self.frozen = False
        self.left_out = 0
        """Token records not written for want of speed."""

    @property
    def size_bytes(self) -> int:
        """Of its files."""
        return self._segments.size_bytes if self._segments else 0

    async def open(self) -> list[Recorded]:
        """Take the folder and read what an earlier process left; kept until `forget`.

        Raises:
            ConfigError: the folder cannot be had.
        """
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, self._read)
        for recorded in found:
            positions: Counter[tuple[int, int]] = Counter()
            for heard in recorded.heard:
                choice = heard.number, heard.index
                end = heard.start + len(heard.tokens)
                positions[choice] = max(positions[choice], end)
            self._kept[recorded.accepted.call] = positions
        self.on = self._untidy = True
        self._flusher = loop.create_task(self._flush(), name="journal")
        return found

    def accept(self, accepted: Accepted) -> asyncio.Future[None]:
        """Write a call down; the future is done once it is on the disk, or the journal off."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._kept[accepted.call] = Counter()
        if self.on:
            self._waiters.append(written)
            self._put(_encode(accepted), urgent=True)
        else:
            written.set_result(None)
        return written

    def hear(self, call: str, output: Output) -> None:
        """Write down what the engine said of a call."""
        positions = self._kept.get(call)
        if not self.on or positions is None:
            return
        number = int(output.request_id.rpartition("-")[2])
        choice = number, output.index
        start = positions[choice]
        positions[choice] += len(output.tokens)
        if self._pending_bytes > BACKLOG_BYTES:
            self.left_out += 1
            return
        self._put(
            _encode(
                Heard(
                    call, number, output.index, start, output.tokens, output.logprobs,
                    output.finish_reason, output.stop_token, output.cached_tokens, output.error,
                    output.drafted, output.accepted,
                )
            )
        )  # fmt: skip

    def end(self, call: str, outcome: str) -> None:
        """Write down that a call is over; it can be taken up late until it is forgotten."""
        if self.on and call in self._kept:
            self._put(_encode(Ended(call, outcome, moment())))

    def forget(self, call: str) -> None:
        """Nobody will ask for it again."""
        if self.on and self._kept.pop(call, None) is not None:
            self._untidy = True
            self._news.set()

    def freeze(self) -> None:
        """Take no more records: what has not ended now is for the next process to end."""
        self.on, self.frozen = False, True

    async def close(self) -> None:
        """Write what waits and let go of the folder."""
        self.freeze()
        if self._flusher is not None:
            self._news.set()
            self._urgent.set()
            await self._flusher
        if self._segments is not None:
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._segments.close)
            except OSError as error:
                log.warning("The journal could not be closed: %s.", error)
        self._thread.shutdown(wait=False)

    def _put(self, body: bytes, *, urgent: bool = False) -> None:
        self._pending.append(body)
        self._pending_bytes += len(body)
        self._news.set()
        if urgent:
            self._urgent.set()

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        closing = False
        while not closing:
            await self._news.wait()
            if not self._urgent.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._urgent.wait(), GATHER_S)
            closing = not self.on
            self._news.clear()
            self._urgent.clear()
            bodies, self._pending, self._pending_bytes = self._pending, [], 0
            waiters, self._waiters = self._waiters, []
            kept = frozenset(self._kept) if self._untidy else None
            self._untidy = False
            try:
                if await loop.run_in_executor(
                    self._thread, self._write, bodies, bool(waiters), kept
                ):
                    self._untidy = True
            except Exception as error:  # or every stream would wait for its record for ever
                self._turn_off(error)
                closing = True
            finally:
                for waiter in (*waiters, *(self._waiters if closing else ())):
                    if not waiter.done():
                        waiter.set_result(None)

    def _turn_off(self, error: Exception) -> None:
        self.on = False
        self._pending.clear()
        log.warning(
            "The journal is off (%s): requests go on, but could not be taken up again if this "
            "process died. Mend %s and start the server again.", error, self._folder,
        )  # fmt: skip

    def _read(self) -> list[Recorded]:
        """In the thread: the calls of earlier processes, oldest first."""
        self._segments = Segments(self._folder, call_of, segment_bytes=self._segment_bytes)
        calls: dict[str, Recorded] = {}
        rest: list[tuple[Heard | Ended, int]] = []
        for body, record in self._records():
            if isinstance(record, Accepted):
                calls.setdefault(record.call, Recorded(record)).size_bytes += len(body)
            else:
                rest.append((record, len(body)))
        for record, size in rest:  # a tidied file may have put them before their call
            recorded = calls.get(record.call)
            if recorded is None:
                continue
            recorded.size_bytes += size
            if isinstance(record, Heard):
                recorded.heard.append(record)
            else:
                recorded.ended = record
        return list(calls.values())

    def _records(self) -> Iterator[tuple[bytes, Accepted | Heard | Ended]]:
        assert self._segments is not None
        try:
            for body in self._segments.read():
                yield body, _decode(body)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                f"The journal in {self._folder} cannot be read ({error}); move it away to begin "
                "a new one.", param="journal",
            ) from error  # fmt: skip

    def _write(self, bodies: list[bytes], sync: bool, kept: Container[str] | None) -> bool:
        """In the thread; true when a file was begun, so that others may be tidied."""
        assert self._segments is not None
        begun = self._segments.append(bodies) if bodies else False
        if sync:
            self._segments.sync()
        if kept is not None:
            self._segments.tidy(kept)
        return begun
