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
import time
from bisect import bisect_left
from dataclasses import dataclass

from benchmarks.live import as_request, replay, warm_up
from coppice.cost import StepCurve
from coppice.engine.calibrate import calibrate
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel
from coppice.scheduling.virtual import Pauses, StepTime, VirtualSequence

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
        pauses: what the loop takes between steps.
    """

    curve: StepCurve
    batches: tuple[int, ...]
    extra_s: tuple[float, ...]
    pauses: Pauses

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
            **self.pauses._asdict(),
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
        Pauses(*map(statistics.median, zip(*(s.pauses for s in found), strict=True))),
    )


def between(before: Steps, after: Steps) -> tuple[StepTime, Pauses]:
    """Step time and pauses halfway between two measurements, for a run between them."""

    def halfway(rows: int, keys: int, sequences: int) -> float:
        return (before.time(rows, keys, sequences) + after.time(rows, keys, sequences)) / 2

    pairs = zip(before.pauses, after.pauses, strict=True)
    return halfway, Pauses(*(sum(pair) / 2 for pair in pairs))


def _measure(model: EngineModel, config: EngineConfig) -> Steps:
    curve = calibrate(model, seconds=1.0)
    batches = tuple(n for n in BATCHES if n <= config.max_sequences)
    extra = tuple(_decode_s(model, config, n) - _curve_s(curve, n) for n in batches)
    submit_s = _submit_s(model, config)
    steps = Steps(curve, batches, extra, Pauses(0.0, submit_s))
    wake_s = max(0.0, _wake_s(model, config, steps))
    return Steps(curve, batches, extra, Pauses(wake_s, submit_s))


def _curve_s(curve: StepCurve, batch: int) -> float:
    return curve.time(batch, batch * (PROMPT + ANSWER // 2))


def _decode_s(model: EngineModel, config: EngineConfig, batch: int) -> float:
    """Mean seconds from step to step while ``batch`` sequences decode."""
    load = [_sequence(i, 0.0, PROMPT, ANSWER) for i in range(batch)]
    moments = [m for m in replay(model, config, load).moments if m.waiting == 0]
    times = [m.time_s for m in moments if m.running == batch][-ANSWER + 8 :]
    return (times[-1] - times[0]) / (len(times) - 1)


def _submit_s(model: EngineModel, config: EngineConfig) -> float:
    """Median seconds to take in a request beside steps of one that decodes."""
    engine = Engine(model, config)
    vocab = model.facts.vocab_size
    warm_up(engine, vocab)
    times = []
    for i in range(min(24, config.max_sequences - 1)):
        request = as_request(_sequence(i, 0.0, PROMPT, ANSWER), vocab, seed=1)
        began = time.perf_counter()
        engine.submit(request)
        times.append(time.perf_counter() - began)
        for _ in range(4):
            engine.step()
    return statistics.median(times)


def _wake_s(model: EngineModel, config: EngineConfig, steps: Steps) -> float:
    """Median of what prompts after a rest take longer than their steps should."""
    rng = random.Random(3)
    load = [_sequence(i, REST_S * i, rng.randint(20, 250), 4) for i in range(8)]
    late = []
    for answer in replay(model, config, load).answers:
        rows = answer.prompt
        expected = steps.time(rows, rows * rows // 2, 1) + steps.pauses.submit_s
        late.append(answer.ttft - expected)
    return statistics.median(late)


def _sequence(number: int, at_s: float, prompt: int, answer: int) -> VirtualSequence:
    return VirtualSequence(arrival=number, num_prompt=prompt, num_answer=answer, submitted_s=at_s)
