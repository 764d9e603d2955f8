"""Prefill and decode side by side on a virtual device, over one pool of pages.

Each lane runs steps of its own; units change hands only between steps. The planner is the
engine's: shown only what is behind by more than a token it plans a prefill step, shown only
the others it plans a decode step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from coppice.scheduling.flows import InOrder
from coppice.scheduling.interfaces import Partition, Snapshot
from coppice.scheduling.partition import Device, Operator
from coppice.scheduling.queue import FlowQueues
from coppice.scheduling.virtual import Batch, VirtualEngine, VirtualSequence

TILE_ROWS = 128
"""Rows of a prompt that attend together, so that their keys are read once."""


class ModelWork(NamedTuple):
    """What a decoder does per row and token, of all layers together.

    Attributes:
        flops_per_row: of the linear layers.
        weight_bytes: read once a step.
        flops_per_key: of one row's attention to one token.
        kv_bytes: of one token.
    """

    flops_per_row: float
    weight_bytes: float
    flops_per_key: float
    kv_bytes: float

    def of(self, batch: Batch) -> list[Operator]:
        """The operators of a step."""
        rows = pairs = read = 0
        for sequence, end in batch:
            done = sequence.num_computed
            own = end - done
            rows += own
            pairs += own * (done + end) // 2
            read += -(-own // TILE_ROWS) * (done + end) // 2
        return [
            Operator(self.flops_per_row * rows, self.weight_bytes),
            Operator(self.flops_per_key * pairs, self.kv_bytes * read, 0.6, 0.5),
        ]


@dataclass(slots=True)
class Lane:
    """The step of one phase: what it computes, on how many units, until when."""

    batch: Batch
    work: list[Operator]
    units: int = 0
    ends_s: float = inf


_IDLE = Lane([], [])


class VirtualLanes:
    """Runs a virtual engine's sequences in one mixed lane or in two.

    Args:
        engine: its queues, pages and planner; its clock is moved here.
        device: what the lanes share.
        work: of the model.
        partition: how the device is split; None runs mixed steps on all of it.
    """

    def __init__(
        self,
        engine: VirtualEngine,
        device: Device,
        work: ModelWork,
        partition: Partition | None = None,
    ) -> None:
        self.engine = engine
        self._device = device
        self._work = work
        self._partition = partition
        self._lanes = {"prefill": _IDLE, "decode": _IDLE}

    def play(self, arrivals: Sequence[VirtualSequence]) -> None:
        """Run arrivals, sorted by time and without deadlines, until all have ended."""
        engine, at = self.engine, 0
        while at < len(arrivals) or engine.has_work:
            next_s = min(lane.ends_s for lane in self._lanes.values())
            if at < len(arrivals):
                next_s = min(next_s, arrivals[at].submitted_s)
            assert next_s < inf, "sequences wait and nothing runs"
            engine.now = max(engine.now, next_s)
            for name, lane in self._lanes.items():
                if lane.ends_s <= engine.now:
                    self._lanes[name] = _IDLE
                    engine.commit(lane.batch)
            while at < len(arrivals) and arrivals[at].submitted_s <= engine.now:
                engine.submit(arrivals[at])
                at += 1
            self._fill()

    def _fill(self) -> None:
        """Begin a step in each idle lane, or a mixed one where there is no partition."""
        self.engine.let_in()
        begun = []
        if self._partition is not None:
            for name, other in (("decode", "prefill"), ("prefill", "decode")):
                free = self._device.units - self._lanes[other].units
                if self._lanes[name] is _IDLE and free:
                    batch = self.engine.begin(self._snapshot(decodes=name == "decode"))
                    if batch:
                        self._lanes[name] = Lane(batch, self._work.of(batch))
                        begun.append(name)
        if all(lane is _IDLE for lane in self._lanes.values()):  # also: neither lane has the pages
            batch = self.engine.begin(self.engine.snapshot())
            if batch:
                self._lanes["prefill"] = Lane(batch, self._work.of(batch))
                begun.append("prefill")
        if begun:
            self._give_units(begun)

    def _snapshot(self, *, decodes: bool) -> Snapshot:
        """The engine's state as one lane sees it: nothing that is in flight, no other phase."""
        whole = self.engine.snapshot()
        flying = {id(s) for lane in self._lanes.values() for s, _ in lane.batch}
        running = [
            s
            for s in whole.running
            if id(s) not in flying and (s.num_tokens - s.num_computed == 1) == decodes
        ]
        return replace(
            whole,
            running=running,
            waiting=FlowQueues(InOrder()) if decodes else whole.waiting,
            max_sequences=whole.max_sequences - len(whole.running) + len(running),
        )

    def _give_units(self, begun: list[str]) -> None:
        """Split the device where both lanes are busy; all of it to a lane that is alone."""
        device, (prefill, decode) = self._device, self._lanes.values()
        shares = {"prefill": device.units, "decode": device.units}
        together = prefill is not _IDLE and decode is not _IDLE
        if together:
            assert self._partition is not None
            pages = self.engine.pages
            share = self._partition.split(
                lambda share: device.together(prefill.work, decode.work, share),
                pages.num_used / pages.num_pages,
            )
            shares = {"prefill": share, "decode": device.units - share}
        for name in begun:
            lane, other = self._lanes[name], decode if name == "prefill" else prefill
            lane.units = min(shares[name], device.units - other.units)
        for name in begun:
            lane, other = self._lanes[name], decode if name == "prefill" else prefill
            beside = device.demand(other.work, other.units) if together else 0.0
            lane.ends_s = self.engine.now + device.time(lane.work, lane.units, beside)
