"""From engine outputs to text: the choices of one call, as deltas or as a whole."""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from msgspec.structs import replace

from coppice.engine.detokenize import TextAssembler, TokenText
from coppice.engine.faults import NOT_OURS
from coppice.engine.messages import CancelReason, Output, ToolCalled
from coppice.engine.request import Request
from coppice.errors import (
    ContextOverflowError,
    CoppiceError,
    EngineDeadError,
    EngineError,
    GrammarError,
    PoisonedError,
    RequestError,
    RowFaultError,
)
from coppice.server.engine_client import AsyncEngine
from coppice.server.unread import Unread

log = logging.getLogger("coppice.server")
Ending = Literal["finished", "cancelled", "expired"]
_FAILURES = {
    error.code: error
    for error in (RowFaultError, PoisonedError, GrammarError, ContextOverflowError, RequestError)
}
MAX_TOOL_NAME = 256
GRACE_S = 5.0
"""How long after the deadline the front end itself ends a call the engine has not ended."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A shown token and its log-probability.

    Attributes:
        top: bytes and log-probability of the likeliest tokens in its place.
    """

    text: TokenText
    logprob: float
    top: list[tuple[bytes, float]]


@dataclass(slots=True)
class Delta:
    """What is new in one choice. The last one of a choice has a ``finish_reason``."""

    index: int
    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, later: Delta) -> None:
        """Take in what came after."""
        self.text += later.text
        self.scores += later.scores
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


@dataclass(slots=True)
class Choice:
    """One token stream of a call.

    Attributes:
        request: the engine request it belongs to; ``number`` is its index there.
        index: its index in the reply.
    """

    request: Request
    number: int
    index: int
    assembler: TextAssembler
    ending: Ending | None = None

    def take(self, output: Output) -> Delta:
        """Turn one output into what the client sees of it."""
        before = self.assembler.num_tokens
        ends_by_token = output.stop_token is not None
        delta = Delta(self.index, self.assembler.push(output.tokens, stop_token=ends_by_token))
        if output.finish_reason is not None and self.assembler.stop_reason is None:
            delta.text += self.assembler.flush()
        if output.logprobs is not None:
            shown = self.assembler.tokens[before : self.assembler.num_tokens]
            if ends_by_token and self.assembler.stop_reason is None:
                shown = shown[:-1]  # the EOS is no part of the answer's text
            bytes_of = self.assembler.token_bytes
            delta.scores = [
                TokenScore(text, scores.logprob, [(bytes_of(t), lp) for t, lp in scores.top])
                for text, scores in zip(shown, output.logprobs, strict=False)
            ]
        self._end(delta, output)
        return delta

    def _end(self, delta: Delta, output: Output) -> None:
        if self.assembler.stop_reason is not None:
            delta.finish_reason, delta.stop_reason = "stop", self.assembler.stop_reason
            self.ending = "finished"
            return
        match output.finish_reason:
            case None:
                return
            case "stop":
                delta.finish_reason = "stop"
                if output.stop_token in self.request.sampling.stop_token_ids:
                    delta.stop_reason = output.stop_token
                self.ending = "finished"
            case "length":
                delta.finish_reason, self.ending = "length", "finished"
            case "expired":
                delta.finish_reason, delta.stop_reason = "length", "deadline"
                self.ending = "expired"
            case "cancelled":
                delta.finish_reason, delta.stop_reason = "length", "cancelled"
                self.ending = "cancelled"
            case "failed":
                raise _failure(output)


@dataclass(frozen=True, slots=True)
class Timing:
    """Latencies of a call in seconds; ``None`` where it did not get that far."""

    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    queue_s: float | None


