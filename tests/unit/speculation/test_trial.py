"""Proposers that cost more than they save are asked less, and again when they are due."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import count

import pytest

from coppice.speculation.control import Controller
from coppice.speculation.interfaces import DraftView
from coppice.speculation.speculator import Speculator
from coppice.speculation.tree import ROOT, DraftTree
from coppice.speculation.trial import HOPELESS, MOST_LOSS, STEPS, Trial
from tests.unit.speculation.test_control import View


def run(trial: Trial, steps: int, saved: float, spent: float) -> tuple[int, float]:
    """Steps in which it was asked, and what was lost, in plain steps."""
    asked, lost = 0, 0.0
    for _ in range(steps):
        trial.rest()
        if trial.on:
            trial.asked(saved, spent)
            asked, lost = asked + 1, lost + spent - saved
    return asked, lost


@pytest.mark.parametrize("spent", [0.05, 0.2, 1.0, 5.0])
def test_what_saves_nothing_costs_no_more_than_its_part(spent: float) -> None:
    asked, lost = run(Trial(), 50_000, 0.0, spent)
    assert asked >= STEPS
    assert lost <= 1.2 * MOST_LOSS * 50_000 + 2 * STEPS * spent


def test_what_saves_more_than_it_costs_is_asked_all_but_always() -> None:
    rng, trial, on = random.Random(1), Trial(), 0
    for _ in range(5000):
        trial.rest()
        on += trial.on
        if trial.on:
            trial.asked(saved=2.0 * (rng.random() < 0.4), spent=0.4)
    assert on > 4900


def test_reading_the_prompt_first_is_no_verdict() -> None:
    trial = Trial()
    trial.asked(0.0, 10.0)
    for _ in range(2 * STEPS):
        trial.rest()
        assert trial.on
        trial.asked(1.5, 0.5)
    trial = Trial()
    trial.asked(0.0, HOPELESS + 1.0)
    assert not trial.on


def test_what_was_bad_and_is_good_now_is_found_out() -> None:
    trial = Trial()
    run(trial, 200, 0.0, 0.5)
    assert not trial.on
    asked, _ = run(trial, 3000, 1.0, 0.5)
    assert asked > 1000


class Slow:
    """Takes as long as a step to guess a token that never comes."""

    name, branches, pass_s = "slow", False, 0.0

    def __init__(self) -> None:
        self.asked = 0

    def propose(self, views: Sequence[DraftView], limits: Sequence[int]) -> list[DraftTree | None]:
        self.asked += 1
        time.sleep(0.001)
        return [DraftTree("slow", [7], [ROOT], [-0.1]) for _ in views]

    def forget(self, arrival: int) -> None:
        pass


def test_a_slow_proposer_rests_but_for_those_who_name_it() -> None:
    slow = Slow()
    controller = Controller(lambda rows: 0.001, max_depth=4)
    speculator = Speculator([slow], controller, vocab_size=50, on_trial=True)

    def steps(speculate: str, number: int) -> int:
        before = slow.asked
        for i in range(number):
            view = View([1, 2, 3 + i % 20], arrival=next(arrivals), speculate=speculate)
            skipped = speculator.skips([view])
            trees = {} if skipped else speculator.grow([view], rows=1, spare=8)
            for arrival, tree in trees.items():
                speculator.observe(arrival, tree, 0)
            speculator.step_took(1 + len(trees), len(trees), 0.001)
        return slow.asked - before

    arrivals = count()
    assert steps("auto", 300) < 100
    assert steps("slow", 20) == 20
