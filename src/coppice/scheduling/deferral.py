"""Deferral windows: wait as long as the deadline allows, so that batches are large.

For each model the queue's best batch and the time to start it are found anew whenever a
request comes. A batch may start in its window: not before ``frontrun``, after which one more
arrival could no longer be absorbed, and not after ``latest``, when its first deadline would be
missed. Devices are taken from the lowest number up, so load packs onto a prefix of them.

Source: Chen et al., Symphony (2023), with one rule of ours: where queued models are at least as
many as free devices (and two), waiting only loses, so batches start at once.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coppice.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of a batch of ``b``: ``per_item_s * b + base_s``."""

    per_item_s: float
    base_s: float

    def __post_init__(self) -> None:
        if not (0 < self.per_item_s < math.inf and 0 <= self.base_s < math.inf):
            raise ConfigError("A batch profile needs a positive price per item.", param="profile")

    def time(self, batch: int) -> float:
        """Seconds of a batch."""
        return self.per_item_s * batch + self.base_s

    def most_within(self, seconds: float) -> int:
        """The largest batch that ends in time; 0 where none does."""
        return max(0, math.floor((seconds - self.base_s) / self.per_item_s + 1e-9))


class Candidate(NamedTuple):
    """The batch a queue would run.

    Attributes:
        drops: leading requests that cannot be met any more.
        batch: how many run.
        exec_s: when they should start.
        latest_s: when they must.
    """

    drops: int
    batch: int
    exec_s: float
    latest_s: float


@dataclass(slots=True)
class Deferral:
    """The window rule for one model.

    Attributes:
        profile: its batch times.
        budget_s: time from arrival to deadline.
        eager: no waiting, and only requests that are lost already are dropped: a baseline.
        blind: all that is queued runs at once, up to a batch that takes half the budget,
            without a look at deadlines: the plain baseline.
    """

    profile: Profile
    budget_s: float
    eager: bool = False
    blind: bool = False

    def target(self, rate: float) -> int:
        """The batch worth waiting for at ``rate`` requests a second, with staggered devices."""
        profile, best = self.profile, 1
        for batch in range(1, max(1, profile.most_within(self.budget_s)) + 1):
            took = profile.time(batch)
            devices = max(1.0, rate * took / batch)
            if devices > 1.0:
                fits = took * (1 + 1 / devices) <= self.budget_s
            else:
                fits = rate > 0 and took + batch / rate <= self.budget_s
            if fits:
                best = batch
        return best

    def bounds(self, deadlines: Sequence[float], now: float) -> tuple[float, float]:
        """See `Window`."""
        if not deadlines:
            return math.inf, math.inf
        batch = len(deadlines)
        first = deadlines[0]
        return (
            max(now, first - self.profile.time(batch + 1)),
            first - self.profile.time(batch),
        )

    def gather(self, deadlines: Sequence[float], earliest: float, target: int) -> Candidate:
        """The candidate of a queue, deadlines ascending, that cannot start before ``earliest``."""
        profile = self.profile
        waiting = len(deadlines)
        if self.blind:
            size = min(waiting, max(1, profile.most_within(self.budget_s / 2)))
            return Candidate(0, size, earliest, deadlines[0] - profile.time(size))
        skipped = 0
        if not self.eager:  # heads that cannot finish in a batch of all that follow them
            while skipped < waiting and deadlines[skipped] < earliest + profile.time(
                max(1, min(target, waiting - skipped))
            ):
                skipped += 1
        size = min(target, waiting - skipped) if not self.eager else 1
        drops = 0
        while drops < skipped and deadlines[drops] < earliest + profile.time(max(1, size)):
            drops += 1
        if self.eager:
            while drops < waiting and deadlines[drops] < earliest + profile.time(1):
                drops += 1
        if drops == waiting:
            return Candidate(drops, 0, math.inf, math.inf)
        first = deadlines[drops]
        size = max(1, min(size, waiting - drops))
        while size < waiting - drops and first >= earliest + profile.time(size + 1):
            size += 1
        latest = first - profile.time(size)
        front = first - profile.time(size + 1)
        start = earliest if self.eager else max(earliest, min(front, latest))
        return Candidate(drops, size, start, latest)


@dataclass(slots=True)
class Served:
    """What became of a run of the dispatcher."""

    on_time: int = 0
    late: int = 0
    dropped: int = 0
    batches: int = 0
    busy_s: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """All that came."""
        return self.on_time + self.late + self.dropped

    @property
    def share_on_time(self) -> float:
        """Part of the requests that met their deadline; 1 without any."""
        return self.on_time / self.requests if self.requests else 1.0