class Generation:
    """Runs the engine requests of one call and yields their text.

    Args:
        engine: where they run.
        requests: one per prompt.
        assembler: makes the text assembler of one choice of a request.
        deadline: monotonic time after which the call expires.
        heard: told of each output as it is taken; with it, every token makes a delta of its
            own, so that the deltas of a choice do not depend on how tokens came together.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        requests: Sequence[Request],
        assembler: Callable[[Request], TextAssembler],
        *,
        deadline: float,
        heard: Callable[[Output], None] | None = None,
    ) -> None:
        self._engine = engine
        self.requests = requests
        self._deadline = deadline
        self._heard = heard
        self._known = 0
        self._queue = Unread(sum(request.sampling.n for request in requests))
        self._choices: dict[tuple[str, int], Choice] = {}
        for request in requests:
            for number in range(request.sampling.n):
                self._choices[request.id, number] = Choice(
                    request, number, len(self._choices), assembler(request)
                )
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self._cached: dict[str, int] = {}
        self._guesses: dict[tuple[str, int], tuple[int, int]] = {}
        self.queue_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens shown so far, stop tokens included."""
        return sum(choice.assembler.num_tokens for choice in self._choices.values())

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return sum(self._cached.values())

    @property
    def drafted_tokens(self) -> int:
        """Tokens guessed ahead so far."""
        return sum(drafted for drafted, _ in self._guesses.values())

    @property
    def accepted_tokens(self) -> int:
        """Those of them that were right."""
        return sum(accepted for _, accepted in self._guesses.values())

    @property
    def num_choices(self) -> int:
        """Choices of all requests together."""
        return len(self._choices)

    @property
    def ending(self) -> Ending:
        """How the call as a whole ended, once it has."""
        endings = {choice.ending for choice in self._choices.values()}
        return "expired" if "expired" in endings else (
            "cancelled" if "cancelled" in endings else "finished"
        )  # fmt: skip

    def timing(self, arrived: float) -> Timing:
        """Latencies seen so far, given the call's arrival (monotonic)."""
        now, first = time.monotonic(), self.first_token_s
        later = self.completion_tokens - self.num_choices
        return Timing(
            ttft_s=first - arrived if first else None,
            tpot_s=(now - first) * self.num_choices / later if first and later > 0 else None,
            e2e_s=now - arrived,
            queue_s=self.queue_s,
        )

    def submit(self, known: Sequence[Output] = ()) -> None:
        """Hand all requests to the engine.

        Args:
            known: what an engine has said of them before; they go on from there.

        Raises:
            CapacityError: the engine is gone for good; nothing was left behind.
            PoisonedError: the engine died of the same request before.
        """
        for request in self.requests:
            self._engine.require(request)
        self._known = len(known)
        for output in known:
            self._queue.put_nowait(output)
        for request in self.requests:
            mine = [output for output in known if output.request_id == request.id]
            self._engine.submit(request, self._queue, mine)

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        """End what still runs; `deltas` then yields the endings the engine reports."""
        for request in self.requests:
            self._engine.cancel(request.id, reason)

    def called(self, tool: str) -> None:
        """The answer calls a tool: the session it belongs to is back when that has run."""
        for session in {request.session for request in self.requests} - {""}:
            self._engine.tell_session(ToolCalled(session, tool[:MAX_TOOL_NAME]))

    def abandon(self) -> None:
        """End what still runs and listen no more; harmless when all has ended."""
        for request in self.requests:
            self._engine.forget(request.id)

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """Yield what is new, everything at hand at once, until all choices have ended.

        At most one delta of each choice, by index; with ``heard``, one of each token.

        When the consumer is slower than the engine, a later batch simply holds more.

        Raises:
            EngineError: a choice failed; the others were cancelled.
        """
        open_choices = set(self._choices)
        left = max(0.0, self._deadline + GRACE_S - time.monotonic())
        timer = asyncio.get_running_loop().call_later(left, self._expire)
        try:
            while open_choices:
                batch: list[Delta] = []
                for output in await self._next_outputs():
                    key = (output.request_id, output.index)
                    if key in open_choices:
                        self._take(output, batch)
                        if self._choices[key].ending is not None:
                            open_choices.discard(key)
                if batch:
                    yield batch
        finally:
            timer.cancel()
            self.abandon()

    def _take(self, output: Output, batch: list[Delta]) -> None:
        """Add what an output brings to the deltas at hand."""
        choice = self._choices[output.request_id, output.index]
        self._cached[output.request_id] = max(
            self._cached.get(output.request_id, 0), output.cached_tokens
        )
        if output.drafted:
            self._guesses[output.request_id, output.index] = output.drafted, output.accepted
        if self.first_token_s is None and output.tokens:
            self.first_token_s = time.monotonic()
        if output.times is not None and self.queue_s is None:
            self.queue_s = max(0.0, output.times[1] - output.times[0])
        if self._heard is not None:
            for part in _by_token(output):
                if choice.ending is None:
                    batch.append(self._read(choice, part))
            return
        delta = self._read(choice, output)
        place = bisect_left(batch, choice.index, key=attrgetter("index"))
        if place < len(batch) and batch[place].index == choice.index:
            batch[place].add(delta)
        else:
            batch.insert(place, delta)

    def _read(self, choice: Choice, output: Output) -> Delta:
        try:
            delta = choice.take(output)
        except (CoppiceError, *NOT_OURS):
            raise
        except BaseException as error:  # a panic of the tokenizer's library is no `Exception`
            log.error("%s: no text can be made of it", output.request_id, exc_info=error)
            raise RowFaultError(
                "The answer could not be made text; the server's log says why."
            ) from error
        if choice.assembler.stop_reason is not None and output.finish_reason is None:
            self._engine.cancel(output.request_id, "stop", output.index)
            if self._heard is not None:  # the engine's word for it may come too late
                self._heard(replace(output, tokens=[], logprobs=None, finish_reason="stop"))
        return delta

    async def _next_outputs(self) -> list[Output]:
        outputs = [await self._queue.get()]
        while not self._queue.empty():
            outputs.append(self._queue.get_nowait())
        for request in self.requests:
            self._engine.caught_up(request.id)
        if self._heard is not None:
            for output in outputs[self._known :]:
                self._heard(output)
            self._known = max(0, self._known - len(outputs))
        return outputs

    def _expire(self) -> None:
        """The engine did not end the call in time; end it here."""
        self.cancel("expired")
        for request_id, number in self._choices:
            self._queue.put_nowait(
                Output(request_id=request_id, index=number, finish_reason="expired")
            )


def _by_token(output: Output) -> Iterator[Output]:
    """The same as outputs of one token each; what is told of the end goes with the last."""
    last = len(output.tokens) - 1
    for place, token in enumerate(output.tokens[:last]):
        scores = output.logprobs[place : place + 1] if output.logprobs is not None else None
        yield Output(
            request_id=output.request_id, index=output.index, tokens=[token], logprobs=scores
        )
    if last > 0:
        scores = output.logprobs[last:] if output.logprobs is not None else None
        output = replace(output, tokens=output.tokens[last:], logprobs=scores)
    yield output


def _failure(output: Output) -> CoppiceError:
    code, message = output.error or ("engine_error", "The request failed inside the engine.")
    if code in ("engine_dead", "shutting_down"):
        return EngineDeadError(message, code=code)
    if (known := _FAILURES.get(code)) is not None:
        return known(message)
    return EngineError(message, code=code)
