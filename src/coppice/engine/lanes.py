"""Lanes: the flights of a step, all in one lane, or those of prompts beside the decodes'.

With two lanes what a plan grants to prompts takes off on threads of its own, and steps of
decodes go on beside it until it has landed (Nexus, intra-device prefill/decode, 2025). Planning,
choosing and all bookkeeping stay in the engine's thread; another only computes. Where nothing
would go on beside it, a flight has all threads, as in one lane.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from typing import Protocol

from coppice.cost import StepCost
from coppice.engine.config import EngineConfig
from coppice.engine.flight import Flight
from coppice.engine.loading import Decoder
from coppice.engine.pages import SequencePages
from coppice.engine.sequence import Sequence
from coppice.engine.step import StepRunner
from coppice.errors import ConfigError
from coppice.kernels import expect_work, num_threads
from coppice.kernels.team import Team
from coppice.models.decoder import Decoder as RealDecoder
from coppice.scheduling import FlowQueues, Grant, Snapshot
from coppice.scheduling.interfaces import SequenceView
from coppice.scheduling.partition import LEAST_UNITS, Device, Operator, PhaseSplit
from coppice.speculation import DraftTree

FEW_TEAMS = 4
"""Teams kept by a lane, one for each number of threads it had lately."""

View = Callable[[Snapshot], Snapshot]
Plan = Callable[[View], list[Grant]]
"""Plans from what a view leaves of the snapshot, and carries it out but for the rows."""
Guess = Callable[[list[Grant]], Mapping[int, DraftTree]]
"""Trees to verify behind the granted rows."""


class Lanes(Protocol):
    """What the engine needs of its lanes."""

    runner: StepRunner
    """Of the flights in the engine's thread, decodes among them."""
    waited_s: float
    """Seconds the engine's thread stood still while the model computed."""

    def flights(self, plan: Plan, guess: Guess) -> Iterator[Flight]:
        """A step: plan and compute; each flight as it lands, to be taken at once."""
        ...

    def holds(self, sequence: Sequence) -> bool:
        """Whether it is in flight: its pages are in use."""
        ...

    def spent(self, seconds: float) -> None:
        """The step took so long: shared among what was in flight in it (`Flight.share_s`)."""
        ...

    def close(self) -> None:
        """The last call; nothing is in flight after it."""
        ...


class OneLane:
    """Implements `Lanes`: a step is one flight on all threads.

    Args:
        runner: of the flights.
        clock: the engine's.
    """

    def __init__(self, runner: StepRunner, clock: Callable[[], float]) -> None:
        self.runner = runner
        self.waited_s = 0.0
        self._clock = clock
        self._flown: list[Flight] = []

    def flights(self, plan: Plan, guess: Guess) -> Iterator[Flight]:
        """See `Lanes`."""
        expect_work()
        yield from self._fly(plan(_everything), guess)

    def holds(self, sequence: Sequence) -> bool:
        """See `Lanes`."""
        return False

    def spent(self, seconds: float) -> None:
        """See `Lanes`."""
        shares = sum(flight.share for flight in self._flown)
        for flight in self._flown:
            flight.share_s += seconds * flight.share / shares
        self._flown.clear()

    def close(self) -> None:
        """See `Lanes`."""

    def _fly(self, grants: list[Grant], guess: Guess, share: float = 1.0) -> Iterator[Flight]:
        """A flight in the engine's thread; none where nobody has rows."""
        trees = guess(grants)
        began_s = self._clock()
        flight = self.runner.lay_out(grants, trees)
        if flight.ran:
            flight.began_s, flight.share = began_s, share
            self._flown.append(flight)
            self._wait(partial(self.runner.compute, flight))
            yield flight

    def _wait(self, model: Callable[[], object]) -> None:
        began = time.perf_counter()
        model()
        self.waited_s += time.perf_counter() - began


