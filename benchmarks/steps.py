"""What the steps of an engine take here: the curve of the model, and what a loop adds to it.

The curve knows one sequence at a time. What decodes of many cost beside it (their attention
reads from other places, their tokens are chosen, the plan is made, the loop keeps its books) is
measured in closed batches through the same loop that replays a trace, and so is what it costs
to begin anew after a rest: sleeping threads, cold caches. No figure comes from a run that is
compared with a simulation.
"""

from __future__ import annotations

import random
import statistics
from bisect import bisect_left
from dataclasses import dataclass

from benchmarks.live import replay
from coppice.cost import StepCurve
from coppice.engine.calibrate import calibrate
from coppice.engine.config import EngineConfig
from coppice.engine.loading import EngineModel
from coppice.scheduling.virtual import StepTime, VirtualSequence

BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPT, ANSWER = 128, 64
REST_S = 0.1


@dataclass(frozen=True, slots=True)
class Steps:
    """A measured machine.

    Attributes:
        curve: seconds of forward passes of one sequence.
        batches: sizes of closed batches of decodes.
        extra_s: what a step of each of them takes beside the curve; may be negative.
        wake_s: what the first step after a rest takes longer.
    """

    curve: StepCurve
    batches: tuple[int, ...]
    extra_s: tuple[float, ...]
    wake_s: float

    def time(self, rows: int, keys: int, sequences: int) -> float:
        """See `StepTime`."""
        if rows == 0:
            return 0.0
        return max(1e-6, self.curve.time(rows, keys) + self._extra(sequences))

    def _extra(self, sequences: int) -> float:
        at = min(max(1, bisect_left(self.batches, sequences)), len(self.batches) - 1)
        (x0, x1), (y0, y1) = self.batches[at - 1 : at + 1], self.extra_s[at - 1 : at + 1]
        return y0 + (y1 - y0) * (min(sequences, self.batches[-1]) - x0) / (x1 - x0)

    def metrics(self) -> dict[str, object]:
        """For a report."""
        return {
            "rows_s": dict(zip(self.curve.rows, self.curve.seconds, strict=True)),
            "key_s": self.curve.per_key_s,
            "extra_s": dict(zip(self.batches, self.extra_s, strict=True)),
            "wake_s": self.wake_s,
        }


def measured_steps(model: EngineModel, config: EngineConfig, *, rounds: int = 3) -> Steps:
    """Measure in several short rounds and keep the median of each figure."""
    found = [_measure(model, config) for _ in range(rounds)]
    curves = [steps.curve for steps in found]
    return Steps(
        StepCurve(
            curves[0].rows,
            tuple(map(statistics.median, zip(*(c.seconds for c in curves), strict=True))),
            statistics.median(c.per_key_s for c in curves),
        ),
        found[0].batches,
        tuple(map(statistics.median, zip(*(s.extra_s for s in found), strict=True))),
        statistics.median(s.wake_s for s in found),
    )


def between(before: Steps, after: Steps) -> tuple[StepTime, float]:
    """Step time and wake time halfway between two measurements, for a run between them."""

    def time(rows: int, keys: int, sequences: int) -> float:
        return (before.time(rows, keys, sequences) + after.time(rows, keys, sequences)) / 2

    return time, (before.wake_s + after.wake_s) / 2


def _measure(model: EngineModel, config: EngineConfig) -> Steps:
    curve = calibrate(model, seconds=1.0)
    batches = tuple(n for n in BATCHES if n <= config.max_sequences)
    extra = tuple(_decode_s(model, config, n) - _curve_s(curve, n) for n in batches)
    steps = Steps(curve, batches, extra, 0.0)
    return Steps(curve, batches, extra, max(0.0, _wake_s(model, config, steps)))


def _curve_s(curve: StepCurve, batch: int) -> float:
    return curve.time(batch, batch * (PROMPT + ANSWER // 2))


def _decode_s(model: EngineModel, config: EngineConfig, batch: int) -> float:
    """Mean seconds from step to step while ``batch`` sequences decode."""
    load = [_sequence(i, 0.0, PROMPT, ANSWER) for i in range(batch)]
    moments = [m for m in replay(model, config, load).moments if m.waiting == 0]
    times = [m.time_s for m in moments if m.running == batch][-ANSWER + 8 :]
    return (times[-1] - times[0]) / (len(times) - 1)


def _wake_s(model: EngineModel, config: EngineConfig, steps: Steps) -> float:
    """Median of what prompts after a rest take longer than their steps should."""
    rng = random.Random(3)
    load = [_sequence(i, REST_S * i, rng.randint(20, 250), 4) for i in range(8)]
    late = []
    for answer in replay(model, config, load).answers:
        rows = answer.prompt
        late.append(answer.ttft - steps.time(rows, rows * rows // 2, 1))
    return statistics.median(late)


def _sequence(number: int, at_s: float, prompt: int, answer: int) -> VirtualSequence:
    return VirtualSequence(arrival=number, num_prompt=prompt, num_answer=answer, submitted_s=at_s)