@dataclass(slots=True)
class _Queue:
    deadlines: deque[float] = field(default_factory=deque)
    version: int = 0
    candidate: Candidate | None = None
    ready: bool = False
    rate: float = 0.0
    seen_s: float = 0.0
    target: int = 1


class Dispatcher:
    """Models and devices on a virtual clock.

    Args:
        rules: of each model.
        devices: how many.
        fallback: start at once when queued models are as many as free devices.
    """

    def __init__(self, rules: Sequence[Deferral], devices: int, *, fallback: bool = True) -> None:
        self._rules = rules
        self._queues = [_Queue() for _ in rules]
        self._free = list(range(devices))
        self._busy_until = [0.0] * devices
        self._events: list[tuple[float, int, int, int]] = []
        self._queued = 0
        self._fallback = fallback
        self.served = Served(busy_s=[0.0] * devices)

    def run(self, arrivals: Sequence[tuple[float, int]]) -> Served:
        """Serve ``(time, model)`` arrivals, sorted, to the last."""
        at = 0
        events = self._events
        while at < len(arrivals) or events:
            if at < len(arrivals) and (not events or arrivals[at][0] <= events[0][0]):
                now, model = arrivals[at]
                at += 1
                self._arrive(now, model)
                continue
            now, kind, who, version = heapq.heappop(events)
            if kind == 0:  # a device is free
                heapq.heappush(self._free, who)
                self._grant(now)
            elif self._queues[who].version == version:
                self._ripe(now, who)
        return self.served

    def _arrive(self, now: float, model: int) -> None:
        queue, rule = self._queues[model], self._rules[model]
        if not queue.deadlines:
            self._queued += 1
        queue.deadlines.append(now + rule.budget_s)
        gap = max(1e-6, now - queue.seen_s)
        queue.seen_s = now
        mean_gap = gap if not queue.rate else 1 / queue.rate + 0.02 * (gap - 1 / queue.rate)
        queue.rate = 1 / mean_gap
        if queue.version % 16 == 0:
            queue.target = rule.target(queue.rate)
        self._renew(now, model)

    def _renew(self, now: float, model: int) -> None:
        queue, rule = self._queues[model], self._rules[model]
        queue.version += 1
        queue.ready = False
        if not queue.deadlines:
            queue.candidate = None
            return
        free_at = now if self._free else min(self._busy_until)
        found = rule.gather(queue.deadlines, max(now, free_at), queue.target)
        for _ in range(found.drops):
            queue.deadlines.popleft()
        self.served.dropped += found.drops
        if not found.batch:
            self._queued -= 1
            queue.candidate = None
            return
        queue.candidate = found
        if found.exec_s <= now:
            self._ripe(now, model)
        else:
            heapq.heappush(self._events, (found.exec_s, 1, model, queue.version))
            if self._fallback and self._queued >= max(2, len(self._free)):
                for other in self._queues:
                    other.ready = other.candidate is not None
                self._grant(now)

    def _ripe(self, now: float, model: int) -> None:
        if self._free:
            self._start(now, model)
        else:
            self._queues[model].ready = True

    def _grant(self, now: float) -> None:
        """A free device goes to the ripe candidate that must start first."""
        while self._free:
            ripe = [
                (q.candidate.latest_s, i)
                for i, q in enumerate(self._queues)
                if q.ready and q.candidate is not None
            ]
            if not ripe:
                return
            latest, model = min(ripe)
            before = self._queues[model].version
            if latest < now:
                self._renew(now, model)
                if self._queues[model].version == before:
                    return
            else:
                self._start(now, model)

    def _start(self, now: float, model: int) -> None:
        queue, rule = self._queues[model], self._rules[model]
        # The queue may have grown, or the start come early: take what fits now.
        found = rule.gather(queue.deadlines, now, queue.target)
        for _ in range(found.drops):
            queue.deadlines.popleft()
        self.served.dropped += found.drops
        if not found.batch:
            self._queued -= 1
            queue.candidate, queue.ready = None, False
            queue.version += 1
            return
        device = heapq.heappop(self._free)
        took = rule.profile.time(found.batch)
        for _ in range(found.batch):
            if queue.deadlines.popleft() >= now + took - 1e-9:
                self.served.on_time += 1
            else:
                self.served.late += 1
        self.served.batches += 1
        self.served.busy_s[device] += took
        self._busy_until[device] = now + took
        heapq.heappush(self._events, (now + took, 0, device, 0))
        if not queue.deadlines:
            self._queued -= 1
        self._renew(now, model)
