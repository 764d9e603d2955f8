"""Live requests, and how they go on in a new engine process when the old one has died.

The front end has every token it ever received. Noise is a function of seed and position, so
a request that is given back with its tokens goes on as if nothing had happened; what the
dead engine had computed but not sent is computed again, alike.

Who was there in two crashes is a suspect: before all others go on, each suspect runs alone
until it has got past the place where the engine died. An engine that dies meanwhile was
killed by it, and it is `poisoned`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec

from coppice.engine.messages import Cancel, CancelReason, Output, Park, Progress, Submit, ToEngine
from coppice.engine.request import Request
from coppice.errors import PoisonedError
from coppice.server.deaths import Death
from coppice.server.unread import Unread

log = logging.getLogger("coppice.server.replay")

SUSPECT_AFTER = 2
"""Crashes after which a request that was there each time runs alone."""
MAX_POISONS = 256
LEAST_LEFT_S = 1e-3
PROBATION_TOKENS, PROBATION_S = 16, 10.0
"""A suspect has passed after so many further tokens of each open choice, or after that long if
it still gets on."""
GETS_ON_S = 2.0
"""One whose last token came longer ago may be about to hang the engine, or in a long prompt."""


@dataclass(slots=True)
class OpenChoice:
    """A choice that has not ended: its tokens, its guesses, and how it was told to end."""

    tokens: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    ending: CancelReason | None = None


@dataclass(slots=True)
class LiveRequest:
    """A request not yet ended, with all that a new engine needs to go on with it.

    Attributes:
        open: by index, the choices that have not ended.
        given_s: when the engine that runs now was given it, at first when it came.
        given: the engine that runs now has it.
        started: that engine has answered something.
        parked: for a reader that does not keep up.
        crashes: engines that died by their own doing while they had it.
    """

    request: Request
    queue: Unread
    open: dict[int, OpenChoice] = field(default_factory=dict)
    submitted_s: float = field(default_factory=time.monotonic)
    given_s: float = field(default_factory=time.monotonic)
    given: bool = False
    started: bool = False
    parked: bool = False
    crashes: int = 0

    def __post_init__(self) -> None:
        self.open = {index: OpenChoice() for index in range(self.request.sampling.n)}

    @property
    def left_s(self) -> float | None:
        """Seconds until its deadline, if it has one."""
        deadline_s = self.request.deadline_s
        return None if deadline_s is None else self.submitted_s + deadline_s - time.monotonic()

    def take(self, output: Output) -> bool:
        """Remember what an output brought; false where nobody waits for it."""
        choice = self.open.get(output.index)
        if choice is None:
            return False
        self.started = True
        choice.tokens += output.tokens
        choice.drafted, choice.accepted = output.drafted, output.accepted
        if output.finish_reason is not None:
            del self.open[output.index]
        return True

    def message(self) -> Submit:
        """The request for an engine, with what has been accepted so far."""
        left_s = self.left_s
        if left_s is not None:  # one that is over is the engine's to end
            left_s = max(left_s, LEAST_LEFT_S)
        request = msgspec.structs.replace(self.request, deadline_s=left_s)
        if len(self.open) == request.sampling.n and not any(
            choice.tokens for choice in self.open.values()
        ):
            return Submit(request)
        progress = [
            Progress(index, choice.tokens, choice.drafted, choice.accepted)
            for index, choice in self.open.items()
        ]
        return Submit(request, progress)


_POISONED = (
    "The engine died again and again over this request, at last with nothing else to do; it is "
    "not tried again. Please report it."
)


def _fingerprint(request: Request) -> bytes:
    """Equal for requests that ask for the same, whatever seed they were given."""
    sampling = msgspec.structs.replace(request.sampling, seed=None)
    return sha256(msgspec.msgpack.encode((request.prompt, sampling))).digest()


class Replay:
    """The live requests and their way from one engine process to the next.

    Args:
        tell: sends a message to the engine.
        route: takes an output for a live request, here one made up in the engine's place.
        back: called when every live request has been given back.

    Invariant: while a suspect is on probation, the engine runs nothing else.
    """

    def __init__(
        self,
        tell: Callable[[ToEngine], None],
        route: Callable[[Output], None],
        back: Callable[[], None],
    ) -> None:
        self._tell = tell
        self._route = route
        self._back = back
        self.live: dict[str, LiveRequest] = {}
        self.replayed = 0
        self._alone: LiveRequest | None = None
        self._goals: dict[int, int] = {}
        self._poisons: OrderedDict[bytes, None] = OrderedDict()
        self._passed: list[LiveRequest] = []
        self._heard_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def alone(self) -> LiveRequest | None:
        """The suspect that is being tried."""
        return self._alone

    def give(self, live: LiveRequest) -> None:
        """Hand a request to the engine."""
        live.given, live.given_s = True, time.monotonic()
        self._tell(live.message())
        if live.parked:
            self._tell(Park(live.request.id, True))

    def cancel(self, live: LiveRequest, reason: CancelReason, index: int | None) -> None:
        """End a request, or one choice of it; at once where no engine has it."""
        for number in [index] if index is not None else list(live.open):
            if number in live.open:
                live.open[number].ending = live.open[number].ending or reason
        if live.given:
            self._tell(Cancel(live.request.id, reason, index))
        else:
            self._end_told(live)

    def fail(self, message: str, code: str) -> None:
        """End every live request as failed."""
        for live in list(self.live.values()):
            self._fail(live, message, code)

    def engine_died(self, death: Death) -> list[LiveRequest]:
        """Take every request back; returns those that were in the dead engine."""
        self._stop_timer()
        lost = [live for live in self.live.values() if live.given]
        alone, self._alone = self._alone, None
        self._passed.clear()
        for live in lost:
            live.given = live.started = False
            if death.own_doing and not live.parked and alone in (None, live):
                live.crashes += 1
            self._end_told(live)
        if alone is not None and alone.open and death.own_doing:
            log.error("%s is poisoned: the engine died with it alone", alone.request.id)
            self._poisons[_fingerprint(alone.request)] = None
            if len(self._poisons) > MAX_POISONS:
                self._poisons.popitem(last=False)
            self._fail(alone, _POISONED, PoisonedError.code)
        return lost

    def require_harmless(self, request: Request) -> None:
        """Refuse what has killed the engine before, word for word.

        Raises:
            PoisonedError: it has.
        """
        if self._poisons and _fingerprint(request) in self._poisons:
            raise PoisonedError(_POISONED)

    def engine_ready(self) -> None:
        """Give back what waits: suspects one at a time, then all others together."""
        while suspect := self._next_suspect():
            if self._overdue(suspect):
                continue
            self._alone = suspect
            self._goals = {
                index: len(choice.tokens) + PROBATION_TOKENS
                for index, choice in suspect.open.items()
            }
            log.warning("%s runs alone: it was there in %d crashes", suspect.request.id,
                        suspect.crashes)  # fmt: skip
            self._heard_s = 0.0
            self._later(PROBATION_S, suspect)
            self.replayed += 1
            self.give(suspect)
            return
        for live in list(self.live.values()):
            if not live.given and not self._overdue(live):
                self.replayed += 1
                self.give(live)
        for live in self._passed:
            if live.open and not live.parked:
                self._tell(Park(live.request.id, False))
        self._passed.clear()
        self._back()

    def moved(self, live: LiveRequest) -> None:
        """An output of it came, or its reader was parked; a suspect may have passed."""
        if live is not self._alone:
            return
        self._heard_s = time.monotonic()
        if live.parked or all(
            len(choice.tokens) >= self._goals[index] for index, choice in live.open.items()
        ):
            self._pass(live)

    def _later(self, seconds: float, live: LiveRequest) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._long_enough, live)

    def _long_enough(self, live: LiveRequest) -> None:
        """It was alone for long; an engine that says nothing of it is left to the watch."""
        if time.monotonic() - self._heard_s < GETS_ON_S:
            self._pass(live)
        else:
            self._later(GETS_ON_S / 2, live)

    def _next_suspect(self) -> LiveRequest | None:
        for live in self.live.values():
            if not live.given and live.crashes >= SUSPECT_AFTER and not live.parked:
                return live
        return None

    def _pass(self, live: LiveRequest) -> None:
        """The suspect is none; it waits, without pages, until all others have been tried."""
        self._stop_timer()
        self._alone = None
        live.crashes = 0
        if live.open:
            self._tell(Park(live.request.id, True))
            self._passed.append(live)
        self.engine_ready()

    def _overdue(self, live: LiveRequest) -> bool:
        left_s = live.left_s
        if left_s is None or left_s > 0:
            return False
        self.cancel(live, "expired", None)
        return True

    def _end_told(self, live: LiveRequest) -> None:
        """End the choices that were told to; the engine that should have said so is gone."""
        for index, choice in list(live.open.items()):
            if choice.ending is not None:
                self._route(
                    Output(request_id=live.request.id, index=index, finish_reason=choice.ending)
                )

    def _fail(self, live: LiveRequest, message: str, code: str) -> None:
        if live.given:
            self._tell(Cancel(live.request.id))
        for index in list(live.open):
            self._route(
                Output(
                    request_id=live.request.id, index=index,
                    finish_reason="failed", error=(code, message),
                )
            )  # fmt: skip

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