class TwoLanes(OneLane):
    """Implements `Lanes`: prompts fly beside decodes.

    Args:
        runner: of the flights in the engine's thread.
        prompts: of those beside it; shares nothing with the other but weights and pages.
        threads: how many of the threads a flight of prompts gets, by its rows and the decodes'.
        clock: the engine's.
    """

    def __init__(
        self,
        runner: StepRunner,
        prompts: StepRunner,
        threads: Callable[[int, int], int],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(runner, clock)
        self._prompts = prompts
        self._threads = threads
        self._num_threads = num_threads()
        self._own_team, self._their_team = (lru_cache(FEW_TEAMS)(Team) for _ in range(2))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self.num_beside = 0
        """Flights that had decodes beside them."""
        self._aloft: Flight | None = None
        self._computed: Future[None]

    def flights(self, plan: Plan, guess: Guess) -> Iterator[Flight]:
        """See `Lanes`."""
        if self._aloft is not None and self._computed.done():
            yield self._land()
        if self._aloft is None:
            expect_work()
            grants = self._take_off(plan(_everything))
        else:
            grants = plan(self._beside)
        if self._aloft is None:
            yield from self._fly(grants, guess)
            return
        self._flown.append(self._aloft)
        rest = 1.0 - self._aloft.share
        with self._own_team(round(rest * self._num_threads)):
            yield from self._fly(grants, guess, rest)
        if self._flown == [self._aloft]:  # nothing goes on beside it
            yield self._land()

    def holds(self, sequence: Sequence) -> bool:
        """See `Lanes`."""
        return self._aloft is not None and any(ran.sequence is sequence for ran in self._aloft.ran)

    def close(self) -> None:
        """See `Lanes`."""
        self._worker.shutdown()

    def _take_off(self, grants: list[Grant]) -> list[Grant]:
        """Send prompts off, if there are decodes to go on beside them; what stays."""
        prompts = [grant for grant in grants if not _decodes(grant.sequence)]
        decodes = [grant for grant in grants if _decodes(grant.sequence)]
        if not prompts or not decodes:
            return grants
        flight = self._prompts.lay_out(prompts, {})
        if flight.ran:
            threads = self._threads(flight.num_rows, len(decodes))
            flight.share = threads / self._num_threads
            self._computed = self._worker.submit(self._compute, flight, self._their_team(threads))
            self._aloft = flight
            self.num_beside += 1
        return decodes

    def _compute(self, flight: Flight, team: Team) -> None:
        with team:
            self._prompts.compute(flight)

    def _land(self) -> Flight:
        """Wait for what is aloft."""
        assert self._aloft is not None
        self._wait(self._computed.result)
        flight, self._aloft = self._aloft, None
        return flight

    @staticmethod
    def _beside(snapshot: Snapshot) -> Snapshot:
        """While prompts are aloft, decodes are planned alone."""
        running = [s for s in snapshot.running if _decodes(s)]
        taken = len(snapshot.running) - len(running)
        return replace(
            snapshot,
            running=running,
            waiting=FlowQueues(snapshot.waiting.flows),
            max_sequences=snapshot.max_sequences - taken,
        )


def make_lanes(
    config: EngineConfig,
    decoder: Decoder,
    runner_of: Callable[[Decoder], StepRunner],
    *,
    cost: StepCost,
    pages: SequencePages,
    clock: Callable[[], float],
) -> Lanes:
    """The configured lanes.

    Args:
        config: ``lanes``.
        decoder: the model.
        runner_of: makes a runner over the engine's pages.
        cost: what steps take on all threads.
        pages: how many are in use.
        clock: the engine's.

    Raises:
        ConfigError: two lanes were asked for and cannot be had.
    """
    one, threads = OneLane(runner_of(decoder), clock), num_threads()
    if config.lanes == "one" or (config.lanes == "auto" and threads < LEAST_UNITS):
        return one
    other = decoder.another() if isinstance(decoder, RealDecoder) else None
    if other is not None and other.program is not None and threads > 1:
        split = partial(_threads_for_prompts, PhaseSplit(threads), cost, pages)
        return TwoLanes(one.runner, runner_of(other), split, clock)
    if config.lanes == "auto":
        return one
    raise ConfigError(
        "Two lanes need two threads or more, the native kernels, and a model that these run as one "
        "program (no mixture of experts, no reordered columns); set lanes to one or auto.",
        param="lanes",
    )


def _threads_for_prompts(
    split: PhaseSplit, cost: StepCost, pages: SequencePages, rows: int, decodes: int
) -> int:
    """Threads for a flight of prompts, by what steps have taken on all of them.

    Work is counted in seconds of the whole machine: a row's arithmetic by its marginal price,
    and the weights, which every flight reads, by that of the smallest step.
    """
    device = Device(units=split.units, flops_per_s=1.0, bytes_per_s=1.0, launch_s=1e-6)
    weights_s, row_s = cost.time(1), cost.per_row_s
    prompts, others = ([Operator(row_s * count, weights_s)] for count in (rows, decodes))
    kv_used = 1.0 - pages.allocator.num_available / pages.num_pages
    return split.split(lambda share: device.together(prompts, others, share), kv_used)


def _everything(snapshot: Snapshot) -> Snapshot:
    return snapshot


def _decodes(sequence: SequenceView) -> bool:
    return sequence.num_tokens - sequence.num_computed == 1
