"""Random work under every policy: 10,000 steps, and 100,000 where there is time."""

from __future__ import annotations

import itertools
import random
from typing import get_args

import pytest

from coppice.scheduling import StepPlanner, make_policy
from coppice.scheduling.policy import OrderName, PolicyName
from coppice.scheduling.virtual import Sizes, VirtualSequence
from tests.kits.schedule import CheckedEngine, CheckedPlanner

POLICIES = list(itertools.product(get_args(PolicyName), get_args(OrderName)))
LETS_WAIT = ("rpm", "isolated")
"""Policies that leave room unused on purpose."""
STEPS = 420
"""Of each pair: more than 10^4 in all."""
PAGE = 16


class Cost:
    """What steps take, for the planner."""

    def time(self, num_rows: int) -> float:
        return 0.002 + 1e-4 * num_rows

    def rows_within(self, seconds: float, most: int) -> int:
        return max(1, min(most, int((seconds - 0.002) / 1e-4)))


def step_time(rows: int, keys: int, sequences: int) -> float:
    return 0.002 + 1e-4 * rows + 1e-8 * keys + 1e-5 * sequences


def random_sequence(number: int, now: float, rng: random.Random) -> VirtualSequence:
    """Of one of five tenants; any priority, any wish, met or not."""
    prompt = rng.choice((1, 15, 16, 17, 100, 700, 1500))
    return VirtualSequence(
        arrival=number,
        num_prompt=prompt,
        num_answer=rng.choice((1, 5, 40, 300)),
        submitted_s=now,
        tenant=f"t{rng.choice((0, 0, 0, 1, 1, 2, 3, 4))}",
        priority=rng.choice((0, 0, 0, 1, -1, 2**31 - 1, -(2**31))),
        ttft_s=rng.choice((None, None, 1e-9, 0.05, 0.5, 86400.0)),
        tpot_s=rng.choice((None, None, 1e-9, 0.004, 0.02)),
        deadline_s=rng.choice((None, None, 0.3, 3.0)),
        blocks=tuple(rng.randrange(3) + 10 * i for i in range(prompt // 512)),
    )


def fuzz(policy: tuple[PolicyName, OrderName], steps: int, seed: int) -> tuple[int, int]:
    """Work in a pool that is too small, with cancels and a clock that jumps both ways.

    Returns:
        How often the pool was short for what ran, and for what waited.
    """
    rng = random.Random(f"{policy}{seed}")
    sizes = Sizes(
        num_pages=160,
        page_size=PAGE,
        max_rows=rng.choice((24, 48, 96)),
        max_sequences=16,
        prefill_chunk=rng.choice((7, 32, 64)),
    )
    planner = CheckedPlanner(StepPlanner(Cost()), conserves=policy[0] not in LETS_WAIT)
    weights = ["t1=3", "t2=0.5", "unheard-of=7"]
    made = make_policy(*policy, weights=weights, limit=40, pool_tokens=sizes.num_pages * PAGE)
    engine = CheckedEngine(step_time, sizes, made, planner=planner)
    count = 0
    live: list[VirtualSequence] = []
    while engine.steps < steps:
        burst = rng.random() < 0.1
        while len(engine.waiting) < 30 and (burst or not engine.has_work):
            count += 1
            live.append(random_sequence(count, engine.now, rng))
            engine.submit(live[-1])
            burst = burst and rng.random() < 0.8
        if rng.random() < 0.03:
            engine.cancel(rng.choice(live))
        if rng.random() < 0.01:
            engine.now += rng.choice((0.5, 3600.0, -0.5, -100.0))
        engine.step()
        engine.check()
        if engine.steps % 64 == 0:
            live = [s for s in live if not s.fate] or live[-1:]
    for _ in range(100_000):
        if not engine.has_work:
            break
        if engine.step() == step_time(0, 0, 0):
            engine.now += 1.0
    assert not engine.has_work, "somebody waits for ever"
    engine.check()
    assert engine.pages.num_used == 0, "pages leaked"
    assert len(engine.waiting) == engine.waiting.num_tokens == len(engine.waiting.urgent) == 0
    assert len(engine.ended) == count, "a request without an end"
    engine.check_ends()
    return engine.preemptions, planner.crowded


def check(policy: tuple[PolicyName, OrderName], seeds: range) -> None:
    """So many steps for each seed, and for some more until the pool was short at times."""
    short = [fuzz(policy, STEPS, seed) for seed in seeds]
    for seed in range(100, 105):
        if all(map(sum, zip(*short, strict=True))):
            break
        short.append(fuzz(policy, STEPS, seed))
    assert sum(preempted for preempted, _ in short) > 0, "the pool was never short"
    assert sum(crowded for _, crowded in short) > 0 or policy[0] in LETS_WAIT


@pytest.mark.parametrize("policy", POLICIES, ids="-".join)
def test_every_plan_keeps_its_invariants(policy: tuple[PolicyName, OrderName]) -> None:
    check(policy, range(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids="-".join)
def test_every_plan_keeps_its_invariants_for_long(policy: tuple[PolicyName, OrderName]) -> None:
    check(policy, range(2, 12))
