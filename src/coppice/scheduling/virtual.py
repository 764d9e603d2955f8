"""The engine on a virtual clock: the same planner and policies, no model, no tensors.

Step times come from a cost function, tokens from the trace. What the real engine does to
sequences and pages between two plans happens here in the same order, so what is tuned here
holds there as far as the cost function does (`benchmarks.simulation` measures how far).
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter
from typing import NamedTuple

from coppice.cost import rows_within
from coppice.scheduling.interfaces import Planner, SequenceView, Snapshot
from coppice.scheduling.planner import StepPlanner
from coppice.scheduling.policy import Policy
from coppice.scheduling.queue import FlowQueues
from coppice.scheduling.sessions import Sessions
from coppice.scheduling.virtual_pages import BLOCK_TOKENS, VirtualPages

StepTime = Callable[[int, int, int], float]
"""Seconds of a step of ``(rows, keys, sequences)``; keys are cached tokens its rows attend to."""

_rank = attrgetter("rank")


@dataclass(slots=True, eq=False, kw_only=True)
class VirtualSequence:
    """A request whose answer length is known. Implements `SequenceView`.

    Attributes:
        num_answer: tokens after which it ends.
        blocks: names of equal prefixes, see `VirtualPages`; empty shares nothing.
        tool: what its session is expected to call when it ends.
        deadline_s: seconds from arrival after which it expires.
        ended_s: when it ended; 0 before.
        fate: how: ``finished``, ``expired`` or ``cancelled``.
        recomputed: tokens computed more than once.
        accepted: guesses among its tokens.
    """

    arrival: int
    num_prompt: int
    num_answer: int
    submitted_s: float
    tenant: str = "default"
    session: str = ""
    priority: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    blocks: tuple[int, ...] = ()
    tool: str = ""
    num_tokens: int = 0
    num_computed: int = 0
    num_pages: int = 0
    cached_tokens: int = 0
    rank: tuple[float, ...] = ()
    overtaken: int = 0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    first_tokens: int = 0
    ended_s: float = 0.0
    fate: str = ""
    preemptions: int = 0
    recomputed: int = 0
    accepted: int = 0
    held: list[int] = field(default_factory=list)
    jumps: bool = False

    def __post_init__(self) -> None:
        self.num_tokens = self.num_tokens or self.num_prompt

    @property
    def num_generated(self) -> int:
        """Answer tokens so far."""
        return self.num_tokens - self.num_prompt


Batch = list[tuple[VirtualSequence, int]]
"""Sequences of a step and how many tokens each will have computed after it."""


class Pauses(NamedTuple):
    """What an engine's loop does between steps, in seconds.

    Attributes:
        wake_s: the first step after a rest takes so much longer.
        submit_s: taking in a request.
    """

    wake_s: float = 0.0
    submit_s: float = 0.0


NO_PAUSES = Pauses()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a virtual engine has; names and defaults as `EngineConfig`'s."""

    num_pages: int = 2048
    page_size: int = 32
    max_rows: int = 512
    max_sequences: int = 64
    prefill_chunk: int = 256
    max_step_s: float = inf
    prefix_cache: bool = True
    block_tokens: int = BLOCK_TOKENS


