"""Sessions of agents between their turns: who is in, who waits outside, what the paused keep.

A session is a conversation whose turns alternate with tools. It waits, if at all, before its
first turn; once in, its turns go straight to the queue. While a tool runs its pages may be kept,
always revocably: a session that never comes back costs time and no page (MARS, 2026).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from math import inf
from typing import Generic, NamedTuple, Protocol, TypeVar

from coppice.scheduling.interfaces import Admission, Retention, SequenceView
from coppice.scheduling.planner import pages_for
from coppice.scheduling.queue import FlowQueues

LOST_AFTER_S = 600.0
"""A pause of so many seconds ends the session; a turn that comes later begins it anew."""

MOST_PAUSED = 4096
"""Sessions that may wait for a tool; beyond it the one that has waited longest is given up."""

IDLE_S = 10.0
"""An engine without work for so long takes one more session, whatever the window says."""

GROW = 0.5
"""Part of what sessions still grow by, on average, that is counted before they have."""

S = TypeVar("S", bound=SequenceView)
P_contra = TypeVar("P_contra", bound=SequenceView, contravariant=True)


class PinnedPages(Protocol[P_contra]):
    """Pages as sessions need them."""

    num_pages: int

    @property
    def num_kept(self) -> int:
        """Pages only pins hold."""
        ...

    def pin(self, session: str, sequence: P_contra) -> int:
        """Keep what a sequence computed; pages nobody else has a use for."""
        ...

    def unpin(self, session: str) -> None:
        """Keep it no longer than any other prefix."""
        ...

    def drop(self, sequence: P_contra) -> None:
        """Give its pages back and keep nothing."""
        ...


@dataclass(slots=True)
class _Pause:
    began_s: float
    pages: int
    whole: int
    returned_s: float | None = None


class _Size(NamedTuple):
    """Pages a session had, and those it counts for."""

    pages: int
    counted: int


class Sessions(Generic[S]):
    """The sessions of one engine.

    Args:
        pages: theirs.
        page_size: tokens a page.
        admission: None lets everybody in.
        retention: None pins nothing.
        lost_after_s: see `LOST_AFTER_S`.
    """

    def __init__(
        self,
        pages: PinnedPages[S],
        page_size: int,
        admission: Admission | None = None,
        retention: Retention | None = None,
        *,
        lost_after_s: float = LOST_AFTER_S,
    ) -> None:
        self._pages = pages
        self._page_size = page_size
        self._admission = admission
        self._retention = retention
        self._lost_after_s = lost_after_s
        self._inside: dict[str, _Size] = {}
        self._total = 0
        self._final = 0.0
        self._paused: dict[str, _Pause] = {}
        self._idle_since_s = inf
        self.given_up = 0
        """Sessions that did not come back in time."""
        self.outside: dict[int, S] = {}
        """First turns the gate holds back, by arrival."""
        self.cpu_pressure = 0.0
        """Tools that run or want to, over the places for them; told by who runs them."""

    @property
    def matter(self) -> bool:
        """Whether there is a policy for them; without one none is kept in mind."""
        return self._admission is not None or self._retention is not None

    @property
    def num_inside(self) -> int:
        """Sessions between their first and last turn."""
        return len(self._inside)

    @property
    def num_paused(self) -> int:
        """Sessions of which no turn runs."""
        return len(self._paused)

    @property
    def kv_pressure(self) -> float:
        """Pages all sessions inside hold, had and will want, over those there are.

        Each counts with what it had when its last turn ended, whether or not it was kept, and
        with `GROW` of what lies between that and the mean of sessions that ended: sessions
        are let in young, and all grow.
        """
        return self._total / self._pages.num_pages

    def arrive(self, sequence: S, now: float) -> bool:
        """A turn was submitted; False when it must wait outside."""
        session = sequence.session
        if not session or not self.matter:
            return True
        pause = self._paused.get(session)
        if pause is not None and pause.returned_s is None:
            pause.returned_s = now
            if self._retention is not None:
                self._retention.on_end(session, now, returned=True)
        if session not in self._inside and self._admission is not None:
            self._admission.feedback(self.kv_pressure, self.cpu_pressure, now)
            if self.outside or not self._admission.gate(session):
                self.outside[sequence.arrival] = sequence
                return False
        self._resize(session, self._more(sequence))
        return True

    def let_in(self, now: float, *, idle: bool = False) -> list[S]:
        """Those outside that may come in by now, in the order they came.

        Args:
            now: at least whenever the engine has run out of work.
            idle: whether it has none: nobody is to wait long for sessions that may never come back.
        """
        self._idle_since_s = min(self._idle_since_s, now) if idle else inf
        while self._paused:
            session, pause = next(iter(self._paused.items()))
            if pause.returned_s is not None or pause.began_s + self._lost_after_s > now:
                break
            self._give_up(session, now)
        found: list[S] = []
        while self.outside and self._admission is not None:
            arrival, sequence = next(iter(self.outside.items()))
            session = sequence.session
            forced = session in self._inside or (now - self._idle_since_s >= IDLE_S and not found)
            if not self._admission.gate(session) and not forced:
                break
            del self.outside[arrival]
            self._resize(session, self._more(sequence))
            self._admission.feedback(self.kv_pressure, self.cpu_pressure, now)
            found.append(sequence)
        return found

    def entered(self, sequence: S) -> None:
        """A turn has pages of its own by now."""
        if sequence.session and self._paused.pop(sequence.session, None) is not None:
            self._pages.unpin(sequence.session)

    def pause(self, sequence: S, tool: str, now: float) -> None:
        """A turn ended, its pages not yet given back; the session is expected to go on."""
        session = sequence.session
        if self.outside.pop(sequence.arrival, None) is not None or session not in self._inside:
            return  # it never came in, or has ended while this turn ran
        whole = pages_for(sequence.num_computed, self._page_size)
        alone = whole
        if self._retention is not None:
            if self._retention.on_pause(session, tool, whole, now):
                alone = self._pages.pin(session, sequence)
            else:
                self._pages.drop(sequence)
        self._pause(session, _Pause(now, alone, whole), now)
        self._resize(session, alone)
        if self._admission is not None:
            self._admission.feedback(self.kv_pressure, self.cpu_pressure, now)

    def cancelled(self, sequence: S, now: float) -> None:
        """A turn will not be answered; its session has as long as any to come back."""
        session = sequence.session
        if self.outside.pop(sequence.arrival, None) is None and session in self._inside:
            pause = self._paused.pop(session, None) or _Pause(now, 0, 0)
            pause.began_s, pause.returned_s = now, None
            self._pause(session, pause, now)

    def called(self, session: str, tool: str) -> None:
        """The turn that ended last turned out to call this tool."""
        pause = self._paused.get(session)
        if pause is not None and pause.returned_s is None and self._retention is not None:
            self._retention.on_pause(session, tool, pause.whole, pause.began_s)

    def end(self, session: str, now: float) -> None:
        """The session is over or given up. Unknown ones are ignored: ending twice is no fault."""
        pause = self._paused.pop(session, None)
        if pause is not None:
            self._pages.unpin(session)
            if self._retention is not None and pause.returned_s is None:
                self._retention.on_end(session, now, returned=False)
        if session in self._inside:
            size = self._inside.pop(session)
            self._total -= size.counted
            self._final += (size.pages - self._final) / 8
            if self._admission is not None:
                self._admission.leave(session)

    def victims(self, now: float, among: Container[str] | None = None) -> list[str]:
        """Paused sessions, or those ``among`` some, that first that loses its pages first.

        Those whose next turn waits come last, of them the first who waits longest.
        """
        paused = [s for s in self._paused if among is None or s in among]
        return sorted(paused, key=lambda session: self._place(session, now))

    def kept(self, waiting: FlowQueues, now: float) -> int:
        """Pages worth more to sessions whose tool runs than to those that wait.

        A page is worth to those that wait what they lose a second without it: one second
        each, over the pages they want together. Sessions whose next turn waits are among
        these, with what they kept: pages held for many that wait would let none of them on.
        """
        most = self._pages.num_kept  # some of them may have been taken by now
        if self._retention is None or not most or not waiting:
            return 0
        price = len(waiting) / pages_for(waiting.num_tokens, self._page_size)
        worth = 0
        for session, pause in self._paused.items():
            if worth >= most:
                break
            if pause.returned_s is None and self._retention.rank(session, now) >= price:
                worth += pause.pages
        return min(worth, most)

    def next_change_s(self) -> float:
        """When time alone ends a session or lets one in, as far as is known now."""
        pause = next(iter(self._paused.values()), None)
        change_s = self._idle_since_s + IDLE_S if self.outside else inf
        if pause is not None and pause.returned_s is None:
            change_s = min(change_s, pause.began_s + self._lost_after_s)
        return change_s

    def _pause(self, session: str, pause: _Pause, now: float) -> None:
        self._paused.pop(session, None)
        self._paused[session] = pause
        if len(self._paused) > MOST_PAUSED:
            self._give_up(next(iter(self._paused)), now)

    def _give_up(self, session: str, now: float) -> None:
        self.given_up += 1
        self.end(session, now)

    def _place(self, session: str, now: float) -> tuple[float, float]:
        back = self._paused[session].returned_s
        if back is not None:
            return (inf, -back)
        return (0.0 if self._retention is None else self._retention.rank(session, now), -inf)

    def _resize(self, session: str, pages: int) -> None:
        before = self._inside.get(session, _Size(0, 0)).counted
        counted = pages + int(GROW * max(0.0, self._final - pages))
        self._inside[session] = _Size(pages, counted)
        self._total += counted - before

    def _more(self, sequence: S) -> int:
        """Pages its session will have with this turn: those before it and what it adds."""
        whole = pages_for(sequence.num_tokens, self._page_size)
        pause = self._paused.get(sequence.session)
        return whole if pause is None else pause.pages + max(0, whole - pause.whole)
