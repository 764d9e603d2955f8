"""How a device is split between a prefill and a decode lane that run side by side.

Prefill is bound by arithmetic and gets faster with every unit (core, multiprocessor); decode is
bound by memory, which a part of the units can already keep busy. `PhaseSplit` gives one phase as
much as the other can spare (Nexus, intra-device prefill/decode, 2025): while KV pages are
plenty it serves prompts, once they run short it drains answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf
from typing import NamedTuple

LaneTimes = Callable[[int], tuple[float, float]]
"""Seconds of the next prefill and the next decode step, by units given to prefill."""

MAX_EVALUATIONS = 6
"""Of the times of a split, for one decision."""

LEAST_UNITS = 4
"""Fewer than these are not split."""


class Operator(NamedTuple):
    """One class of work in a step.

    Attributes:
        flops: arithmetic operations.
        nbytes: bytes read from memory.
        saturation: share of the units up to which it gets faster in proportion.
        beyond: what each further unit counts, 0 to 1.
    """

    flops: float
    nbytes: float
    saturation: float = 1.0
    beyond: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the lanes share.

    Attributes:
        units: that can be given to a lane.
        flops_per_s: of all units.
        bytes_per_s: of the memory.
        reach: share of the units that can use the whole memory bandwidth.
        launch_s: what a step takes beside its operators.
    """

    units: int
    flops_per_s: float
    bytes_per_s: float
    reach: float = 0.4
    launch_s: float = 0.0

    def time(self, work: list[Operator], units: int, beside: float = 0.0) -> float:
        """Seconds of a step on so many units, ``beside`` of the bandwidth being used already."""
        bandwidth = self.bytes_per_s * self._bandwidth(units, work, beside)
        total = self.launch_s
        for operator in work:
            total += max(
                operator.flops / (self.flops_per_s * self._counted(units, operator)),
                operator.nbytes / bandwidth,
            )
        return total

    def demand(self, work: list[Operator], units: int) -> float:
        """Share of the bandwidth a step would use if it ran alone."""
        return sum(o.nbytes for o in work) / (self.time(work, units) * self.bytes_per_s)

    def together(
        self, prefill: list[Operator], decode: list[Operator], share: int
    ) -> tuple[float, float]:
        """Seconds of both steps side by side, prefill on ``share`` units; all or none: alone."""
        if share in (0, self.units):
            return self.time(prefill, self.units), self.time(decode, self.units)
        rest = self.units - share
        return (
            self.time(prefill, share, self.demand(decode, rest)),
            self.time(decode, rest, self.demand(prefill, share)),
        )

    def _counted(self, units: int, operator: Operator) -> float:
        """Units that count, as a share of all."""
        share = units / self.units
        most = operator.saturation
        return share if share <= most else most + operator.beyond * (share - most)

    def _bandwidth(self, units: int, work: list[Operator], beside: float) -> float:
        """Share of the bandwidth that units reach, less what the other lane takes."""
        reached = min(1.0, units / (self.reach * self.units))
        if not beside:
            return reached
        own = self.demand(work, units)
        if own + beside <= 1.0:
            return reached
        return min(reached, own / (own + beside))


class PhaseSplit:
    """Nexus's choice of the split; implements `Partition`.

    Args:
        units: to share.
        decode_slack: how much longer a decode step may take than on all units, as long as KV
            usage is below ``threshold``.
        prefill_slack: how much longer a prefill step may, above it.
        threshold: share of KV pages in use at which decode comes first.
        least_change: share of the units below which the split stays as it is.
    """

    def __init__(
        self,
        units: int,
        *,
        decode_slack: float = 2.5,
        prefill_slack: float = 0.5,
        threshold: float = 0.85,
        least_change: float = 0.04,
    ) -> None:
        self.units = units
        self._slack = {True: decode_slack, False: prefill_slack}
        self._threshold = threshold
        self._least_change = least_change * units
        self._prompts_first = True
        self._now = units // 2
        self.evaluations = 0
        """Calls of ``times`` in the last `split`."""

    def split(self, times: LaneTimes, kv_used: float) -> int:
        """Units for prefill; the rest decodes. At least one each."""
        prompts_first = kv_used < self._threshold
        changed = prompts_first != self._prompts_first
        units, constrained = self.units, 1 if prompts_first else 0

        def constrained_s(own: int) -> float:
            self.evaluations += 1
            return times(units - own if prompts_first else own)[constrained]

        self.evaluations = 0
        guess = units - self._now if prompts_first else self._now
        own = self._least(constrained_s, 1 + self._slack[prompts_first], guess)
        found = units - own if prompts_first else own
        if changed or abs(found - self._now) >= self._least_change:
            self._now, self._prompts_first = found, prompts_first
        return self._now

    def _least(self, seconds: Callable[[int], float], most: float, guess: int) -> int:
        """Fewest units on which a phase takes at most ``most`` times what it takes on all.

        Between two known points a time is close to ``a + b / units``: that is solved for the
        next guess, starting from the split there is.
        """
        units = self.units
        enough, enough_s = units, seconds(units)
        few, few_s, limit = 0, inf, most * enough_s
        while enough - few > 1 and self.evaluations < MAX_EVALUATIONS:
            guess = min(max(guess, few + 1, 1), enough - 1)
            if (guess_s := seconds(guess)) <= limit:
                enough, enough_s = guess, guess_s
            else:
                few, few_s = guess, guess_s
            if few and few_s > enough_s:
                share = (limit - enough_s) / (few_s - enough_s)
                guess = ceil(1 / (1 / enough + share * (1 / few - 1 / enough)))
            else:
                guess = enough // 2
        return min(max(enough, 1), units - 1)


def automatic(device: Device) -> PhaseSplit | None:
    """The split of a device; None where one lane of mixed steps is better.

    With few units each is a large part of the whole: half of two cores would prefill at half
    the speed, where a mixed step reads the weights once for both phases.
    """
    return None if device.units < LEAST_UNITS else PhaseSplit(device.units)