class VirtualEngine:
    """Steps through submitted sequences.

    Args:
        step_time: what a step takes.
        sizes: rows, sequences and pages there are.
        policy: in whose turn.
        planner: who gets rows; a `StepPlanner` when omitted.
        on_token: told of every generated token, after the step.
        on_end: told of every sequence that ended.
    """

    def __init__(
        self,
        step_time: StepTime,
        sizes: Sizes | None = None,
        policy: Policy | None = None,
        *,
        planner: Planner | None = None,
        on_token: Callable[[VirtualSequence, float], None] | None = None,
        on_end: Callable[[VirtualSequence, float], None] | None = None,
    ) -> None:
        self.sizes = sizes or Sizes()
        self.policy = policy or Policy()
        self.step_time = step_time
        self.planner = planner or StepPlanner(_Cost(step_time))
        self.waiting = FlowQueues(self.policy.flows)
        self.running: list[VirtualSequence] = []
        sizes = self.sizes
        self.pages = VirtualPages(sizes.num_pages, sizes.page_size, sizes.block_tokens)
        self.sessions: Sessions[VirtualSequence] = Sessions(
            self.pages, sizes.page_size, self.policy.admission, self.policy.retention
        )
        self.pages.victims = lambda: self.sessions.victims(self.now)
        self.now = 0.0
        self.steps = 0
        self.preemptions = 0
        self.why = ""
        self._deadlines: list[tuple[float, int, VirtualSequence]] = []
        self._on_token = on_token
        self.on_end = on_end

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting)

    def submit(self, sequence: VirtualSequence) -> None:
        """Queue a sequence."""
        sequence.rank = self.policy.order.key(sequence)
        if sequence.deadline_s is not None:
            due = sequence.submitted_s + sequence.deadline_s
            heapq.heappush(self._deadlines, (due, sequence.arrival, sequence))
        if self.sessions.arrive(sequence, self.now):
            self.waiting.push(sequence)

    def end_session(self, session: str) -> None:
        """A session's last turn is over, or nobody waits for its next."""
        self.sessions.end(session, self.now)

    def cancel(self, sequence: VirtualSequence, fate: str = "cancelled") -> None:
        """End a sequence wherever it is."""
        if sequence.fate:
            return
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._leave(sequence)
        self.sessions.cancelled(sequence, self.now)
        self._end(sequence, fate)

    def snapshot(self) -> Snapshot:
        """What the planner is shown."""
        sizes = self.sizes
        return Snapshot(
            running=self.running,
            waiting=self.waiting,
            now=self.now,
            num_available=self.pages.num_available,
            page_size=sizes.page_size,
            max_rows=sizes.max_rows,
            max_sequences=sizes.max_sequences,
            prefill_chunk=sizes.prefill_chunk,
            kept=self.sessions.kept(self.waiting, self.now),
        )

    def step(self, extra_s: float = 0.0) -> float:
        """Plan and carry out one step; the seconds it took, ``extra_s`` among them."""
        while self._deadlines and self._deadlines[0][0] <= self.now:
            self.cancel(heapq.heappop(self._deadlines)[2], "expired")
        self.let_in()
        batch = self.begin(self.snapshot())
        rows = keys = 0
        for sequence, end in batch:
            done = sequence.num_computed
            rows += end - done
            keys += (end - done) * (done + end) // 2
        took = self.step_time(rows, keys, len(batch)) + extra_s
        self.now += took
        self.commit(batch)
        return took

    def let_in(self) -> None:
        """Queue the first turns the gate lets pass by now."""
        for sequence in self.sessions.let_in(self.now, idle=not self.has_work):
            self.waiting.push(sequence)

    def begin(self, snapshot: Snapshot) -> Batch:
        """Plan, preempt, admit and take pages; what is to be computed."""
        plan = self.planner.plan(snapshot)
        self.why = plan.why
        for victim in plan.preempt:
            sequence = _own(victim)
            sequence.preemptions += 1
            sequence.recomputed += sequence.num_computed
            self.preemptions += 1
            self._leave(sequence)
            self.waiting.push(sequence)
        for newcomer in plan.admit:
            if not self._enter(_own(newcomer)):
                break
        for passed in plan.overtaken:
            _own(passed).overtaken += 1
        batch: Batch = []
        for view, num_rows in plan.grants:
            sequence = _own(view)
            end = min(sequence.num_computed + num_rows, sequence.num_tokens)
            if sequence.num_pages and self.pages.grow(sequence, end):
                batch.append((sequence, end))
        self.steps += 1
        return batch

    def commit(self, batch: Batch) -> None:
        """What was begun is computed by now."""
        for sequence, end in batch:
            sequence.num_computed = end
            if sequence.blocks:
                self.pages.share(sequence)
            if end == sequence.num_tokens:
                self._accept(sequence)

    def _enter(self, sequence: VirtualSequence) -> bool:
        if not self.pages.attach(sequence, use_cache=self.sizes.prefix_cache):
            return False
        self.waiting.remove(sequence)
        self.sessions.entered(sequence)
        insort(self.running, sequence, key=_rank)
        if not sequence.scheduled_s:
            sequence.scheduled_s = self.now or 1e-12
            sequence.cached_tokens = sequence.num_computed
            self.policy.flows.charge(sequence, "admitted", sequence.num_prompt, self.now)
        return True

    def _leave(self, sequence: VirtualSequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence)

    def _accept(self, sequence: VirtualSequence) -> None:
        sequence.num_tokens += 1
        if not sequence.first_token_s:
            sequence.first_token_s, sequence.first_tokens = self.now, sequence.num_tokens
        self.policy.flows.charge(sequence, "generated", 1, self.now)
        if self._on_token is not None:
            self._on_token(sequence, self.now)
        if sequence.num_generated >= sequence.num_answer:
            if sequence.session:
                self.sessions.pause(sequence, sequence.tool, self.now)
            self._leave(sequence)
            self._end(sequence, "finished")

    def _end(self, sequence: VirtualSequence, fate: str) -> None:
        sequence.fate = fate
        sequence.ended_s = self.now
        self.policy.flows.charge(sequence, "ended", 0, self.now)
        if self.on_end is not None:
            self.on_end(sequence, self.now)


def play(
    engine: VirtualEngine,
    arrivals: Iterable[VirtualSequence],
    *,
    each_step: Callable[[VirtualEngine], None] | None = None,
    until_s: float = inf,
    pauses: Pauses = NO_PAUSES,
) -> list[VirtualSequence]:
    """Run arrivals, sorted by time, until all have ended or ``until_s``; all of them."""
    pending = list(arrivals)
    at = 0
    while (at < len(pending) or engine.has_work) and engine.now < until_s:
        rested = not engine.has_work and pending[at].submitted_s > engine.now
        if rested:
            engine.now = pending[at].submitted_s
        while at < len(pending) and pending[at].submitted_s <= engine.now:
            engine.now += pauses.submit_s
            engine.submit(pending[at])
            at += 1
        before = engine.steps
        took = engine.step(pauses.wake_s if rested else 0.0)
        idle = took == 0.0 and engine.steps > before
        if each_step is not None:
            each_step(engine)
        if idle:  # nobody may have a turn yet: on to the next arrival, or half a second
            later = pending[at].submitted_s if at < len(pending) else inf
            engine.now = min(later, engine.now + 0.5)
    return pending


def _own(view: SequenceView) -> VirtualSequence:
    assert isinstance(view, VirtualSequence)
    return view


class _Cost:
    """A step-time function as the planner's cost model, for decodes of average context."""

    def __init__(self, step_time: StepTime) -> None:
        self._step_time = step_time

    def time(self, num_rows: int) -> float:
        """See `CostModel`."""
        return self._step_time(num_rows, 0, num_rows)

    def rows_within(self, seconds: float, most: int) -> int:
        """See `CostModel`."""
        return rows_within(self.time, seconds, most)
