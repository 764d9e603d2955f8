"""The split of a device between prefill and decode, and what runs in the two lanes."""

from __future__ import annotations

import random
import statistics

import pytest

from coppice.scheduling.flows import InOrder
from coppice.scheduling.lanes import ModelWork, VirtualLanes
from coppice.scheduling.orders import ByArrival
from coppice.scheduling.partition import (
    MAX_EVALUATIONS,
    Device,
    Operator,
    PhaseSplit,
    automatic,
)
from coppice.scheduling.planner import StepPlanner
from coppice.scheduling.policy import Policy
from coppice.scheduling.virtual import Sizes, VirtualEngine, VirtualSequence

DEVICE = Device(units=64, flops_per_s=1e14, bytes_per_s=8e11, launch_s=1e-3)
WORK = ModelWork(6e9, 6e9, 3e5, 4e4)


def random_state(rng: random.Random) -> tuple[list[Operator], list[Operator]]:
    """The operators of a prefill chunk and of a decode step."""
    rows, seen = rng.randrange(64, 4096), rng.randrange(1, 30_000)
    prefill = [
        Operator(6e9 * rows, 6e9),
        Operator(3e5 * rows * seen, 4e4 * seen * rows / 128, 0.6, 0.5),
    ]
    many, context = rng.randrange(1, 256), rng.randrange(1, 8000)
    decode = [
        Operator(6e9 * many, 6e9),
        Operator(3e5 * many * context, 4e4 * many * context, 0.6, 0.5),
    ]
    return prefill, decode


def exhaustive(prefill: list[Operator], decode: list[Operator], slack: float) -> float:
    """The shortest prefill step beside decodes that may take ``1 + slack`` times as long."""
    whole = DEVICE.time(decode, DEVICE.units)
    allowed = [
        times[0]
        for share in range(1, DEVICE.units)
        if (times := DEVICE.together(prefill, decode, share))[1] <= (1 + slack) * whole
    ]
    return min(allowed, default=DEVICE.together(prefill, decode, 1)[0])


@pytest.mark.parametrize("slack", [0.3, 3.0])
def test_a_split_is_nearly_the_best_after_few_looks(slack: float) -> None:
    rng = random.Random(1)
    off = []
    for _ in range(1000):
        prefill, decode = random_state(rng)
        split = PhaseSplit(DEVICE.units, decode_slack=slack, least_change=0.0)
        share = split.split(lambda share, p=prefill, d=decode: DEVICE.together(p, d, share), 0.1)
        assert split.evaluations <= MAX_EVALUATIONS
        took = DEVICE.together(prefill, decode, share)[0]
        off.append(took / exhaustive(prefill, decode, slack) - 1)
    assert statistics.quantiles(off, n=100)[-2] <= 0.03
    assert min(off) > -0.03  # nor does it take what decodes may not spare


def test_answers_come_first_when_pages_run_short() -> None:
    prefill, decode = random_state(random.Random(2))
    split = PhaseSplit(DEVICE.units)
    plenty = split.split(lambda share: DEVICE.together(prefill, decode, share), 0.1)
    scarce = split.split(lambda share: DEVICE.together(prefill, decode, share), 0.9)
    assert scarce < plenty
    whole = DEVICE.time(prefill, DEVICE.units)
    assert DEVICE.together(prefill, decode, scarce)[0] <= 1.5 * whole * 1.01


def test_small_changes_leave_the_split_alone() -> None:
    split = PhaseSplit(100, decode_slack=1.0, least_change=0.05)
    found = [
        split.split(lambda share, c=c: (c / max(1, share), c / max(1, 100 - share)), 0.0)
        for c in (1.0, 1.01, 1.0)
    ]
    assert len(set(found)) == 1
    assert split.split(lambda share: (1.0, 5.0 if share > 20 else 1.0), 0.0) <= 20


def test_two_cores_are_not_split() -> None:
    assert automatic(Device(units=2, flops_per_s=1e11, bytes_per_s=4e10)) is None
    assert automatic(DEVICE) is not None


def run(split: PhaseSplit | None, *, num_pages: int = 4096) -> tuple[float, list[VirtualSequence]]:
    """Mean time between tokens, and the sequences."""
    rng, now, sequences = random.Random(3), 0.0, []
    for i in range(60):
        now += rng.expovariate(20.0)
        prompt = 8000 if i % 10 == 0 else rng.randrange(50, 800)
        sequences.append(
            VirtualSequence(
                arrival=i, num_prompt=prompt, num_answer=rng.randrange(2, 60), submitted_s=now
            )
        )
    last: dict[int, float] = {}
    gaps: list[float] = []

    def told(sequence: VirtualSequence, at: float) -> None:
        if sequence.arrival in last:
            gaps.append(at - last[sequence.arrival])
        last[sequence.arrival] = at

    engine = VirtualEngine(
        lambda rows, keys, sequences: 0.0,
        Sizes(num_pages=num_pages, prefill_chunk=512, prefix_cache=False),
        Policy(InOrder(), ByArrival()),
        planner=StepPlanner(),
        on_token=told,
    )
    VirtualLanes(engine, DEVICE, WORK, split).play(sequences)
    assert engine.pages.num_available == num_pages
    return statistics.mean(gaps), sequences


def test_everybody_ends_with_the_answer_asked_for() -> None:
    for split in (None, PhaseSplit(DEVICE.units)):
        _, sequences = run(split)
        assert all(s.fate == "finished" and s.num_generated == s.num_answer for s in sequences)


def test_pages_that_run_out_stop_neither_lane() -> None:
    _, sequences = run(PhaseSplit(DEVICE.units), num_pages=300)
    assert all(s.fate == "finished" for s in sequences)
    assert sum(s.preemptions for s in sequences) > 0


def test_long_prompts_hold_answers_up_less_beside_them() -> None:
    assert run(PhaseSplit(DEVICE.units, decode_slack=1.0))[0] < 0.6 * run(None)[0]
